"""The listening socket and its address. Imports nothing of weight: the port opens first of all."""

import contextlib
import os
import socket
import stat
from collections.abc import Iterator

from fastgen_jax.errors import ConfigError

BACKLOG = 65_535  # connections not yet accepted; the kernel cuts it to its own limit


def bind(host: str, port: int, flag: str = "--port") -> socket.socket:
    """A listening socket, so that a taken port is known before the model loads.

    Args:
        flag: the one that chooses the port.

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
            f"with {flag}"
        ) from None
    return listener


def inherited(fd: int) -> socket.socket:
    """The listening socket that whoever started this process has left open for it.

    Raises:
        ConfigError: it is none.
    """
    try:
        listener = socket.socket(fileno=fd)
        is_listening = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise ConfigError(f"--fd {fd} is no socket ({error}); leave it out to bind one") from None
    if not is_listening:
        listener.close()
        raise ConfigError(f"--fd {fd} is a socket that does not listen; call listen() on it first")
    listener.set_inheritable(False)
    return listener


@contextlib.contextmanager
def unix_socket(path: str) -> Iterator[socket.socket]:
    """A listening Unix socket that only this user may use; its file is gone at the end. The file
    that a server left behind which is no more is replaced.

    Raises:
        ConfigError: something that lives is there, or nothing can be, naming it.
    """
    _clear(path)
    listener, umask = socket.socket(socket.AF_UNIX), os.umask(0o177)
    try:
        listener.bind(path)
        listener.listen(BACKLOG)
        own = os.stat(path).st_ino
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)  # a path too long has no number
        raise ConfigError(
            f"cannot listen on {path}: {reason}; choose another path with --uds"
        ) from None
    finally:
        os.umask(umask)
    try:
        yield listener
    finally:
        listener.close()
        with contextlib.suppress(OSError):
            if os.stat(path).st_ino == own:  # else it is another server's by now
                os.unlink(path)


def _clear(path: str):
    """Removes a Unix socket that nobody listens on."""
    with contextlib.suppress(OSError):  # bind tells the reason
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise ConfigError(f"{path} is there and is no socket; choose another path with --uds")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            with contextlib.suppress(OSError):
                os.unlink(path)
            return
        except OSError:
            return
    raise ConfigError(f"a server listens on {path}; stop it or choose another path with --uds")


def url_of(listener: socket.socket, host: str, scheme: str = "http") -> str:
    """Of a Unix socket, what its clients put before a path."""
    if listener.family == socket.AF_UNIX:
        return f"{scheme}://localhost"
    port = listener.getsockname()[1]
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    shown = f"[{shown}]" if ":" in shown else shown
    return f"{scheme}://{shown}:{port}"
