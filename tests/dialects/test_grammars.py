"""What a grammar allows is read back as calls that the tools' schemas allow."""

import random

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer

from fastgen_jax.dialects import DIALECTS, Tool, make_reader
from tests.dialects.written import PING, WRITERS, calls_of, read, text_of

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
        "additionalProperties": False,
    },
)
TOOLS = (SEARCH, PING._replace(parameters={**PING.parameters, "additionalProperties": False}),
         LATER)  # fmt: skip
BYTES = LLTokenizer("byte")
ENDS = ('"', "}", "]", "\n</parameter>\n", "</arg_value>\n", "</think>", "<|end|>", "</tool_call>",
        ")", "Here is my response:")  # fmt: skip
SEEDS = pytest.mark.parametrize("seed", range(12))
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
    text = walk(dialect.grammar(TOOLS, parallel=True), seed, stays=True)
    events = read(make_reader(dialect, tools=TOOLS), text)
    found = calls_of(events)
    assert found
    assert text_of(events) == ""
    schemas = {tool.name: tool.parameters for tool in TOOLS}
    for tool, arguments in found:
        jsonschema.validate(arguments, schemas[tool])
