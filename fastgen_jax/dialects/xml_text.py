"""Arguments between tags, without JSON's quotes: what a text means, the tool's schema decides.

A text that is JSON of a type which the schema allows, other than a string, is that value; every
other text is a string. Where the schema says nothing of types, all are allowed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastgen_jax.dialects.dialect import Tool, alternatives, free_text, json_of
from fastgen_jax.dialects.json_text import json_in
from fastgen_jax.dialects.tape import SPACES, Malformed, Tape, Wait
from fastgen_jax.errors import InvalidRequest

MAX_COPIED = 1_000_000  # characters of definitions in the grammar of one tool
MAX_LOOKED = 100_000  # schemas that are asked for a type, in one tool; after that nothing is known
STRING = frozenset({"string"})
PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}
KINDS = {'"': "string", "{": "object", "[": "array", "t": "boolean", "f": "boolean", "n": "null"}
KINDS_OF = {str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}


class Parameters:
    """What a tool's schema says of its parameters. Remembers what it found.

    The schema is a client's and was not checked: what is not as it should be says nothing.
    """

    def __init__(self, tool: Tool | None):
        self._schema = tool.parameters if tool else {}
        properties = self._schema.get("properties")
        self.properties: Mapping[str, Any] = properties if isinstance(properties, Mapping) else {}
        required = _listed(self._schema.get("required"))
        self.required = frozenset(name for name in required if isinstance(name, str))
        self._kinds: dict[str, frozenset[str]] = {}
        self._n_copied = 0
        self._n_looked = 0

    def kinds(self, name: str) -> frozenset[str]:
        """JSON's types that a parameter may have; none: the schema does not say."""
        if name not in self._kinds:
            self._kinds[name] = self._find_kinds(self.properties.get(name))
        return self._kinds[name]

    def _find_kinds(self, schema: Any) -> frozenset[str]:
        found: set[str] = set()
        seen: set[int] = set()
        unseen = [schema]
        while unseen:
            self._n_looked += 1
            if self._n_looked > MAX_LOOKED:
                return frozenset()
            schema = unseen.pop()
            if not isinstance(schema, Mapping) or id(schema) in seen:
                continue
            seen.add(id(schema))
            types = schema.get("type")
            found.update(kind for kind in [types, *_listed(types)] if isinstance(kind, str))
            found.update(KINDS_OF.get(type(value), "object") for value in _values(schema))
            for key in ("anyOf", "oneOf", "allOf"):
                unseen += _listed(schema.get(key))
            unseen.append(self._referred(schema.get("$ref")))
        return frozenset("number" if kind == "integer" else kind for kind in found)

    def _referred(self, reference: Any) -> Any:
        """What "#/$defs/Name" names, if it is there."""
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return None
        found: Any = self._schema
        for key in reference.split("/")[1:]:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found

    def schema(self, name: str) -> Mapping[str, Any]:
        """The schema of one parameter, with the definitions that it may refer to.

        Raises:
            InvalidRequest: copied for each parameter, the definitions would become too long.
        """
        own = self.properties[name]
        own = own if isinstance(own, Mapping) else {}
        if '"$ref"' not in json.dumps(own):
            return own
        shared = {key: self._schema[key] for key in ("$defs", "definitions") if key in self._schema}
        self._n_copied += len(json.dumps(shared))
        if self._n_copied > MAX_COPIED:
            raise InvalidRequest(
                f"the definitions of a tool's parameters, repeated for each parameter that refers "
                f"to them, exceed {MAX_COPIED} characters; write schemas in place of some $ref",
                param="tools",
            )
        return {**shared, **own}

    def grammar(self, name: str) -> str | None:
        """Lark for what may stand between a parameter's tags; None: any text.

        Of strings only lists of values are enforced: patterns and lengths are JSON's to express.
        """
        schema = self.schema(name)
        kinds = self.kinds(name)
        if kinds == STRING and (values := _values(schema)):
            return f"({' | '.join(json.dumps(value) for value in values)})"
        if not kinds or "string" in kinds:
            return None
        return json_of(schema)


def _values(schema: Mapping[str, Any]) -> list[Any]:
    """All values that a schema allows, if it lists them."""
    return [schema["const"]] if "const" in schema else _listed(schema.get("enum"))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def read_argument(tape: Tape, kinds: frozenset[str], closings: tuple[str, ...]) -> Wait:
    """Reads an argument up to the tag that closes it, and writes it as JSON. Strings are written as
    they come, others when they are complete.
    """
    if kinds == STRING:
        tape.write_arguments('"')
        tag = yield from tape.copy_until(
            closings, lambda text: tape.write_arguments(json.dumps(text, ensure_ascii=False)[1:-1])
        )
        if not tag:
            raise Malformed
        tape.write_arguments('"')
    else:
        pieces: list[str] = []
        if not (yield from tape.copy_until(closings, pieces.append)):
            raise Malformed
        tape.write_arguments(_json_of("".join(pieces), kinds))


def _json_of(text: str, kinds: frozenset[str]) -> str:
    word = text.strip(SPACES)
    found = json_in(PYTHON_WORDS.get(word, word))
    kind = KINDS.get(found[0], "number") if found else "string"
    if found and kind != "string" and (not kinds or kind in kinds):
        return found
    return json.dumps(text, ensure_ascii=False)


def write_functions(
    tools: Sequence[Tool],
    *,
    function: str,
    argument: str,
    margin: str,
    end: str,
    spelled: Callable[[str], list[str]],
) -> str:
    """Lark rules of `function`, any of the tools with its arguments in the schema's order.

    Args:
        function, argument: what stands before them, NAME being their name.
        margin: what stands before the end of an argument; texts may do without it.
        end: the tag after an argument.
        spelled: Lark for a text that has markers in it, part by part.
    """
    texts, rules = [], []
    [stop] = spelled(end)
    for i, tool in enumerate(tools):
        parameters = Parameters(tool)
        names = {key: f"argument_{i}_{j}" for j, key in enumerate(parameters.properties)}
        marks = {key: "" if key in parameters.required else "?" for key in names}
        parts = [f"{name}{marks[key]}" for key, name in names.items()]
        texts.append(" ".join([*spelled(function.replace("NAME", tool.name)), *parts]))
        for key, name in names.items():
            value = parameters.grammar(key)
            head = spelled(argument.replace("NAME", key))
            body = [value, json.dumps(margin), stop] if value else ["text"]
            rules.append(" ".join([f"{name}:", *head, *body, r'"\n"']))
    return "\n".join([alternatives("function", texts), *rules, free_text("text", stop)])
