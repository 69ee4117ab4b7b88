"""/v1/responses as the openai client sees it."""

import json

import openai
import pytest
from pydantic import BaseModel

from fastgen_jax.server import kept
from fastgen_jax.server.kept import Kept
from fastgen_jax.tokenizer import Tokenizer
from tests import tiny_tokenizers
from tests.server.fake_engine import MAX_TOKENS
from tests.server.running import TEXT, serving, wait_until

TEMPLATE = tiny_tokenizers.CHAT_TEMPLATE.replace(
    "{{ message.content",
    "{{ message.tool_calls | tojson if message.tool_calls }}{{ message.content",
).replace("{{ '<tool>' if tools }}", "{% if tools %}{{ tools | tojson }}{% endif %}</think>")
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a place.",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    "strict": True,
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Oslo"}}\n</tool_call>'
THOUGHT = "<think>Hm, well.</think>"


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    directory = tiny_tokenizers.byte_level(tmp_path_factory.mktemp("responses"), TEMPLATE)
    with serving(Tokenizer(directory)) as running:
        yield running


@pytest.fixture
def up(talking):
    yield talking
    talking.engine.says = []
    wait_until(lambda: not talking.engine.live and not talking.service._live)


@pytest.fixture
def client(up):
    with up.client() as client:
        yield client


def say(up, text: str):
    encode = up.service.backend.tokenizer.encode
    up.engine.says = [encode(text, add_special_tokens=False)]


def ask(client, **fields):
    return client.responses.create(**{"model": "fake", "input": "Hello."} | fields)


def prompt(up) -> str:
    ids = up.engine.submitted[-1].prompt_token_ids
    return up.service.backend.tokenizer.decode(ids, skip_special_tokens=False)


class TestAnswer:
    def test_text_comes_as_one_message(self, up, client):
        say(up, TEXT)
        answer = ask(client, metadata={"a": "b"}, instructions="Be brief.")
        assert (answer.object, answer.status, answer.output_text) == ("response", "completed", TEXT)
        (item,) = answer.output
        assert (item.type, item.role, item.status) == ("message", "assistant", "completed")
        assert (answer.id[:5], answer.metadata, answer.instructions) == (
            "resp_", {"a": "b"}, "Be brief.",
        )  # fmt: skip
        usage = answer.usage
        assert usage.input_tokens == len(up.engine.submitted[-1].prompt_token_ids)
        assert usage.total_tokens == usage.input_tokens + usage.output_tokens
        assert usage.input_tokens_details.cached_tokens == 0
        assert usage.output_tokens_details.reasoning_tokens == 0

    def test_a_call_and_a_thought_are_items_of_their_own(self, up, client):
        say(up, f"{THOUGHT}I look.{CALL}{CALL}")
        answer = ask(client, tools=[WEATHER])
        assert [item.type for item in answer.output] == [
            "reasoning", "message", "function_call", "function_call",
        ]  # fmt: skip
        thought, message, call, other = answer.output
        assert (thought.content[0].text, message.content[0].text) == ("Hm, well.", "I look.")
        assert (call.name, json.loads(call.arguments)) == ("weather", {"place": "Oslo"})
        assert call.call_id[:5] == "call_" != call.id[:5]
        assert len({call.call_id, other.call_id, call.id, other.id}) == 4
        assert answer.usage.output_tokens_details.reasoning_tokens > 0

    def test_what_is_cut_is_incomplete_and_says_why(self, up, client):
        say(up, TEXT)
        answer = ask(client, max_output_tokens=3)
        assert (answer.status, answer.output[0].status) == ("incomplete", "incomplete")
        assert answer.incomplete_details.reason == "max_output_tokens"
        assert answer.usage.output_tokens == 3

    def test_an_answer_that_says_nothing_is_an_empty_message(self, up, client):
        say(up, " ")
        up.engine.says = [[up.engine.eos_token_id]]
        assert ask(client).output[0].content[0].text == ""

    def test_a_form_is_parsed_by_the_client(self, up, client):
        class Person(BaseModel):
            age: int

        say(up, '{"age": 7}')
        answer = client.responses.parse(model="fake", input="Hello.", text_format=Person)
        assert answer.output_parsed == Person(age=7)
        grammar = up.engine.submitted[-1].params.structured_outputs.grammar
        assert '"age"' in grammar

    def test_hints_that_change_nothing_here_are_taken(self, client):
        hints = {"include": ["reasoning.encrypted_content"], "truncation": "auto", "user": "me"}
        answer = ask(client, **hints, service_tier="auto", prompt_cache_key="k")
        assert (answer.status, answer.truncation) == ("completed", "auto")

    def test_parameters_reach_the_engine(self, up, client):
        extra = {"top_k": 5, "seed": 3, "stop": ["zzz"]}
        answer = ask(client, temperature=0.5, top_p=0.9, max_output_tokens=7, extra_body=extra)
        params = up.engine.submitted[-1].params
        assert (params.temperature, params.top_p, params.max_tokens) == (0.5, 0.9, 7)
        assert (params.top_k, params.seed, params.stop) == (5, 3, ("zzz",))
        assert (answer.temperature, answer.top_p) == (0.5, 0.9)


class TestInput:
    def test_items_become_the_messages_of_a_chat(self, up, client):
        items = [
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
             "content": [{"type": "output_text", "text": "I look.", "annotations": []}]},
            {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
            {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "Rain."},
            {"type": "function_call_output", "call_id": "c2",
             "output": [{"type": "input_text", "text": "Sun."}]},
        ]  # fmt: skip
        ask(client, input=items, instructions="Be brief.")
        shown = prompt(up)
        texts = ["Be brief.", "Be kind.", "Weather?", '"c1"', '"c2"', "I look.", "Rain.", "Sun."]
        places = [shown.index(text) for text in texts]
        assert places == sorted(places)
        assert shown.count("<|assistant|>") == 2  # one turn said it and called, one is open

    def test_tools_are_those_of_a_chat(self, up, client):
        ask(client, tools=[WEATHER])
        assert '{"type": "function", "function": {"name": "weather"' in prompt(up)
        say(up, CALL)
        answer = ask(client, tools=[WEATHER], tool_choice={"type": "function", "name": "weather"})
        assert answer.output[0].name == "weather"
        assert "weather" in up.engine.submitted[-1].params.structured_outputs.grammar
        assert answer.tool_choice.name == "weather"
        allowed = {"type": "allowed_tools", "mode": "required",
                   "tools": [{"type": "function", "name": "weather"}]}  # fmt: skip
        assert ask(client, tools=[WEATHER], tool_choice=allowed).output[0].name == "weather"

    @pytest.mark.parametrize(("fields", "param", "words"), [
        ({"input": None}, "input", "must be a string or a list"),
        ({"input": []}, "input", "must be a string or a list"),
        ({"input": [5]}, "input", "input[0].type must be"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input", "input[0].type must be"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input", "has no message"),
        ({"input": [{"role": "robot", "content": "a"}]}, "input", "input[0].role must be"),
        ({"input": [{"role": "user", "content": 5}]}, "input", "input[0] must be text"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input",
         "input[0].content[0] may only be text"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input",
         "input[0].arguments must be a string"),
        ({"input": [{"type": "function_call_output", "output": "a"}]}, "input",
         "input[0].call_id must be a string"),
        ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens must be"),
        ({"temperature": 500}, "temperature", "temperature must be"),
        ({"text": {"format": {"type": "xml"}}}, "text", "must be one of text, json_object"),
        ({"tools": [{"type": "web_search"}]}, "tools", 'tools[0].type must be "function"'),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"truncation": "middle"}, "truncation", "auto or disabled"),
        ({"include": ["message.output_text.logprobs"]}, "include", "have logprobs"),
        ({"metadata": {"a": "b" * 513}}, "metadata", "more than 512"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "more than 16"),
        ({"background": True}, "background", "not supported"),
        ({"conversation": "conv_1"}, "conversation", "not supported"),
        ({"reasoning": {"effort": "x" * 33}}, "reasoning", "more than 32"),
        ({"previous_response_id": "resp_none"}, "previous_response_id", "there is no response"),
        ({"input": "Ω" * 5000}, "input", "in the input"),
    ])  # fmt: skip
    def test_what_is_wrong_is_refused_by_its_name_here(self, up, fields, param, words):
        n_before = len(up.engine.submitted)
        answer = up.post("/v1/responses", {"input": "Hello."} | fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert words in answer.json()["error"]["message"]
        assert len(up.engine.submitted) == n_before

    def test_a_context_that_is_too_long_is_said_to_be_in_the_input(self, up):
        error = up.post("/v1/responses", {"input": "Ω" * 5000}).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert f"maximum context length is {MAX_TOKENS}" in error["message"]


class TestStream:
    def test_events_have_the_clients_types_and_count_up(self, up, client):
        say(up, f"{THOUGHT}I look.{CALL}")
        events = list(ask(client, tools=[WEATHER], stream=True))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        kinds = [event.type for event in events]
        merged = [kind for i, kind in enumerate(kinds) if kinds[i - 1 : i] != [kind]]
        assert merged == [
            "response.created", "response.in_progress",
            "response.output_item.added", "response.content_part.added",
            "response.reasoning_text.delta", "response.reasoning_text.done",
            "response.content_part.done", "response.output_item.done",
            "response.output_item.added", "response.content_part.added",
            "response.output_text.delta", "response.output_text.done",
            "response.content_part.done", "response.output_item.done",
            "response.output_item.added", "response.function_call_arguments.delta",
            "response.function_call_arguments.done", "response.output_item.done",
            "response.completed",
        ]  # fmt: skip
        for event in events:  # of the class that the client has for it, and whole
            type(event).model_validate(event.model_dump(), strict=False)
            assert type(event).__name__.lower().startswith("response")

    def test_deltas_join_to_what_the_end_holds(self, up, client):
        say(up, f"{THOUGHT}I look.{CALL}")
        events = list(ask(client, tools=[WEATHER], stream=True))
        final = events[-1].response
        for item, kind in zip(
            final.output, ("reasoning_text", "output_text", "function_call_arguments"), strict=True
        ):
            joined = "".join(e.delta for e in events if e.type == f"response.{kind}.delta")
            assert joined == (
                item.arguments if item.type == "function_call" else item.content[0].text
            )
            (done,) = (
                e.item for e in events if e.type.endswith("item.done") and e.item.id == item.id
            )
            assert done == item
        assert final.usage.total_tokens > 0
        assert {e.response.id for e in events if hasattr(e, "response")} == {final.id}

    def test_the_client_accumulates_the_same(self, up, client):
        say(up, f"I look.{CALL}")
        with client.responses.stream(model="fake", input="Hello.", tools=[WEATHER]) as stream:
            for _ in stream:
                pass
            final = stream.get_final_response()
        assert final.output_text == "I look."
        assert final.output[1].parsed_arguments == {"place": "Oslo"}

    def test_a_stream_that_is_cut_ends_incomplete(self, up, client):
        say(up, TEXT)
        last = list(ask(client, stream=True, max_output_tokens=3))[-1]
        assert (last.type, last.response.status) == ("response.incomplete", "incomplete")

    def test_a_failure_after_the_first_token_is_told_before_the_cut(self, up):
        up.engine.step_time = 0.02
        say(up, TEXT * 20)
        received = b""
        with up.connect({"input": "Hello.", "stream": True}, "/v1/responses") as connection:
            while b"output_text.delta" not in received:
                received += connection.recv(65536)
            up.engine.poisoned.update(key[0] for key in up.engine.live)
            while data := connection.recv(65536):
                received += data
        up.engine.poisoned.clear()
        up.engine.step_time = 0.0
        assert b"event: response.failed\n" in received
        assert b"response.completed" not in received
        assert not received.endswith(b"0\r\n\r\n")


class TestKept:
    def test_a_response_goes_on_from_another(self, up, client):
        say(up, f"{THOUGHT}I look.{CALL}")
        first = ask(client, input="Weather?", tools=[WEATHER], instructions="Be brief.")
        said = {"type": "function_call_output", "output": "Rain.",
                "call_id": first.output[-1].call_id}  # fmt: skip
        second = ask(client, input=[said], previous_response_id=first.id)
        assert second.previous_response_id == first.id
        shown = prompt(up)
        places = [shown.index(text) for text in ("Weather?", "I look.", "Rain.")]
        assert places == sorted(places)
        assert "Be brief." not in shown
        ask(client, input="And now?", previous_response_id=second.id)
        assert prompt(up).index("Rain.") < prompt(up).index("And now?")

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_response_is_there_until_it_is_deleted(self, up, client, stream):
        answer = ask(client, stream=stream)
        answer = list(answer)[-1].response if stream else answer
        assert client.responses.retrieve(answer.id) == answer
        client.responses.delete(answer.id)
        for gone in (client.responses.retrieve, client.responses.delete):
            with pytest.raises(openai.NotFoundError, match="there is no response"):
                gone(answer.id)

    def test_what_is_not_to_be_stored_is_not(self, up, client):
        answer = ask(client, store=False)
        assert answer.store is False
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(answer.id)

    @pytest.mark.parametrize("share", [False, True])
    def test_a_key_sees_its_own_alone(self, tokenizer, share):
        with serving(tokenizer, api_key=("first", "second"), share_prefix_cache=share) as up:
            with up.client("first") as first, up.client("second") as second:
                answer = ask(first, max_output_tokens=1)
                assert first.responses.retrieve(answer.id).id == answer.id
                for call in (second.responses.retrieve, second.responses.delete):
                    with pytest.raises(openai.NotFoundError):
                        call(answer.id)
                with pytest.raises(openai.BadRequestError, match="there is no response"):
                    ask(second, previous_response_id=answer.id)
            assert up.post("/v1/responses", {"input": "a"}).status_code == 401
            assert up.get(f"/v1/responses/{answer.id}").status_code == 401

    def test_the_oldest_go_first_beyond_either_bound(self, monkeypatch):
        monkeypatch.setattr(kept, "MAX_RESPONSES", 3)
        monkeypatch.setattr(kept, "MAX_BYTES", 10_000)
        store = Kept()
        for i in range(5):
            store.put(b"a", [], str(i), b"x", {"role": "assistant", "content": ""})
        assert [store.get(b"a", str(i)) is not None for i in range(5)] == [False] * 2 + [True] * 3
        store.put(b"b", [], "other", b"x", {})
        store.put(b"a", [], "large", b"x" * 20_000, {})
        assert [store.get(b"a", id) is None for id in ("4", "large")] == [True, False]
        assert store.get(b"b", "other") is not None
        assert store.delete(b"a", "large")
        assert store._n_bytes[b"a"] == 0
