"""MaskMaker: the constraints of a whole batch, as the array that the device takes.

A mask needs every token before the one that it is for. So a batch that samples such a sequence runs
as two programs, and masks are made between them: while the device runs the first.
"""

from typing import Any

import numpy as np

from fastgen_jax.engine.constraint import mask_width
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
        matchers = [(c.matcher, i) for i, c, _ in constrained if c.matcher is not None]
        if matchers:
            self._fill(matchers, masks)
        for i, constraint, output_ids in constrained:
            constraint.narrow(masks[i], output_ids)
        return masks

    def _fill(self, matchers: list[tuple[Any, int]], masks: np.ndarray) -> None:
        from llguidance import LLExecutor

        if self._threads is None:
            self._threads = LLExecutor()
        n_rows, width = masks.shape
        address, line_size = masks.ctypes.data, width * masks.itemsize
        self._threads.unsafe_compute_mask_ptr(matchers, address, line_size, n_rows)
