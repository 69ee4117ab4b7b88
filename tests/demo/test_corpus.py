"""The text that the demo model is trained on and tested with."""

import random
import re
import subprocess
import sys

import pytest

from fastgen_jax.demo import corpus, people
from fastgen_jax.demo.corpus import FIRST, LATER, SILENT
from fastgen_jax.demo.evaluate import check_counts
from fastgen_jax.demo.people import HELD_OUT_NAMES

FACT = re.compile(r"The code of (\w+) is (\d{4})\.")


@pytest.fixture
def rng():
    return random.Random(7)


def training_text(rng: random.Random, n_story_tokens: int = 150) -> list[corpus.Piece]:
    return corpus.recall_text(
        rng, n_story_tokens=n_story_tokens, n_facts=5, n_questions=3, begun=0.2
    )


def answers(pieces: list[corpus.Piece]) -> list[str]:
    """The digits that a text wants predicted, one string per answer."""
    heard = "".join(piece.text if piece.kind in (FIRST, LATER) else " " for piece in pieces)
    return re.findall(r"\d+", heard)


def texts(rng: random.Random, n: int) -> list[str]:
    kinds = (training_text, corpus.story_text, corpus.small_talk_text)
    made = [kinds[i % 3](rng) for i in range(n)]
    made += [corpus.long_chat_text(rng, 300) for _ in range(n // 10)]
    return ["".join(piece.text for piece in pieces) for pieces in made]


def test_the_same_seed_makes_the_same_text():
    assert texts(random.Random(1), 9) == texts(random.Random(1), 9)


def test_training_never_shows_a_held_out_name_or_code(rng):
    words = {word for text in texts(rng, 600) for word in re.findall(r"\w+", text)}
    assert not words & HELD_OUT_NAMES
    assert not [w for w in words if w.isdigit() and corpus.is_held_out_code(int(w))]


def test_held_out_examples_show_nothing_else(rng):
    for i in range(40):
        example = corpus.recall_example(rng, 120, rng.random(), chat=False, held_out=True)
        facts = dict(FACT.findall(example.text))
        assert len(facts) == 4, i
        assert set(facts) <= HELD_OUT_NAMES
        assert all(corpus.is_held_out_code(int(code)) for code in facts.values())


def test_every_syllable_of_a_held_out_name_is_trained():
    trained = {person.name for person in people.TRAINING_PEOPLE}
    ends = (people.GIRL_ENDS, people.BOY_ENDS)
    for start in people.STARTS:
        assert any(start + end in trained for kind in ends for end in kind)
    for end in ends[0] + ends[1]:
        assert any(start + end in trained for start in people.STARTS)


@pytest.mark.parametrize("chat", [False, True])
def test_the_answer_of_an_example_is_the_code_told_of_the_person_asked_for(rng, chat):
    for _ in range(40):
        example = corpus.recall_example(rng, 200, rng.random(), chat=chat)
        text = example.messages[0]["content"] if chat else example.text
        (asked,) = re.findall(r"What is the code of (\w+)\?", text)
        assert dict(FACT.findall(text))[asked] == example.answer


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_fact_stands_at_its_depth(rng, depth):
    example = corpus.recall_example(rng, 600, depth, chat=False, n_distractors=0)
    told, _, _ = example.text.rpartition("\n\nQuestion:")
    (fact,) = FACT.finditer(told)
    assert fact.start() / (len(told) - len(fact[0])) == pytest.approx(depth, abs=0.05)


def test_an_example_has_about_as_many_tokens_as_asked_for(rng):
    example = corpus.recall_example(rng, 1500, 0.5, chat=False)
    n_words_and_marks = len(re.findall(r"\w+|[^\w\s]", example.text))
    assert 1300 < n_words_and_marks < 1700


def test_training_asks_for_codes_that_were_told(rng):
    for _ in range(60):
        pieces = training_text(rng)
        told = {code for piece in pieces for _, code in FACT.findall(piece.text)}
        assert len(answers(pieces)) == 3
        assert set(answers(pieces)) < told


def test_told_codes_are_not_to_be_predicted(rng):
    for piece in training_text(rng):
        assert piece.kind == SILENT or not FACT.search(piece.text)


def test_counts_of_a_story_stay_true(rng):
    checked = [is_true for _ in range(300) for is_true in check_counts(corpus.story(rng))]
    assert len(checked) > 600
    assert all(checked)


def test_a_wrong_count_is_found():
    sentences = ["One day Tom had two red nuts.", "At the mill he found one more nut."]
    assert check_counts([*sentences, "Now Tom had three nuts."]) == [True]
    assert check_counts([*sentences, "Now Tom had four nuts."]) == [False]


def test_a_story_on_request_is_about_the_person_asked_for(rng):
    for _ in range(60):
        text = "".join(piece.text for piece in corpus.story_text(rng))
        if match := re.search(r"story about (\w+)", text):
            assert f"named {match[1]}." in text


def test_the_corpus_needs_neither_jax_nor_tokenizers():
    code = (
        "import sys, fastgen_jax.demo.corpus\n"
        "print([m for m in ('jax', 'numpy', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
