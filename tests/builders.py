"""Small valid DICOM instances for tests, every attribute of them to be chosen."""

from __future__ import annotations

import hashlib
import io
from typing import Any

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

_DEFAULTS: dict[str, Any] = {
    "SOPClassUID": CTImageStorage,
    "PatientName": "Doe^Jane",
    "PatientID": "P1",
    "PatientBirthDate": "19700102",
    "PatientSex": "F",
    "StudyDate": "20240131",
    "StudyTime": "101500",
    "AccessionNumber": "A1",
    "StudyID": "1",
    "StudyDescription": "Chest",
    "ReferringPhysicianName": "Roe^Richard",
    "Modality": "CT",
    "SeriesNumber": 1,
    "InstanceNumber": 1,
}


def uid(*parts: object) -> UID:
    """The same UID for the same parts, in the 2.25 arc of PS3.5 B.2."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return UID(f"2.25.{int.from_bytes(digest[:15], 'big')}")


def create_instance(
    *,
    transfer_syntax_uid: str = ExplicitVRLittleEndian,
    rows: int = 4,
    columns: int = 4,
    pixels: bytes | None = None,
    **keywords: Any,
) -> Dataset:
    """A dataset with file meta: 16 bit monochrome, ``rows`` x ``columns``; ``None`` leaves an attribute out.

    UIDs not given follow from what makes the thing what it is: the study from patient and accession number, the series
    from study, modality and number, the instance from series and number. ``pixels`` are the native bytes (little
    endian), zeros unless given; with ``rows=0`` there is no image.
    """
    values = {**_DEFAULTS, **keywords}
    values.setdefault("StudyInstanceUID", uid("study", values["PatientID"], values["AccessionNumber"]))
    values.setdefault(
        "SeriesInstanceUID", uid("series", values["StudyInstanceUID"], values["Modality"], values["SeriesNumber"])
    )
    values.setdefault("SOPInstanceUID", uid("instance", values["SeriesInstanceUID"], values["InstanceNumber"]))
    if rows:
        image = {"SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "Rows": rows, "Columns": columns}
        image |= {"BitsAllocated": 16, "BitsStored": 16, "HighBit": 15, "PixelRepresentation": 0}
        values = {**image, "PixelData": pixels if pixels is not None else bytes(rows * columns * 2), **values}
    dataset = Dataset()
    for keyword, value in values.items():
        if value is not None:
            setattr(dataset, keyword, value)
    if "PixelData" in dataset:
        dataset["PixelData"].VR = "OW"
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = values["SOPClassUID"]
    meta.MediaStorageSOPInstanceUID = values["SOPInstanceUID"]
    meta.TransferSyntaxUID = UID(transfer_syntax_uid)
    dataset.file_meta = meta
    return dataset


def create_file(**keywords: Any) -> bytes:
    """The same as a DICOM file (PS3.10 section 7)."""
    buffer = io.BytesIO()
    create_instance(**keywords).save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def create_dataset_bytes(**keywords: Any) -> bytes:
    """The same as it travels in a C-STORE: the encoded dataset without preamble and file meta."""
    content = create_file(**keywords)
    # Preamble, prefix, then (0002,0000): 12 bytes, whose value counts what follows it (PS3.10 section 7.1).
    return content[144 + int.from_bytes(content[140:144], "little") :]
