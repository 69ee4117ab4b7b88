"""The channels of gpt-oss: each message says in its head where it goes.

<|channel|>analysis is a thought, final is text, commentary to=functions.name is a call, and without
a recipient text. https://github.com/openai/harmony describes the format.
"""

import json
import re
from collections.abc import Sequence

from fastgen_jax.dialects.dialect import Dialect, Literal, Tool, alternatives, arguments_of
from fastgen_jax.dialects.events import Text, Thought
from fastgen_jax.dialects.json_text import value
from fastgen_jax.dialects.tape import Malformed, Tape, Wait

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
END, CALL, RETURN, CONSTRAIN = "<|end|>", "<|call|>", "<|return|>", "<|constrain|>"
TAGS = (START, CHANNEL, MESSAGE, END, CALL, RETURN, CONSTRAIN)
ENDS = (END, CALL, RETURN)
RECIPIENT = re.compile(r"\bto=functions\.([^\s<]+)")
IS_THOUGHT = re.compile(r"<\|channel\|>\s*analysis|\bto=").search


def read(tape: Tape, tools: Sequence[Tool]) -> Wait:
    """Reads an answer; the prompt ends with <|start|>assistant."""
    tag = yield from tape.begin(CHANNEL, START, "to=")
    while tag or (tag := (yield from tape.until(CHANNEL, START))):
        try:
            yield from _read_message(tape, tag)
        except Malformed:
            tape.give_up()
        tag = None


def _read_message(tape: Tape, tag: str) -> Wait:
    pieces = [tag]
    if not (yield from tape.copy_until((MESSAGE,), pieces.append)):
        raise Malformed
    head = "".join(pieces)
    if call := RECIPIENT.search(head):
        yield from tape.skip_spaces()
        if (yield from tape.peek()) != "{":
            raise Malformed
        tape.start_call(call[1])
        yield from value(tape, tape.write_arguments)
        yield from tape.skip_spaces()
        yield from tape.read(*ENDS)
        tape.end_call()
    else:
        tape.drop()
        yield from tape.until(*ENDS, kind=Thought if IS_THOUGHT(head) else Text)
        tape.drop()


def write(tools: Sequence[Tool], parallel: bool, literal: Literal) -> str:
    """The format ends an answer at its first call."""
    calls = (
        f"{literal(CHANNEL)} {json.dumps(f'commentary to=functions.{tool.name} ')} "
        f'{literal(CONSTRAIN)} "json" {literal(MESSAGE)} {arguments_of(tool)}'
        for tool in tools
    )
    return alternatives("calls", calls)


GPT_OSS = Dialect(name="gpt_oss", markers=TAGS, read=read, write=write)
