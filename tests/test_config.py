"""A value out of range is refused; the message names the field and says what it may be."""

import dataclasses
import math

import pytest

from fastgen_jax.config import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_SAMPLES,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    EngineConfig,
    ModelConfig,
    RopeConfig,
    SamplingParams,
    check_known,
)
from fastgen_jax.errors import ConfigError, InvalidRequest

NAN, INF, HUGE = math.nan, math.inf, 10**400
LONG = 10**5000  # longer than Python prints
MODEL = {
    "family": "llama",
    "vocab_size": 8,
    "hidden_size": 8,
    "n_layers": 1,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 2,
    "ffn_size": 8,
    "max_position": 8,
}

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


@pytest.mark.parametrize("config", [SamplingParams(), EngineConfig(), ModelConfig(**MODEL)])
def test_configs_cannot_be_changed(config):
    name = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, 1)


COUNTS = ["max_model_len", "block_size", "num_kv_blocks", "max_num_batched_tokens", "max_num_seqs"]


@pytest.mark.parametrize("name", [*COUNTS, "max_queued_requests", "tensor_parallel_size"])
@pytest.mark.parametrize("value", [0, -1, 1.0, NAN, "8", True], ids=label)
def test_engine_counts_are_positive_integers(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be a positive integer, got {value!r}"):
        EngineConfig(**{name: value})


@pytest.mark.parametrize("name", ["max_queued_requests", "tensor_parallel_size"])
def test_engine_counts_without_automatic_choice_are_needed(name):
    with pytest.raises(ConfigError, match=f"{name} must be a positive integer, got None"):
        EngineConfig(**{name: None})


@pytest.mark.parametrize("value", [0, -0.1, 1.01, NAN, INF, "0.5", True], ids=label)
def test_memory_fraction_is_a_share(value):
    with pytest.raises(ConfigError, match=r"memory_fraction must be in \(0, 1\], got"):
        EngineConfig(memory_fraction=value)


@pytest.mark.parametrize("value", [-1, 2**32, 0.5, NAN, "7", True, None], ids=label)
def test_engine_seed_has_32_bits(value):
    with pytest.raises(ConfigError, match=r"seed must be .*\[0, 2\*\*32\), got"):
        EngineConfig(seed=value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"dtype": "float8"},
            "dtype must be one of auto, float32, bfloat16, float16, got 'float8'",
        ),
        ({"load_format": "pickle"}, "load_format must be one of auto, dummy, got 'pickle'"),
    ],
)
def test_engine_choices_name_what_is_known(given, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**given)


def test_every_engine_option_explains_itself():
    for field in dataclasses.fields(EngineConfig):
        assert field.metadata["help"]
        assert field.metadata["group"]


@pytest.mark.parametrize("name", [n for n in MODEL if n != "family"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, None, "2", NAN], ids=label)
def test_model_sizes_are_positive_integers(name, value):
    with pytest.raises(ConfigError, match=f"model config: {name} must be a positive integer, got"):
        ModelConfig(**MODEL | {name: value})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_heads": 3}, "3 query heads do not divide into 2 KV heads"),
        ({"head_dim": 3}, "rotary size must be even and from 2 to head_dim=3, got 3"),
        ({"rope": RopeConfig(size=0)}, "rotary size must be even and from 2 to head_dim=2, got 0"),
        ({"residual": "post", "norm_places": ("after",)}, "'post' has no norm_places=.'after',"),
        ({"alibi_slopes": (0.5, 0.25)}, "2 ALiBi slopes for 4 heads"),
    ],
)
def test_model_shapes_that_cannot_work_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**MODEL | given)


@pytest.mark.parametrize("value", [0, -1, NAN, INF, True, None, "1"], ids=label)
def test_norm_eps_is_a_positive_number(value):
    with pytest.raises(ConfigError, match="norm_eps must be a positive number, got"):
        ModelConfig(**MODEL, norm_eps=value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "stretched"}, "rope type 'stretched' is not supported; known: default, linear"),
        ({"theta": 0.0}, "rope theta must be a positive number, got 0.0"),
        ({"theta": NAN}, "rope theta must be a positive number, got nan"),
        ({"theta": "1e4"}, "rope theta must be a positive number, got '1e4'"),
        ({"factor": 0.5}, "rope factor must be at least 1, got 0.5"),
        ({"factor": INF}, "rope factor must be at least 1, got inf"),
        ({"factor": None}, "rope factor must be at least 1, got None"),
    ],
)
def test_rope_values_that_cannot_work_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        RopeConfig(**given)


def test_group_size_is_query_heads_per_kv_head():
    assert ModelConfig(**MODEL).group_size == 2


def test_unknown_option_names_the_nearest_known_one():
    with pytest.raises(ConfigError, match="unknown option 'max_token'; did you mean 'max_tokens'"):
        check_known({"temperature": 1, "max_token": 3}, SamplingParams)


def test_unknown_option_without_a_near_one_lists_all():
    with pytest.raises(ConfigError, match="unknown option 'zzz'; known: model, tokenizer, dtype"):
        check_known({"zzz": 1}, EngineConfig)


def test_known_options_pass():
    check_known({f.name: None for f in dataclasses.fields(EngineConfig)}, EngineConfig)
