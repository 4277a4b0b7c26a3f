"""What the indexing service can be told: ``SAGITTAL_INDEXING_...``, or the table ``indexing`` of the TOML file."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from libs.common.config import toml_source


class IndexingSettings(BaseSettings):
    """Times in seconds, sizes in bytes."""

    model_config = SettingsConfigDict(env_prefix="SAGITTAL_INDEXING_", extra="ignore")

    quiet_seconds: float = Field(default=60.0, ge=0)
    """How long nothing may arrive for a study before it is announced as stable."""
    check_seconds: float = Field(default=1.0, gt=0)
    """How often studies that became quiet are looked for."""
    lease_seconds: float = Field(default=30.0, gt=0)
    """How long a process that died while announcing a study keeps others from doing it."""

    batch_items: int = Field(default=100, ge=1, le=1000)
    batch_wait: float = Field(default=0.05, ge=0)
    concurrency: int = Field(default=1, ge=1)
    """Batches in hand at the same time; more than one pays only when the database is far away."""

    header_bytes: int = Field(default=65536, ge=1024)
    """How much of an object is read first; longer headers are read on."""
    max_header_bytes: int = Field(default=64 << 20, ge=65536)
    """A header longer than this goes to quarantine."""
    parallel_reads: int = Field(default=8, ge=1)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, toml_source(settings_cls, "indexing")
