"""Which dialect a chat template teaches its model, told from the template's text."""

from fastgen_jax.dialects.dialect import Dialect
from fastgen_jax.dialects.hermes import HERMES
from fastgen_jax.dialects.thinking import Thinking

DEEPSEEK_R1 = Thinking(name="deepseek_r1", openings=("<think>",), closings=("</think>",))
QWEN3 = Thinking(name="qwen3", openings=("<think>",), closings=("</think>",))

# By vLLM's names for --tool-call-parser and --reasoning-parser.
DIALECTS: dict[str, Dialect] = {"hermes": HERMES, "qwen": HERMES}
THINKING: dict[str, Thinking] = {"deepseek_r1": DEEPSEEK_R1, "qwen3": QWEN3}


def detect(chat_template: str) -> tuple[Dialect | None, Thinking | None]:
    """The dialect and the thoughts that the template's constructs tell of; None: nothing does."""
    dialect = HERMES if "<tool_call>" in chat_template else None
    thinking = QWEN3 if "<think>" in chat_template else None
    return dialect, thinking
