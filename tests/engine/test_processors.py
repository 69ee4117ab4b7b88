"""Logits processors: the caller's functions in the step, for the rows that ask for them."""

import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax.engine.types import Request
from fastgen_jax.errors import ConfigError, InvalidRequest
from fastgen_jax.llm import LLM
from fastgen_jax.sampling_params import SamplingParams
from tests import tiny

VOCAB = tiny.CONFIG["vocab_size"]
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
PROMPT = list(range(10, 30))


def only(logits, known, *, token=5):
    """Nothing but this token."""
    return jnp.where(jnp.arange(len(logits)) == token, logits, -jnp.inf)


def count_up(logits, known, *, start=0):
    """The number of output tokens so far, and a start."""
    return only(logits, known, token=start + known.n_tokens - known.n_prompt)


def again(logits, known):
    """The prompt once more."""
    return only(logits, known, token=known.token_ids[known.n_tokens - known.n_prompt])


NO_BIAS = np.zeros(VOCAB)


def add(logits, known, *, bias=NO_BIAS, is_on=True):
    return logits + jnp.where(is_on, bias, 0.0)


def spoil(logits, known):
    return logits * jnp.nan


PROCESSORS = {"only": only, "count": count_up, "again": again, "add": add, "spoil": spoil}


@pytest.fixture(scope="module", params=[1, 2])
def engine(request, tmp_path_factory):
    options = {"tensor_parallel_size": request.param, "logits_processors": PROCESSORS}
    return tiny.make_engine(tmp_path_factory.mktemp("model"), tiny.one_program, **options)


def asking(prompt=PROMPT, changes=GREEDY, **extra_args):
    return Request(prompt, changes.clone(extra_args=extra_args))


def test_processors_change_the_rows_that_ask_and_no_others(engine, forbid_compile):
    plain = Request(PROMPT, GREEDY.clone(logprobs=3))
    [alone] = tiny.run(engine, [plain])
    asked = [asking(only={}), asking(only={"token": 9}), asking(count={"start": 3})]
    requests = [plain, *asked[:2], plain, asked[2]]
    with forbid_compile():
        outputs = tiny.run(engine, requests)
    assert [tiny.tokens(o) for o in outputs[1:3]] == [[5] * 6, [9] * 6]
    assert tiny.tokens(outputs[4]) == [3, 4, 5, 6, 7, 8]
    for same in (outputs[0], outputs[3]):
        assert tiny.tokens(same) == tiny.tokens(alone)


def test_processors_know_prompt_and_output_though_others_cached_them(engine):
    tiny.run(engine, [Request(PROMPT, GREEDY)])
    hits = engine.stats().n_prefix_hits
    [outputs] = tiny.run(engine, [asking(again={})])
    assert tiny.tokens(outputs) == PROMPT[:6]
    assert engine.stats().n_prefix_hits == hits
    tiny.assert_idle(engine)


def test_samples_of_one_request_share_its_processors(engine):
    outputs = tiny.run(engine, [asking(changes=GREEDY.clone(n=3, temperature=1.0), only={})])[0]
    assert tiny.tokens(outputs) == [5] * 18


def test_processors_act_before_masks_and_bans(engine):
    """Which keep what they promise."""
    allowed = GREEDY.clone(allowed_token_ids=[11, 12])
    bias = np.zeros(VOCAB, np.float32)
    bias[[12, 40]] = 50.0, 90.0
    [outputs] = tiny.run(engine, [asking(changes=allowed, add={"bias": bias})])
    assert tiny.tokens(outputs) == [12] * 6
    [outputs] = tiny.run(engine, [asking(changes=allowed, only={})])
    assert outputs[-1].error.startswith("logits processors and what else constrains")


def test_processors_run_in_the_engines_order(engine):
    """add, which comes later, cannot bring back what only has taken."""
    bias = np.full(VOCAB, 10.0)
    [outputs] = tiny.run(engine, [asking(add={"bias": bias, "is_on": True}, only={"token": 7})])
    assert tiny.tokens(outputs) == [7] * 6


def test_logprobs_are_of_the_models_own_logits(engine):
    params = GREEDY.clone(logprobs=2, max_tokens=1)
    [plain] = tiny.run(engine, [Request(PROMPT, params)])
    [changed] = tiny.run(engine, [asking(changes=params, only={"token": 1})])
    assert [id for id, _ in changed[0].logprobs.top] == [id for id, _ in plain[0].logprobs.top]
    assert changed[0].logprobs.logprob < plain[0].logprobs.logprob


def test_nan_of_a_processor_ends_its_request_alone(engine):
    bad, good = tiny.run(engine, [asking(spoil={}), Request(PROMPT, GREEDY)])
    assert bad[-1].error == (
        "logits processors and what else constrains the output left no token, or NaN or inf"
    )
    assert len(tiny.tokens(good)) == 6
    assert engine.stats().n_nonfinite == 0, "it was not the model"


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        ({"onyl": {}}, "no logits processor 'onyl'; the engine has only, count, again, add, spoil"),
        ({"only": {"tokn": 5}}, "'only' has no argument 'tokn'; it has token"),
        ({"again": {"x": 5}}, "'again' has no argument 'x'; it has none"),
        ({"only": {"token": [5]}}, r"'token' of 'only' must be int32\[\], got int64\[1\]"),
        ({"only": {"token": 5.5}}, r"must be int32\[\], got float64\[\]"),
        ({"only": {"token": 2**40}}, r"must be int32\[\], got 1099511627776"),
        ({"only": {"token": "a"}}, r"must be int32\[\], got 'a'"),
        (
            {"add": {"bias": np.zeros(5)}},
            r"'bias' of 'add' must be float32\[62\], got float64\[5\]",
        ),
        ({"add": {"is_on": 1}}, r"'is_on' of 'add' must be bool\[\], got int64\[\]"),
    ],
)
def test_what_no_processor_takes_is_refused_when_it_is_asked_for(engine, extra_args, message):
    with pytest.raises(InvalidRequest, match=message):
        engine.check(asking(**extra_args))


def test_an_engine_without_processors_says_how_to_have_some(tmp_path):
    llm = LLM.from_engine(tiny.make_engine(tmp_path, tiny.one_program))
    with pytest.raises(InvalidRequest, match="the engine has none: LLM"):
        llm.generate([1], GREEDY.clone(extra_args={"only": {}}))


def shorter(logits, known):
    return logits[1:]


def half(logits, known):
    return logits.astype(jnp.bfloat16)


def two(logits, known):
    return logits, logits


def no_default(logits, known, *, by):
    return logits


def positional(logits, known, by=1.0):
    return logits


def texts(logits, known, *, word="a"):
    return logits


def asks_the_host(logits, known):
    return logits if known.n_tokens > 3 else logits * 2


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (shorter, r"must return float32\[62\], got ShapeDtypeStruct\(shape=\(61,\), dtype=float32"),
        (half, r"must return float32\[62\], got ShapeDtypeStruct\(shape=\(62,\), dtype=bfloat16"),
        (two, r"must return float32\[62\], got \("),
        (no_default, r"must have the form \(logits, known, \*, name=default .* it has \(logits, k"),
        (positional, "must have the form"),
        (texts, "the default of 'word' must be a bool, number or array of them, got 'a'"),
        (asks_the_host, "cannot be traced: TracerBoolConversionError"),
    ],
)
def test_wrong_functions_are_refused_at_the_start(tmp_path, function, message):
    with pytest.raises(ConfigError, match=rf"logits_processors\['f'\].*{message}"):
        tiny.make_engine(tmp_path, logits_processors={"f": function})


@pytest.mark.parametrize("given", [[only], {"f": "only"}, {1: only}])
def test_what_is_no_mapping_of_functions_is_refused(tmp_path, given):
    with pytest.raises(ConfigError, match="logits_processors must be a mapping of names to funct"):
        tiny.make_engine(tmp_path, logits_processors=given)
