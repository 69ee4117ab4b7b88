"""How long a step takes: from a fitted surface, from a roofline, or from FastGen's published curve.

All three see counts only. Seconds are of the device; what the host adds is said beside.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

from benchmarks.simulation.chips import CHIPS, MODELS, Chip, Model
from fastgen_jax.engine.surface import Work

StepTime = Callable[[Work], float]


class Roofline(NamedTuple):
    """The least seconds of a step: products, then attention, each bound by what it reads or by
    what it computes; then the sums over chips, which tensor parallelism needs twice a layer.
    """

    chip: Chip
    model: Model
    n_chips: int = 1
    share: float = 1.0  # of the chip's published numbers that is reached

    def __call__(self, work: Work) -> float:
        chip, model, n = self.chip, self.model, self.n_chips * self.share
        t = work.n_tokens
        products = max(2 * model.n_read(t) / chip.bandwidth, 2 * model.n_active * t / chip.flops)
        activations = 24 * t * model.n_layers * model.width / chip.bandwidth
        return (products + activations) / n + self.attention(work) + self.exchange(t)

    def attention(self, work: Work) -> float:
        model, n = self.model, self.n_chips * self.share
        n_bytes = (work.n_context + work.n_tokens) * model.cell
        flops = 4 * model.n_layers * model.n_heads * model.head_dim * work.n_pairs
        return max(n_bytes / self.chip.bandwidth, flops / self.chip.flops) / n

    def exchange(self, n_tokens: int) -> float:
        """A ring's all-reduce of the hidden states in bfloat16, by bandwidth alone."""
        sent = 2 * (self.n_chips - 1) / self.n_chips * 2 * n_tokens * self.model.width
        return 2 * self.model.n_layers * sent / (self.chip.link * self.share)


# FastGen's insight, read off its two panels (reference: the blog of November 2023, figures of
# latency and of TFLOP/s by tokens in a forward pass on an A100).
LATENCY = {64: 0.025, 768: 0.095, 1024: 0.130, 2048: 0.257}  # seconds
TFLOPS = {64: 75, 128: 115, 256: 184, 384: 202, 512: 197, 768: 215, 1024: 208}


def published_weights() -> list[float]:
    """How many weights the published model has, where both panels have a point: 2 N T = flops t."""
    both = sorted(LATENCY.keys() & TFLOPS.keys())
    return [TFLOPS[t] * 1e12 * LATENCY[t] / (2 * t) for t in both]


class Published(NamedTuple):
    """Seconds of a step from FastGen's published forward pass on one A100.

    Both panels together say that its model has 13 billion weights. So many weights a chip take as
    long in another model; attention and the chips' exchange, which the curve does not tell, are
    their rooflines. `host` is what passes between two steps.
    """

    products: list[float]  # by tokens, one chip
    roofline: Roofline
    host: float = 0.0

    @classmethod
    def scaled(cls, model: str, n_chips: int, host: float = 0.0) -> "Published":
        base, other = MODELS["llama-2-13b"], MODELS[model]
        from_flops = {t: 2 * base.n_linear * t / (x * 1e12) for t, x in TFLOPS.items()}
        points = sorted((from_flops | LATENCY).items())
        ratio = other.n_linear / n_chips / base.n_linear
        products = [ratio * t for t in _interpolated(points, 8192)]
        return cls(products, Roofline(CHIPS["a100"], other, n_chips), host)

    def __call__(self, work: Work) -> float:
        t = work.n_tokens
        rest = self.roofline.attention(work) + self.roofline.exchange(t)
        return self.products[t] + rest + self.host


def _interpolated(points: Iterable[tuple[int, float]], last: int) -> list[float]:
    """The broken line through points at 0 .. last; its first and last pieces go on."""
    points = list(points)
    found = []
    for x in range(last + 1):
        pieces = list(itertools.pairwise(points))
        (x0, y0), (x1, y1) = next((p for p in pieces if x <= p[1][0]), pieces[-1])
        found.append(y0 + (y1 - y0) * (x - x0) / (x1 - x0))
    return found
