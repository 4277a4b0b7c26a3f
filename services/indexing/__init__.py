"""Indexing: makes what was stored findable, from the headers in the object store.

Hears: instance.stored
Tells: instance.indexed, instance.rejected, study.stable, study.changed
Owns: patients, studies, series, instances (and its own entries of quarantine)
"""
