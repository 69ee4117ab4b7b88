"""Requests by length and time: FastGen's, skewed ones, and clients."""

import itertools
from collections.abc import Iterator

import numpy as np

from benchmarks.simulation.replica import Job

STD = 0.3  # of the mean, as in FastGen's evaluation
AT_ONCE = 1024  # drawn together


def normal(prompt: int, new: int, *, longest: int = 4096, seed: int = 42) -> Iterator[Job]:
    """FastGen's: both lengths normal; a prompt has at most 4000 tokens and leaves room for its
    answer.
    """
    rng = np.random.default_rng(seed)
    while True:
        prompts = rng.normal(prompt, STD * prompt, AT_ONCE).astype(int)
        news = np.maximum(rng.normal(new, STD * new, AT_ONCE).astype(int), 1)
        for n_prompt, n_new in zip(prompts.tolist(), news.tolist(), strict=True):
            yield Job(0.0, max(min(n_prompt, 4000, longest - n_new), 1), n_new)


def skewed(prompt: int, new: int, *, longest: int = 4096, seed: int = 42) -> Iterator[Job]:
    """Both lengths lognormal with a sigma of 1, of these means before they are cut."""
    rng = np.random.default_rng(seed)
    means = np.log([prompt, new]) - 0.5
    while True:
        drawn = np.ceil(rng.lognormal(means, 1.0, (AT_ONCE, 2))).astype(int)
        for n_prompt, n_new in drawn.tolist():
            n_new = min(n_new, longest // 2)
            yield Job(0.0, min(n_prompt, longest - n_new), n_new)


LENGTHS = {"normal": normal, "skewed": skewed}


def arriving(jobs: Iterator[Job], rate: float, n: int, seed: int = 1) -> Iterator[Job]:
    """So many of them, as a Poisson process."""
    rng, now = np.random.default_rng(seed), 0.0
    while n > 0:
        for gap in rng.exponential(1 / rate, min(n, AT_ONCE)).tolist():
            now += gap
            job = next(jobs)
            job.time = now
            yield job
        n -= AT_ONCE


def of_clients(jobs: Iterator[Job], n_clients: int, n: int, seed: int = 1) -> Iterator[Job]:
    """So many of them, the first ones a little apart: 0 to 0.01 s for each client, as FastGen's."""
    starts = np.sort(np.random.default_rng(seed).uniform(0, 0.01 * n_clients, n_clients))
    for i, job in enumerate(itertools.islice(jobs, n)):
        job.time = float(starts[i]) if i < n_clients else 0.0
        yield job
