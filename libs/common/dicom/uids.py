"""Unique identifiers (PS3.5 section 9): is a text one, and may it become part of an object key?"""

from __future__ import annotations

import re

_UID = re.compile(r"(?:0|[1-9][0-9]*)(?:\.(?:0|[1-9][0-9]*))*")


def is_valid_uid(text: str) -> bool:
    """Whether the text keeps PS3.5 9.1: 1 to 64 characters, numeric components without leading zeros."""
    return len(text) <= 64 and _UID.fullmatch(text) is not None


def is_usable_uid(text: str) -> bool:
    """Whether the text can name things here although it may break PS3.5: digits and dots, at most 64 characters.

    Leading zeros and empty components occur in real archives; refusing them would refuse whole modalities.
    """
    return 0 < len(text) <= 64 and all(c in "0123456789." for c in text) and text.strip(".") != ""


def clean_uid(value: object) -> str:
    """A UI value without its padding: trailing NUL (PS3.5) and the spaces that some write instead."""
    return str(value or "").rstrip("\0 ").strip()
