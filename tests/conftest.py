"""What tests share: real servers, each started once and only when a test asks for it."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pymongo
import pytest
from motor.motor_asyncio import AsyncIOMotorClient, AsyncIOMotorDatabase
from pymongo import WriteConcern

from cli.servers import process
from cli.servers.mongod import Mongod
from cli.servers.rabbitmq import RabbitMQ
from cli.servers.s3 import S3


class Given:
    """A server that somebody else runs, named by the environment; tests cannot stop it."""

    kind = "given"
    running = True

    def __init__(self, url: str, access_key: str = "", secret_key: str = "") -> None:
        self.url = url
        self.access_key = access_key
        self.secret_key = secret_key

    def stop(self) -> None: ...


def _given(name: str) -> str:
    return os.environ.get(f"SAGITTAL_{name}") or os.environ.get(name, "")


@pytest.fixture(scope="session")
def mongod(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mongod | Given]:
    """A MongoDB: ``.url``. MONGO_URL names one to use instead of a private one."""
    url = _given("MONGO_URL")
    server = Given(url) if url else Mongod.start(tmp_path_factory.mktemp("mongod"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ | Given]:
    """A RabbitMQ: ``.url``. RABBITMQ_URL names one to use instead of a private one."""
    url = _given("RABBITMQ_URL")
    server = Given(url) if url else RabbitMQ.start(tmp_path_factory.mktemp("rabbitmq"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3 | Given]:
    """An S3 server: ``.url``, ``.access_key``, ``.secret_key``. S3_URL (and S3_ACCESS_KEY, S3_SECRET_KEY) name
    one to use instead of a private one."""
    url = _given("S3_URL")
    server = (
        Given(url, _given("S3_ACCESS_KEY"), _given("S3_SECRET_KEY")) if url else S3.start(tmp_path_factory.mktemp("s3"))
    )
    yield server
    server.stop()


@pytest.fixture
async def database(mongod: Mongod | Given) -> AsyncIterator[AsyncIOMotorDatabase[dict[str, Any]]]:
    """An empty database of its own name, dropped afterwards."""
    client: AsyncIOMotorClient[dict[str, Any]] = AsyncIOMotorClient(
        mongod.url, tz_aware=True, io_loop=asyncio.get_running_loop()
    )
    name = f"test_{uuid.uuid4().hex[:12]}"
    try:
        yield client.get_database(name, write_concern=WriteConcern("majority", j=True))
    finally:
        client.close()
        with pymongo.MongoClient[dict[str, Any]](mongod.url) as admin:
            admin.drop_database(name)


@pytest.fixture
def free_port() -> Callable[[], int]:
    """Call it for a port on 127.0.0.1 that nothing uses."""
    return process.free_port


@pytest.fixture
def private_s3(tmp_path: Path) -> Iterator[S3]:
    """An S3 server that the test may stop and start again."""
    server = S3.start(tmp_path / "s3")
    yield server
    server.stop()


@pytest.fixture
def private_mongod(tmp_path: Path) -> Iterator[Mongod]:
    """A mongod that the test may stop and start again."""
    server = Mongod.start(tmp_path / "mongod")
    yield server
    server.stop()


@pytest.fixture
def private_rabbitmq(tmp_path: Path) -> Iterator[RabbitMQ]:
    """A RabbitMQ that the test may stop and start again."""
    server = RabbitMQ.start(tmp_path / "rabbitmq")
    yield server
    server.stop()
