"""MII's names: `pipeline` runs a model in this process, `serve` in one that outlives it.

    client = mii.serve("path-or-hub-id")
    client(["DeepSpeed is", "Seattle is"], max_new_tokens=128)
    mii.client("path-or-hub-id")  # elsewhere, as long as the server runs
    client.terminate_server()

Both forms read the same options (options.py) and answer with the same Response. Names are imported
when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgen_jax.mii.offline import Pipeline, pipeline
    from fastgen_jax.mii.options import PipelineOptions, Response
    from fastgen_jax.mii.remote import Client, client
    from fastgen_jax.mii.start import serve

__all__ = ["Client", "Pipeline", "PipelineOptions", "Response", "client", "pipeline", "serve"]

_ROOMS = {
    "offline": ("Pipeline", "pipeline"),
    "options": ("PipelineOptions", "Response"),
    "remote": ("Client", "client"),
    "start": ("serve",),
}


def __getattr__(name: str) -> Any:
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{room}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
