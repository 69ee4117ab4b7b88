"""TokenPolicy: our policy where Ray asks how many replicas there should be."""

import math
from typing import Any

from ray.serve.config import AutoscalingContext  # pyright: ignore[reportMissingImports]

from fastgen_jax.cluster.policy import wanted_replicas

WAITING_TOKENS, MAX_NUM_SEQS = "waiting_tokens", "max_num_seqs"  # what replicas report


class TokenPolicy:
    """Ray applies bounds and delays to the number.

    Args:
        waiting_tokens: prompt tokens that may wait per replica.
    """

    def __init__(self, waiting_tokens: int):
        self.waiting_tokens = waiting_tokens

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        reported = context.aggregated_metrics or {}
        n_replicas = wanted_replicas(
            n_waiting_tokens=sum(reported.get(WAITING_TOKENS, {}).values()),
            n_requests=context.total_num_requests,
            waiting_tokens=self.waiting_tokens,
            max_num_seqs=max(reported.get(MAX_NUM_SEQS, {}).values(), default=math.inf),
        )
        return n_replicas, {}
