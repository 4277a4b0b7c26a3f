"""Runs the query service alone: ``python -m services.query``."""

import asyncio

from libs.common.config import Settings
from libs.common.runtime import run
from services.query.service import build

if __name__ == "__main__":
    asyncio.run(run([build], Settings()))
