"""This engine, as benchmarks.engine.throughput drives it."""

from pathlib import Path

import jax

from benchmarks.engine.throughput import Ours, Workload
from benchmarks.peers.protocol import Generate, serve


def load(path: str, dtype: str) -> tuple[str, Generate]:
    ours = Ours(Path(path), dtype)
    backend = ours.engine.config.attention_backend
    return f"jax {jax.__version__}, attention {backend}", lambda prompts, n_new, _: ours.generate(
        Workload(prompts, n_new)
    )


if __name__ == "__main__":
    serve(load)
