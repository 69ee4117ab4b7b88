"""The demo's chat template: plain conversations as in training, tools as Hermes writes them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgen_jax.demo import vocabulary
from fastgen_jax.dialects import DIALECTS, detect
from fastgen_jax.errors import InvalidRequest
from fastgen_jax.tokenizer import Tokenizer
from tests.demo.test_tokenizer import CHECKPOINT

TOKENIZER = Tokenizer(str(CHECKPOINT))
ASKED = {"role": "user", "content": "Weather?"}
PLAIN = st.fixed_dictionaries({
    "role": st.sampled_from(["system", "user", "assistant"]),
    "content": st.text(st.characters(codec="utf-8", exclude_characters="<|>")),
})  # fmt: skip


def rendered(messages: list, **variables) -> str:
    ids = TOKENIZER.apply_chat_template(messages, **variables)
    return TOKENIZER.decode(ids, skip_special_tokens=False)


@given(st.lists(PLAIN, min_size=1, max_size=5))
def test_a_conversation_without_tools_is_what_it_was_in_training(messages):
    turns = [f"<|{message['role']}|>{message['content']}<|end|>" for message in messages]
    assert rendered(messages) == "".join(["<|bos|>", *turns, "<|assistant|>"])


def test_the_checkpoint_has_the_template_of_the_source():
    config = json.loads((CHECKPOINT / "tokenizer_config.json").read_text())
    assert config["chat_template"] == vocabulary.CHAT_TEMPLATE


def test_it_teaches_hermes():
    assert detect(vocabulary.CHAT_TEMPLATE) == (DIALECTS["hermes"], None)


def test_tools_are_named_before_the_conversation():
    tools = [{"type": "function", "function": {"name": name}} for name in ("weather", "time")]
    assert rendered([ASKED], tools=tools) == (
        "<|bos|><|system|>Tools: weather, time.<|end|><|user|>Weather?<|end|><|assistant|>"
    )


@pytest.mark.parametrize("arguments", ['{"place": "Oslo"}', {"place": "Oslo"}])
def test_calls_and_their_results_are_turns(arguments):
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    called = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "1", "content": "Rain."}
    assert rendered([ASKED, called, result]) == (
        "<|bos|><|user|>Weather?<|end|><|assistant|><tool_call>\n"
        '{"name": "weather", "arguments": {"place": "Oslo"}}\n</tool_call><|end|>'
        "<|user|><tool_response>\nRain.\n</tool_response><|end|><|assistant|>"
    )


def test_other_roles_are_refused_by_name():
    with pytest.raises(InvalidRequest, match="roles are system, user, assistant and tool, got cat"):
        TOKENIZER.apply_chat_template([{"role": "cat", "content": "Meow."}])
