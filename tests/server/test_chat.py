"""/v1/chat/completions as the openai client sees it."""

import pytest

from tests.server.running import CHAT, TEXT, serving


class TestChat:
    def test_answer_has_the_form_that_openai_expects(self, client):
        answer = client.chat.completions.create(model="fake", messages=CHAT)
        choice = answer.choices[0]
        assert (choice.message.role, choice.finish_reason) == ("assistant", "stop")
        assert choice.message.content.strip() == TEXT
        assert (answer.object, answer.id[:9]) == ("chat.completion", "chatcmpl-")
        assert (
            answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        )

    def test_stream_gives_the_role_once_and_the_same_text(self, client):
        whole = client.chat.completions.create(model="fake", messages=CHAT)
        chunks = list(client.chat.completions.create(model="fake", messages=CHAT, stream=True))
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert "".join(d.content or "" for d in deltas) == whole.choices[0].message.content
        assert [d.role for d in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
        assert chunks[-1].choices[0].finish_reason == "stop"
        assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}

    def test_content_parts_are_joined(self, client):
        parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
        answer = client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": parts, "name": None}]
        )
        assert answer.choices[0].message.content.strip() == "one\ntwo"

    @pytest.mark.parametrize("content", [{}, {"content": None}], ids=repr)
    def test_assistant_may_have_called_tools_and_said_nothing(self, client, content):
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        called = {"role": "assistant", "tool_calls": [call], **content}
        result = {"role": "tool", "tool_call_id": "1", "content": "7"}
        answer = client.chat.completions.create(
            model="fake", messages=[*CHAT, called, result, *CHAT]
        )
        assert answer.choices[0].message.content.strip() == TEXT

    @pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
    def test_earlier_thoughts_reach_the_template_under_one_name(self, tokenizer, name):
        template = "{{ messages[1].reasoning_content }}{{ messages[1].reasoning }}"
        thought = {"role": "assistant", "content": "Yes.", name: "Well."}
        with serving(tokenizer.with_template(template)) as up:
            up.post("/v1/chat/completions", {"messages": [*CHAT, thought, *CHAT]})
        assert up.engine.submitted[-1].prompt_token_ids == tokenizer.encode(
            "Well.", add_special_tokens=False
        )

    def test_max_completion_tokens_limits_the_answer(self, client):
        answer = client.chat.completions.create(
            model="fake", messages=CHAT, max_completion_tokens=3, max_tokens=5
        )
        assert answer.usage.completion_tokens == 3
        assert answer.choices[0].finish_reason == "length"

    def test_logprobs_have_text_bytes_and_exactly_k_rivals(self, client, tokenizer):
        answer = client.chat.completions.create(
            model="fake", messages=CHAT, logprobs=True, top_logprobs=3, max_tokens=6
        )
        content = answer.choices[0].logprobs.content
        assert len(content) == 6
        for entry in content:
            assert (entry.logprob, len(entry.top_logprobs)) == (-0.5, 3)
            assert entry.top_logprobs[0].token == entry.token
        joined = b"".join(bytes(entry.bytes) for entry in content[1:])
        assert joined.decode().strip() in TEXT

    def test_logprobs_without_rivals_hold_the_sampled_token_alone(self, client):
        answer = client.chat.completions.create(
            model="fake", messages=CHAT, logprobs=True, max_tokens=2
        )
        assert [e.top_logprobs for e in answer.choices[0].logprobs.content] == [[], []]

    def test_developer_speaks_as_system(self, up, tokenizer):
        for role in ("developer", "system"):
            up.post("/v1/chat/completions", {"messages": [{"role": role, "content": "Be brief."}]})
        developer, system = up.engine.submitted[-2:]
        assert developer.prompt_token_ids == system.prompt_token_ids
