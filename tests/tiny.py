"""Tiny models and their naive twins, for tests of the engine."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastgen_jax.engine import startup
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.engine import Engine
from fastgen_jax.engine.types import Output, Request
from fastgen_jax.sampling_params import SamplingParams

CONFIG = {
    "model_type": "llama",
    "vocab_size": 62,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "eos_token_id": 7,
}
OPTIONS = {
    "load_format": "dummy",
    "max_model_len": 96,
    "block_size": 8,
    "num_kv_blocks": 128,
    "max_num_batched_tokens": 32,
    "max_num_seqs": 8,
}


def write_config(directory: Path, **changes) -> str:
    directory.mkdir(exist_ok=True, parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))
    return str(directory)


def make_engine(directory: Path, make: Callable[[EngineConfig], Engine] = Engine, **options):
    """An engine with random weights, the same for the same seed whatever the other options."""
    return make(EngineConfig(model=write_config(directory), **OPTIONS | options))


def one_program(config: EngineConfig, **given) -> Engine:
    """An engine that pads every batch to its token budget, and so compiles one step, not four."""
    cpu = dataclasses.replace(startup.BACKENDS["cpu"], smallest_batch=2**31)
    with mock.patch.dict(startup.BACKENDS, cpu=cpu):
        engine = Engine(config, **given)
    assert len(engine._runner.shapes) == 1
    return engine


def run(engine: Engine, requests: list[Request]) -> list[list[Output]]:
    """Outputs of each request, in order, stepping the engine until it has no work."""
    ids = [engine.submit(request) for request in requests]
    outputs: dict[int, list[Output]] = {i: [] for i in ids}
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
    return [outputs[i] for i in ids]


def tokens(outputs: list[Output]) -> list[int]:
    return [o.token_id for o in outputs if o.token_id is not None]


def assert_idle(engine: Engine) -> None:
    """No request, row, block or place in the queue is held."""
    pool, admission = engine._placement.blocks.pool, engine._admission
    pool.check()
    assert pool.n_free == pool.n_usable
    assert len(engine._placement.tables.free_rows) == engine.config.max_num_seqs
    assert (admission.n_open, admission.n_queued_tokens) == (0, 0)
    assert engine._lives.is_empty


def random_requests(draw: int, count: int, longest: int = 60, **params) -> list[Request]:
    """Requests of random prompts; prompt and output stay under 96 tokens."""
    rng = np.random.default_rng(draw)
    params = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True} | params
    return [
        Request(rng.integers(0, 62, rng.integers(1, longest)).tolist(), SamplingParams(**params))
        for _ in range(count)
    ]


def dense_attend(q, k, v, cache, *, spec, alibi_slopes=None, sinks=None):
    """Causal attention of one sequence over itself, with no cache: "T N H"."""
    group = q.shape[1] // k.shape[1]
    k, v = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)
    scores = jnp.einsum("tnh,snh->nts", q, k) * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    token = jnp.arange(len(q), dtype=jnp.int32)
    distance = token[None] - token[:, None]  # of the key from the query
    if alibi_slopes is not None:
        scores = scores + alibi_slopes[:, None, None] * distance[None].astype(jnp.float32)
    mask = distance <= 0
    if spec.window is not None:
        mask &= distance > -spec.window
    scores = jnp.where(mask[None], scores, -jnp.inf)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:2], 1))
        scores = jnp.concatenate([scores, sink], axis=2)
    weights = jax.nn.softmax(scores, axis=-1)[:, :, : len(q)]
    return jnp.einsum("nts,snh->tnh", weights, v), cache


LARGEST = {"int8": 127, "float8_e4m3fn": 448}  # cells of a quantised KV cache


def rounded(x, dtype: str):
    """Keys or values "T K H" as a quantised cache gives them back."""
    top = jnp.abs(x).max(axis=-1, keepdims=True)
    scale = jnp.where(top == 0, 1, top / LARGEST[dtype])
    cells = jnp.round(x / scale) if dtype == "int8" else (x / scale).astype(dtype).astype(x.dtype)
    return cells * scale


class Naive:
    """The slow obvious twin: for each token the whole sequence again, densely, alone. Keys and
    values are rounded as the engine's cache does it.
    """

    def __init__(self, engine: Engine, length: int = 96):
        program, dtype = engine._runner.program, engine.config.cache_dtype
        n_layers = engine.model_config.n_layers
        self._prepare(program.model, engine._runner.leaves, n_layers, length, dtype)

    @classmethod
    def of_model(cls, model: nnx.Module, n_layers: int, length: int) -> "Naive":
        """Without an engine."""
        graphdef, params = nnx.split(model)
        naive = cls.__new__(cls)
        naive._prepare(lambda leaves: nnx.merge(graphdef, leaves), params, n_layers, length)
        return naive

    def _prepare(
        self, make_model, leaves, n_layers: int, length: int, cache_dtype: str = "float32"
    ) -> None:
        self.leaves, self.length = leaves, length

        def attend(q, k, v, cache, **options):
            if cache_dtype in LARGEST:
                k, v = rounded(k, cache_dtype), rounded(v, cache_dtype)
            return dense_attend(q, k, v, cache, **options)

        def hidden(leaves, token_ids):
            positions = jnp.arange(length, dtype=jnp.int32)
            model, caches = make_model(leaves), (None,) * n_layers
            return model.hidden_states(token_ids, positions, caches, attend)[0]

        def logits(leaves, token_ids):
            return make_model(leaves).unembed(hidden(leaves, token_ids))

        self._hidden, self._logits = jax.jit(hidden), jax.jit(logits)

    def logits(self, token_ids: list[int]) -> np.ndarray:
        return self._of_each_token(self._logits, token_ids)

    def hidden(self, token_ids: list[int]) -> np.ndarray:
        """The final hidden states."""
        return self._of_each_token(self._hidden, token_ids)

    def _of_each_token(self, function, token_ids: list[int]) -> np.ndarray:
        padded = np.zeros(self.length, np.int32)
        padded[: len(token_ids)] = token_ids
        return np.asarray(function(self.leaves, padded))[: len(token_ids)]

    def greedy(self, prompt: list[int], n: int) -> list[int]:
        known = list(prompt)
        for _ in range(n):
            known.append(int(self.logits(known)[-1].argmax()))
        return known[len(prompt) :]
