"""Pooled: one vector of a prompt, made from what each step leaves of its tokens' hidden states."""

import numpy as np

from fastgen_jax.sampling_params import Pooling


class Pooled:
    """The vector of one prompt in the making: of its last token, or the mean of all.

    A step sums hidden states on the device, of each chunk those from `n_left_out` on. Chunks are
    added in order; one that begins the prompt begins the vector anew, so that nothing counts twice
    when a sequence is recomputed.
    """

    def __init__(self, pooling: Pooling):
        self.needs_all = pooling == "mean"  # tokens, so that none may come from the prefix cache
        self._sum: np.ndarray | None = None

    def n_left_out(self, n_new: int) -> int:
        """Leading tokens of a chunk whose hidden states are not summed."""
        return 0 if self.needs_all else n_new - 1

    def add(self, chunk_sum: np.ndarray, start: int) -> None:
        """Takes in f32[D] of the chunk that begins with token `start`."""
        if self.needs_all and start > 0:
            assert self._sum is not None, start
            self._sum = self._sum + chunk_sum
        else:
            self._sum = chunk_sum

    @property
    def is_finite(self) -> bool:
        return self._sum is not None and bool(np.isfinite(self._sum).all())

    def vector(self, n_prompt: int) -> np.ndarray:
        """f32[D], once the last chunk was added."""
        assert self._sum is not None
        return self._sum / np.float32(n_prompt) if self.needs_all else self._sum


def normalized(vector: np.ndarray) -> np.ndarray:
    """f32[D] of Euclidean length 1; zeros stay."""
    wide = vector.astype(np.float64)
    length = np.linalg.norm(wide)
    return (wide / length if length else wide).astype(np.float32)
