"""Where an answer ends: the token that a chat template writes behind one."""

from collections.abc import Callable, Mapping
from typing import Any

ANSWER = "probe_answer"
PROBE = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}]


def end_of_turn(
    render: Callable[[list[dict[str, Any]]], str | None], tokens: Mapping[str, int]
) -> int | None:
    """The token right behind the last answer of a conversation; None where the template writes none
    there, as that of GLM 4, or refuses the conversation.

    Behind earlier answers there may be another one, which does not end them all: gpt-oss's <|end|>,
    where <|return|> is behind the last, also parts its thoughts from its answer.

    Args:
        render: the text of messages, without the beginning of another turn; None: refused.
        tokens: ids of what may be such a token.
    """
    _, _, behind = (render(PROBE) or "").rpartition(ANSWER)
    behind = behind.lstrip()
    found = [text for text in tokens if text.strip() and behind.startswith(text)]
    return tokens[max(found, key=len)] if found else None
