"""From the identifier of a request to what it asks: level, conditions and keys (PS3.4 C.4, C.6)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from libs.common.dicom import levels
from libs.common.dicom.dicom_json import DATE_TIME_PAIRS
from libs.common.errors import Invalid
from services.query.model.matching import AnyOf, Condition, Item, conditions_of, moment, split_range

Level = Literal["PATIENT", "STUDY", "SERIES", "IMAGE"]

SPECIFIC_CHARACTER_SET, QUERY_RETRIEVE_LEVEL = 0x00080005, 0x00080052
RETRIEVE_AE_TITLE, INSTANCE_AVAILABILITY = 0x00080054, 0x00080056
MODALITIES_IN_STUDY, SOP_CLASSES_IN_STUDY = 0x00080061, 0x00080062
SOP_CLASS_UID, SOP_INSTANCE_UID, MODALITY = 0x00080016, 0x00080018, 0x00080060
PATIENT_ID, ISSUER_OF_PATIENT_ID = 0x00100020, 0x00100021
STUDY_INSTANCE_UID, SERIES_INSTANCE_UID = 0x0020000D, 0x0020000E
PATIENT_STUDIES, PATIENT_SERIES, PATIENT_INSTANCES = 0x00201200, 0x00201202, 0x00201204
STUDY_SERIES, STUDY_INSTANCES, SERIES_INSTANCES = 0x00201206, 0x00201208, 0x00201209

UNIQUE_KEYS: dict[Level, int] = {
    "PATIENT": PATIENT_ID,
    "STUDY": STUDY_INSTANCE_UID,
    "SERIES": SERIES_INSTANCE_UID,
    "IMAGE": SOP_INSTANCE_UID,
}
SEARCH_FIELDS: dict[Level, dict[int, str]] = {
    "PATIENT": {PATIENT_ID: "patient_id", ISSUER_OF_PATIENT_ID: "issuer"},
    "STUDY": {
        PATIENT_ID: "patient_id",
        ISSUER_OF_PATIENT_ID: "issuer",
        STUDY_INSTANCE_UID: "_id",
        MODALITIES_IN_STUDY: "modalities",
        SOP_CLASSES_IN_STUDY: "sop_classes",
    },
    "SERIES": {SERIES_INSTANCE_UID: "_id", STUDY_INSTANCE_UID: "study_instance_uid", MODALITY: "modality"},
    "IMAGE": {
        SOP_INSTANCE_UID: "_id",
        SERIES_INSTANCE_UID: "series_instance_uid",
        STUDY_INSTANCE_UID: "study_instance_uid",
        SOP_CLASS_UID: "sop_class_uid",
    },
}
"""Attributes that the index's documents hold in a field of their own, beside their DICOM JSON."""
COUNT_FIELDS: dict[Level, dict[int, str]] = {
    "PATIENT": {PATIENT_STUDIES: "study_count", PATIENT_SERIES: "series_count", PATIENT_INSTANCES: "instance_count"},
    "STUDY": {STUDY_SERIES: "series_count", STUDY_INSTANCES: "instance_count"},
    "SERIES": {SERIES_INSTANCES: "instance_count"},
    "IMAGE": {},
}
KEPT: dict[Level, frozenset[int]] = {
    "PATIENT": levels.PATIENT,
    "STUDY": levels.PATIENT | levels.STUDY | {MODALITIES_IN_STUDY, SOP_CLASSES_IN_STUDY},
    "SERIES": levels.SERIES,
    "IMAGE": levels.INSTANCE,
}
DOCUMENTS: dict[Level, tuple[Level, ...]] = {
    "PATIENT": ("PATIENT",),
    "STUDY": ("STUDY",),
    "SERIES": ("SERIES", "STUDY"),
    "IMAGE": ("IMAGE", "SERIES", "STUDY"),
}
"""Whose documents hold the attributes of a level and of those above: a study's hold its patient's as well."""
ANSWERED_BY_US = frozenset({SPECIFIC_CHARACTER_SET, QUERY_RETRIEVE_LEVEL, RETRIEVE_AE_TITLE, INSTANCE_AVAILABILITY})


@dataclass(frozen=True)
class InformationModel:
    """One of the information models of PS3.4 C.6, by the levels it has, from the top."""

    name: str
    levels: tuple[Level, ...]


PATIENT_ROOT = InformationModel("Patient Root", ("PATIENT", "STUDY", "SERIES", "IMAGE"))
STUDY_ROOT = InformationModel("Study Root", ("STUDY", "SERIES", "IMAGE"))
PATIENT_STUDY_ONLY = InformationModel("Patient/Study Only", ("PATIENT", "STUDY"))


@dataclass(frozen=True)
class Key:
    """An attribute the answer has to contain. ``items`` are the keys of a sequence's items, None for all of them."""

    tag: int
    vr: str
    items: tuple[Key, ...] | None = None


@dataclass(frozen=True)
class Query:
    """What a request asks. ``conditions`` by the document that holds them; ``unsupported`` keys were not matched."""

    level: Level
    conditions: Mapping[Level, tuple[Condition, ...]]
    keys: tuple[Key, ...]
    unsupported: tuple[int, ...] = ()
    character_sets: tuple[str, ...] = ()


def home(level: Level, tag: int) -> Level | None:
    """The nearest document, from the level upwards, that holds the attribute; None when none does."""
    for candidate in DOCUMENTS[level]:
        if tag in SEARCH_FIELDS[candidate] or tag in KEPT[candidate] or tag in COUNT_FIELDS[candidate]:
            return candidate
    return None


def parse_level(identifier: Dataset, model: InformationModel) -> Level:
    """The level the identifier names. Raises Invalid when it is missing or not one of the model's."""
    text = str(identifier.get("QueryRetrieveLevel", "") or "").strip().upper()
    for level in model.levels:
        if text == level:
            return level
    raise Invalid(f"level {text or '(none)'} is not in {model.name}")


def parse_query(
    identifier: Dataset,
    model: InformationModel,
    *,
    relational: bool = False,
    combined_date_time: bool = False,
    strict: bool = True,
) -> Query:
    """What a C-FIND identifier asks. Raises Invalid when it does not fit the model (PS3.4 C.4.1.1.3)."""
    level = parse_level(identifier, model)
    if strict and not relational:
        require_unique_keys(identifier, model, level)
    found: dict[Level, list[Condition]] = {document: [] for document in DOCUMENTS[level]}
    keys: list[Key] = []
    unsupported: list[int] = []
    pairs = _combined(identifier, level, found) if combined_date_time else frozenset()
    for element in identifier:
        tag = int(element.tag)
        if tag in ANSWERED_BY_US:
            keys.append(Key(tag, str(element.VR)))
            continue
        if tag & 0xFFFF == 0:
            continue  # group lengths of old peers
        keys.append(_key(element))
        if tag in pairs:
            continue
        conditions = _conditions(element)
        holder = home(level, tag)
        if not conditions:
            continue
        if holder is None or tag in COUNT_FIELDS[holder]:
            unsupported.append(tag)
        else:
            found[holder].extend(conditions)
    present = {key.tag for key in keys}
    for other in model.levels[: model.levels.index(level) + 1]:
        if UNIQUE_KEYS[other] not in present:
            keys.append(Key(UNIQUE_KEYS[other], "LO" if other == "PATIENT" else "UI"))
    if QUERY_RETRIEVE_LEVEL not in present:
        keys.append(Key(QUERY_RETRIEVE_LEVEL, "CS"))
    return Query(
        level,
        {document: tuple(conditions) for document, conditions in found.items()},
        tuple(sorted(keys, key=lambda key: key.tag)),
        tuple(unsupported),
        tuple(values_of(identifier, SPECIFIC_CHARACTER_SET, keep_empty=True)),
    )


def parse_retrieve(
    identifier: Dataset, model: InformationModel, *, relational: bool = False, strict: bool = True
) -> Query:
    """What a C-MOVE or C-GET identifier asks: unique keys only, the level's own one or more values (PS3.4 C.4.2.1.4).

    Raises Invalid when the level's own is missing, or one above it unless relational. Other keys are not regarded,
    save Issuer of Patient ID, which tells two patients apart.
    """
    level = parse_level(identifier, model)
    if strict and not relational:
        require_unique_keys(identifier, model, level)
    if not values_of(identifier, UNIQUE_KEYS[level]):
        raise Invalid(f"a retrieval at level {level} has to name its unique key")
    found: dict[Level, list[Condition]] = {document: [] for document in DOCUMENTS[level]}
    wanted = [UNIQUE_KEYS[other] for other in PATIENT_ROOT.levels[: PATIENT_ROOT.levels.index(level) + 1]]
    for tag in [*wanted, ISSUER_OF_PATIENT_ID]:
        values = tuple(values_of(identifier, tag))
        holder = home(level, tag)
        if values and holder is not None:
            # No wildcards here: an asterisk in a Patient ID is an asterisk.
            found[holder].append(AnyOf(tag, "LO" if tag >> 16 == 0x0010 else "UI", values))
    return Query(level, {document: tuple(conditions) for document, conditions in found.items()}, ())


def require_unique_keys(identifier: Dataset, model: InformationModel, level: Level) -> None:
    """Raise Invalid unless every level above is named by one value of its unique key (PS3.4 C.4.1.2.1)."""
    for above in model.levels[: model.levels.index(level)]:
        values = values_of(identifier, UNIQUE_KEYS[above])
        if len(values) != 1 or "*" in values[0] or "?" in values[0]:
            raise Invalid(f"level {level} needs one unique key of level {above}")


def values_of(identifier: Dataset, tag: int, *, keep_empty: bool = False) -> list[str]:
    """The values of an element as stripped text; none when it is absent or of zero length."""
    element = identifier.get(tag)
    return [] if element is None else [v for v in _texts(element) if v or keep_empty]


def _texts(element: DataElement) -> list[str]:
    value = element.value
    if value is None or value == "":
        return []
    if isinstance(value, bytes):
        return [value.decode("ascii", "replace").strip(" \0")] if value else []
    many = value if isinstance(value, MultiValue | list | tuple) else [value]
    return ["" if v is None else str(v).strip(" \0") for v in many]


def _key(element: DataElement) -> Key:
    if element.VR != "SQ":
        return Key(int(element.tag), str(element.VR))
    items = element.value or []
    nested = tuple(_key(inner) for item in items[:1] for inner in item)
    return Key(int(element.tag), "SQ", nested or None)


def _conditions(element: DataElement) -> tuple[Condition, ...]:
    tag = int(element.tag)
    if element.VR != "SQ":
        return conditions_of(tag, str(element.VR), _texts(element))
    items = element.value or []
    if len(items) > 1:
        raise Invalid(f"the sequence key ({tag >> 16:04X},{tag & 0xFFFF:04X}) has more than one item")
    nested = tuple(condition for item in items for inner in item for condition in _conditions(inner))
    return (Item(tag, nested),) if nested else ()


def _combined(identifier: Dataset, level: Level, found: dict[Level, list[Condition]]) -> frozenset[int]:
    taken: set[int] = set()
    for date_name, time_name in DATE_TIME_PAIRS.items():
        date_tag, time_tag = int(date_name, 16), int(time_name, 16)
        dates, times = values_of(identifier, date_tag), values_of(identifier, time_tag)
        holder = home(level, date_tag)
        if len(dates) == 1 and len(times) == 1 and holder is not None:
            date, time = split_range(date_tag, "DA", dates[0]), split_range(time_tag, "TM", times[0])
            found[holder].append(moment(date_tag, date, time))
            taken |= {date_tag, time_tag}
    return frozenset(taken)
