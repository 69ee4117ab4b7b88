"""Workloads have the lengths, the sharing and the turns that they are asked for, by their seed."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.load import workloads
from benchmarks.load.workloads import Lengths, Writer


class Letters:
    """A tokenizer whose tokens are letters."""

    def encode(self, text, *, add_special_tokens=True):
        return [ord(letter) for letter in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


WRITE = Writer(Letters(), as_ids=True)
IDS = range(10, 30)


def test_normal_lengths_have_the_mean_and_the_spread():
    drawn = Lengths(2600, 0.3, 4000).draw(np.random.default_rng(0), 4000)
    assert np.mean(drawn) == pytest.approx(2580, rel=0.02)  # 4000 cuts a few
    assert np.std(drawn) == pytest.approx(740, rel=0.05)
    assert max(drawn) == 4000
    assert min(Lengths(2, 3.0).draw(np.random.default_rng(0), 1000)) == 1


def test_uniform_lengths_fill_their_range():
    drawn = Lengths(100, 0.2, is_normal=False).draw(np.random.default_rng(0), 2000)
    assert (min(drawn), max(drawn)) == (80, 120)
    assert set(Lengths(7, 0.0, is_normal=False).draw(np.random.default_rng(0), 9)) == {7}


def test_shifted_text_begins_a_token_later_each_time():
    lengths = Lengths(50, 0.3), Lengths(6, 0.3)
    turns = [turn for (turn,) in workloads.shifted_text(WRITE, 20, *lengths, seed=3, path=None)]
    for before, after in itertools.pairwise(turns):
        n = min(before.n_prompt - 1, after.n_prompt)
        assert before.prompt[1 : 1 + n] == after.prompt[:n]
    assert all(len(turn.prompt) == turn.n_prompt and turn.n_output >= 1 for turn in turns)


def test_shifted_text_is_the_files_where_there_is_one(tmp_path):
    path = tmp_path / "text"
    path.write_text("abcdef")
    lengths = Lengths(9), Lengths(2)
    write = Writer(Letters(), as_ids=False)
    texts = [
        turn.prompt for (turn,) in workloads.shifted_text(write, 4, *lengths, seed=0, path=path)
    ]
    assert all(text in "abcdef" * 4 and len(text) == 9 for text in texts)
    path.write_text("")
    with pytest.raises(ValueError, match="has no text"):
        workloads.shifted_text(write, 4, *lengths, seed=0, path=path)


def test_random_prompts_share_the_prefix_and_no_more():
    lengths = Lengths(30, is_normal=False), Lengths(5, is_normal=False)
    made = workloads.random_ids(WRITE, 20, *lengths, ids=IDS, seed=1, n_prefix=8, n_turns=3)
    prompts = [conversation[0].prompt for conversation in made]
    assert all(len(conversation) == 3 for conversation in made)
    assert {tuple(prompt[:8]) for prompt in prompts} == {tuple(prompts[0][:8])}
    assert len({tuple(prompt[8:]) for prompt in prompts}) == 20
    assert [turn.n_prompt for turn in made[0]] == [38, 30, 30]
    assert {id for prompt in prompts for id in prompt} == {*IDS}


def test_prefixes_are_repeated_equally_often_in_random_order():
    made = workloads.repeated_prefixes(
        WRITE, 12, n_prefixes=3, n_prefix=8, n_suffix=4, n_output=5, ids=IDS, seed=0
    )
    prefixes = [tuple(turn.prompt[:8]) for (turn,) in made]
    assert sorted(prefixes.count(prefix) for prefix in set(prefixes)) == [4, 4, 4]
    assert prefixes != sorted(prefixes, key=prefixes.index)
    assert len({tuple(turn.prompt[8:]) for (turn,) in made}) == 12


@pytest.fixture
def conversations(tmp_path) -> Path:
    """As ShareGPT's files are."""

    def said(*texts: str) -> dict:
        names = ("human", "gpt") * len(texts)
        return {"conversations": [{"from": who, "value": text}
                                  for who, text in zip(names, texts, strict=False)]}  # fmt: skip

    path = tmp_path / "sharegpt.json"
    entries = [said("hello", "hi you", "more?", "yes"), said("alone"), said(), said("a", "bcd")]
    path.write_text(json.dumps(entries))
    return path


def test_sharegpt_gives_questions_and_the_lengths_of_answers(conversations):
    write = Writer(Letters(), as_ids=False)
    made = workloads.sharegpt(write, 4, conversations, n_turns=5, n_output=None, seed=0)
    found = {tuple((turn.prompt, turn.n_prompt, turn.n_output) for turn in each) for each in made}
    assert found == {(("hello", 5, 6), ("more?", 5, 3)), (("a", 1, 3),)}
    first_turns = workloads.sharegpt(write, 4, conversations, n_turns=1, n_output=9, seed=0)
    assert {turn.n_output for each in first_turns for turn in each} == {9}


@pytest.mark.parametrize(("text", "message"), [("{}", "no list"), ("[{}]", "no conversation")])
def test_a_file_of_another_form_is_refused(tmp_path, text, message):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        workloads.sharegpt(WRITE, 1, path, n_turns=1, n_output=None, seed=0)


def test_the_same_seed_asks_the_same():
    lengths = Lengths(20, 0.3), Lengths(5, 0.3)
    for make in (
        lambda seed: workloads.shifted_text(WRITE, 9, *lengths, seed=seed, path=None),
        lambda seed: workloads.random_ids(WRITE, 9, *lengths, ids=IDS, seed=seed),
    ):
        assert make(1) == make(1) != make(2)
