"""JSON within bounds: what one body may hold in depth, in number and in names.

orjson builds a body in one go, and no other thread runs meanwhile; then others walk it, some of
them by recursion. Hence the bounds here, before and right after.
"""

import re
from typing import Any

import orjson

from fastgen_jax.server.errors import invalid

MAX_DEPTH = 64
MAX_CONTAINERS = 100_000  # lists and objects; orjson makes as many in 15 ms
MAX_FIELDS = 1000  # of the body itself
# One that is never closed ends with the body: so every match is of use, and all take linear time.
STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)


def load(body: bytes | bytearray) -> dict[str, Any]:
    """The object that `body` holds.

    Raises:
        ApiError: it is malformed (NaN and bad UTF-8 included), no object, or beyond the bounds.
    """
    n_brackets = _n_brackets(body)  # at least as many as containers: strings may hold some
    if n_brackets > MAX_CONTAINERS and (n := _n_brackets(STRING.sub(b"", body))) > MAX_CONTAINERS:
        raise invalid(f"the body holds {n} lists and objects; at most {MAX_CONTAINERS}")
    try:
        values = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise invalid(f"the body is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise invalid("the body must be a JSON object")
    if len(values) > MAX_FIELDS:
        raise invalid(f"the body has {len(values)} fields; at most {MAX_FIELDS}")
    if n_brackets > MAX_DEPTH and _is_deeper(values, MAX_DEPTH):
        raise invalid(f"the body is nested too deeply; at most {MAX_DEPTH} levels")
    return values


def _n_brackets(body: bytes | bytearray) -> int:
    return body.count(b"[") + body.count(b"{")


def _is_deeper(value: dict[str, Any], max_depth: int) -> bool:
    """Whether containers are nested beyond max_depth levels; walks them level by level."""
    level: list[Any] = [value]
    for _ in range(max_depth):
        children = (c for box in level for c in (box.values() if isinstance(box, dict) else box))
        level = [child for child in children if isinstance(child, list | dict)]
    return bool(level)
