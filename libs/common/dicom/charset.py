"""Text of every character set of PS3.3 C.12.1.1.2, code extensions included, as Unicode."""

from __future__ import annotations

import functools
import re
import warnings

from pydicom import charset
from pydicom.valuerep import PN_DELIMS, TEXT_VR_DELIMS

_ESCAPE = b"\x1b"
_ALMOST_DEFINED = re.compile(r"ISO[ _-]IR[ _-]?\d+|ISO[ _-]2022[ _-]IR[ _-]\d+", re.ASCII)
_PARTS = re.compile(rb"\x1b[^\x1b]*|[^\x1b]+")
_LEFT_OVER = re.compile("\x1b[\x20-\x2f]+[\x40-\x7e]")
# Escape sequences that put a two-byte set into G0, where the bytes of "\", "^" and "=" are halves of characters.
_TWO_BYTE_G0 = (b"\x1b$B", b"\x1b$@", b"\x1b$(D")


def _known(term: str) -> str:
    """A defined term, or one that pydicom can guess; anything else would be looked up among Python's codecs."""
    if term in charset.python_encoding or re.fullmatch(
        r"ISO[ _-]IR[ _-]?\d+|ISO[ _-]2022[ _-]IR[ _-]\d+", term, re.ASCII
    ):
        return term
    return "ISO_IR 192" if term.upper().replace("-", "") == "UTF8" else ""


class Charset:
    """How the text of one dataset (or sequence item) is decoded. Made from the value of Specific Character Set."""

    def __init__(self, declared: bytes) -> None:
        terms = [_known(term.strip()) for term in declared.decode("ascii", "replace").rstrip("\0").split("\\")]
        self.terms = tuple(terms)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._encodings = charset.convert_encodings(list(terms))
        # Shift JIS, GBK and GB18030 have trail bytes that look like a backslash: decode first, split after.
        self._decode_first = self._encodings[0].lower() in ("gb18030", "gbk")
        self._undeclared = not any(terms) or terms in (["ISO_IR 6"], ["ISO 2022 IR 6"])

    def values(self, raw: bytes, *, name: bool = False) -> list[str]:
        """The values of a text attribute, split at backslashes; padding is left to the caller."""
        if _ESCAPE not in raw:
            return self._plain(raw).split("\\") if b"\\" in raw else [self._plain(raw)]
        return ["=".join(self.groups(part)) if name else self._extended(part) for part in _split(raw, 0x5C)]

    def groups(self, raw: bytes) -> list[str]:
        """The component groups of one PN value; code extensions start anew after every delimiter (PS3.5 6.1.2.5.3)."""
        return [self._extended(part, PN_DELIMS) for part in _split(raw, 0x3D)]

    def text(self, raw: bytes) -> str:
        """A text that has one value (LT, ST, UT), where a backslash is a character like any other."""
        return self._extended(raw) if _ESCAPE in raw else self._plain(raw)

    def _plain(self, raw: bytes) -> str:
        if raw.isascii():
            return raw.decode("ascii")
        if self._undeclared:
            try:
                return raw.decode("utf-8")  # breaks the standard, but says the same by far more often than Latin-1
            except UnicodeDecodeError:
                return raw.decode("latin-1")
        return raw.decode(self._encodings[0], "replace")

    def _extended(self, raw: bytes, delimiters: set[int] = TEXT_VR_DELIMS) -> str:
        if _ESCAPE not in raw:
            return self._plain(raw)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            text = charset.decode_bytes(raw, self._encodings, delimiters)
        return _LEFT_OVER.sub("", text)  # Python's GB 2312 hands the escape sequence through


def _split(raw: bytes, delimiter: int) -> list[bytes]:
    """Split at a delimiter byte, but not inside two-byte characters of G0."""
    parts = [bytearray()]
    for piece in _PARTS.findall(raw):
        if piece.startswith(_TWO_BYTE_G0):
            parts[-1] += piece
            continue
        first, *rest = piece.split(bytes((delimiter,)))
        parts[-1] += first
        parts.extend(bytearray(part) for part in rest)
    return [bytes(part) for part in parts]


@functools.lru_cache(maxsize=256)
def charset_of(declared: bytes) -> Charset:
    """The decoder of one value of Specific Character Set (0008,0005); empty means the default repertoire."""
    return Charset(declared)
