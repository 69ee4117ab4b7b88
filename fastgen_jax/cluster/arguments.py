"""Arguments of the application builder, which names and reads them as the command line does."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fastgen_jax.built_in import DEMO
from fastgen_jax.cluster.config import ClusterConfig, check_shared
from fastgen_jax.config import check_names, show
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.errors import ConfigError
from fastgen_jax.server.config import ServerConfig
from fastgen_jax.server.flags import FlagParser, add_flags, arguments, build

CONFIGS = (EngineConfig, ServerConfig, ClusterConfig)


def read(args: Mapping[str, Any]) -> tuple[EngineConfig, ServerConfig, ClusterConfig]:
    """The configs that `args` ask for: flags' names with underscores, values as YAML has them or as
    text.

    Raises:
        ConfigError: an unknown name, naming the nearest, or a value that cannot work.
    """
    check_names(args, [field.name for config in CONFIGS for field in dataclasses.fields(config)])
    parser = FlagParser(prog="build", allow_abbrev=False, add_help=False)
    add_flags(parser, CONFIGS)
    given = {name: _checked(name, value) for name, value in args.items()}
    namespace = parser.parse(arguments(given))
    namespace.model = getattr(namespace, "model", None) or str(DEMO)
    engine, server, cluster = (build(config, namespace) for config in CONFIGS)
    check_shared(server)
    return engine, server, cluster


def _checked(name: str, value: Any) -> Any:
    """A value that a flag can have; Ray's command hands over text, of truth too."""
    if isinstance(value, list | tuple):
        return [_checked(name, item) for item in value]
    if value in ("true", "True", "false", "False"):
        return value in ("true", "True")
    if value is not None and not isinstance(value, Mapping | str | int | float):
        raise ConfigError(f"{name} must be text, a number, a list or a mapping, got {show(value)}")
    return value
