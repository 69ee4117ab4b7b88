"""The forms in which callers of the library give prompts: texts, token ids, vLLM's dicts."""

from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any, NotRequired, TypedDict

import numpy as np

from fastgen_jax.errors import InvalidRequest


class TextPrompt(TypedDict):
    """vLLM's dict of a text."""

    prompt: str


class TokensPrompt(TypedDict):
    """vLLM's dict of token ids, perhaps with the text that they were."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str | None]


Prompt = str | Iterable[int] | TextPrompt | TokensPrompt


def prompt_list(prompts: Any) -> list[Any]:
    """One prompt is a list of one."""
    listed = _as_list(prompts)
    if not isinstance(listed, list):
        return [prompts]
    is_one = bool(listed) and all(isinstance(item, int | np.integer) for item in listed)
    return [listed] if is_one else listed


def text_and_ids(prompt: Any) -> tuple[str | None, list[int] | None]:
    """Text and token ids of a prompt, which has one of them or, if it is a dict, perhaps both."""
    if isinstance(prompt, str):
        return prompt, None
    text, ids = None, _as_list(prompt)
    if isinstance(prompt, Mapping) and prompt.keys() <= TokensPrompt.__annotations__.keys():
        text, ids = prompt.get("prompt"), _as_list(prompt.get("prompt_token_ids"))
    if isinstance(ids, list) or (isinstance(text, str) and ids is None):
        return text, ids
    raise InvalidRequest(
        f"a prompt is a text or a list of token ids, not {prompt!r:.80}; a dict may hold them as "
        "'prompt' and 'prompt_token_ids', and nothing else"
    )


def positions_of(given: Any, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    """Of each prompt the positions that are meant, counted from its start.

    Raises:
        InvalidRequest: they are no lists of integers, or not as many as there are prompts.
    """
    if given is None:
        return [tuple(range(len(ids))) for ids in prompts]
    listed = _as_list(given)
    if not isinstance(listed, list):
        raise InvalidRequest(f"positions are lists of integers, not {given!r:.80}")
    is_for_all = all(isinstance(item, int | np.integer) for item in listed)
    each = [listed] * len(prompts) if is_for_all else [_as_list(item) for item in listed]
    if len(each) != len(prompts):
        raise InvalidRequest(f"{len(each)} lists of positions for {len(prompts)} prompts")
    return [
        at_prompt(i, _positions, *pair) for i, pair in enumerate(zip(each, prompts, strict=True))
    ]


def _positions(given: Any, prompt: list[int]) -> tuple[int, ...]:
    n = len(prompt)
    if not isinstance(given, list) or not all(isinstance(p, int | np.integer) for p in given):
        raise InvalidRequest(f"positions are lists of integers, not {given!r:.80}")
    for position in given:
        if not -n <= position < n:
            raise InvalidRequest(f"there is no position {position} in a prompt of {n} tokens")
    return tuple(int(position) % n for position in given)


def _as_list(value: Any) -> Any:
    """Arrays, of numpy or jax, as lists of plain ints; other iterables of items as lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    is_items = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping | Set)
    return list(value) if is_items else value


def at_prompt(index: int, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Calls, naming the prompt's index in what is raised."""
    try:
        return function(*args, **kwargs)
    except InvalidRequest as error:
        raise type(error)(f"prompt {index}: {error}", param=error.param) from error
