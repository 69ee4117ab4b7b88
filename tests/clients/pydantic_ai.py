"""pydantic-ai's agents, over chat and over Responses."""

import asyncio
from typing import Annotated, Literal

import pydantic
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

from tests.clients.scenario import KEY, MODEL, TALE, main


class Weather(pydantic.BaseModel):
    city: Literal["Paris", "Oslo"]
    days: int = pydantic.Field(ge=1, le=9)


def agent(url: str, kind: type = OpenAIChatModel, **fields) -> Agent:
    model = kind(MODEL, provider=OpenAIProvider(base_url=f"{url}/v1", api_key=KEY))
    return Agent(model, model_settings=ModelSettings(max_tokens=200), **fields)


def runs(url: str) -> None:
    answer = agent(url, instructions="Be brief.").run_sync(TALE)
    assert answer.output
    assert answer.usage.output_tokens > 0


def streams(url: str) -> None:
    async def parts() -> list[str]:
        async with agent(url).run_stream(TALE) as answer:
            return [part async for part in answer.stream_text(delta=True, debounce_by=None)]

    assert len(asyncio.run(parts())) > 1


def offers_a_tool(url: str) -> None:
    asked = agent(url)

    @asked.tool_plain
    def weather(days: Annotated[int, pydantic.Field(ge=1, le=9)]) -> str:
        """The weather of some days."""
        return f"Snow for {days} days."

    assert asked.run_sync(TALE).output


def answers_by_a_tool(url: str) -> None:
    answer = agent(url, output_type=ToolOutput(Weather)).run_sync(TALE)
    assert isinstance(answer.output, Weather)


def answers_in_structure(url: str) -> None:
    answer = agent(url, output_type=NativeOutput(Weather)).run_sync(TALE)
    assert isinstance(answer.output, Weather)


def runs_over_responses(url: str) -> None:
    answer = agent(url, OpenAIResponsesModel).run_sync(TALE)
    assert answer.output
    answer = agent(url, OpenAIResponsesModel, output_type=NativeOutput(Weather)).run_sync(TALE)
    assert isinstance(answer.output, Weather)


if __name__ == "__main__":
    main(runs, streams, offers_a_tool, answers_by_a_tool, answers_in_structure, runs_over_responses)
