"""MaskMaker: the constraints of a whole batch, as the array that the device takes.

A mask needs every token before the one that it is for. So a batch that samples such a sequence runs
as two programs, and masks are made between them: while the device runs the first.
"""

from typing import Any

import numpy as np

from fastgen_jax.engine.constraint import Constraint, mask_width
from fastgen_jax.engine.types import Sequence


class MaskMaker:
    """Makes the masks of whole batches, on threads of its own.

    Args:
        vocab_size: of the model.
    """

    def __init__(self, vocab_size: int):
        self._width = mask_width(vocab_size)
        self._threads: Any = None

    def make(self, sequences: list[Sequence], n_rows: int) -> np.ndarray:
        """i32[n_rows, W]: a line per sequence; all ones where nothing constrains, and beyond."""
        masks = np.full((n_rows, self._width), -1, np.int32)
        constrained = [
            (i, sequence.constraint, sequence.output_ids)
            for i, sequence in enumerate(sequences)
            if sequence.constraint is not None and not sequence.is_finished
        ]
        with_grammar = [(i, c) for i, c, _ in constrained if c.matcher is not None]
        if with_grammar:
            rows, constraints = zip(*with_grammar, strict=True)
            masks[list(rows)] = self._of_grammars(constraints)[:, : self._width]
        for i, constraint, output_ids in constrained:
            constraint.narrow(masks[i], output_ids)
        return masks

    def _of_grammars(self, constraints: tuple[Constraint, ...]) -> np.ndarray:
        """Their matchers' masks, which are as wide as the tokenizer's vocabulary wants them."""
        from llguidance import LLExecutor

        if self._threads is None:
            self._threads = LLExecutor()
        width = mask_width(constraints[0].n_tokens)
        masks = np.zeros((len(constraints), width), np.int32)
        matchers = [(constraint.matcher, i) for i, constraint in enumerate(constraints)]
        line_size = width * masks.itemsize
        self._threads.unsafe_compute_mask_ptr(matchers, masks.ctypes.data, line_size, len(masks))
        return masks
