"""How the served model speaks: how it writes calls of tools, and its thoughts."""

import functools
import json
import logging
from dataclasses import dataclass

from fastgen_jax.dialects import DIALECTS, THINKING, Dialect, Thinking, detect, make_reader
from fastgen_jax.sampling_params import StructuredOutputsParams
from fastgen_jax.server.config import ServerConfig
from fastgen_jax.server.errors import invalid
from fastgen_jax.server.generation import PLAIN, Voice
from fastgen_jax.server.structure import Structure, conflict, lark_of
from fastgen_jax.server.tools import Tools
from fastgen_jax.tokenizer import Tokenizer

log = logging.getLogger("fastgen_jax.server")

N_LAST = 16  # tokens of a prompt that show whether it ends inside of a thought


@dataclass(frozen=True)
class Speech:
    """What the chat template teaches the model, unless the operator says otherwise.

    lists_tools: the template shows the model the tools that a request offers. may_choose: the model
    may call them unforced.
    """

    tokenizer: Tokenizer
    dialect: Dialect
    thinking: Thinking | None
    lists_tools: bool
    may_choose: bool

    def voice(self, tools: Tools, prompt: list[int]) -> Voice:
        """How the answers after this prompt are read."""
        dialect = self.dialect if tools.offered else None
        if dialect is None and self.thinking is None:
            return PLAIN
        markers = {marker for each in (dialect, self.thinking) if each for marker in each.markers}
        shown_ids = {id for m in markers if (id := self.tokenizer.special_id(m)) is not None}
        make = functools.partial(
            make_reader,
            dialect,
            self.thinking,
            tools=tools.offered,
            is_thinking=self.is_thinking(prompt),
        )
        max_calls = None if tools.is_parallel else 1
        return Voice(make, frozenset(shown_ids), max_calls, tells_text=not tools.must_call)

    def usable(self, tools: Tools) -> Tools:
        """The tools that a request offers, unless the model may not choose or would not see them;
        then a request that forces no call goes on without.
        """
        if tools.must_call or not tools.offered or (self.may_choose and self.lists_tools):
            return tools
        if self.may_choose:
            _warn_of_unseen_tools()
        return Tools()

    def form(
        self, structure: Structure, tools: Tools, prompt: list[int]
    ) -> StructuredOutputsParams | None:
        """The form that the whole output must have: thoughts, where the model has some, and then
        calls that must be, or what the body asked for, or calls instead of it. A grammar of the
        body's own applies from the first token.

        Raises:
            ApiError: it asks for calls and for another form.
        """
        params = structure.params
        if tools.must_call:
            if structure.field:
                raise conflict(["tool_choice", structure.field])
            return self._grammar(prompt, {"calls": self._calls(tools)})
        if params is None or not (tools.offered or self.thinking):
            return params
        text = lark_of(params)
        if text is None and tools.offered:
            advice = "with tools it may only be JSON, a regex or a choice"
            raise invalid(f"{structure.field} is a grammar; {advice}", structure.field)
        if text is None:
            return params
        rules = {"form": f"form: {text}"}
        has_head = self.thinking and self.thinking.head  # which calls do not have
        if tools.offered and not has_head:
            rules["calls"] = self._calls(tools)
        return self._grammar(prompt, rules)

    def _calls(self, tools: Tools) -> str:
        named = [tool for tool in tools.offered if tools.named in (None, tool.name)]
        return self.dialect.write(named, tools.is_parallel, self._literal)

    def _grammar(self, prompt: list[int], rules: dict[str, str]) -> StructuredOutputsParams:
        """Thoughts, and then what any of the rules allows."""
        first = "%llguidance {}\nstart: @answer\n"
        if self.thinking is not None:
            first = self.thinking.grammar(
                is_open=self.is_thinking(prompt), is_call="form" not in rules, literal=self._literal
            )
        lines = [first.replace("@answer", "answer"), f"answer: {' | '.join(rules)}"]
        return StructuredOutputsParams(grammar="\n".join([*lines, *rules.values()]))

    def is_thinking(self, prompt: list[int]) -> bool:
        """Whether the prompt has begun a thought, which the answer goes on with."""
        if self.thinking is None:
            return False
        end = self.tokenizer.decode(prompt[-N_LAST:], skip_special_tokens=False)
        return self.thinking.is_opened_by(end)

    def _literal(self, marker: str) -> str:
        """The marker in a grammar: the special token that it is, or its text."""
        id = self.tokenizer.special_id(marker)
        return json.dumps(marker) if id is None else f"<[{id}]>"


@functools.cache
def _warn_of_unseen_tools():
    log.warning(
        "requests offer tools, which the chat template does not show to the model: they are "
        "ignored unless tool_choice forces a call; another --chat-template may show them"
    )


def speech_of(tokenizer: Tokenizer, config: ServerConfig) -> Speech:
    """How the model of this tokenizer speaks.

    Without a sign of another one, calls are written as Hermes does: so do most models that were
    taught it by a template of their own words, and a grammar can make any model do so.
    """
    template = tokenizer.chat_template
    dialect, thinking = detect(template)
    if config.tool_call_parser is not None:
        dialect = DIALECTS[config.tool_call_parser]
    if config.reasoning_parser is not None:
        thinking = THINKING[config.reasoning_parser]
    return Speech(
        tokenizer,
        dialect or DIALECTS["hermes"],
        thinking,
        lists_tools="tools" in template,
        may_choose=config.enable_auto_tool_choice,
    )
