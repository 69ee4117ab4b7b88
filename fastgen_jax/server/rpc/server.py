"""RpcServer: gRPC on its own port, in the HTTP server's event loop and with its life."""

import asyncio
import logging
import socket
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2_grpc

from fastgen_jax.errors import FastGenError
from fastgen_jax.server.certificates import Certificates
from fastgen_jax.server.config import ServerConfig
from fastgen_jax.server.rpc import calls, health, reflection
from fastgen_jax.server.rpc.requests import check_parser
from fastgen_jax.server.service import Service

log = logging.getLogger("fastgen_jax.server")

MAX_CALLS = 2048  # at once, all together
MAX_METADATA = 16_384  # bytes
OPTIONS = {
    "grpc.so_reuseport": 0,  # or two servers would share a port
    "grpc.max_concurrent_streams": 1024,
    "grpc.max_metadata_size": MAX_METADATA,  # between this and the next it would be chance
    "grpc.absolute_max_metadata_size": MAX_METADATA,
    "grpc.compression_enabled_algorithms_bitset": 1,  # none: small ones could become large
    # A client that is gone without a word is found out, one that pings more often is cut.
    "grpc.keepalive_time_ms": 30_000,
    "grpc.keepalive_timeout_ms": 10_000,
    "grpc.http2.min_ping_interval_without_data_ms": 10_000,
    "grpc.http2.max_ping_strikes": 3,
    "grpc.max_connection_idle_ms": 300_000,
}


class RpcServer:
    """Takes over the address of `listener`, which has kept it until the event loop runs."""

    def __init__(
        self,
        service: Service,
        config: ServerConfig,
        listener: socket.socket,
        certificates: Certificates | None = None,
    ):
        check_parser()
        self.calls = calls.Calls(service, config)
        self._health = health.Health(service, (calls.NAME,))
        self._max_bytes = config.max_body_bytes
        self._certificates = certificates
        self._listener = listener
        self._server: grpc.aio.Server | None = None
        self._draining: asyncio.Task | None = None

    async def start(self):
        """Raises FastGenError if the address has been taken since the listener let go of it."""
        self._server = server = grpc.aio.server(
            options=[*OPTIONS.items(), ("grpc.max_receive_message_length", self._max_bytes)],
            maximum_concurrent_rpcs=MAX_CALLS,
        )
        names = (calls.NAME, health.NAME)
        handlers = [self.calls.handler(), *reflection.handlers(self.calls.door, names)]
        server.add_generic_rpc_handlers(handlers)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        host, port = self._listener.getsockname()[:2]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._listener.close()
        try:
            self._listen(server, address)
        except RuntimeError:
            raise FastGenError(f"cannot listen on {address}; choose another --grpc-port") from None
        await server.start()
        log.info("gRPC     %s is open", address)

    def drain(self, seconds: float):
        """Takes no new calls; those under way have so many seconds."""
        if self._server is not None:
            self._draining = asyncio.create_task(self._server.stop(seconds))

    async def stop(self):
        """Ends what is still under way."""
        if self._server is not None:
            await self._server.stop(None)

    def _listen(self, server: grpc.aio.Server, address: str):
        if self._certificates is None:
            server.add_insecure_port(address)
        else:
            server.add_secure_port(address, _credentials(self._certificates))


def _credentials(certificates: Certificates) -> grpc.ServerCredentials:
    """INVARIANT: each connection gets the pair whose context HTTPS uses too."""
    used = certificates.context

    def read() -> grpc.ServerCertificateConfiguration:
        key, cert = Path(certificates.key).read_bytes(), Path(certificates.cert).read_bytes()
        return grpc.ssl_server_certificate_configuration([(key, cert)])

    def newer() -> grpc.ServerCertificateConfiguration | None:
        """Asked at each handshake, by a thread of gRPC's."""
        nonlocal used
        if certificates.context is used:
            return None
        used = certificates.context
        return read()

    return grpc.dynamic_ssl_server_credentials(read(), newer)  # type: ignore[arg-type]
