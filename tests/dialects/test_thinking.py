"""Thoughts are told from answers, and templates tell which dialect a model has."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen_jax.dialects import DIALECTS, THINKING, Text, Thought, detect, make_reader
from tests.dialects.written import TOOLS, calls_of, read, text_of

CASES = [
    ("qwen3", False, "<think>\nHm.\n\nSo.\n</think>\n\nYes.",
     [Thought("Hm.\n\nSo."), Text("Yes.")]),
    ("qwen3", False, "<think>\n\n</think>\n\nYes.", [Text("Yes.")]),
    ("qwen3", False, "Yes. </think>", [Text("Yes. </think>")]),
    ("qwen3", False, "<thin", [Text("<thin")]),
    ("qwen3", False, "\n<think>Hm", [Thought("Hm")]),
    ("qwen3", False, "<think>a<think>b</think>c</think>",
     [Thought("a<think>b"), Text("c</think>")]),
    ("deepseek_r1", True, "Hm.\n</think>\n\nYes.", [Thought("Hm."), Text("Yes.")]),
    ("deepseek_r1", True, "<think>\nHm.</think>Yes.", [Thought("Hm."), Text("Yes.")]),
    ("deepseek_r1", True, "Hm. </thi", [Thought("Hm. </thi")]),
    ("granite", False, "Here is my thought process:\nHm. Here is my response: Yes.",
     [Thought("Hm."), Text("Yes.")]),
    ("granite", False, "Here's my thought process: Hm. Here's my response: Yes.",
     [Thought("Hm."), Text("Yes.")]),
    ("granite", False, "Here is my cat.", [Text("Here is my cat.")]),
    ("mistral", False, "[THINK]Hm.[/THINK]Yes.", [Thought("Hm."), Text("Yes.")]),
    ("openai_gptoss", False, "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
     "<|channel|>final<|message|>Yes.", [Thought("Hm."), Text("Yes.")]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "is_thinking", "text", "events"), CASES)
def test_thoughts_are_told_from_the_answer(name, is_thinking, text, events):
    for cuts in ((), range(len(text))):
        reader = make_reader(thinking=THINKING[name], is_thinking=is_thinking)
        assert read(reader, text, cuts) == events


PIECES = ("<think>", "</think>", "<th", "\n", "a", "<tool_call>", '{"name": "ping"}', " ",
          "</tool_call>", "Here is my thought process:", "Here is my response:", "<|channel|>",
          "analysis", "<|message|>", "<|end|>", "<|start|>assistant", "[THINK]",
          "[/THINK]")  # fmt: skip

answers = st.lists(st.sampled_from(PIECES)).map("".join)


@pytest.mark.parametrize("name", THINKING)
@given(
    text=st.lists(st.sampled_from(PIECES)).map("".join), is_thinking=st.booleans(), data=st.data()
)
@settings(max_examples=100, deadline=None)
def test_thoughts_do_not_depend_on_where_an_answer_is_cut(name, text, is_thinking, data):
    def reader():
        dialect, thinking = DIALECTS["hermes"], THINKING[name]
        return make_reader(dialect, thinking, tools=TOOLS, is_thinking=is_thinking)

    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    assert read(reader(), text, cuts) == read(reader(), text)


def test_calls_follow_thoughts():
    text = '<think>\nI say <tool_call>.\n</think>\n\n<tool_call>\n{"name": "ping"}\n</tool_call>'
    events = read(make_reader(DIALECTS["hermes"], THINKING["qwen3"], tools=TOOLS), text)
    assert events[0] == Thought("I say <tool_call>.")
    assert calls_of(events) == [("ping", {})]


@pytest.mark.parametrize(
    ("name", "prompt", "is_open"),
    [
        ("deepseek_r1", "<｜User｜>Hi<｜Assistant｜><think>\n", True),
        ("qwen3", "<|im_start|>assistant\n<think>\n", True),
        ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("qwen3", "<|im_start|>user\nWhat is <think>?<|im_end|>\n<|im_start|>assistant\n", False),
        ("openai_gptoss", "<|start|>assistant", False),
    ],
)
def test_a_prompt_tells_whether_it_ends_inside_of_a_thought(name, prompt, is_open):
    assert THINKING[name].is_opened_by(prompt) is is_open


def test_without_dialect_and_thoughts_all_is_text():
    text = "<think>a</think><tool_call>"
    assert text_of(read(make_reader(), text)) == text


TEMPLATES = [
    ('<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}', "hermes", None),
    ("{% if enable_thinking %}<think></think>{% endif %}<tool_call>", "hermes", "qwen3"),
    ("<tool_call>\\n<function=example_function_name>\\n<parameter=a>", "qwen3_coder", None),
    ("<tool_call>{name}\\n<arg_key>{key}</arg_key>{% enable_thinking %}</think>", "glm45", "qwen3"),
    ("split('</think>')[-1] <｜tool▁calls▁begin｜> '```json'", "deepseek_v3", "deepseek_r1"),
    ("<｜tool▁calls▁begin｜>'<｜Assistant｜></think>'", "deepseek_v31", "deepseek_r1"),
    ('{{- "[TOOL_CALLS] [" }}', "mistral", None),
    ('"[TOOL_CALLS]" + name + "[ARGS]" + arguments [THINK]', "mistral_args", "mistral"),
    ("<|tool_call|>Here is my thought process:", "granite", "granite"),
    ("functools[", "phi4_mini_json", None),
    ("'<|tool|>' + message['tools'] + '<|/tool|>'", "phi4_mini_json", None),
    ("<|start_header_id|>'{\"name\": \"' '\"parameters\": '", "llama3_json", None),
    ("<|python_tag|>", "llama3_json", None),
    ("<|header_start|>[func_name1(params_name1=params_value1)]", "pythonic", None),
    ("<|start|>assistant<|channel|>analysis<|message|>", "gpt_oss", "openai_gptoss"),
    ("<start_of_turn>model", None, None),
]  # fmt: skip


@pytest.mark.parametrize(("template", "dialect", "thinking"), TEMPLATES)
def test_a_template_tells_the_dialect(template, dialect, thinking):
    assert detect(template) == (DIALECTS.get(dialect), THINKING.get(thinking))
