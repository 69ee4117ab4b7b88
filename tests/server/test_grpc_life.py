"""gRPC's calls end as they should: deadlines, clients that leave or read nothing, health, drain."""

import os
import signal
import socket
import ssl
import subprocess
import sys
import threading

import grpc
import pytest
import trustme
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from fastgen_jax.server import certificates
from fastgen_jax.server.rpc import fastgen_pb2 as messages
from fastgen_jax.server.rpc.fastgen_pb2_grpc import FastGenStub
from fastgen_jax.server.service import Backend
from tests.server.fake_engine import FakeEngine
from tests.server.pairs import write_pair
from tests.server.running import Running, read_all, serving, wait_until
from tests.server.test_grpc import channel_to, detail, details, endless, error_of, request

CLIENT = """
import sys, grpc
from fastgen_jax.server.rpc import fastgen_pb2 as messages, fastgen_pb2_grpc
stub = fastgen_pb2_grpc.FastGenStub(grpc.insecure_channel(sys.argv[1]))
asked = messages.GenerateRequest.FromString(bytes.fromhex(sys.argv[2]))
for piece in stub.GenerateStream(asked):
    print("piece", flush=True)
"""
SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
PING = bytes((0, 0, 8, 6, 0, 0, 0, 0, 0)) + b"pingpong"
NAMES = ("", "fastgen.v1.FastGen")


class TestLeaving:
    @pytest.mark.parametrize("phase", ["queued", "running"])
    def test_a_deadline_ends_the_request(self, tokenizer, phase):
        with serving(tokenizer, rpc=True) as up, channel_to(up) as channel:
            up.engine.step_time = 0.01
            up.engine.may_step.set() if phase == "running" else up.engine.may_step.clear()
            call = FastGenStub(channel).Generate
            error = error_of(lambda: call(endless(), timeout=0.3))
            assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            wait_until(lambda: not up.engine.live and not up.service.n_inflight)
            assert len(up.engine.cancelled) == 1

    @pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
    def test_a_cancelled_call_ends_the_request(self, tokenizer, method):
        with serving(tokenizer, rpc=True) as up, channel_to(up) as channel:
            up.engine.step_time = 0.01
            call = getattr(FastGenStub(channel), method)
            call = call.future(endless()) if method == "Generate" else call(endless())
            wait_until(lambda: up.engine.live)
            call.cancel()
            wait_until(lambda: not up.engine.live and not up.service.n_inflight)
            assert len(up.engine.cancelled) == 1
            assert up.service.metrics.finished["abort"] == 1

    def test_a_client_killed_in_mid_stream_frees_what_it_held(self, tokenizer, caplog):
        with serving(tokenizer, rpc=True) as up:
            up.engine.step_time = 0.01
            command = [sys.executable, "-c", CLIENT, up.rpc_address]
            command.append(endless().SerializeToString().hex())
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
                assert client.stdout is not None
                assert client.stdout.readline() == "piece\n"
                os.kill(client.pid, signal.SIGKILL)
            wait_until(lambda: not up.engine.live)
            assert len(up.engine.cancelled) == 1
            wait_until(lambda: not up.service.n_inflight)
        assert not [record for record in caplog.records if record.levelname == "ERROR"]

    def test_a_reader_that_takes_nothing_is_cut_and_holds_up_nobody(self, tokenizer):
        window = {"http2.lookahead_bytes": 65_536, "http2.bdp_probe": 0}
        options = {"stream_timeout": 0.3}
        with serving(tokenizer, rpc=True, **options) as up, channel_to(up, **window) as slow:
            up.engine.step_time = 0.002  # so that its window is full long before all is generated
            asked = endless(logprobs=20, n=8)
            stream = FastGenStub(slow).GenerateStream(asked)
            wait_until(lambda: up.engine.cancelled, 20)
            wait_until(lambda: not up.service.n_inflight, 20)
            with channel_to(up) as channel:
                assert FastGenStub(channel).Generate(request()).choices
            error = error_of(lambda: stream)
            assert error.code() == grpc.StatusCode.CANCELLED
            assert "left unread" in error.details()


class TestHealth:
    def test_it_serves_once_the_model_is_ready_and_no_more_when_it_drains(self, tokenizer):
        go_on = threading.Event()

        def load(on_phase):
            assert go_on.wait(20)
            return Backend(engine, tokenizer)

        engine = FakeEngine(tokenizer.eos_token_id)
        options = {"load": load, "wait": False, "rpc": True, "drain_timeout": 20}
        with serving(tokenizer, engine, **options) as up, channel_to(up) as channel:
            health, stub = HealthStub(channel), FastGenStub(channel)
            watched = health.Watch(HealthCheckRequest(service="fastgen.v1.FastGen"))
            assert next(watched).status == HealthCheckResponse.NOT_SERVING
            for name in NAMES:
                status = health.Check(HealthCheckRequest(service=name)).status
                assert status == HealthCheckResponse.NOT_SERVING
            refused = error_of(lambda: stub.Generate(request()))
            assert refused.code() == grpc.StatusCode.UNAVAILABLE
            assert detail(refused, details.RetryInfo).retry_delay.seconds == 5
            assert stub.Models(messages.ModelsRequest()).models[0].id == "fake"
            go_on.set()
            assert next(watched).status == HealthCheckResponse.SERVING
            up.engine.may_step.clear()
            stream = stub.GenerateStream(endless())
            wait_until(lambda: engine.live)
            up.begin_drain()
            assert next(watched).status == HealthCheckResponse.NOT_SERVING
            engine.may_step.set()
            assert list(stream)[-1].usage.completion_tokens == 4000

    def test_an_unknown_service_is_not_found(self, tokenizer):
        with serving(tokenizer, rpc=True) as up, channel_to(up) as channel:
            asked = HealthCheckRequest(service="other")
            error = error_of(lambda: HealthStub(channel).Check(asked))
            assert error.code() == grpc.StatusCode.NOT_FOUND
            watched = HealthStub(channel).Watch(asked)
            assert next(watched).status == HealthCheckResponse.SERVICE_UNKNOWN


class TestDrain:
    def test_it_finishes_what_runs_and_takes_nothing_new(self, tokenizer):
        with serving(tokenizer, rpc=True, drain_timeout=20) as up, channel_to(up) as channel:
            up.engine.may_step.clear()
            stub = FastGenStub(channel)
            stream, whole = stub.GenerateStream(endless()), stub.Generate.future(endless())
            wait_until(lambda: len(up.engine.live) == 2)
            up.begin_drain()
            wait_until(lambda: up.service.phase.name == "draining")
            with channel_to(up) as other:
                refused = error_of(lambda: FastGenStub(other).Generate(request()))
            assert refused.code() == grpc.StatusCode.UNAVAILABLE
            up.engine.may_step.set()
            assert list(stream)[-1].usage.completion_tokens == 4000
            assert whole.result().usage.completion_tokens == 4000
            up.thread.join(5)
            assert not up.thread.is_alive()

    def test_what_runs_too_long_ends_with_unavailable(self, tokenizer):
        with serving(tokenizer, rpc=True, drain_timeout=0.2) as up, channel_to(up) as channel:
            up.engine.may_step.clear()
            stub = FastGenStub(channel)
            stream, whole = stub.GenerateStream(endless()), stub.Generate.future(endless())
            wait_until(lambda: len(up.engine.live) == 2)
            up.begin_drain()
            with pytest.raises(grpc.RpcError):
                list(stream)
            for call in (stream, whole):
                assert call.code() == grpc.StatusCode.UNAVAILABLE
                assert "shutting down" in call.details()
            up.thread.join(5)
            assert not up.thread.is_alive()

    def test_an_idle_server_ends_at_once_though_its_health_is_watched(self, tokenizer):
        with serving(tokenizer, rpc=True, drain_timeout=30) as up, channel_to(up) as channel:
            watched = HealthStub(channel).Watch(HealthCheckRequest())
            next(watched)
            up.begin_drain()
            up.thread.join(5)
            assert not up.thread.is_alive()


def trusted(up: Running, authority: trustme.CA) -> bool:
    """Whether a new connection finds a certificate of this authority."""
    credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    own_connection = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.secure_channel(up.rpc_address, credentials, own_connection) as channel:
        try:
            return bool(FastGenStub(channel).Generate(request(), timeout=10).choices)
        except grpc.RpcError:
            return False


class TestConnection:
    def test_a_flood_of_pings_is_cut(self, tokenizer):
        with serving(tokenizer, rpc=True) as up:
            host, _, port = up.rpc_address.partition(":")
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                connection.sendall(SETTINGS + 100 * PING)
                assert b"too_many_pings" in read_all(connection)

    def test_tls_is_spoken_with_the_pair_of_https_and_changes_with_it(
        self, tokenizer, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(certificates, "LOOK_EVERY", 0.0)
        first, second, trusts = trustme.CA(), trustme.CA(), ssl.create_default_context()
        pair = write_pair(first, tmp_path)
        with serving(tokenizer, rpc=True, trusts=trusts, **pair) as up:
            assert (trusted(up, first), trusted(up, second)) == (True, False)
            before = up.server.certificates.context
            write_pair(second, tmp_path)
            wait_until(lambda: up.server.certificates.context is not before)
            assert (trusted(up, first), trusted(up, second)) == (False, True)
            with channel_to(up) as plain:
                error = error_of(lambda: FastGenStub(plain).Generate(request(), timeout=10))
            assert error.code() == grpc.StatusCode.UNAVAILABLE
