"""Grammars: from the form that an output must have to what says which tokens may come next.

llguidance does the work: https://github.com/guidance-ai/llguidance. What it builds is bounded here,
the time that building takes is not: see server/trial.py. Imported lazily, for few programs need it.
"""

import functools
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from fastgen_jax.errors import InvalidRequest
from fastgen_jax.sampling_params import StructuredOutputsParams

WHITESPACE = " "  # at most one, between JSON's tokens: a small model may stay in more
MAX_LEXER_STATES = 30_000  # of 1 to 2 kB
MAX_GRAMMAR_SIZE = 200_000  # symbols
# What an ambiguous grammar may cost a step is about their product: 0.1 s, in the engine's thread.
MAX_ITEMS = 1000  # of Earley's parser, at one place of the text
MAX_STEP_ITEMS = 10_000  # ... and in all places that one mask tries
MAX_KEPT = 64  # compiled grammars
MAX_PLACES = 200  # parts of a schema that are tried, to name the one at fault
MAX_SHOWN = 300  # characters of llguidance's messages
GBNF_RULE = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)
DEFINITIONS = ("$defs", "definitions")
SUBSCHEMAS = ("items", "additionalProperties", "contains")  # hold one schema
SUBSCHEMA_MAPS = (*DEFINITIONS, "properties", "patternProperties")
SUBSCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
# Beside these, "properties" are not all that an object may have.
OPENING = {"additionalProperties", "unevaluatedProperties", "patternProperties", "$ref"}
OPENING |= {"anyOf", "oneOf", "allOf", "if", "dependentSchemas"}


def grammar_text(structure: StructuredOutputsParams) -> str:
    """The grammar in llguidance's own JSON form, syntactically checked.

    Raises:
        InvalidRequest: it cannot be compiled; of a schema, the place at fault is named.
    """
    from llguidance import LLMatcher

    if structure.json is not None or structure.json_object:
        return _json_grammar(structure)
    if structure.regex is not None:
        grammar = LLMatcher.grammar_from_regex(structure.regex)
    elif structure.choice is not None:
        # A terminal: the lexer takes more texts than the parser has items.
        texts = " | ".join(json.dumps(text) for text in structure.choice)
        grammar = LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {texts}")
    else:
        grammar = LLMatcher.grammar_from_lark(_as_lark(structure.grammar or ""))
    if problem := _problem(grammar):
        raise _refusal(problem)
    return grammar


def json_form(structure: StructuredOutputsParams) -> tuple[Any, dict[str, Any]]:
    """The schema of an output that must be JSON, and llguidance's options for it.

    Raises:
        InvalidRequest: the schema is a text that is not JSON.
    """
    schema = structure.json
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise _refusal(f"the schema is not JSON: {error}") from None
    if structure.json_object:
        schema = {"type": "object"}
    schema = {} if schema is True else schema
    options: dict[str, Any] = {"whitespace_pattern": structure.whitespace_pattern or WHITESPACE}
    if structure.disable_any_whitespace:
        options = {"whitespace_flexible": False}
    options["lenient"] = False  # whatever the schema says: what is not understood is refused
    return schema, options


def _json_grammar(structure: StructuredOutputsParams) -> str:
    schema, options = json_form(structure)
    to_grammar = functools.partial(_schema_grammar, options=options)
    grammar = to_grammar(closed(schema))
    if not _problem(grammar):
        return grammar
    grammar = to_grammar(schema)
    if problem := _problem(grammar):
        place, problem = _fault(schema, to_grammar, problem)
        raise _refusal(f"the schema at {place}: {problem}")
    return grammar


def closed(schema: Any, *, is_part: bool = False) -> Any:
    """The schema with objects that list their members having no others, unless it says that they
    may: what has it so is valid by the schema too, and a model does not run on in members.

    is_part: of a larger one, whose other parts may list more.
    """
    if not _is_map(schema):
        return schema
    result = dict(schema)
    for key in schema.keys() & {*SUBSCHEMAS}:
        result[key] = closed(schema[key])
    for key in schema.keys() & {*SUBSCHEMA_MAPS}:
        if _is_map(schema[key]):
            result[key] = {name: closed(part) for name, part in schema[key].items()}
    for key in schema.keys() & {*SUBSCHEMA_LISTS}:
        if isinstance(schema[key], list):
            are_parts = key == "allOf" or (key != "prefixItems" and "properties" in schema)
            result[key] = [closed(part, is_part=are_parts) for part in schema[key]]
    if not is_part and not OPENING & schema.keys() and _lists_what_it_requires(schema):
        result["additionalProperties"] = False
    return result


def _lists_what_it_requires(schema: dict[str, Any]) -> bool:
    properties, required = schema.get("properties"), schema.get("required", [])
    return (
        _is_map(properties)
        and isinstance(required, list)
        and all(r in properties for r in required)
    )


def _schema_grammar(schema: Any, options: Any) -> str:
    from llguidance import LLMatcher

    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)
    except ValueError as error:
        raise _refusal(f"the schema: {error}") from None


def _fault(schema: Any, to_grammar: Callable[[Any], str], problem: str) -> tuple[str, str]:
    """The innermost part of a schema that is at fault by itself, as a JSON pointer, and how."""
    shared = {key: schema[key] for key in DEFINITIONS if key in schema} if _is_map(schema) else {}
    place, n_left = "#", MAX_PLACES
    is_deeper = True
    while is_deeper:
        is_deeper = False
        for pointer, part in _parts(schema):
            n_left -= 1
            if n_left < 0:
                break
            found = _problem(to_grammar(shared | part if _is_map(part) else part))
            if found:
                place, schema, problem, is_deeper = place + pointer, part, found, True
                break
    return place, problem


def _is_map(schema: Any) -> bool:
    return isinstance(schema, dict)


def _parts(schema: Any) -> Iterator[tuple[str, Any]]:
    """The schemas directly within one, with their pointers from there."""
    if not _is_map(schema):
        return
    for key in SUBSCHEMA_MAPS:
        if _is_map(schema.get(key)):
            for name, part in schema[key].items():
                yield f"/{key}/" + name.replace("~", "~0").replace("/", "~1"), part
    for key in SUBSCHEMAS:
        if key in schema:
            yield f"/{key}", schema[key]
    for key in SUBSCHEMA_LISTS:
        if isinstance(schema.get(key), list):
            for index, part in enumerate(schema[key]):
                yield f"/{key}/{index}", part


def _as_lark(grammar: str) -> str:
    """GBNF, known by how its rules begin, as Lark."""
    if not GBNF_RULE.search(grammar):
        return grammar
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(grammar)
    except Exception as error:  # it raises plain Exception at what it cannot read
        raise _refusal(f"the grammar is not GBNF: {error}") from None


@functools.cache
def _limits() -> Any:
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_lexer_states=MAX_LEXER_STATES,
        max_grammar_size=MAX_GRAMMAR_SIZE,
        max_items_in_row=MAX_ITEMS,
        step_max_items=MAX_STEP_ITEMS,
        verbose_errors=False,
    )


def _problem(grammar: str) -> str:
    """Why no tokenizer could make a matcher of it; empty if one could."""
    from llguidance import LLMatcher

    return LLMatcher.validate_grammar(grammar, limits=_limits())


def _refusal(problem: str) -> InvalidRequest:
    lines = " ".join(problem.split())
    return InvalidRequest(
        f"structured_outputs cannot be compiled: {lines:.{MAX_SHOWN}}", param="structured_outputs"
    )


class Grammar(NamedTuple):
    """A compiled grammar.

    matcher: an llguidance matcher at its start, which nobody may move: take copies (`deep_copy`).
    n_tokens: bits of its masks.
    """

    matcher: Any
    n_tokens: int


class GrammarCompiler:
    """Makes grammars for one vocabulary; thread-safe. The newest are kept.

    Args:
        tokenizer_json: gives what tokenizer.json says; called when first needed.
        vocab_size: of the model; the tokenizer's may be smaller, or larger.
        eos_token_ids: tokens that stand for the end of the output.
        max_kept: grammars.
    """

    def __init__(
        self,
        tokenizer_json: Callable[[], str],
        vocab_size: int,
        eos_token_ids: Iterable[int],
        max_kept: int = MAX_KEPT,
    ):
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._max_kept = max_kept
        self._tokenizer: Any = None
        self._kept: dict[str, Grammar] = {}
        self._lock = threading.Lock()

    def compile(self, text: str) -> Grammar:
        """The grammar of this text, which `grammar_text` gave.

        Raises:
            InvalidRequest: it is too large, or allows only the empty text.
        """
        with self._lock:
            grammar = self._kept.pop(text, None) or self._grammar(text)
            self._kept[text] = grammar
            while len(self._kept) > self._max_kept:
                del self._kept[next(iter(self._kept))]
        return grammar

    def _grammar(self, text: str) -> Grammar:
        from llguidance import LLMatcher

        if self._tokenizer is None:
            try:
                self._tokenizer = self._make_tokenizer()
            except ValueError as error:
                raise _refusal(f"this model's tokenizer does not support it: {error}") from None
        matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=_limits())
        matcher.compute_bitmask()  # finds grammars that nothing satisfies
        if matcher.is_error():
            raise _refusal(matcher.get_error())
        if matcher.is_stopped():
            raise _refusal("it allows the empty text only")
        return Grammar(matcher, self._tokenizer.vocab_size)

    def _make_tokenizer(self) -> Any:
        from llguidance import LLTokenizer

        spec, eos = self._tokenizer_json(), self._eos_token_ids or None
        tokenizer = LLTokenizer(spec, eos_token=eos)
        if tokenizer.vocab_size >= self._vocab_size:
            return tokenizer
        return LLTokenizer(spec, n_vocab=self._vocab_size, eos_token=eos)
