"""Objects in any S3 server, by plain S3 calls; the only file that knows the minio SDK."""

from __future__ import annotations

import asyncio
import io
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import urllib3
from minio import Minio
from minio.commonconfig import CopySource
from minio.error import MinioException, S3Error

from libs.common.errors import Invalid, NotFound, Unavailable
from libs.common.objects.keys import check_digest, check_key, digest_of, pieces
from libs.common.objects.port import Content, ObjectStat

T = TypeVar("T")
_THREADS = 24
_ATTEMPTS = 3
_MISSING = {"NoSuchKey", "NoSuchObject", "NotFound"}
_PASSING = {"SlowDown", "SlowDownRead", "SlowDownWrite", "InternalError", "ServiceUnavailable", "RequestTimeout"}
_PART = 16 << 20
_LISTED = 500


class _Connections(urllib3.PoolManager):
    """The SDK reads an error only when it is called application/xml; some servers say text/xml (RFC 7303: the same)."""

    def urlopen(self, *arguments: Any, **keywords: Any) -> urllib3.BaseHTTPResponse:
        response = super().urlopen(*arguments, **keywords)
        if response.headers.get("content-type", "").partition(";")[0].strip() == "text/xml":
            response.headers["content-type"] = "application/xml"
        return response


class S3Objects:
    """Objects in one bucket (made when absent). ``url`` is ``http[s]://host:port``."""

    def __init__(
        self,
        url: str,
        *,
        access_key: str,
        secret_key: str,
        bucket: str,
        region: str = "us-east-1",
        threads: int = _THREADS,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise Invalid("the S3 address must look like http://host:port; set SAGITTAL_S3_URL")
        self._bucket = bucket
        self._client = Minio(
            parts.netloc,
            access_key=access_key or None,
            secret_key=secret_key or None,
            secure=parts.scheme == "https",
            region=region,
            http_client=_Connections(
                num_pools=4,
                maxsize=threads,
                block=False,
                timeout=urllib3.Timeout(connect=5, read=60),
                retries=False,
            ),
        )
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="s3")

    async def start(self) -> None:
        def prepare() -> None:
            if not self._client.bucket_exists(self._bucket):
                try:
                    self._client.make_bucket(self._bucket)
                except S3Error as error:  # another replica was faster
                    if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                        raise

        await self._run(prepare)

    async def stop(self) -> None:
        self._pool.shutdown(wait=True)

    async def put(self, key: str, content: Content, *, sha256: str | None = None) -> ObjectStat:
        check_key(key)
        return await self._run(lambda: self._put(key, content, sha256))

    def _put(self, key: str, content: Content, sha256: str | None) -> ObjectStat:
        """The digest is checked before the bytes leave; on the way MinIO's SDK signs or checksums each request."""
        if sha256 is not None:
            check_digest(sha256, digest_of(content))
        if isinstance(content, Path):
            size = content.stat().st_size
            with content.open("rb") as file:
                result = self._client.put_object(self._bucket, key, file, size, part_size=_PART)
        else:
            data = content if isinstance(content, bytes) else b"".join(pieces(content))
            size = len(data)
            result = self._client.put_object(self._bucket, key, io.BytesIO(data), size, part_size=max(_PART, 5 << 20))
        return ObjectStat(key, size, result.last_modified or datetime.now(UTC))

    async def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        check_key(key)
        if length == 0:
            await self.stat(key)
            return b""
        return await self._run(lambda: self._read(key, offset, length))

    def _read(self, key: str, offset: int, length: int | None) -> bytes:
        try:
            response = self._client.get_object(self._bucket, key, offset=offset, length=length or 0)
        except S3Error as error:
            if error.code == "InvalidRange":  # from the end on there are no bytes
                return b""
            raise
        try:
            return response.read()
        finally:
            response.close()
            response.release_conn()

    async def stream(
        self, key: str, offset: int = 0, length: int | None = None, chunk: int = 1 << 20
    ) -> AsyncIterator[bytes]:
        check_key(key)
        if length == 0:
            await self.stat(key)
            return
        try:
            response = await self._run(
                lambda: self._client.get_object(self._bucket, key, offset=offset, length=length or 0)
            )
        except Invalid:  # the range begins at or behind the end
            return
        try:
            while data := await self._run(lambda: response.read(chunk), attempts=1):
                yield data
        finally:
            response.close()
            response.release_conn()

    async def stat(self, key: str) -> ObjectStat:
        check_key(key)
        found = await self._run(lambda: self._client.stat_object(self._bucket, key))
        return ObjectStat(key, found.size or 0, found.last_modified or datetime.now(UTC))

    async def delete(self, key: str) -> None:
        check_key(key)
        await self._run(lambda: self._client.remove_object(self._bucket, key))

    async def copy(self, source: str, target: str) -> ObjectStat:
        check_key(source)
        check_key(target)
        await self._run(lambda: self._client.copy_object(self._bucket, target, CopySource(self._bucket, source)))
        return await self.stat(target)

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectStat]:
        def walk() -> Iterator[ObjectStat]:
            for found in self._client.list_objects(self._bucket, prefix=prefix, recursive=True):
                if found.object_name is not None and not found.is_dir:
                    yield ObjectStat(found.object_name, found.size or 0, found.last_modified or datetime.now(UTC))

        walking = walk()
        while True:
            page = await self._run(lambda: list(islice(walking, _LISTED)), attempts=1)
            for one in page:
                yield one
            if len(page) < _LISTED:
                return

    async def free_bytes(self) -> int | None:
        """None: S3 has no call for it. The bucket is asked for, so that a store that is away is noticed."""
        await self._run(lambda: self._client.bucket_exists(self._bucket), attempts=1)
        return None

    async def _run(self, work: Callable[[], T], attempts: int = _ATTEMPTS) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: _with_retries(work, attempts))


def _with_retries(work: Callable[[], T], attempts: int) -> T:
    """Call it again, a little later each time, for failures that pass."""
    for attempt in range(1, attempts + 1):
        try:
            return work()
        except S3Error as error:
            if error.code in _MISSING:
                raise NotFound("no such object") from None
            if error.code == "InvalidRange":
                raise Invalid("the range begins behind the end of the object") from None
            if error.code not in _PASSING or attempt == attempts:
                raise Unavailable(f"the object store refused: {error.code}") from error
        except (urllib3.exceptions.HTTPError, MinioException, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            if attempt == attempts:
                raise Unavailable(f"the object store does not answer: {type(error).__name__}") from error
        time.sleep(random.uniform(0.1, 0.3) * 2**attempt)  # noqa: S311 - jitter, no secret
    raise AssertionError("unreachable")
