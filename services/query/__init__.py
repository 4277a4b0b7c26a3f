"""Find and hand back: C-FIND, C-MOVE and C-GET over the image index and the object store.

Hears: nothing.
Tells: nothing.
Owns: nothing; it reads the image index that indexing writes, and the objects that ingest wrote.
"""
