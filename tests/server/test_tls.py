"""HTTPS: the handshake has the limits of a connection, and certificates change under way.

What a connection promises besides is tested with and without TLS in test_connection and test_life.
"""

import contextlib
import logging
import socket
import ssl

import orjson
import pytest
import trustme

from fastgen_jax.errors import ConfigError
from fastgen_jax.server import capacity, certificates, connection
from fastgen_jax.server import tls as layer
from fastgen_jax.server.certificates import Certificates
from fastgen_jax.server.config import ServerConfig
from tests.server.pairs import write_pair
from tests.server.running import PATHS, Running, raw_post, read_all, serving, wait_until

GET = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def shared(tokenizer, tls):
    with serving(tokenizer, **tls) as running:
        yield running


def connect(up: Running) -> socket.socket:
    """A connection without a handshake."""
    return socket.create_connection(up.address, timeout=10)


class TestHandshake:
    def test_one_that_never_comes_is_not_waited_for(self, up, monkeypatch):
        monkeypatch.setattr(connection, "HEADER_TIMEOUT", 0.1)
        with connect(up) as client:
            assert read_all(client) == b""

    def test_the_crowd_that_does_not_shake_hands_leaves_health_reachable(
        self, tokenizer, tls, monkeypatch
    ):
        monkeypatch.setattr(capacity, "of_process", lambda: capacity.Capacity(4))
        with serving(tokenizer, **tls) as up, contextlib.ExitStack() as stack:
            for _ in range(100):
                stack.enter_context(connect(up))
            assert up.get("/livez").status_code == 200
            wait_until(lambda: up.server.capacity.n_open <= 4)

    def test_one_too_many_is_told_so_after_its_handshake(self, tokenizer, tls, monkeypatch):
        monkeypatch.setattr(capacity, "of_process", lambda: capacity.Capacity(1))
        with serving(tokenizer, **tls) as up:
            up.engine.may_step.clear()
            with up.connect(PATHS["completions"]) as busy:
                wait_until(lambda: up.service.n_inflight)
                assert up.get("/livez").json()["error"]["code"] == "too_many_connections"
                up.engine.may_step.set()
                assert busy.recv(65536).startswith(b"HTTP/1.1 200")

    def test_it_has_a_limit_in_bytes(self, up, monkeypatch):
        monkeypatch.setattr(layer, "MAX_SILENT", 100)
        monkeypatch.setattr(connection, "HEADER_TIMEOUT", 60)  # more than the client's
        with connect(up) as client:
            client.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 200)
            assert read_all(client) == b""

    def test_noise_ends_the_connection(self, up):
        with connect(up) as client:
            client.sendall(b"\x16\x03\x01\x00\x05noise" * 10)
            answer = read_all(client)
        assert answer[:1] in (b"", b"\x15"), "at most an alert"

    def test_who_speaks_plain_http_is_told_to_use_https(self, up):
        with connect(up) as client:
            client.sendall(GET)
            assert b'"code":"https_only"' in read_all(client)

    def test_old_versions_and_renegotiation_are_off(self, tls):
        context = certificates.load(tls["tls_cert"], tls["tls_key"])
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2
        assert context.options & ssl.OP_NO_RENEGOTIATION


class TestGoodbye:
    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    def test_who_says_it_early_gets_the_answer_still(self, up, tls, version):
        up.trusts.maximum_version, before = version, up.trusts.maximum_version
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = up.trusts.wrap_bio(incoming, outgoing, server_hostname="localhost")
        up.trusts.maximum_version = before
        with connect(up) as wire:

            def exchange(do) -> bytes:
                while True:
                    try:
                        return do() or b""
                    except ssl.SSLWantReadError:
                        wire.sendall(outgoing.read())
                        incoming.write(wire.recv(65536))
                    finally:
                        wire.sendall(outgoing.read())

            exchange(client.do_handshake)
            client.write(raw_post("/v1/completions", orjson.dumps(PATHS["completions"])))
            with contextlib.suppress(ssl.SSLWantReadError):
                client.unwrap()
            received = b""
            while b'"finish_reason"' not in received:
                received += exchange(lambda: client.read(65536))
        assert b"HTTP/1.1 200 OK" in received

    def test_the_answer_ends_with_one(self, up):
        client = up.open()
        client.suppress_ragged_eofs = False  # a cut would be an error
        with client:
            client.sendall(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
            assert read_all(client).startswith(b"HTTP/1.1 200")


class TestFiles:
    def test_a_new_pair_is_for_new_connections_and_old_ones_go_on(
        self, tokenizer, tls, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(certificates, "LOOK_EVERY", 0.0)
        first, second = trustme.CA(), trustme.CA()
        pair = write_pair(first, tmp_path)
        trusts = ssl.create_default_context()
        for authority in (first, second):
            authority.configure_trust(trusts)
        with serving(tokenizer, trusts=trusts, **pair) as up, up.open() as old:
            write_pair(second, tmp_path)
            before = up.server.certificates.context
            wait_until(lambda: up.server.certificates.context is not before)
            with up.open() as new:
                assert old.getpeercert()["issuer"] != new.getpeercert()["issuer"]
            old.sendall(GET)
            assert old.recv(65536).startswith(b"HTTP/1.1 200")

    def test_a_broken_pair_is_told_once_and_the_old_one_stays(self, tmp_path, caplog, monkeypatch):
        monkeypatch.setattr(certificates, "LOOK_EVERY", 0.0)
        authority = trustme.CA()
        pair = Certificates(*write_pair(authority, tmp_path).values())
        before = pair.context
        (tmp_path / "cert.pem").write_text("half of a cert")
        caplog.set_level(logging.ERROR)
        for _ in range(5):
            pair.tick()
        assert pair.context is before
        assert caplog.text.count("the new certificate is not used") == 1
        write_pair(authority, tmp_path)
        pair.tick()
        assert pair.context is before, "not before two looks agree"
        pair.tick()
        assert pair.context is not before

    def test_files_that_are_gone_for_a_while_are_let_be(self, tmp_path, monkeypatch):
        monkeypatch.setattr(certificates, "LOOK_EVERY", 0.0)
        pair = Certificates(*write_pair(trustme.CA(), tmp_path).values())
        before = pair.context
        (tmp_path / "cert.pem").rename(tmp_path / "away.pem")
        pair.tick()
        pair.tick()
        assert pair.context is before

    def test_what_cannot_be_used_is_named_with_the_reason(self, tmp_path):
        good, other = tmp_path / "good", tmp_path / "other"
        for folder in (good, other):
            folder.mkdir()
            write_pair(trustme.CA(), folder)
        cert, key = str(good / "cert.pem"), str(good / "key.pem")
        for files, said in (
            ((cert, str(tmp_path / "none")), "cannot read --tls-key .*none: No such file"),
            ((str(tmp_path), key), "cannot read --tls-cert .*: Is a directory"),
            ((key, key), "--tls-cert .*key.pem holds no BEGIN CERTIFICATE"),
            ((cert, cert), "--tls-key .*cert.pem holds no PRIVATE KEY"),
            ((cert, str(other / "key.pem")), "--tls-key .* is not the key of --tls-cert"),
        ):
            with pytest.raises(ConfigError, match=said):
                Certificates(*files)

    def test_a_key_with_a_passphrase_asks_nobody(self, tmp_path):
        pair = write_pair(trustme.CA(), tmp_path)
        key = (tmp_path / "key.pem").read_text()
        mark = "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,"
        lines = [mark + "00" * 16, "", *key.splitlines()[1:-1], "-----END RSA PRIVATE KEY-----"]
        (tmp_path / "key.pem").write_text("\n".join(lines) + "\n")
        with pytest.raises(ConfigError, match="is encrypted"):
            Certificates(*pair.values())

    def test_a_key_that_all_can_read_is_warned_of(self, tmp_path, caplog):
        pair = write_pair(trustme.CA(), tmp_path)
        (tmp_path / "key.pem").chmod(0o644)
        Certificates(*pair.values())
        assert "chmod o-r" in caplog.text

    def test_one_file_alone_is_refused(self):
        with pytest.raises(ConfigError, match="tls_cert and tls_key go together"):
            ServerConfig(tls_cert="cert.pem")
