"""The listening socket and its address. Imports nothing of weight: the port opens first of all."""

import socket

from fastgen_jax.errors import ConfigError

BACKLOG = 65_535  # connections not yet accepted; the kernel cuts it to its own limit


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, so that a taken port is known before the model loads.

    Raises:
        ConfigError: the address is in use or not ours, naming it.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
    except OSError as error:
        raise ConfigError(f"cannot resolve the host {host!r} ({error}); check --host") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise ConfigError(
            f"cannot listen on {host} port {port}: {reason}; stop what uses it or choose another "
            "with --port"
        ) from None
    return listener


def url_of(listener: socket.socket, host: str, scheme: str = "http") -> str:
    port = listener.getsockname()[1]
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    shown = f"[{shown}]" if ":" in shown else shown
    return f"{scheme}://{shown}:{port}"
