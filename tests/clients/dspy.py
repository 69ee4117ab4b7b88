"""DSPy's predictors: its own format, and the JSON one to which it falls back."""

import json
from typing import Literal

import dspy
import litellm

from tests.clients.scenario import KEY, TALE, main


class Weather(dspy.Signature):
    """Says what the weather is."""

    question: str = dspy.InputField()
    city: Literal["Paris", "Oslo"] = dspy.OutputField()
    days: int = dspy.OutputField()


def model(url: str) -> dspy.LM:
    """A model whose schemas DSPy trusts; of one that it does not know it asks for JSON alone."""
    litellm.register_model({"openai/fastgen-demo": {"supports_response_schema": True}})
    account = {"api_base": f"{url}/v1", "api_key": KEY, "engine": "litellm"}
    return dspy.LM("openai/fastgen-demo", **account, cache=False, max_tokens=300, num_retries=0)


def completes(url: str) -> None:
    (answer,) = model(url)(TALE)
    assert answer


def answers_in_json(url: str) -> None:
    (answer,) = model(url)(TALE, response_format={"type": "json_object"})
    assert isinstance(json.loads(answer), dict)


def predicts_by_schema(url: str) -> None:
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
    main(completes, answers_in_json, predicts_by_schema, falls_back_from_its_own_format)
