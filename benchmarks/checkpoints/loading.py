"""Time and memory of loading a model of TinyLlama's shape (1.1 B random bfloat16 weights).

    python -m benchmarks.checkpoints.loading                  # Hugging Face files, three shards
    python -m benchmarks.checkpoints.loading --dtype float32  # cast on load, as on CPU by default
    python -m benchmarks.checkpoints.loading --converted      # also what python -m convert makes
    python -m benchmarks.checkpoints.loading --model DIR      # your own

Each load is a process of its own. `cold` drops the files from the page cache before it, `warm` has
just read them. Host memory is the peak of anonymous memory (RssAnon, sampled) above that of the
process before the load, minus the arrays of the model, which on a CPU device lie in host memory.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

N_LAYERS = 22
HIDDEN, FFN, VOCAB, HEADS, KV_HEADS = 2048, 5632, 32000, 32, 4
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "vocab_size": VOCAB,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LAYER = {
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "self_attn.v_proj": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}
GIB = 2**30


def make_checkpoint(directory: Path, n_shards: int = 3) -> None:
    """Random weights under Hugging Face's names."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for i in range(N_LAYERS):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in LAYER.items()}
    rng = np.random.default_rng(0)
    names = list(shapes)
    weight_map = {}
    for i in range(n_shards):
        file = f"model-{i + 1:05}-of-{n_shards:05}.safetensors"
        mine = names[i::n_shards]
        save_file({name: _random(rng, shapes[name]) for name in mine}, directory / file)
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(CONFIG))


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return (rng.standard_normal(shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16)


def forget(directory: Path) -> None:
    """Drops a directory's files from the page cache."""
    for path in filter(Path.is_file, directory.rglob("*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


class PeakMemory:
    """The most anonymous memory of this process while the block runs, sampled each 2 ms."""

    def __enter__(self):
        self.before = self.peak = anonymous_bytes()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._is_over.wait(0.002):
            self.peak = max(self.peak, anonymous_bytes())

    def __exit__(self, *_):
        self._is_over.set()
        self._thread.join()


def load(directory: Path, dtype: str) -> None:
    """Loads once in this process and prints what that took, as JSON."""
    import jax

    from fastgen_jax.checkpoints import loading
    from fastgen_jax.checkpoints.directory import read_config
    from fastgen_jax.models.layers import Policy
    from fastgen_jax.models.sharding import make_mesh

    config, mesh = read_config(directory), make_mesh(1)
    with PeakMemory() as memory:
        started = time.perf_counter()
        model = loading.load_model(directory, config, Policy(dtype, "float32"), mesh)
        seconds = time.perf_counter() - started
    sizes = [param[...].nbytes for param in loading.flat_params(model).values()]
    on_host = sum(sizes) if jax.default_backend() == "cpu" else 0
    extra = memory.peak - memory.before - on_host
    print(json.dumps({"seconds": seconds, "extra": extra, "largest": max(sizes)}))


def measure(label: str, directory: Path, dtype: str) -> None:
    """Prints a cold and a warm load, each in a process of its own."""
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    for heat in ("cold", "warm"):
        if heat == "cold":
            forget(directory)
        command = [sys.executable, "-m", "benchmarks.checkpoints.loading"]
        command += ["--model", str(directory), "--dtype", dtype, "--once"]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        result = json.loads(out)
        print(
            f"{label:10} {heat:5} {result['seconds']:6.2f} s {size / result['seconds'] / 1e9:6.2f}"
            f" GB/s   host memory {result['extra'] / GIB:5.2f} GiB beside the model"
            f" (largest parameter {result['largest'] / GIB:.2f} GiB)",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, help="a directory (default: made at random)")
    parser.add_argument("--dtype", default="bfloat16", help="of the loaded weights")
    parser.add_argument("--converted", action="store_true", help="also load a converted copy")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        load(args.model, args.dtype)
        return
    with tempfile.TemporaryDirectory() as folder:
        directory = args.model or Path(folder)
        if args.model is None:
            make_checkpoint(directory)
        measure("safetensors", directory, args.dtype)
        if args.converted:
            converted = Path(folder) / "converted"
            command = [sys.executable, "-m", "convert", str(directory), str(converted)]
            subprocess.run(command, check=True)
            measure("converted", converted, args.dtype)


if __name__ == "__main__":
    main()
