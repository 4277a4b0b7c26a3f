"""Datasets that an acceptor has to read or write itself: identifiers and attribute lists, never instances."""

from __future__ import annotations

import zlib
from io import BytesIO

from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom.dsutils import decode, encode

from libs.common.errors import Invalid
from libs.dimse.model import Payload

_LARGEST_INFLATED = 64 << 20


def read_dataset(payload: Payload, transfer_syntax_uid: str) -> Dataset:
    """Raises Invalid when it cannot be decoded, or would inflate to more than 64 MiB."""
    syntax = UID(transfer_syntax_uid)
    data = payload.read()
    try:
        if syntax.is_deflated:
            inflate = zlib.decompressobj(-zlib.MAX_WBITS)
            data = inflate.decompress(data, _LARGEST_INFLATED)
            if inflate.unconsumed_tail:
                raise Invalid("The dataset inflates to more than any identifier.")
        dataset = decode(BytesIO(data), syntax.is_implicit_VR, syntax.is_little_endian)
        for element in dataset.iterall():
            # Values are read lazily: an unreadable one shows here and not in a handler.
            _ = element.value
    except Invalid:
        raise
    except Exception as error:  # the codec fails in as many ways as there are malformed datasets
        raise Invalid("The dataset of the request cannot be read.") from error
    return dataset


def write_dataset(dataset: Dataset, transfer_syntax_uid: str) -> bytes:
    """Raises ValueError for a dataset that cannot be encoded: ours, so a defect."""
    syntax = UID(transfer_syntax_uid)
    encoded = encode(dataset, syntax.is_implicit_VR, syntax.is_little_endian, syntax.is_deflated)
    if encoded is None:
        raise ValueError("a dataset of an answer cannot be encoded")
    return encoded
