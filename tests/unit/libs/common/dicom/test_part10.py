"""The shell of a DICOM file: what we build, pydicom reads; what others wrote, we split."""

from __future__ import annotations

import io
from pathlib import Path

import pydicom
import pytest
from pydicom.data import get_testdata_file

from libs.common.dicom.part10 import FileMeta, Truncated, build_file_meta, split_part10
from libs.common.dicom.uids import is_usable_uid, is_valid_uid
from libs.common.errors import Invalid

CT = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"


def test_pydicom_reads_what_we_build() -> None:
    meta = build_file_meta(CT, "1.2.3", EXPLICIT)
    read = pydicom.dcmread(io.BytesIO(meta))
    assert read.file_meta.MediaStorageSOPClassUID == CT
    assert read.file_meta.MediaStorageSOPInstanceUID == "1.2.3"
    assert read.file_meta.TransferSyntaxUID == EXPLICIT
    assert read.file_meta.FileMetaInformationGroupLength == len(meta) - 132 - 12
    assert read.file_meta.ImplementationVersionName == "SAGITTAL"
    assert len(read.file_meta.ImplementationClassUID) <= 64 and read.file_meta.ImplementationClassUID.is_valid
    assert meta == build_file_meta(CT, "1.2.3", EXPLICIT)


def test_what_we_build_splits_again() -> None:
    meta = build_file_meta(CT, "1.2.3", EXPLICIT)
    assert split_part10(meta + b"\x08\x00\x05\x00CS\x00\x00") == (FileMeta(CT, "1.2.3", EXPLICIT), len(meta))
    assert split_part10(meta)[1] == len(meta)


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small_bigendian.dcm", "image_dfl.dcm", "JPEG2000.dcm"])
def test_files_of_others_are_split_where_pydicom_splits_them(name: str) -> None:
    path = get_testdata_file(name)
    assert isinstance(path, str)
    content = Path(path).read_bytes()
    meta, offset = split_part10(memoryview(content))
    read = pydicom.dcmread(path)
    assert meta.transfer_syntax_uid == read.file_meta.TransferSyntaxUID
    assert meta.sop_instance_uid == read.file_meta.MediaStorageSOPInstanceUID
    assert offset == 132 + 12 + read.file_meta.FileMetaInformationGroupLength


def test_bad_shells_are_refused() -> None:
    meta = build_file_meta(CT, "1.2.3", EXPLICIT)
    for end in (10, 140, 150, len(meta) - 1):
        with pytest.raises(Truncated):
            split_part10(meta[:end])
    with pytest.raises(Invalid):
        split_part10(bytes(200))
    with pytest.raises(Invalid):
        build_file_meta(CT, "1." * 40, EXPLICIT)
    with pytest.raises(Invalid):
        build_file_meta(CT, "", EXPLICIT)


def test_uids() -> None:
    assert is_valid_uid("1.2.840.0.3") and is_valid_uid("2.25." + "9" * 59)
    assert not any(is_valid_uid(uid) for uid in ("", "1.02", "1..2", "1.", ".1", "1.2a", "1." + "9" * 63, "1.2\n"))
    assert is_usable_uid("1.02.3") and not is_usable_uid("../1") and not is_usable_uid("..") and not is_usable_uid("")
