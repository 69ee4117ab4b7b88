"""The dialects by name, and which of them a chat template teaches its model."""

from fastgen_jax.dialects.deepseek import DEEPSEEK_V3, DEEPSEEK_V31
from fastgen_jax.dialects.dialect import Dialect
from fastgen_jax.dialects.glm45 import GLM45
from fastgen_jax.dialects.gpt_oss import GPT_OSS
from fastgen_jax.dialects.hermes import HERMES
from fastgen_jax.dialects.llama3_json import LLAMA3_JSON
from fastgen_jax.dialects.mistral import MISTRAL, MISTRAL_ARGS
from fastgen_jax.dialects.pythonic import PYTHONIC
from fastgen_jax.dialects.qwen3_coder import QWEN3_CODER
from fastgen_jax.dialects.tagged_list import GRANITE, PHI4_MINI
from fastgen_jax.dialects.thinking import Thinking


def _between(name: str, opening: str, closing: str) -> Thinking:
    return Thinking(name=name, openings=(opening,), closings=(closing,))


DEEPSEEK_R1, QWEN3 = (_between(name, "<think>", "</think>") for name in ("deepseek_r1", "qwen3"))
MAGISTRAL = _between("mistral", "[THINK]", "[/THINK]")
GRANITE_THOUGHTS = Thinking(
    name="granite",
    openings=("Here is my thought process:", "Here's my thought process:"),
    closings=("Here is my response:", "Here's my response:"),
)
CHANNELS = Thinking(
    name="openai_gptoss",
    openings=("<|channel|>analysis<|message|>",),
    closings=("<|end|><|start|>assistant",),
    head="<|channel|>final<|message|>",
    dialect=GPT_OSS,
)

# By the names that vLLM has for --tool-call-parser and --reasoning-parser, and by common others.
DIALECTS: dict[str, Dialect] = {
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v31": DEEPSEEK_V31,
    "glm45": GLM45,
    "gpt_oss": GPT_OSS,
    "granite": GRANITE,
    "granite4": HERMES,
    "hermes": HERMES,
    "llama3_json": LLAMA3_JSON,
    "llama4_json": LLAMA3_JSON,
    "llama4_pythonic": PYTHONIC,
    "mistral": MISTRAL,
    "mistral_args": MISTRAL_ARGS,
    "openai": GPT_OSS,
    "phi4_mini_json": PHI4_MINI,
    "pythonic": PYTHONIC,
    "qwen": HERMES,
    "qwen3_coder": QWEN3_CODER,
    "qwen3_xml": QWEN3_CODER,
}
THINKING: dict[str, Thinking] = {
    "deepseek_r1": DEEPSEEK_R1,
    "glm45": QWEN3,
    "gpt_oss": CHANNELS,
    "granite": GRANITE_THOUGHTS,
    "mistral": MAGISTRAL,
    "openai_gptoss": CHANNELS,
    "qwen3": QWEN3,
}

# What is in the templates that teach a dialect, all of it; the first that fits counts.
TOOL_SIGNS: tuple[tuple[tuple[str, ...], Dialect], ...] = (
    (("<|channel|>", "<|message|>"), GPT_OSS),
    (("<function=", "<parameter="), QWEN3_CODER),
    (("<arg_key>",), GLM45),
    (("<｜tool▁calls▁begin｜>", "```json"), DEEPSEEK_V3),
    (("<｜tool▁calls▁begin｜>",), DEEPSEEK_V31),
    (("[TOOL_CALLS]", "[ARGS]"), MISTRAL_ARGS),
    (("[TOOL_CALLS]",), MISTRAL),
    (("functools[",), PHI4_MINI),
    (("<|/tool|>",), PHI4_MINI),
    (("<|tool_call|>",), GRANITE),
    (("<tool_call>",), HERMES),
    (("[func_name1(",), PYTHONIC),
    (("<|python_start|>",), PYTHONIC),
    (("<|python_tag|>",), LLAMA3_JSON),
    (('"parameters": ', "<|start_header_id|>"), LLAMA3_JSON),
    (('"parameters": ', "<|header_start|>"), LLAMA3_JSON),
)
THINKING_SIGNS: tuple[tuple[tuple[str, ...], Thinking], ...] = (
    (("<|channel|>", "<|message|>"), CHANNELS),
    (("</think>", "enable_thinking"), QWEN3),
    (("</think>",), DEEPSEEK_R1),
    (("<think>",), DEEPSEEK_R1),
    (("[THINK]",), MAGISTRAL),
    (("Here is my thought process:",), GRANITE_THOUGHTS),
)


def detect(chat_template: str) -> tuple[Dialect | None, Thinking | None]:
    """The dialect and the thoughts that a template's constructs tell of; None: nothing does."""
    return _by_signs(TOOL_SIGNS, chat_template), _by_signs(THINKING_SIGNS, chat_template)


def _by_signs(table, chat_template: str):
    fitting = (found for signs, found in table if all(sign in chat_template for sign in signs))
    return next(fitting, None)
