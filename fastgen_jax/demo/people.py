"""The people of the corpus. Names are two syllables, a classic name, or now and then any name.

One pair of syllables in eight is held out: training never shows it, though it shows both halves.
"""

import random
from typing import NamedTuple


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CLASSIC_GIRLS = words(
    "Anna Lily Mia Emma Lucy Kate Eva Nina Rosa Clara Ella Ruth Alice Mary Sara Grace Julia Molly"
)
CLASSIC_BOYS = words(
    "Tom Ben Max Leo Jack Sam Paul Tim Oscar Hugo Peter Noah Bob John David Henry James Felix"
)
STARTS = words(
    "Bel Cor Dar Fen Gal Hal Jor Kel Lor Mar Nor Per Quin Ral Sel Tor Val Wil Yor Zan Bren Cal Dor"
    " Far Gor Hel Jan Kor Lin Mel Nel Pal Ros Sim Tam Ver Wen Bal Der Fal Gil Han Kal Lan Mor Nil"
)
GIRL_ENDS = words("a ina elle issa ora ia ette ena ola ilda una ey")
BOY_ENDS = words("o an us in or ek ard ino ulf ric on is")
CONSONANTS = "bcdfghjklmnprstvwyz"


class Person(NamedTuple):
    name: str
    is_girl: bool

    @property
    def she(self) -> str:
        return "she" if self.is_girl else "he"

    @property
    def her(self) -> str:
        return "her" if self.is_girl else "his"

    @property
    def kind(self) -> str:
        return "girl" if self.is_girl else "boy"


def is_held_out_pair(start: int, end: int) -> bool:
    return (start + end) % 8 == 0


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
    girls = [Person(name, True) for name in CLASSIC_GIRLS]
    return made + girls + [Person(name, False) for name in CLASSIC_BOYS]


TRAINING_PEOPLE = _people(held_out=False)
HELD_OUT_PEOPLE = _people(held_out=True)
CLASSIC_PEOPLE = TRAINING_PEOPLE[-len(CLASSIC_GIRLS) - len(CLASSIC_BOYS) :]
HELD_OUT_NAMES = frozenset(person.name for person in HELD_OUT_PEOPLE)


def spelled_name(rng: random.Random) -> Person:
    """A name of any two or three open syllables, so that the model does not rely on known ones."""
    syllables = [rng.choice(CONSONANTS) + rng.choice("aeiou") for _ in range(rng.randint(2, 3))]
    name = ("".join(syllables) + rng.choice(["", "", *"lmnrst"])).title()
    return Person(name, name.endswith(("a", "e", "i")))


def alike_person(rng: random.Random, person: Person) -> Person:
    """Someone whose name begins or ends like that of `person`."""
    name = person.name
    return rng.choice(
        [p for p in TRAINING_PEOPLE if p.name[:3] == name[:3] or p.name[-2:] == name[-2:]]
        or TRAINING_PEOPLE
    )


def pick_people(
    rng: random.Random, n: int, *, held_out: bool = False, alike: float = 0.0
) -> list[Person]:
    """`n` different people; in training one in five has a classic name and one in ten any name.

    Args:
        alike: share of people whose name resembles one picked before, hard to tell apart.
    """
    if held_out:
        return rng.sample(HELD_OUT_PEOPLE, n)
    chosen: dict[str, Person] = {}
    while len(chosen) < n:
        if chosen and alike and rng.random() < alike:
            person = alike_person(rng, rng.choice(list(chosen.values())))
            chosen[person.name] = person
            continue
        die = rng.random()
        person = rng.choice(CLASSIC_PEOPLE if die < 0.2 else TRAINING_PEOPLE)
        person = spelled_name(rng) if die > 0.9 else person
        if person.name not in HELD_OUT_NAMES:
            chosen[person.name] = person
    return list(chosen.values())
