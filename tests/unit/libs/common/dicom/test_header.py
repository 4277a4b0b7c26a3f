"""Headers of every transfer syntax and character set against what pydicom reads; broken ones keep what they can."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import ImplicitVRLittleEndian

from libs.common.dicom.charset import charset_of
from libs.common.dicom.dicom_json import level_json, search_fields
from libs.common.dicom.header import Header, read_header
from libs.common.dicom.levels import ALL, INSTANCE, PATIENT, SERIES, STUDY
from libs.common.dicom.part10 import Truncated, build_file_meta
from libs.common.errors import Invalid
from tests.builders import create_file, create_instance

DATA = Path(pydicom.data.__file__).parent
FILES = sorted([*(DATA / "test_files").glob("*.dcm"), *(DATA / "charset_files").glob("*.dcm")])
WITH_META = [path for path in FILES if path.read_bytes()[128:132] == b"DICM"]
FLIPPED = ("CT_small.dcm", "MR_small_implicit.dcm", "MR_small_bigendian.dcm", "chrSQEncoding.dcm")
CT = "1.2.840.10008.5.1.4.1.1.2"


def normal(attribute: Any, vr: str) -> Any:
    """pydicom's DICOM JSON in our words: null for an empty value, no padding, dates in the present form."""
    if not isinstance(attribute, dict) or "Value" not in attribute:
        return attribute
    values: list[Any] = []
    for value in attribute["Value"]:
        if vr == "SQ":
            value = {
                tag: normal(inner, inner["vr"])
                for tag, inner in value.items()
                if int(tag[3], 16) % 2 == 0
                and "InlineBinary" not in inner
                and inner["vr"] != "UN"
                and tag != "00080005"
            }
        elif vr == "PN":
            value = {group: text.rstrip("^") for group, text in value.items() if text.rstrip("^")} or None
        elif vr == "DA" and isinstance(value, str):
            value = value.replace(".", "")
        elif isinstance(value, str):
            value = value.strip() or None
        values.append(value)
    return {"vr": vr} if values in ([], [None]) else {"vr": vr, "Value": values}


@pytest.mark.parametrize("path", WITH_META, ids=lambda path: path.name)
def test_what_pydicom_reads_of_its_own_files(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(path, stop_before_pixels=True)
        expected = {}
        for tag in ALL & set(map(int, dataset.keys())):
            try:
                attribute = dataset[tag].to_json_dict(None, 0)
            except ValueError:
                continue  # badVR.dcm: pydicom cannot say it either
            if "InlineBinary" not in attribute:
                expected[f"{tag:08X}"] = normal(attribute, attribute["vr"])
    assert level_json(read_header(path.read_bytes()), ALL) == expected


@pytest.mark.parametrize("path", WITH_META, ids=lambda path: path.name)
def test_a_header_in_pieces_is_the_header(path: Path) -> None:
    content = path.read_bytes()
    size, turns = 140, 0
    while True:
        try:
            header = read_header(content[:size], len(content))
            break
        except Truncated as more:
            assert more.needed > size
            size, turns = more.needed, turns + 1
    assert level_json(header, ALL) == level_json(read_header(content), ALL)


def test_the_names_of_every_character_set() -> None:
    """PS3.5 Annexes H, I, J, K and the single-byte sets, from pydicom's files."""
    expected = {
        "chrArab": "قباني^لنزار",
        "chrFren": "Buc^Jérôme",
        "chrFrenMulti": "Buc^Jérôme",
        "chrGerm": "Äneas^Rüdiger",
        "chrGreek": "Διονυσιος",
        "chrH31": "Yamada^Tarou=山田^太郎=やまだ^たろう",
        "chrH32": "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう",
        "chrHbrw": "שרון^דבורה",
        "chrI2": "Hong^Gildong=洪^吉洞=홍^길동",
        "chrJapMulti": "やまだ^たろう",
        "chrJapMultiExplicitIR6": "やまだ^たろう",
        "chrKoreanMulti": "김희중",
        "chrRuss": "Люкceмбypг",
        "chrX1": "Wang^XiaoDong=王^小東",
        "chrX2": "Wang^XiaoDong=王^小东",
    }
    for name, text in expected.items():
        header = read_header((DATA / "charset_files" / f"{name}.dcm").read_bytes())
        (groups,) = level_json(header, PATIENT)["00100010"]["Value"]
        assert groups == dict(zip(("Alphabetic", "Ideographic", "Phonetic"), text.split("="), strict=False)), name


def encoded(elements: bytes, syntax: str = "1.2.840.10008.1.2.1") -> bytes:
    return build_file_meta(CT, "1.2.3", syntax) + elements


def element(tag: int, vr: str, value: bytes) -> bytes:
    return struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, vr.encode(), len(value)) + value


UID = element(0x00080018, "UI", b"1.2.3\0")


@pytest.mark.parametrize(
    ("charset", "raw", "values"),
    [
        ("ISO_IR 192", "Ä\\Ö".encode(), ["Ä", "Ö"]),
        ("GB18030", "俓\\Wang".encode("gb18030"), ["俓", "Wang"]),  # a trail byte that is a backslash
        ("GBK", "俓".encode("gbk"), ["俓"]),
        ("\\ISO 2022 IR 87", b"\x1b$B$d\x5c\x3d\x1b(B\\B ", None),
        ("\\ISO 2022 IR 58", b"\x1b$)A\xcd\xf5", ["王"]),
        ("ISO 2022 IR 6\\ISO 2022 IR 149", b"\x1b$)C\xb1\xe8\\Kim", ["김", "Kim"]),
        ("ISO 2022 IR 100\\ISO 2022 IR 144", b"\xe4\x1b-L\xbb", ["äЛ"]),
        ("ISO_IR 166", "ไทย".encode("tis-620"), ["ไทย"]),
        ("ISO_IR 148", "ğ".encode("iso8859_9"), ["ğ"]),
        ("ISO_IR 13", b"\xd4\xcf\xc0\xde", ["ﾔﾏﾀﾞ"]),
        ("", "Jörg".encode(), ["Jörg"]),
        ("", "Jörg".encode("latin-1"), ["Jörg"]),
        ("NO SUCH SET", b"plain", ["plain"]),
    ],
)
def test_text_of_a_character_set(charset: str, raw: bytes, values: list[str] | None) -> None:
    content = encoded(element(0x00080005, "CS", charset.encode()) + UID + element(0x00081030, "LO", raw))
    json = level_json(read_header(content), ALL)["00081030"]
    if values is None:  # the two-byte character holds the bytes of a backslash and an equals sign
        assert len(json["Value"]) == 2 and json["Value"][1] == "B"
    else:
        assert json["Value"] == values


def test_numbers_are_numbers_and_a_bad_value_costs_only_itself() -> None:
    content = encoded(
        UID
        + element(0x00180050, "DS", b"2.5 ")
        + element(0x00181030, "LO", b"Head\0\0")
        + element(0x00181151, "IS", b"abc ")
        + element(0x00200013, "IS", b"12\\ \\3")
        + element(0x00201041, "DS", b"NaN ")
        + element(0x00280010, "US", struct.pack("<H", 512))
        + element(0x00280011, "US", b"\1\2\3")
    )
    header = read_header(content)
    json = level_json(header, SERIES | INSTANCE)
    assert json["00180050"] == {"vr": "DS", "Value": [2.5]}
    assert json["00181030"] == {"vr": "LO", "Value": ["Head"]}
    assert json["00200013"] == {"vr": "IS", "Value": [12, None, 3]}
    assert json["00280010"] == {"vr": "US", "Value": [512]}
    assert {"00181151", "00201041", "00280011"}.isdisjoint(json)
    assert [problem[:8] for problem in header.problems] == ["00181151", "00201041", "00280011"]


def nested(**keywords: Any) -> Dataset:
    code, request = Dataset(), Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "1", "99X", "Schädel"
    request.RequestedProcedureID = "R1"
    request.ScheduledProtocolCodeSequence = Sequence([code])
    dataset = create_instance(SpecificCharacterSet="ISO_IR 100", RequestAttributesSequence=[request], **keywords)
    for sequence in (dataset["RequestAttributesSequence"], request["ScheduledProtocolCodeSequence"]):
        sequence.is_undefined_length = True
    request.is_undefined_length_sequence_item = True
    return dataset


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99"])
def test_nested_sequences_of_undefined_length(syntax: str) -> None:
    buffer = io.BytesIO()
    nested(transfer_syntax_uid=syntax).save_as(buffer, enforce_file_format=True)
    (request,) = level_json(read_header(buffer.getvalue()), SERIES)["00400275"]["Value"]
    assert request["00401001"]["Value"] == ["R1"]
    assert request["00400008"]["Value"][0]["00080104"] == {"vr": "LO", "Value": ["Schädel"]}


def test_a_header_that_breaks_keeps_what_came_before() -> None:
    whole = create_file()
    cut = read_header(whole[:500])
    assert level_json(cut, PATIENT | STUDY)["00080020"]["Value"] == ["20240131"] and cut.problems
    with pytest.raises(Invalid):
        read_header(b"\0" * 400)
    with pytest.raises(Invalid):
        read_header(build_file_meta(CT, "1.2.3", "1.2.840.10008.1.2.1") + b"\x08\0\x18\0UI")
    with pytest.raises(Invalid):
        read_header(build_file_meta(CT, "1.2.3", "1.2.840.10008.1.2.1.99") + b"\xff" * 100)


def test_a_dataset_in_another_encoding_than_declared_is_read() -> None:
    buffer = io.BytesIO()
    create_instance(transfer_syntax_uid=ImplicitVRLittleEndian).save_as(buffer, enforce_file_format=True)
    content = buffer.getvalue().replace(b"1.2.840.10008.1.2\0\x02\0", b"1.2.840.10008.1.2\0\x02\0")
    meta_end = 144 + int.from_bytes(content[140:144], "little")
    lied = build_file_meta(CT, "1.2.3", "1.2.840.10008.1.2.1") + content[meta_end:]
    assert level_json(read_header(lied), PATIENT)["00100020"]["Value"] == ["P1"]


def test_large_values_stay_in_the_object() -> None:
    header = read_header(create_file(ImageComments="x" * 10000, AdditionalPatientHistory="y" * 10000))
    assert len(level_json(header, STUDY)["001021B0"]["Value"][0]) == 10000
    content = encoded(UID + struct.pack("<HH2sHI", 0x0032, 0x4000, b"UT", 0, 70000) + b"z" * 70000)
    assert "00324000" not in level_json(read_header(content), STUDY) and read_header(content).problems


def test_an_endless_nesting_is_no_end_of_us() -> None:
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    sequence = struct.pack("<HH2sHI", 0x0040, 0x0275, b"SQ", 0, 0xFFFFFFFF)
    header = read_header(encoded(UID + (sequence + item) * 5000))
    assert level_json(header, INSTANCE)["00080018"]["Value"] == ["1.2.3"] and header.problems


def test_a_deflate_bomb_stays_small() -> None:
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = squeeze.compress(UID + struct.pack("<HH2sHI", 0x0009, 0x1001, b"OB", 0, 300 << 20))
    for _ in range(300):
        bomb += squeeze.compress(bytes(1 << 20))
    header = read_header(encoded(bomb + squeeze.flush(), "1.2.840.10008.1.2.1.99"))
    assert level_json(header, INSTANCE)["00080018"]["Value"] == ["1.2.3"]


@given(st.binary(max_size=300), st.sampled_from(("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")))
@settings(max_examples=300, deadline=None)
def test_garbage_is_refused_or_read_and_nothing_else(garbage: bytes, syntax: str) -> None:
    try:
        header = read_header(encoded(UID + garbage, syntax))
    except Invalid:
        return
    search_fields(level_json(header, ALL))


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_flipped_byte_is_survived(data: st.DataObject) -> None:
    path = data.draw(st.sampled_from([path for path in WITH_META if path.name in FLIPPED]))
    content = bytearray(path.read_bytes()[:2500])
    for _ in range(3):
        content[data.draw(st.integers(300, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        header: Header = read_header(bytes(content), len(content))
    except Invalid:
        return
    for tags in (PATIENT, STUDY, SERIES, INSTANCE):
        search_fields(level_json(header, tags))


def test_a_character_set_with_a_zero_byte_is_survived() -> None:
    assert charset_of(b"ISO_IR\0100 ").text(b"M\xfcller") == "M\xfcller"


def test_search_fields() -> None:
    header = read_header(
        create_file(
            PatientName="Müller^Jörg=山田", SpecificCharacterSet="ISO_IR 192", StudyTime="1015", SeriesDate="20240201",
            ContentDate="20240202", ContentTime="235959.5", OperatorsName=["A^B", "C"],
        )
    )  # fmt: skip
    names, times, moments = search_fields(level_json(header, ALL))
    assert names["00100010"] == ["muller^jorg", "山田"] and names["00081070"] == ["a^b", "c"]
    assert times["00080030"] == "101500.000000" and times["00080033"] == "235959.500000"
    assert moments["00080020"] == "20240131101500.000000"
    assert moments["00080021"] == "20240201000000.000000"
    assert moments["00080023"] == "20240202235959.500000"
