"""Which character set an answer is written in, and text as its bytes (PS3.3 C.12.1.1.2, PS3.5 6.1)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pydicom import charset

from libs.common.dicom.charset import Charset

_DELIMITERS = re.compile(r"([\^=\\])")


@dataclass(frozen=True)
class TextEncoder:
    """Writes text. ``terms`` are the values of Specific Character Set; ``codec`` is None with code extensions."""

    terms: tuple[str, ...]
    codec: str | None
    encodings: tuple[str, ...] = ()

    def encode(self, text: str) -> bytes:
        """The bytes of the text. Raises UnicodeError when the character set has not all of its characters."""
        if text.isascii():
            return text.encode("ascii")
        if self.codec is not None:
            return text.encode(self.codec)
        # The initial state is back at every delimiter (PS3.5 6.1.2.5.3), so each part is encoded by itself.
        return b"".join(self._part(part) for part in _DELIMITERS.split(text) if part)

    def _part(self, text: str) -> bytes:
        if text.isascii():
            return text.encode("ascii")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                encoded = charset.encode_string(text, list(self.encodings))
            except (ValueError, UserWarning) as error:
                raise UnicodeError(str(error)) from None
        if Charset("\\".join(self.terms).encode("ascii")).groups(encoded) != [text]:
            raise UnicodeError("the character set does not give the text back")
        return encoded


UTF_8 = TextEncoder(("ISO_IR 192",), "utf-8")
_ASCII_TERMS = ("", "ISO_IR 6", "ISO 2022 IR 6")


def encoder_for(terms: Sequence[str]) -> TextEncoder | None:
    """The encoder of a Specific Character Set; None for one that the standard does not define."""
    if not any(terms) or (len(terms) == 1 and terms[0] in _ASCII_TERMS):
        return TextEncoder(tuple(terms), "ascii")
    if any(term not in charset.python_encoding for term in terms):
        return None
    encodings = tuple(charset.python_encoding[term] for term in terms)
    if len(terms) == 1 and not terms[0].startswith("ISO 2022"):
        return TextEncoder(tuple(terms), encodings[0])
    return TextEncoder(tuple(terms), None, encodings)


def choose_encoder(requested: Sequence[str], texts: Iterable[str]) -> TextEncoder:
    """The character set of an answer: the one of the request, which the caller can read, when it has all that the
    texts need; else UTF-8, also when the request named none."""
    if not any(requested):
        return UTF_8
    encoder = encoder_for(requested)
    if encoder is None:
        return UTF_8
    try:
        for text in texts:
            if not text.isascii():
                encoder.encode(text)
    except (UnicodeError, LookupError):
        return UTF_8
    return encoder
