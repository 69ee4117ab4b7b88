"""A Unix socket: whose it is, what it replaces, and that a server on it is the same server."""

import os
import socket
import stat

import orjson
import pytest

from fastgen_jax.errors import ConfigError
from fastgen_jax.server.listen import unix_socket
from tests.server.running import PATHS, TEXT, raw_post, read_all, serving, wait_until


@pytest.fixture
def path(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    return "server.sock"  # relative: such an address has 107 bytes at most


def ask(path: str, request: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(path)
        client.sendall(request)
        socket.socket.shutdown(client, socket.SHUT_WR)
        return read_all(client)


class TestFile:
    def test_only_its_user_may_use_it_and_it_is_gone_at_the_end(self, path):
        umask = os.umask(0)
        os.umask(umask)
        with unix_socket(path):
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
            assert os.umask(umask) == umask
        assert not os.path.exists(path)

    def test_what_a_dead_server_left_is_replaced(self, path):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(path)
        assert os.path.exists(path)
        with unix_socket(path):
            pass

    def test_a_living_server_is_named_and_let_be(self, path):
        with unix_socket(path) as first:
            with pytest.raises(ConfigError, match=r"a server listens on server\.sock; .*--uds"):
                unix_socket(path).__enter__()
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(path)
                first.accept()[0].close()

    def test_a_file_that_is_no_socket_is_let_be(self, path):
        with open(path, "w") as file:
            file.write("precious")
        with pytest.raises(ConfigError, match="is no socket"):
            unix_socket(path).__enter__()
        assert os.path.getsize(path)

    def test_the_file_of_a_successor_stays(self, path):
        with unix_socket(path):
            os.unlink(path)
            os.mkfifo("other")  # takes the number of the file that is gone, on some file systems
            with socket.socket(socket.AF_UNIX) as successor:
                successor.bind(path)
        assert os.path.exists(path)

    @pytest.mark.parametrize("bad", ["no/such/folder", "x" * 200, ""])
    def test_where_nothing_can_be_is_named(self, path, bad):
        with pytest.raises(ConfigError, match=f"cannot listen on {bad}: .*--uds"):
            unix_socket(bad).__enter__()


class TestServer:
    def test_it_answers_as_on_a_port_and_whatever_the_host_is_called(self, tokenizer, path):
        with serving(tokenizer, uds=path) as up:
            body = orjson.dumps(PATHS["completions"] | {"stream": True})
            request = raw_post("/v1/completions", body).replace(b"localhost", b"any.example")
            answer = ask(path, request)
            assert b"HTTP/1.1 200 OK" in answer
            assert b"data: [DONE]" in answer
            wait_until(lambda: not up.service.n_inflight)

    def test_an_answer_that_nobody_reads_is_cut(self, tokenizer, path):
        large = {"prompt": TEXT, "max_tokens": 3000, "ignore_eos": True, "logprobs": 20}
        request = raw_post("/v1/completions", orjson.dumps(large | {"stream": True}))
        with (
            serving(tokenizer, uds=path, stream_timeout=0.15) as up,
            socket.socket(socket.AF_UNIX) as client,
        ):
            client.connect(path)
            client.sendall(request)
            wait_until(lambda: up.server._connections())
            wait_until(lambda: not up.server.server_state.connections)
            assert len(read_all(client)) < 1_000_000

    def test_a_client_that_leaves_frees_what_it_held(self, tokenizer, path):
        with serving(tokenizer, uds=path) as up:
            up.engine.may_step.clear()
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(path)
                client.sendall(raw_post("/v1/completions", orjson.dumps(PATHS["completions"])))
                wait_until(lambda: up.engine.live)
            wait_until(lambda: not up.engine.live)
