"""What a KV cache of 8 bits does to logits, family by family, beside one of float32.

    python -m benchmarks.models.kv_cache                   # a golden of each family, and demo
    python -m benchmarks.models.kv_cache llama demo --out FILE

Weights and all arithmetic are float32, so that nothing differs but what the cache has rounded. A
golden's text is drawn from its model, whose weights are random and large, so that attention is
sharp; the demo, which was trained, reads a story of its kind. Columns, over all tokens of a text:

    max, mean   differences between the log-probabilities of the token that follows
    KL          mean divergence of the next token's distribution, in nats
    other       tokens after which another token is the likeliest, percent
"""

import argparse
import datetime
import importlib.metadata
import platform
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fastgen_jax import models
from fastgen_jax.demo.corpus import recall_example
from fastgen_jax.demo.evaluate import CHECKPOINT
from fastgen_jax.engine.config import KV_CACHE_DTYPES
from fastgen_jax.engine.startup import BACKENDS, available
from fastgen_jax.models.kv_cache import CacheLayout, KVCache, attend
from fastgen_jax.models.row_tiles import BLOCK_SIZE, whole_rows
from fastgen_jax.models.sharding import make_mesh
from fastgen_jax.tokenizer import Tokenizer
from pallas_kernels import select
from tests.golden import agreement

N_TOKENS = 192  # of a golden's text, the model's own from the 8th on
N_GIVEN = 8
STORY_TOKENS = 1000  # before the question that ends the demo's text
DTYPES = "int8", "fp8"
PACKAGES = "jax", "flax", "fastgen-jax"


class Effect(NamedTuple):
    """Of a cache on one text; see above."""

    max: float
    mean: float
    kl: float
    other: float

    def __str__(self) -> str:
        return f"{self.max:.1e} | {self.mean:.1e} | {self.kl:.1e} | {100 * self.other:.1f}"


def reader(model: Any, n_tokens: int, dtype: str) -> Any:
    """The log-probabilities "T V" after each token of a text, as the engine's attention makes them
    over a cache of that dtype.
    """
    backend = available(BACKENDS[jax.default_backend()].attention)
    layout = CacheLayout.of(model.config, backend=backend, dtype=dtype, block_size=BLOCK_SIZE)
    meta = whole_rows(1, n_tokens, 1)
    arrays = layout.absent(1 + meta.block_tables.size, make_mesh(1))

    @jax.jit
    def read(model: Any, tokens: Int[Array, "T"]) -> Float[Array, "T V"]:
        empty: KVCache = jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), arrays)
        hidden, _ = model.hidden_states(
            tokens,
            meta.positions,
            (empty,) * model.config.n_layers,
            partial(attend, select(backend), meta),
        )
        return jax.nn.log_softmax(model.unembed(hidden))

    return partial(read, model)


def effect(plain: np.ndarray, rounded: np.ndarray, tokens: np.ndarray) -> Effect:
    """Of log-probabilities "T V" on those of the tokens that follow, and on all."""
    followed = np.arange(len(tokens) - 1), tokens[1:]
    differences = np.abs(plain[followed] - rounded[followed])
    kl = (np.exp(plain) * (plain - rounded)).sum(1).mean()
    other = (plain.argmax(1) != rounded.argmax(1)).mean()
    return Effect(*map(float, (differences.max(), differences.mean(), kl, other)))


def effects(model: Any, given: list[int], n_tokens: int) -> dict[str, Effect]:
    """Of the cache's dtypes, on a text of the model that follows the given tokens, or on these."""
    plain, *rounded = (
        reader(model, n_tokens, dtype)
        for dtype in ("float32", *(KV_CACHE_DTYPES[name] or "" for name in DTYPES))
    )
    tokens = drawn(plain, given, n_tokens)
    before, *after = (np.asarray(read(tokens), np.float64) for read in (plain, *rounded))
    return {name: effect(before, found, tokens) for name, found in zip(DTYPES, after, strict=True)}


def drawn(read: Any, given: list[int], n_tokens: int) -> np.ndarray:
    tokens, rng = np.zeros(n_tokens, np.int32), np.random.default_rng(0)
    tokens[: len(given)] = given
    for i in range(len(given), n_tokens):
        share = np.exp(np.asarray(read(tokens)[i - 1], np.float64))
        tokens[i] = rng.choice(len(share), p=share / share.sum())
    return tokens


def golden_of(name: str) -> dict[str, Effect]:
    model = models.load(agreement.HERE / name, dtype="float32")
    return effects(model, agreement.prompt_of(name)[:N_GIVEN], N_TOKENS)


def demo() -> dict[str, Effect]:
    example = recall_example(random.Random(0), STORY_TOKENS, 0.5, chat=False, held_out=True)
    tokens = Tokenizer(str(CHECKPOINT)).encode(example.text + example.answer)
    return effects(models.load(CHECKPOINT, dtype="float32"), tokens, len(tokens))


def rows(chosen: list[str]) -> Iterator[tuple[str, dict[str, Effect]]]:
    names = sorted(path.parent.name for path in agreement.HERE.glob("*/golden.npz"))
    subjects = {f: partial(golden_of, n) for f, n in agreement.first_of_each_family(names).items()}
    for name, measure in (subjects | {"demo": demo}).items():
        if not chosen or name in chosen:
            yield name, measure()


def summary(found: dict[str, dict[str, Effect]]) -> Iterator[str]:
    """The worst and the median of all rows but the demo's."""
    goldens = [row for name, row in found.items() if name != "demo"]
    for name, pick in (("worst", np.max), ("median", np.median)) if goldens else ():
        cells = [
            Effect(*(float(pick(column)) for column in zip(*columns, strict=True)))
            for columns in ([row[dtype] for row in goldens] for dtype in DTYPES)
        ]
        yield line(f"**{name}**", *cells)


def line(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def heading(chosen: list[str]) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    columns = (f"{dtype} {what}" for dtype in DTYPES for what in ("max", "mean", "KL", "other"))
    command = " ".join(["python -m benchmarks.models.kv_cache", *chosen])
    return "\n".join(
        [
            "# Logits with a KV cache of 8 bits\n",
            f"- date: {datetime.date.today()}",
            f"- machine: {platform.machine()}, {jax.devices()[0].device_kind}",
            f"- versions: Python {platform.python_version()}, {versions}",
            f"- command: `{command}`\n",
            line("family", *columns),
            line(*["---"] * 9),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("families", nargs="*", help="default: all, and demo")
    parser.add_argument("--out", type=Path, help="writes the table there too")
    args = parser.parse_args()
    lines, found = [heading(args.families)], {}
    print(lines[0])
    for name, row in rows(args.families):
        found[name] = row
        lines.append(line(name, *(row[dtype] for dtype in DTYPES)))
        print(lines[-1], flush=True)
    lines += summary(found)
    print(*lines[len(found) + 1 :], sep="\n")
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
