"""Beam search: which beams live on. Whoever calls it knows how to continue them.

Scores are those of vLLM: a beam's cumulative log-probability over (length ** length_penalty), its
length being that of prompt and output, without the token that ended it. (transformers counts the
output alone.)
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from fastgen_jax.engine.types import FinishReason
from fastgen_jax.results import Logprob
from fastgen_jax.sampling_params import BeamSearchParams


@dataclass
class BeamSearchSequence:
    """A beam. tokens, and the text of all of them, begin with the prompt; logprobs do not.

    finish_reason: "stop" after a token that ends texts, "length" after max_tokens, "error" where
    the model failed, with the tokens until then. text: None without a tokenizer.
    """

    tokens: list[int]
    logprobs: list[dict[int, Logprob]]
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def score(self, length_penalty: float) -> float:
        length = len(self.tokens) - (self.finish_reason == "stop")
        return self.cum_logprob / length**length_penalty


@dataclass(frozen=True)
class BeamSearchOutput:
    """The best sequences of one prompt, best first: beam_width of them, if there are as many."""

    sequences: list[BeamSearchSequence]


# The likeliest tokens after each of several token sequences; None where the model failed.
Continue = Callable[[list[list[int]]], list[dict[int, Logprob] | None]]


class Beams:
    """The search after one prompt.

    INVARIANT: live beams are at most beam_width, equally long, and unfinished.
    """

    def __init__(self, prompt: list[int], params: BeamSearchParams, ending_ids: Collection[int]):
        self.live = [BeamSearchSequence(prompt, [])]
        self._ended: list[BeamSearchSequence] = []
        self._params = params
        self._ending_ids = () if params.ignore_eos else ending_ids

    def extend(self, continuations: list[dict[int, Logprob] | None]) -> None:
        """Takes the likeliest tokens after each live beam, in their order."""
        longer: list[BeamSearchSequence] = []
        for beam, likeliest in zip(self.live, continuations, strict=True):
            if likeliest is None:
                beam.finish_reason = "error"
                self._ended.append(beam)
                continue
            longer += [_longer(beam, token, likeliest, self._ending_ids) for token in likeliest]
        self._ended += [beam for beam in longer if beam.finish_reason]
        going_on = [beam for beam in longer if not beam.finish_reason]
        going_on.sort(key=lambda beam: beam.cum_logprob, reverse=True)
        self.live = going_on[: self._params.beam_width]

    def output(self) -> BeamSearchOutput:
        """The best of all beams; those that live end here."""
        for beam in self.live:
            beam.finish_reason = "length"
        beams = sorted(
            self._ended + self.live,
            key=lambda beam: beam.score(self._params.length_penalty),
            reverse=True,
        )
        return BeamSearchOutput(beams[: self._params.beam_width])


def _longer(
    beam: BeamSearchSequence, token: int, likeliest: dict[int, Logprob], ending_ids: Collection[int]
) -> BeamSearchSequence:
    return BeamSearchSequence(
        [*beam.tokens, token],
        [*beam.logprobs, likeliest],
        beam.cum_logprob + likeliest[token].logprob,
        finish_reason="stop" if token in ending_ids else None,
    )


def search(
    prompts: list[list[int]],
    params: BeamSearchParams,
    ending_ids: Collection[int],
    continue_: Continue,
) -> list[BeamSearchOutput]:
    """The best continuations of each prompt; all prompts advance by a token at once."""
    searches = [Beams(prompt, params, ending_ids) for prompt in prompts]
    for _ in range(params.max_tokens):
        live = [beam.tokens for beams in searches for beam in beams.live]
        if not live:
            break
        found = iter(continue_(live))
        for beams in searches:
            beams.extend([next(found) for _ in beams.live])
    return [beams.output() for beams in searches]
