"""What is asked: conversations of one turn or more, drawn from a seed before the run begins.

INVARIANT: the same arguments make the same conversations; every length is at least one token.
Lengths and names of the sets are those of vLLM's and DeepSpeed-FastGen's benchmarks.
"""

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from fastgen_jax.demo.corpus import story

Prompt = str | list[int]


class Turn(NamedTuple):
    """What is added to the conversation, and how much may be answered.

    Args:
        n_prompt: tokens of `prompt`, as the tokenizer here counts them.
    """

    prompt: Prompt
    n_prompt: int
    n_output: int


Conversation = list[Turn]


class Tokens(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class Lengths(NamedTuple):
    """Normal around the mean, as FastGen's, or uniform, as vLLM's random set.

    Args:
        spread: of the mean: the standard deviation, or half of the range.
    """

    mean: int
    spread: float = 0.0
    limit: int = 10**9
    is_normal: bool = True

    def draw(self, rng: np.random.Generator, n: int) -> list[int]:
        if self.is_normal:
            drawn = rng.normal(self.mean, self.spread * self.mean, n)
        else:
            low, high = self.mean * (1 - self.spread), self.mean * (1 + self.spread)
            drawn = rng.integers(int(low), int(high) + 1, n)
        return [min(max(int(length), 1), self.limit) for length in drawn]


class Writer:
    """Makes prompts of given lengths, as text or as token ids."""

    def __init__(self, tokens: Tokens, *, as_ids: bool):
        self.tokens = tokens
        self.as_ids = as_ids

    def __call__(self, ids: list[int], n_output: int) -> Turn:
        return Turn(ids if self.as_ids else self.tokens.decode(ids), len(ids), n_output)

    def text(self, text: str, n_output: int) -> Turn:
        ids = self.tokens.encode(text, add_special_tokens=False)
        return Turn(ids if self.as_ids else text, len(ids), n_output)


def read_ids(tokens: Tokens, n: int, path: Path | None, seed: int) -> list[int]:
    """At least so many ids of a text: the file's, again and again, or stories'."""
    draw, ids = random.Random(seed), []
    if path is not None:
        ids = tokens.encode(path.read_text(), add_special_tokens=False)
        if not ids:
            raise ValueError(f"{path} has no text")
        start = draw.randrange(len(ids))
        return (ids[start:] + ids[:start]) * -(-n // len(ids))
    while len(ids) < n:
        text = " ".join(" ".join(story(draw)) for _ in range(100))
        ids += tokens.encode(text, add_special_tokens=False)
    return ids


def shifted_text(
    write: Writer, n: int, prompts: Lengths, outputs: Lengths, *, seed: int, path: Path | None
) -> list[Conversation]:
    """FastGen's: prompt i is the text from its token i on, so that blocks are hardly shared. A
    file's text begins at a random place.
    """
    rng = np.random.default_rng(seed)
    lengths = prompts.draw(rng, n)
    n_outputs = outputs.draw(rng, n)
    ids = read_ids(write.tokens, n + max(lengths), path, seed)
    return [[write(ids[i : i + lengths[i]], n_outputs[i])] for i in range(n)]


def random_ids(
    write: Writer,
    n: int,
    prompts: Lengths,
    outputs: Lengths,
    *,
    ids: Sequence[int],
    seed: int,
    n_prefix: int = 0,
    n_turns: int = 1,
) -> list[Conversation]:
    """vLLM's random set: ids of the vocabulary, after a prefix that all share; with more turns,
    each adds as much to the conversation.
    """
    rng = np.random.default_rng(seed)
    vocabulary = np.array(ids)
    prefix = rng.choice(vocabulary, n_prefix).tolist()
    made = []
    for _ in range(n):
        lengths, n_outputs = prompts.draw(rng, n_turns), outputs.draw(rng, n_turns)
        parts = [rng.choice(vocabulary, length).tolist() for length in lengths]
        parts[0] = prefix + parts[0]
        made.append([write(*turn) for turn in zip(parts, n_outputs, strict=True)])
    return made


def repeated_prefixes(
    write: Writer,
    n: int,
    *,
    n_prefixes: int,
    n_prefix: int,
    n_suffix: int,
    n_output: int,
    ids: Sequence[int],
    seed: int,
) -> list[Conversation]:
    """vLLM's prefix_repetition: prompts that begin with one of a few prefixes, in random order."""
    rng = np.random.default_rng(seed)
    vocabulary = np.array(ids)
    prefixes = [rng.choice(vocabulary, n_prefix).tolist() for _ in range(n_prefixes)]
    turns = [
        write(prefixes[i % n_prefixes] + rng.choice(vocabulary, n_suffix).tolist(), n_output)
        for i in range(n)
    ]
    return [[turns[i]] for i in rng.permutation(n)]


def sharegpt(
    write: Writer, n: int, path: Path, *, n_turns: int, n_output: int | None, seed: int
) -> list[Conversation]:
    """Conversations of a ShareGPT file, in random order and again if there are too few: what people
    said, and for each the length of what they were answered, or n_output.

    Raises:
        ValueError: the file is no such one, or has no conversation of a question and an answer.
    """
    found = [list(itertools.islice(_exchanges(entry), n_turns)) for entry in _entries(path)]
    found = [exchanges for exchanges in found if exchanges]
    if not found:
        raise ValueError(f"{path} has no conversation in which somebody asks and is answered")
    random.Random(seed).shuffle(found)
    return [
        [
            write.text(question, n_output or max(write.text(answer, 0).n_prompt, 1))
            for question, answer in exchanges
        ]
        for exchanges in itertools.islice(itertools.cycle(found), n)
    ]


def _entries(path: Path) -> list[dict]:
    entries = json.loads(path.read_text())
    if not isinstance(entries, list):
        raise ValueError(f"{path} is no list of conversations, as ShareGPT's files are")
    return entries


def _exchanges(entry: dict) -> Iterator[tuple[str, str]]:
    """Questions with the answers right after them."""
    said = entry.get("conversations") or entry.get("conversation") or []
    for first, second in itertools.pairwise(said):
        is_pair = (first.get("from"), second.get("from")) in (
            ("human", "gpt"),
            ("user", "assistant"),
        )
        if is_pair and first.get("value") and second.get("value"):
            yield first["value"], second["value"]
