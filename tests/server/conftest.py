"""What the tests of the server share."""

from collections.abc import Iterator

import openai
import pytest

from fastgen_jax.tokenizer import Tokenizer
from tests import tiny_tokenizers
from tests.server.pairs import certified
from tests.server.running import Running, serving, wait_until


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer(tiny_tokenizers.byte_level(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="session")
def tls(tmp_path_factory) -> dict:
    """Options of a server that speaks TLS, and what its clients trust."""
    return certified(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module", params=["plain", "tls"])
def wire(request, tls) -> dict:
    """Options of a server that speaks so: what is tested holds with and without TLS."""
    return tls if request.param == "tls" else {}


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
