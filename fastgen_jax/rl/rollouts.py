"""What trainers ask and get, in the engine's words and back: params, groups of equal prompts, rows
that are padded on the left. Knows no trainer's package.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from fastgen_jax.errors import InvalidRequest
from fastgen_jax.results import CompletionOutput
from fastgen_jax.sampling_params import MAX_SAMPLES, SamplingParams


class Config(Protocol):
    """The fields of Tunix's RolloutConfig that say how tokens are drawn."""

    max_tokens_to_generate: int
    max_prompt_length: int
    temperature: float
    top_p: float | None
    top_k: int | None
    seed: Any
    eos_tokens: list[int] | None
    return_logprobs: bool


class Group(NamedTuple):
    """Neighbours among the prompts that are the same: samples of one, computed once."""

    prompt: str
    n: int


def grouped(prompts: Sequence[str], most: int = MAX_SAMPLES) -> list[Group]:
    """Their order is that of the prompts; more than `most` equal ones are several groups."""
    runs = [(prompt, len(list(equal))) for prompt, equal in groupby(prompts)]
    return [
        Group(prompt, min(most, n - start)) for prompt, n in runs for start in range(0, n, most)
    ]


def params_of(config: Config, eos_id: int, n: int, place: int, **changes: Any) -> SamplingParams:
    """How the samples of one group are drawn. They end with one of `eos_tokens`, else with
    `eos_id`, which is kept.

    Args:
        place: of the group among those of a call; equal seeds draw other noise for each.
        changes: fields of SamplingParams that overrule the config's.

    Raises:
        InvalidRequest: a value that cannot be, or log-probabilities that would not be the policy's.
    """
    if config.return_logprobs and config.temperature != 1.0:
        raise InvalidRequest(
            f"log-probabilities are of the model's own distribution, which temperature="
            f"{config.temperature} changes: use temperature=1.0, or return_logprobs=False and let "
            "the trainer compute them",
            param="return_logprobs",
        )
    return SamplingParams(
        n=n,
        max_tokens=config.max_tokens_to_generate,
        temperature=config.temperature,
        top_p=1.0 if config.top_p is None else config.top_p,
        top_k=0 if config.top_k is None else config.top_k,
        seed=seed_of(config.seed, place),
        stop_token_ids=tuple(config.eos_tokens or (eos_id,)),
        ignore_eos=True,
        logprobs=0 if config.return_logprobs else None,
        detokenize=False,
    ).clone(**changes)


def seed_of(key: Any, place: int) -> int | None:
    """A seed for the group at a place, of a jax key or an integer; None: the engine's."""
    if key is None:
        return None
    is_key = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    words = np.asarray(jax.random.key_data(key) if is_key else key)
    entropy = [*words.astype(np.uint32).reshape(-1).tolist(), place]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint32)[0])


def left_padded(rows: Sequence[Sequence[int]], width: int, pad_id: int) -> Int[np.ndarray, "B P"]:
    """One row for each prompt, which ends where the row ends.

    Raises:
        InvalidRequest: a prompt is longer.
    """
    longest = max(map(len, rows), default=0)
    if longest > width:
        raise InvalidRequest(
            f"prompt of {longest} tokens exceeds max_prompt_length={width}; shorten it or raise "
            "max_prompt_length in the rollout config",
            param="max_prompt_length",
        )
    padded = np.full((len(rows), width), pad_id, np.int32)
    for line, row in zip(padded, rows, strict=True):
        line[width - len(row) :] = row
    return padded


def sampled_logprobs(sample: CompletionOutput) -> np.ndarray:
    """f32: of each token, as the engine drew it."""
    assert sample.logprobs is not None
    pairs = zip(sample.token_ids, sample.logprobs, strict=True)
    return np.array([position[token].logprob for token, position in pairs], np.float32)
