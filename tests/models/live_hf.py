"""The engine against transformers, live, on random tiny Llamas. Run by .ci/run, not by the suite.

python -m pytest tests/models/live_hf.py                  (needs torch)
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax.checkpoints.directory import read_config
from fastgen_jax.checkpoints.loading import flat_params, load_model
from fastgen_jax.checkpoints.tensor_files import read_json
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.engine import Engine
from fastgen_jax.engine.types import Request
from fastgen_jax.models import families
from fastgen_jax.models.families.wrappers import text_config
from fastgen_jax.models.layers import Policy
from fastgen_jax.models.sharding import make_mesh
from fastgen_jax.sampling_params import SamplingParams
from tests.models.test_golden import TOLERANCE, log_softmax
from tests.tiny import Naive, one_program, run, tokens

pytest.importorskip("torch")

import torch

from tests.golden import make_golden

N_NEW = 24
N_STEPS = 64
UNKNOWN = set(make_golden.RENAMED)  # to transformers
FAMILIES = sorted(set(make_golden.FAMILIES) - UNKNOWN)
STORED = sorted(set(make_golden.CHECKPOINTS) - UNKNOWN)
ROPES = [
    {},
    make_golden.rope("default", rope_theta=500000.0),
    make_golden.rope("linear", factor=2.5),
    make_golden.rope("dynamic", factor=4.0),
    make_golden.rope("yarn", **make_golden.YARN),
    make_golden.rope("llama3", **make_golden.LLAMA3),
]


def random_fields(rng: np.random.Generator) -> dict:
    """A Llama configuration as checkpoints could have it."""
    n_kv_heads, group = int(rng.choice([1, 2, 3])), int(rng.choice([1, 2, 4]))
    rope = ROPES[rng.integers(len(ROPES))]
    is_dynamic = rope.get("rope_parameters", {}).get("rope_type") == "dynamic"
    return rope | {
        "vocab_size": int(rng.integers(40, 300)),
        "hidden_size": int(rng.choice([24, 48])),
        "intermediate_size": int(rng.choice([40, 64])),
        "num_hidden_layers": int(rng.integers(1, 4)),
        "num_attention_heads": n_kv_heads * group,
        "num_key_value_heads": n_kv_heads,
        "head_dim": int(rng.choice([8, 16, 20])),
        "tie_word_embeddings": bool(rng.integers(2)),
        "attention_bias": bool(rng.integers(2)),
        "mlp_bias": bool(rng.integers(2)),
        "rms_norm_eps": float(rng.choice([1e-6, 1e-5])),
        "max_position_embeddings": 64 if is_dynamic else 256,
    }


@pytest.mark.parametrize("seed", range(12))
def test_random_llama_gives_the_tokens_and_logprobs_of_transformers(seed, tmp_path):
    rng = np.random.default_rng(seed)
    make_golden.random_model(seed, **random_fields(rng)).save_pretrained(tmp_path)
    theirs = make_golden.load(tmp_path)
    prompts, logits, greedy = zip(
        *[
            make_golden.clear_prompt(theirs, int(n), N_NEW, seed)
            for n in rng.integers(1, 120, size=5)
        ],
        strict=True,
    )
    budget = int(rng.choice([4, 12, 40]))
    engine = Engine(
        EngineConfig(
            model=str(tmp_path),
            dtype="float32",
            max_model_len=160,
            num_kv_blocks=120,
            block_size=int(rng.choice([4, 8, 32])),
            max_num_batched_tokens=budget,
            max_num_seqs=min(budget, 4),
        )
    )
    params = SamplingParams(max_tokens=N_NEW, temperature=0.0, ignore_eos=True, logprobs=5)
    outputs = run(engine, [Request(prompt, params) for prompt in prompts])
    naive = Naive(engine, length=160)
    for prompt, expected, chosen, events in zip(prompts, logits, greedy, outputs, strict=True):
        assert tokens(events) == chosen
        known = [*prompt, *chosen[:-1]]
        assert np.abs(naive.logits(known) - expected).max() <= TOLERANCE
        for event, row in zip(events, log_softmax(expected[-N_NEW:]), strict=True):
            assert abs(event.logprobs.logprob - row[event.token_id]) <= TOLERANCE
            ours = [logprob for _, logprob in event.logprobs.top]
            assert np.abs(ours - np.sort(row)[: -len(ours) - 1 : -1]).max() <= TOLERANCE


def of_each_family(names: list[str]) -> list:
    """One of each module; its others, the same program with other numbers, only by hand: -m ""."""
    first: dict[str, str] = {}
    for name in names:
        model_type = text_config(read_json(make_golden.HERE / name / "config.json"))["model_type"]
        first.setdefault(families.FAMILIES[model_type], name)
    return some_of(names, list(first.values()))


def some_of(names: list[str], chosen: list[str]) -> list:
    """The names; those that are not chosen run only by hand."""
    exhaustive = pytest.mark.exhaustive
    return [n if n in chosen else pytest.param(n, marks=exhaustive) for n in names]


@pytest.mark.parametrize("name", of_each_family(FAMILIES))
def test_family_gives_the_tokens_of_transformers_while_sequences_are_preempted(name):
    """64 greedy tokens each, for prompts of 1 to 190 tokens in one batch that does not fit, unless
    every layer has a window.
    """
    folder = make_golden.HERE / name
    theirs = make_golden.load(folder)
    lengths = [190, 1, 40]  # all are admitted, and then grow
    if name == "phi3_long":  # transformers takes the short factors for what fits the short context
        lengths = [190, 65]
    prompts, _, greedy = zip(
        *[make_golden.clear_prompt(theirs, n, N_STEPS, seed) for seed, n in enumerate(lengths)],
        strict=True,
    )
    engine = one_program(
        EngineConfig(
            model=str(folder),
            dtype="float32",
            max_model_len=256,
            num_kv_blocks=38,
            block_size=8,
            max_num_batched_tokens=37,
            max_num_seqs=5,
        )
    )
    params = SamplingParams(max_tokens=N_STEPS, temperature=0.0, ignore_eos=True)
    outputs = run(engine, [Request(prompt, params) for prompt in prompts])
    assert [tokens(events) for events in outputs] == list(greedy)
    assert engine.stats().n_preemptions > 0 or engine.model_config.longest_window


@pytest.mark.parametrize("name", STORED)
def test_stored_goldens_are_what_transformers_computes_today(name):
    with np.load(make_golden.HERE / name / "golden.npz", allow_pickle=False) as golden:
        prompt, logits, greedy = (golden[k] for k in ("prompt_ids", "logits", "greedy_ids"))
    model = make_golden.load(make_golden.HERE / name)
    again, tokens_again = make_golden.run(model, prompt.tolist(), len(greedy))
    assert tokens_again == greedy.tolist()
    assert np.abs(again - logits).max() <= 1e-4


def become_gradient(model, known: np.ndarray, weights: np.ndarray) -> None:
    """Makes each parameter the derivative by it of the sum of weighted logits; what transformers
    does not train becomes NaN.
    """
    model.get_input_embeddings().padding_idx = None  # its row would have none
    logits = model(torch.from_numpy(known)[None], use_cache=False).logits[0]
    (logits * torch.from_numpy(weights)).sum().backward()
    for parameter in model.parameters():
        gradient = parameter.grad
        parameter.data = torch.zeros_like(parameter) if gradient is None else gradient
    for buffer in model.buffers():
        buffer.fill_(torch.nan if buffer.is_floating_point() else 0)


# One of each mechanism of attention, norms and experts; all others by hand: -m "".
DIFFERENTIATED = [
    "apertus",
    "bloom",
    "deepseek_v3",
    "gemma2",
    "gpt_oss",
    "gptj",
    "mha",
    "qwen2_moe",
]


@pytest.mark.parametrize("name", some_of(["gqa", *FAMILIES], DIFFERENTIATED))
def test_gradients_are_those_of_transformers(name, tmp_path):
    """Theirs reach our parameters as weights do: saved, and loaded."""
    folder = make_golden.HERE / name
    config = read_config(folder)
    with np.load(folder / "golden.npz", allow_pickle=False) as golden:
        known = golden["prompt_ids"][:20].astype(np.int32)
    size = len(known), config.vocab_size
    weights = np.random.default_rng(0).normal(size=size).astype(np.float32)
    theirs = make_golden.load(folder)
    become_gradient(theirs, known.astype(np.int64), weights)
    theirs.save_pretrained(tmp_path)
    wanted = flat_params(load_model(tmp_path, config, Policy(), make_mesh(1)))
    model = load_model(folder, config, Policy(), make_mesh(1))
    found = flat_params(jax.jit(jax.grad(lambda m: jnp.sum(m(known) * weights)))(model))
    assert found.keys() == wanted.keys()
    pairs = [(path, np.asarray(found[path][...]), np.asarray(wanted[path][...])) for path in wanted]
    largest = max(np.nan_to_num(np.abs(theirs)).max() for _, _, theirs in pairs)
    assert sum(np.isnan(theirs).any() for _, _, theirs in pairs) <= config.n_layers
    for path, ours, theirs in pairs:
        is_trained = ~np.isnan(theirs)
        assert np.abs(ours - theirs)[is_trained].max(initial=0) <= 2e-5 * largest, path
