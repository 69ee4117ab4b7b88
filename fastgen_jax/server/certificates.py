"""Certificates: the pair of files that TLS is spoken with, and its newer versions.

Each load makes a new context, which only new connections get: a pair that is broken, or half
written, never touches the one in use.
"""

import logging
import os
import ssl
import stat
import time

from fastgen_jax.errors import ConfigError

log = logging.getLogger("fastgen_jax.server")

LOOK_EVERY = 1.0  # seconds between looks at the files
FIX = "give PEM files, the certificate with its chain and its key without passphrase"

Version = tuple[tuple[int, int, int], ...]


class Certificates:
    """INVARIANT: `context` is of the newest pair that could be used.

    Raises:
        ConfigError: the first pair cannot be used, naming the file.
    """

    def __init__(self, cert: str, key: str):
        self.cert = cert
        self.key = key
        self._seen = self._loaded = _version(cert, key)
        self.context = load(cert, key)
        self._due = time.monotonic() + LOOK_EVERY

    def tick(self):
        """Loads the files once they have changed, and then not between two looks."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + LOOK_EVERY
        before, self._seen = self._seen, _version(self.cert, self.key)
        if self._seen in (self._loaded, ()) or self._seen != before:
            return
        self._loaded = self._seen
        try:
            self.context = load(self.cert, self.key)
        except ConfigError as error:
            log.error("the new certificate is not used: %s", error)
        else:
            log.info("TLS      new connections get the new certificate of %s", self.cert)


def load(cert: str, key: str) -> ssl.SSLContext:
    """A server's context for the pair.

    Raises:
        ConfigError: it cannot be used, naming the file and the reason.
    """
    _check_readable("--tls-cert", cert, b"-----BEGIN CERTIFICATE-----")
    _check_readable("--tls-key", key, b"PRIVATE KEY-----")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])

    def ask_passphrase() -> str:
        raise ConfigError(f"--tls-key {key} is encrypted; {FIX}")

    try:
        context.load_cert_chain(cert, key, ask_passphrase)
    except (ssl.SSLError, OSError) as error:
        reason = getattr(error, "reason", None) or error.strerror or str(error)
        raise ConfigError(_problem(cert, key, reason)) from None
    if os.stat(key).st_mode & stat.S_IROTH:
        log.warning("--tls-key %s can be read by every user of this machine: chmod o-r", key)
    return context


def _problem(cert: str, key: str, reason: str) -> str:
    if reason == "KEY_VALUES_MISMATCH":
        return f"--tls-key {key} is not the key of --tls-cert {cert}; give a pair"
    return f"--tls-cert {cert} and --tls-key {key} cannot be used: {reason}; {FIX}"


def _check_readable(flag: str, path: str, mark: bytes):
    try:
        with open(path, "rb") as file:
            text = file.read()
    except OSError as error:
        message = f"cannot read {flag} {path}: {error.strerror}; the server's user must be able to"
        raise ConfigError(message) from None
    if mark not in text:
        raise ConfigError(f"{flag} {path} holds no {mark.decode().strip('-')}; {FIX}")


def _version(*paths: str) -> Version:
    """What changes when a file does, also by renaming; () while one of them is not there."""
    try:
        found = [os.stat(path) for path in paths]
    except OSError:
        return ()
    return tuple((file.st_mtime_ns, file.st_ino, file.st_size) for file in found)
