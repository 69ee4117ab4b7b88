"""Haystack's generators."""

from haystack.components.embedders import OpenAITextEmbedder
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import Tool
from haystack.utils import Secret

from tests.clients.scenario import KEY, MODEL, TALE, WEATHER, main

WEATHER_TOOL = Tool("weather", "The weather.", WEATHER, lambda city, days: f"Snow in {city}.")


def chat(url: str, streaming_callback=None, **fields) -> ChatMessage:
    generator = OpenAIChatGenerator(
        api_key=Secret.from_token(KEY),
        model=MODEL,
        api_base_url=f"{url}/v1",
        streaming_callback=streaming_callback,
        tools=fields.pop("tools", None),
        generation_kwargs=fields,
    )
    (reply,) = generator.run([ChatMessage.from_user(TALE)])["replies"]
    return reply


def chats(url: str) -> None:
    reply = chat(url, max_completion_tokens=12)
    assert reply.text
    assert reply.meta["usage"]["completion_tokens"] == 12


def streams(url: str) -> None:
    parts = []
    reply = chat(url, lambda chunk: parts.append(chunk.content), max_completion_tokens=100)
    assert "".join(parts) == reply.text
    assert len(parts) > 1


def must_call_a_tool(url: str) -> None:
    for callback in (None, lambda chunk: None):
        reply = chat(
            url, callback, tools=[WEATHER_TOOL], tool_choice="required", parallel_tool_calls=False
        )
        (call,) = reply.tool_calls
        assert call.tool_name == "weather"
        assert 1 <= call.arguments["days"] <= 9


def embeds(url: str) -> None:
    embedder = OpenAITextEmbedder(
        api_key=Secret.from_token(KEY), model=MODEL, api_base_url=f"{url}/v1"
    )
    assert len(embedder.run("Tom")["embedding"]) > 1


if __name__ == "__main__":
    main(chats, streams, must_call_a_tool, embeds)
