"""Tunix's own GRPO learner trains the demo model on stories that our engine tells. Run by .ci/run,
not by the suite.

python -m pytest -n 0 tests/rl/live_tunix.py           (needs the extra tunix; 1 to 2 minutes)
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from transformers import AutoTokenizer

from fastgen_jax.built_in import DEMO
from fastgen_jax.demo.vocabulary import END_ID
from fastgen_jax.errors import ConfigError, InvalidRequest
from fastgen_jax.models import load

common = pytest.importorskip("tunix.rl.common")
from tunix.rl import rl_cluster  # noqa: E402
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner  # noqa: E402
from tunix.rl.rollout.base_rollout import RolloutConfig  # noqa: E402

from fastgen_jax.rl.tunix import FastGenRollout, TunixModel, view  # noqa: E402

N_STEPS, N_PROMPTS, N_SAMPLES = 3, 2, 4
PROMPTS = [f"<|user|>Tell me a story about {name}.<|end|><|assistant|>" for name in ("Tom", "Anna")]
CONFIG = RolloutConfig(
    max_tokens_to_generate=200,
    max_prompt_length=16,
    temperature=1.0,
    eos_tokens=[END_ID],
    return_logprobs=True,
)
ENGINE = {"max_num_seqs": 8, "max_num_batched_tokens": 128, "block_size": 8}

pytestmark = pytest.mark.filterwarnings("default")  # those of Tunix and what it imports


class Watched(FastGenRollout):
    """Keeps what it told, and the trainer's log-probabilities of it at that time."""

    def __init__(self, rollout_actor, **options):
        super().__init__(rollout_actor, **options)
        self.trainer, self.told = rollout_actor, []

    def generate(self, prompts, rollout_config, **changes):
        output = super().generate(prompts, rollout_config, **changes)
        self.told.append((output, trainer_logps(self, output)))
        return output


def padded(rows, width, value):
    return np.array([np.pad(row, (0, width - len(row)), constant_values=value) for row in rows])


def trainer_logps(rollout, output):
    return common.compute_per_token_logps(
        *nnx.split(rollout.trainer),
        prompt_tokens=jnp.array(output.left_padded_prompt_tokens),
        completion_tokens=jnp.array(padded(output.tokens, 200, rollout.pad_id())),
        pad_id=rollout.pad_id(),
        eos_id=rollout.eos_id(),
    )


@pytest.fixture(scope="module", autouse=True)
def promote():
    """Tunix mixes dtypes and ranks, in threads of its own too."""
    settings = {"jax_numpy_dtype_promotion": "standard", "jax_numpy_rank_promotion": "allow"}
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.pad_token = "<|system|>"  # which no story has; Tunix takes each pad_id for padding
    return tokenizer


@pytest.fixture(scope="module")
def actor():
    return TunixModel(load(DEMO, dtype="float32"))


@pytest.fixture(scope="module")
def trained(tokenizer, actor):
    """The cluster after a few steps, and the rewards that they saw."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("fsdp",))
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    cluster = rl_cluster.RLCluster(
        actor=actor,
        reference=nnx.clone(actor),
        tokenizer=tokenizer,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            rollout_engine=partial(Watched, **ENGINE),
            rollout_config=CONFIG,
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.adam(3e-4), eval_every_n_steps=100, max_steps=N_STEPS * 2
            ),
        ),
    )
    rewards = []

    def reward(prompts, completions, **_):
        rewards.append([float("began to rain" in text) for text in completions])
        return rewards[-1]

    config = GRPOConfig(num_generations=N_SAMPLES, num_iterations=2, beta=0.04)
    learner = GRPOLearner(rl_cluster=cluster, algo_config=config, reward_fns=reward)
    start = [np.asarray(x) for x in jax.tree.leaves(nnx.state(cluster.actor_trainer.model))]
    learner.train([{"prompts": np.array(PROMPTS)} for _ in range(N_STEPS)])
    return cluster, rewards, start


def test_rewards_and_losses_are_finite(trained):
    cluster, rewards, _ = trained
    assert np.array(rewards).shape == (N_STEPS, N_PROMPTS * N_SAMPLES)
    assert cluster.actor_trainer.train_steps == N_STEPS * 2
    state = nnx.state(cluster.actor_trainer.model)
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(state))


def test_the_engine_samples_from_the_policy_that_is_trained(trained):
    """At each step, after weights that have changed: log-probabilities are the trainer's."""
    told = trained[0].rollout.told
    assert len(told) == N_STEPS
    for output, logps in told:
        for sampled, expected in zip(output.logprobs, np.asarray(logps), strict=True):
            ratio = np.exp(expected[: len(sampled)] - sampled)
            np.testing.assert_allclose(ratio, 1.0, atol=1e-4)


def test_the_engine_ends_with_the_trainers_weights(trained):
    cluster, _, start = trained
    trainer = jax.tree.leaves(nnx.state(cluster.actor_trainer.model))
    engine = cluster.rollout._llm.engine._runner.leaves
    assert all((a == b).all() for a, b in zip(trainer, engine, strict=True))
    assert any((np.asarray(a) != b).any() for a, b in zip(trainer, start, strict=True))


def test_samples_of_one_prompt_share_its_blocks(trained):
    stats = trained[0].rollout._llm.engine.stats()
    assert stats.n_prefix_hits >= N_STEPS * N_PROMPTS * (N_SAMPLES - 1) * ENGINE["block_size"]


def test_tokens_are_those_of_the_engine_with_their_end(trained):
    for output, _ in trained[0].rollout.told:
        assert len(output.text) == len(output.tokens) == N_PROMPTS * N_SAMPLES
        ends = [tokens[-1] == END_ID for tokens in output.tokens if len(tokens) < 200]
        assert ends and all(ends)
        assert [len(x) for x in output.logprobs] == [len(x) for x in output.tokens]


def test_the_old_policys_logps_are_those_that_were_sampled(trained):
    rollout = trained[0].rollout
    output = rollout.generate(PROMPTS, CONFIG, seed=1)
    old = rollout.get_per_token_logps(
        jnp.array(output.left_padded_prompt_tokens),
        jnp.array(padded(output.tokens, 200, rollout.pad_id())),
    )
    for sampled, expected in zip(output.logprobs, np.asarray(old), strict=True):
        np.testing.assert_allclose(expected[: len(sampled)], sampled, atol=1e-4)


def test_packed_rows_and_masks_give_the_same_logits(actor):
    tokens = jnp.array([[4, 4, 0, 2, 959, 366]])
    is_real = tokens != 4
    mask = jnp.tril(jnp.ones((6, 6), bool))[None] & is_real[:, None]
    places = common.build_positions_from_mask(is_real)
    by_mask, _ = actor(tokens, positions=places, attention_mask=mask)
    alone, _ = actor(tokens[:, 2:])
    np.testing.assert_allclose(by_mask[:, 2:], alone, atol=1e-4)
    by_segments, _ = actor(tokens, positions=places, segment_ids=is_real.astype(jnp.int32))
    np.testing.assert_array_equal(by_mask, by_segments)


def test_what_cannot_be_is_refused(actor, tokenizer):
    with pytest.raises(InvalidRequest, match="no KV cache"):
        actor(jnp.zeros((1, 2), jnp.int32), cache={})
    with pytest.raises(ConfigError, match="wrap one in TunixModel"):
        FastGenRollout(actor.model, tokenizer, None, CONFIG)


def test_a_view_is_another_array_of_the_same_memory():
    array = jnp.arange(8)
    again = view(array)
    assert again is not array
    assert again.unsafe_buffer_pointer() == array.unsafe_buffer_pointer()
