"""What a step leaves of prompts goes to the sequences that asked for it."""

from typing import Any

from fastgen_jax.engine.batch import Batch
from fastgen_jax.engine.runner import Runner
from fastgen_jax.engine.step import Launched
from fastgen_jax.engine.types import Sequence


def read(runner: Runner, batch: Batch, launched: Launched) -> None:
    """Of a step whose tokens were fetched; fetches no more than is asked for."""
    if batch.is_pooled:
        _take_pooled(runner, batch, launched)
    if batch.scored:
        _take_scores(runner, batch, launched)
    if batch.has_states:
        _take_states(runner, batch, launched)


def _take_pooled(runner: Runner, batch: Batch, launched: Launched) -> None:
    sums = runner.fetch_pooled(launched)
    for sequence, chunk_sum, start in zip(batch.sequences, sums, batch.starts(), strict=False):
        if sequence.pooled is not None:
            sequence.pooled.add(chunk_sum, start)


def _take_scores(runner: Runner, batch: Batch, launched: Launched) -> None:
    scores = runner.fetch_scores(launched)
    first = 0
    for sequence, positions in batch.scored:
        assert sequence.scoring is not None
        end = first + len(positions)
        sequence.scoring.add(scores.cut(first, end), positions)
        first = end


def _take_states(runner: Runner, batch: Batch, launched: Launched) -> None:
    states = runner.fetch_states(launched)
    for sequence, start, tokens in zip(
        batch.sequences, batch.starts(), batch.tokens(), strict=True
    ):
        if sequence.states is not None:
            sequence.states.add(states[tokens], start)


def has_finite_readings(sequence: Sequence) -> bool:
    parts = (sequence.pooled, sequence.scoring, sequence.states)
    return all(part is None or part.is_finite for part in parts)


def readings(sequence: Sequence) -> dict[str, Any]:
    """The fields of an Output that tell what was read of a prompt, once all of it was."""
    found: dict[str, Any] = {}
    if sequence.pooled is not None:
        found["embedding"] = sequence.pooled.vector(sequence.n_prompt)
    if sequence.scoring is not None:
        found["prompt_logprobs"] = sequence.scoring.logprobs()
    if sequence.states is not None:
        found["hidden_states"] = sequence.states.array()
    return found
