"""grpc.health.v1: what /health says, in gRPC's protocol. It needs no key."""

import asyncio
from typing import Any

import grpc
from grpc.aio import ServicerContext
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from fastgen_jax.server.service import Service

NAME = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
LOOK_EVERY = 0.5  # seconds between looks of who watches


class Health(health_pb2_grpc.HealthServicer):
    """Args:
    names: the services that share the server's health; "" is the server.
    """

    def __init__(self, service: Service, names: tuple[str, ...]):
        self.service = service
        self.names = ("", *names)

    async def Check(self, request: HealthCheckRequest, context: ServicerContext) -> Any:
        if request.service not in self.names:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service")
        return HealthCheckResponse(status=self._status(request.service))

    async def Watch(self, request: HealthCheckRequest, context: ServicerContext):
        """The status, and again whenever it changes."""
        told = None
        while True:
            status = self._status(request.service)
            if status != told:
                await context.write(HealthCheckResponse(status=status))
                told = status
            await asyncio.sleep(LOOK_EVERY)

    def _status(self, name: str) -> Any:
        if name not in self.names:
            return HealthCheckResponse.SERVICE_UNKNOWN
        is_ready, _ = self.service.health()
        return HealthCheckResponse.SERVING if is_ready else HealthCheckResponse.NOT_SERVING
