"""The official client."""

import asyncio
from typing import Literal

import openai
import pydantic

from tests.clients.scenario import HISTORY, KEY, MODEL, WEATHER, main

TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather.", "parameters": WEATHER},
}
NAMED = {"type": "function", "function": {"name": "weather"}}


class Weather(pydantic.BaseModel):
    city: Literal["Paris", "Oslo"]
    days: int = pydantic.Field(ge=1, le=9)


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60)


def lists_models(url: str) -> None:
    assert [model.id for model in client(url).models.list()] == [MODEL]
    assert client(url).models.retrieve(MODEL).id == MODEL


def completes_with_logprobs(url: str) -> None:
    answer = client(url).completions.create(
        model=MODEL, prompt="Once upon a time", max_tokens=8, logprobs=2, n=2, seed=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert len(answer.choices[0].logprobs.tokens) == answer.usage.completion_tokens // 2 == 8


def chats(url: str) -> None:
    answer = client(url).chat.completions.create(
        model=MODEL, messages=HISTORY, max_completion_tokens=12, logprobs=True, top_logprobs=2
    )
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens == 12


def streams_what_it_answers_at_once(url: str) -> None:
    fields = {"model": MODEL, "messages": HISTORY, "max_tokens": 24, "temperature": 0}
    whole = client(url).chat.completions.create(**fields)
    stream = client(url).chat.completions.create(
        **fields, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    parts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(parts) == whole.choices[0].message.content
    assert last.choices == []
    assert last.usage.completion_tokens == 24
    assert len(parts) > 1


def streams_to_many_at_once(url: str) -> None:
    async def one(asynchronous: openai.AsyncOpenAI) -> str:
        stream = await asynchronous.chat.completions.create(
            model=MODEL, messages=HISTORY, max_tokens=16, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def eight() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY) as asynchronous:
            return await asyncio.gather(*[one(asynchronous) for _ in range(8)])

    answers = asyncio.run(eight())
    assert len(answers) == 8
    assert set(answers) == {answers[0]} != {""}


def gets_its_exceptions(url: str) -> None:
    assert isinstance(refusal(url, model="another"), openai.NotFoundError)
    assert isinstance(refusal(url, model=MODEL, temperature=-1), openai.BadRequestError)
    assert refusal(url, model="another").request_id


def refusal(url: str, **fields) -> openai.APIStatusError:
    try:
        client(url).chat.completions.create(messages=HISTORY, **fields)
    except openai.APIStatusError as error:
        return error
    raise AssertionError(f"{fields} was not refused")


def must_call_a_tool(url: str) -> None:
    for choice in ("required", NAMED):
        answer = client(url).chat.completions.create(
            model=MODEL,
            messages=HISTORY,
            tools=[TOOL],
            tool_choice=choice,
            parallel_tool_calls=False,
        )
        (call,) = answer.choices[0].message.tool_calls
        assert call.function.name == "weather"
        Weather.model_validate_json(call.function.arguments)
        assert answer.choices[0].finish_reason in ("tool_calls", "stop")


def streams_the_call_of_a_tool(url: str) -> None:
    with client(url).chat.completions.stream(
        model=MODEL,
        messages=HISTORY,
        tools=[openai.pydantic_function_tool(Weather)],
        tool_choice="required",
        parallel_tool_calls=False,
    ) as stream:
        events = [event.type for event in stream]
        (call,) = stream.get_final_completion().choices[0].message.tool_calls
    assert "tool_calls.function.arguments.done" in events
    assert isinstance(call.function.parsed_arguments, Weather)


def may_call_a_tool_and_hears_of_it(url: str) -> None:
    call = {"name": "weather", "arguments": '{"city": "Oslo", "days": 2}'}
    called = {"id": "call_1", "type": "function", "function": call}
    history = [
        *HISTORY,
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Snow."},
    ]
    answer = client(url).chat.completions.create(
        model=MODEL, messages=history, tools=[TOOL], max_tokens=16
    )
    assert answer.choices[0].message.content or answer.choices[0].message.tool_calls


def parses_a_structured_answer(url: str) -> None:
    answer = client(url).chat.completions.parse(
        model=MODEL, messages=HISTORY, response_format=Weather
    )
    assert isinstance(answer.choices[0].message.parsed, Weather)


def responds(url: str) -> None:
    first = client(url).responses.create(
        model=MODEL, input=HISTORY[0]["content"], max_output_tokens=16
    )
    assert first.output_text
    assert first.usage.output_tokens == 16
    assert first.status == "incomplete"
    second = client(url).responses.create(
        model=MODEL, input="And then?", previous_response_id=first.id, max_output_tokens=16
    )
    assert second.usage.input_tokens > first.usage.total_tokens


def streams_responses(url: str) -> None:
    with client(url).responses.stream(
        model=MODEL, input=HISTORY[0]["content"], temperature=0
    ) as stream:
        parts = [event.delta for event in stream if event.type == "response.output_text.delta"]
        last = stream.get_final_response()
    assert "".join(parts) == last.output_text != ""


def responds_with_structure_and_calls(url: str) -> None:
    answer = client(url).responses.parse(
        model=MODEL, input=HISTORY[0]["content"], text_format=Weather
    )
    assert isinstance(answer.output_parsed, Weather)
    answer = client(url).responses.create(
        model=MODEL,
        input=HISTORY[0]["content"],
        tools=[{"type": "function", "strict": True, **TOOL["function"]}],
        tool_choice="required",
        parallel_tool_calls=False,
    )
    (call,) = [item for item in answer.output if item.type == "function_call"]
    Weather.model_validate_json(call.arguments)


def embeds(url: str) -> None:
    answer = client(url).embeddings.create(model=MODEL, input=["Tom", "Anna"])
    assert [item.index for item in answer.data] == [0, 1]
    assert abs(sum(x * x for x in answer.data[0].embedding) - 1) < 1e-3
    few = client(url).embeddings.create(model=MODEL, input="Tom", dimensions=16)
    assert len(few.data[0].embedding) == 16


if __name__ == "__main__":
    main(
        lists_models,
        completes_with_logprobs,
        chats,
        streams_what_it_answers_at_once,
        streams_to_many_at_once,
        gets_its_exceptions,
        must_call_a_tool,
        streams_the_call_of_a_tool,
        may_call_a_tool_and_hears_of_it,
        parses_a_structured_answer,
        responds,
        streams_responses,
        responds_with_structure_and_calls,
        embeds,
    )
