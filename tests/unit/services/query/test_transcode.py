"""Every transfer syntax to the ones without compression: equal pixels, equal values, equal UIDs."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
)

from libs.common.dicom.part10 import build_file_meta, split_part10
from libs.common.errors import Invalid
from services.query.model.transcode import transcode

FILES = [
    "CT_small.dcm",  # explicit little endian, private elements
    "MR_small_implicit.dcm",
    "MR_small_bigendian.dcm",
    "rtplan.dcm",  # implicit, nested sequences
    "image_dfl.dcm",  # deflated
    "ExplVR_BigEnd.dcm",
    "MR_small_RLE.dcm",
    "SC_rgb_rle_2frame.dcm",
    "rtdose_rle_1frame.dcm",
    "MR_small_jpeg_ls_lossless.dcm",
    "MR_small_jp2klossless.dcm",
    "SC_rgb_jpeg_dcmtk.dcm",  # lossy baseline
    "JPEG2000.dcm",
    "liver_1frame.dcm",  # one bit per pixel
]
TARGETS = [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
LAYOUT = {"PixelData", "PhotometricInterpretation", "PlanarConfiguration"}


def part10(name: str) -> bytes:
    return Path(str(get_testdata_file(name, download=False))).read_bytes()


def convert(content: bytes, target: str) -> Dataset:
    meta, offset = split_part10(content)
    syntax, converted = transcode(content[offset:], meta.transfer_syntax_uid, (target,))
    assert syntax == target
    return dcmread(io.BytesIO(build_file_meta(meta.sop_class_uid, meta.sop_instance_uid, target) + converted))


@pytest.mark.parametrize("target", TARGETS, ids=lambda uid: uid.name)
@pytest.mark.parametrize("name", FILES)
def test_nothing_but_the_encoding_changes(name: str, target: str) -> None:
    content = part10(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, after = dcmread(io.BytesIO(content)), convert(content, target)
        if "PixelData" in before:
            np.testing.assert_array_equal(before.pixel_array, after.pixel_array)
        wrong = []
        for element in before:
            if element.tag.element == 0 or element.keyword in LAYOUT:
                continue
            other = after.get(element.tag)
            # What a reader makes of a private element without VR is its own affair; the bytes are compared elsewhere.
            unsure = other is not None and element.VR != other.VR and element.tag.is_private
            if other is None or (not unsure and element.value != other.value):
                wrong.append(element.keyword or str(element.tag))
        assert wrong == []
        assert {e.tag for e in after} <= {e.tag for e in before}


def test_explicit_to_implicit_and_back_is_the_same_bytes() -> None:
    content = part10("CT_small.dcm")
    dataset = content[split_part10(content)[1] :]
    _, implicit = transcode(dataset, ExplicitVRLittleEndian, (ImplicitVRLittleEndian,))
    _, big = transcode(dataset, ExplicitVRLittleEndian, (ExplicitVRBigEndian,))
    _, back = transcode(big, ExplicitVRBigEndian, (ExplicitVRLittleEndian,))
    assert back == dataset
    assert len(implicit) < len(dataset)


def test_an_accepted_source_is_left_alone() -> None:
    assert transcode(b"as it is", JPEGBaseline8Bit, (ExplicitVRLittleEndian, JPEGBaseline8Bit)) == (
        JPEGBaseline8Bit,
        b"as it is",
    )


def test_the_best_of_what_is_accepted_is_taken() -> None:
    content = part10("MR_small_RLE.dcm")
    meta, offset = split_part10(content)
    accepted = (ImplicitVRLittleEndian, ExplicitVRLittleEndian)
    assert transcode(content[offset:], meta.transfer_syntax_uid, accepted)[0] == ExplicitVRLittleEndian


def test_no_lossy_and_no_compressed_target() -> None:
    content = part10("CT_small.dcm")
    with pytest.raises(Invalid, match="no uncompressed"):
        transcode(content[split_part10(content)[1] :], ExplicitVRLittleEndian, (JPEGBaseline8Bit,))


@pytest.mark.parametrize("cut", [3, 9, 201, 5000])
def test_a_torn_dataset_is_refused(cut: int) -> None:
    content = part10("rtplan.dcm" if cut < 2000 else "CT_small.dcm")
    meta, offset = split_part10(content)
    target = ImplicitVRLittleEndian if cut > 2000 else ExplicitVRLittleEndian
    with pytest.raises(Invalid):
        transcode(content[offset : offset + cut], meta.transfer_syntax_uid, (target,))


def test_damaged_pixels_are_refused() -> None:
    content = bytearray(part10("MR_small_jp2klossless.dcm"))
    meta, offset = split_part10(bytes(content))
    start = content.index(b"\xff\x4f\xff\x51", offset)
    content[start : start + 200] = bytes(200)
    with pytest.raises(Invalid, match="cannot be converted"):
        transcode(bytes(content[offset:]), meta.transfer_syntax_uid, (ExplicitVRLittleEndian,))
