"""What XLA:GPU makes of a whole step, without a GPU: launches, and where the host waits.

    pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12    # of jax's version
    python -m benchmarks.gpu.launches                         # H100, A100; 8, 32 and 512 tokens
    python -m benchmarks.gpu.launches --chips h100 --tokens 32 --whole
    python -m benchmarks.gpu.launches --chips h100 --tokens 32 --list

Steps of models' shapes, with few layers: what a layer adds is the difference of two such steps. XLA
splits products of few tokens by their inputs, to keep all processors busy, and most sums of such
parts are launches of their own; with --whole no product is split.

    copy ... other   launches that a layer adds, by kind; other: fusions of elementwise work, sums
                     and scatters
    a layer          the sum of these
    around           launches before and behind the layers, of all branches
    graphs           command buffers (CUDA graphs), each of which the host launches at once
    alone            launches outside of them, such as copies to the host
    waits            loops and conditions outside of them: the host reads what the device decided
"""

import argparse
import dataclasses
import itertools
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from fastgen_jax.models.config import ModelConfig
from tests.engine.whole_steps import LLAMA_3_8B, QWEN3_8B, compile_step, make_target

KINDS = {  # by the kinds and names of thunks, the first that matches
    "copy": r"Copy|Memset|Memzero",
    "product": r"gemm|cublas|Cublas",
    "attention": r"attention_",
    "other": r"",
}
MODELS = {"llama-3-8b": LLAMA_3_8B, "qwen3-8b": QWEN3_8B}
N_LAYERS = 2  # of the smaller step; the other has twice as many
WHOLE = {"xla_gpu_experimental_force_split_k": 1}
LINE = r"^( *)\d+: (k\w+) *\[[^\]]*\] *(\S*)"
CONTAINERS = ("kCommandBuffer", "kWhile", "kConditional", "kSequential")


class Thunk(NamedTuple):
    """One line of what XLA:GPU will do."""

    kind: str
    name: str
    is_captured: bool  # within a command buffer

    @property
    def is_launch(self) -> bool:
        return self.kind not in CONTAINERS

    @property
    def launch_kind(self) -> str:
        what = f"{self.kind} {self.name}"
        return next(kind for kind, pattern in KINDS.items() if re.search(pattern, what))


class Launches(NamedTuple):
    """All that one compiled step does."""

    thunks: tuple[Thunk, ...]

    @property
    def kinds(self) -> Counter[str]:
        return Counter(thunk.launch_kind for thunk in self.thunks if thunk.is_launch)

    @property
    def n_graphs(self) -> int:
        return sum(thunk.kind == "kCommandBuffer" for thunk in self.thunks)

    @property
    def n_alone(self) -> int:
        return sum(thunk.is_launch and not thunk.is_captured for thunk in self.thunks)

    @property
    def n_waits(self) -> int:
        waiting = ("kWhile", "kConditional")
        return sum(thunk.kind in waiting and not thunk.is_captured for thunk in self.thunks)


def read(text: str) -> Launches:
    """XLA's thunks as it prints them: a line each, indented under the one that they belong to."""
    thunks, outer = [], None  # the indent of the command buffer around
    for spaces, kind, name in re.findall(LINE, text, re.MULTILINE):
        if outer is not None and len(spaces) <= outer:
            outer = None
        thunks.append(Thunk(kind, name, outer is not None))
        if kind == "kCommandBuffer":
            outer = len(spaces)
    return Launches(tuple(thunks))


def thunks_of(config: ModelConfig, chip: str, n_tokens: int, **options: Any) -> str:
    """What XLA:GPU says that a step of so many tokens will do, compiled with these options."""
    with tempfile.TemporaryDirectory() as dump:
        options |= {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
        compile_step(config, make_target(chip), n_tokens=n_tokens, **options)
        (path,) = Path(dump).glob("*jit_step.thunk_sequence_after_thunk_passes.txt")
        return path.read_text()


def launches_of(config: ModelConfig, chip: str, n_tokens: int, **options: Any) -> Launches:
    return read(thunks_of(config, chip, n_tokens, **options))


def of_a_layer(
    config: ModelConfig, chip: str, n_tokens: int, **options: Any
) -> tuple[dict[str, float], Launches]:
    """The launches that a layer adds, by kind, and all of the step of N_LAYERS."""
    models = (dataclasses.replace(config, n_layers=n) for n in (N_LAYERS, 2 * N_LAYERS))
    few, more = (launches_of(model, chip, n_tokens, **options) for model in models)
    return {kind: (more.kinds[kind] - few.kinds[kind]) / N_LAYERS for kind in KINDS}, few


def rows(
    models: list[str], chips: list[str], sizes: list[int], **options: Any
) -> Iterator[tuple[str, ...]]:
    """The table, as they are compiled."""
    yield ("model", "chip", "tokens", *KINDS, "a layer", "around", "graphs", "alone", "waits")
    for model, chip, n_tokens in itertools.product(models, chips, sizes):
        added, few = of_a_layer(MODELS[model], chip, n_tokens, **options)
        layer = sum(added.values())
        around = few.kinds.total() - N_LAYERS * layer
        counts = *added.values(), layer, around, few.n_graphs, few.n_alone, few.n_waits
        yield (model, chip, str(n_tokens), *(f"{count:g}" for count in counts))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.launches", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated")
    parser.add_argument("--chips", default="h100,a100", help="comma-separated: h100, a100")
    parser.add_argument("--tokens", default="8,32,512", help="sizes of the steps, comma-separated")
    parser.add_argument("--whole", action="store_true", help="split no product by its inputs")
    parser.add_argument("--list", action="store_true", help="all launches of the first step")
    given = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    models, chips = given.models.split(","), given.chips.split(",")
    sizes, options = [int(n) for n in given.tokens.split(",")], WHOLE if given.whole else {}
    if given.list:
        config = dataclasses.replace(MODELS[models[0]], n_layers=N_LAYERS)
        print(thunks_of(config, chips[0], sizes[0], **options))
        return
    for row in rows(models, chips, sizes, **options):
        print("".join(f"{cell:>11}" for cell in row), flush=True)


if __name__ == "__main__":
    main()
