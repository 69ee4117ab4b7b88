"""litellm as a library: completions, chat, and its bridge to Responses."""

from typing import Literal

import litellm
import pydantic

from tests.clients.scenario import HISTORY, KEY, TALE, WEATHER, main

TOOL = {"type": "function", "function": {"name": "weather", "parameters": WEATHER}}
NAME = "hosted_vllm/fastgen-demo"


class Weather(pydantic.BaseModel):
    city: Literal["Paris", "Oslo"]
    days: int = pydantic.Field(ge=1, le=9)


def fields(url: str, model: str = NAME) -> dict:
    return {"model": model, "api_base": f"{url}/v1", "api_key": KEY, "num_retries": 0}


def chats_as_either_provider(url: str) -> None:
    for model in (NAME, "openai/fastgen-demo"):
        answer = litellm.completion(messages=HISTORY, max_tokens=12, **fields(url, model))
        assert answer.choices[0].message.content
        assert answer.usage.completion_tokens == 12


def streams(url: str) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(litellm.completion(messages=HISTORY, max_tokens=100, **options, **fields(url)))
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert sum(bool(text) for text in texts) > 1
    assert chunks[-1].usage.completion_tokens == 100


def completes(url: str) -> None:
    answer = litellm.text_completion(prompt="Once upon a time", max_tokens=8, **fields(url))
    assert answer.choices[0].text


def must_call_a_tool(url: str) -> None:
    answer = litellm.completion(
        messages=HISTORY,
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
        **fields(url),
    )
    (call,) = answer.choices[0].message.tool_calls
    Weather.model_validate_json(call.function.arguments)


def answers_in_structure(url: str) -> None:
    answer = litellm.completion(messages=HISTORY, response_format=Weather, **fields(url))
    Weather.model_validate_json(answer.choices[0].message.content)


def responds_over_chat(url: str) -> None:
    """The bridge: the caller speaks Responses; litellm, for this provider, chat."""
    bridged = fields(url, "custom_openai/fastgen-demo")
    answer = litellm.responses(input=TALE, max_output_tokens=16, **bridged)
    assert answer.output[0].content[0].text
    assert answer.usage.output_tokens == 16


def responds(url: str) -> None:
    for model in (NAME, "openai/fastgen-demo"):
        asked = {"input": TALE, "max_output_tokens": 100, **fields(url, model)}
        assert litellm.responses(**asked).output[0].content[0].text
        kinds = [part.type for part in litellm.responses(stream=True, **asked)]
        assert kinds.count("response.output_text.delta") > 1


def embeds(url: str) -> None:
    answer = litellm.embedding(input=["Tom", "Anna"], **fields(url))
    assert len(answer.data) == 2


if __name__ == "__main__":
    main(
        chats_as_either_provider,
        streams,
        completes,
        must_call_a_tool,
        answers_in_structure,
        responds_over_chat,
        responds,
        embeds,
    )
