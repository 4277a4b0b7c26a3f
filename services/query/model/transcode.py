"""A stored dataset in another transfer syntax (PS3.5 Annex A): never lossy, nothing changed but its encoding."""

from __future__ import annotations

import io
import zlib

from pydicom import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import dcmread
from pydicom.filewriter import write_dataset
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from libs.common.dicom.part10 import build_file_meta
from libs.common.errors import Invalid
from services.query.model.encoding import (
    BITS_ALLOCATED,
    EXPLICIT_BIG,
    EXPLICIT_LITTLE,
    IMPLICIT_LITTLE,
    PIXEL_DATA,
    Encoding,
    elements,
)

ENCODINGS: dict[str, Encoding] = {
    ExplicitVRLittleEndian: EXPLICIT_LITTLE,
    ImplicitVRLittleEndian: IMPLICIT_LITTLE,
    DeflatedExplicitVRLittleEndian: EXPLICIT_LITTLE,
    ExplicitVRBigEndian: EXPLICIT_BIG,
}
"""What can be written, best first."""


def transcode(dataset: bytes, source: str, accepted: tuple[str, ...]) -> tuple[str, bytes]:
    """The dataset in the best of the accepted transfer syntaxes that is not compressed: its UID and the bytes.

    Pixels are decompressed when they have to be; of the other elements not a value changes, save those that describe
    the pixels' layout. Raises Invalid when none can be written, or the stored bytes cannot be read.
    """
    if source in accepted:
        return source, dataset
    target = next((syntax for syntax in ENCODINGS if syntax in accepted), None)
    if target is None:
        raise Invalid("the receiver takes no uncompressed transfer syntax")
    try:
        if source == DeflatedExplicitVRLittleEndian:
            inflater = zlib.decompressobj(-zlib.MAX_WBITS)
            dataset = inflater.decompress(dataset)
        written = elements(dataset, ENCODINGS.get(source, EXPLICIT_LITTLE), ENCODINGS[target])
        if source not in ENCODINGS:
            written = _with_decoded_pixels(written, dataset, source, ENCODINGS[target])
    except Invalid as error:
        raise Invalid(f"{UID(source).name} cannot be converted: {error}") from error
    except Exception as error:
        # Decoders fail in as many ways as there are broken files; each is the same to the receiver.
        raise Invalid(f"{UID(source).name} cannot be converted ({type(error).__name__})") from error
    encoded = b"".join(written.values())
    return target, _deflated(encoded) if target == DeflatedExplicitVRLittleEndian else encoded


def _with_decoded_pixels(written: dict[int, bytes], dataset: bytes, source: str, target: Encoding) -> dict[int, bytes]:
    """The elements with native pixel data and what of the Image Pixel module decoding has changed."""
    content = build_file_meta("1.2.840.10008.5.1.4.1.1.7", "2.25.1", source) + dataset
    decoded = dcmread(io.BytesIO(content))
    if "PixelData" not in decoded:
        return written
    decoded.decompress(as_rgb=False, generate_instance_uid=False)
    before = dcmread(io.BytesIO(content), stop_before_pixels=True)
    changed = Dataset()
    for element in decoded:
        tag = element.tag
        # Bits Allocated goes along in any case: the byte order of long pixels depends on it.
        if tag in (PIXEL_DATA, BITS_ALLOCATED) or (
            tag.group == 0x0028 and (tag not in before or before[tag] != element)
        ):
            changed.add(element)
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    write_dataset(buffer, changed)
    kept = {tag: element for tag, element in written.items() if tag in decoded}
    return dict(sorted({**kept, **elements(buffer.getvalue(), EXPLICIT_LITTLE, target)}.items()))


def _deflated(encoded: bytes) -> bytes:
    deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    deflated = deflate.compress(encoded) + deflate.flush()
    return deflated + b"\0" * (len(deflated) % 2)  # an even length (PS3.5 A.5)
