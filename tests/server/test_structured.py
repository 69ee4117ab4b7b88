"""What a body asks of its answer's form reaches the engine, or is refused by name."""

import itertools

import pytest
from pydantic import BaseModel

from tests.server.running import PATHS

SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
ASKED = [
    ({"response_format": {"type": "json_object"}}, {"json_object": True}),
    ({"response_format": {"type": "json_schema",
                          "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}},
     {"json": SCHEMA}),
    ({"structured_outputs": {"json": SCHEMA, "regex": None, "json_object": False}},
     {"json": SCHEMA}),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, {"choice": ("yes", "no")}),
    ({"structured_outputs": {"json_object": True, "whitespace_pattern": " "}},
     {"json_object": True, "whitespace_pattern": " "}),
    ({"guided_json": SCHEMA}, {"json": SCHEMA}),
    ({"guided_json": '{"type": "null"}'}, {"json": '{"type": "null"}'}),
    ({"guided_regex": "[0-9]+"}, {"regex": "[0-9]+"}),
    ({"guided_choice": ["a", "b"]}, {"choice": ("a", "b")}),
    ({"guided_grammar": 'start: "a"'}, {"grammar": 'start: "a"'}),
    ({"guided_json": SCHEMA, "guided_whitespace_pattern": r"\s?"},
     {"json": SCHEMA, "whitespace_pattern": r"\s?"}),
]  # fmt: skip
NOTHING = [
    {"response_format": {"type": "text"}}, {"structured_outputs": {}}, {"guided_json": None},
    {"structured_outputs": {"json": None}}, {"response_format": None},
]  # fmt: skip
BAD = [
    ({"response_format": {}}, "response_format", "text, json_object, json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema.schema must"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": "{}"}}},
     "response_format", "json_schema.schema must"),
    ({"structured_outputs": {"xml": "a"}}, "structured_outputs", "has no field 'xml'"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "exactly one"),
    ({"guided_json": "{"}, "guided_json", "the schema is not JSON"),
    ({"guided_json": "[" * 100_000}, "guided_json", "the schema is not JSON"),
    ({"guided_choice": []}, "guided_choice", "at least one text"),
    ({"guided_choice": [1]}, "guided_choice", "at least one text"),
    ({"guided_regex": {}}, "guided_regex", "regex has the wrong type"),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "needs a JSON form"),
    ({"guided_regex": "a", "guided_whitespace_pattern": " "}, "guided_whitespace_pattern",
     "needs a JSON form"),
    ({"guided_json": {}, "guided_whitespace_pattern": 5}, "guided_json", "whitespace_pattern has"),
    ({"guided_whitespace_pattern": " ",
      "structured_outputs": {"json_object": True, "whitespace_pattern": ""}},
     "guided_whitespace_pattern", "both say what whitespace is"),
]  # fmt: skip
FORMS = [
    ("response_format", {"type": "json_object"}), ("structured_outputs", {"regex": "a"}),
    ("guided_json", {}), ("guided_regex", "a"), ("guided_choice", ["a"]),
    ("guided_grammar", 'start: "a"'),
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("ask", "expected"), ASKED)
def test_a_form_reaches_the_engine_under_every_name(up, path, ask, expected):
    assert up.post(f"/v1/{path}", PATHS[path] | ask).status_code == 200
    structure = up.engine.submitted[-1].params.structured_outputs
    assert {name: getattr(structure, name) for name in expected} == expected


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("ask", NOTHING)
def test_what_asks_for_no_form_changes_nothing(up, path, ask):
    assert up.post(f"/v1/{path}", PATHS[path] | ask).status_code == 200
    assert up.engine.submitted[-1].params.structured_outputs is None


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("ask", "param", "words"), BAD)
def test_a_form_that_is_none_is_refused_by_name(up, path, ask, param, words):
    answer = up.post(f"/v1/{path}", PATHS[path] | ask)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("pair", list(itertools.combinations(FORMS, 2)), ids=str)
def test_two_forms_at_once_are_refused_and_both_are_named(up, path, pair):
    (first, a), (second, b) = pair
    answer = up.post(f"/v1/{path}", PATHS[path] | {first: a, second: b})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, first)
    assert f"{first} and {second} each ask for a form" in error["message"]


class Person(BaseModel):
    age: int


def test_the_client_parses_into_a_model(client, up):
    said = [{"role": "user", "content": '{"age": 7}'}]  # which the engine says after it
    answer = client.chat.completions.parse(model="fake", messages=said, response_format=Person)
    assert answer.choices[0].message.parsed == Person(age=7)
    schema = up.engine.submitted[-1].params.structured_outputs.json
    assert schema["properties"]["age"]["type"] == "integer"


WRONG = {"type": "objekt"}
WRONG_TOOL = {"type": "function", "function": {"name": "f", "parameters": WRONG}}


@pytest.mark.parametrize(("path", "body", "param"), [
    ("completions", {"guided_json": WRONG}, "guided_json"),
    ("completions", {"structured_outputs": {"json": WRONG}}, "structured_outputs"),
    ("chat/completions", {"response_format": {"type": "json_schema", "json_schema":
                          {"name": "x", "schema": WRONG}}}, "response_format"),
    ("chat/completions", {"tools": [WRONG_TOOL], "tool_choice": "required"}, "tools"),
    ("responses", {"text": {"format": {"type": "json_schema", "name": "x", "schema": WRONG}}},
     "text"),
])  # fmt: skip
def test_what_cannot_be_compiled_is_refused_under_the_name_that_it_came_by(up, path, body, param):
    asked = (PATHS | {"responses": {"input": "a"}})[path]
    answer = up.post(f"/v1/{path}", asked | body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert f"{param} cannot be compiled" in answer.json()["error"]["message"]
    assert "objekt" in answer.json()["error"]["message"]
