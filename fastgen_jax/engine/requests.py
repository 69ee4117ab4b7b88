"""What a request means to the engine: its sequences, their seeds, what ends them, and defaults."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from fastgen_jax.engine.batch import MAX_EOS
from fastgen_jax.engine.constraint import Constraint
from fastgen_jax.engine.pooling import Pooled
from fastgen_jax.engine.scoring import Scoring
from fastgen_jax.engine.states import States
from fastgen_jax.engine.types import Request, Sequence
from fastgen_jax.errors import ConfigError
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.sampling_params import SamplingParams


def make_sequences(
    request: Request,
    request_id: int,
    sequence_ids: Iterator[int],
    *,
    max_tokens: int,
    engine_seed: int,
    eos_token_ids: frozenset[int],
    vocab_size: int,
) -> list[Sequence]:
    """One sequence for each of the request's samples.

    max_tokens: prompt and output together.
    """
    prompt = np.array(request.prompt_token_ids, np.int32)
    params = request.params
    ending = ending_ids(params, eos_token_ids)
    return [
        Sequence(
            id=next(sequence_ids),
            request_id=request_id,
            index=index,
            prompt_ids=prompt,
            params=params,
            seed=seed,
            max_tokens=max_tokens,
            ending_ids=ending,
            priority=request.priority,
            cache_salt=request.cache_salt,
            constraint=constraint(request, ending, eos_token_ids, vocab_size),
            pooled=Pooled(request.pooling) if request.pooling else None,
            scoring=scoring(request) if index == 0 else None,
            states=States(request.states_at) if request.states_at else None,
            is_silent=request.is_silent,
            n_tokens=len(prompt),
        )
        for index, seed in enumerate(sample_seeds(engine_seed, request_id, params))
    ]


def scoring(request: Request) -> Scoring | None:
    """Of the prompt, which the first sample is to see to."""
    n_top = request.params.prompt_logprobs
    if n_top is None:
        return None
    return Scoring(request.scored_from or 1, len(request.prompt_token_ids), n_top)


def constraint(
    request: Request, ending: frozenset[int], eos: frozenset[int], vocab_size: int
) -> Constraint | None:
    """What one sample of the request may say; None: anything."""
    allowed = request.params.allowed_token_ids
    if request.grammar is None and not allowed and not request.bad_words:
        return None
    return Constraint(
        grammar=request.grammar,
        allowed_token_ids=allowed,
        bad_words=request.bad_words,
        ending_ids=ending,
        eos_token_ids=eos,
        vocab_size=vocab_size,
    )


def ending_ids(params: SamplingParams, eos_token_ids: frozenset[int]) -> frozenset[int]:
    """Token ids that end a sample."""
    eos = frozenset() if params.ignore_eos else eos_token_ids
    return eos | frozenset(params.stop_token_ids)


def sample_seeds(engine_seed: int, request_id: int, params: SamplingParams) -> list[int]:
    """One 32-bit seed per sample: from the request's seed if it has one, else from its number."""
    entropy = [engine_seed, request_id] if params.seed is None else [params.seed % 2**64]
    return np.random.SeedSequence(entropy).generate_state(params.n, np.uint32).tolist()


def default_params(generation_config: dict[str, Any]) -> dict[str, Any]:
    """SamplingParams fields that a model's generation_config.json sets."""
    if not generation_config.get("do_sample", True):
        return {"temperature": 0.0}
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return {n: generation_config[n] for n in names if generation_config.get(n) is not None}


def eos_token_ids(generation_config: dict[str, Any], model: ModelConfig) -> frozenset[int]:
    """End-of-sequence ids: those of generation_config.json, else those of config.json."""
    value = generation_config.get("eos_token_id")
    ids = [value] if isinstance(value, int) else value or model.eos_token_ids
    return known_eos(ids, model.vocab_size)


def known_eos(ids: Iterable[int], vocab_size: int) -> frozenset[int]:
    """Of these end-of-sequence ids those that the model has.

    Raises:
        ConfigError: more of them than a batch holds for each sequence.
    """
    known = frozenset(id for id in ids if 0 <= id < vocab_size)
    if len(known) > MAX_EOS:
        raise ConfigError(
            f"{len(known)} tokens end a sequence, and {MAX_EOS} may; name fewer as eos_token_id in "
            "generation_config.json"
        )
    return known
