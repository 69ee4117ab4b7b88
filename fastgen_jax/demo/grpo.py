"""GRPO in one process: `python -m fastgen_jax.demo.grpo`, minutes on two cores.

Group Relative Policy Optimization (Shao et al., DeepSeekMath, 2024, section 4.1): of each prompt a
group of stories is drawn, a rule rewards each of them, and the model moves towards those that did
better than the others of their group. The rule here: that it rains, as it does in one story of
seven. The module that is trained is the one that generates. The engine takes over its weights in
place after each step, and the engine's log-probabilities are the old policy's: nothing is computed
twice. Needs the extra `train`.
"""

import argparse
import random
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from fastgen_jax.built_in import DEMO
from fastgen_jax.demo.people import TRAINING_PEOPLE
from fastgen_jax.llm import LLM
from fastgen_jax.models import load
from fastgen_jax.results import RequestOutput
from fastgen_jax.rl.rollouts import sampled_logprobs
from fastgen_jax.sampling_params import SamplingParams

CLIP, KL_WEIGHT = 0.2, 0.02  # epsilon and beta of the paper
N_UPDATES = 2  # of the weights, with one batch of stories (mu of the paper)
MAX_STORY = 240  # tokens
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-4))


class Batch(NamedTuple):
    """Stories of one policy, each a row of prompt, story and padding; what is said of a column t is
    of its token t + 1, which the tokens up to t predict.
    """

    tokens: Int[np.ndarray, "B T+1"]
    is_told: Bool[np.ndarray, "B T"]  # by the policy
    old: Float[np.ndarray, "B T"]  # log-probability, as the engine drew the token
    reference: Float[np.ndarray, "B T"]  # log-probability before any training
    advantages: Float[np.ndarray, "B"]


class Report(NamedTuple):
    """One step of training. ratio: of the trainer's probabilities to the engine's, before the
    weights change.
    """

    reward: float
    ratio_mean: float
    ratio_max: float
    rollout_seconds: float
    train_seconds: float
    update_seconds: float

    def __str__(self) -> str:
        return (
            f"reward {self.reward:.3f}  ratio {self.ratio_mean:.6f} (max {self.ratio_max:.6f})  "
            f"rollout {self.rollout_seconds:.2f} s, train {self.train_seconds:.2f} s, update "
            f"{self.update_seconds:.3f} s"
        )


def tell(llm: LLM, rng: random.Random, n_prompts: int, n_samples: int) -> list[RequestOutput]:
    """Stories of some heroes; those of one share what the engine computed of their prompt."""
    heroes = rng.sample(TRAINING_PEOPLE, n_prompts)
    chats = [[{"role": "user", "content": f"Tell me a story about {h.name}."}] for h in heroes]
    params = SamplingParams(n=n_samples, max_tokens=MAX_STORY, temperature=1.0, logprobs=0)
    seeded = [params.clone(seed=rng.getrandbits(32)) for _ in heroes]
    return llm.chat(chats, seeded, use_tqdm=False)


def reward_of(story: str) -> float:
    return float("began to rain" in story)


def advantages_of(rewards: Float[np.ndarray, "P G"]) -> Float[np.ndarray, "P G"]:
    """How much better each sample did than its group, in its group's standard deviations."""
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    return centred / (rewards.std(axis=1, keepdims=True) + 1e-4)


def pack(outputs: list[RequestOutput], advantages: Float[np.ndarray, "P G"], reference) -> Batch:
    """The batch of all samples.

    Args:
        reference: the log-probabilities of rows of tokens before any training.
    """
    told = [(output.prompt_token_ids, sample) for output in outputs for sample in output.outputs]
    length = max(len(prompt) for prompt, _ in told) + MAX_STORY
    length = -(-length // 16) * 16  # few lengths, so that few programs are compiled
    tokens = np.zeros((len(told), length), np.int32)
    is_told = np.zeros((len(told), length - 1), bool)
    old = np.zeros((len(told), length - 1), np.float32)
    for row, (prompt, sample) in enumerate(told):
        ids = prompt + sample.token_ids
        own = slice(len(prompt) - 1, len(ids) - 1)
        tokens[row, : len(ids)] = ids
        is_told[row, own] = True
        old[row, own] = sampled_logprobs(sample)
    by_row = advantages.reshape(-1).astype(np.float32)
    return Batch(tokens, is_told, old, np.asarray(reference(tokens)), by_row)


@partial(jax.jit, static_argnames="graph")
def logprobs_of(
    params: nnx.State, tokens: Int[Array, "B T+1"], *, graph: nnx.GraphDef
) -> Float[Array, "B T"]:
    logits = nnx.merge(graph, params)(tokens)[:, :-1]
    return -optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])


def loss_of(params: nnx.State, batch: Batch, graph: nnx.GraphDef):
    """The negative of the paper's objective (equation 3); beside it the ratios of all tokens."""
    logprobs = logprobs_of(params, batch.tokens, graph=graph)
    ratio = jnp.exp(logprobs - batch.old)
    advantage = batch.advantages[:, None]
    gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantage)
    change = batch.reference - logprobs
    gain -= KL_WEIGHT * (jnp.exp(change) - change - 1.0)  # never negative (equation 4)
    of_stories = jnp.mean(gain, axis=1, where=batch.is_told)
    return -jnp.mean(of_stories), ratio


@partial(jax.jit, static_argnames="graph", donate_argnames="state")
def train_step(params: nnx.State, state: optax.OptState, batch: Batch, *, graph: nnx.GraphDef):
    """New weights and optimizer's state, and the ratios before the change. The weights are not
    donated: the engine has them.
    """
    (_, ratio), grads = jax.value_and_grad(loss_of, has_aux=True)(params, batch, graph)
    updates, state = OPTIMIZER.update(grads, state, params)
    return optax.apply_updates(params, updates), state, ratio


def train(
    llm: LLM, model: nnx.Module, *, n_steps: int, n_prompts: int, n_samples: int, seed: int
) -> Iterator[Report]:
    """Trains the model of `llm`, in place; a report after each step."""
    graph, params = nnx.split(model)
    reference = partial(logprobs_of, params, graph=graph)
    state, rng = OPTIMIZER.init(params), random.Random(seed)
    for _ in range(n_steps):
        times = [time.monotonic()]
        outputs = tell(llm, rng, n_prompts, n_samples)
        rewards = np.array([[reward_of(sample.text) for sample in o.outputs] for o in outputs])
        times.append(time.monotonic())
        batch = pack(outputs, advantages_of(rewards), reference)
        ratios: list[Array] = []
        for _ in range(N_UPDATES):
            params, state, ratio = train_step(params, state, batch, graph=graph)
            ratios.append(ratio)
        jax.block_until_ready(params)
        times.append(time.monotonic())
        llm.update_weights(params)
        times.append(time.monotonic())
        on_policy = np.asarray(ratios[0])[batch.is_told]
        yield Report(rewards.mean(), on_policy.mean(), on_policy.max(), *np.diff(times))
    nnx.update(model, params)


def plot(rewards: list[float]) -> str:
    """An SVG of the mean reward of each step, from 0 to 1."""
    points = " ".join(
        f"{40 + 540 * i / max(len(rewards) - 1, 1):.1f},{170 - 150 * reward:.1f}"
        for i, reward in enumerate(rewards)
    )
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 210" font-size="12">
<rect width="600" height="210" fill="white"/>
<path d="M40 20V170H580" fill="none" stroke="gray"/>
<polyline points="{points}" fill="none" stroke="#2563eb" stroke-width="2"/>
<text x="18" y="24">1</text><text x="18" y="174">0</text><text x="40" y="14">mean reward</text>
<text x="40" y="188">step 1</text>
<text x="580" y="188" text-anchor="end">{len(rewards)}</text></svg>
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=8, help="of each step")
    parser.add_argument("--samples", type=int, default=8, help="of each prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("grpo.svg"), help="file to draw to")
    args = parser.parse_args()
    model = load(DEMO, dtype="float32")
    options = {"max_model_len": 288, "max_num_seqs": 64, "max_num_batched_tokens": 512}
    rewards = []
    with LLM.from_module(model, tokenizer=DEMO, block_size=8, **options) as llm:
        sizes = {"n_prompts": args.prompts, "n_samples": args.samples}
        for report in train(llm, model, n_steps=args.steps, seed=args.seed, **sizes):
            rewards.append(report.reward)
            print(f"step {len(rewards):3}  {report}", flush=True)
            args.plot.write_text(plot(rewards))


if __name__ == "__main__":
    main()
