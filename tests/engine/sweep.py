"""What engines leave behind in a process that opens and closes many, each of other shapes. Every
other one is on a module of the program, gets other weights, sleeps, and is closed asleep.

    python -m tests.engine.sweep 40

Prints a line of JSON after each engine, and fails if the process has grown since the third.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx

from fastgen_jax import models
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.engine import Engine
from tests import tiny

DTYPES = ("float32", "bfloat16")  # of the two models: one is shared, the other cast
N_WARM = 3  # engines until imports, thread pools and jax's own caches are there


class Footprint(NamedTuple):
    """Of this process."""

    maps: int  # Linux allows 65530
    anon_mb: float  # resident memory that no file backs
    threads: int

    @classmethod
    def read(cls) -> "Footprint":
        lines = Path("/proc/self/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        return cls(
            maps=Path("/proc/self/maps").read_bytes().count(b"\n"),
            anon_mb=int(status["RssAnon"].split()[0]) / 1024,
            threads=int(status["Threads"]),
        )


# Per engine. The memory is jax's, which keeps traces of its own functions by shape, and so are the
# maps that it lies in: up to 4 with four devices and jax 0.11; a program that stays has dozens.
MAX_GROWTH = Footprint(maps=6, anon_mb=10, threads=1)


def open_and_close(folder: Path, i: int) -> None:
    """The i-th engine; no two have a weight, a cache or a step of the same shape."""
    path = tiny.write_config(
        folder, num_hidden_layers=1, hidden_size=32 + 8 * i, intermediate_size=64 + 8 * i
    )
    sizes = {"max_num_seqs": 4 + i, "max_num_batched_tokens": 4 + i % 4, "num_kv_blocks": 4096 + i}
    options = tiny.OPTIONS | sizes | {"compilation_cache": None}
    if i % 2:
        change_and_sleep(path, i, options | {"load_format": "auto"})
        return
    with Engine(EngineConfig(model=path, **options)) as engine:
        tiny.run(engine, tiny.random_requests(i, 2, max_tokens=2))


def change_and_sleep(path: str, i: int, options: dict[str, Any]) -> None:
    """An engine that does whatever may leave something behind."""
    one, other = (models.create(path, nnx.Rngs(seed), dtype) for seed, dtype in enumerate(DTYPES))
    with Engine(EngineConfig(**options), module=one) as engine:
        requests = tiny.random_requests(i, 2, max_tokens=2)
        tiny.run(engine, requests)
        engine.update_weights(other)
        tiny.run(engine, requests)
        engine.sleep(1)
        engine.wake_up()
        tiny.run(engine, requests)
        engine.sleep(1 + i // 2 % 2)


def sweep(n_engines: int) -> Iterator[Footprint]:
    """The process after each of so many engines has been closed."""
    with tempfile.TemporaryDirectory() as folder:
        for i in range(n_engines):
            open_and_close(Path(folder), i)
            yield Footprint.read()


def growth(footprints: list[Footprint]) -> dict[str, float]:
    """What has grown per engine, and how much, by more than MAX_GROWTH; the first N_WARM aside.

    The most of the last two warm ones and the least of the last three count, as if they were the
    third and the last but two, which they are where each engine leaves something: XLA's thread may
    hold a program a moment longer, and an allocator what was freed.
    """
    warm, last = map(max, *footprints[N_WARM - 2 : N_WARM]), map(min, *footprints[-3:])
    n_engines = len(footprints) - N_WARM - 2
    grown = [(end - start) / n_engines for start, end in zip(warm, last, strict=True)]
    fields = zip(Footprint._fields, grown, MAX_GROWTH, strict=True)
    return {name: value for name, value, most in fields if value > most}


def main() -> int:
    footprints = []
    for footprint in sweep(int(sys.argv[1])):
        print(json.dumps(footprint._asdict()), flush=True)
        footprints.append(footprint)
    too_much = growth(footprints)
    if too_much:
        print(f"each engine leaves {too_much}, may leave {MAX_GROWTH}", file=sys.stderr)
    return bool(too_much)


if __name__ == "__main__":
    sys.exit(main())
