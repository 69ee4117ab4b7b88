"""A cluster from names: chip, model, policy, router."""

from typing import NamedTuple

from benchmarks.policies import POLICIES
from benchmarks.simulation.chips import CHIPS, MODELS, n_cells
from benchmarks.simulation.cluster import ROUTERS, Cluster, Failure
from benchmarks.simulation.measures import Record
from benchmarks.simulation.replica import Replica, sizes
from benchmarks.simulation.step_time import Published, Roofline, StepTime

WHOLE = {"static", "orca", "vllm-2023"}  # which run whole prompts


class Setup(NamedTuple):
    """What is simulated."""

    chip: str = "a100"
    model: str = "llama-2-70b"
    n_chips: int = 4  # of a replica
    step_time: str = "roofline"  # or published
    share: float = 1.0  # of the roofline that is reached
    host: float = 0.0  # seconds between steps
    policy: str = "splitfuse"
    budget: int = 768
    max_seqs: int = 256
    block_size: int = 64
    max_model_len: int = 4096
    n_replicas: int = 1
    routing: str = "round-robin"
    is_ahead: bool = True  # a step is planned while the one before runs

    @property
    def largest_step(self) -> int:
        """Tokens: those that run whole prompts have room for the longest."""
        is_whole = self.policy in WHOLE
        return max(self.budget, self.max_model_len) if is_whole else self.budget

    def seconds(self) -> StepTime:
        if self.step_time == "published":
            assert self.chip == "a100", "the published curve is of an A100"
            return Published.scaled(self.model, self.n_chips, self.host)
        roofline = Roofline(CHIPS[self.chip], MODELS[self.model], self.n_chips, self.share)
        return lambda work: roofline(work) + self.host

    def cluster(self, record: Record, *, seed: int = 1, failures: tuple[Failure, ...] = ()):
        """Replicas, empty, whose ends go to the record."""
        cells = n_cells(CHIPS[self.chip], MODELS[self.model], self.n_chips)
        config = sizes(
            budget=self.largest_step,
            max_seqs=self.max_seqs,
            n_blocks=1 + cells // self.block_size,
            block_size=self.block_size,
            max_model_len=self.max_model_len,
        )
        seconds, policy = self.seconds(), POLICIES[self.policy]
        replicas = [
            Replica(str(i), config, seconds, policy=policy, is_ahead=self.is_ahead)
            for i in range(self.n_replicas)
        ]
        return Cluster(replicas, ROUTERS[self.routing](seed), record.add, failures)
