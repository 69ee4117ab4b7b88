"""Training batches: texts of the corpus, packed into rows of one length."""

import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from fastgen_jax.demo import corpus
from fastgen_jax.demo.corpus import Piece


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of training: `n_steps` batches of `n_rows` rows, `length` tokens each."""

    n_steps: int
    n_rows: int
    length: int
    max_facts: int
    max_story: int  # tokens of story among which the facts stand
    recall: float  # share of texts that ask for codes; the others are stories and small talk
    begun: float  # share of those that ask in the easiest form
    min_story: int = 0
    edges: float = 0.0  # share of facts told at the very start or end
    alike: float = 0.0  # share of people whose names are hard to tell from another's
    weights: tuple[float, ...] = (0, 1, 1, 20, 5)  # in the loss, of SILENT ... LATER


class Batch(NamedTuple):
    """All "B L". Tokens of different texts have different segments and do not see each other."""

    tokens: np.ndarray  # i32
    positions: np.ndarray  # i32, within the text
    segments: np.ndarray  # i32, 0 for padding
    kinds: np.ndarray  # i32, of each token as the thing to predict


def encode(tokenizer: Tokenizer, pieces: list[Piece]) -> tuple[list[int], list[int]]:
    """Token ids of a text and the kind of each."""
    ids, kinds = [], []
    for piece in pieces:
        piece_ids = tokenizer.encode(piece.text, add_special_tokens=False).ids
        ids += piece_ids
        kinds += [piece.kind] * len(piece_ids)
    return ids, kinds


def sample_text(rng: random.Random, stage: Stage) -> list[Piece]:
    if rng.random() >= stage.recall:
        return corpus.small_talk_text(rng) if rng.random() < 0.15 else corpus.story_text(rng)
    n_story = rng.randint(stage.min_story, stage.max_story)
    if n_story > 200 and rng.random() < 0.25:
        return corpus.long_chat_text(rng, n_story)
    n_facts = rng.randint(1, stage.max_facts)
    n_questions = rng.randint((n_facts + 1) // 2, n_facts)
    return corpus.recall_text(
        rng,
        n_story_tokens=n_story,
        n_facts=n_facts,
        n_questions=n_questions,
        begun=stage.begun,
        alike=stage.alike,
        edges=stage.edges,
    )


def sample_batch(tokenizer: Tokenizer, rng: random.Random, stage: Stage) -> Batch:
    """Rows filled with texts until the next does not fit."""
    shape = (stage.n_rows, stage.length)
    batch = Batch(*(np.zeros(shape, np.int32) for _ in Batch._fields))
    for row in range(stage.n_rows):
        start, segment = 0, 1
        while start < stage.length:
            ids, kinds = encode(tokenizer, sample_text(rng, stage))
            end = start + len(ids)
            if end > stage.length:
                if start:
                    break
                continue
            batch.tokens[row, start:end] = ids
            batch.positions[row, start:end] = np.arange(len(ids))
            batch.segments[row, start:end] = segment
            batch.kinds[row, start:end] = kinds
            start, segment = end, segment + 1
    return batch
