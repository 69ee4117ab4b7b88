"""Scoring: the log probabilities of a prompt's tokens, made from what each step leaves of them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, overload

import numpy as np

from fastgen_jax.sampling_params import MAX_LOGPROBS

SCORE_SIZE = 1 + 2 * MAX_LOGPROBS
NO_TOKEN = -1
N_READ = 64  # positions that become objects at once


class TokenLogprobs(NamedTuple):
    """Natural-log probabilities at one position, of the raw logits in float32."""

    logprob: float  # of the token that is there
    top: list[tuple[int, float]]  # the most likely (token id, logprob), best first


class Scores(NamedTuple):
    """Numpy results, a line for each scored position."""

    logprobs: np.ndarray  # f32[N]
    top_ids: np.ndarray  # i32[N, MAX_LOGPROBS], of any value where nobody asked; or NO_TOKEN
    top_logprobs: np.ndarray  # f32[N, MAX_LOGPROBS]

    @classmethod
    def unpack(cls, packed: np.ndarray) -> "Scores":
        """Of i32[N, SCORE_SIZE]."""
        floats, split = packed.view(np.float32), 1 + MAX_LOGPROBS
        return cls(floats[:, 0], packed[:, 1:split], floats[:, split:])

    def cut(self, start: int, end: int) -> "Scores":
        return Scores(*(lines[start:end] for lines in self))


class Scoring:
    """The scores of one prompt in the making.

    Position p is scored by the hidden state of token p - 1, in the step that computes it, and once:
    a sequence that is recomputed goes on from `next`.
    """

    def __init__(self, first: int, n_prompt: int, n_top: int):
        self.next = first  # position that is not scored yet
        self.n_top = n_top
        self._n_prompt = n_prompt
        self._scores: list[Scores] = []

    @property
    def n_cacheable(self) -> float:
        """Leading tokens that need not be computed again."""
        return self.next - 1 if self.next < self._n_prompt else np.inf

    def due(self, start: int, n_new: int) -> range:
        """Positions that the chunk of these tokens scores."""
        return range(max(start + 1, self.next), min(start + n_new + 1, self._n_prompt))

    def add(self, scores: Scores, positions: range) -> None:
        """Takes in those of a chunk's positions, in order."""
        assert positions.start == self.next, (positions, self.next)
        self._scores.append(scores)
        self.next = positions.stop

    @property
    def is_finite(self) -> bool:
        return all(np.isfinite(scores.logprobs).all() for scores in self._scores)

    def logprobs(self) -> "PromptLogprobs":
        """Of all positions, once all are scored."""
        assert self.next == self._n_prompt, (self.next, self._n_prompt)
        return PromptLogprobs(self._scores, self.n_top)


class PromptLogprobs(Sequence[TokenLogprobs]):
    """What was asked of each scored position, made when it is read: the objects of a long prompt
    take long to make, ten times the room, and time of each collection of garbage.
    """

    def __init__(self, parts: list[Scores], n_top: int):
        self._parts = [
            part.cut(start, start + N_READ)
            for part in parts
            for start in range(0, len(part.logprobs), N_READ)
        ]
        self._ends = np.cumsum([len(part.logprobs) for part in self._parts], dtype=np.int64)
        self._n_top = n_top

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __iter__(self) -> Iterator[TokenLogprobs]:
        for part in self._parts:
            yield from token_logprobs(part, self._n_top)

    @overload
    def __getitem__(self, index: int) -> TokenLogprobs: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenLogprobs]: ...
    def __getitem__(self, index: int | slice) -> TokenLogprobs | list[TokenLogprobs]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        i = int(np.searchsorted(self._ends, index, side="right"))
        line = index - int(self._ends[i]) + len(self._parts[i].logprobs)
        return token_logprobs(self._parts[i].cut(line, line + 1), self._n_top)[0]


def token_logprobs(scores: Scores, n_top: int) -> list[TokenLogprobs]:
    """What was asked of each line."""
    top_ids, top_logprobs = scores.top_ids[:, :n_top], scores.top_logprobs[:, :n_top]
    lines = zip(scores.logprobs.tolist(), top_ids.tolist(), top_logprobs.tolist(), strict=True)
    return [
        TokenLogprobs(own, [top for top in zip(ids, tops, strict=True) if top[0] != NO_TOKEN])
        for own, ids, tops in lines
    ]
