"""Arguments of the application builder, which names and reads them as the command line does."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from fastgen_jax.built_in import DEMO
from fastgen_jax.cluster.config import ClusterConfig, check_shared
from fastgen_jax.config import check_names, show
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.errors import ConfigError
from fastgen_jax.server.config import ServerConfig
from fastgen_jax.server.flags import FlagParser, add_flags, build

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
    flags = [flag for name, value in args.items() for flag in _flags(name, value)]
    namespace = parser.parse(flags)
    namespace.model = getattr(namespace, "model", None) or str(DEMO)
    engine, server, cluster = (build(config, namespace) for config in CONFIGS)
    check_shared(server)
    return engine, server, cluster


def _flags(name: str, value: Any) -> Iterator[str]:
    """How the command line would say it; nothing for None, which is the default."""
    flag = name.replace("_", "-")
    if value is True or value in ("true", "True"):
        yield f"--{flag}"
    elif value is False or value in ("false", "False"):
        yield f"--no-{flag}"
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _flags(name, item)
    elif isinstance(value, Mapping):
        yield f"--{flag}={json.dumps(value)}"
    elif isinstance(value, str | int | float):
        yield f"--{flag}={value}"
    elif value is not None:
        raise ConfigError(f"{name} must be text, a number, a list or a mapping, got {show(value)}")
