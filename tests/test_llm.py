"""The offline API against an engine that plays a script."""

import dataclasses
import inspect
import io
import math
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from tqdm import tqdm

import fastgen_jax
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.types import Output, TokenLogprobs
from fastgen_jax.errors import (
    ConfigError,
    ContextLengthExceeded,
    EngineStopped,
    InvalidRequest,
    QueueFull,
)
from fastgen_jax.llm import LLM, TEMPLATE_OPTIONS
from fastgen_jax.mii import Pipeline, pipeline
from fastgen_jax.results import Logprob
from fastgen_jax.sampling_params import SamplingParams
from fastgen_jax.tokenizer import Tokenizer
from fastgen_jax.vllm_options import CHATTING, EMBEDDING, INSTEAD, LOADING
from tests import tiny, tiny_tokenizers
from tests.server.running import wait_until

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


@dataclass
class Script:
    """A request that the fake engine plays: its samples' remaining tokens, by index."""

    request: object
    left: dict[int, deque[int]]


@dataclass
class FakeEngine:
    """Plays `answer` to every prompt, a token per sample and step; commands wait for a step."""

    answer: Sequence[int] = field(default_factory=lambda: list(range(20, 60)))
    eos: int | None = None
    max_total_tokens: int = 100
    max_queued_requests: int = 4
    default_params: dict = field(default_factory=dict)
    on_step: object = None
    poison: tuple[int, ...] = ()
    n_reused: int = 0
    calls: list = field(default_factory=list)
    n_submitted: int = 0
    submitted: list = field(default_factory=list)

    def __post_init__(self):
        self.live, self.inbox = {}, []

    def end_at(self, token_ids):
        self.ends = token_ids

    def check(self, request):
        if not request.prompt_token_ids:
            raise InvalidRequest("the prompt is empty", param="prompt")
        if len(request.prompt_token_ids) >= self.max_total_tokens:
            raise ContextLengthExceeded("maximum context length is 100 tokens", param="prompt")

    def submit(self, request):
        self.check(request)
        if len(self.live) >= self.max_queued_requests:
            raise QueueFull("full")
        id, self.n_submitted = self.n_submitted, self.n_submitted + 1
        self.submitted.append(request)
        self.live[id] = Script(request, {i: deque(self.answer) for i in range(request.params.n)})
        return id

    def cancel(self, id):
        self.calls.append(("cancel", id))
        self.inbox.append((id, None))

    def finish(self, id, index):
        self.calls.append(("finish", id, index))
        self.inbox.append((id, index))

    def close(self):
        self.calls.append("close")

    @property
    def has_work(self):
        return bool(self.live or self.inbox)

    def step(self):
        outputs = []
        for id, index in self.inbox:
            script = self.live.get(id, Script(None, {}))
            for i in list(script.left) if index is None else [index]:
                if script.left.pop(i, None) is not None and index is None:
                    outputs.append(Output(id, i, None, finish_reason="abort"))
        self.inbox = []
        if self.on_step:
            self.on_step(self)
        for id, script in reversed(self.live.items()):  # not in the order of the prompts
            outputs += [self._play(id, script, index) for index in list(script.left)]
        self.live = {id: script for id, script in self.live.items() if script.left}
        return outputs

    def _play(self, id, script, index):
        params, left = script.request.params, script.left[index]
        token, n_tokens = left.popleft(), len(self.answer) - len(left)
        reason = (
            "stop" if token == self.eos else "length" if n_tokens == params.max_tokens else None
        )
        error = "non-finite logits" if id in self.poison else None
        if reason or error:
            del script.left[index]
        if error:
            return Output(id, index, None, finish_reason="error", error=error)
        logprobs = None
        if params.logprobs is not None:
            logprobs = TokenLogprobs(-2.0, [(70 + i, -1.0 - i) for i in range(params.logprobs)])
        return Output(id, index, token, logprobs, reason, n_reused=self.n_reused)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(tiny_tokenizers.byte_level(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def says(tokenizer):
    """An LLM that answers everything with `text` and EOS."""

    def make(text, **options):
        answer = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        return LLM.from_engine(FakeEngine(answer, eos=tokenizer.eos_token_id, **options), tokenizer)

    return make


def make_llm(**options):
    return LLM.from_engine(FakeEngine(**options))


def token_ids(outs):
    return [sample.token_ids for out in outs for sample in out.outputs]


# --- prompts, params, results


def test_text_is_completed(says, tokenizer):
    [out] = says("two balls").generate("Anna has ", SamplingParams(max_tokens=50), use_tqdm=False)
    [sample] = out.outputs
    assert (sample.text, sample.finish_reason, sample.stop_reason) == ("two balls", "stop", None)
    assert sample.token_ids[-1] == tokenizer.eos_token_id
    assert (out.prompt, out.prompt_token_ids) == ("Anna has ", tokenizer.encode("Anna has "))
    assert out.finished
    assert sample.logprobs is sample.cumulative_logprob is None


@pytest.mark.parametrize(
    ("prompts", "n_prompts"),
    [
        ([1, 2, 3], 1),
        ((1, 2, 3), 1),
        ([[1, 2], [3]], 2),
        (np.array([1, 2, 3]), 1),
        (np.array([[1, 2], [3, 4]]), 2),
        ([np.array([1, 2]), (3, 4), [5]], 3),
        ((i for i in (1, 2, 3)), 1),
        (([i] for i in (1, 2)), 2),
        (map(iter, [[1, 2], [3]]), 2),
        (range(1, 4), 1),
        ({"prompt_token_ids": (1, 2, 3)}, 1),
        ([{"prompt_token_ids": [1]}, {"prompt_token_ids": np.array([2]), "prompt": None}], 2),
        ([], 0),
    ],
)
def test_token_ids_come_in_every_shape(prompts, n_prompts):
    outs = make_llm().generate(prompts, GREEDY, use_tqdm=False)
    assert len(outs) == n_prompts
    assert all(type(id) is int for out in outs for id in out.prompt_token_ids)
    assert all(out.prompt is None and out.outputs[0].text == "" for out in outs)


def test_no_prompt_of_a_generator_is_lost():
    outs = make_llm().generate(([i + 1] for i in range(3)), (GREEDY for _ in range(3)))
    assert [out.prompt_token_ids for out in outs] == [[1], [2], [3]]


def test_dict_prompts_are_what_they_hold(says, tokenizer):
    both = {"prompt": "hi", "prompt_token_ids": [5]}
    outs = says("x").generate([{"prompt": "Anna"}, both], GREEDY, use_tqdm=False)
    assert [out.prompt for out in outs] == ["Anna", "hi"]
    assert [out.prompt_token_ids for out in outs] == [tokenizer.encode("Anna"), [5]]


def test_results_are_in_the_order_of_the_prompts():
    outs = make_llm().generate([[i + 1] for i in range(4)], GREEDY, use_tqdm=False)
    assert [out.prompt_token_ids for out in outs] == [[1], [2], [3], [4]]
    assert [out.request_id for out in outs] == ["0", "1", "2", "3"]


def test_each_prompt_may_have_its_params():
    params = [SamplingParams(max_tokens=n) for n in (3, 1, 2)]
    outs = make_llm().generate([[1], [1], [1]], params, use_tqdm=False)
    assert [len(ids) for ids in token_ids(outs)] == [3, 1, 2]


def test_number_of_params_must_be_that_of_prompts():
    with pytest.raises(InvalidRequest, match="2 sampling_params for 3 prompts"):
        make_llm().generate([[1], [1], [1]], [GREEDY] * 2)


@pytest.mark.parametrize("params", [5, {"temperature": 0.0}, [GREEDY, None], "greedy"])
def test_what_are_no_params_is_refused(params):
    with pytest.raises(InvalidRequest, match="are one SamplingParams or one for each prompt, not"):
        make_llm().generate([[1], [2]], params)


def test_params_default_to_the_models():
    llm = make_llm(default_params={"temperature": 0.6, "top_p": 0.9})
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.6, top_p=0.9)
    [out] = llm.generate([1], use_tqdm=False)
    assert len(out.outputs[0].token_ids) == SamplingParams().max_tokens


def test_params_may_be_assigned_and_are_checked_before_any_runs():
    llm = make_llm()
    params = llm.get_default_sampling_params()
    params.max_tokens = 3
    assert [len(ids) for ids in token_ids(llm.generate([[1]], params, use_tqdm=False))] == [3]
    params.top_p = 2
    for many in (params, [GREEDY, params]):
        with pytest.raises(InvalidRequest, match="top_p must be in"):
            llm.generate([[1], [2]], many)
    assert llm.engine.n_submitted == 1


def test_a_run_keeps_the_params_that_it_began_with():
    params = SamplingParams(max_tokens=5, logprobs=1)

    def change(engine):
        params.max_tokens, params.logprobs = 1, None

    [out] = make_llm(on_step=change).generate([1], params, use_tqdm=False)
    assert len(out.outputs[0].token_ids) == len(out.outputs[0].logprobs) == 5


def test_samples_of_one_prompt_are_in_order():
    params = SamplingParams(n=3, max_tokens=2)
    [out] = make_llm().generate([1], params, use_tqdm=False)
    assert [sample.index for sample in out.outputs] == [0, 1, 2]
    assert token_ids([out]) == [[20, 21]] * 3


def test_logprobs_hold_the_sampled_token_and_the_most_likely(says, tokenizer):
    [out] = says("ab").generate("x", SamplingParams(logprobs=2), use_tqdm=False)
    [sample] = out.outputs
    first = sample.logprobs[0]
    assert list(first) == [sample.token_ids[0], 70, 71]
    assert first[sample.token_ids[0]] == Logprob(
        -2.0, None, tokenizer.token_text(sample.token_ids[0])
    )
    assert first[70] == Logprob(-1.0, 1, tokenizer.token_text(70))
    assert len(sample.logprobs) == len(sample.token_ids)
    assert math.isclose(sample.cumulative_logprob, -2.0 * len(sample.token_ids))


def test_output_has_miis_attributes(says):
    [out] = says("two").generate("Anna", use_tqdm=False)
    assert (out.generated_text, str(out), out.finish_reason) == ("two", "two", "stop")
    assert out.prompt_length == len(out.prompt_token_ids)
    assert out.generated_length == len(out.outputs[0].token_ids)


def test_without_detokenize_there_are_ids_and_no_text(says, monkeypatch):
    llm = says("two")
    monkeypatch.setattr(Tokenizer, "token_bytes", None)
    params = SamplingParams(detokenize=False, logprobs=1)
    [out] = llm.generate([1], params, use_tqdm=False)
    [sample] = out.outputs
    assert (sample.text, sample.finish_reason, len(sample.token_ids)) == ("", "stop", 4)
    assert sample.logprobs[0][sample.token_ids[0]] == Logprob(-2.0, None, None)


@pytest.mark.parametrize("field", [{"bad_words": ["x"]}, {"structured_outputs": {"regex": "x"}}])
def test_words_need_a_tokenizer(field):
    with pytest.raises(InvalidRequest, match=r"prompt 0: .* needs a tokenizer"):
        make_llm().generate([1], SamplingParams(**field))


def test_output_has_vllms_attributes():
    [out] = make_llm(n_reused=16).generate([1], SamplingParams(n=2), use_tqdm=False)
    assert out.num_cached_tokens == 16
    assert out.prompt_logprobs is out.metrics is None


# --- the tokenizer of transformers


def test_get_tokenizer_is_transformers_own(says, tokenizer):
    llm = says("x")
    theirs, conversation = llm.get_tokenizer(), [{"role": "user", "content": "hi"}]
    text = theirs.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert text == "<s><|user|>\nhi</s>\n<|assistant|>\n"
    assert theirs.encode("Anna has") == tokenizer.encode("Anna has")
    assert theirs.decode(theirs.encode("Anna has"), skip_special_tokens=True) == "Anna has"
    assert theirs.eos_token_id == tokenizer.eos_token_id
    assert llm.get_tokenizer() is theirs


def test_settings_of_the_users_tokenizer_are_not_ours(says, tokenizer):
    llm = says("x")
    theirs = llm.get_tokenizer()
    theirs.chat_template = "{{ 'changed' }}"
    assert len(theirs("Anna has", truncation=True, max_length=2)["input_ids"]) == 2
    [out] = llm.generate("Anna has three apples", GREEDY, use_tqdm=False)
    assert out.prompt_token_ids == tokenizer.encode("Anna has three apples")
    assert len(out.prompt_token_ids) > 2
    [out] = llm.chat([{"role": "user", "content": "hi"}], use_tqdm=False)
    assert out.prompt.startswith("<s><|user|>")


def test_get_tokenizer_without_one_is_refused():
    with pytest.raises(InvalidRequest, match="get_tokenizer needs a tokenizer"):
        make_llm().get_tokenizer()


# --- stop strings


def test_stop_string_ends_a_sample_in_the_engine(says):
    llm = says("Anna has three apples")
    params = SamplingParams(max_tokens=50, stop=" three", n=2)
    [out] = llm.generate("x", params, use_tqdm=False)
    assert [(s.text, s.finish_reason, s.stop_reason) for s in out.outputs] == [
        ("Anna has", "stop", " three")
    ] * 2
    assert sorted(llm.engine.calls) == [("finish", 0, 0), ("finish", 0, 1)]


def test_stop_string_on_the_last_token_is_not_reported_to_the_engine(says):
    llm = says("x.")
    [out] = llm.generate("x", SamplingParams(max_tokens=2, stop="."), use_tqdm=False)
    assert (out.outputs[0].text, out.outputs[0].stop_reason, llm.engine.calls) == ("x", ".", [])


def test_stop_string_needs_a_tokenizer():
    with pytest.raises(InvalidRequest, match="prompt 0: a stop string needs a tokenizer"):
        make_llm().generate([1], SamplingParams(stop="x"))


def test_text_prompt_needs_a_tokenizer():
    with pytest.raises(InvalidRequest, match="prompt 1: a text prompt needs a tokenizer"):
        make_llm().generate([[1], "x"], GREEDY)


# --- chat


def test_chat_answers_one_conversation_or_many(says, tokenizer):
    llm = says("yes")
    conversation = [{"role": "user", "content": "hi"}]
    [one] = llm.chat(conversation, use_tqdm=False)
    assert one.prompt == "<s><|user|>\nhi</s>\n<|assistant|>\n"
    assert one.prompt_token_ids == tokenizer.apply_chat_template(conversation)
    assert [out.outputs[0].text for out in llm.chat([conversation] * 2, use_tqdm=False)] == [
        "yes"
    ] * 2


def test_bad_conversation_is_named(says):
    good, bad = [{"role": "user", "content": "hi"}], [{"role": "narrator", "content": "hi"}]
    with pytest.raises(InvalidRequest, match="prompt 1: the chat template refused: no narrator"):
        says("x").chat([good, bad])


def test_chat_without_a_tokenizer_is_refused():
    with pytest.raises(InvalidRequest, match="chat needs a tokenizer"):
        make_llm().chat([{"role": "user", "content": "hi"}])


def prompt_of(llm, **options):
    [out] = llm.chat([{"role": "user", "content": "hi"}], use_tqdm=False, **options)
    return out.prompt


def test_options_of_chat_reach_the_template(says):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert prompt_of(says("x"), tools=[tool]).endswith("</s>\n<tool><|assistant|>\n")
    closed = "<s><|user|>\nhi</s>\n"
    assert prompt_of(says("x"), add_generation_prompt=False) == closed
    open_end = {"continue_final_message": True, "add_generation_prompt": False}
    assert prompt_of(says("x"), **open_end) == "<s><|user|>\nhi"


def test_chat_takes_another_template_and_its_variables(says):
    llm, template = says("x"), "{{ messages[0].content }} {{ mood }}"
    assert prompt_of(llm, chat_template=template, chat_template_kwargs={"mood": "!"}) == "hi !"
    assert prompt_of(llm) == "<s><|user|>\nhi</s>\n<|assistant|>\n"
    with pytest.raises(InvalidRequest, match="prompt 0: the chat template refused"):
        prompt_of(llm, chat_template="{% if %}")


def test_prompts_of_lower_priority_run_first(says):
    llm = says("x")
    outs = llm.generate(["a", "b", "c"], GREEDY, use_tqdm=False, priority=[5, -1, 5])
    assert [int(out.request_id) for out in outs] == [1, 0, 2]
    llm.chat([{"role": "user", "content": "hi"}], GREEDY, use_tqdm=False, priority=[7])
    assert [request.priority for request in llm.engine.submitted] == [-1, 5, 5, 7]


@pytest.mark.parametrize(
    ("priority", "message"),
    [
        ([1], "1 priorities for 2 prompts"),
        ([1, 2, 3], "3 priorities for 2 prompts"),
        (1, "priority is one integer for each prompt, not 1"),
    ],
)
def test_there_is_a_priority_for_each_prompt(says, priority, message):
    with pytest.raises(InvalidRequest, match=message):
        says("x").generate(["a", "b"], GREEDY, priority=priority)


# --- options of vLLM's


def test_options_of_vllm_that_change_nothing_are_taken(says):
    options = {"lora_request": None, "mm_processor_kwargs": None}
    [out] = says("two").generate("x", GREEDY, use_tqdm=False, **options)
    content = {"chat_template_content_format": "auto", "chat_template_kwargs": {}}
    assert prompt_of(says("two"), **options, **content) == prompt_of(says("two"))
    assert out.outputs[0].text == "two"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_request": "mine"}, "lora_request='mine' is not supported; it may be None or {} or"),
        ({"lora_reqest": None}, "unknown option 'lora_reqest'; did you mean 'lora_request'"),
        ({"max_tokens": 5}, "unknown option 'max_tokens'; known: "),
    ],
)
def test_other_options_are_refused(says, options, message):
    llm = says("x")
    for call in (llm.generate, llm.chat):
        with pytest.raises(ConfigError, match=message):
            call([], **options)
    assert llm.engine.n_submitted == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trust_remote_code": True}, "it may be False; code of a repository is never run"),
        ({"gpu_memory_utilization": 0.5}, "=0.5 is not supported; it may be 0.9; memory_fraction"),
        ({"quantization": "awq"}, "quantization='awq' is not supported; it may be None; config"),
        ({"enforce_eager": None}, "enforce_eager=None is not supported; it may be any bool"),
        ({"swap_space": "4"}, r"may be any int \| float; leave it out"),
        ({"enforce_eagr": True}, "unknown option 'enforce_eagr'; did you mean 'enforce_eager'"),
        ({"max_model_len": "many"}, "max_model_len must be a positive integer, got 'many'"),
    ],
)
def test_other_values_of_vllms_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LLM("some-model", **options)


def test_no_option_that_acts_is_among_those_that_change_nothing():
    assert not LOADING.keys() & {option.name for option in dataclasses.fields(EngineConfig)}
    assert not CHATTING.keys() & {*inspect.signature(LLM.chat).parameters, *TEMPLATE_OPTIONS}
    assert not EMBEDDING.keys() & inspect.signature(LLM.embed).parameters.keys()
    assert INSTEAD.keys() <= LOADING.keys() | CHATTING.keys() | EMBEDDING.keys()


@pytest.mark.parametrize(
    "model", [5, None, "", ["a"], b"path", 1.5], ids=lambda model: f"{model!r:.5}"
)
def test_what_names_no_model_is_refused(model):
    expected = "model must be the directory of a Hugging Face checkpoint, or a hub id, got"
    with pytest.raises(ConfigError, match=expected):
        LLM(model)


def test_what_names_no_tokenizer_is_refused():
    with pytest.raises(ConfigError, match="tokenizer must be the directory of a Hugging Face"):
        LLM("some-model", tokenizer=5)


def test_path_that_is_no_directory_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    for path in (file, tmp_path / "absent", str(file), "./absent", "a/b/c"):
        with pytest.raises(ConfigError, match=r"no directory .*; give a Hugging Face directory or"):
            LLM(path)


def test_name_that_is_not_in_the_cache_is_refused():
    with pytest.raises(ConfigError, match="'some-model' is no directory here and could not be"):
        LLM("some-model")


# --- failures


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([], InvalidRequest, "prompt 2: the prompt is empty"),
        (list(range(100)), ContextLengthExceeded, "prompt 2: maximum context"),
        (7.5, InvalidRequest, "prompt 2: a prompt is a text or a list of token ids, not 7.5"),
        (None, InvalidRequest, "prompt 2: a prompt is"),
        (b"text", InvalidRequest, "prompt 2: a prompt is a text or .* not b'text'"),
        ({1, 2}, InvalidRequest, "prompt 2: a prompt is a text or .* not {1, 2}"),
        ({"prompt_ids": [1]}, InvalidRequest, "a dict may hold them as 'prompt' and"),
        ({"prompt": 5}, InvalidRequest, "prompt 2: a prompt is a text or"),
        ({"prompt_token_ids": [1], "cache_salt": "x"}, InvalidRequest, "and nothing else"),
        ({}, InvalidRequest, "prompt 2: a prompt is a text or"),
    ],
)
def test_bad_prompt_is_named_before_any_runs(bad, error, message):
    llm = make_llm()
    with pytest.raises(error, match=message):
        llm.generate([[1], [2], bad, [3]], GREEDY)
    assert llm.engine.n_submitted == 0


@pytest.mark.parametrize("prompts", [5, None, b"text"])
def test_what_is_no_prompt_at_all_is_refused(prompts):
    with pytest.raises(InvalidRequest, match="a prompt is a text or a list of token ids, not"):
        make_llm().generate(prompts, GREEDY)


def test_failing_request_fails_alone():
    outs = make_llm(poison=(1,)).generate([[1], [2], [3]], GREEDY, use_tqdm=False)
    assert [out.finish_reason for out in outs] == ["length", "error", "length"]
    assert outs[1].outputs[0].error == "non-finite logits"
    assert token_ids(outs) == [list(range(20, 28)), [], list(range(20, 28))]


def test_more_prompts_than_the_queue_holds_all_run():
    llm = make_llm(max_queued_requests=3)
    outs = llm.generate([[i + 1] for i in range(20)], GREEDY, use_tqdm=False)
    assert token_ids(outs) == [list(range(20, 28))] * 20


def test_queue_that_can_never_drain_raises():
    with pytest.raises(QueueFull):
        make_llm(max_queued_requests=0).generate([1], GREEDY, use_tqdm=False)


def test_fault_of_the_engine_cancels_the_rest():
    def fail_once(engine):
        engine.on_step = None
        raise RuntimeError("device lost")

    llm = make_llm(on_step=fail_once)
    with pytest.raises(RuntimeError, match="device lost"):
        llm.generate([[1], [2]], GREEDY, use_tqdm=False)
    assert llm.engine.calls == [("cancel", 0), ("cancel", 1)]
    assert not llm.engine.live


@pytest.fixture
def sigint():
    """Python's own handler, which a shell's background jobs start without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint")
def test_interrupt_cancels_everything_and_the_llm_stays_usable():
    steps = []

    def press_ctrl_c(engine):
        steps.append("begun")
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)
            steps.append("not cut short")

    llm = make_llm(on_step=press_ctrl_c, max_queued_requests=2)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1], [2], [3]], GREEDY, use_tqdm=False)
    assert steps[:3] == ["begun", "begun", "not cut short"]
    assert not llm.engine.has_work
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert token_ids(llm.generate([1], GREEDY, use_tqdm=False)) == [list(range(20, 28))]


@pytest.mark.usefixtures("sigint")
def test_second_interrupt_acts_at_once():
    llm, has_raised = make_llm(), threading.Event()

    def press_again_once_all_is_cancelled(engine):
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: llm._driver._cancelled)
        os.kill(os.getpid(), signal.SIGINT)
        assert has_raised.wait(60), "not interrupted"

    llm.engine.on_step = press_again_once_all_is_cancelled
    with pytest.raises(KeyboardInterrupt):
        llm.generate([1], GREEDY, use_tqdm=False)
    llm.engine.on_step = None
    has_raised.set()
    wait_until(lambda: not llm.engine.has_work)
    assert ("cancel", 0) in llm.engine.calls


def test_handler_of_the_user_is_left_alone():
    seen = []
    previous = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        press = lambda engine: signal.raise_signal(signal.SIGINT)  # noqa: E731
        [out] = make_llm(on_step=press).generate([1], GREEDY, use_tqdm=False)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert seen
    assert out.finish_reason == "length"


def test_closed_llm_refuses_work():
    with make_llm() as llm:
        engine = llm.engine
    llm.close()
    assert engine.calls == ["close"]
    with pytest.raises(EngineStopped, match="this LLM is closed"):
        llm.generate([1], GREEDY)


def test_progress_bar_shows_prompts_and_speed(capsys):
    make_llm().generate([[1], [2]], GREEDY, use_tqdm=True)
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "tokens/s" in shown
    make_llm().generate([[1], [2]], GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_progress_bar_may_be_the_callers():
    bars = []

    class Bar(tqdm):
        def __init__(self, **options):
            super().__init__(file=io.StringIO(), **options)
            bars.append(self)

    make_llm().generate([[1], [2]], GREEDY, use_tqdm=Bar)
    assert [(bar.n, bar.total) for bar in bars] == [(2, 2)]


# --- pipeline


def test_pipeline_answers_as_mii_does(says):
    pipe = Pipeline(says("two balls"))
    [response] = pipe(["Anna has "], max_new_tokens=64)
    assert (str(response), response.generated_text) == ("two balls", "two balls")
    assert f"{[response]}" == "[two balls]"
    [full] = pipe("Anna has ", return_full_text=True)
    assert full.generated_text == "Anna has two balls"
    assert pipe(["x"], stop="o b")[0].generated_text == "tw"


def captured(pipe, prompts, **options):
    """SamplingParams that the engine gets for a pipeline's options."""
    seen = []
    pipe.llm.engine.on_step = lambda engine: seen.extend(
        s.request.params for s in engine.live.values()
    )
    pipe(prompts, **options)
    return seen[0]


def test_pipeline_has_miis_defaults(says):
    params = captured(Pipeline(says("x")), "x")
    assert params == SamplingParams(max_tokens=None, temperature=1.0, top_p=0.9)


def test_pipeline_options_become_sampling_params(says, tokenizer):
    pipe = Pipeline(says("x"))
    params = captured(pipe, "x", do_sample=False, min_new_tokens=2, max_length=9, top_k=5,
                      ignore_eos=True, stop=["a", "b"])  # fmt: skip
    assert (params.temperature, params.min_tokens, params.top_k) == (0.0, 2, 5)
    assert params.max_tokens == 9 - len(tokenizer.encode("x"))
    assert (params.ignore_eos, params.stop) == (True, ("a", "b"))
    assert captured(pipe, "x", temperature=0.5, max_new_tokens=3, max_length=9).max_tokens == 3


def test_pipeline_refuses_what_it_cannot_load():
    with pytest.raises(ConfigError, match="'max_lenght'; did you mean 'max_length'"):
        pipeline(max_lenght=5)
    with pytest.raises(ConfigError, match="quantization_mode='wf6af16' is not supported"):
        pipeline(quantization_mode="wf6af16")


def test_pipeline_refuses_what_it_does_not_know(says):
    pipe = Pipeline(says("x"))
    with pytest.raises(
        ConfigError, match="unknown option 'max_new_token'; did you mean 'max_new_tokens'"
    ):
        pipe("x", max_new_token=3)
    with pytest.raises(InvalidRequest, match="prompt 1: max_length=4 must exceed the prompt's"):
        pipe(["x", "longer prompt"], max_length=4)
    pipe.destroy()
    with pytest.raises(EngineStopped):
        pipe("x")


# --- names


def test_unknown_option_names_the_nearest():
    with pytest.raises(
        ConfigError, match="unknown option 'max_model_length'; did you mean 'max_model_len'"
    ):
        LLM("some-model", max_model_length=5)


def test_public_names_exist():
    for name in fastgen_jax.__all__:
        assert getattr(fastgen_jax, name).__name__.split(".")[-1] == name
    assert set(fastgen_jax.__all__) <= set(dir(fastgen_jax))
    with pytest.raises(AttributeError, match="has no attribute 'Engin'"):
        _ = fastgen_jax.Engin


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import fastgen_jax", "jax transformers tokenizers numpy tqdm"),
        (
            "from fastgen_jax import LLM, SamplingParams, mii, pipeline",
            "jax transformers tokenizers tqdm httpx2",
        ),
        ("from fastgen_jax.tokenizer import Tokenizer", "jax transformers tokenizers"),
    ],
)
def test_import_loads_nothing_heavy(code, absent):
    check = f"{code}; import sys; print([m for m in {absent.split()} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


# --- the real engine


def test_model_without_tokenizer_files_generates_from_ids(tmp_path):
    few_programs = {"max_num_batched_tokens": 8, "max_num_seqs": 2}
    with LLM(tiny.write_config(tmp_path), **tiny.OPTIONS | few_programs) as llm:
        params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
        together = llm.generate([[i, i + 1] for i in range(12)], params, use_tqdm=False)
        alone = llm.generate([11, 12], params, use_tqdm=False)
    assert llm.tokenizer is None
    assert token_ids(together)[11:] == token_ids(alone)
