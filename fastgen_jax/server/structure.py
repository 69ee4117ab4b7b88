"""The form that a body asks of its answer, under the names of OpenAI and of vLLM.

Whether a schema or a grammar can be compiled is the engine's to say.
"""

import json
import re
from typing import Any

from fastgen_jax.errors import InvalidRequest
from fastgen_jax.grammar import closed, json_form
from fastgen_jax.sampling_params import SamplingParams, StructuredOutputsParams
from fastgen_jax.server.errors import ApiError, invalid

# The older names of vLLM, and what they are in structured_outputs.
GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
SPACES = "guided_whitespace_pattern"
FIELDS = ("response_format", "structured_outputs", *GUIDED, SPACES)
FORMATS = ("text", "json_object", "json_schema")
ESCAPED = re.compile(r"\\.|/|\n", re.DOTALL)

Form = dict[str, Any]  # fields of StructuredOutputsParams


class Structure:
    """The one form that a body asks for, and the field that asked.

    Args:
        given: the values of FIELDS, None where the body says nothing.

    Raises:
        ApiError: several forms, or one that is not well formed; the message names the fields.
    """

    def __init__(self, given: dict[str, Any]):
        asked = {
            "response_format": _of_response_format(given["response_format"]),
            "structured_outputs": _of_structured_outputs(given["structured_outputs"]),
        } | {name: _of_guided(kind, given[name]) for name, kind in GUIDED.items()}
        asked = {name: form for name, form in asked.items() if form}
        if len(asked) > 1:
            raise conflict(list(asked))
        self.field, form = next(iter(asked.items()), (None, {}))
        if given[SPACES] is not None:
            form = _with_spaces(self.field, form, given[SPACES])
        self.params = _checked(self.field, form) if self.field else None


def conflict(names: list[str]) -> ApiError:
    return invalid(
        f"{' and '.join(names)} each ask for a form of the output; send one of them", names[0]
    )


def lark_of(params: StructuredOutputsParams) -> str | None:
    """The form as what a rule of a larger Lark grammar is; None: it is a grammar of its own."""
    if params.grammar is not None:
        return None
    if params.choice is not None:
        return " | ".join(map(json.dumps, params.choice))
    if params.regex is not None:
        return f"/(?:{ESCAPED.sub(_in_slashes, params.regex)})/"
    schema, options = json_form(params)
    schema = closed(schema) if isinstance(schema, dict) else {"allOf": [schema]}
    return f"%json {json.dumps(schema | {'x-guidance': options})}"


def _in_slashes(part: re.Match) -> str:
    return {"/": r"\/", "\n": r"\n"}.get(part[0], str(part[0]))


def _of_response_format(given: dict[str, Any] | None) -> Form:
    name, kind = "response_format", "text" if given is None else given.get("type")
    if kind not in FORMATS:
        raise invalid(f"{name}.type must be one of {', '.join(FORMATS)}; got {kind!r:.80}", name)
    if kind != "json_schema":
        return {"json_object": True} if kind == "json_object" else {}
    described = given.get("json_schema") if given else None
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        raise invalid(f"{name}.json_schema.schema must be a JSON schema, an object", name)
    return {"json": schema}


def _of_structured_outputs(given: Form | None) -> Form:
    """What is null or false asks for nothing."""
    return {key: value for key, value in (given or {}).items() if value not in (None, False)}


def _of_guided(kind: str, value: Any) -> Form:
    return {} if value is None else {kind: value}


def _with_spaces(field: str | None, form: Form, spaces: Any) -> Form:
    if "json" not in form and "json_object" not in form:
        raise invalid(f"{SPACES} needs a JSON form beside it, such as guided_json", SPACES)
    if "whitespace_pattern" in form:
        raise invalid(f"{SPACES} and {field} both say what whitespace is; send one", SPACES)
    return form | {"whitespace_pattern": spaces}


def _checked(field: str, form: Form) -> StructuredOutputsParams | None:
    try:
        if isinstance(form.get("json"), str):
            json.loads(form["json"])
    except (ValueError, RecursionError) as error:
        raise invalid(f"{field}: the schema is not JSON: {error}", field) from None
    try:
        return SamplingParams(structured_outputs=form).structured_outputs  # type: ignore[arg-type]
    except InvalidRequest as error:
        problem = str(error).removeprefix("structured_outputs ")
        raise invalid(f"{field}: {problem}", field) from None
