"""Certificates for tests, of an authority that lives as long as they do."""

import ssl
from pathlib import Path

import trustme


def write_pair(authority: trustme.CA, folder: Path) -> dict[str, str]:
    """A new certificate and its key, in files that are replaced."""
    pair = authority.issue_cert("localhost", "127.0.0.1")
    pair.private_key_pem.write_to_path(folder / "key.pem")
    (folder / "key.pem").chmod(0o600)
    pair.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    return {"tls_cert": str(folder / "cert.pem"), "tls_key": str(folder / "key.pem")}


def certified(folder: Path) -> dict:
    """Options of a server that speaks TLS, and what its clients trust."""
    authority, trusts = trustme.CA(), ssl.create_default_context()
    authority.configure_trust(trusts)
    return write_pair(authority, folder) | {"trusts": trusts}
