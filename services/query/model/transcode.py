"""A stored dataset in another transfer syntax (PS3.5 Annex A): never lossy, nothing changed but its encoding."""

from __future__ import annotations

import io
import zlib

from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import dcmread
from pydicom.filewriter import dcmwrite
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from libs.common.dicom.part10 import build_file_meta
from libs.common.errors import Invalid

TARGETS: tuple[str, ...] = (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
)
"""What can be written, best first."""


def transcode(dataset: bytes, source: str, accepted: tuple[str, ...]) -> tuple[str, bytes]:
    """The dataset in the best of the accepted transfer syntaxes that is not compressed: its UID and the bytes.

    Raises Invalid when none can be written, or the stored pixels cannot be decoded.
    """
    if source in accepted:
        return source, dataset
    target = next((syntax for syntax in TARGETS if syntax in accepted), None)
    if target is None:
        raise Invalid("the receiver takes no uncompressed transfer syntax")
    try:
        return target, _write(_read(dataset, source), target)
    except Invalid:
        raise
    except Exception as error:
        # Decoders fail in as many ways as there are broken files; each is the same to the receiver.
        raise Invalid(f"transfer syntax {source} cannot be converted ({type(error).__name__})") from error


def _read(dataset: bytes, source: str) -> Dataset:
    meta = build_file_meta("1.2.840.10008.5.1.4.1.1.7", "2.25.1", source)
    read = dcmread(io.BytesIO(meta + dataset))
    if UID(source).is_compressed and not UID(source).is_deflated and "PixelData" in read:
        read.decompress(as_rgb=False, generate_instance_uid=False)
    return read


def _write(dataset: Dataset, target: str) -> bytes:
    dataset.file_meta = FileMetaDataset()
    buffer = DicomBytesIO()
    dcmwrite(
        buffer,
        dataset,
        implicit_vr=target == ImplicitVRLittleEndian,
        little_endian=target != ExplicitVRBigEndian,
        enforce_file_format=False,
    )
    written = buffer.getvalue()
    if target == DeflatedExplicitVRLittleEndian:
        deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        written = deflate.compress(written) + deflate.flush()
        written += b"\0" * (len(written) % 2)
    return written
