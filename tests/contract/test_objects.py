"""Every object store keeps the same promise: memory, folder, and a real S3 server."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cli.servers.s3 import S3
from libs.common.config import Settings
from libs.common.errors import Invalid, NotFound, Unavailable
from libs.common.objects import open_objects
from libs.common.objects.filesystem import FilesystemObjects
from libs.common.objects.memory import MemoryObjects
from libs.common.objects.port import Objects
from libs.common.objects.s3 import S3Objects

KEY = "instances/1.2.3/1.2.3.4/1.2.3.4.5/0123456789abcdef.dcm"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def s3_objects(server: Any, bucket: str) -> S3Objects:
    return S3Objects(server.url, access_key=server.access_key, secret_key=server.secret_key, bucket=bucket)


@pytest.fixture(params=["memory", "filesystem", "s3"])
async def objects(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Objects]:
    store: Objects
    if request.param == "memory":
        store = MemoryObjects()
    elif request.param == "filesystem":
        store = FilesystemObjects(tmp_path / "store")
    else:
        server = request.getfixturevalue("s3")
        store = s3_objects(server, f"test-{random.getrandbits(40):x}")
    await store.start()
    yield store
    await store.stop()


async def keys(objects: Objects, prefix: str = "") -> list[str]:
    return sorted([found.key async for found in objects.list(prefix)])


async def test_what_was_put_comes_back(objects: Objects) -> None:
    content = os.urandom(526_000)
    put = await objects.put(KEY, content, sha256=digest(content))
    assert (put.key, put.size) == (KEY, len(content))
    assert await objects.get(KEY) == content
    stat = await objects.stat(KEY)
    assert (stat.key, stat.size) == (KEY, len(content))
    assert abs(datetime.now(UTC) - stat.modified) < timedelta(minutes=5)
    assert await keys(objects) == [KEY]


@pytest.mark.parametrize("kind", ["bytes", "bytearray", "memoryview", "pieces", "path"])
async def test_every_kind_of_content(objects: Objects, kind: str, tmp_path: Path) -> None:
    content = os.urandom(100_001)
    file = tmp_path / "content"
    file.write_bytes(content)
    given: Any = {
        "bytes": content,
        "bytearray": bytearray(content),
        "memoryview": memoryview(content),
        "pieces": [content[:1], bytearray(content[1:70_000]), memoryview(content)[70_000:], b""],
        "path": file,
    }[kind]
    assert (await objects.put(KEY, given, sha256=digest(content))).size == len(content)
    assert await objects.get(KEY) == content
    assert file.exists()


async def test_an_empty_object_is_an_object(objects: Objects) -> None:
    await objects.put(KEY, b"", sha256=digest(b""))
    assert await objects.get(KEY) == b""
    assert [piece async for piece in objects.stream(KEY)] == []
    assert (await objects.stat(KEY)).size == 0


@pytest.mark.parametrize("form", ["bytes", "path", "pieces"])
async def test_a_wrong_digest_leaves_nothing(objects: Objects, form: str, tmp_path: Path) -> None:
    file = tmp_path / "content"
    file.write_bytes(b"one" * 1000)
    content: Any = {"bytes": b"one" * 1000, "path": file, "pieces": [b"one"] * 1000}[form]
    with pytest.raises(Invalid):
        await objects.put(KEY, content, sha256=digest(b"other"))
    with pytest.raises(NotFound):
        await objects.get(KEY)
    assert await keys(objects) == []


async def test_a_wrong_digest_leaves_the_former_object(objects: Objects) -> None:
    await objects.put(KEY, b"former")
    with pytest.raises(Invalid):
        await objects.put(KEY, b"later", sha256=digest(b"other"))
    assert await objects.get(KEY) == b"former"


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, None),
        (0, 0),
        (0, 1),
        (1, 9),
        (990, 10),
        (990, 11),
        (999, None),
        (999, 50),
        (1000, None),
        (1000, 5),
        (5000, 5),
    ],
)
async def test_ranges(objects: Objects, offset: int, length: int | None) -> None:
    content = bytes(range(250)) * 4
    await objects.put(KEY, content)
    expected = content[offset:] if length is None else content[offset : offset + length]
    assert await objects.get(KEY, offset, length) == expected
    pieces = [piece async for piece in objects.stream(KEY, offset, length, chunk=7)]
    assert b"".join(pieces) == expected
    assert all(0 < len(piece) <= 7 for piece in pieces)


async def test_a_range_of_an_empty_object(objects: Objects) -> None:
    await objects.put(KEY, b"")
    assert await objects.get(KEY, 0, 4096) == b""


async def test_a_stream_may_be_left_early(objects: Objects) -> None:
    await objects.put(KEY, os.urandom(3_000_000))
    for _ in range(40):
        stream = objects.stream(KEY, chunk=100_000)
        async for piece in stream:
            assert len(piece) == 100_000
            break
        await stream.aclose()  # type: ignore[attr-defined]
    assert len(await objects.get(KEY)) == 3_000_000


async def test_what_is_not_there(objects: Objects) -> None:
    await objects.put("instances/1/2/3.dcm", b"x")
    for key in (KEY, "instances", "instances/1/2", "instances/1/2/3.dcm/4"):
        with pytest.raises(NotFound):
            await objects.get(key)
        with pytest.raises(NotFound):
            await objects.get(key, 5, 5)
        with pytest.raises(NotFound):
            await objects.stat(key)
        with pytest.raises(NotFound):
            await objects.copy(key, "instances/copy.dcm")
        with pytest.raises(NotFound):
            async for _ in objects.stream(key):
                raise AssertionError("nothing to stream")
        await objects.delete(key)
    assert await keys(objects) == ["instances/1/2/3.dcm"]


async def test_deleted_is_gone(objects: Objects) -> None:
    await objects.put(KEY, b"x")
    await objects.delete(KEY)
    await objects.delete(KEY)
    with pytest.raises(NotFound):
        await objects.stat(KEY)
    assert await keys(objects) == []
    await objects.put(KEY, b"y")
    assert await objects.get(KEY) == b"y"


async def test_copy(objects: Objects) -> None:
    content = os.urandom(200_000)
    await objects.put(KEY, content)
    await objects.put("copies/2.dcm", b"former")
    copied = await objects.copy(KEY, "copies/2.dcm")
    assert (copied.key, copied.size) == ("copies/2.dcm", len(content))
    assert await objects.get("copies/2.dcm") == content
    assert await objects.get(KEY) == content


async def test_list_by_prefix(objects: Objects) -> None:
    expected = sorted(f"instances/1/{series}/{number}.dcm" for series in ("7", "71") for number in range(4))
    for key in [*expected, "quarantine/1.bin"]:
        await objects.put(key, b"abc")
    assert await keys(objects, "instances/") == expected
    assert await keys(objects, "instances/1/7/") == expected[:4]
    assert await keys(objects, "instances/1/7") == expected
    assert await keys(objects, "instances/1/71/2") == ["instances/1/71/2.dcm"]
    assert await keys(objects, "nothing/") == []
    assert len(await keys(objects)) == 9
    assert {found.size async for found in objects.list()} == {3}


@pytest.mark.parametrize(
    "key",
    ["", "/", "/etc/passwd", "..", "../x", "a/../../x", "a/..", "a/./b", "a//b", "a/", "a\\b", "a\x00b", "a b", "ä",
     "~", "a\n", "x" * 2000],
)  # fmt: skip
async def test_keys_that_could_lead_elsewhere_are_refused(objects: Objects, key: str) -> None:
    for attempt in (
        lambda: objects.put(key, b"x"),
        lambda: objects.get(key),
        lambda: objects.stat(key),
        lambda: objects.delete(key),
        lambda: objects.copy("a", key),
    ):
        with pytest.raises(Invalid):
            await attempt()


async def test_puts_of_one_key_at_once_leave_one_of_them_whole(objects: Objects) -> None:
    contents = [bytes([number]) * 300_000 for number in range(8)]
    done = asyncio.Event()
    seen = 0

    async def read() -> None:
        nonlocal seen
        while not done.is_set():
            try:
                content = await objects.get(KEY)
            except NotFound:
                await asyncio.sleep(0.005)
                continue
            assert content in contents
            seen += 1
            await asyncio.sleep(0.005)

    reader = asyncio.create_task(read())
    await asyncio.gather(*(objects.put(KEY, content, sha256=digest(content)) for content in contents))
    done.set()
    await reader
    assert await objects.get(KEY) in contents
    assert await keys(objects) == [KEY]


async def test_many_at_once(objects: Objects) -> None:
    contents = {f"instances/1/{n % 3}/{n}/a.dcm": os.urandom(2_000 + n) for n in range(100)}
    await asyncio.gather(*(objects.put(key, content, sha256=digest(content)) for key, content in contents.items()))
    found = await asyncio.gather(*(objects.get(key) for key in contents))
    assert found == list(contents.values())
    assert await keys(objects) == sorted(contents)


async def test_a_large_file_goes_in_and_comes_out_in_pieces(objects: Objects, tmp_path: Path) -> None:
    file = tmp_path / "large"
    whole = hashlib.sha256()
    with file.open("wb") as output:
        for _ in range(40):
            piece = os.urandom(1 << 20)
            whole.update(piece)
            output.write(piece)
    assert (await objects.put(KEY, file, sha256=whole.hexdigest())).size == 40 << 20
    read, largest = hashlib.sha256(), 0
    async for piece in objects.stream(KEY):
        read.update(piece)
        largest = max(largest, len(piece))
    assert read.hexdigest() == whole.hexdigest()
    assert largest <= 1 << 20


async def test_a_large_file_with_a_wrong_digest_leaves_nothing(objects: Objects, tmp_path: Path) -> None:
    file = tmp_path / "large"
    with file.open("wb") as output:
        output.truncate(40 << 20)
    with pytest.raises(Invalid):
        await objects.put(KEY, file, sha256=digest(b"other"))
    assert await keys(objects) == []


async def test_free_bytes(objects: Objects) -> None:
    free = await objects.free_bytes()
    assert free is None or free > 0


async def test_starting_again_keeps_what_is_there(objects: Objects) -> None:
    await objects.put(KEY, b"x")
    await objects.start()
    assert await objects.get(KEY) == b"x"


def test_the_settings_choose_the_store(tmp_path: Path) -> None:
    assert isinstance(open_objects(Settings(data=tmp_path)), FilesystemObjects)
    s3 = Settings(objects="s3", s3_url="http://127.0.0.1:9000", s3_access_key="a", s3_secret_key="b")
    assert isinstance(open_objects(s3), S3Objects)


STREAMED = """
    import asyncio, resource, sys
    from libs.common.objects.filesystem import FilesystemObjects
    from libs.common.objects.s3 import S3Objects

    def open_store(kind, *words):
        if kind == "filesystem":
            from pathlib import Path
            return FilesystemObjects(Path(words[0]))
        return S3Objects(words[0], access_key=words[1], secret_key=words[2], bucket="flat")

    async def main():
        from pathlib import Path
        store = open_store(*sys.argv[2:])
        await store.start()
        await store.put("small.dcm", b"x")
        async for _ in store.stream("small.dcm"): pass
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        await store.put("large.dcm", Path(sys.argv[1]))
        total = 0
        async for piece in store.stream("large.dcm"):
            total += len(piece)
        await store.stop()
        print(total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

    asyncio.run(main())
"""


@pytest.mark.parametrize("kind", ["filesystem", "s3"])
def test_memory_stays_flat(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    file = tmp_path / "large"
    with file.open("wb") as output:
        output.truncate(200 << 20)
    if kind == "filesystem":
        words = [str(tmp_path / "store")]
    else:
        server = request.getfixturevalue("s3")
        words = [server.url, server.access_key, server.secret_key]
    command = [sys.executable, "-c", textwrap.dedent(STREAMED), str(file), kind, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    total, grown = map(int, done.stdout.split())
    assert total == 200 << 20
    assert grown < 80 << 10, f"{grown} KiB more for an object of 200 MiB"


async def test_a_server_that_stops_in_mid_put(private_s3: S3, tmp_path: Path) -> None:
    """Unavailable, nothing half there, and the same put works once the server is back."""
    store = s3_objects(private_s3, "interrupted")
    await store.start()
    await store.put("before.dcm", b"before")
    contents = {f"put/{n}.dcm": os.urandom(2_000_000) for n in range(24)}
    puts = {
        key: asyncio.create_task(store.put(key, content, sha256=digest(content))) for key, content in contents.items()
    }
    await asyncio.wait(puts.values(), return_when=asyncio.FIRST_COMPLETED)
    await asyncio.to_thread(private_s3.kill)
    await asyncio.wait(puts.values(), timeout=60)
    outcomes = {key: task.exception() for key, task in puts.items()}
    assert any(outcomes.values())
    assert all(error is None or isinstance(error, Unavailable) for error in outcomes.values())
    with pytest.raises(Unavailable):
        await store.get("before.dcm")
    with pytest.raises(Unavailable):
        await store.stat("before.dcm")

    await asyncio.to_thread(private_s3.restart)
    assert await store.get("before.dcm") == b"before"
    for key, error in outcomes.items():
        if error is None:
            assert await store.get(key) == contents[key]
    async for found in store.list("put/"):
        assert await store.get(found.key) == contents[found.key]
    await asyncio.gather(*(store.put(key, contents[key], sha256=digest(contents[key])) for key in contents))
    for key, content in contents.items():
        assert await store.get(key) == content
    await store.stop()


async def test_a_server_that_is_away_a_moment_is_waited_for(private_s3: S3) -> None:
    store = s3_objects(private_s3, "moment")
    await store.start()
    await asyncio.to_thread(private_s3.kill)
    put = asyncio.create_task(store.put(KEY, b"x" * 1000))
    restart = asyncio.create_task(asyncio.to_thread(private_s3.restart))
    await restart
    try:
        await put
    except Unavailable:  # it gave up first, which it may: then the next one works
        await store.put(KEY, b"x" * 1000)
    assert await store.get(KEY) == b"x" * 1000
    await store.stop()


async def test_no_server_is_unavailable(free_port: Any) -> None:
    store = S3Objects(f"http://127.0.0.1:{free_port()}", access_key="sagittal", secret_key="wrong", bucket="none")
    with pytest.raises(Unavailable):
        await store.start()
    await store.stop()


async def test_wrong_keys_are_unavailable_and_say_so(s3: Any) -> None:
    store = S3Objects(s3.url, access_key=s3.access_key, secret_key="not-the-secret", bucket="none")
    with pytest.raises(Unavailable) as raised:
        await store.start()
    assert "not-the-secret" not in str(raised.value)
    await store.stop()


async def test_a_full_disk_is_unavailable_and_leaves_nothing(tmp_path: Path) -> None:
    """On a small tmpfs where we may mount one, else under a limit on the size of files."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = os.geteuid() == 0 and (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True).returncode
        == 0
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not mounted:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    store = FilesystemObjects(folder / "store")
    try:
        await store.start()
        await store.put("fits.dcm", b"x" * 500_000)
        with pytest.raises(Unavailable):
            await store.put("too/large.dcm", b"y" * 3_000_000)
        assert await keys(store) == ["fits.dcm"]
        assert list((folder / "store" / ".incoming").iterdir()) == []
        await store.put("fits/too.dcm", b"z" * 500_000)
        assert await store.get("fits.dcm") == b"x" * 500_000
    finally:
        await store.stop()
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


async def test_what_a_killed_process_left_is_removed_at_the_start(tmp_path: Path) -> None:
    incoming = tmp_path / ".incoming"
    incoming.mkdir()
    child = subprocess.Popen(["true"])
    child.wait()
    dead = incoming / f"{socket.gethostname()}-{child.pid}-abc-0"
    living = incoming / f"{socket.gethostname()}-{os.getpid()}-abc-0"
    elsewhere = incoming / f"other-host-{child.pid}-abc-0"
    old = incoming / "other-host-1-abc-0"
    for file in (dead, living, elsewhere, old):
        file.write_bytes(b"half")
    os.utime(old, (1, 1))
    store = FilesystemObjects(tmp_path)
    await store.start()
    assert sorted(incoming.iterdir()) == sorted([living, elsewhere])
    await store.stop()
