"""How far the logprobs that the engine reports are from the trainer's forward of the same weights.

python -m tests.golden.agreement [FAMILY ...]          (a table, by family and dtype)
"""

import argparse
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from fastgen_jax.checkpoints.tensor_files import read_json
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.engine import Engine
from fastgen_jax.engine.types import Request
from fastgen_jax.models import families
from fastgen_jax.models.families.wrappers import text_config
from fastgen_jax.sampling_params import SamplingParams
from tests.tiny import one_program, run, tokens

HERE = Path(__file__).parent
N_NEW = 24
OPTIONS = {"max_model_len": 256, "block_size": 8, "max_num_batched_tokens": 23, "max_num_seqs": 4}

forward = jax.jit(
    lambda model, *rows, **options: model(*rows, **options),
    static_argnames=("remat", "mesh", "attention"),
)


def family_of(name: str) -> str:
    """The module of a golden's family."""
    return families.FAMILIES[text_config(read_json(HERE / name / "config.json"))["model_type"]]


def first_of_each_family(names: list[str]) -> dict[str, str]:
    """Family -> golden."""
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(family_of(name), name)
    return found


def prompt_of(name: str) -> list[int]:
    with np.load(HERE / name / "golden.npz", allow_pickle=False) as golden:
        return golden["prompt_ids"].tolist()


def sample(engine: Engine, prompt: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and sampled tokens, and the logprobs that the engine reports of the sampled ones."""
    params = SamplingParams(max_tokens=N_NEW, temperature=1.0, seed=0, ignore_eos=True, logprobs=0)
    (outputs,) = run(engine, [Request(prompt, params)])
    logprobs = [output.logprobs.logprob for output in outputs if output.logprobs]
    return np.array([*prompt, *tokens(outputs)], np.int32), np.array(logprobs)


def logprobs_of(logits: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Of the text's last tokens, by the logits after each token."""
    logprobs = np.asarray(jax.nn.log_softmax(logits))[:-1]
    return logprobs[np.arange(len(text) - 1), text[1:]][-N_NEW:]


def model_of(engine: Engine) -> nnx.Module:
    return engine._runner.program.model(engine._runner.leaves)


def difference(name: str, dtype: str) -> float:
    """The largest one of any sampled token."""
    engine = one_program(
        EngineConfig(model=str(HERE / name), dtype=dtype, num_kv_blocks=64, **OPTIONS)
    )
    text, logprobs = sample(engine, prompt_of(name))
    found = logprobs_of(forward(model_of(engine), text), text)
    return float(np.abs(found - logprobs).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*")
    chosen = parser.parse_args().families
    names = sorted(path.parent.name for path in HERE.glob("*/golden.npz"))
    print(f"{'family':24}{'float32':>10}{'bfloat16':>10}")
    for family, name in first_of_each_family(names).items():
        if not chosen or family in chosen:
            row = [difference(name, dtype) for dtype in ("float32", "bfloat16")]
            print(f"{family:24}" + "".join(f"{value:10.1e}" for value in row), flush=True)


if __name__ == "__main__":
    main()
