"""Constraint: which tokens one sequence may say next, as packed bits for the device."""

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from fastgen_jax.grammar import Grammar

WORD = 32  # tokens per element of a mask


def mask_width(vocab_size: int) -> int:
    return -(-vocab_size // WORD)


def bits(token_ids: Iterable[int], vocab_size: int) -> np.ndarray:
    """i32[W], the bits of these tokens set: token t is bit t % 32 of element t // 32."""
    is_set = np.zeros(mask_width(vocab_size) * WORD, bool)
    is_set[list(token_ids)] = True
    return np.packbits(is_set, bitorder="little").view(np.int32)


class Constraint:
    """What one sequence may say, given what it has said.

    INVARIANT: the grammar's matcher has consumed exactly the sequence's output, but for a token
    that ended it.

    Args:
        grammar: None allows every text.
        allowed_token_ids: what may be said at all; None: everything.
        bad_words: runs of token ids that may not be completed.
        ending_ids: tokens that end the sequence, possible where the grammar may end.
        eos_token_ids: how the grammar's matcher calls its end.
    """

    def __init__(
        self,
        *,
        grammar: Grammar | None,
        allowed_token_ids: Collection[int] | None,
        bad_words: Collection[tuple[int, ...]],
        ending_ids: Collection[int],
        eos_token_ids: Collection[int],
        vocab_size: int,
    ):
        self.matcher: Any = None
        if grammar is not None:
            self.matcher, self.n_tokens = grammar.matcher.deep_copy(), grammar.n_tokens
        self._allowed = None if allowed_token_ids is None else bits(allowed_token_ids, vocab_size)
        self._bad_words = bad_words
        self._ending = bits(ending_ids, vocab_size)
        self._not_eos = ~bits(eos_token_ids, vocab_size)

    @property
    def problem(self) -> str:
        """Why the grammar cannot go on; empty while it can."""
        return self.matcher.get_error() if self.matcher and self.matcher.is_error() else ""

    def advance(self, token_id: int) -> bool:
        """Takes the sequence's next token; whether another one can follow. If none can, the grammar
        is complete, or has the `problem`.
        """
        if self.matcher is None:
            return True
        self.matcher.consume_token(token_id)
        return not self.matcher.is_stopped()

    def narrow(self, mask: np.ndarray, output_ids: list[int]) -> None:
        """Completes the mask that the matcher has made, or all ones, in place."""
        if self.matcher is not None:
            mask &= self._not_eos
            if self.matcher.is_accepting():
                mask |= self._ending
        if self._allowed is not None:
            mask &= self._allowed
        for *start, last in self._bad_words:
            if output_ids[len(output_ids) - len(start) :] == start:
                mask[last // WORD] &= ~np.int32(np.uint32(1 << last % WORD).view(np.int32))
