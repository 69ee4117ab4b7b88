"""LlamaIndex's OpenAILike."""

from typing import Literal

import pydantic
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

from tests.clients.scenario import KEY, MODEL, TALE, main


class Weather(pydantic.BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Oslo"]
    days: int = pydantic.Field(ge=1, le=9)


def weather(city: str, days: int) -> str:
    return f"Snow in {city} for {days} days."


def model(url: str, **fields) -> OpenAILike:
    options = {"is_chat_model": True, "context_window": 2048, "max_tokens": 12, "max_retries": 0}
    return OpenAILike(model=MODEL, api_base=f"{url}/v1", api_key=KEY, **options | fields)


def chats(url: str) -> None:
    assert model(url).chat([ChatMessage(TALE)]).message.content


def streams(url: str) -> None:
    parts = [part.delta for part in model(url, max_tokens=100).stream_chat([ChatMessage(TALE)])]
    assert sum(bool(part) for part in parts) > 1


def completes(url: str) -> None:
    assert model(url, is_chat_model=False).complete("Once upon a time").text


def must_call_a_tool(url: str) -> None:
    llm = model(url, is_function_calling_model=True, max_tokens=200)
    tools = [FunctionTool.from_defaults(weather, fn_schema=Weather)]
    answer = llm.chat_with_tools(
        tools, user_msg=TALE, tool_required=True, allow_parallel_tool_calls=False
    )
    (call,) = llm.get_tool_calls_from_response(answer)
    assert call.tool_name == "weather"
    assert isinstance(call.tool_kwargs["days"], int)


def answers_in_structure(url: str) -> None:
    for fields in ({"should_use_structured_outputs": True}, {"is_function_calling_model": True}):
        llm = model(url, max_tokens=200, **fields)
        answer = llm.as_structured_llm(Weather).complete(TALE)
        assert isinstance(answer.raw, Weather), fields


if __name__ == "__main__":
    main(chats, streams, completes, must_call_a_tool, answers_in_structure)
