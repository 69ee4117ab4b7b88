"""Step times as a function of what a step holds, and the token budget that follows from them.

    seconds = max(a, b T) + c sum(C) + d sum(q C)

T: tokens that the program computes, padding included. q and C: of each chunk, its new tokens and
those in the cache after the step. a: weights read and fixed costs; b: products; c: cells read; d:
scores computed.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

N_FITS = 4  # each with the errors' scale of the one before
KNEE = 0.95  # of the most tokens per second that any program reaches


class Work(NamedTuple):
    """What a step computes."""

    n_tokens: int  # sum of q
    n_context: int  # sum of C
    n_pairs: float  # sum of q C


class Surface(NamedTuple):
    """Seconds of a step; `sizes` are the programs' tokens, to which T is padded."""

    a: float
    b: float
    c: float
    d: float
    sizes: tuple[int, ...] = ()

    def __call__(self, work: Work) -> float:
        n = padded(work.n_tokens, self.sizes)
        return max(self.a, self.b * n) + self.c * work.n_context + self.d * work.n_pairs

    def size_within(self, seconds: float, decodes: Work, cached: int) -> int:
        """Tokens of the largest program that takes at most so long with these decodes and a chunk,
        of a sequence with so many tokens in the cache, that fills it up; 0: none does.
        """
        for size in reversed(self.sizes):
            q = max(size - decodes.n_tokens, 0)
            c = cached + q if q else 0
            work = Work(size, decodes.n_context + c, decodes.n_pairs + q * c)
            if self(work) <= seconds:
                return size
        return 0

    def tokens_within(self, seconds: float) -> int:
        """The most tokens, of any number up to the largest size, that take at most so long where
        nothing is in the cache; 0: not even one.
        """
        if seconds < self.a:
            return 0
        most = max(self.sizes)
        return min(int(seconds / self.b), most) if self.b * most > seconds else most

    def knee(self) -> int:
        """The smallest size whose tokens per second are nearly the most."""
        rates = {n: n / self(Work(n, 0, 0.0)) for n in self.sizes}
        return min(n for n, rate in rates.items() if rate >= KNEE * max(rates.values()))


def padded(n_tokens: int, sizes: Iterable[int]) -> int:
    return next((size for size in sizes if size >= n_tokens), n_tokens)


def fit(works: Sequence[Work], seconds: Sequence[float], sizes: tuple[int, ...] = ()) -> Surface:
    """The surface of least squared relative errors, nothing negative. Where the plateau ends is
    tried at every size that occurs. Errors are relative to what is fitted, so that the mean of
    noisy times is met, not their least.
    """
    t = np.array([padded(work.n_tokens, sizes) for work in works], float)
    rest = np.array([work[1:] for work in works], float)
    y = np.array(seconds)
    scale, best = np.full_like(y, y.mean()), None
    for _ in range(N_FITS):
        best = min((_fit_to(end, t, rest, y, scale) for end in np.unique(t)), key=lambda f: f[0])
        scale = best[1]
    assert best is not None
    a, b, c, d = map(float, best[2])
    return Surface(a, b, c, d, sizes)


def _fit_to(end: float, t: np.ndarray, rest: np.ndarray, y: np.ndarray, scale: np.ndarray):
    """Error, fitted seconds and a, b, c, d of a plateau that ends there."""
    from scipy.optimize import nnls

    is_flat = t <= end
    columns = np.column_stack([is_flat, t * ~is_flat, rest]) / scale[:, None]
    (a, b, c, d), _ = nnls(columns, y / scale)
    fitted = np.maximum(a, b * t) + rest @ (c, d)
    return np.square((y - fitted) / scale).sum(), fitted, (a, b, c, d)
