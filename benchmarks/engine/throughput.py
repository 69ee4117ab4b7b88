"""Offline throughput of the engine, and its host time per step. (Others beside: benchmarks.peers.)

    python -m benchmarks.engine.throughput
    python -m benchmarks.engine.throughput --host-time

Greedy, end-of-sequence ignored; lengths are normal with a standard deviation of 0.3 of the mean
(--new-std 0: all outputs equally long). The best repetition counts, as other work on the machine
only ever slows. Every repetition has new prompts, so that no prefix cache helps.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.engine import Engine
from fastgen_jax.engine.types import Request
from fastgen_jax.sampling_params import SamplingParams

SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 2048,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
TINY = SHAPE | {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "vocab_size": 256,
}


class Workload(NamedTuple):
    """Prompts as token ids, and how many tokens to generate for each."""

    prompts: list[list[int]]
    n_new: list[int]

    @property
    def n_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def n_new_tokens(self) -> int:
        return sum(self.n_new)

    @property
    def n_tokens(self) -> int:
        return self.n_prompt_tokens + self.n_new_tokens


def make_workload(name: str, seed: int, new_std: float, vocab_size: int = 32000) -> Workload:
    """`32x256+64`: 32 prompts of about 256 tokens, 64 new each. The seed changes tokens only."""
    count, lengths = name.split("x")
    n_requests, prompt_mean, new_mean = int(count), *map(int, lengths.split("+"))
    rng = np.random.default_rng(0)
    prompt_lengths = normal_lengths(rng, prompt_mean, 0.3, n_requests)
    n_new = normal_lengths(rng, new_mean, new_std, n_requests)
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, vocab_size, n).tolist() for n in prompt_lengths]
    return Workload(prompts, n_new)


def normal_lengths(rng: np.random.Generator, mean: int, std: float, n: int) -> list[int]:
    drawn = rng.normal(mean, std * mean, n)
    return np.clip(np.round(drawn), max(mean // 8, 1), 3 * mean).astype(int).tolist()


def write_checkpoint(path: Path, shape: dict[str, Any]) -> None:
    """A Hugging Face Llama with random weights in bfloat16."""
    rng = np.random.default_rng(0)
    size, ffn = shape["hidden_size"], shape["intermediate_size"]
    kv_size = size // shape["num_attention_heads"] * shape["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": (size, size),
        "self_attn.k_proj": (kv_size, size),
        "self_attn.v_proj": (kv_size, size),
        "self_attn.o_proj": (size, size),
        "mlp.gate_proj": (ffn, size),
        "mlp.up_proj": (ffn, size),
        "mlp.down_proj": (size, ffn),
        "input_layernorm": (size,),
        "post_attention_layernorm": (size,),
    }
    tensors = {"model.norm": (size,)}
    tensors |= dict.fromkeys(("model.embed_tokens", "lm_head"), (shape["vocab_size"], size))
    for layer in range(shape["num_hidden_layers"]):
        tensors |= {f"model.layers.{layer}.{name}": dims for name, dims in shapes.items()}
    weights = {
        f"{name}.weight": np.ones(dims, np.float32)
        if len(dims) == 1
        else rng.standard_normal(dims, np.float32) * 0.02
        for name, dims in tensors.items()
    }
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(shape))
    bf16 = {name: weight.astype(ml_dtypes.bfloat16) for name, weight in weights.items()}
    save_file(bf16, path / "model.safetensors", metadata={"format": "pt"})


class Ours:
    """The engine, driven without a thread; keeps what each step took on the host, by phase."""

    def __init__(self, model: Path, dtype: str, **options: Any):
        options = {"memory_fraction": 0.1, "max_model_len": 4096} | options
        self.engine = Engine(EngineConfig(model=str(model), dtype=dtype, **options))
        self.steps: list[dict[str, float]] = []

    def run(self, workload: Workload) -> float:
        """Seconds until every token is there."""
        start = time.perf_counter()
        tokens = self.generate(workload)
        seconds = time.perf_counter() - start
        n_tokens = sum(map(len, tokens))
        assert n_tokens == workload.n_new_tokens, (n_tokens, workload.n_new_tokens)
        return seconds

    def generate(self, workload: Workload) -> list[list[int]]:
        """Each prompt's new tokens."""
        requests = [
            Request(prompt, SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True))
            for prompt, n in zip(workload.prompts, workload.n_new, strict=True)
        ]
        ids = self.engine.submit_all(requests)
        tokens: dict[int, list[int]] = {request_id: [] for request_id in ids}
        while self.engine.has_work:
            before = dict(self.engine.timings)
            for output in self.engine.step():
                if output.token_id is not None:
                    tokens[output.request_id].append(output.token_id)
            self.steps.append({k: v - before[k] for k, v in self.engine.timings.items()})
        return list(tokens.values())

    def print_phases(self, title: str) -> None:
        """Milliseconds per step in the engine's thread; `wait` is the device's time left to it."""
        print(f"host time per step in ms, {title}, {len(self.steps)} steps:")
        for phase in self.steps[0]:
            self._print_row(phase, [step[phase] for step in self.steps])
        busy = [step["plan"] + step["pack"] + step["commit"] for step in self.steps]
        self._print_row("plan + pack + commit", busy)

    def _print_row(self, name: str, seconds: list[float]) -> None:
        ms = 1e3 * np.array(seconds)
        p10, median, p90 = np.quantile(ms, [0.1, 0.5, 0.9])
        print(f"  {name:22} p10 {p10:8.3f}  median {median:8.3f}  p90 {p90:8.3f}")


def throughput(args: argparse.Namespace, folder: Path) -> None:
    if not args.model:
        write_checkpoint(folder, SHAPE)
    columns = f"{'workload':12} {'dtype':9} {'new tok/s':>9} {'all tok/s':>9} {'seconds':>8}"
    rows = [columns]
    for dtype in args.dtype:
        ours = Ours(folder, dtype, **args.engine)
        for name in args.workload:
            workloads = [
                make_workload(name, seed + 1, args.new_std) for seed in range(args.repeats)
            ]
            seconds, work = min(map(ours.run, workloads)), workloads[0]
            new, all_ = work.n_new_tokens / seconds, work.n_tokens / seconds
            rows.append(f"{name:12} {dtype:9} {new:9.1f} {all_:9.1f} {seconds:8.2f}")
        ours.print_phases(dtype)
    print("\n" + "\n".join(rows))


def host_time(args: argparse.Namespace, folder: Path) -> None:
    """Many sequences decode at once on a model so small that the host is what remains."""
    n_seqs = args.host_sequences
    write_checkpoint(folder, TINY)
    sizes = {"max_num_seqs": n_seqs, "max_num_batched_tokens": 2 * n_seqs, "max_model_len": 512}
    ours = Ours(folder, "float32", **sizes, **args.engine)
    ours.run(make_workload(f"{n_seqs}x64+128", 1, 0.0, TINY["vocab_size"]))
    ours.steps = ours.steps[len(ours.steps) // 2 :]  # all decode
    ours.print_phases(f"{n_seqs} running sequences, {os.cpu_count()} cores")


@contextmanager
def checkpoint_folder(given: Path | None) -> Iterator[Path]:
    if given:
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "model"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    add("--workload", nargs="+", default=["32x256+64", "12x1024+64"], help="REQUESTSxPROMPT+NEW")
    add("--new-std", type=float, default=0.3, help="of output lengths, as a share of their mean")
    add("--repeats", type=int, default=3)
    add("--model", type=Path, help="a Llama checkpoint to measure instead of the random one")
    add("--engine", type=json.loads, default={}, help="EngineConfig options, in JSON")
    add("--host-time", action="store_true", help="only the host time per step")
    add("--host-sequences", type=int, default=256)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with checkpoint_folder(args.model) as folder:
        if args.host_time:
            host_time(args, folder)
        else:
            throughput(args, folder)


if __name__ == "__main__":
    main()
