"""openai-agents, over Responses, its default, and over chat."""

import asyncio
from typing import Annotated, Literal

import pydantic
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
)
from openai import AsyncOpenAI

from tests.clients.scenario import KEY, MODEL, TALE, main


class Weather(pydantic.BaseModel):
    city: Literal["Paris", "Oslo"]
    days: int = pydantic.Field(ge=1, le=9)


@function_tool
def weather(days: Annotated[int, pydantic.Field(ge=1, le=9)]) -> str:
    """The weather of some days."""
    return f"Snow for {days} days."


def run(url: str, kind: type, asked=TALE, *, settings: ModelSettings | None = None, **fields):
    async def answer():
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
            agent = Agent(
                "Anna",
                model=kind(model=MODEL, openai_client=client),
                model_settings=settings or ModelSettings(temperature=0),
                **fields,
            )
            return await Runner.run(agent, asked)

    return asyncio.run(answer())


def stream(url: str, kind: type) -> list[str]:
    async def parts() -> list[str]:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
            agent = Agent(
                "Anna",
                model=kind(model=MODEL, openai_client=client),
                model_settings=ModelSettings(temperature=0),
            )
            answer = Runner.run_streamed(agent, TALE)
            events = [event async for event in answer.stream_events()]
        raw = [event.data for event in events if event.type == "raw_response_event"]
        return [event.delta for event in raw if event.type == "response.output_text.delta"]

    return asyncio.run(parts())


def runs_over_chat(url: str) -> None:
    assert run(url, OpenAIChatCompletionsModel, instructions="Be brief.").final_output


def streams_over_chat(url: str) -> None:
    assert len(stream(url, OpenAIChatCompletionsModel)) > 1


def calls_a_tool_over_chat(url: str) -> None:
    calls_a_tool(url, OpenAIChatCompletionsModel)


def answers_in_structure_over_chat(url: str) -> None:
    answer = run(url, OpenAIChatCompletionsModel, output_type=Weather)
    assert isinstance(answer.final_output, Weather)


def runs_over_responses(url: str) -> None:
    assert run(url, OpenAIResponsesModel, instructions="Be brief.").final_output


def streams_over_responses(url: str) -> None:
    assert len(stream(url, OpenAIResponsesModel)) > 1


def calls_a_tool_over_responses(url: str) -> None:
    calls_a_tool(url, OpenAIResponsesModel)


def answers_in_structure_over_responses(url: str) -> None:
    answer = run(url, OpenAIResponsesModel, output_type=Weather)
    assert isinstance(answer.final_output, Weather)


def calls_a_tool(url: str, kind: type) -> None:
    """And goes on in another turn, whose history has the call and what came of it."""
    one = ModelSettings(tool_choice="required", parallel_tool_calls=False)
    answer = run(url, kind, settings=one, tools=[weather], tool_use_behavior="stop_on_first_tool")
    assert answer.final_output.startswith("Snow for ")
    history = answer.to_input_list()
    assert history[-1]["output"] == answer.final_output
    assert run(url, kind, [*history, {"role": "user", "content": TALE}]).final_output


if __name__ == "__main__":
    main(
        runs_over_chat,
        streams_over_chat,
        calls_a_tool_over_chat,
        answers_in_structure_over_chat,
        runs_over_responses,
        streams_over_responses,
        calls_a_tool_over_responses,
        answers_in_structure_over_responses,
    )
