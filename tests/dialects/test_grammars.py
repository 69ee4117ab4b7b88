"""What a grammar allows is read back as calls that the tools' schemas allow."""

import json
import random
import time

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from fastgen_jax.dialects import DIALECTS, THINKING, Tool, make_reader
from fastgen_jax.dialects.xml_text import Parameters
from fastgen_jax.errors import InvalidRequest
from tests.dialects.written import (
    PING,
    WRITERS,
    calls_of,
    grammar_of,
    read,
    text_of,
    thought_of,
)

SEARCH = Tool(
    "search",
    {
        "type": "object",
        "properties": {
            "query": {"type": "string"},
            "limit": {"type": "integer", "minimum": 0, "maximum": 99},
            "order": {"enum": ["up", "down"]},
            "exact": {"type": "boolean"},
            "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 2},
            "after": {"type": ["string", "null"]},
        },
        "required": ["limit", "query"],
        "additionalProperties": False,
        "$defs": {"tag": {"type": "object", "properties": {"id": {"type": "integer"}},
                          "required": ["id"], "additionalProperties": False}},
    },
)  # fmt: skip
LATER = Tool(
    "later",
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}, "c": {"type": "null"}},
    },
)
TOOLS = (SEARCH, PING._replace(parameters={**PING.parameters, "additionalProperties": False}),
         LATER)  # fmt: skip
FIRST_MARK = 0xE000  # of characters that stand for markers
BYTES = LLTokenizer("byte")
ENDS = ('"', "}", "]", "\n</parameter>\n", "</arg_value>\n", "</think>", "[/THINK]", "<|end|>",
        "</tool_call>", ")", "Here is my response:")  # fmt: skip
SEEDS = pytest.mark.parametrize("seed", range(8))
FORMATS = pytest.mark.parametrize("name", WRITERS)


def walk(grammar: str, seed: int, *, stays: bool = False) -> str:
    """A random text of the grammar, that hurries to its end."""
    random_state = random.Random(seed)
    matcher = LLMatcher(BYTES, grammar)
    assert not matcher.is_error(), matcher.get_error()
    text = bytearray()
    while not matcher.is_stopped():
        assert len(text) < 3000, bytes(text)
        if matcher.is_accepting() and (not stays or random_state.random() < 0.3):
            break
        end = random_state.choice(ENDS).encode()
        if random_state.random() < 0.5 and matcher.validate_tokens(list(end)) == len(end):
            chosen = list(end)
        else:
            bias = matcher.compute_logit_bias()
            allowed = [token for token in range(256) if bias[token]]
            if not allowed:
                break
            letters = [token for token in allowed if 32 <= token < 127]
            chosen = [random_state.choice(letters or allowed)]
        assert matcher.consume_tokens(chosen), matcher.get_error()
        text += bytes(chosen)
    return text.decode(errors="replace")


@FORMATS
@SEEDS
def test_what_a_grammar_allows_is_read_as_calls_that_fit_their_schemas(name, seed):
    dialect = DIALECTS[name]
    text = walk(grammar_of(dialect, TOOLS, parallel=True), seed, stays=True)
    events = read(make_reader(dialect, tools=TOOLS), text)
    found = calls_of(events)
    assert found
    assert text_of(events) == ""
    schemas = {tool.name: tool.parameters for tool in TOOLS}
    for tool, arguments in found:
        jsonschema.validate(arguments, schemas[tool])


@FORMATS
@SEEDS
def test_a_tool_that_stands_alone_is_called_once(name, seed):
    dialect = DIALECTS[name]
    text = walk(grammar_of(dialect, [LATER]), seed)
    assert [tool for tool, _ in calls_of(read(make_reader(dialect, tools=TOOLS), text))] == [
        "later"
    ]


@FORMATS
def test_names_with_quotes_and_braces_make_valid_grammars(name):
    odd = Tool('a"\\{}\n', {"type": "object", "properties": {'b"\\{}': {"type": "string"}}})
    grammar = grammar_of(DIALECTS[name], [odd], parallel=True)
    assert LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(grammar), BYTES) == ""


@FORMATS
@SEEDS
@pytest.mark.parametrize("closing", [{}, {"type": "object"}], ids=repr)
def test_arguments_are_an_object_of_the_members_that_a_schema_lists(name, seed, closing):
    tool = Tool("f", {"properties": {"a": {"type": "integer"}}, **closing})
    dialect = DIALECTS[name]
    events = read(make_reader(dialect, tools=[tool]), walk(grammar_of(dialect, [tool]), seed))
    [(_, arguments)] = calls_of(events)
    assert arguments.keys() <= {"a"}


@pytest.mark.parametrize("name", ["qwen3_coder", "glm45", "pythonic"])
def test_definitions_are_not_repeated_without_end(name):
    properties = {str(i): {"$ref": "#/$defs/a"} for i in range(1000)}
    tool = Tool("f", {"properties": properties, "$defs": {"a": {"enum": ["a" * 100_000]}}})
    with pytest.raises(InvalidRequest, match="exceed 1000000 characters; write schemas in place"):
        grammar_of(DIALECTS[name], [tool])


@FORMATS
def test_a_thousand_parameters_make_a_grammar_that_compiles(name):
    properties = {f"p{i}": {"type": "integer"} for i in range(1000)}
    grammar = grammar_of(DIALECTS[name], [Tool("f", {"properties": properties})])
    assert len(grammar) < 300_000
    assert LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(grammar), BYTES) == ""


def test_types_are_not_looked_for_without_end():
    loop = {"anyOf": [{"$ref": f"#/$defs/{i}"} for i in range(3000)]}
    definitions = {str(i): loop for i in range(3000)}
    properties = {str(i): {"$ref": "#/$defs/0"} for i in range(3000)}
    parameters = Parameters(Tool("f", {"properties": properties, "$defs": definitions}))
    started = time.perf_counter()
    assert {kind for name in properties for kind in parameters.kinds(name)} == set()
    assert time.perf_counter() - started < 3


class Special:
    """A vocabulary of bytes, and of markers that are tokens of their own."""

    eos_token_id, bos_token_id = 256, None

    def __init__(self, markers):
        self.tokens = [bytes([i]) for i in range(256)] + [b"<eos>"]
        self.tokens += [marker.encode() for marker in markers]
        self.special_token_ids = list(range(256, len(self.tokens)))
        self.ids = {marker: 257 + i for i, marker in enumerate(markers)}

    def __call__(self, text):
        return list(text if isinstance(text, bytes) else text.encode())

    def literal(self, marker: str) -> str:
        return f"<[{self.ids[marker]}]>"

    def spell(self, text: str) -> list[int]:
        for marker, id in self.ids.items():
            text = text.replace(marker, chr(FIRST_MARK + id))
        marks = {chr(FIRST_MARK + id): [id] for id in self.ids.values()}
        return [id for character in text for id in marks.get(character, character.encode())]


@FORMATS
def test_markers_may_be_tokens_of_the_vocabulary(name):
    dialect = DIALECTS[name]
    special = Special(dialect.markers)
    grammar = grammar_of(dialect, TOOLS, literal=special.literal)
    matcher = LLMatcher(LLTokenizer(TokenizerWrapper(special)), grammar)
    text = WRITERS[name]([("later", {"a": 5})]).removesuffix("<|call|>")
    assert matcher.consume_tokens(special.spell(text)), matcher.get_error()
    assert matcher.is_accepting()


def nested(thoughts: str, answer: str) -> str:
    grammars = [{"lark_grammar": thoughts}, {"name": "answer", "lark_grammar": answer}]
    return json.dumps({"grammars": grammars})


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("name", THINKING)
@SEEDS
def test_thoughts_come_first_and_then_what_the_answer_allows(name, is_open, seed):
    thinking = THINKING[name]
    thoughts = thinking.grammar(is_open=is_open)
    text = walk(nested(thoughts, "start: /[0-9]{3}/"), seed)
    reader = make_reader(thinking=thinking, is_thinking=is_open)
    events = read(reader, thinking.openings[0] * (is_open and bool(thinking.dialect)) + text)
    assert text_of(events).isdecimal()
    assert len(text_of(events)) == 3


@pytest.mark.parametrize("name", THINKING)
@SEEDS
def test_thoughts_come_before_calls(name, seed):
    thinking = THINKING[name]
    dialect = thinking.dialect or DIALECTS["hermes"]
    text = walk(nested(thinking.grammar(is_call=True), grammar_of(dialect, TOOLS)), seed)
    events = read(make_reader(dialect, thinking, tools=TOOLS), text)
    assert len(calls_of(events)) == 1
    assert text_of(events) == ""


def test_some_of_these_walks_think():
    thinking = THINKING["qwen3"]
    texts = [walk(nested(thinking.grammar(), "start: /[0-9]{3}/"), seed) for seed in range(60)]
    thoughts = [thought_of(read(make_reader(thinking=thinking), text)) for text in texts]
    assert 0 < sum(map(bool, thoughts)) < 60


def test_the_end_of_thoughts_may_be_a_token_of_the_vocabulary():
    thinking = THINKING["qwen3"]
    special = Special(thinking.markers)
    thoughts = thinking.grammar(literal=special.literal)
    matcher = LLMatcher(
        LLTokenizer(TokenizerWrapper(special)), nested(thoughts, "start: /[0-9]{3}/")
    )
    text = "<think>\nIs it </thin?\n</think>\n\n123"
    assert matcher.consume_tokens(special.spell(text)), matcher.get_error()
    assert matcher.is_accepting()
