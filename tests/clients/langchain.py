"""LangChain's ChatOpenAI and OpenAI, as chains and agents use them."""

from typing import Annotated

import pydantic
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

from tests.clients.scenario import KEY, MODEL, TALE, WEATHER, main


class Weather(pydantic.BaseModel):
    """The weather of a city."""

    city: str = pydantic.Field(max_length=20)
    days: int = pydantic.Field(ge=1, le=9)


@tool
def weather(days: Annotated[int, pydantic.Field(ge=1, le=9)]) -> str:
    """The weather of some days."""
    return f"Snow for {days} days."


ONE = {"parallel_tool_calls": False}  # call: a toy does not know when to stop


def chat(url: str, **fields) -> ChatOpenAI:
    return ChatOpenAI(model=MODEL, base_url=f"{url}/v1", api_key=KEY, max_retries=0, **fields)


def invokes(url: str) -> None:
    answer = chat(url, max_tokens=12).invoke(TALE)
    assert answer.content
    assert answer.usage_metadata["output_tokens"] == 12
    assert answer.response_metadata["finish_reason"] == "length"


def batches(url: str) -> None:
    answers = chat(url, max_tokens=8).batch([TALE] * 4)
    assert [bool(answer.content) for answer in answers] == [True] * 4


def streams(url: str) -> None:
    chunks = list(chat(url, max_tokens=100, stream_usage=True).stream(TALE))
    assert sum(bool(chunk.content) for chunk in chunks) > 1
    assert sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in chunks) == 100


def completes(url: str) -> None:
    llm = OpenAI(model=MODEL, base_url=f"{url}/v1", api_key=KEY, max_tokens=8)
    assert llm.invoke("Once upon a time")


def binds_tools_that_must_be_called(url: str) -> None:
    for choice in ("any", "weather"):
        answer = chat(url).bind_tools([weather], **ONE, tool_choice=choice).invoke(TALE)
        (call,) = answer.tool_calls
        assert call["name"] == "weather"
        assert isinstance(call["args"]["days"], int)
        assert answer.invalid_tool_calls == []


def streams_the_call_of_a_tool(url: str) -> None:
    chunks = list(chat(url).bind_tools([weather], **ONE, tool_choice="any").stream(TALE))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    (call,) = whole.tool_calls
    assert isinstance(call["args"]["days"], int)


def tells_what_a_tool_found(url: str) -> None:
    call = {"name": "weather", "args": {"days": 2}, "id": "call_1", "type": "tool_call"}
    history = [
        HumanMessage(TALE),
        AIMessage("", tool_calls=[call]),
        ToolMessage("Snow.", tool_call_id="call_1"),
    ]
    answer = chat(url, max_tokens=12).bind_tools([weather]).invoke(history)
    assert answer.content or answer.tool_calls


def answers_in_structure(url: str) -> None:
    for method in ("json_schema", "function_calling"):
        answer = chat(url).with_structured_output(Weather, method=method).invoke(TALE)
        assert isinstance(answer, Weather), method
    described = {"title": "weather", "description": "The weather.", **WEATHER}
    answer = chat(url).with_structured_output(described, method="json_schema").invoke(TALE)
    assert answer["city"] in ("Paris", "Oslo")


def responds(url: str) -> None:
    answer = chat(url, use_responses_api=True, max_tokens=16).invoke(TALE)
    assert answer.text
    assert answer.usage_metadata["output_tokens"] == 16


def embeds(url: str) -> None:
    embeddings = OpenAIEmbeddings(
        model=MODEL, base_url=f"{url}/v1", api_key=KEY, check_embedding_ctx_length=False
    )
    first, second = embeddings.embed_documents(["Tom", "Anna"])
    assert len(first) == len(second) > 1


if __name__ == "__main__":
    main(
        invokes,
        batches,
        streams,
        completes,
        binds_tools_that_must_be_called,
        streams_the_call_of_a_tool,
        tells_what_a_tool_found,
        answers_in_structure,
        responds,
        embeds,
    )
