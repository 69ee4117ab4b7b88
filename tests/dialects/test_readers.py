"""Every dialect reads what its models write, however the answer is cut into pieces."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen_jax.dialects import DIALECTS, Text, make_reader
from tests.dialects.written import (
    TOOLS,
    WRITERS,
    arguments,
    calls,
    calls_of,
    read,
    text_of,
)

ALL = pytest.mark.parametrize("name", WRITERS)
PIECES = (
    '<tool_call>', '</tool_call>', '{"name": "ping", "arguments": {}}', '{"name": "ping", ',
    '"arguments": {"a": [1, {"b": ', '<function=get_weather>', '<parameter=city>', '</parameter>',
    '</function>', 'ping', '<arg_key>', '</arg_key>', '<arg_value>', '</arg_value>', '; ',
    '<|python_tag|>', '[TOOL_CALLS]', '[ARGS]', '[{', '}]', '<|tool_call|>', 'functools',
    '<｜tool▁calls▁begin｜>', '<｜tool▁call▁begin｜>', '<｜tool▁sep｜>', '```json\n', '```',
    '<｜tool▁call▁end｜>', '<｜tool▁calls▁end｜>', '<|channel|>', 'analysis', 'commentary',
    ' to=functions.ping', '<|message|>', '<|end|>', '<|call|>', '<|start|>assistant', '[ping(',
    'a=', ')]', '(1,)', "'x'", '{', '}', '"', '\\', ',', '1', 'true', '\n', '  ', 'word', '<',
    '<tool', '[TOOL', '<|', "\\u00e9", '<think>', '</think>',
)  # fmt: skip
answers = st.lists(st.sampled_from(PIECES) | st.text(max_size=2), max_size=12).map("".join)


def reader_of(name: str):
    return make_reader(DIALECTS[name], tools=TOOLS)


def cuts_of(text: str):
    return st.lists(st.integers(0, len(text)), max_size=8)


@ALL
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_what_a_model_writes_is_read_exactly(name, data):
    made = data.draw(st.lists(calls, min_size=1, max_size=3))
    text = WRITERS[name](made)
    events = read(reader_of(name), text, data.draw(cuts_of(text)))
    assert calls_of(events) == made
    assert text_of(events) == ""


@ALL
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_events_do_not_depend_on_where_an_answer_is_cut(name, data):
    text = data.draw(answers)
    whole = read(reader_of(name), text)
    assert read(reader_of(name), text, data.draw(cuts_of(text))) == whole
    assert read(reader_of(name), text, range(len(text))) == whole


@ALL
@given(arguments=arguments, data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_call_that_is_cut_off_is_text_or_a_call_that_began(name, arguments, data):
    text = WRITERS[name]([("get_weather", arguments)])
    cut = text[: data.draw(st.integers(1, len(text) - 1))]
    events = read(reader_of(name), cut)
    whole = read(reader_of(name), text)
    assert events == [Text(cut)] or (events[0] == whole[0] and len(events) <= 2)
    if len(events) == 2:
        assert whole[1].arguments.startswith(events[1].arguments)


@ALL
@given(text=st.text(max_size=80), data=st.data())
@settings(max_examples=40, deadline=None)
def test_text_without_calls_passes_unchanged(name, text, data):
    assert text_of(read(reader_of(name), text, data.draw(cuts_of(text)))) == text


@ALL
def test_only_what_may_begin_a_tag_is_held_back(name):
    reader = reader_of(name)
    assert [text_of(reader.feed(word)) for word in ("Hel", "lo, ", "all")] == ["Hel", "lo,", " all"]
    for tag in DIALECTS[name].markers:
        assert text_of([*reader.feed(tag[:3]), *reader.feed("!")]) == f"{tag[:3]}!"


@ALL
def test_nothing_of_a_half_tag_leaks(name):
    text = "Well: " + WRITERS[name]([("ping", {})])
    if name in ("llama3_json", "pythonic"):
        text = text.removeprefix("Well: ")  # here calls stand alone
    reader = reader_of(name)
    seen = "".join(text_of(reader.feed(character)) for character in text)
    assert seen in ("Well:", "")
    assert reader.close() == []


@ALL
@pytest.mark.parametrize("filling", ["<", "\n", '"', "<tool_call>", "\\", '{"name": "'])
def test_a_long_adversarial_answer_takes_linear_time(name, filling):
    call = WRITERS[name]([("get_weather", {"city": "x"})])
    for start in ("", call[: call.index("x")], call[: len(call) // 2]):
        for n_feeds, n_characters in ((1, 2**16), (2**13, 4)):
            reader = reader_of(name)
            piece = (filling * n_characters)[:n_characters]
            started = time.thread_time()
            for text in [start, *[piece] * n_feeds]:
                reader.feed(text)
            reader.close()
            assert time.thread_time() - started < 3
