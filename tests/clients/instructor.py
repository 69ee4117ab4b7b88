"""instructor: answers as pydantic models, in each of its modes."""

from typing import Literal

import instructor
import openai
import pydantic

from tests.clients.scenario import HISTORY, KEY, MODEL, main


class Weather(pydantic.BaseModel):
    city: Literal["Paris", "Oslo"]
    days: int = pydantic.Field(ge=1, le=9)


def ask(url: str, mode: instructor.Mode) -> Weather:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
    return instructor.from_openai(client, mode=mode).chat.completions.create(
        model=MODEL, messages=HISTORY, response_model=Weather, max_tokens=200, max_retries=0
    )


def calls_a_tool(url: str) -> None:
    assert isinstance(ask(url, instructor.Mode.TOOLS), Weather)


def calls_a_strict_tool(url: str) -> None:
    assert isinstance(ask(url, instructor.Mode.TOOLS_STRICT), Weather)


def answers_by_schema(url: str) -> None:
    assert isinstance(ask(url, instructor.Mode.JSON_SCHEMA), Weather)


if __name__ == "__main__":
    main(calls_a_tool, calls_a_strict_tool, answers_by_schema)
