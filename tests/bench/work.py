"""The files that every archive in the bench gets: 500 CT of 512x512 and 2000 of 64x64, made once per run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

ROOT = "1.2.826.0.1.3680043.8.498.7"


def make_series(folder: Path, study: str, count: int, side: int, shares: int) -> list[Path]:
    """``count`` CT instances of ``side`` x ``side`` x 16 bit, spread over ``shares`` folders; gives the folders."""
    generator = np.random.default_rng(1)
    noise = generator.integers(0, 4096, size=(side, side), dtype=np.uint16)
    folders = []
    for share in range(shares):
        target = folder / f"share{share:02}"
        target.mkdir(parents=True, exist_ok=True)
        folders.append(target)
    for index in range(count):
        dataset = ct_header(study, index, side)
        dataset.PixelData = np.roll(noise, index).tobytes()
        dataset.save_as(folders[index % shares] / f"{index:05}.dcm", enforce_file_format=True)
    return folders


def ct_header(study: str, index: int, side: int) -> Dataset:
    """A CT header of the size that scanners write."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = f"{study}.1.{index + 1}"
    dataset.StudyInstanceUID = study
    dataset.SeriesInstanceUID = f"{study}.1"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.StudyDate = dataset.SeriesDate = dataset.ContentDate = "20260103"
    dataset.StudyTime = dataset.SeriesTime = dataset.ContentTime = "101500"
    dataset.AccessionNumber = "BENCH1"
    dataset.Modality = "CT"
    dataset.Manufacturer = "Bench"
    dataset.InstitutionName = "Hospital A"
    dataset.StudyDescription = "CT Head"
    dataset.SeriesDescription = "Axial 1 mm"
    dataset.PatientName = "Bench^Patient"
    dataset.PatientID = f"BENCH-{study.rsplit('.', 1)[-1]}"
    dataset.PatientBirthDate = "19700101"
    dataset.PatientSex = "F"
    dataset.SliceThickness = "1"
    dataset.KVP = "120"
    dataset.SeriesNumber = 1
    dataset.InstanceNumber = index + 1
    dataset.ImagePositionPatient = ["-125", "-125", str(index)]
    dataset.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
    dataset.FrameOfReferenceUID = f"{study}.2"
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows = dataset.Columns = side
    dataset.PixelSpacing = ["0.5", "0.5"]
    dataset.BitsAllocated = 16
    dataset.BitsStored = 12
    dataset.HighBit = 11
    dataset.PixelRepresentation = 0
    dataset.WindowCenter, dataset.WindowWidth = "40", "400"
    dataset.RescaleIntercept, dataset.RescaleSlope = "-1024", "1"
    return dataset
