"""The gRPC front end, by grpcio's own client."""

import os
import subprocess
import sys
from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from google.rpc import error_details_pb2 as details
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from fastgen_jax.server import protocol
from fastgen_jax.server.rpc import fastgen_pb2 as messages
from fastgen_jax.server.rpc.fastgen_pb2_grpc import FastGenStub
from tests.server.fake_engine import FakeEngine
from tests.server.running import TEXT, Running, serving, wait_until
from tests.test_structure import ROOT

KEYED = (("authorization", "Bearer secret"),)
GENERATE = "/fastgen.v1.FastGen/Generate"


@pytest.fixture(scope="module")
def shared(tokenizer) -> Iterator[Running]:
    with serving(tokenizer, rpc=True, max_body_bytes=50_000) as running:
        yield running


@pytest.fixture
def stub(up) -> Iterator[FastGenStub]:
    with channel_to(up) as channel:
        yield FastGenStub(channel)


def channel_to(up: Running, **options: int) -> grpc.Channel:
    own = {"grpc.use_local_subchannel_pool": 1} | {f"grpc.{k}": v for k, v in options.items()}
    return grpc.insecure_channel(up.rpc_address, list(own.items()))


def request(text: str = TEXT, **fields) -> messages.GenerateRequest:
    return messages.GenerateRequest(prompt=[messages.Prompt(text=text)], **fields)


def endless(**fields) -> messages.GenerateRequest:
    return request(max_tokens=4000, ignore_eos=True, **fields)


def taken(answer):
    """All of it: a stream is read to its end."""
    return list(answer) if isinstance(answer, Iterator) else answer


def error_of(call) -> grpc.Call:
    """What a call that must fail has failed with."""
    with pytest.raises(grpc.RpcError) as caught:
        taken(call())
    return caught.value  # type: ignore[return-value]


def detail(error: grpc.Call, kind):
    """One of the details that the status has; an empty one if it has none of this kind."""
    found = kind()
    trailers = dict(error.trailing_metadata() or ())
    status = Status.FromString(trailers["grpc-status-details-bin"])
    assert (status.code, status.message) == (error.code().value[0], error.details())
    for packed in status.details:
        packed.Unpack(found)
    return found


def field_of(error: grpc.Call) -> str:
    (violation,) = detail(error, details.BadRequest).field_violations
    return violation.field


class TestAnswers:
    def test_an_answer_has_text_tokens_logprobs_usage_and_its_end(self, stub, tokenizer):
        answer = stub.Generate(request(max_tokens=3, logprobs=2))
        (choice,) = answer.choices
        ids = tokenizer.encode(TEXT)
        assert list(choice.token_ids) == ids[1:4]
        assert choice.text == tokenizer.decode(ids[1:4])
        assert (choice.finish_reason, answer.model) == ("length", "fake")
        assert [entry.token_id for entry in choice.logprobs] == list(choice.token_ids)
        assert [len(entry.top) for entry in choice.logprobs] == [2, 2, 2]
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 3)

    @pytest.mark.parametrize("fields", [{}, {"logprobs": 1, "n": 2}, {"echo": True},
                                        {"echo": True, "logprobs": 2}])  # fmt: skip
    def test_a_stream_says_in_pieces_what_an_answer_says(self, stub, fields):
        asked = request(max_tokens=20, stop=["red"], **fields)
        whole, streamed = stub.Generate(asked), list(stub.GenerateStream(asked))
        joined = [messages.Choice(index=choice.index) for choice in whole.choices]
        for piece in streamed:
            for choice in piece.choices:
                kept = joined[choice.index]
                kept.text += choice.text
                kept.token_ids.extend(choice.token_ids)
                kept.logprobs.extend(choice.logprobs)
                kept.finish_reason = choice.finish_reason
                if choice.WhichOneof("stop_reason"):
                    kept.stop_text = choice.stop_text
        assert joined == list(whole.choices)
        assert joined[0].stop_text == "red"
        assert streamed[-1].usage == whole.usage
        assert len({piece.id for piece in streamed}) == 1

    def test_an_echo_tells_how_likely_the_prompt_was(self, stub, tokenizer):
        (choice,) = stub.Generate(request(max_tokens=1, logprobs=1, echo=True)).choices
        first, *others, last = choice.logprobs
        assert [entry.token_id for entry in (first, *others)] == tokenizer.encode(TEXT)
        assert not first.HasField("logprob")
        assert [entry.logprob for entry in others] == [-i / 8 for i in range(1, len(others) + 1)]
        assert [last.token_id] == list(choice.token_ids)

    def test_prompts_are_texts_or_token_ids(self, stub, tokenizer):
        ids = messages.TokenIds(ids=tokenizer.encode(TEXT))
        prompts = [messages.Prompt(text=TEXT), messages.Prompt(token_ids=ids)]
        answer = stub.Generate(messages.GenerateRequest(prompt=prompts, max_tokens=5))
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert answer.choices[0].token_ids == answer.choices[1].token_ids

    def test_messages_are_a_chat(self, stub, up):
        asked = messages.GenerateRequest(
            messages=[messages.Message(role="user", content=TEXT)], max_tokens=4, logprobs=0
        )
        answer, http = stub.Generate(asked), up.client().chat.completions.create(
            model="fake", messages=[{"role": "user", "content": TEXT}], max_tokens=4
        )  # fmt: skip
        assert answer.choices[0].text == http.choices[0].message.content
        assert len(answer.choices[0].logprobs) == 4

    def test_tokens_and_models_are_told(self, stub, tokenizer):
        told = stub.Tokenize(messages.TokenizeRequest(prompt=TEXT))
        assert (list(told.tokens), told.max_model_len) == (tokenizer.encode(TEXT), 4096)
        (model,) = stub.Models(messages.ModelsRequest()).models
        assert (model.id, model.max_model_len) == ("fake", 4096)

    def test_200_streams_at_once_end_as_they_would_alone(self, tokenizer):
        engine = FakeEngine(tokenizer.eos_token_id, max_queued_requests=256)
        with serving(tokenizer, engine, rpc=True) as up, channel_to(up) as channel:
            engine.may_step.clear()
            stub = FastGenStub(channel)
            texts = [f"{TEXT} {i}" for i in range(200)]
            streams = [stub.GenerateStream(request(text, max_tokens=40)) for text in texts]
            wait_until(lambda: len(engine.live) == 200, 20)
            engine.may_step.set()
            for text, stream in zip(texts, streams, strict=True):
                said = "".join(piece.choices[0].text for piece in stream if piece.choices)
                expected = tokenizer.decode(tokenizer.encode(text)[1:])
                assert said == expected


class TestErrors:
    def test_a_bad_field_is_named(self, stub):
        error = error_of(lambda: stub.Generate(request(temperature=float("nan"))))
        assert (error.code(), field_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "temperature")
        assert "temperature" in error.details()

    def test_an_unknown_model_is_not_found(self, stub):
        error = error_of(lambda: stub.Generate(request(model="other")))
        assert (error.code(), field_of(error)) == (grpc.StatusCode.NOT_FOUND, "model")

    def test_bytes_that_are_no_message_are_refused(self, up):
        with channel_to(up) as channel:
            call = channel.unary_unary(GENERATE)
            for body in (b"\xff\xff", b"\x0a\x02\xff\xfe", b"\x0b" * 5000):
                assert error_of(lambda body=body: call(body)).code() in {
                    grpc.StatusCode.INVALID_ARGUMENT
                }
            none = error_of(lambda: channel.stream_unary(GENERATE)(iter(())))
            assert none.details() == "the call ended without a message; send one"

    def test_a_full_queue_tells_when_to_come_again(self, stub, up):
        up.engine.may_step.clear()
        calls = [stub.GenerateStream(endless()) for _ in range(up.engine.max_queued_requests)]
        wait_until(lambda: up.engine.is_full)
        error = error_of(lambda: stub.Generate(request()))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert detail(error, details.RetryInfo).retry_delay.seconds >= 1
        assert int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) >= 1000
        for call in calls:
            call.cancel()

    def test_a_failed_request_quotes_its_id(self, stub, up):
        up.engine.may_step.clear()
        calls = [stub.Generate.future(request(), metadata=(("x-request-id", "mine"),))]
        wait_until(lambda: up.engine.live)
        up.engine.poisoned = {id for id, _ in up.engine.live}
        up.engine.may_step.set()
        error = calls[0].exception()
        assert error.code() == grpc.StatusCode.INTERNAL
        assert detail(error, details.RequestInfo).request_id == "mine"

    def test_a_fault_of_ours_is_internal_and_shows_nothing(self, stub, up, monkeypatch, caplog):
        monkeypatch.setattr(up.service, "submit", lambda *args, **kwargs: 1 / 0)
        error = error_of(lambda: stub.Generate(request()))
        assert error.code() == grpc.StatusCode.INTERNAL
        assert detail(error, details.RequestInfo).request_id in error.details()
        assert "ZeroDivision" not in error.details()
        assert any(record.exc_info for record in caplog.records)

    def test_a_failure_after_the_first_token_ends_the_stream_with_its_status(self, stub, up):
        up.engine.step_time = 0.01
        stream = stub.GenerateStream(endless())
        next(stream)
        up.engine.poisoned = {id for id, _ in up.engine.live}
        assert error_of(lambda: stream).code() == grpc.StatusCode.INTERNAL

    def test_an_unknown_field_is_warned_of(self, stub, caplog, monkeypatch):
        monkeypatch.setattr(protocol, "_warned", set())
        asked = messages.GenerateRequest.FromString(
            request(max_tokens=1).SerializeToString() + b"\xf8\x3f\x01"  # field 1023
        )
        assert stub.Generate(asked).choices
        assert "'GenerateRequest.1023' is unknown" in caplog.text


class TestLimits:
    def test_a_message_over_the_limit_is_refused_and_the_channel_goes_on(self, stub, up):
        room = 50_000 - len(request("").SerializeToString()) - 8
        for n_bytes, code in (
            (room, grpc.StatusCode.INVALID_ARGUMENT),  # longer than the context
            (room + 100, grpc.StatusCode.RESOURCE_EXHAUSTED),
        ):
            asked = request("a" * n_bytes)
            assert (len(asked.SerializeToString()) > 50_000) == (
                code is grpc.StatusCode.RESOURCE_EXHAUSTED
            )
            assert error_of(lambda asked=asked: stub.Generate(asked)).code() == code
        assert stub.Generate(request()).choices
        assert up.service.uploads.n_held == 0

    def test_metadata_over_the_limit_is_refused_and_the_channel_goes_on(self, stub):
        error = error_of(lambda: stub.Generate(request(), metadata=(("x-long", "a" * 17_000),)))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert stub.Generate(request(), metadata=(("x-long", "a" * 10_000),)).choices

    def test_compressed_messages_are_refused(self, up):
        """A thousandth of its size on the wire, one could be far over the limit."""
        with channel_to(up) as channel:
            call = FastGenStub(channel).Generate
            error = error_of(lambda: call(request("a" * 40_000), compression=grpc.Compression.Gzip))
        assert error.code() == grpc.StatusCode.UNIMPLEMENTED

    def test_answers_are_counted_by_call_and_unknown_calls_are_not(self, stub, up):
        stub.Generate(request())
        error_of(lambda: stub.Generate(messages.GenerateRequest()))
        with channel_to(up) as channel:
            error = error_of(lambda: channel.unary_unary("/fastgen.v1.FastGen/Other")(b""))
        assert error.code() == grpc.StatusCode.UNIMPLEMENTED
        counts = up.service.metrics.answers
        wait_until(lambda: counts[GENERATE, "2xx"] and counts[GENERATE, "4xx"])
        assert {path for path, _ in counts if path.startswith("/fastgen")} == {
            f"/fastgen.v1.FastGen/{name}"
            for name in ("Generate", "GenerateStream", "Tokenize", "Models")
        }


class TestKeys:
    def test_every_call_but_health_needs_a_key(self, tokenizer):
        with serving(tokenizer, rpc=True, api_key=("secret",)) as up, channel_to(up) as channel:
            stub = FastGenStub(channel)
            for call, asked in (
                (stub.Generate, request()), (stub.GenerateStream, request()),
                (stub.Tokenize, messages.TokenizeRequest(prompt="a")),
                (stub.Models, messages.ModelsRequest()),
            ):  # fmt: skip
                for metadata in ((), (("authorization", "Bearer Secret"),)):
                    error = error_of(lambda c=call, a=asked, m=metadata: c(a, metadata=m))
                    assert error.code() == grpc.StatusCode.UNAUTHENTICATED
                assert taken(call(asked, metadata=KEYED))
            error = error_of(lambda: ProtoReflectionDescriptorDatabase(channel).get_services())
            assert error.code() == grpc.StatusCode.UNAUTHENTICATED
            health = health_pb2_grpc.HealthStub(channel).Check(HealthCheckRequest())
            assert health.status == HealthCheckResponse.SERVING

    def test_clients_of_different_keys_share_no_prompts(self, tokenizer):
        keys = ("one", "two")
        with serving(tokenizer, rpc=True, api_key=keys) as up, channel_to(up) as channel:
            for key in keys:
                metadata = (("authorization", f"Bearer {key}"),)
                FastGenStub(channel).Generate(request(), metadata=metadata)
            first, second = (asked.cache_salt for asked in up.engine.submitted)
            assert first != second

    def test_a_key_has_its_limits_here_too(self, tokenizer):
        options = {"api_key": ("secret",), "max_requests_per_key": 1}
        with serving(tokenizer, rpc=True, **options) as up, channel_to(up) as channel:
            up.engine.may_step.clear()
            stub = FastGenStub(channel)
            first = stub.GenerateStream(endless(), metadata=KEYED)
            wait_until(lambda: up.engine.live)
            error = error_of(lambda: stub.Generate(request(), metadata=KEYED))
            assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert detail(error, details.RetryInfo).retry_delay.seconds >= 1
            first.cancel()


class TestReflection:
    @pytest.mark.parametrize("version", ["v1alpha", "v1"])
    def test_the_services_and_their_messages_are_told(self, up, version):
        with channel_to(up) as channel:
            asked = _Renamed(channel) if version == "v1" else channel
            database = ProtoReflectionDescriptorDatabase(asked)
            names = set(database.get_services())
            assert {"fastgen.v1.FastGen", "grpc.health.v1.Health"} <= names
            told = database.FindFileContainingSymbol("fastgen.v1.FastGen")
            assert told == described()


class _Renamed:
    """A channel that calls reflection by the name of its version 1, as grpcurl first does."""

    def __init__(self, channel: grpc.Channel):
        self._channel = channel

    def stream_stream(self, method: str, *args, **kwargs):
        return self._channel.stream_stream(method.replace("v1alpha", "v1"), *args, **kwargs)


def described() -> FileDescriptorProto:
    """The generated code's own description."""
    return FileDescriptorProto.FromString(messages.DESCRIPTOR.serialized_pb)


def test_the_generated_code_is_of_the_proto_file(tmp_path):
    path, source = tmp_path / "set", "fastgen_jax/server/rpc/fastgen.proto"
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--descriptor_set_out={path}"]
    subprocess.run([*command, source], cwd=ROOT, check=True)
    (file,) = FileDescriptorSet.FromString(path.read_bytes()).file
    told = [line for line in str(file).splitlines() if "json_name" not in line]
    assert told == str(described()).splitlines()


def test_protobuf_parses_in_compiled_code_or_not_at_all():
    code = "from fastgen_jax.server.rpc.requests import check_parser; check_parser()"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    environment = os.environ | {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}
    slow = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert slow.returncode
    assert "protobuf runs here without its compiled parser; install a wheel" in slow.stderr
