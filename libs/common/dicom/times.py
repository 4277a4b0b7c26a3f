"""DA and TM values (PS3.5 6.2) in one fixed form each, so that comparing text compares moments."""

from __future__ import annotations

import re
from datetime import date

_DATE = re.compile(r"(\d{4})\.?(\d{2})\.?(\d{2})", re.ASCII)
_TIME = re.compile(r"(\d{2})(?::?(\d{2})(?::?(\d{2})(?:\.(\d{1,6})\d*)?)?)?", re.ASCII)


def normal_date(text: object) -> str:
    """``YYYYMMDD`` of a DA value, the old form ``YYYY.MM.DD`` too; empty when it is no date."""
    match = _DATE.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None:
        return ""
    try:
        date(*(int(part) for part in match.groups()))
    except ValueError:
        return ""
    return "".join(match.groups())


def normal_time(text: object) -> str:
    """``HHMMSS.ffffff`` of a TM value, what is missing as zeros, the old ``HH:MM:SS`` too; empty when it is no time."""
    match = _TIME.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None:
        return ""
    hour, minute, second, fraction = match.groups("0")
    if int(hour) > 23 or int(minute) > 59 or int(second) > 60:
        return ""
    return f"{hour}{minute:0>2}{second:0>2}.{fraction:0<6}"


def date_time(day: object, time: str | None) -> str:
    """``YYYYMMDDHHMMSS.ffffff`` of a date and a normal time (midnight without one); empty without a date."""
    normal = normal_date(day)
    return f"{normal}{time or '000000.000000'}" if normal else ""
