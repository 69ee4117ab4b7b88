"""TokenRouter: our policy where Ray asks for one. It lives beside each handle of the engines, so in
each ingress, and knows of the requests that went through that.
"""

import random

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica  # pyright: ignore[reportMissingImports]

from fastgen_jax.cluster.policy import Placement
from fastgen_jax.cluster.ticket import Ticket


class TokenRouter(RequestRouter):
    """Ranks replicas by outstanding tokens and prefixes; Ray takes the first that has room."""

    def initialize_state(self, **kwargs: object):
        self.placement = Placement(random.Random())

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        if not candidate_replicas:
            return []
        ticket = Ticket()
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # once all have been found full
            ticket = ticket_of(pending_request)
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        names = self.placement.rank(list(replicas), ticket)
        if pending_request is not None:  # others choose before this one is sent
            self.placement.place(pending_request.metadata.internal_request_id, names[0], ticket)
        return [[replicas[name]] for name in names]

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """Notes where the request goes in the end, or that it goes nowhere. Ray has no public name
        for the moment, since its own routers count nothing.
        """
        request, ticket = pending_request.metadata.internal_request_id, ticket_of(pending_request)
        try:
            replica = await super()._choose_replica_for_request(pending_request, is_retry=is_retry)
        except BaseException:
            self.placement.end(request)
            raise
        self.placement.place(request, replica.replica_id.unique_id, ticket)
        ticket.tried.append(replica.replica_id.unique_id)
        return replica

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str):
        self.placement.end(internal_request_id, replica_id.unique_id)


def ticket_of(request: PendingRequest) -> Ticket:
    """The ticket that comes with the call; one of its own for a call that brings none."""
    ticket = request.args[0] if request.args else None
    return ticket if isinstance(ticket, Ticket) else Ticket()
