"""A script for vLLM runs as it is: only the package that its imports name is another."""

import dataclasses
import re
import sys
from unittest import mock

import pytest

import fastgen_jax
import fastgen_jax.sampling_params
from fastgen_jax.engine import startup
from tests import tiny, tiny_tokenizers

PROMPTS = ["Anna has three apples", "The code of Anna is", {"prompt": "What is"}]
CONVERSATION = [
    {"role": "system", "content": "You are a helpful assistant"},
    {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
    {"role": "assistant", "content": "Hello! How can I assist you today?"},
    {"role": "user", "content": "Write an essay about apples."},
]


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", fastgen_jax)
    names = "vllm.sampling_params", fastgen_jax.sampling_params
    monkeypatch.setitem(sys.modules, *names)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    model = tmp_path_factory.mktemp("model")
    tiny.write_config(model, vocab_size=336, eos_token_id=1)
    tiny_tokenizers.byte_level(model)
    one_program = dataclasses.replace(startup.BACKENDS["cpu"], smallest_batch=2**31)
    with (
        mock.patch.dict(startup.BACKENDS, cpu=one_program),
        fastgen_jax.LLM(
            model=model,
            **tiny.OPTIONS | {"max_model_len": 256},
            tokenizer=str(model),
            tokenizer_mode="auto",
            trust_remote_code=False,
            tensor_parallel_size=1,
            dtype="float32",
            quantization=None,
            revision=None,
            gpu_memory_utilization=0.9,
            swap_space=4,
            enforce_eager=True,
            enable_chunked_prefill=True,
            enable_lora=False,
            disable_custom_all_reduce=True,
            disable_log_stats=True,
            runner="generate",
            seed=0,
        ) as llm,
    ):
        yield llm


def test_generate(llm):
    from vllm import SamplingParams

    params = SamplingParams(
        n=2, temperature=0.8, top_p=0.95, top_k=-1, min_p=0.0, seed=42, max_tokens=8, min_tokens=1,
        presence_penalty=0.1, frequency_penalty=0.1, repetition_penalty=1.1, logprobs=1,
        prompt_logprobs=None, stop=["\n\n"], stop_token_ids=None, bad_words=None,
        include_stop_str_in_output=False, ignore_eos=False, skip_special_tokens=True,
        spaces_between_special_tokens=False, detokenize=True, logit_bias=None,
        allowed_token_ids=None, structured_outputs=None, extra_args=None,
    )  # fmt: skip
    outputs = llm.generate(PROMPTS, sampling_params=params, use_tqdm=False, lora_request=None)
    assert [output.prompt for output in outputs] == [*PROMPTS[:2], "What is"]
    for output in outputs:
        assert output.finished
        assert output.prompt_logprobs is output.metrics is None
        assert [sample.index for sample in output.outputs] == [0, 1]
        for sample in output.outputs:
            assert len(sample.token_ids) == len(sample.logprobs) <= 8
            chosen = [step[id] for step, id in zip(sample.logprobs, sample.token_ids, strict=True)]
            assert sample.cumulative_logprob == pytest.approx(sum(c.logprob for c in chosen))
            assert sample.text == "".join(choice.decoded_token for choice in chosen)


def test_a_prompt_that_was_seen_comes_from_the_cache(llm):
    from vllm import SamplingParams, TokensPrompt

    prompts = [TokensPrompt(prompt_token_ids=list(range(40)))]
    first, second = (llm.generate(prompts, SamplingParams(), use_tqdm=False)[0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 32)


def test_params_for_each_prompt(llm):
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    final = RequestOutputKind.FINAL_ONLY
    base = SamplingParams(max_tokens=4, ignore_eos=True, detokenize=False, output_kind=final)
    params = [base.clone(), SamplingParams(max_tokens=2, ignore_eos=True)]
    outputs = llm.generate(PROMPTS[:2], params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [4, 2]
    assert outputs[0].outputs[0].text == ""


def test_default_params_of_which_some_are_assigned(llm):
    params = llm.get_default_sampling_params()
    params.max_tokens = 3
    params.temperature = 0.0
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert all(len(output.outputs[0].token_ids) <= 3 for output in outputs)


def test_chat(llm):
    from vllm import SamplingParams

    params, tools = SamplingParams(temperature=0.0, max_tokens=4), [{"type": "function"}]
    outputs = llm.chat(
        [CONVERSATION] * 2,
        params,
        use_tqdm=False,
        lora_request=None,
        chat_template=None,
        chat_template_content_format="auto",
        add_generation_prompt=True,
        continue_final_message=False,
        tools=tools,
        chat_template_kwargs={"enable_thinking": False},
        mm_processor_kwargs=None,
    )
    tokenizer = llm.get_tokenizer()
    text = tokenizer.apply_chat_template(
        [m | {"content": "Hello"} if isinstance(m["content"], list) else m for m in CONVERSATION],
        tools=tools,
        tokenize=False,
        add_generation_prompt=True,
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert [output.prompt_token_ids for output in outputs] == [ids, ids]
    [prompted] = llm.generate({"prompt_token_ids": ids}, params, use_tqdm=False)
    assert outputs[0].outputs[0].token_ids == prompted.outputs[0].token_ids


def test_structured_outputs(llm):
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    choice = StructuredOutputsParams(choice=["Positive", "Negative"])
    number = StructuredOutputsParams(regex=r"\d{2}")
    params = [SamplingParams(structured_outputs=form, seed=1) for form in (choice, number)]
    outputs = llm.generate(PROMPTS[:2], params, use_tqdm=False)
    texts = [output.outputs[0].text for output in outputs]
    assert texts[0] in ("Positive", "Negative")
    assert re.fullmatch(r"\d{2}", texts[1])


def test_tokens_that_may_be_said_and_words_that_may_not(llm):
    from vllm import SamplingParams

    ids = llm.get_tokenizer().encode("abc", add_special_tokens=False)
    params = SamplingParams(allowed_token_ids=ids, bad_words=["c"], max_tokens=8)
    [output] = llm.generate("Anna", params, use_tqdm=False)
    assert re.fullmatch("[ab]{8}", output.outputs[0].text)


def test_beam_search(llm):
    from vllm.sampling_params import BeamSearchParams

    params = BeamSearchParams(beam_width=2, max_tokens=3, ignore_eos=True)
    outputs = llm.beam_search([{"prompt": "Anna has"}], params)
    for sequence in outputs[0].sequences:
        assert sequence.text.startswith("<s>Anna has")
        assert sequence.cum_logprob < 0
