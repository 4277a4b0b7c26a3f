"""Where pixels live: one promise (``port``), kept by a folder, by any S3 server, and by memory in tests."""

from __future__ import annotations

from libs.common.config import Settings
from libs.common.objects.port import Objects


def open_objects(settings: Settings) -> Objects:
    """The store that the settings name; ``start`` connects it."""
    if settings.objects == "s3":
        from libs.common.objects.s3 import S3Objects

        return S3Objects(
            settings.s3_url,
            access_key=settings.s3_access_key,
            secret_key=settings.s3_secret_key,
            bucket=settings.s3_bucket,
            region=settings.s3_region,
        )
    from libs.common.objects.filesystem import FilesystemObjects

    return FilesystemObjects(settings.data / "objects")
