"""From a config to a Backend: the model's files, its names, its engine and its tokenizer.

Imports of weight wait until they are needed, so that --help and a wrong flag answer at once.
"""

import dataclasses
import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from fastgen_jax.built_in import DEMO, DEMO_NAME
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.errors import ConfigError
from fastgen_jax.server.config import ServerConfig

if TYPE_CHECKING:
    from fastgen_jax.server.report import StartupReport
    from fastgen_jax.server.service import Backend, OnPhase, Service


def check_model(model: str):
    """Raises ConfigError at once for a path that is not there; other names may be hub ids."""
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") != 1
    if looks_like_path and not Path(model).is_dir():
        raise ConfigError(
            f"there is no directory {model!r}; give one with a Hugging Face checkpoint, or a hub id"
        )


def model_names(model: str, config: ServerConfig) -> list[str]:
    """What clients call the model: never a path of this machine."""
    if config.served_model_name:
        return list(config.served_model_name)
    path = Path(model)
    if path == DEMO:
        return [DEMO_NAME]
    name = path.resolve().name if path.is_dir() else model
    return [name.encode(errors="replace").decode()]


def hub_id(model: str) -> str | None:
    """None for a directory of this machine, whose path is nobody's business."""
    return None if Path(model).is_dir() else model


def make_service(
    engine_config: EngineConfig, server_config: ServerConfig, report: "StartupReport"
) -> "Service":
    """The service of a model, which `report` tells of and `start` loads."""
    from fastgen_jax.server.service import Service

    service = Service(
        lambda on_phase: load(engine_config, server_config, on_phase),
        server_config,
        model_names=model_names(engine_config.model, server_config),
        model_aliases=[engine_config.model],
        hub_id=hub_id(engine_config.model),
        on_phase=lambda *phase: report.phase(service, *phase),
    )
    return service


def load(
    engine_config: EngineConfig, server_config: ServerConfig, on_phase: "OnPhase"
) -> "Backend":
    """The engine, which can serve, and the tokenizer, which loads meanwhile. What can be told from
    names of files and config.json is told before anything is loaded.
    """
    template = chat_template(server_config.chat_template)
    from fastgen_jax.checkpoints.directory import locate_tokenizer
    from fastgen_jax.tokenizer.loading import tokenizer_file

    directory = locate_tokenizer(
        engine_config.model,
        engine_config.tokenizer,
        revision=engine_config.revision,
        overrides=engine_config.hf_overrides,
    )
    tokenizer_file(directory)
    from fastgen_jax.engine.engine import Engine
    from fastgen_jax.server.service import Backend
    from fastgen_jax.tokenizer import Tokenizer

    # What loads now stays: walking it, as each full collection would, halts all tokens for 0.2 s.
    gc.disable()
    try:
        with ThreadPoolExecutor(1) as pool:
            tokenizer = pool.submit(Tokenizer, str(directory), chat_template=template)

            def on_engine_phase(name: str, done: int, total: int) -> None:
                if tokenizer.done():
                    tokenizer.result()  # raises now what would else wait for the weights
                on_phase(name, done, total)

            soon = dataclasses.replace(engine_config, compile=engine_config.compile or "first")
            engine = Engine(soon, on_phase=on_engine_phase)
            backend = Backend(engine, tokenizer.result())
    finally:
        gc.freeze()
        gc.enable()
    return backend


def chat_template(path: str | None) -> str | None:
    """The template's text.

    Raises:
        ConfigError: the file cannot be read.
    """
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read --chat-template {path}: {error}; give a text file"
        ) from None
