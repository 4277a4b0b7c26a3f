"""Runs the indexing service alone: ``python -m services.indexing``."""

import asyncio

from libs.common.config import Settings
from libs.common.runtime import run
from services.indexing.service import build

if __name__ == "__main__":
    asyncio.run(run([build], Settings()))
