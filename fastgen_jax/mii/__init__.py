"""MII's names: `pipeline(model)(prompts, max_new_tokens=64)` runs a model in this process.

Names are imported when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgen_jax.mii.offline import Pipeline, pipeline
    from fastgen_jax.mii.options import PipelineOptions, Response

__all__ = ["Pipeline", "PipelineOptions", "Response", "pipeline"]

_ROOMS = {
    "offline": ("Pipeline", "pipeline"),
    "options": ("PipelineOptions", "Response"),
}


def __getattr__(name: str) -> Any:
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{room}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
