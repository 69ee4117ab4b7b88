"""A value out of range is refused; the message names the field and says what it may be."""

import dataclasses
import math

import pytest

from fastgen_jax.errors import InvalidRequest
from fastgen_jax.sampling_params import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_SAMPLES,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)

NAN, INF, HUGE = math.nan, math.inf, 10**400
LONG = 10**5000  # longer than Python prints

# Field: (range as its message says it, values that are allowed, values that are not).
NUMBERS = {
    "temperature": ("[0.0, 100.0]", [0, 0.0, 1, 1e-30, 100], [-0.1, 100.1]),
    "top_p": ("(0.0, 1.0]", [1, 1e-30, 0.5], [0, 0.0, -1, 1.01]),
    "min_p": ("[0.0, 1.0]", [0, 1, 0.5], [-0.01, 1.01]),
    "presence_penalty": ("[-2.0, 2.0]", [-2, 0, 2.0], [-2.01, 3]),
    "frequency_penalty": ("[-2.0, 2.0]", [-2, 0, 2.0], [-2.01, 3]),
    "repetition_penalty": ("(0.0, 100.0]", [0.1, 1, 100], [0, -1, 101]),
}
INTEGERS = {
    "n": (f"from 1 to {MAX_SAMPLES}", [1, MAX_SAMPLES], [0, -1, MAX_SAMPLES + 1]),
    "max_tokens": ("from 1 to 2147483647", [1, 2**31 - 1, None], [0, -5, 2**31]),
    "top_k": ("from -1 to 2147483647", [-1, 0, 50], [-2, 2**31]),
    "seed": ("from -9223372036854775808", [0, -1, 2**63 - 1, -(2**63), None], [2**63, -(2**64)]),
    "logprobs": (f"from 0 to {MAX_LOGPROBS}", [0, MAX_LOGPROBS, None], [-1, MAX_LOGPROBS + 1]),
}
NOT_NUMBERS = [NAN, INF, -INF, True, False, "1", [], HUGE, -HUGE, LONG, 1j]
NOT_INTEGERS = [*NOT_NUMBERS, 1.0, 0.5]


def cases(table, position, also=()):
    """(field, range, value) for each value of a column of the table, and each of `also`."""
    for name, row in table.items():
        for value in [*row[position], *also]:
            yield pytest.param(name, row[0], value, id=f"{name}={label(value)}")


def label(value):
    return "long" if value is LONG else f"{value!r:.12}"


@pytest.mark.parametrize(("name", "range_", "value"), list(cases(NUMBERS | INTEGERS, 1)))
def test_value_in_range_is_kept(name, range_, value):
    assert getattr(SamplingParams(**{"max_tokens": None, name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "range_", "value"),
    [*cases(NUMBERS, 2, [*NOT_NUMBERS, None]), *cases(INTEGERS, 2, NOT_INTEGERS)],
)
def test_value_out_of_range_is_refused_with_field_and_range(name, range_, value):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert str(caught.value).startswith(f"{name} must be ")
    assert range_ in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("value", [-1, 17, 2**31, 1.0, True, NAN, None, LONG], ids=label)
def test_min_tokens_is_from_zero_to_max_tokens(value):
    with pytest.raises(InvalidRequest, match="min_tokens") as caught:
        SamplingParams(min_tokens=value)
    assert caught.value.param == "min_tokens"


def test_min_tokens_above_max_tokens_names_both():
    with pytest.raises(InvalidRequest, match="min_tokens=5 exceeds max_tokens=4"):
        SamplingParams(min_tokens=5, max_tokens=4)


BAD_LISTS = {
    "stop: too many": ({"stop": ["x"] * (MAX_STOP_STRINGS + 1)}, "stop has 17 strings; at most 16"),
    "stop: empty": ({"stop": ["a", ""]}, "each stop must be a string of 1 to 1024 characters"),
    "stop: long": ({"stop": "x" * (MAX_STOP_LENGTH + 1)}, "1 to 1024 characters, got 'xxxx"),
    "stop: bytes": ({"stop": [b"x"]}, "each stop must be a string"),
    "stop: number": ({"stop": 5}, "stop must be"),
    "ids: too many": ({"stop_token_ids": [1] * (MAX_STOP_TOKEN_IDS + 1)}, "33 ids; at most 32"),
    "ids: negative": ({"stop_token_ids": [-1]}, "stop_token_ids must be an integer from 0"),
    "ids: bool": ({"stop_token_ids": [True]}, "stop_token_ids must be an integer from 0"),
    "ids: huge": ({"stop_token_ids": [2**31]}, "stop_token_ids must be an integer from 0"),
    "ids: number": ({"stop_token_ids": 5}, "stop_token_ids must be"),
    "bias: too many": (
        {"logit_bias": dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0)},
        "logit_bias has 301 entries; at most 300",
    ),
    "bias: id": ({"logit_bias": {-1: 0.0}}, "logit_bias must be an integer from 0"),
    "bias: text id": ({"logit_bias": {"1": 0.0}}, "logit_bias must be an integer from 0"),
    "bias: large": ({"logit_bias": {1: 100.5}}, r"logit_bias must be in \[-100.0, 100.0\]"),
    "bias: nan": ({"logit_bias": {1: NAN}}, r"logit_bias must be in \[-100.0, 100.0\]"),
    "bias: list": ({"logit_bias": [1]}, "logit_bias must be"),
}


@pytest.mark.parametrize(("given", "message"), BAD_LISTS.values(), ids=BAD_LISTS)
def test_bad_lists_are_refused_with_their_limit(given, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        SamplingParams(**given)
    assert [caught.value.param] == list(given)


def test_stop_is_a_tuple_whatever_it_was():
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop=None, stop_token_ids=None).stop == ()


def test_limits_themselves_are_allowed():
    SamplingParams(
        stop=["x" * MAX_STOP_LENGTH] * MAX_STOP_STRINGS,
        stop_token_ids=list(range(MAX_STOP_TOKEN_IDS)),
        logit_bias=dict.fromkeys(range(MAX_LOGIT_BIAS), -100),
    )


def test_params_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().n = 2
