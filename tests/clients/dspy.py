"""DSPy's predictors: its own format, and the JSON one to which it falls back."""

from typing import Literal

import dspy

from tests.clients.scenario import KEY, TALE, main


class Weather(dspy.Signature):
    """Says what the weather is."""

    question: str = dspy.InputField()
    city: Literal["Paris", "Oslo"] = dspy.OutputField()
    days: int = dspy.OutputField()


def model(url: str) -> dspy.LM:
    return dspy.LM(
        "openai/fastgen-demo", api_base=f"{url}/v1", api_key=KEY, cache=False, max_tokens=200,
        num_retries=0,
    )  # fmt: skip


def completes(url: str) -> None:
    (answer,) = model(url)(TALE)
    assert answer


def predicts_as_json(url: str) -> None:
    with dspy.context(lm=model(url), adapter=dspy.JSONAdapter()):
        answer = dspy.Predict(Weather)(question=TALE)
    assert answer.city in ("Paris", "Oslo")
    assert isinstance(answer.days, int)


def falls_back_from_its_own_format(url: str) -> None:
    """A toy model does not keep to it, so JSON is asked for."""
    with dspy.context(lm=model(url), adapter=dspy.ChatAdapter()):
        answer = dspy.Predict(Weather)(question=TALE)
    assert answer.city in ("Paris", "Oslo")


if __name__ == "__main__":
    main(completes, predicts_as_json, falls_back_from_its_own_format)
