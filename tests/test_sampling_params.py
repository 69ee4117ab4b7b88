"""A value out of range is refused; the message names the field and says what it may be."""

import math

import pytest

from fastgen_jax.errors import InvalidRequest
from fastgen_jax.sampling_params import (
    IDLE,
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_SAMPLES,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
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
    "allowed: none": ({"allowed_token_ids": []}, "allowed_token_ids is empty, so that nothing"),
    "allowed: too many": (
        {"allowed_token_ids": [1] * (MAX_ALLOWED_TOKEN_IDS + 1)},
        "allowed_token_ids has 1048577 ids; at most 1048576",
    ),
    "allowed: negative": ({"allowed_token_ids": [5, -1]}, "allowed_token_ids must be an integer"),
    "allowed: text": ({"allowed_token_ids": ["5"]}, "allowed_token_ids must be an integer from 0"),
    "allowed: string": ({"allowed_token_ids": "5"}, "allowed_token_ids must be a list, got '5'"),
    "words: too many": ({"bad_words": ["x"] * (MAX_BAD_WORDS + 1)}, "129 strings; at most 128"),
    "words: empty": ({"bad_words": ["a", ""]}, "each bad_words must be a string of 1 to 1024"),
    "words: long": ({"bad_words": ["x" * (MAX_STOP_LENGTH + 1)]}, "string of 1 to 1024 characters"),
    "words: string": ({"bad_words": "ab"}, "bad_words must be a list, got 'ab'"),
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


def test_lists_of_tokens_and_words_become_tuples():
    params = SamplingParams(allowed_token_ids=[3, 1], bad_words=["a", "b"])
    assert (params.allowed_token_ids, params.bad_words) == ((3, 1), ("a", "b"))
    assert SamplingParams(allowed_token_ids=None, bad_words=None) == SamplingParams()


def test_limits_themselves_are_allowed():
    SamplingParams(
        stop=["x" * MAX_STOP_LENGTH] * MAX_STOP_STRINGS,
        stop_token_ids=list(range(MAX_STOP_TOKEN_IDS)),
        logit_bias=dict.fromkeys(range(MAX_LOGIT_BIAS), -100),
        allowed_token_ids=list(range(MAX_ALLOWED_TOKEN_IDS)),
        bad_words=["x" * MAX_STOP_LENGTH] * MAX_BAD_WORDS,
    )


def test_what_is_assigned_is_checked_in_a_clone():
    params = SamplingParams(min_tokens=8)
    params.stop, params.max_tokens = "x", 4
    with pytest.raises(InvalidRequest, match="min_tokens=8 exceeds max_tokens=4"):
        params.clone()
    params.max_tokens = 40
    assert params.clone() == SamplingParams(min_tokens=8, stop=("x",), max_tokens=40)


def test_only_fields_can_be_assigned():
    with pytest.raises(AttributeError, match="no attribute 'max_token'"):
        SamplingParams().max_token = 2


def test_a_clone_shares_nothing_and_may_differ_in_some_fields():
    schema = StructuredOutputsParams(json={"type": "object"})
    params = SamplingParams(temperature=0.5, logit_bias={1: 2.0}, structured_outputs=schema)
    clone = params.clone()
    assert clone == params
    clone.structured_outputs.json["type"] = clone.logit_bias[1] = "changed"
    assert (schema.json, params.logit_bias) == ({"type": "object"}, {1: 2.0})
    assert params.clone(seed=3, n=2) == SamplingParams(
        temperature=0.5, logit_bias={1: 2.0}, structured_outputs=schema, seed=3, n=2
    )


def test_a_clone_is_checked_as_what_is_new():
    with pytest.raises(InvalidRequest, match="top_p must be in"):
        SamplingParams().clone(top_p=2)


def test_the_whole_vocabularys_logprobs_are_refused_with_what_there_is():
    with pytest.raises(InvalidRequest, match="no more than the 20 likeliest tokens"):
        SamplingParams(logprobs=-1)


def test_stop_strings_need_the_text():
    SamplingParams(detokenize=False, stop_token_ids=[1])
    with pytest.raises(InvalidRequest, match=r"which detokenize=False leaves out; .* stop_token"):
        SamplingParams(detokenize=False, stop="x")


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "output_kind": list(RequestOutputKind),
        "spaces_between_special_tokens": [True, False],
        "skip_clone": [True, False],
    }.items(),
)
def test_values_of_vllm_that_change_nothing_are_taken(name, values):
    assert [getattr(SamplingParams(**{name: value}), name) for value in values] == values


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("output_kind", "delta", "'delta' is not supported; it may be any RequestOutputKind"),
        ("spaces_between_special_tokens", None, "it may be any bool"),
        ("skip_clone", "yes", "skip_clone='yes' is not supported; it may be any bool"),
    ],
    ids=label,
)
def test_other_values_of_what_changes_nothing_are_refused(name, value, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert name in IDLE


@pytest.mark.parametrize("value", [{"x": 1}, {"x": None}, "x", [], {1: {}}, {"x": {1: 2}}])
def test_extra_args_are_arguments_by_processor(value):
    SamplingParams(extra_args={"x": {"y": 1}})
    message = "extra_args must be a mapping of logits processors to a mapping of their arguments"
    with pytest.raises(InvalidRequest, match=message):
        SamplingParams(extra_args=value)
