"""What masks allow, token by token as the engine goes, is what the form says."""

import itertools
import json
import random
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jsonschema
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastgen_jax.built_in import DEMO
from fastgen_jax.engine.masks import MaskMaker
from fastgen_jax.engine.requests import make_sequences
from fastgen_jax.engine.types import Output, Request, Sequence
from fastgen_jax.errors import InvalidRequest
from fastgen_jax.grammar import GrammarCompiler, grammar_text
from fastgen_jax.sampling_params import SamplingParams, StructuredOutputsParams
from fastgen_jax.tokenizer import TextStream, Tokenizer
from tests import tiny_tokenizers

PROMPT = "Anna has"
N_WANDERED = 20  # tokens, after which a walk makes for the end ...
MAX_TOKENS = 400  # ... which it must have reached by then
ENDING = '}],:"'  # what leads to the end of JSON, best first
JSON_TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
NAMES = ("a", "bc", "é", "the code", 'q"')
FORMATS = ("date", "ipv4", "ipv6", "uuid", "email")
# A kind of tokenizer, and by how much the model's vocabulary is larger.
ROOMS = [("demo", 21), ("demo", -3), ("byte_level", 37), ("sentencepiece", 0)]
N_EXAMPLES = 12  # of each test in each room


class Walk(NamedTuple):
    """One output. is_over: it has ended; else the grammar could have gone on."""

    token_ids: list[int]
    is_over: bool


class Room:
    """A tokenizer, and what the engine makes of requests with it."""

    def __init__(self, directory: str, n_more: int):
        self.tokenizer = Tokenizer(directory)
        assert self.tokenizer.eos_token_id is not None
        self.eos = frozenset([self.tokenizer.eos_token_id])
        self.vocab_size = self.tokenizer.vocab_size + n_more
        self.compiler = GrammarCompiler(self.tokenizer.as_json, self.vocab_size, self.eos)
        self.masks = MaskMaker(self.vocab_size)

    def sequence(self, **form: Any) -> Sequence:
        grammar = self.compiler.compile(grammar_text(StructuredOutputsParams(**form)))
        request = Request(self.tokenizer.encode(PROMPT), SamplingParams(), grammar=grammar)
        sizes: Any = {"max_tokens": 10**6, "vocab_size": self.vocab_size}
        [sequence] = make_sequences(
            request, 0, itertools.count(), engine_seed=0, eos_token_ids=self.eos, **sizes
        )
        return sequence

    def allowed(self, sequence: Sequence) -> list[int]:
        """Tokens that the model could have said next."""
        [mask] = self.masks.make([sequence], 1)
        assert sequence.constraint
        assert not sequence.constraint.problem
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        return np.flatnonzero(bits[: self.vocab_size]).tolist()

    def say(self, sequence: Sequence, token_id: int) -> bool:
        """Appends a token, as the engine does; whether the sequence goes on."""
        sequence.output_ids.append(token_id)
        if token_id in sequence.ending_ids:
            return False
        assert sequence.constraint
        goes_on = sequence.constraint.advance(token_id)
        assert not sequence.constraint.problem
        return goes_on

    def leading_to_the_end(self, sequence: Sequence, allowed: list[int]) -> list[int]:
        """Of these tokens the best ones: EOS, what closes JSON, other text."""
        if ends := self.eos.intersection(allowed):
            return list(ends)
        said = re.sub(r"\\.", "", self.text(sequence.output_ids))
        ending = '"@.' if said.count('"') % 2 else ENDING
        ranks: dict[int, list[int]] = {}
        for id in allowed:
            text = self.tokenizer.token_text(id)
            rank = ending.find(text) if text and text in ending else len(ENDING)
            ranks.setdefault(rank, []).append(id)
        return ranks[min(ranks)]

    def walk(self, sequence: Sequence, seed: int, n_tokens: int = MAX_TOKENS) -> Walk:
        """Says what it may at random, then what leads to the end."""
        rng = random.Random(seed)
        while len(sequence.output_ids) < n_tokens:
            allowed = self.allowed(sequence)
            assert allowed, self.text(sequence.output_ids)
            assert sequence.constraint
            may_end = bool(self.eos.intersection(allowed))
            assert may_end == sequence.constraint.matcher.is_accepting()
            if len(sequence.output_ids) >= N_WANDERED:
                allowed = self.leading_to_the_end(sequence, allowed)
            if not self.say(sequence, rng.choice(allowed)):
                return Walk(sequence.output_ids, is_over=True)
        return Walk(sequence.output_ids, is_over=False)

    def text(self, token_ids: list[int]) -> str:
        """What a client gets, which is what the matcher has consumed."""
        said = [id for id in token_ids if id not in self.eos]
        stream = TextStream(self.tokenizer, self.tokenizer.encode(PROMPT), SamplingParams())
        text = "".join(stream.push(Output(0, 0, id)).text for id in said)
        text += stream.push(Output(0, 0, None, finish_reason="stop")).text
        consumed = self.compiler._tokenizer.decode_bytes(said)
        assert text == consumed.decode(errors="replace")
        return text

    def outcome(self, seed: int, **form: Any) -> str:
        """The text of an output that has ended."""
        walk = self.walk(self.sequence(**form), seed)
        text = self.text(walk.token_ids)
        assert walk.is_over, text
        return text

    def accepts(self, text: str, **form: Any) -> bool:
        """Whether the text could have been said, token by token, and ended there."""
        sequence = self.sequence(**form)
        for id in self.compiler._tokenizer.tokenize_str(text):
            if id not in self.allowed(sequence):
                return False
            if not self.say(sequence, id):
                break
        assert sequence.constraint
        return self.text(sequence.output_ids) == text and sequence.constraint.matcher.is_accepting()


@pytest.fixture(scope="module", params=ROOMS, ids=str)
def room(request, tmp_path_factory) -> Room:
    kind, n_more = request.param
    if kind == "demo":
        return Room(str(DEMO), n_more)
    return Room(tiny_tokenizers.KINDS[kind](tmp_path_factory.mktemp(kind)), n_more)


@pytest.fixture(scope="module")
def demo() -> Room:
    return Room(str(DEMO), 21)


def bounds(low: str, high: str, largest: int) -> st.SearchStrategy[dict[str, Any]]:
    """None, one or both of two bounds, the lower one below the higher one."""
    pairs = st.tuples(*[st.integers(0, largest)] * 2).map(sorted)
    kept = st.sets(st.sampled_from([low, high]))
    return st.builds(
        lambda pair, keys: {k: v for k, v in zip((low, high), pair, strict=True) if k in keys},
        pairs,
        kept,
    )


def typed(name: str, *fields: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[Any]:
    """Schemas of a type, with the fields of all of these."""
    return st.tuples(*fields).map(
        lambda all: {"type": name} | {k: v for f in all for k, v in f.items()}
    )


def field(key: str, values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={key: values})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.sampled_from(NAMES),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.sampled_from(NAMES), inner, max_size=2)
    ),
    max_leaves=4,
)
LEAVES = st.one_of(
    st.sampled_from(["null", "boolean"]).map(lambda name: {"type": name}),
    st.lists(VALUES, min_size=1, max_size=3).map(lambda values: {"enum": values}),
    VALUES.map(lambda value: {"const": value}),
    typed("integer", bounds("minimum", "maximum", 3000)),
    typed("integer", field("multipleOf", st.integers(1, 30)), field("minimum", st.just(-200))),
    typed("number", bounds("minimum", "exclusiveMaximum", 50).filter(
        lambda pair: len(set(pair.values())) == len(pair))),
    typed("string", bounds("minLength", "maxLength", 9)),
    st.sampled_from(FORMATS).map(lambda name: {"type": "string", "format": name}),
    st.sampled_from(["^[a-f]{2,5}$", "x{0,3}", "^(é|the)+$", "^[0-9]+-[0-9]+$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern}),
)  # fmt: skip


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    properties = st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    required = st.sets(st.sampled_from(NAMES))
    others = field("additionalProperties", st.booleans() | inner)
    return st.builds(
        lambda properties, required, others: {"type": "object", "properties": properties,
            "required": sorted(required & properties.keys()), **others},
        properties, required, others,
    )  # fmt: skip


def larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        typed("array", st.fixed_dictionaries({"items": inner}), bounds("minItems", "maxItems", 4)),
        several.map(lambda some: {"type": "array", "prefixItems": some, "items": False}),
        objects(inner),
        several.map(lambda some: {"anyOf": some}),
        st.tuples(objects(inner), objects(inner)).map(lambda some: {"allOf": list(some)}),
        st.just({"oneOf": [{"type": "integer"}, {"type": "string"}]}),
        st.sampled_from(["#/$defs/list", "#/$defs/tree"]).map(lambda place: {"$ref": place}),
    )


DEFINITIONS = {
    "list": {"type": "object", "required": ["head"], "properties": {
        "head": {"type": "integer"},
        "tail": {"anyOf": [{"$ref": "#/$defs/list"}, {"type": "null"}]}}},
    "tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2},
}  # fmt: skip
SCHEMAS = st.recursive(LEAVES, larger, max_leaves=6).map(lambda s: {"$defs": DEFINITIONS, **s})
# Rust's and Python's syntax with the same meaning: each knows digits of its own Unicode version.
ATOMS = st.sampled_from(["a", "é", "[a-f]", "[^x\n]", "[0-9]", " ", "the", "漢", r"\.", "(?:ab|c)"])
REGEXES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda some: f"(?:{'|'.join(some)})"),
        st.tuples(inner, st.sampled_from(["?", "*", "+", "{2}", "{1,3}"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=6,
)
SEEDS = st.integers(0, 2**32)
some = settings(max_examples=N_EXAMPLES, deadline=None)


def assert_valid(text: str, schema: Any) -> None:
    jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(
        json.loads(text)
    )


def compiles(room: Room, form: dict[str, Any]) -> bool:
    try:
        room.sequence(**form)
    except InvalidRequest:
        return False
    return True


@given(schema=SCHEMAS, seed=SEEDS)
@some
def test_what_a_schema_allows_is_valid_by_it(room, schema, seed):
    if compiles(room, {"json": schema}):  # parts of allOf may contradict each other
        assert_valid(room.outcome(seed, json=schema), schema)


@given(seed=SEEDS)
@some
def test_any_object_is_one(room, seed):
    assert isinstance(json.loads(room.outcome(seed, json_object=True)), dict)


@given(regex=REGEXES, seed=SEEDS)
@some
def test_what_a_regex_allows_matches_it_as_a_whole(room, regex, seed):
    assume(compiles(room, {"regex": regex}))
    walk = room.walk(room.sequence(regex=regex), seed)
    assume(walk.is_over)  # nothing leads to the end of [^x]*a but luck
    assert re.fullmatch(regex, room.text(walk.token_ids))


@given(choice=st.lists(st.text(max_size=8), min_size=1, max_size=5), seed=SEEDS)
@some
def test_a_choice_is_one_of_them(room, choice, seed):
    if any(choice):
        assert room.outcome(seed, choice=tuple(choice)) in choice


ARITHMETIC = [
    'start: sum\nsum: product (("+" | "-") product)*\nproduct: atom ("*" atom)*\n'
    'atom: /[0-9]{1,3}/ | "(" sum ")"',
    'root ::= sum\nsum ::= product (("+" | "-") product)*\nproduct ::= atom ("*" atom)*\n'
    'atom ::= [0-9]{1,3} | "(" sum ")"',
]


@pytest.mark.parametrize("grammar", ARITHMETIC, ids=["Lark", "GBNF"])
@given(seed=SEEDS)
@some
def test_what_a_grammar_allows_can_be_read_by_it(room, grammar, seed):
    text = room.outcome(seed, grammar=grammar)
    while text != (shorter := re.sub(r"\((?:\d|[-+*](?=[\d(]))+\)", "1", text)):
        text = shorter
    assert re.fullmatch(r"\d+(?:[-+*]\d+)*", text)


@given(schema=SCHEMAS, seed=SEEDS, n_tokens=st.integers(1, 15))
@some
def test_an_output_cut_short_can_be_finished(room, schema, seed, n_tokens):
    if compiles(room, {"json": schema}):
        sequence = room.sequence(json=schema)
        cut = room.walk(sequence, seed, n_tokens)
        if not cut.is_over:
            assert room.walk(sequence, seed).is_over
            assert_valid(room.text(sequence.output_ids), schema)


def test_neither_special_tokens_nor_places_without_a_token_are_ever_allowed(room):
    allowed = set(room.allowed(room.sequence(regex="(?s:.)*")))
    assert not allowed & (room.tokenizer.special_ids - room.eos)
    assert max(allowed) < room.tokenizer.vocab_size
    assert allowed & room.eos


def test_a_kind_of_tokenizer_that_llguidance_does_not_know_is_refused(tmp_path):
    with pytest.raises(InvalidRequest, match=r"tokenizer does not support it.*decoder"):
        Room(tiny_tokenizers.metaspace(tmp_path), 64).sequence(regex="a")


def test_more_choices_than_the_parser_has_items_are_possible(demo):
    choices = tuple(f"code {i}" for i in range(3000))
    assert demo.outcome(7, choice=choices) in choices


def test_a_grammar_too_ambiguous_to_be_quick_fails_by_itself(demo):
    sequence = demo.sequence(grammar="start: s\ns: s s | s s s | s s s s | /[a-z]/ | /[a-z ]/")
    constraint = sequence.constraint
    for _ in range(MAX_TOKENS):
        constraint.advance(demo.tokenizer.encode("a", add_special_tokens=False)[0])
        if constraint.problem:
            break
    assert "max is 1000" in constraint.problem


# A schema, texts that it allows, and texts that it does not.
KEYWORDS: dict[str, tuple[Any, list[str], list[str]]] = {
    "true": (True, ["null", "1.5e3", '{"a":[]}'], ["nul", "'a'", "[1,]"]),
    "type": ({"type": "integer"}, ["0", "-7"], ["1.5", '"1"', "01"]),
    "several types": ({"type": ["integer", "null"]}, ["3", "null"], ["true", "{}"]),
    "enum": ({"enum": ["a", 5, None]}, ['"a"', "5", "null"], ['"b"', "55", "nullx"]),
    "const": ({"const": {"a": [1]}}, ['{"a":[1]}'], ['{"a":[2]}', '{"a":[1],"b":1}']),
    "minimum": ({"type": "integer", "minimum": 10}, ["10", "999"], ["9", "-10"]),
    "maximum": ({"type": "number", "maximum": 2.5}, ["2.5", "-3"], ["2.51", "3"]),
    "exclusiveMinimum": ({"type": "integer", "exclusiveMinimum": 3}, ["4"], ["3"]),
    "exclusiveMaximum": ({"type": "number", "exclusiveMaximum": 1}, ["0.99"], ["1", "1.0"]),
    "multipleOf": ({"type": "integer", "multipleOf": 7}, ["0", "7", "98"], ["8", "71"]),
    "multipleOf a part": ({"type": "number", "multipleOf": 0.25}, ["1.75"], ["1.8"]),
    "minLength": ({"type": "string", "minLength": 2}, ['"éa"', '"abc"'], ['"a"', '"é"']),
    "maxLength": ({"type": "string", "maxLength": 2}, ['""', '"éa"'], ['"abc"']),
    "pattern, which may be anywhere": (
        {"type": "string", "pattern": "b+"}, ['"b"', '"abba"'], ['""', '"ac"']),
    "format": ({"type": "string", "format": "date"}, ['"2024-02-29"'], ['"2024-2-9"', '"2024"']),
    "items": ({"type": "array", "items": {"type": "null"}}, ["[]", "[null,null]"], ["[1]"]),
    "prefixItems": ({"type": "array", "prefixItems": [{"const": 1}], "items": {"const": 2}},
                    ["[1,2,2]"], ["[2]", "[1,1]"]),
    "minItems": ({"type": "array", "minItems": 1}, ["[0]"], ["[]"]),
    "maxItems": ({"type": "array", "maxItems": 1}, ["[]", "[0]"], ["[0,0]"]),
    "required": ({"type": "object", "properties": {"a": {}, "b": {}}, "required": ["b"]},
                 ['{"b":1}', '{"a":1,"b":1}'], ["{}", '{"a":1}']),
    "additionalProperties": ({"properties": {"a": {}}, "additionalProperties": {"type": "null"},
                              "type": "object"}, ['{"a":1,"z":null}'], ['{"z":1}']),
    "patternProperties": ({"type": "object", "patternProperties": {"^n": {"type": "null"}},
                           "additionalProperties": False},
                          ['{"no":null}'], ['{"no":1}', '{"x":0}']),
    "minProperties": ({"type": "object", "minProperties": 1}, ['{"a":1}'], ["{}"]),
    "maxProperties": ({"type": "object", "maxProperties": 1}, ["{}", '{"a":1}'],
                      ['{"a":1,"b":1}']),
    "anyOf": ({"anyOf": [{"type": "null"}, {"type": "string"}]}, ["null", '"a"'], ["1"]),
    "oneOf that exclude each other": ({"oneOf": [{"type": "null"}, {"type": "integer"}]},
                                      ["null", "1"], ["true"]),
    "allOf": ({"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]}, ["3", "5"],
              ["2", "6"]),
    "allOf of objects": ({"allOf": [
        {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]},
        {"properties": {"b": {"type": "null"}}}]}, ['{"a":null,"b":null}'], ['{"b":null}']),
    "$ref, to itself": ({"type": "array", "items": {"$ref": "#"}}, ["[]", "[[],[[]]]"], ["[1]"]),
}  # fmt: skip


@pytest.mark.parametrize(("schema", "valid", "invalid"), KEYWORDS.values(), ids=KEYWORDS)
def test_a_keyword_allows_what_is_valid_by_it_and_nothing_else(demo, schema, valid, invalid):
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    assert [text for text in valid if not demo.accepts(text, json=schema)] == []
    assert all(validator.is_valid(json.loads(text)) for text in valid)
    assert [text for text in invalid if demo.accepts(text, json=schema)] == []


# Valid by their schemas, and yet never said.
STRICTER: dict[str, tuple[Any, str]] = {
    "objects are closed": ({"type": "object", "properties": {"a": {}}}, '{"a":1,"b":1}'),
    "alternatives are, too": ({"anyOf": [{"type": "object", "properties": {"a": {}}},
                                         {"type": "object", "properties": {"b": {}}}]},
                              '{"a":1,"b":1}'),
    "members come in the schema's order": (
        {"type": "object", "properties": {"a": {}, "b": {}}}, '{"b":1,"a":1}'),
    "integers are written as such": ({"type": "integer"}, "1.0"),
    "formats count": ({"format": "date"}, '"soon"'),
}  # fmt: skip


@pytest.mark.parametrize(("schema", "text"), STRICTER.values(), ids=STRICTER)
def test_grammars_are_stricter_than_their_schemas_where(demo, schema, text):
    assert jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))
    assert not demo.accepts(text, json=schema)


def test_an_object_that_says_so_has_members_that_it_does_not_list(demo):
    schema = {"type": "object", "properties": {"a": {}}, "additionalProperties": True}
    assert demo.accepts('{"a":1,"b":1}', json=schema)


UNSUPPORTED = [
    {"not": {}}, {"if": {}, "then": {}}, {"contains": {}}, {"uniqueItems": True},
    {"propertyNames": {}}, {"dependentRequired": {}}, {"dependentSchemas": {}},
    {"unevaluatedItems": False}, {"unevaluatedProperties": False}, {"$dynamicRef": "#a"},
    {"type": "objekt"}, {"format": "regex"}, {"type": "number", "multipleOf": 1e-20},
    {"oneOf": [{"type": "integer"}, {"type": "number"}]}, {"$ref": "#/$defs/none"},
]  # fmt: skip
PLACES: dict[str, Callable[[Any], Any]] = {
    "#": lambda part: part,
    "#/properties/a~1b~0c": lambda part: {"type": "object", "properties": {"a/b~c": part}},
    "#/items/anyOf/1": lambda part: {"type": "array", "items": {"anyOf": [{"type": "null"}, part]}},
    "#/$defs/x/prefixItems/0": lambda part: {
        "$ref": "#/$defs/x", "$defs": {"x": {"type": "array", "prefixItems": [part]}}},
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("part", UNSUPPORTED, ids=str)
def test_what_is_not_supported_is_named_by_its_place(part, place):
    with pytest.raises(InvalidRequest, match="cannot be compiled") as caught:
        grammar_text(StructuredOutputsParams(json=PLACES[place](part)))
    assert f"the schema at {place}: " in str(caught.value)
