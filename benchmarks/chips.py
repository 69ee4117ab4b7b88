"""GPU against TPU: what each chip could do with each model, and which resource binds it.

    pip install libtpu jax-cuda12-plugin jax-cuda12-pjrt    # of jax's version
    pip install nvidia-cuda-nvcc-cu12 nvidia-cuda-nvdisasm
    python -m benchmarks.chips
    python -m benchmarks.chips --chips h100,v6e --models llama-3-8b --save

The engine's own step programs are compiled for chips that need not be here (with 2 and with 4
layers: the rest is their difference, 2 layers at a time), sharded over the fewest chips of 1, 2, 4
and 8 that hold the model. No column without its source:

    tokens, requests    KV cache that fits beside weights and the compiled step's temporaries, in
                        the memory fraction that the engine takes; requests of --context tokens
    temporaries         of the largest step: memory_analysis, extrapolated to all layers
    step gflop, gb      of the largest step on each device by XLA's cost analysis, which does not
                        see into Pallas calls, that is without attention; extrapolated. Of absent
                        GPUs there is none
    decode, chunk       of attention's kernels: what bytes and matrix units need at least, of what
    kernel              the schedule of `kernel source` takes, and which of its parts binds
    decode, prefill     tokens/s on all chips: the roofline of benchmarks.simulation over the
                        numbers of `chip source`, its attention slowed down as the kernel's schedule
                        says, at the batch that fits, at most --sequences, each of --context tokens;
                        whole prompts of as many, in the largest step
    bound by            what most of that time goes to
    measured            decode of a run on that chip, where benchmarks/results has one
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import kept, schedules
from benchmarks.simulation.chips import CHIPS, MODELS, Chip, Model
from benchmarks.simulation.step_time import Roofline
from benchmarks.tpu.schedule import CompileError
from convert.chips import ENVIRONMENT, Chips
from fastgen_jax.engine.surface import Work
from fastgen_jax.errors import ConfigError

RESULTS = Path("benchmarks/results")
LAYERS = 2, 4  # of the programs that are compiled
COUNTS = 1, 2, 4, 8
DEVICES = {"tpu7x": 2}  # of jax, that a chip is; others are one
NOTE = (
    "Predicted by rooflines over published numbers; programs are compiled, not run. Nothing but "
    "`measured` comes from a chip; `python -m benchmarks.chips --help` says what each column is."
)


class Program(NamedTuple):
    """Of the largest step, on each device."""

    temporaries: float  # bytes
    flops: float
    n_bytes: float
    weights: float  # bytes
    n_tokens: int
    memory_fraction: float

    def extrapolated(self, few: "Program", n_layers: int) -> "Program":
        """To a model of n_layers, from those of LAYERS."""
        steps = (n_layers - LAYERS[1]) / (LAYERS[1] - LAYERS[0])
        pairs = zip(self[:4], few[:4], strict=True)
        a, b, c, d = (more + steps * (more - less) for more, less in pairs)
        return Program(a, b, c, d, self.n_tokens, self.memory_fraction)


class Row(NamedTuple):
    """One chip and model."""

    chip: str
    n_chips: int
    model: str
    tokens: int
    requests: int
    temporaries_mb: float
    step_tokens: int
    step_gflop: float
    step_gb: float
    decode_kernel: float
    decode_kernel_bound_by: str
    chunk_kernel: float
    chunk_kernel_bound_by: str
    kernel_source: str
    decode_batch: int
    decode: float
    decode_bound_by: str
    prefill: float
    prefill_bound_by: str
    measured: str
    chip_source: str


def compiled(model: Model, chip: str, n_devices: int, n_layers: int) -> Program:
    """Compiles the largest step of a model of so many layers."""
    from fastgen_jax.checkpoints.loading import abstract_model, filled, flat_params
    from fastgen_jax.engine import startup
    from fastgen_jax.engine.config import EngineConfig
    from fastgen_jax.models.layers import Policy
    from fastgen_jax.models.sharding import mesh_over, placed

    mesh = mesh_over(Chips(chip, n_devices).devices())
    config = EngineConfig(
        model=chip, tensor_parallel_size=n_devices, num_kv_blocks=64, dtype="bfloat16"
    )
    resolved, model_config, shapes = startup.design(config, config_of(model, n_layers), mesh)
    abstract = abstract_model(model_config, Policy.here(resolved.dtype, mesh))
    params = flat_params(abstract)
    leaves: list[Any] = [placed(path, x, model_config, mesh) for path, x in params.items()]
    recipe = startup.recipe_of(filled(abstract, leaves), model_config, resolved, mesh)
    step = recipe.compile(shapes[-1])
    memory, cost = step.memory_analysis(), step.cost_analysis() or {}
    assert memory is not None
    return Program(
        temporaries=memory.temp_size_in_bytes,
        flops=cost.get("flops", math.nan),
        n_bytes=cost.get("bytes accessed", math.nan),
        weights=sum(math.prod(x.sharding.shard_shape(x.shape)) * 2 for x in leaves),
        n_tokens=shapes[-1].n_tokens,
        memory_fraction=resolved.memory_fraction,
    )


def config_of(model: Model, n_layers: int):
    """As the engine knows it."""
    from fastgen_jax.models.config import ModelConfig, MoeConfig

    layers = tuple(range(n_layers))
    experts = MoeConfig(
        n_experts=model.n_experts,
        n_chosen=model.n_chosen,
        ffn_size=model.ffn,
        layers=layers,
        normalise=True,
    )
    return ModelConfig(
        family="llama",
        vocab_size=model.vocab,
        hidden_size=model.width,
        n_layers=n_layers,
        n_heads=model.n_heads,
        n_kv_heads=model.n_kv_heads,
        head_dim=model.head_dim,
        ffn_size=model.ffn,
        max_position=8192,
        moe=experts if model.n_experts > 1 else None,
    )


def n_chips_for(chip: Chip, model: Model) -> int:
    """The fewest that hold the weights with a fifth of their memory to spare.

    Raises:
        ConfigError: eight do not.
    """
    for n in COUNTS:
        if model.n_bytes <= 0.8 * n * chip.memory:
            return n
    raise ConfigError(f"{model.n_bytes / 1e9:.0f} GB of weights do not fit into eight chips")


def binding(roofline: Roofline, work: Work) -> str:
    """What most of a step's time goes to."""
    chip, model = roofline.chip, roofline.model
    parts = {
        "reading weights": 2 * model.n_read(work.n_tokens) / chip.bandwidth,
        "products": 2 * model.n_active * work.n_tokens / chip.flops,
    }
    smaller = min(parts, key=lambda name: parts[name])
    del parts[smaller]  # they overlap
    n = roofline.n_chips
    parts = {name: seconds / n for name, seconds in parts.items()}
    parts |= {
        "attention": roofline.attention(work),
        "sums over chips": roofline.exchange(work.n_tokens),
    }
    return max(parts, key=lambda name: parts[name])


def seconds(roofline: Roofline, work: Work, kernel: schedules.Kernel) -> float:
    """The roofline's, with an attention that takes as long as its kernel's schedule."""
    return roofline(work) + roofline.attention(work) * (1 / kernel.share - 1)


def row(chip: str, name: str, args: argparse.Namespace) -> Row:
    about, model = CHIPS[chip], MODELS[name]
    n_chips = n_chips_for(about, model)
    n_devices = n_chips * DEVICES.get(chip, 1)
    few, more = (compiled(model, chip, n_devices, n_layers) for n_layers in LAYERS)
    step = more.extrapolated(few, model.n_layers)
    kernels = schedules.attention(
        chip, model.head_dim, model.n_heads // model.n_kv_heads,
        max(model.n_kv_heads // n_devices, 1), step.n_tokens,
    )  # fmt: skip
    free = about.memory * n_chips / n_devices - step.weights - step.temporaries
    n_tokens = max(int(free * step.memory_fraction * n_devices / model.cell), 0)
    batch = min(args.sequences, n_tokens // args.context)
    roofline, context = Roofline(about, model, n_chips), args.context
    decoding = Work(batch, batch * context, batch * context)
    n_prompts = max(step.n_tokens // context, 1)
    size = min(step.n_tokens, context)
    prefilling = Work(n_prompts * size, n_prompts * size, n_prompts * size * (size + 1) / 2)
    prefill = prefilling.n_tokens / seconds(roofline, prefilling, kernels.chunk)
    return Row(
        chip, n_chips, name, n_tokens, n_tokens // context, step.temporaries / 1e6,
        step.n_tokens, step.flops / 1e9, step.n_bytes / 1e9,
        *kernels.decode, *kernels.chunk, kernels.source,
        batch, batch / seconds(roofline, decoding, kernels.decode) if batch else 0.0,
        binding(roofline, decoding) if batch else "memory",
        prefill, binding(roofline, prefilling), measured(chip, name), about.source,
    )  # fmt: skip


def measured(chip: str, model: str, folder: Path = RESULTS) -> str:
    """What was measured there: files of results that name a chip and a model say so."""
    for path in sorted(folder.glob("gpu_check-*.json")):
        told = json.loads(path.read_text())
        if told.get("chip") == chip and told.get("model") == model:
            return f"{told['decode_tokens_per_second']:.0f} ({path.name})"
    return "not run"


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Of what compiles; says of the rest why not."""
    from jax.errors import JaxRuntimeError

    for chip in args.chips.split(","):
        for model in args.models.split(","):
            try:
                yield row(chip, model, args)
            except (ConfigError, CompileError, FileNotFoundError, JaxRuntimeError) as error:
                print(f"  {chip} {model}: {str(error).splitlines()[0]}", file=sys.stderr)


def text(table: list[Row]) -> str:
    """As Markdown."""
    return f"# Chips and models\n\n{kept.markdown([line._asdict() for line in table])}\n\n{NOTE}"


def draw(table: list[Row], path: Path) -> None:
    """Predicted decode and prefill, a bar a chip."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chips = list(dict.fromkeys(line.chip for line in table))
    models = list(dict.fromkeys(line.model for line in table))
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4))
    for panel, what in zip(panels, ("decode", "prefill"), strict=True):
        for i, chip in enumerate(chips):
            lines = {line.model: line for line in table if line.chip == chip}
            heights = [
                getattr(lines[m], what) / lines[m].n_chips if m in lines else 0.0 for m in models
            ]
            width = 0.8 / len(chips)
            panel.bar([k + i * width for k in range(len(models))], heights, width, label=chip)
        panel.set_xticks([k + 0.4 for k in range(len(models))], models, rotation=20)
        panel.set_ylabel(f"{what}: tokens/s a chip, predicted")
        panel.set_yscale("log")
    panels[1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--chips", default=",".join(CHIPS), help="comma-separated")
    add("--models", default=",".join(MODELS), help="comma-separated")
    add("--context", type=int, default=1024, help="tokens of a sequence")
    add("--sequences", type=int, default=256, help="most that decode at once")
    add("--save", action="store_true", help=f"keep table, CSV, JSON and picture in {RESULTS}")
    args = parser.parse_args()
    os.environ |= ENVIRONMENT
    import jax

    jax.config.update("jax_platforms", "cpu")
    table: list[Row] = []
    for line in rows(args):
        table.append(line)
        print(kept.markdown([line._asdict()]).splitlines()[-1], file=sys.stderr, flush=True)
        if args.save:  # so far: all of them take an hour
            kept.save(RESULTS, "chips", [line._asdict() for line in table], text(table))
            draw(table, RESULTS / "chips.png")
    print(text(table))


if __name__ == "__main__":
    main()
