"""Step times as a function of what a step holds, and the token budget that follows from them.

    seconds = e + max(a, b T) + c sum(C) + d sum(q (C - (q - 1) / 2))

T: tokens that the program computes, padding included. q and C: of each chunk, its new tokens and
those in the cache after the step. e: launches and the host; a: weights read; b: products; c: cells
read; d: scores computed, which are causal.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

N_ENDS = 60
KNEE = 0.95  # of the most tokens per second that any program reaches


class Work(NamedTuple):
    """What a step computes."""

    n_tokens: int  # sum of q
    n_context: int  # sum of C
    n_pairs: float  # of a query and a key that it sees

    @classmethod
    def of(cls, chunks: Iterable[tuple[int, int]]) -> "Work":
        """Chunks: q and C of each."""
        n_tokens = n_context = 0
        n_pairs = 0.0
        for q, c in chunks:
            n_tokens, n_context = n_tokens + q, n_context + c
            n_pairs += q * (c - (q - 1) / 2)
        return cls(n_tokens, n_context, n_pairs)

    def __add__(self, other: "Work") -> "Work":  # type: ignore[override]
        n_tokens, n_context, n_pairs = other
        return Work(self.n_tokens + n_tokens, self.n_context + n_context, self.n_pairs + n_pairs)


class Surface(NamedTuple):
    """Seconds of a step; `sizes` are the programs' tokens, to which T is padded."""

    e: float
    a: float
    b: float
    c: float
    d: float
    sizes: tuple[int, ...] = ()

    def __call__(self, work: Work) -> float:
        n = padded(work.n_tokens, self.sizes)
        products = max(self.a, self.b * n)
        return self.e + products + self.c * work.n_context + self.d * work.n_pairs

    def size_within(self, seconds: float, decodes: Work, cached: int) -> int:
        """Tokens of the largest program that takes at most so long with these decodes and a chunk,
        of a sequence with so many tokens in the cache, that fills it up; 0: none does.
        """
        for size in reversed(self.sizes):
            q = size - decodes.n_tokens
            work = decodes + Work.of([(q, cached + q)] if q > 0 else [])
            if self(work) <= seconds:
                return size
        return 0

    def tokens_within(self, seconds: float) -> int:
        """The most tokens, of any number up to the largest size, that take at most so long where
        nothing is in the cache; 0: not even one.
        """
        left, most = seconds - self.e, max(self.sizes)
        if left < self.a:
            return 0
        return min(int(left / self.b), most) if self.b * most > left else most

    def knee(self) -> int:
        """The smallest size whose tokens per second are nearly the most."""
        rates = {n: n / self(Work(n, 0, 0.0)) for n in self.sizes}
        return min(n for n, rate in rates.items() if rate >= KNEE * max(rates.values()))


def padded(n_tokens: int, sizes: Iterable[int]) -> int:
    return next((size for size in sizes if size >= n_tokens), n_tokens)


def fit(works: Sequence[Work], seconds: Sequence[float], sizes: tuple[int, ...] = ()) -> Surface:
    """The surface of least squared errors, nothing negative, as shares of what steps of a size take
    on the average: shares of each step's own time would find the least of noisy times, not their
    mean. N_ENDS ends of the plateau are tried; at the smallest size there is none.
    """
    from scipy.optimize import nnls

    t = np.array([padded(work.n_tokens, sizes) for work in works], float)
    rest = np.array([work[1:] for work in works], float)
    y = np.array(seconds)
    _, group, count = np.unique(t, return_inverse=True, return_counts=True)
    scale = (np.bincount(group, y) / count)[group]
    fits = []
    for end in np.geomspace(t.min(), t.max(), N_ENDS):
        columns = np.column_stack([np.ones_like(t), np.maximum(t, end), rest])
        found, error = nnls(columns / scale[:, None], y / scale)
        fits.append((error, end, found))
    _, end, (e, b, c, d) = min(fits, key=lambda fit: fit[0])
    return Surface(float(e), float(b * end), float(b), float(c), float(d), sizes)
