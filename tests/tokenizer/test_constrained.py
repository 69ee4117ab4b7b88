"""Forms of the output through a real engine with the demo's checkpoint."""

import json
import re

import jsonschema
import pytest

from fastgen_jax.built_in import DEMO
from fastgen_jax.errors import InvalidRequest
from fastgen_jax.llm import LLM
from fastgen_jax.sampling_params import SamplingParams, StructuredOutputsParams

PROMPT = "Once upon a time Anna had a red ball."
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Anna", "Tom"]},
        "ages": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 99},
            "maxItems": 3,
        },
        "is_kind": {"type": "boolean"},
    },
    "required": ["name", "ages", "is_kind"],
}


@pytest.fixture(scope="module")
def llm():
    sizes = {"num_kv_blocks": 200, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    with LLM(str(DEMO), max_model_len=160, block_size=8, **sizes) as llm:
        yield llm


def complete(llm: LLM, params: dict | None = None, prompt: str = PROMPT, **form):
    """The samples of one prompt."""
    options = {"max_tokens": 80, "temperature": 1.0, "seed": 5} | (params or {})
    structure = StructuredOutputsParams(**form)
    sampling = SamplingParams(structured_outputs=structure, **options)
    return llm.generate(prompt, sampling, use_tqdm=False)[0].outputs


def texts(samples) -> list[str]:
    return [sample.text for sample in samples]


def test_every_sample_of_a_schema_is_valid_by_it(llm):
    samples = complete(llm, {"n": 6}, json=SCHEMA)
    assert {sample.finish_reason for sample in samples} == {"stop"}
    for text in texts(samples):
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len(set(texts(samples))) > 1


def test_a_regex_matches_the_text_as_a_whole(llm):
    [sample] = complete(llm, regex=r"[A-Z][a-z]{2,6} is (?:happy|sad)\.")
    assert re.fullmatch(r"[A-Z][a-z]{2,6} is (?:happy|sad)\.", sample.text)


def test_a_choice_is_made(llm):
    choice = ("a red ball", "a red balloon", "é")
    assert set(texts(complete(llm, {"n": 8}, choice=choice))) <= {*choice}


def test_a_grammar_is_kept_to(llm):
    grammar = 'root ::= item ("," item){2}\nitem ::= "ball" | "cat"'
    assert re.fullmatch("(?:ball|cat)(?:,(?:ball|cat)){2}", complete(llm, grammar=grammar)[0].text)


def test_a_stop_string_ends_a_form_early(llm):
    [sample] = complete(llm, {"stop": ['"ages"']}, json=SCHEMA, disable_any_whitespace=True)
    assert re.fullmatch(r'\{"name":"(Anna|Tom)",', sample.text)
    assert (sample.finish_reason, sample.stop_reason) == ("stop", '"ages"')


def test_penalties_and_bias_choose_among_what_is_allowed(llm):
    params = {"frequency_penalty": 2.0, "presence_penalty": 2.0, "repetition_penalty": 3.0}
    [sample] = complete(llm, params | {"logit_bias": {65: 100.0}}, json=SCHEMA)
    jsonschema.validate(json.loads(sample.text), SCHEMA)


def test_min_tokens_are_said_where_the_form_has_room(llm):
    [sample] = complete(llm, {"min_tokens": 30}, regex="(?:ab)*")
    assert len(sample.token_ids) >= 30
    assert re.fullmatch("(?:ab)+", sample.text)


def test_logprobs_are_those_of_the_model_without_its_form(llm):
    [sample] = complete(llm, {"logprobs": 2, "temperature": 0.0}, choice=("xylophone",))
    assert sample.text == "xylophone"
    first = sample.logprobs[0]
    assert first[sample.token_ids[0]].logprob < max(p.logprob for p in first.values())


def test_a_seed_says_the_same_again_with_and_without_cached_prefixes(llm):
    prompt = PROMPT * 4
    cold = texts(complete(llm, {"n": 3}, prompt, json=SCHEMA))
    assert texts(complete(llm, {"n": 3}, prompt, json=SCHEMA)) == cold
    assert texts(complete(llm, {"n": 3, "seed": 6}, prompt, json=SCHEMA)) != cold


def test_an_output_cut_by_max_tokens_begins_what_is_valid(llm):
    [whole] = complete(llm, json=SCHEMA)
    for max_tokens in (1, 5, 9):
        [cut] = complete(llm, {"max_tokens": max_tokens}, json=SCHEMA)
        assert cut.finish_reason == "length"
        assert cut.token_ids == whole.token_ids[:max_tokens]
        assert whole.text.startswith(cut.text)


def test_neighbours_without_a_form_say_what_they_say_alone(llm):
    free = SamplingParams(max_tokens=24, temperature=0.0)
    form = SamplingParams(
        max_tokens=80, seed=3, structured_outputs=StructuredOutputsParams(json=SCHEMA)
    )
    [alone] = llm.generate(PROMPT, free, use_tqdm=False)
    beside, answer = llm.generate([PROMPT, PROMPT], [free, form], use_tqdm=False)
    assert beside.outputs[0].text == alone.outputs[0].text
    jsonschema.validate(json.loads(answer.outputs[0].text), SCHEMA)


def test_what_cannot_be_compiled_is_refused_by_its_place(llm):
    with pytest.raises(InvalidRequest, match=r"the schema at #/properties/a: .*not"):
        complete(llm, json={"type": "object", "properties": {"a": {"not": {}}}})
