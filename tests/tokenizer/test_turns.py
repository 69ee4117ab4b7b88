"""A chat ends where its template says, whatever config.json calls the end."""

import pytest

from fastgen_jax.engine.batch import MAX_EOS
from fastgen_jax.engine.requests import known_eos
from fastgen_jax.errors import ConfigError
from fastgen_jax.llm import LLM
from fastgen_jax.sampling_params import SamplingParams
from fastgen_jax.tokenizer import Tokenizer
from tests import tiny, tiny_tokenizers
from tests.server.fake_engine import FakeEngine
from tests.server.running import CHAT, serving

END = "<|im_end|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# How templates of the hub write an answer, and what comes behind it.
EOS_TOKEN = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]" \
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"  # fmt: skip
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "{% if loop.last and m.role == 'assistant' %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
)
GLM4 = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
THINKING = CHATML.replace("m.content", "m.content.split('</think>')[-1].lstrip()")
ALTERNATING = "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}" + CHATML
ALWAYS_OPENING = CHATML.replace("{% if add_generation_prompt %}", "{% if true %}")
REFUSING = "{{ raise_exception('one turn only') if messages[1] }}<|im_end|>"
KIMI_K3 = (
    "{% for m in messages %}{% if m.reasoning_content %}<|open|>think<|sep|>{{ m.reasoning_content "
    "}}<|close|>think<|sep|>{% endif %}<|open|>response<|sep|>{{ m.content }}<|close|>response"
    "<|sep|><|end_of_msg|>{% endfor %}"
)
STRICT = "{% for m in messages if m.reasoning_content %}{{ raise_exception('no') }}{% endfor %}"
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
ENDS = {
    "chatml": (CHATML, "<|im_end|>"),
    "eos_token": (EOS_TOKEN, "</s>"),
    "llama3": (CHATML.replace("<|im_end|>\n", "<|eot_id|>"), "<|eot_id|>"),
    "gemma": (CHATML.replace("<|im_end|>", "<end_of_turn>"), "<end_of_turn>"),
    "phi3": (PHI3, "<|end|>"),
    "harmony": (HARMONY, "<|return|>"),
    "glm4": (GLM4, None),
    "thinking": (THINKING, "<|im_end|>"),
    "alternating": (ALTERNATING, "<|im_end|>"),
    "always_opening": (ALWAYS_OPENING, "<|im_end|>"),
    "kimi_k3": (KIMI_K3, "<|end_of_msg|>"),
    "strict": (STRICT + CHATML, "<|im_end|>"),
    "refusing": (REFUSING, None),
    "plain": (PLAIN, None),
    "silent": ("<|im_start|>", None),
    "bare": ("{% for m in messages if m.role != 'user' %}{{ m.content }}</s>{% endfor %}", "</s>"),
    "spaced": (CHATML.replace("<|im_end|>", " \n<|im_end|>"), "<|im_end|>"),
    "longer": (CHATML.replace("<|im_end|>", "<|im_end|>>"), "<|im_end|>>"),
}
TOKENS = sorted({end for _, end in ENDS.values() if end and end != "</s>"})
TOKENS += ["<|im_start|>", "<|open|>", "<|sep|>", "<|close|>"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> str:
    path = tiny_tokenizers.byte_level(tmp_path_factory.mktemp("turns"), CHATML)
    return tiny_tokenizers.with_tokens(path, *TOKENS)


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> LLM:
    """A model whose config.json knows no other end than 7, with a chat template merged in."""
    path = tiny_tokenizers.byte_level(tmp_path_factory.mktemp("merged"), CHATML)
    tiny_tokenizers.with_tokens(path, "<|im_start|>", END)
    tiny.write_config(tmp_path_factory.getbasetemp() / path, vocab_size=400)
    with LLM(path, **tiny.OPTIONS) as llm:
        yield llm


def id_of(tokenizer: Tokenizer, text: str) -> int:
    [id] = tokenizer.encode(text, add_special_tokens=False)
    return id


def insisting(llm: LLM, text: str, **params) -> SamplingParams:
    """With which the model says this token again and again."""
    bias = {id_of(llm.tokenizer, text): 100.0}
    return SamplingParams(**{"max_tokens": 5, "temperature": 0.0, "logit_bias": bias} | params)


def said(outputs) -> tuple:
    [sample] = outputs[0].outputs
    return len(sample.token_ids), sample.finish_reason, sample.stop_reason, sample.text


@pytest.mark.parametrize(("template", "end"), ENDS.values(), ids=ENDS)
def test_what_stands_behind_an_answer_ends_it(directory, template, end):
    tokenizer = Tokenizer(directory).with_template(template)
    ends = {
        tokenizer.eos_token_id,
        tokenizer.eos_token_id if end is None else id_of(tokenizer, end),
    }
    assert tokenizer.eos_token_ids == ends


def test_an_end_that_is_no_special_token_counts(tmp_path):
    for kind in tiny_tokenizers.KINDS:
        path = tiny_tokenizers.KINDS[kind](tmp_path / kind, CHATML)
        tokenizer = Tokenizer(tiny_tokenizers.with_tokens(path, END, special=False))
        assert tokenizer.eos_token_ids == {EOS_IDS[kind], tokenizer._backend.token_to_id(END)}


EOS_IDS = {"byte_level": 1, "sentencepiece": 2, "metaspace": 2}


def test_without_a_template_the_tokenizers_eos_ends(tmp_path):
    tokenizer = Tokenizer(tiny_tokenizers.byte_level(tmp_path, None))
    assert tokenizer.eos_token_ids == {tokenizer.eos_token_id}


def test_another_template_ends_elsewhere(directory):
    tokenizer = Tokenizer(directory)
    assert tokenizer.eos_token_ids != tokenizer.with_template(GLM4).eos_token_ids


@pytest.mark.parametrize("end", ["</s>", END])
def test_a_chat_of_a_real_engine_ends_at_either(llm, end):
    assert said(llm.chat(CHAT, insisting(llm, end))) == (1, "stop", None, "")
    assert said(llm.generate("a", insisting(llm, end))) == (1, "stop", None, "")
    assert {7} < llm.engine.eos_token_ids


def test_ends_of_chats_are_ignored_and_put_off_as_eos_is(llm):
    assert said(llm.chat(CHAT, insisting(llm, END, ignore_eos=True)))[:2] == (5, "length")
    late = said(llm.chat(CHAT, insisting(llm, END, min_tokens=3)))
    assert late[:3] == (4, "stop", None)
    shown = insisting(llm, END, include_stop_str_in_output=True, skip_special_tokens=False)
    assert said(llm.chat(CHAT, shown)) == (1, "stop", None, END)


def test_a_form_may_end_where_a_chat_does(llm):
    params = insisting(llm, END, structured_outputs={"choice": ["one"]})
    assert said(llm.chat(CHAT, params))[3] == "one"


def test_ends_that_the_model_lacks_are_left_out(llm):
    before = llm.engine.eos_token_ids
    llm.engine.end_at([-1, 400, *before])
    assert llm.engine.eos_token_ids == before


def test_more_ends_than_a_batch_holds_are_refused():
    assert known_eos(range(MAX_EOS), 400) == {*range(MAX_EOS)}
    with pytest.raises(ConfigError, match="17 tokens end a sequence, and 16 may; name fewer"):
        known_eos(range(MAX_EOS + 1), 400)


def test_the_server_ends_an_answer_there(tmp_path):
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<tool>{% endfor %}"
    tokenizer = Tokenizer(tiny_tokenizers.byte_level(tmp_path, template))
    answer = tokenizer.encode("one<tool>two", add_special_tokens=False)
    with serving(tokenizer, FakeEngine(tokenizer.eos_token_id, says=[answer])) as up:
        [choice] = up.post("/v1/chat/completions", {"messages": CHAT}).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("one", "stop")
