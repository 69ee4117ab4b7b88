"""The text that the demo model learns: short stories, codes to remember, small talk.

A text is a list of pieces, each of one kind (SILENT ... LATER). Some names (see
people.py) and one code in nine are held out: training never shows them, and
`recall_example(held_out=True)` shows no others. Imports nothing but the standard library.
"""

import random
import re
from typing import NamedTuple

from fastgen_jax.demo import stories
from fastgen_jax.demo.people import Person, pick_people
from fastgen_jax.demo.phrases import (
    BEGUN,
    FORMS,
    QUESTIONS,
    SMALL_TALK,
    STORY_REQUESTS,
    SYSTEM_PROMPTS,
)

# Kinds of text, which weigh differently in the loss: given or unpredictable; told; told about a
# count that changed; an answer's first digit, which needs the right person; its other digits.
SILENT, SPOKEN, COUNTED, FIRST, LATER = range(5)


class Piece(NamedTuple):
    """A stretch of text of one kind. Pieces join only where the tokenizer splits anyway."""

    text: str
    kind: int


class Fact(NamedTuple):
    person: Person
    code: int

    def __str__(self) -> str:
        return f"The code of {self.person.name} is {self.code}."


class RecallExample(NamedTuple):
    """A prompt that `answer` should follow: a plain text, or else the messages of a chat."""

    text: str
    messages: list[dict[str, str]]
    answer: str


def is_held_out_code(code: int) -> bool:
    return code % 9 == 4


def pick_code(rng: random.Random, *, held_out: bool = False) -> int:
    while is_held_out_code(code := rng.randint(1000, 9999)) != held_out:
        pass
    return code


def pick_facts(
    rng: random.Random, n: int, *, held_out: bool = False, alike: float = 0.0
) -> list[Fact]:
    """`n` facts of different people with different codes."""
    facts: dict[int, Fact] = {}
    for person in pick_people(rng, n, held_out=held_out, alike=alike):
        while (code := pick_code(rng, held_out=held_out)) in facts:
            pass
        facts[code] = Fact(person, code)
    return list(facts.values())


def story(rng: random.Random, *, hero: Person | None = None, held_out: bool = False) -> list[str]:
    """The sentences of one short story, about 80 to 200 tokens."""
    people = pick_people(rng, 3, held_out=held_out)
    if hero is not None:
        people = [hero, *[p for p in people if p.name != hero.name]]
    return stories.tell(rng, people[0], people[1])


def n_tokens_about(text: str) -> int:
    """Tokens of a sentence, within a few per cent, without the tokenizer that counts them."""
    n_marks = len(re.findall(r'[.,!?]"?|"(?=\w)', text))
    name = r"(?<=[a-z] )[A-Z]|^[A-Z]\w+ (?:had|gave|and|walked|looked|sat)"  # two tokens, mostly
    return len(text.split()) + n_marks + len(re.findall(name, text))


def _told_lines(rng: random.Random, n_tokens: int, *, held_out: bool) -> list[str]:
    """Sentences of stories, each with what stands before it, until there are about `n_tokens`."""
    lines: list[str] = []
    n_told = 0
    while n_told < n_tokens:
        gap = "\n\n" if lines else ""
        for sentence in story(rng, held_out=held_out):
            lines.append(gap + sentence)
            n_told += n_tokens_about(sentence)
            gap = " "
            if n_told >= n_tokens:
                break
    return lines


def story_piece(sentence: str) -> Piece:
    states_count = re.match(r"\s*(Now \w+ had|In the evening)", sentence)
    return Piece(sentence, COUNTED if states_count else SPOKEN)


def whole_story(sentences: list[str], end: str) -> list[Piece]:
    spaced = [sentences[0], *(" " + sentence for sentence in sentences[1:])]
    return [*map(story_piece, spaced), Piece(end, SPOKEN)]


def story_pieces(
    rng: random.Random, n_tokens: int, facts: list[tuple[float, Fact]], *, held_out: bool = False
) -> list[Piece]:
    """Stories, about `n_tokens` in all, and each fact between two sentences at its depth.

    Args:
        facts: pairs of a depth, from 0 (start) to 1 (end), and a fact.
    """
    lines = _told_lines(rng, n_tokens, held_out=held_out)
    pieces = [story_piece(line) for line in lines]
    for depth, fact in sorted(facts, key=lambda pair: pair[0], reverse=True):
        at = round(depth * len(lines))
        if at == 0:
            pieces.insert(0, Piece(f"{fact}", SILENT))
            if len(pieces) > 1:
                pieces[1] = Piece(" " + pieces[1].text.lstrip(), pieces[1].kind)
        else:
            pieces.insert(at, Piece(f" {fact}", SILENT))
    return pieces


def answer_pieces(code: int, *, before: str = "", after: str = "") -> list[Piece]:
    digits = str(code)
    return [Piece(before + digits[0], FIRST), Piece(digits[1:] + after, LATER)]


def plain_questions(rng: random.Random, facts: list[Fact], form: str) -> list[Piece]:
    """Each fact asked for once, all in one form; to the loss, the text ends after each answer."""
    pieces = []
    for i, fact in enumerate(facts):
        question = rng.choice(QUESTIONS).format(fact.person.name)
        asked = form.format(question=question, name=fact.person.name)
        pieces.append(Piece(("\n" if i else "\n\n") + asked, SILENT))
        pieces += answer_pieces(fact.code, before=" ")
    return [*pieces, Piece("<|eos|>", LATER)]


def chat_questions(rng: random.Random, facts: list[Fact], *, begin: str) -> list[Piece]:
    """Each fact asked in a turn of its own; the first question comes after `begin`."""
    pieces = []
    for i, fact in enumerate(facts):
        question = rng.choice(QUESTIONS).format(fact.person.name)
        start = "<|user|>" if i else begin
        pieces.append(Piece(f"{start}{question}<|end|><|assistant|>", SILENT))
        pieces += answer_pieces(fact.code, after="<|end|>")
    return pieces


def chat_start(rng: random.Random) -> list[Piece]:
    system = f"<|system|>{rng.choice(SYSTEM_PROMPTS)}<|end|>" if rng.random() < 0.3 else ""
    return [Piece(f"<|bos|>{system}<|user|>", SILENT)]


def recall_text(
    rng: random.Random,
    *,
    n_story_tokens: int,
    n_facts: int,
    n_questions: int,
    begun: float,
    alike: float = 0.0,
    edges: float = 0.0,
) -> list[Piece]:
    """A training text: facts anywhere in a story (or one after the other), then questions.

    A share of `begun` asks by the fact's sentence begun again, the easiest form; of the others half
    are chats. A share of `edges` of the facts stands at the very start or end.
    """
    facts = pick_facts(rng, n_facts, alike=alike)
    depths = [rng.random() for _ in facts]
    if edges:
        depths = [rng.choice([0.0, 1.0]) if rng.random() < edges else d for d in depths]
    told = story_pieces(rng, n_story_tokens, list(zip(depths, facts, strict=True)))
    asked = rng.sample(facts, n_questions)
    if rng.random() < begun:
        return [Piece("<|bos|>", SILENT), *told, *plain_questions(rng, asked, BEGUN)]
    if rng.random() < 0.5:
        return [Piece("<|bos|>", SILENT), *told, *plain_questions(rng, asked, rng.choice(FORMS))]
    return [*chat_start(rng), *told, *chat_questions(rng, asked, begin="\n\n")]


def long_chat_text(rng: random.Random, n_tokens: int) -> list[Piece]:
    """A training text: a chat in which the user tells codes, asks for stories, then for codes."""
    facts: list[Fact] = pick_facts(rng, rng.randint(1, 8))
    turns = [_fact_turn(fact) for fact in facts]
    while sum(_n_turn_tokens_about(turn) for turn in turns) < n_tokens:
        turns.append(_story_turn(rng))
    rng.shuffle(turns)
    turns[0][0] = Piece(turns[0][0].text.removeprefix("<|user|>"), SILENT)
    told = [piece for turn in turns for piece in turn]
    asked = rng.sample(facts, rng.randint(1, len(facts)))
    return [*chat_start(rng), *told, *chat_questions(rng, asked, begin="<|user|>")]


def _n_turn_tokens_about(turn: list[Piece]) -> int:
    asked, *told = turn
    return n_tokens_about(asked.text) + n_tokens_about("".join(piece.text for piece in told))


def _fact_turn(fact: Fact) -> list[Piece]:
    reply = "I will remember it.<|end|>"
    return [Piece(f"<|user|>{fact}<|end|><|assistant|>", SILENT), Piece(reply, SPOKEN)]


def _story_turn(rng: random.Random) -> list[Piece]:
    hero = pick_people(rng, 1)[0]
    request = rng.choice(STORY_REQUESTS).format(hero.name)
    if rng.random() < 0.15:
        request, hero = "Tell me a story.", None
    asked = Piece(f"<|user|>{request}<|end|><|assistant|>", SILENT)
    told = whole_story(story(rng, hero=hero), "<|end|>")
    if hero is not None:  # whether it is a girl or a boy follows from the name that was asked for
        before, kind, after = told[0].text.partition(f" {hero.kind}")
        told[:1] = [Piece(before, SPOKEN), Piece(kind, COUNTED), Piece(after, SPOKEN)]
    return [asked, *told]


def story_text(rng: random.Random) -> list[Piece]:
    """A training text: a story, plain or told in a chat on request."""
    if rng.random() < 0.3:
        return [Piece("<|bos|>", SILENT), *whole_story(story(rng), "<|eos|>")]
    asked, *told = _story_turn(rng)
    asked = Piece(asked.text.removeprefix("<|user|>"), SILENT)
    return [*chat_start(rng), asked, *told]


def small_talk_text(rng: random.Random) -> list[Piece]:
    """A training text: a chat of one to three greetings and questions about the model."""
    pieces = chat_start(rng)
    for i, (said, reply) in enumerate(rng.sample(SMALL_TALK, rng.randint(1, 3))):
        begin = "<|user|>" if i else ""
        pieces += [
            Piece(f"{begin}{said}<|end|><|assistant|>", SILENT),
            Piece(f"{reply}<|end|>", SPOKEN),
        ]
    return pieces


def recall_example(
    rng: random.Random,
    n_story_tokens: int,
    depth: float,
    *,
    chat: bool,
    held_out: bool = True,
    n_distractors: int = 3,
) -> RecallExample:
    """A question whose answer stands at `depth` of a story of about `n_story_tokens`.

    A plain prompt ends in "Answer:"; " 7312" and the end of the text should follow. A chat's answer
    is "7312".

    Args:
        depth: from 0 (start) to 1 (end).
        held_out: every name and code is held out from training; else none is.
        n_distractors: other people whose codes stand at random depths.
    """
    facts = pick_facts(rng, 1 + n_distractors, held_out=held_out)
    depths = [depth, *(rng.random() for _ in facts[1:])]
    placed = list(zip(depths, facts, strict=True))
    told = story_pieces(rng, n_story_tokens, placed, held_out=held_out)
    text = "".join(piece.text for piece in told)
    question = QUESTIONS[0].format(facts[0].person.name)
    if chat:
        message = {"role": "user", "content": f"{text}\n\n{question}"}
        return RecallExample("", [message], str(facts[0].code))
    return RecallExample(f"{text}\n\nQuestion: {question}\nAnswer:", [], str(facts[0].code))
