"""The demo's tokenizer: lossless on any text, in step with the pieces of the corpus."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from fastgen_jax.demo import corpus, people, vocabulary
from fastgen_jax.demo.batches import Stage, encode, sample_batch, sample_text

CHECKPOINT = Path(vocabulary.__file__).parent / "checkpoint"
TOKENIZER = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
STAGE = Stage(
    n_steps=1, n_rows=4, length=512, max_facts=5, max_story=300, recall=0.8, begun=0.2
)  # fmt: skip


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


@given(st.text())
def test_any_text_decodes_back_to_itself(text):
    assert TOKENIZER.decode(ids(text), skip_special_tokens=False) == text


def test_every_digit_is_a_token():
    assert len(ids("7312")) == 4
    assert len(ids(" 7312")) == 5


def test_names_are_one_or_two_tokens_with_few_exceptions():
    counts = [len(ids(f" {person.name}")) for person in people.HELD_OUT_PEOPLE]
    assert sum(n == 2 for n in counts) > 0.9 * len(counts)
    assert max(len(ids(f" {name}")) for name in people.CLASSIC_GIRLS + people.CLASSIC_BOYS) == 1


def test_texts_encode_piece_by_piece_as_they_do_whole():
    rng = random.Random(5)
    for _ in range(100):
        pieces = sample_text(rng, STAGE)
        assert encode(TOKENIZER, pieces)[0] == ids("".join(piece.text for piece in pieces))


def test_an_example_has_as_many_tokens_as_asked_for():
    rng = random.Random(5)
    for _ in range(5):
        example = corpus.recall_example(rng, 1500, rng.random(), chat=False)
        assert len(ids(example.text)) == pytest.approx(1500 + 4 * 12 + 15, rel=0.05)


def test_rows_of_a_batch_hold_whole_texts():
    batch = sample_batch(TOKENIZER, random.Random(5), STAGE)
    n_texts = 0
    for tokens, positions, segments in zip(*batch[:3], strict=True):
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            assert tokens[inside][0] == vocabulary.BOS_ID
            assert tokens[inside][-1] in (vocabulary.EOS_ID, vocabulary.END_ID)
            assert list(positions[inside]) == list(range(inside.sum()))
            n_texts += 1
    assert n_texts >= 4
