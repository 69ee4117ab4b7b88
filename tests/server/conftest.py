"""What the tests of the server share."""

import ssl
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import trustme

from fastgen_jax.tokenizer import Tokenizer
from tests import tiny_tokenizers
from tests.server.running import Running, serving, wait_until


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer(tiny_tokenizers.byte_level(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="session")
def tls(tmp_path_factory) -> dict:
    """Options of a server that speaks TLS, and what its clients trust."""
    folder, authority = tmp_path_factory.mktemp("tls"), trustme.CA()
    trusts = ssl.create_default_context()
    authority.configure_trust(trusts)
    return write_pair(authority, folder) | {"trusts": trusts}


@pytest.fixture(scope="module", params=["plain", "tls"])
def wire(request, tls) -> dict:
    """Options of a server that speaks so: what is tested holds with and without TLS."""
    return tls if request.param == "tls" else {}


def write_pair(authority: trustme.CA, folder: Path) -> dict[str, str]:
    """A new certificate and its key, in files that are replaced."""
    pair = authority.issue_cert("localhost", "127.0.0.1")
    pair.private_key_pem.write_to_path(folder / "key.pem")
    (folder / "key.pem").chmod(0o600)
    pair.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    return {"tls_cert": str(folder / "cert.pem"), "tls_key": str(folder / "key.pem")}


@pytest.fixture(scope="module")
def shared(tokenizer) -> Iterator[Running]:
    with serving(tokenizer) as running:
        yield running


@pytest.fixture
def up(shared) -> Iterator[Running]:
    """The shared server, idle before and after."""
    yield shared
    shared.engine.may_step.set()
    shared.engine.step_time = 0.0
    shared.engine.says = []
    wait_until(lambda: not shared.engine.live)
    wait_until(lambda: not shared.service._live and not shared.service.n_inflight)


@pytest.fixture
def client(up) -> Iterator[openai.OpenAI]:
    with up.client() as client:
        yield client
