"""Ticket: what is known of a request before a replica has read it, enough to place it.

INVARIANT: reading never fails. A body that is no request, or a hostile one, gets a ticket like any
other; the replica that it goes to says what is wrong with it.
"""

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import orjson

BYTES_PER_TOKEN = 4  # of English, about
DEFAULT_TOKENS = 256  # of an answer whose request sets no limit
MAX_TOKENS = 1 << 20  # believed of one request
FIRST_PREFIX = 256  # bytes; each further prefix is twice as long
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


@dataclass
class Ticket:
    """One request on its way.

    Args:
        cost: tokens that it may take, prompts and answers, estimated; at least 1.
        prefixes: hashes of its prompt's first bytes, shortest first; the i-th covers
            `prefix_bytes(i)`.
        tried: replicas that it was sent to; the router's notes.
    """

    cost: int = 1
    prefixes: tuple[bytes, ...] = ()
    tried: list[str] = field(default_factory=list)


def prefix_bytes(index: int) -> int:
    return FIRST_PREFIX << index


def read_ticket(body: bytes) -> Ticket:
    """The ticket of a request with this body; an empty one costs least."""
    if not body:
        return Ticket()
    try:
        fields = orjson.loads(body)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        return Ticket(cost=1 + len(body) // BYTES_PER_TOKEN)
    prompt = fields.get("messages") or fields.get("prompt") or fields.get("input")
    text = orjson.dumps([fields.get("tools"), prompt])
    n_samples = _count(fields.get("n"), 1) * _n_prompts(fields.get("prompt"))
    n_output = next((_count(fields[name], 0) for name in LIMITS if fields.get(name)), None)
    n_output = DEFAULT_TOKENS if n_output is None else n_output
    cost = 1 + len(text) // BYTES_PER_TOKEN + n_samples * n_output
    return Ticket(cost=min(cost, MAX_TOKENS), prefixes=_prefixes(text))


def _n_prompts(prompt: Any) -> int:
    is_many = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    return len(prompt) if is_many else 1


def _count(value: Any, default: int) -> int:
    is_count = isinstance(value, int) and 0 < value < MAX_TOKENS
    return value if is_count else default


def _prefixes(text: bytes) -> tuple[bytes, ...]:
    digest, start, found = blake2b(digest_size=16), 0, []
    while (end := prefix_bytes(len(found))) <= len(text):
        digest.update(text[start:end])
        found.append(digest.copy().digest())
        start = end
    return tuple(found)
