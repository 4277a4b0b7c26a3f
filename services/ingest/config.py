"""What the ingest service can be told: ``SAGITTAL_INGEST_...``, or the table ``ingest`` of the TOML file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from libs.common.config import toml_source


class IngestSettings(BaseSettings):
    """Sizes in bytes."""

    model_config = SettingsConfigDict(env_prefix="SAGITTAL_INGEST_", extra="ignore")

    on_conflict: Literal["replace", "keep", "reject"] = "replace"
    """Other bytes under a SOP Instance UID that is here: they become the current version, are kept behind the version
    that came first, or are refused."""

    accept_any_sop_class: bool = False
    """Whether private and unknown SOP classes are taken too, whatever they are."""
    more_sop_classes: tuple[str, ...] = ()
    """Single private SOP classes to take."""

    head_bytes: int = Field(default=8192, ge=1024)
    """How much of a dataset is looked at first for its UIDs; more is read when they come later."""
    max_head_bytes: int = Field(default=64 << 20, ge=65536)
    """A dataset whose UIDs are not within its first part of this size goes to quarantine."""
    hash_inline_bytes: int = Field(default=65536, ge=0)
    """Up to this size the digest is made at once: a thread would cost more than it saves."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, toml_source(settings_cls, "ingest")
