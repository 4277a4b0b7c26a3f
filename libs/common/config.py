"""What every process can be told: by environment (``SAGITTAL_...``), a TOML file, or defaults.

The environment wins over the file. The file is ``sagittal.toml`` in the working folder, or the one that
``SAGITTAL_CONFIG`` names.
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, BaseModel, Field, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource


class Peer(BaseModel):
    """A DICOM application we can open associations to (C-MOVE destinations among them)."""

    ae_title: str = Field(min_length=1, max_length=16)
    host: str
    port: int = Field(ge=1, le=65535)


class Site(BaseModel):
    """One hospital site. A caller belongs to the first site that lists its called AE, calling AE or address."""

    code: str = Field(min_length=1, max_length=16, pattern=r"^[A-Za-z0-9_-]+$")
    issuer_of_patient_id: str = ""
    called_ae_titles: tuple[str, ...] = ()
    calling_ae_titles: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()

    @field_validator("networks")
    @classmethod
    def _networks_parse(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for network in value:
            ipaddress.ip_network(network)
        return value


class Settings(BaseSettings):
    """The settings that all services share. A service's own are in its ``config.py``."""

    model_config = SettingsConfigDict(env_prefix="SAGITTAL_", extra="ignore", populate_by_name=True)

    ae_title: str = Field(default="SAGITTAL", min_length=1, max_length=16)
    host: str = "127.0.0.1"
    dimse_port: int = Field(default=11112, ge=0, le=65535)
    http_port: int = Field(default=8080, ge=0, le=65535)
    mllp_port: int = Field(default=2575, ge=0, le=65535)
    data: Path = Path("./data")

    bus: Literal["embedded", "rabbitmq"] = "embedded"
    objects: Literal["filesystem", "s3"] = "filesystem"
    mongo_url: str = Field(default="", validation_alias=AliasChoices("SAGITTAL_MONGO_URL", "MONGO_URL", "mongo_url"))
    mongo_database: str = "sagittal"
    rabbitmq_url: str = Field(
        default="", validation_alias=AliasChoices("SAGITTAL_RABBITMQ_URL", "RABBITMQ_URL", "rabbitmq_url")
    )
    s3_url: str = Field(default="", validation_alias=AliasChoices("SAGITTAL_S3_URL", "S3_URL", "s3_url"))
    s3_access_key: str = ""
    s3_secret_key: str = ""
    s3_bucket: str = "sagittal"
    s3_region: str = "us-east-1"

    site: str = Field(default="MAIN", pattern=r"^[A-Za-z0-9_-]+$", max_length=16)
    sites: tuple[Site, ...] = ()
    peers: tuple[Peer, ...] = ()
    accept_unknown_callers: Literal["loopback", "always", "never"] = "loopback"
    max_associations: int = Field(default=200, ge=1)

    log_format: Literal["auto", "json", "console"] = "auto"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    drain_seconds: float = Field(default=30.0, ge=0)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, toml_source(settings_cls)


def toml_source(settings_cls: type[BaseSettings], section: str | None = None) -> PydanticBaseSettingsSource:
    """The TOML file as a settings source; ``section`` names the table a service reads."""
    path = Path(os.environ.get("SAGITTAL_CONFIG", "sagittal.toml"))
    source = TomlConfigSettingsSource(settings_cls, path)
    if section is not None:
        source.toml_data = source.toml_data.get(section, {})
        source.init_kwargs = source.toml_data
    return source
