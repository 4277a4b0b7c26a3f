"""The three ways a handler can fail; each door turns them into its protocol's own status."""

from __future__ import annotations


class SagittalError(Exception):
    """A failure with a sentence for the person who has to act on it. Never contains patient data."""


class Invalid(SagittalError):
    """The input is wrong and stays wrong: refuse it, or dead-letter it at once."""


class NotFound(SagittalError):
    """What was named is not here."""


class Unavailable(SagittalError):
    """Something we need is away for the moment: try again later."""
