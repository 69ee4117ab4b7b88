"""fastgen_jax: an LLM serving engine for CPU, NVIDIA GPU and TPU.

Names are imported when first used, so that `import fastgen_jax` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgen_jax import models
    from fastgen_jax.engine.config import EngineConfig
    from fastgen_jax.errors import (
        CheckpointError,
        ConfigError,
        ContextLengthExceeded,
        EngineStopped,
        FastGenError,
        InvalidRequest,
        QueueFull,
        RequestError,
        WeightsError,
    )
    from fastgen_jax.llm import LLM
    from fastgen_jax.mii import pipeline
    from fastgen_jax.prompts import TextPrompt, TokensPrompt
    from fastgen_jax.results import (
        CompletionOutput,
        EmbeddingOutput,
        EmbeddingRequestOutput,
        Logprob,
        RequestOutput,
    )
    from fastgen_jax.sampling_params import (
        BeamSearchParams,
        SamplingParams,
        StructuredOutputsParams,
    )

__all__ = [
    "LLM",
    "BeamSearchParams",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "ContextLengthExceeded",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EngineConfig",
    "EngineStopped",
    "FastGenError",
    "InvalidRequest",
    "Logprob",
    "QueueFull",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "WeightsError",
    "models",
    "pipeline",
]

_ROOMS = {
    "engine.config": ("EngineConfig",),
    "sampling_params": ("BeamSearchParams", "SamplingParams", "StructuredOutputsParams"),
    "llm": ("LLM",),
    "prompts": ("TextPrompt", "TokensPrompt"),
    "results": (
        "CompletionOutput",
        "EmbeddingOutput",
        "EmbeddingRequestOutput",
        "Logprob",
        "RequestOutput",
    ),
    "mii": ("pipeline",),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "models":
        return importlib.import_module(f"{__name__}.models")
    room = next((room for room, names in _ROOMS.items() if name in names), "errors")
    return getattr(importlib.import_module(f"{__name__}.{room}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
