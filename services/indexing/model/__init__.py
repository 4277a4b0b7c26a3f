"""The rules of the image index, on plain documents: what a header becomes, which version counts, what is counted.

Everything here is pure. ``apply`` changes a ``State`` (the documents one transaction works on), so that the result
depends on which instances were stored, never on the order or the number of times in which we heard of them.
"""

from services.indexing.model.counting import apply, drop_empty
from services.indexing.model.documents import (
    COLLECTIONS,
    Collection,
    Document,
    Found,
    HeaderNeeded,
    NotLoaded,
    Outcome,
    State,
    Verdict,
    describe,
    whole_milliseconds,
)
from services.indexing.model.versions import settle

__all__ = [
    "COLLECTIONS",
    "Collection",
    "Document",
    "Found",
    "HeaderNeeded",
    "NotLoaded",
    "Outcome",
    "State",
    "Verdict",
    "apply",
    "describe",
    "drop_empty",
    "settle",
    "whole_milliseconds",
]
