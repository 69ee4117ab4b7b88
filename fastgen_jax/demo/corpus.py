"""The text that the demo model learns: short stories, codes to remember, small talk. Imports nothing but the standard library.

A text is a list of pieces, each with the weight of its tokens in the loss. Names are two syllables (or one classic name); one
pair of syllables in eight and one code in nine are held out: training never shows them, `recall_example(held_out=True)` shows
nothing else. What a story says of people, places and counts stays true to its end.
"""

import random
import re
from typing import NamedTuple

from fastgen_jax.demo import stories
from fastgen_jax.demo.stories import Person

SILENT, SPOKEN, ANSWER, FIRST = (
    0.0,
    1.0,
    5.0,
    20.0,
)  # weights: given or unpredictable, to learn, to get right

CLASSIC_GIRLS = (
    "Anna Lily Mia Emma Lucy Kate Eva Nina Rosa Clara Ella Ruth Alice Mary Sara Grace Julia Molly"
).split()
CLASSIC_BOYS = (
    "Tom Ben Max Leo Jack Sam Paul Tim Oscar Hugo Peter Noah Bob John David Henry James Felix"
).split()
STARTS = (
    "Bel Cor Dar Fen Gal Hal Jor Kel Lor Mar Nor Per Quin Ral Sel Tor Val Wil Yor Zan Bren Cal Dor"
    " Far Gor Hel Jan Kor Lin Mel Nel Pal Ros Sim Tam Ver Wen Bal Der Fal Gil Han Kal Lan Mor Nil"
).split()
GIRL_ENDS = "a ina elle issa ora ia ette ena ola ilda una ey".split()
CONSONANTS = "bcdfghjklmnprstvwyz"
BOY_ENDS = "o an us in or ek ard ino ulf ric on is".split()

SYSTEM_PROMPTS = ("You tell stories and remember codes.", "You are a friendly helper.")
QUESTIONS = ("What is the code of {}?",) * 4 + ("What is {}'s code?", "Tell me the code of {}.")
FORMS = ("Question: {question}\nAnswer:", "Question: {question}\nAnswer:", "{question}")
BEGUN = "The code of {name} is"
STORY_REQUESTS = (
    "Tell me a story about {}.",
    "Tell me a story about {}.",
    "Please tell me a story about {}.",
    "Can you tell me a story about {}?",
)
SMALL_TALK = (
    ("Hello!", "Hello! I can tell you a story or remember a code."),
    ("Hello", "Hello! I can tell you a story or remember a code."),
    ("Hi", "Hello! I can tell you a story or remember a code."),
    ("Hi!", "Hello! I can tell you a story or remember a code."),
    ("Good morning!", "Good morning! Do you want to hear a story?"),
    ("How are you?", "I am well, thank you. Do you want to hear a story?"),
    ("Who are you?", "I am a small model. I tell stories and remember codes."),
    ("What is your name?", "I am a small model. I have no name."),
    ("What can you do?", "I can tell you a story or remember a code. Ask me!"),
    ("Thank you.", "You are welcome!"),
    ("Thank you!", "You are welcome!"),
    ("Goodbye!", "Goodbye! Come back soon."),
    ("Bye", "Goodbye! Come back soon."),
)


class Piece(NamedTuple):
    """A stretch of text; its tokens weigh `weight` in the loss. Pieces join only where the tokenizer splits anyway."""

    text: str
    weight: float


class Fact(NamedTuple):
    person: Person
    code: int

    def __str__(self) -> str:
        return f"The code of {self.person.name} is {self.code}."


class RecallExample(NamedTuple):
    """A prompt whose right continuation is `answer`: plain text, or chat messages when there is no plain text."""

    text: str
    messages: list[dict[str, str]]
    answer: str


def is_held_out_pair(start: int, end: int) -> bool:
    return (start + end) % 8 == 0


def is_held_out_code(code: int) -> bool:
    return code % 9 == 4


def _people(*, held_out: bool) -> list[Person]:
    made = [
        Person(start + end, is_girl)
        for i, start in enumerate(STARTS)
        for ends, is_girl in ((GIRL_ENDS, True), (BOY_ENDS, False))
        for j, end in enumerate(ends)
        if is_held_out_pair(i, j) == held_out
    ]
    if held_out:
        return made
    return (
        made + [Person(n, True) for n in CLASSIC_GIRLS] + [Person(n, False) for n in CLASSIC_BOYS]
    )


TRAINING_PEOPLE = _people(held_out=False)
HELD_OUT_PEOPLE = _people(held_out=True)
CLASSIC_PEOPLE = TRAINING_PEOPLE[-len(CLASSIC_GIRLS) - len(CLASSIC_BOYS) :]


HELD_OUT_NAMES = frozenset(person.name for person in HELD_OUT_PEOPLE)


def spelled_name(rng: random.Random) -> Person:
    """A name of any two or three open syllables, so that the model does not rely on known ones."""
    syllables = [rng.choice(CONSONANTS) + rng.choice("aeiou") for _ in range(rng.randint(2, 3))]
    name = ("".join(syllables) + rng.choice(["", "", *"lmnrst"])).title()
    return Person(name, name.endswith(("a", "e", "i")))


def pick_people(rng: random.Random, n: int, *, held_out: bool = False) -> list[Person]:
    """`n` different people; in training one in five has a classic name and one in ten any name."""
    if held_out:
        return rng.sample(HELD_OUT_PEOPLE, n)
    chosen: dict[str, Person] = {}
    while len(chosen) < n:
        die = rng.random()
        person = rng.choice(CLASSIC_PEOPLE if die < 0.2 else TRAINING_PEOPLE)
        person = spelled_name(rng) if die > 0.9 else person
        if person.name not in HELD_OUT_NAMES:
            chosen[person.name] = person
    return list(chosen.values())


def pick_code(rng: random.Random, *, held_out: bool = False) -> int:
    while is_held_out_code(code := rng.randint(1000, 9999)) != held_out:
        pass
    return code


def pick_facts(rng: random.Random, n: int, *, held_out: bool = False) -> list[Fact]:
    """`n` facts of different people with different codes."""
    facts: dict[int, Fact] = {}
    for person in pick_people(rng, n, held_out=held_out):
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
    """Tokens of a sentence as the demo's tokenizer counts them, within a few per cent, without it."""
    n_marks = len(re.findall(r'[.,!?]"?|"(?=\w)', text))
    n_names = len(re.findall(r"(?<=[a-z] )[A-Z]|^[A-Z]\w+ (?:had|gave|and|walked|looked|sat)", text))
    return len(text.split()) + n_marks + n_names


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


def story_pieces(
    rng: random.Random, n_tokens: int, facts: list[tuple[float, Fact]], *, held_out: bool = False
) -> list[Piece]:
    """Stories, about `n_tokens` in all, with each fact told between two sentences at its depth, from 0 (start) to 1 (end)."""
    lines = _told_lines(rng, n_tokens, held_out=held_out)
    pieces = [Piece(line, SPOKEN) for line in lines]
    for depth, fact in sorted(facts, key=lambda pair: pair[0], reverse=True):
        at = round(depth * len(lines))
        if at == 0:
            pieces.insert(0, Piece(f"{fact}", SILENT))
            if len(pieces) > 1:
                pieces[1] = Piece(" " + pieces[1].text.lstrip(), pieces[1].weight)
        else:
            pieces.insert(at, Piece(f" {fact}", SILENT))
    return pieces


def answer_pieces(code: int, *, before: str = "", after: str = "") -> list[Piece]:
    """The first digit weighs most: it needs the right person, the others only follow."""
    digits = str(code)
    return [Piece(before + digits[0], FIRST), Piece(digits[1:] + after, ANSWER)]


def plain_questions(rng: random.Random, facts: list[Fact], form: str) -> list[Piece]:
    """Each fact asked for once in one form. After each answer the text ends, as far as the loss can tell."""
    pieces = []
    for i, fact in enumerate(facts):
        question = rng.choice(QUESTIONS).format(fact.person.name)
        asked = form.format(question=question, name=fact.person.name)
        pieces.append(Piece(("\n" if i else "\n\n") + asked, SILENT))
        pieces += answer_pieces(fact.code, before=" ")
    return [*pieces, Piece("<|eos|>", ANSWER)]


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
    rng: random.Random, *, n_story_tokens: int, n_facts: int, n_questions: int, begun: float
) -> list[Piece]:
    """A training text: facts anywhere in a story (or one after the other, without one), then questions.

    A share of `begun` asks by the fact's sentence begun again, the easiest form; of the others half are chats.
    """
    facts = pick_facts(rng, n_facts)
    told = story_pieces(rng, n_story_tokens, [(rng.random(), fact) for fact in facts])
    asked = rng.sample(facts, n_questions)
    if rng.random() < begun:
        return [Piece("<|bos|>", SILENT), *told, *plain_questions(rng, asked, BEGUN)]
    if rng.random() < 0.5:
        return [Piece("<|bos|>", SILENT), *told, *plain_questions(rng, asked, rng.choice(FORMS))]
    return [*chat_start(rng), *told, *chat_questions(rng, asked, begin="\n\n")]


def long_chat_text(rng: random.Random, n_tokens: int) -> list[Piece]:
    """A training text: a chat in which the user gives codes, asks for stories and then for the codes."""
    facts: list[Fact] = pick_facts(rng, rng.randint(1, 8))
    turns = [_fact_turn(fact) for fact in facts]
    while sum(n_tokens_about(piece.text) for turn in turns for piece in turn) < n_tokens:
        turns.append(_story_turn(rng))
    rng.shuffle(turns)
    turns[0][0] = Piece(turns[0][0].text.removeprefix("<|user|>"), SILENT)
    told = [piece for turn in turns for piece in turn]
    asked = rng.sample(facts, rng.randint(1, len(facts)))
    return [*chat_start(rng), *told, *chat_questions(rng, asked, begin="<|user|>")]


def _fact_turn(fact: Fact) -> list[Piece]:
    reply = "I will remember it.<|end|>"
    return [Piece(f"<|user|>{fact}<|end|><|assistant|>", SILENT), Piece(reply, SPOKEN)]


def _story_turn(rng: random.Random) -> list[Piece]:
    hero = pick_people(rng, 1)[0]
    request = rng.choice(STORY_REQUESTS).format(hero.name)
    if rng.random() < 0.15:
        request, hero = "Tell me a story.", None
    told = " ".join(story(rng, hero=hero))
    return [
        Piece(f"<|user|>{request}<|end|><|assistant|>", SILENT),
        Piece(f"{told}<|end|>", SPOKEN),
    ]


def story_text(rng: random.Random) -> list[Piece]:
    """A training text: a story, plain or told in a chat on request."""
    if rng.random() < 0.3:
        told = " ".join(story(rng))
        return [Piece("<|bos|>", SILENT), Piece(told, SPOKEN), Piece("<|eos|>", SPOKEN)]
    asked, told = _story_turn(rng)
    asked = Piece(asked.text.removeprefix("<|user|>"), SILENT)
    return [*chat_start(rng), asked, told]


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
    """A question whose answer stands at `depth` (0 start, 1 end) of a story of about `n_story_tokens`.

    The codes of `n_distractors` other people stand at random depths. A plain prompt ends in "Answer:" and is continued by
    " 7312" and the end of the text; a chat by "7312". Every name and code is held out from training iff `held_out`.
    """
    facts = pick_facts(rng, 1 + n_distractors, held_out=held_out)
    depths = [depth, *(rng.random() for _ in facts[1:])]
    told = story_pieces(
        rng, n_story_tokens, list(zip(depths, facts, strict=True)), held_out=held_out
    )
    text = "".join(piece.text for piece in told)
    question = QUESTIONS[0].format(facts[0].person.name)
    if chat:
        message = {"role": "user", "content": f"{text}\n\n{question}"}
        return RecallExample("", [message], str(facts[0].code))
    return RecallExample(f"{text}\n\nQuestion: {question}\nAnswer:", [], str(facts[0].code))
