"""Queries over a small archive and what each must find: asked of every catalog."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, MRImageStorage, SecondaryCaptureImageStorage

from services.query.model.query import PATIENT_ROOT, STUDY_ROOT, InformationModel
from tests.builders import create_instance, uid


def _item(**keywords: Any) -> Dataset:
    item = Dataset()
    for keyword, value in keywords.items():
        setattr(item, keyword, value)
    return item


def create_archive() -> list[Dataset]:
    """Four patients, six studies; the accession number names the study."""
    muller: dict[str, Any] = {
        "PatientID": "P-1",
        "PatientName": "Müller^Jörg^^Dr",
        "SpecificCharacterSet": "ISO_IR 192",
    }
    yamada: dict[str, Any] = {
        "PatientID": "P-2",
        "PatientName": "Yamada^Tarou=山田^太郎=やまだ^たろう",
        "SpecificCharacterSet": "ISO_IR 192",
    }
    code = _item(CodeValue="CTCHEST", CodingSchemeDesignator="99X", CodeMeaning="CT of chest")
    request = _item(RequestedProcedureID="RP1", ScheduledProcedureStepID="SPS1", AccessionNumber="A1")
    return [
        create_instance(**muller, AccessionNumber="A1", StudyDate="20240131", StudyTime="101500", InstanceNumber=1,
                        ProcedureCodeSequence=[code], RequestAttributesSequence=[request]),
        create_instance(**muller, AccessionNumber="A1", StudyDate="20240131", StudyTime="101500", InstanceNumber=2,
                        ProcedureCodeSequence=[code], RequestAttributesSequence=[request]),
        create_instance(**muller, AccessionNumber="A1", StudyDate="20240131", StudyTime="101500", Modality="MR",
                        SOPClassUID=MRImageStorage, SeriesNumber=2, ProcedureCodeSequence=[code]),
        create_instance(**muller, AccessionNumber="A2", StudyDate="20240215", StudyTime="2359", Modality="SC",
                        SOPClassUID=SecondaryCaptureImageStorage, StudyDescription="Knee (left) 1.5*"),
        create_instance(**yamada, AccessionNumber="A3", StudyDate="20231224", StudyTime="070000.5", Modality="MR",
                        SOPClassUID=MRImageStorage, StudyDescription="Head", AcquisitionDateTime="20231224070001.25"),
        create_instance(PatientID="P-3", PatientName="SMITH", AccessionNumber="A4", StudyDate="20240101",
                        StudyTime="000000", StudyDescription="Knee right", PatientSex="M"),
        create_instance(PatientID="P-3", PatientName="SMITH", AccessionNumber="A5", StudyDate=None, StudyTime=None,
                        StudyDescription=None, PatientSex="M"),
        create_instance(PatientID="P*4", PatientName="Smithson^Anne", AccessionNumber="A6", StudyDate="20240131",
                        StudyTime="093000", IssuerOfPatientID="OTHER", StudyDescription="Knee\nboth"),
    ]  # fmt: skip


@dataclass(frozen=True)
class Question:
    """Keys of a query and the accession numbers (or, below studies, numbers of matches) expected."""

    name: str
    keys: dict[str, Any]
    expected: set[str] | int
    level: str = "STUDY"
    model: InformationModel = STUDY_ROOT
    relational: bool = False
    combined: bool = False

    def identifier(self) -> Dataset:
        identifier = Dataset()
        identifier.QueryRetrieveLevel = self.level
        identifier.SpecificCharacterSet = "ISO_IR 192"
        if self.level == "STUDY":
            identifier.AccessionNumber = ""
        for keyword, value in self.keys.items():
            setattr(identifier, keyword, value)
        return identifier


STUDY_1 = uid("study", "P-1", "A1")
SERIES_1 = uid("series", STUDY_1, "CT", 1)
ALL = {"A1", "A2", "A3", "A4", "A5", "A6"}

QUESTIONS = [
    Question("universal", {}, ALL),
    Question("single value", {"PatientID": "P-1"}, {"A1", "A2"}),
    Question("single value counts case", {"PatientID": "p-1"}, set()),
    Question("accession number", {"AccessionNumber": "A3"}, {"A3"}),
    Question("wildcard", {"PatientID": "P-*"}, ALL - {"A6"}),
    Question("question mark", {"PatientID": "P-?"}, ALL - {"A6"}),
    Question("question mark is one character", {"PatientID": "P?"}, set()),
    Question("only asterisks find the absent too", {"StudyDescription": "**"}, ALL),
    Question("wildcard does not find the absent", {"StudyDescription": "?*"}, ALL - {"A5"}),
    Question("regular expression characters are text", {"StudyDescription": "Knee (left) 1.5*"}, {"A2"}),
    Question("dot is a dot", {"StudyDescription": "Knee (left) 1?5?"}, {"A2"}),
    Question("dot is not any character", {"StudyDescription": "K.ee*"}, set()),
    Question("anchored at both ends", {"StudyDescription": "nee*"}, set()),
    Question("in the middle", {"StudyDescription": "*ight"}, {"A4"}),
    Question("over a line end", {"StudyDescription": "Knee?both"}, {"A6"}),
    Question("list of uid", {"StudyInstanceUID": [STUDY_1, uid("study", "P-3", "A4")]}, {"A1", "A4"}),
    Question("issuer of the site", {"IssuerOfPatientID": "MAIN", "PatientSex": "M"}, {"A4", "A5"}),
    Question("other issuer", {"IssuerOfPatientID": "OTHER"}, {"A6"}),
    Question("date", {"StudyDate": "20240131"}, {"A1", "A6"}),
    Question("date of old", {"StudyDate": "2024.01.31"}, {"A1", "A6"}),
    Question("date range", {"StudyDate": "20240101-20240131"}, {"A1", "A4", "A6"}),
    Question("date up to", {"StudyDate": "-20240101"}, {"A3", "A4"}),
    Question("date from", {"StudyDate": "20240201-"}, {"A2"}),
    Question("time", {"StudyTime": "10"}, {"A1"}),
    Question("time of full precision", {"StudyTime": "070000.500000"}, {"A3"}),
    Question("time to the second", {"StudyTime": "070000"}, {"A3"}),
    Question("time range", {"StudyTime": "0930-1015"}, {"A1", "A6"}),
    Question("time up to the end of its minute", {"StudyTime": "2300-2359"}, {"A2"}),
    Question("date and time apart", {"StudyDate": "20240101-20240215", "StudyTime": "0900-1100"}, {"A1", "A6"}),
    Question(
        "date and time together",
        {"StudyDate": "20231224-20240131", "StudyTime": "0800-1000"},
        {"A4", "A6"},
        combined=True,
    ),
    Question("name folded", {"PatientName": "MULLER^JORG^^DR"}, {"A1", "A2"}),
    Question("name as written", {"PatientName": "Müller^Jörg^^Dr"}, {"A1", "A2"}),
    Question("name prefix", {"PatientName": "müll*"}, {"A1", "A2"}),
    Question("name without wildcard is whole", {"PatientName": "Muller"}, set()),
    Question("name component", {"PatientName": "Muller^J*"}, {"A1", "A2"}),
    Question("name with absent components", {"PatientName": "smith^*"}, {"A4", "A5"}),
    Question("name with empty components", {"PatientName": "SMITH^^^^"}, {"A4", "A5"}),
    Question("name prefix over several", {"PatientName": "smith*"}, {"A4", "A5", "A6"}),
    Question("name inner wildcard", {"PatientName": "*^t*u"}, {"A3"}),
    Question("name universal", {"PatientName": "*"}, ALL),
    Question("ideographic group alone", {"PatientName": "山田*"}, {"A3"}),
    Question("ideographic in its group", {"PatientName": "=山田^太郎"}, {"A3"}),
    Question("phonetic in its group", {"PatientName": "==やまだ*"}, {"A3"}),
    Question("two groups", {"PatientName": "yamada*=山田*"}, {"A3"}),
    Question("two groups, one wrong", {"PatientName": "yamada*=田中*"}, set()),
    Question("modalities in study", {"ModalitiesInStudy": "MR"}, {"A1", "A3"}),
    Question("one of some modalities", {"ModalitiesInStudy": ["CT", "SC"]}, ALL - {"A3"}),
    Question("modality wildcard", {"ModalitiesInStudy": "S*"}, {"A2"}),
    Question("sop classes in study", {"SOPClassesInStudy": MRImageStorage}, {"A1", "A3"}),
    Question("sequence", {"ProcedureCodeSequence": [_item(CodeValue="CTCHEST")]}, {"A1"}),
    Question(
        "sequence with several keys",
        {"ProcedureCodeSequence": [_item(CodeValue="CT*", CodingSchemeDesignator="99Y")]},
        set(),
    ),
    Question("sequence universal", {"ProcedureCodeSequence": [_item(CodeValue="")]}, ALL),
    Question("all series of a study", {"StudyInstanceUID": STUDY_1}, 2, "SERIES"),
    Question("series by modality", {"StudyInstanceUID": STUDY_1, "Modality": "MR"}, 1, "SERIES"),
    Question("series by number", {"StudyInstanceUID": STUDY_1, "SeriesNumber": "2"}, 1, "SERIES"),
    Question(
        "series by request",
        {"StudyInstanceUID": STUDY_1, "RequestAttributesSequence": [_item(RequestedProcedureID="RP?")]},
        1,
        "SERIES",
    ),
    Question(
        "series, patient root",
        {"PatientID": "P-1", "StudyInstanceUID": STUDY_1},
        2,
        "SERIES",
        PATIENT_ROOT,
    ),
    Question(
        "series of another patient, patient root",
        {"PatientID": "P-2", "StudyInstanceUID": STUDY_1},
        0,
        "SERIES",
        PATIENT_ROOT,
    ),
    Question("series, relational", {"PatientName": "smith*", "Modality": "CT"}, 3, "SERIES", relational=True),
    Question("images", {"StudyInstanceUID": STUDY_1, "SeriesInstanceUID": SERIES_1}, 2, "IMAGE"),
    Question(
        "image by number",
        {"StudyInstanceUID": STUDY_1, "SeriesInstanceUID": SERIES_1, "InstanceNumber": "2"},
        1,
        "IMAGE",
    ),
    Question(
        "images by class, relational",
        {"SOPClassUID": CTImageStorage, "PatientID": "P-1"},
        2,
        "IMAGE",
        relational=True,
    ),
    Question("images by modality, relational", {"Modality": "MR"}, 2, "IMAGE", relational=True),
    Question(
        "images by name and modality, relational",
        {"PatientName": "Muller*", "Modality": "MR", "Rows": 4},
        1,
        "IMAGE",
        relational=True,
    ),
    Question("images by date and time", {"AcquisitionDateTime": "20231224-20231225"}, 1, "IMAGE", relational=True),
    Question("images up to a moment", {"AcquisitionDateTime": "-2023122407"}, 1, "IMAGE", relational=True),
    Question("images after a moment", {"AcquisitionDateTime": "20231224070002-"}, 0, "IMAGE", relational=True),
    Question("patients", {}, 4, "PATIENT", PATIENT_ROOT),
    Question("patients by name", {"PatientName": "smith*"}, 2, "PATIENT", PATIENT_ROOT),
    Question("patients by id", {"PatientID": "P-2"}, 1, "PATIENT", PATIENT_ROOT),
]
