"""Person names (PS3.5 6.2.1) made comparable: folded for search, split into their groups and components."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

GROUPS = ("Alphabetic", "Ideographic", "Phonetic")
"""The component groups in the order of their place between ``=`` signs; the keys of DICOM JSON (PS3.18 F.2.2)."""

# Letters that NFKD leaves whole although people search for them by their plain neighbours.
_PLAIN = str.maketrans(
    {"ø": "o", "đ": "d", "ð": "d", "ł": "l", "æ": "ae", "œ": "oe", "þ": "th", "ħ": "h", "ı": "i", "ŧ": "t", "ŋ": "n"}
)

_KANA_MARKS = "\u3099\u309a"  # the marks that make ka into ga: another sound, not an accent


def fold_name(name: str) -> str:
    """One component group for comparison: no case, accents, superfluous space or trailing delimiters.

    ``"Müller^Jö  ^^Dr^"`` becomes ``"muller^jo^^dr"``. Wildcards (``*``, ``?``) pass unchanged, so that a query's
    pattern is folded by the same rule as the values it is compared with.
    """
    if name.isascii():
        folded = name.casefold()
    else:
        decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", name).casefold())
        plain = "".join(c for c in decomposed if c in _KANA_MARKS or not unicodedata.combining(c))
        folded = unicodedata.normalize("NFC", plain.translate(_PLAIN))
    return "^".join(" ".join(component.split()) for component in folded.split("^")).rstrip("^")


def split_groups(name: str) -> dict[str, str]:
    """The present component groups of a PN value, by their names in DICOM JSON; empty groups are left out."""
    groups = {}
    for group, text in zip(GROUPS, name.split("="), strict=False):
        text = text.strip().rstrip("^").rstrip()
        if text:
            groups[group] = text
    return groups


def fold_groups(groups: dict[str, str]) -> list[str]:
    """Each present group folded, in the order alphabetic, ideographic, phonetic; without repetition."""
    folded = (fold_name(groups[group]) for group in GROUPS if groups.get(group))
    return list(dict.fromkeys(text for text in folded if text))


@dataclass(frozen=True)
class Components:
    """The five components of one group."""

    family: str = ""
    given: str = ""
    middle: str = ""
    prefix: str = ""
    suffix: str = ""


def split_components(group: str) -> Components:
    """The components of one group; what is missing is empty, what is beyond the fifth is dropped."""
    return Components(*(part.strip() for part in group.split("^")[:5]))
