"""What the code really has: its root, its services, its settings."""

from __future__ import annotations

import importlib
from pathlib import Path

from pydantic_settings import BaseSettings

from libs.common.config import Settings

ROOT = Path(__file__).resolve().parents[3]


def setting_names() -> set[str]:
    """The environment variable of every setting: those all share, and each service's own."""
    classes: list[type[BaseSettings]] = [Settings]
    for path in sorted(ROOT.glob("services/*/config.py")):
        module = importlib.import_module(f"services.{path.parent.name}.config")
        classes += [
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, BaseSettings) and value.__module__ == module.__name__
        ]
    names = {"SAGITTAL_CONFIG"}
    for cls in classes:
        prefix = str(cls.model_config.get("env_prefix", ""))
        names |= {f"{prefix}{field}".upper() for field in cls.model_fields}
    return names


def service_names() -> list[str]:
    """The services by their folders."""
    return sorted(path.parent.name for path in ROOT.glob("services/*/__init__.py"))
