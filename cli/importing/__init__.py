"""``sagittal import``: files, folders, DICOMDIR and zip archives into an archive, over DIMSE."""

from cli.importing.command import register

__all__ = ["register"]
