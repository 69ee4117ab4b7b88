"""GRPO on the demo model: one module is trained and told from, in one process."""

import xml.etree.ElementTree as ElementTree

import jax
import numpy as np
import pytest

from fastgen_jax.built_in import DEMO
from fastgen_jax.demo import grpo
from fastgen_jax.llm import LLM
from fastgen_jax.models import load


def run(**sizes: int):
    """What each step reports, and the engine's statistics."""
    model = load(DEMO, dtype="float32")
    n_seqs = sizes["n_prompts"] * sizes["n_samples"]
    options = {"max_model_len": 288, "max_num_seqs": n_seqs, "max_num_batched_tokens": 64}
    with (
        LLM.from_module(model, tokenizer=DEMO, block_size=8, **options) as llm,
        jax.numpy_dtype_promotion("standard"),  # which optax relies on
    ):
        return [*grpo.train(llm, model, seed=1, **sizes)], llm.engine.stats()


@pytest.fixture(scope="module")
def few():
    return run(n_steps=2, n_prompts=2, n_samples=4)


def test_the_engine_tells_stories_as_the_policy_that_is_trained(few):
    """At each step, so with weights that were replaced in place before."""
    for report in few[0]:
        np.testing.assert_allclose([report.ratio_mean, report.ratio_max], 1.0, atol=1e-4)


@pytest.mark.exhaustive
def test_reward_rises():
    reports, _ = run(n_steps=4, n_prompts=4, n_samples=8)
    assert reports[-1].reward > reports[0].reward + 0.25


def test_samples_of_one_prompt_share_its_blocks(few):
    n_others = 2 * 2 * 3  # of each prompt's four, in two steps
    assert few[1].n_prefix_hits >= 8 * n_others  # a block each


def test_an_advantage_is_measured_in_deviations_of_its_group():
    advantages = grpo.advantages_of(np.array([[0.0, 1.0], [1.0, 1.0], [0.0, 10.0]]))
    np.testing.assert_allclose(advantages, [[-1, 1], [0, 0], [-1, 1]], atol=1e-3)


def test_rain_is_rewarded():
    assert grpo.reward_of("Suddenly it began to rain. Soon the sun was shining again.") == 1.0
    assert grpo.reward_of("Once upon a time") == 0.0


def test_the_plot_is_a_picture_of_the_rewards():
    root = ElementTree.fromstring(grpo.plot([0.0, 0.5, 1.0]))
    line = root.find("{http://www.w3.org/2000/svg}polyline")
    assert line.get("points") == "40.0,170.0 310.0,95.0 580.0,20.0"
