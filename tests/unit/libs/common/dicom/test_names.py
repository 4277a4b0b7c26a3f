"""Names are equal when people would call them the same."""

from __future__ import annotations

import pytest

from libs.common.dicom.names import Components, fold_groups, fold_name, split_components, split_groups


@pytest.mark.parametrize(
    ("name", "folded"),
    [
        ("Müller^Jö^^Dr^Jr", "muller^jo^^dr^jr"),
        ("MULLER^JO^^DR^JR^", "muller^jo^^dr^jr"),
        ("  Doe  ^ Jane   Mary ^^^ ", "doe^jane mary"),
        ("Straße^İ", "strasse^i"),
        ("Ångström^Łukasz", "angstrom^lukasz"),
        ("Ørsted^Þór", "orsted^thor"),
        ("Doe*^J?ne", "doe*^j?ne"),
        ("ﾔﾏﾀﾞ^ﾀﾛｳ", "ヤマダ^タロウ"),
        ("がき", "がき"),
        ("김^희중", "김^희중"),
        ("ΠΑΠΑΔΌΠΟΥΛΟΣ", "παπαδοπουλοσ"),
        ("", ""),
    ],
)
def test_folding(name: str, folded: str) -> None:
    assert fold_name(name) == folded
    assert fold_name(folded) == folded


def test_groups() -> None:
    groups = split_groups("Yamada^Tarou=山田^太郎=やまだ^たろう")
    assert groups == {"Alphabetic": "Yamada^Tarou", "Ideographic": "山田^太郎", "Phonetic": "やまだ^たろう"}
    assert fold_groups(groups) == ["yamada^tarou", "山田^太郎", "やまだ^たろう"]
    assert split_groups("=山田") == {"Ideographic": "山田"} and split_groups("^^^^") == {}
    assert fold_groups({"Alphabetic": "A", "Phonetic": "a"}) == ["a"]


def test_components() -> None:
    assert split_components("Adams^John Robert^Quincy^Rev.^B.A.") == Components(
        "Adams", "John Robert", "Quincy", "Rev.", "B.A."
    )
    assert split_components("Adams") == Components("Adams") and split_components("") == Components()
