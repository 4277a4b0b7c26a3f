"""What the query service can be told (``SAGITTAL_QUERY_...`` or the table ``[query]`` of the TOML file)."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from libs.common.config import toml_source


class QuerySettings(BaseSettings):
    """Limits in numbers of matches, sizes in bytes, times in seconds."""

    model_config = SettingsConfigDict(env_prefix="SAGITTAL_QUERY_", extra="ignore")

    find_limit: int = Field(default=1000, ge=1)
    """Most patients, studies or series one C-FIND answers with; then it ends with a warning."""
    find_instance_limit: int = Field(default=20_000, ge=1)
    """The same at the IMAGE level, where one series alone may have thousands."""
    strict_hierarchy: bool = True
    """Whether a query without relational negotiation must name the unique key of every level above (PS3.4 C.4.1.2)."""

    read_ahead: int = Field(default=4, ge=0)
    """Instances read from the store before the network asks for them."""
    read_whole: int = Field(default=4 << 20, ge=0)
    """Up to this size an instance is one read; larger ones are streamed."""
    progress_interval: float = Field(default=0.1, ge=0)
    """Least time between two pending responses of a C-MOVE or C-GET."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, toml_source(settings_cls, "query")
