"""What FastGen measures of answers: rates, latencies, and how many met a service level.

A request meets the level of R tokens/s if its first token came within n_prompt / 512 s and the
moving average of the times between its tokens was below 1/R throughout (Holmes et al., 2024, and
the harness in DeepSpeedExamples, benchmarks/inference/mii).
"""

import itertools
from array import array
from collections.abc import Sequence

import numpy as np

from benchmarks.simulation.replica import Job
from fastgen_jax.server.attainment import PROMPT_RATE, Pace

LEVELS = (2, 4, 6)  # tokens/s


def worst_average(gaps: Sequence[float]) -> float:
    """The highest value of the exponentially weighted mean; 0 of no gaps."""
    pace = Pace()
    for gap in gaps:
        pace.add(gap)
    return pace.slowest


class Record:
    """What became of each job, in the order of their ends; all of a job in 7 numbers, and the times
    between tokens of one in `one_in`.
    """

    def __init__(self, one_in: int = 1):
        self.arrival, self.first, self.seconds, self.worst = (array("d") for _ in range(4))
        self.n_prompt, self.n_output = array("l"), array("l")
        self.gaps = array("d")
        self.n_failed = 0
        self.n_reused = 0
        self._one_in = one_in

    def __len__(self) -> int:
        return len(self.arrival)

    def add(self, job: Job) -> None:
        if job.has_failed:
            self.n_failed += 1
            return
        times = job.times
        gaps = [b - a for a, b in itertools.pairwise(times)]
        if len(self) % self._one_in == 0:
            self.gaps.extend(gaps[:-1])  # the harness leaves out first and last token
        self.arrival.append(job.time)
        self.first.append(times[0] - job.time)
        self.seconds.append(times[-1] - job.time)
        self.worst.append(worst_average(gaps))
        self.n_prompt.append(job.n_prompt)
        self.n_output.append(job.n_output)
        self.n_reused += job.n_reused

    @property
    def elapsed(self) -> float:
        """Seconds from the first arrival to the last end."""
        arrival = np.array(self.arrival)
        return float((arrival + self.seconds).max() - arrival.min())

    def has_met(self, level: float) -> np.ndarray:
        is_prompt = np.array(self.first) <= np.array(self.n_prompt) / PROMPT_RATE
        return is_prompt & (np.array(self.worst) < 1 / level)

    def summary(self) -> dict[str, float]:
        n, elapsed = len(self), self.elapsed
        mean = float(np.mean(self.seconds))
        found = {
            "requests": n,
            "failed": self.n_failed,
            "requests/s": n / elapsed,
            "tokens/s": sum(self.n_output) / elapsed,
            "mean latency": mean,
        }
        for name, values in (("TTFT", self.first), ("token", self.gaps), ("latency", self.seconds)):
            for p in (50, 90, 95, 99):
                found[f"{name} P{p}"] = float(np.percentile(values, p)) if values else np.nan
        for level in LEVELS:
            found[f"effective@{level}"] = float(self.has_met(level).sum()) / elapsed
        return found
