"""Calls as Hermes and Qwen write them."""

from fastgen_jax.dialects import DIALECTS, CallPart, CallStart, Text, make_reader


def read(text: str) -> list:
    reader = make_reader(DIALECTS["hermes"])
    return [*reader.feed(text), *reader.close()]


def test_a_call_between_tags_is_one():
    answer = 'Look:\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    assert read(answer) == [Text("Look:"), CallStart(0, "f"), CallPart(0, '{"a":1}')]


def test_what_is_no_call_stays_text():
    assert read("a <tool_call> b") == [Text("a <tool_call> b")]
