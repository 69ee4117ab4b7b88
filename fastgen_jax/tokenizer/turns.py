"""Where an answer ends: the token that a chat template writes behind one."""

from collections.abc import Callable, Mapping
from typing import Any

THOUGHT, ANSWER = "probe_thought", "probe_answer"
QUESTION = {"role": "user", "content": "?"}
PLAIN = {"role": "assistant", "content": ANSWER}


def end_of_turn(
    render: Callable[[list[dict[str, Any]]], str | None], tokens: Mapping[str, int]
) -> int | None:
    """The first token behind the last answer of a conversation; None where the template writes none
    there, as that of GLM 4, or refuses the conversation.

    Behind earlier answers there may be another one, which does not end them all: gpt-oss's <|end|>,
    where <|return|> is behind the last, also parts its thoughts from its answer. Kimi K3 does so
    with its <|close|>; what is between a thought and an answer is no end.

    Args:
        render: the text of messages, without the beginning of another turn; None: refused.
        tokens: ids of what may be such a token.
    """
    text = render([QUESTION, PLAIN | {"reasoning_content": THOUGHT}]) or render([QUESTION, PLAIN])
    before, answer, behind = (text or "").rpartition(ANSWER)
    _, thought, between = before.rpartition(THOUGHT)
    found = [
        (behind.find(token), -len(token), id)
        for token, id in tokens.items()
        if token.strip() and token in behind and not (thought and token in between)
    ]
    return min(found)[-1] if answer and found else None
