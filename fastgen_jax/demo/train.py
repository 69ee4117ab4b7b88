"""Trains the demo checkpoint: `python -m fastgen_jax.demo.train`, under an hour on two cores, the same files every time.

Short texts full of codes come first, because copying a code is learned there within minutes; then the texts grow to the
full context. The state is saved after every hundred steps, and the same command continues from it.
"""

import argparse
import logging
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.lax import optimization_barrier as barrier
from jaxtyping import Array, Float, Int
from tokenizers import Tokenizer

from fastgen_jax.demo import corpus, vocabulary
from fastgen_jax.layers import Attend, Policy
from fastgen_jax.models import llama

log = logging.getLogger("demo")

HF_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": vocabulary.VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": vocabulary.BOS_ID,
    "eos_token_id": [vocabulary.EOS_ID, vocabulary.END_ID],
    "dtype": "bfloat16",
}
QUERY_CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of training: `n_steps` batches of `n_rows` rows, `length` tokens each."""

    n_steps: int
    n_rows: int
    length: int
    max_facts: int
    max_story: int  # tokens of story among which the facts stand
    begun: float = 0.2  # share of the recall that goes by begun sentences
    recall: float  # share of texts that ask for codes; the others are stories and small talk


STAGES = (
    Stage(n_steps=1500, n_rows=16, length=256, max_facts=10, max_story=0, recall=0.8),
    Stage(n_steps=1500, n_rows=8, length=512, max_facts=10, max_story=400, recall=0.7),
    Stage(n_steps=1000, n_rows=2, length=2048, max_facts=12, max_story=1800, recall=0.7),
)


class Batch(NamedTuple):
    """Texts packed into rows. Tokens of different texts have different segments and do not see each other."""

    tokens: Int[Array, "B L"]
    positions: Int[Array, "B L"]  # within the text
    segments: Int[Array, "B L"]
    weights: Float[Array, "B L"]  # of each token as the thing to predict; 0 for a text's first


def encode(tokenizer: Tokenizer, pieces: list[corpus.Piece]) -> tuple[list[int], list[float]]:
    """Token ids of a text and the weight of each."""
    ids, weights = [], []
    for piece in pieces:
        piece_ids = tokenizer.encode(piece.text, add_special_tokens=False).ids
        ids += piece_ids
        weights += [piece.weight] * len(piece_ids)
    return ids, weights


def sample_text(rng: random.Random, stage: Stage) -> list[corpus.Piece]:
    if rng.random() < stage.recall:
        n_facts = rng.randint(1, stage.max_facts)
        n_story = rng.randint(0, stage.max_story)
        return corpus.recall_text(
            rng,
            n_story_tokens=n_story,
            n_facts=n_facts,
            n_questions=rng.randint(1, n_facts),
            begun=stage.begun,
        )
    return corpus.small_talk_text(rng) if rng.random() < 0.15 else corpus.story_text(rng)


def sample_batch(tokenizer: Tokenizer, rng: random.Random, stage: Stage) -> Batch:
    """Rows filled with texts until the next does not fit."""
    batch = Batch(*(np.zeros((stage.n_rows, stage.length), t) for t in ("i4", "i4", "i4", "f4")))
    for row in range(stage.n_rows):
        start, segment = 0, 1
        while True:
            ids, weights = encode(tokenizer, sample_text(rng, stage))
            end = start + len(ids)
            if end > stage.length:
                if start == 0:
                    continue
                break
            batch.tokens[row, start:end] = ids
            batch.positions[row, start:end] = np.arange(len(ids))
            batch.segments[row, start:end] = segment
            batch.weights[row, start:end] = weights
            start, segment = end, segment + 1
    return batch


@jax.custom_vjp
def attention(
    q: Float[Array, "B K Q H"], k: Float[Array, "B K L H"], v: Float[Array, "B K L H"], bias
) -> Float[Array, "B K Q H"]:
    """softmax(q k + bias) v. Barriers keep XLA:CPU from fusing products with what surrounds them (5 times as fast)."""
    return _attention_forward(q, k, v, bias)[0]


def _attention_forward(q, k, v, bias):
    scores = barrier(jnp.einsum("bkqh,bksh->bkqs", q, k))
    shape = scores.shape
    scores = scores.reshape(*shape[:2], -1, *bias.shape[1:]) + bias[:, None, None]
    weights = barrier(jax.nn.softmax(scores, axis=-1)).reshape(shape)
    out = barrier(jnp.einsum("bkqs,bksh->bkqh", weights, v))
    return out, (q, k, v, weights, out)


def _attention_backward(saved, d_out):
    q, k, v, weights, out = saved
    d_v = barrier(jnp.einsum("bkqs,bkqh->bkhs", weights, d_out)).swapaxes(2, 3)
    d_weights = barrier(jnp.einsum("bkqh,bksh->bkqs", d_out, v))
    d_scores = barrier(weights * (d_weights - jnp.sum(d_out * out, -1, keepdims=True)))
    d_q = barrier(jnp.einsum("bkqs,bksh->bkqh", d_scores, k))
    d_k = barrier(jnp.einsum("bkqs,bkqh->bkhs", d_scores, q)).swapaxes(2, 3)
    return d_q, d_k, d_v, None


attention.defvjp(_attention_forward, _attention_backward)


def causal_attention(segments: Int[Array, "B L"]) -> Attend:
    """Attention of each token to its own text so far, over chunks of queries: the training twin of the paged one."""
    n_rows, length = segments.shape
    starts = range(0, length, QUERY_CHUNK)
    biases = [_mask_bias(segments, start, min(start + QUERY_CHUNK, length)) for start in starts]

    def attend(q, k, v, cache, *, spec):
        n_kv, group, size = k.shape[1], q.shape[1] // k.shape[1], q.shape[2]
        q = (q * spec.scale).reshape(n_rows, length, n_kv, group, size).transpose(0, 2, 3, 1, 4)
        k, v = (x.reshape(n_rows, length, n_kv, size).swapaxes(1, 2) for x in (k, v))
        q, k, v = barrier((q, k, v))
        outs = []
        for start, bias in zip(starts, biases, strict=True):
            n, end = bias.shape[1:]
            chunk = q[:, :, :, start:end].reshape(n_rows, n_kv, group * n, size)
            out = attention(chunk, k[:, :, :end], v[:, :, :end], bias)
            outs.append(out.reshape(n_rows, n_kv, group, n, size))
        out = jnp.concatenate(outs, axis=3).transpose(0, 3, 1, 2, 4)
        return barrier(out.reshape(n_rows * length, n_kv * group, size)), cache

    return attend


def _mask_bias(segments: Int[Array, "B L"], start: int, end: int) -> Float[Array, "B Q L"]:
    """0 where query start + i may see key j < end, else a large negative number."""
    sees = segments[:, start:end, None] == segments[:, None, :end]
    sees &= jnp.arange(start, end)[None, :, None] >= jnp.arange(end)[None, None]
    return barrier(jnp.where(sees, 0.0, -1e9))


def logits_of(model: llama.Model, batch: Batch) -> Float[Array, "B L V"]:
    n_layers = model.config.n_layers
    attend = causal_attention(batch.segments)
    hidden, _ = model(
        batch.tokens.reshape(-1), batch.positions.reshape(-1), (None,) * n_layers, attend
    )
    return model.unembed(hidden).reshape(*batch.tokens.shape, -1)


def loss_of(params, graph, batch: Batch):
    """Weighted mean cross-entropy, and the share of right argmaxes among the answers' tokens."""
    logits = logits_of(nnx.merge(graph, params), batch)[:, :-1]
    targets, weights = batch.tokens[:, 1:], batch.weights[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    is_answer = weights == corpus.FIRST
    n_right = jnp.sum(is_answer & (jnp.argmax(logits, -1) == targets))
    answer_loss = jnp.sum(losses * is_answer) / jnp.maximum(jnp.sum(is_answer), 1)
    spoken = weights == corpus.SPOKEN
    spoken_loss = jnp.sum(losses * spoken) / jnp.maximum(jnp.sum(spoken), 1)
    return jnp.sum(losses * weights) / jnp.sum(weights), (
        n_right / jnp.maximum(jnp.sum(is_answer), 1),
        answer_loss,
        spoken_loss,
    )


@partial(jax.jit, static_argnames=("graph", "optimizer"), donate_argnames=("params", "state"))
def train_step(params, state, batch: Batch, *, graph, optimizer: optax.GradientTransformation):
    (loss, right), grads = jax.value_and_grad(loss_of, has_aux=True)(params, graph, batch)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss, right
