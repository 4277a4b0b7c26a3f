"""Why ingest does not take what it was given. The texts reach logs and the sender: they carry no patient data."""

from __future__ import annotations

from libs.common.errors import Invalid


class DoesNotMatch(Invalid):
    """The dataset is not what its command says, or lacks what places it in a study."""


class CannotUnderstand(Invalid):
    """The bytes are no dataset in the transfer syntax they came in."""


class Duplicate(Invalid):
    """Other bytes are stored under this SOP Instance UID and the policy is to refuse a second version."""
