"""Trains the demo checkpoint: `python -m fastgen_jax.demo.train`, under an hour on two cores.

Short texts full of codes come first, because finding a code by a name is learned there within
minutes; then the texts grow to the full context. The state is saved every hundred steps, and the
same command continues from it.
"""

import argparse
import logging
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float
from tokenizers import Tokenizer

from fastgen_jax.demo import corpus, export, vocabulary
from fastgen_jax.demo.batches import Batch, Stage, sample_batch
from fastgen_jax.models.decoder import Model
from fastgen_jax.models.families import llama
from fastgen_jax.models.layers import Policy

log = logging.getLogger("demo")

CHECKPOINT = Path(__file__).parent / "checkpoint"
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
HARD: dict[str, Any] = {"alike": 0.4, "weights": (0, 1, 4, 20, 20)}
FIRST_CYCLE = (
    Stage(n_steps=200, n_rows=24, length=128, max_facts=2, max_story=0, recall=0.95, begun=0.8),
    Stage(n_steps=600, n_rows=24, length=128, max_facts=4, max_story=0, recall=0.95, begun=0.5),
    Stage(n_steps=700, n_rows=12, length=256, max_facts=8, max_story=60, recall=0.9, begun=0.2),
    Stage(n_steps=700, n_rows=8, length=512, max_facts=10, max_story=350, recall=0.7, begun=0.1),
    Stage(n_steps=400, n_rows=4, length=1024, max_facts=12, max_story=800, recall=0.7, begun=0.1),
    Stage(n_steps=500, n_rows=3, length=2048, max_facts=14, max_story=1700, recall=0.7, begun=0.1),
)
# Names that are alike, and the later digits of codes.
SECOND_CYCLE = tuple(
    Stage(**stage, begun=0.1, **HARD)
    for stage in (
        {"n_steps": 600, "n_rows": 12, "length": 256, "max_facts": 8, "max_story": 60,
         "recall": 0.75},
        {"n_steps": 300, "n_rows": 8, "length": 512, "max_facts": 10, "max_story": 350,
         "recall": 0.6},
        {"n_steps": 400, "n_rows": 3, "length": 2048, "max_facts": 14, "max_story": 1700,
         "recall": 0.7},
    )
)  # fmt: skip
# Codes told long ago.
THIRD_CYCLE = (
    Stage(
        n_steps=300, n_rows=3, length=2048, max_facts=6, min_story=1000, max_story=1700,
        recall=0.9, begun=0.1, **HARD,
    ),
)  # fmt: skip
# Stories, what stays true in them above all; then everything at full length.
TRUE: dict[str, Any] = {"alike": 0.4, "edges": 0.2, "weights": (0, 3, 12, 20, 20)}
EDGES: dict[str, Any] = {**TRUE, "edges": 0.5}
KINDS: dict[str, Any] = {**TRUE, "weights": (0, 3, 20, 20, 20)}
FOURTH_CYCLE = (
    Stage(
        n_steps=500, n_rows=8, length=512, max_facts=10, max_story=350, recall=0.3, begun=0.1,
        **TRUE,
    ),
    Stage(
        n_steps=200, n_rows=3, length=2048, max_facts=8, max_story=1700, recall=0.7, begun=0.1,
        **TRUE,
    ),
)  # fmt: skip
# Codes told at the very start or end of long stories.
FIFTH_CYCLE = (
    Stage(
        n_steps=300, n_rows=3, length=2048, max_facts=6, min_story=900, max_story=1700,
        recall=0.8, begun=0.1, **EDGES,
    ),
)  # fmt: skip
# Girls and boys, by the names that are asked for.
SIXTH_CYCLE = (
    Stage(
        n_steps=400, n_rows=8, length=512, max_facts=10, max_story=350, recall=0.3, begun=0.1,
        **KINDS,
    ),
    Stage(
        n_steps=100, n_rows=3, length=2048, max_facts=6, min_story=900, max_story=1700,
        recall=0.7, begun=0.1, **EDGES,
    ),
)  # fmt: skip
# With the peak of each cycle's learning rate.
CYCLES = (
    (0.01, FIRST_CYCLE),
    (0.005, SECOND_CYCLE),
    (0.002, THIRD_CYCLE),
    (0.004, FOURTH_CYCLE),
    (0.002, FIFTH_CYCLE),
    (0.004, SIXTH_CYCLE),
)
STAGES = tuple(stage for _, cycle in CYCLES for stage in cycle)
SAVE_EVERY = 100


def learning_rate() -> optax.Schedule:
    """Rises, then falls as a parabola in each cycle; in the first it stays up until codes are found
    by name.
    """
    lowest, warmup, steady = 1e-4, 50, 1000
    schedules, ends = [], []
    for peak, cycle in CYCLES:
        n_steps = sum(stage.n_steps for stage in cycle)
        wait = warmup if schedules else steady
        start = lowest if schedules else 0.0
        end = ends[-1] if ends else 0
        schedules.append(optax.warmup_constant_schedule(start, peak, warmup))
        schedules.append(optax.polynomial_schedule(peak, lowest, 2, n_steps - wait))
        ends += [end + wait, end + n_steps]
    return optax.join_schedules(schedules, ends[:-1])


def optimizer() -> optax.GradientTransformation:
    """Muon (Jordan et al., 2024) for matrices, Adam for the rest."""

    def dimensions(path: tuple[Any, ...], x: Array):
        """Which axis of a matrix is summed over: a table's first, a product's second."""
        if x.ndim != 2:
            return None
        is_table = "embed" in jax.tree_util.keystr(path)
        return optax.contrib.MuonDimensionNumbers(*((0, 1) if is_table else (1, 0)))

    def all_dimensions(params: Any) -> Any:
        return jax.tree.map_with_path(dimensions, params)

    return optax.contrib.muon(
        learning_rate(),
        weight_decay=0.01,
        adam_b2=0.98,
        muon_weight_dimension_numbers=all_dimensions,
    )


def logits_of(model: Model, batch: Batch) -> Float[Array, "B L V"]:
    return model(*map(jnp.asarray, (batch.tokens, batch.segments, batch.positions)))


def loss_of(params: nnx.State, graph: nnx.GraphDef, batch: Batch, weights: tuple[float, ...]):
    """Weighted mean cross-entropy. Beside it: the share of codes' first digits that are right, and
    the mean loss of stories.
    """
    logits = logits_of(nnx.merge(graph, params), batch)[:, :-1]
    targets, kinds = batch.tokens[:, 1:], batch.kinds[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)

    def mean(values: Array, kind: int) -> Array:
        mask = kinds == kind
        return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1)

    is_right = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    report = jnp.stack([mean(is_right, corpus.FIRST), mean(losses, corpus.SPOKEN)])
    weight = jnp.asarray(weights, jnp.float32)[kinds]
    return jnp.sum(losses * weight) / jnp.sum(weight), report


@partial(jax.jit, static_argnames=("graph", "tx", "weights"), donate_argnames=("params", "state"))
def train_step(
    params: nnx.State,
    state: optax.OptState,
    batch: Batch,
    *,
    graph: nnx.GraphDef,
    tx: optax.GradientTransformation,
    weights: tuple[float, ...],
):
    grad = jax.value_and_grad(loss_of, has_aux=True)
    (loss, report), grads = grad(params, graph, batch, weights)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, jnp.append(report, loss)


def save_state(path: Path, n_done: int, tree: Any) -> None:
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    part = path.with_suffix(".part.npz")
    np.savez(part, np.int32(n_done), *leaves)
    part.replace(path)


def load_state(path: Path, tree: Any) -> tuple[int, Any]:
    """Steps done and the tree, as saved; 0 and the tree itself where nothing is."""
    if not path.exists():
        return 0, tree
    with np.load(path, allow_pickle=False) as saved:
        n_done, *leaves = (saved[f"arr_{i}"] for i in range(1 + len(jax.tree.leaves(tree))))
        leaves = [jnp.asarray(leaf) for leaf in leaves]
        return int(n_done), jax.tree.unflatten(jax.tree.structure(tree), leaves)


def train(tokenizer: Tokenizer, *, seed: int, state_file: Path) -> Model:
    config, tx = llama.config(HF_CONFIG), optimizer()
    graph, params = nnx.split(Model(config, policy=Policy(), rngs=nnx.Rngs(seed)))
    n_done, (params, state) = load_state(state_file, (params, tx.init(params)))
    stages = [stage for stage in STAGES for _ in range(stage.n_steps)]
    start, reports = time.monotonic(), []
    for step in range(n_done, len(stages)):
        stage = stages[step]
        batch = sample_batch(tokenizer, random.Random(f"{seed} {step}"), stage)
        params, state, report = train_step(
            params, state, batch, graph=graph, tx=tx, weights=stage.weights
        )
        reports.append(report)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == len(stages):
            save_state(state_file, step + 1, (params, state))
            right, story, loss = np.mean(jax.device_get(reports), axis=0)
            log.info(
                "step %d of %d, length %d: loss %.3f, first digits right %.3f, story loss %.3f; "
                "%.0f s, %.0f s of CPU",
                step + 1, len(stages), stage.length, loss, right, story,
                time.monotonic() - start, time.process_time(),
            )  # fmt: skip
            reports = []
    return nnx.merge(graph, params)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=CHECKPOINT, help="directory to write")
    parser.add_argument("--state", type=Path, default=Path("build/demo_state.npz"),
                        help="file of the state to continue from, and to save to")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args.state.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = vocabulary.build()
    model = train(tokenizer, seed=args.seed, state_file=args.state)
    export.export(args.output, model, HF_CONFIG, tokenizer)
    log.info("wrote %s; measure it with python -m fastgen_jax.demo.evaluate", args.output)


if __name__ == "__main__":
    main()
