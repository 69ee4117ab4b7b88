"""Calls of tools and thoughts, as clients of chat see them, and what forces or refuses calls."""

import json
import logging
from pathlib import Path

import pytest
from llguidance import LLMatcher, LLTokenizer

from fastgen_jax.dialects import Reader
from fastgen_jax.errors import ConfigError
from fastgen_jax.server import speech
from fastgen_jax.server.config import ServerConfig
from fastgen_jax.tokenizer import Tokenizer
from tests import tiny_tokenizers
from tests.server.fake_engine import FakeEngine
from tests.server.running import CHAT, events_of, serving, wait_until

TEMPLATE = (
    tiny_tokenizers.CHAT_TEMPLATE
    + "{{ effort }}{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}"
    + "{{ reasoning_effort }}{{ '<think>' if thinks }}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "maxLength": 20}},
            "required": ["place"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Oslo"}}\n</tool_call>'
TICK = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
NAMED = {"type": "function", "function": {"name": "weather"}}
MARKERS = ("<tool_call>", "</tool_call>", "<think>", "</think>")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A tokenizer that has the markers as special tokens, and others like them."""
    directory = tmp_path_factory.mktemp("tools")
    tiny_tokenizers.byte_level(directory, TEMPLATE)
    path = directory / "tokenizer.json"
    spec = json.loads(path.read_text())
    like = spec["added_tokens"][0] | {"special": True}
    first = 1 + max(spec["model"]["vocab"].values())
    first = max(first, 1 + max(token["id"] for token in spec["added_tokens"]))
    for i, content in enumerate((*MARKERS, "<|private|>")):
        spec["added_tokens"].append(like | {"id": first + i, "content": content})
    path.write_text(json.dumps(spec))
    return directory


@pytest.fixture(scope="module")
def talking(directory):
    tokenizer = Tokenizer(str(directory))
    engine = FakeEngine(tokenizer.eos_token_id or 0)
    engine.model_config.vocab_size = tokenizer.vocab_size
    with serving(tokenizer, engine) as running:
        yield running


@pytest.fixture
def up(talking):
    yield talking
    talking.engine.says = []
    wait_until(lambda: not talking.engine.live)


@pytest.fixture
def client(up):
    with up.client() as client:
        yield client


def say(up, *texts: str):
    """Has each sample say its text."""
    encode = up.service.backend.tokenizer.encode
    up.engine.says = [encode(text, add_special_tokens=False) for text in texts]


def ask(client, **extra):
    return client.chat.completions.create(model="fake", messages=CHAT, **extra)


def streamed(client, **extra):
    """The deltas of the first choice, and its finish_reason."""
    chunks = [c.choices[0] for c in ask(client, stream=True, **extra) if c.choices]
    return [c.delta for c in chunks], [c.finish_reason for c in chunks]


class TestCalls:
    def test_a_call_that_the_model_chose_is_told_as_one(self, up, client):
        say(up, CALL)
        choice = ask(client, tools=TOOLS).choices[0]
        (call,) = choice.message.tool_calls
        assert (call.type, call.id[:5], call.function.name) == ("function", "call_", "weather")
        assert json.loads(call.function.arguments) == {"place": "Oslo"}
        assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")

    def test_text_before_a_call_is_content(self, up, client):
        say(up, f"I look. {CALL}")
        message = ask(client, tools=TOOLS).choices[0].message
        assert (message.content, len(message.tool_calls)) == ("I look.", 1)

    def test_a_forced_call_that_was_cut_leaves_no_text(self, up, client):
        say(up, f"{CALL}\n<tool_c")
        message = ask(client, tools=TOOLS, tool_choice="required").choices[0].message
        assert (message.content, len(message.tool_calls)) == (None, 1)

    def test_plain_text_beside_tools_stays_text(self, up, client):
        say(up, "No tool needed.")
        choice = ask(client, tools=TOOLS).choices[0]
        assert (choice.message.content, choice.message.tool_calls) == ("No tool needed.", None)
        assert choice.finish_reason == "stop"

    def test_a_stream_gives_name_then_fragments_that_join(self, up, client, monkeypatch):
        monkeypatch.setattr(up.engine, "step_time", 0.01)  # else what waits is sent as one
        say(up, CALL + TICK)
        deltas, reasons = streamed(client, tools=TOOLS)
        calls = [call for delta in deltas for call in delta.tool_calls or ()]
        named = [call for call in calls if call.function.name]
        assert [(c.index, c.function.name, c.type) for c in named] == [
            (0, "weather", "function"), (1, "clock", "function"),
        ]  # fmt: skip
        assert len({call.id for call in named}) == 2
        arguments = [
            "".join(c.function.arguments or "" for c in calls if c.index == i) for i in (0, 1)
        ]
        assert [json.loads(text) for text in arguments] == [{"place": "Oslo"}, {}]
        assert len(calls) > 5
        assert not any(delta.content for delta in deltas)
        assert deltas[0].role == "assistant"
        assert reasons == [None] * (len(reasons) - 1) + ["tool_calls"]

    def test_the_client_builds_the_same_message_from_a_stream(self, up, client):
        say(up, f"I look. {CALL}")
        with client.chat.completions.stream(model="fake", messages=CHAT, tools=TOOLS) as stream:
            stream.until_done()
            message = stream.get_final_completion().choices[0].message
        assert message.content == "I look."
        assert message.tool_calls[0].function.arguments == '{"place":"Oslo"}'

    def test_each_sample_has_a_reader_of_its_own(self, up, client):
        say(up, CALL, "Just text.", TICK)
        choices = ask(client, tools=TOOLS, n=3).choices
        names = [[c.function.name for c in choice.message.tool_calls or ()] for choice in choices]
        assert names == [["weather"], [], ["clock"]]
        assert [c.finish_reason for c in choices] == ["tool_calls", "stop", "tool_calls"]

    def test_one_call_is_told_where_parallel_ones_are_not_wanted(self, up, client):
        say(up, CALL + TICK)
        calls = ask(client, tools=TOOLS, parallel_tool_calls=False).choices[0].message.tool_calls
        assert [call.function.name for call in calls] == ["weather"]

    @pytest.mark.parametrize(("choice", "reason"), [("required", "tool_calls"), (NAMED, "stop")])
    @pytest.mark.parametrize("stream", [False, True])
    def test_forced_calls_end_as_at_openai(self, up, client, choice, reason, stream):
        say(up, CALL)
        asked = {"tools": TOOLS, "tool_choice": choice}
        if stream:
            assert streamed(client, **asked)[1][-1] == reason
        else:
            answer = ask(client, **asked).choices[0]
            assert (answer.finish_reason, len(answer.message.tool_calls)) == (reason, 1)

    def test_a_call_that_is_cut_ends_with_length(self, up, client):
        say(up, CALL)
        choice = ask(client, tools=TOOLS, max_tokens=45).choices[0]
        assert choice.finish_reason == "length"
        assert choice.message.tool_calls[0].function.arguments.startswith('{"place"')

    def test_what_is_no_call_stays_text(self, up, client):
        say(up, "<tool_call> weather?")
        assert ask(client, tools=TOOLS).choices[0].message.content == "<tool_call> weather?"

    def test_without_tools_tags_are_text_and_hidden_tokens_hidden(self, up, client):
        say(up, "a<tool_call>b")
        assert ask(client).choices[0].message.content == "ab"

    def test_no_other_special_token_leaks_beside_a_call(self, up, client):
        say(up, f"<|private|>Hm.<|private|>{CALL}<|private|>")
        message = ask(client, tools=TOOLS).choices[0].message
        assert (message.content, len(message.tool_calls)) == ("Hm.", 1)
        assert "private" not in message.model_dump_json()

    def test_logprobs_beside_calls_hold_every_token(self, up, client):
        say(up, CALL)
        answer = ask(client, tools=TOOLS, logprobs=True)
        assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens
        chunks = ask(client, tools=TOOLS, logprobs=True, stream=True)
        entries = [
            e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content
        ]
        assert len(entries) == answer.usage.completion_tokens

    def test_a_fault_of_a_reader_ends_that_request_alone(self, up, client, monkeypatch):
        def boom(self, text):
            raise ZeroDivisionError("secret")

        say(up, CALL)
        with monkeypatch.context() as patch:
            patch.setattr(Reader, "feed", boom)
            failed = up.post("/v1/chat/completions", {"messages": CHAT, "tools": TOOLS})
            assert up.post("/v1/completions", {"prompt": "a"}).status_code == 200
        assert (failed.status_code, "secret" in failed.text) == (500, False)
        assert ask(client, tools=TOOLS).choices[0].message.tool_calls


class TestThoughts:
    def test_thoughts_are_apart_from_the_answer_under_both_names(self, up, client):
        say(up, "<think>\nHm, well.\n</think>\n\nIt rains.")
        answer = ask(client)
        message = answer.choices[0].message
        assert message.content == "It rains."
        assert message.reasoning_content == message.reasoning == "Hm, well."
        n_thought = answer.usage.completion_tokens_details.reasoning_tokens
        n_before = len(up.service.backend.tokenizer.encode("<think>\nHm, well.")) - 1
        assert n_thought == n_before

    def test_a_stream_has_them_in_deltas_of_their_own(self, up, client):
        say(up, "<think>Hm, well.</think>It rains.")
        deltas, _ = streamed(client)
        thoughts = [delta.model_extra.get("reasoning_content") for delta in deltas]
        assert "".join(filter(None, thoughts)) == "Hm, well."
        assert "".join(delta.content or "" for delta in deltas) == "It rains."
        assert not any(t and d.content for t, d in zip(thoughts, deltas, strict=True))

    def test_a_thought_that_the_prompt_opened_goes_on(self, up, client):
        say(up, "Hm.</think>Yes.")
        kwargs = {"chat_template_kwargs": {"thinks": True}}
        message = ask(client, extra_body=kwargs).choices[0].message
        assert (message.reasoning_content, message.content) == ("Hm.", "Yes.")

    def test_a_call_may_follow_a_thought(self, up, client):
        say(up, f"<think>Hm.</think>{CALL}")
        message = ask(client, tools=TOOLS).choices[0].message
        assert (message.reasoning_content, message.content) == ("Hm.", None)
        assert message.tool_calls[0].function.name == "weather"


class TestPrompt:
    def prompt(self, up) -> str:
        ids = up.engine.submitted[-1].prompt_token_ids
        return up.service.backend.tokenizer.decode(ids, skip_special_tokens=False)

    def test_the_template_sees_the_tools_unless_none_may_be_called(self, up, client):
        ask(client, tools=TOOLS)
        assert '"name": "weather", "description": "The weather of a place."' in self.prompt(up)
        ask(client, tools=TOOLS, tool_choice="none")
        assert "weather" not in self.prompt(up)

    def test_allowed_tools_are_those_that_it_sees(self, up, client):
        tools = [{"type": "function", "function": {"name": "clock"}}]
        allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": tools}}
        ask(client, tools=TOOLS, tool_choice=allowed)
        assert "clock" in self.prompt(up)
        assert "weather" not in self.prompt(up)

    def test_free_variables_and_the_effort_reach_the_template(self, up, client):
        kwargs = {"chat_template_kwargs": {"effort": "FREE"}}
        ask(client, extra_body=kwargs, reasoning_effort="high")
        assert "FREE" in self.prompt(up)
        assert self.prompt(up).endswith("high")

    @pytest.mark.parametrize(("kwargs", "words"), [
        ({"tools": []}, "tools is a field of the body"),
        ({"tokenize": False}, "may not set 'tokenize'"),
        ({"messages": []}, "may not set 'messages'"),
        ({str(i): i for i in range(65)}, "has 65 entries; at most 64"),
        ({"a": "x" * 20_000}, "at most 16384"),
    ])  # fmt: skip
    def test_variables_that_may_not_be_are_refused(self, up, kwargs, words):
        body = {"messages": CHAT, "chat_template_kwargs": kwargs}
        answer = up.post("/v1/chat/completions", body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "chat_template_kwargs"
        assert words in answer.json()["error"]["message"]


def function(**fields):
    return [{"type": "function", "function": {"name": "f"} | fields}]


BAD = [
    ({"tools": {}}, "tools", "tools"),
    ({"tools": ["f"]}, "tools", "tools[0].type"),
    ({"tools": [WEATHER, {"type": "web_search"}]}, "tools", "tools[1].type"),
    ({"tools": [{"type": "function"}]}, "tools", "tools[0].function must"),
    ({"tools": function(name="a b")}, "tools", "tools[0].function.name must"),
    ({"tools": function(name="a" * 129)}, "tools", "tools[0].function.name must"),
    ({"tools": function(name=5)}, "tools", "tools[0].function.name must"),
    ({"tools": function(description=5)}, "tools", "tools[0].function.description"),
    ({"tools": function(parameters=[])}, "tools", "tools[0].function.parameters"),
    ({"tools": [CLOCK, CLOCK]}, "tools", "tools[1].function.name: 'clock' is there twice"),
    ({"tools": [CLOCK] * 129}, "tools", "129 entries; at most 128"),
    ({"tools": function(description="x" * 600_000)}, "tools", "bytes; at most 500000"),
    ({"tool_choice": "required"}, "tool_choice", "needs tools"),
    ({"tool_choice": NAMED}, "tool_choice", "names 'weather', which tools does not list"),
    ({"tools": [CLOCK], "tool_choice": NAMED}, "tool_choice", "names 'weather'"),
    ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice", "must be none, auto, required"),
    ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice", "must be none"),
    ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": []}},
     "tool_choice", "must be none"),
    ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
     "tool_choice", "tool_choice and response_format each ask for a form"),
    ({"tools": TOOLS, "tool_choice": NAMED, "guided_regex": "a"},
     "tool_choice", "tool_choice and guided_regex each ask for a form"),
    ({"tools": TOOLS, "guided_grammar": 'start: "a"'}, "guided_grammar", "with tools it may only"),
    ({"functions": [{"name": "f"}]}, "functions", "not supported"),
    ({"function_call": "auto"}, "function_call", "not supported"),
    ({"reasoning_effort": "x" * 33}, "reasoning_effort", "more than 32"),
]  # fmt: skip


@pytest.mark.parametrize(("extra", "param", "words"), BAD)
def test_tools_that_are_none_are_refused_by_name(up, extra, param, words):
    answer = up.post("/v1/chat/completions", {"messages": CHAT} | extra)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert words in answer.json()["error"]["message"]


class TestGrammar:
    """What is forced is a grammar of the whole answer: llguidance says what it takes."""

    @pytest.fixture
    def takes(self, up, directory):
        tokenizer = LLTokenizer((directory / "tokenizer.json").read_text())

        def takes(text: str) -> bool:
            grammar = up.engine.submitted[-1].params.structured_outputs.grammar
            matcher = LLMatcher(tokenizer, grammar)
            assert not matcher.is_error(), matcher.get_error()
            ids = up.service.backend.tokenizer.encode(text, add_special_tokens=False)
            return all(map(matcher.consume_token, ids)) and matcher.is_accepting()

        return takes

    def test_required_takes_calls_of_any_tool_and_nothing_else(self, client, takes):
        ask(client, tools=TOOLS, tool_choice="required")
        assert takes(CALL)
        assert takes(TICK)
        assert takes(f"{CALL}\n{TICK}")
        assert not takes("No.")
        assert not takes(CALL.replace("Oslo", "a place whose name is far too long"))

    def test_named_takes_one_call_of_that_tool(self, client, takes):
        ask(client, tools=TOOLS, tool_choice=NAMED)
        assert takes(CALL)
        assert not takes(TICK)
        assert not takes(f"{CALL}\n{CALL}")

    def test_thoughts_may_come_first(self, client, takes):
        ask(client, tools=TOOLS, tool_choice=NAMED)
        assert takes(f"<think>\nHm.\n</think>\n\n{CALL}")
        assert not takes(f"Hm.</think>{CALL}")
        ask(client, tools=TOOLS, tool_choice=NAMED,
            extra_body={"chat_template_kwargs": {"thinks": True}})  # fmt: skip
        assert takes(f"Hm.</think>{CALL}")
        assert not takes(CALL)

    @pytest.mark.parametrize(("form", "text"), [
        ({"guided_json": {"type": "array", "items": {"type": "integer"}}}, "[1, 2]"),
        ({"guided_json": '{"type": "null"}'}, "null"),
        ({"response_format": {"type": "json_object"}}, '{"a": 1}'),
        ({"guided_regex": r"[0-9]+/\/[a-z]"}, "12//b"), ({"guided_choice": ["yes", "no"]}, "no"),
        ({"structured_outputs": {"json": True, "disable_any_whitespace": True}}, '{"a":1}'),
        ({"guided_json": {"const": "a::=b"}}, '"a::=b"'), ({"guided_regex": "::=c"}, "::=c"),
    ])  # fmt: skip
    def test_a_form_may_have_thoughts_before_it_and_calls_beside_it(
        self, up, client, takes, form, text
    ):
        ask(client, tools=TOOLS, extra_body=form)
        assert takes(text)
        assert takes(f"<think>Hm.</think>{text}")
        assert takes(CALL)
        assert not takes("Well, well.")

    def test_a_grammar_of_the_bodys_own_is_left_alone(self, up, client, takes):
        ask(client, extra_body={"guided_grammar": 'start: "a"'})
        assert up.engine.submitted[-1].params.structured_outputs.grammar == 'start: "a"'


class TestOperator:
    def test_tools_that_the_template_hides_are_ignored_with_one_warning(self, tokenizer, caplog):
        speech._warn_of_unseen_tools.cache_clear()
        template = tiny_tokenizers.CHAT_TEMPLATE.replace("tools", "other")
        blind = Tokenizer(Path(tokenizer._fast.name_or_path), chat_template=template)
        logger = logging.getLogger("fastgen_jax")
        logger.addHandler(caplog.handler)
        with serving(blind) as up:
            say(up, CALL)
            for _ in range(2):
                body = {"messages": CHAT, "tools": TOOLS}
                choice = up.post("/v1/chat/completions", body).json()["choices"][0]
                assert choice["message"]["content"] == CALL
            forced = body | {"tool_choice": "required"}
            choice = up.post("/v1/chat/completions", forced).json()["choices"][0]
            assert choice["message"]["tool_calls"]
        logger.removeHandler(caplog.handler)
        assert len({id(r) for r in caplog.records if "offer tools" in r.getMessage()}) == 1

    def test_the_operator_may_forbid_unforced_calls(self, directory):
        with serving(Tokenizer(str(directory)), enable_auto_tool_choice=False) as up:
            say(up, "Hm.")
            up.post("/v1/chat/completions", {"messages": CHAT, "tools": TOOLS})
            assert "weather" not in TestPrompt().prompt(up)

    def test_the_operator_may_name_the_parsers(self, tokenizer):
        with serving(tokenizer, reasoning_parser="deepseek_r1", tool_call_parser="hermes") as up:
            say(up, "<think>Hm.</think>Yes.")
            message = up.post("/v1/chat/completions", {"messages": CHAT}).json()["choices"][0]
            assert message["message"]["reasoning_content"] == "Hm."

    @pytest.mark.parametrize("name", ["tool_call_parser", "reasoning_parser"])
    def test_a_parser_that_there_is_not_is_refused_with_those_that_are(self, name):
        with pytest.raises(ConfigError, match=f"{name} must be one of .*, got 'martian'"):
            ServerConfig(**{name: "martian"})


def test_events_of_a_stream_have_one_role_and_end_with_done(up):
    say(up, CALL)
    body = {
        "messages": CHAT,
        "tools": TOOLS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    *chunks, usage, done = events_of(up.post("/v1/chat/completions", body).text)
    assert (done, usage["choices"]) == ("[DONE]", [])
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
