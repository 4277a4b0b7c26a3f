"""Ingest: takes instances from modalities and keeps them for good before it says success.

Hears: nothing
Tells: instance.stored, instance.rejected
Owns: instances/ in the object store (writes), quarantine (its own entries)
"""
