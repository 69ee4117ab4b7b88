"""A grammar of short stories. A scene is a function that changes the World and tells how.

INVARIANT: every sentence is true of the World at its time: who is there, who holds how many things,
where they are.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from fastgen_jax.demo.people import Person, words

NUMBERS = words("no one two three four five six seven eight nine ten eleven twelve")
MAX_COUNT = len(NUMBERS) - 1

THINGS = {  # singular: plural
    "apple": "apples", "pear": "pears", "shell": "shells", "stone": "stones", "nut": "nuts",
    "flower": "flowers", "coin": "coins", "button": "buttons", "feather": "feathers",
    "cake": "cakes", "book": "books", "berry": "berries",
}  # fmt: skip
COLORS = words("red green blue white yellow brown")
PLACES = words("forest river garden lake market hill mill meadow harbor village")
HOMES = (
    "a small house by the sea", "an old farm", "a white house near the forest",
    "a village in the hills", "a little house by the river", "a big town",
)  # fmt: skip
ANIMALS = words("dog cat fox bird horse goat duck rabbit mouse owl")
SIZES = words("small big little young thin gray")
CHARACTERS = words("kind brave clever quiet cheerful curious")
CLOTHES = words("hat coat scarf bag ring drum kite lamp")
HIDING_PLACES = (
    "under the bed", "behind the door", "in the kitchen", "on the roof", "under a tree",
    "in the barn", "behind the well", "in a box",
)  # fmt: skip
BUILT = words("boat bridge table chair cart fence tower swing")
GAMES = ("sang a song", "danced", "played ball", "ran a race", "told jokes", "flew a kite")
MEALS = ("bread and cheese", "hot soup", "rice and beans", "fish and potatoes", "a warm pie")


@dataclass
class World:
    """Who is in the story, where they are and who holds how many of its one kind of thing."""

    rng: random.Random
    hero: Person
    friend: Person
    thing: str
    color: str
    place: str
    counts: dict[str, int] = field(default_factory=dict)

    def owned(self, n: int) -> str:
        return f"{NUMBERS[n]} {self.thing if n == 1 else THINGS[self.thing]}"

    def now_has(self, person: Person) -> str:
        return f"Now {person.name} had {self.owned(self.counts[person.name])}."

    def go_elsewhere(self) -> str:
        self.place = self.rng.choice([place for place in PLACES if place != self.place])
        return self.place


Scene = Callable[[World], list[str]]


def opening(w: World) -> list[str]:
    hero, rng = w.hero, w.rng
    w.counts[hero.name] = n = rng.randint(2, 8)
    return [
        f"Once upon a time there was a {rng.choice(CHARACTERS)} {hero.kind} named {hero.name}.",
        f"{hero.she.title()} lived in {rng.choice(HOMES)}.",
        f"One day {hero.name} had {NUMBERS[n]} {w.color} {THINGS[w.thing]}.",
    ]


def walk(w: World) -> list[str]:
    return [f"{w.hero.name} walked to the {w.go_elsewhere()}."]


def find(w: World) -> list[str]:
    n = w.rng.randint(1, 3)
    if w.counts[w.hero.name] + n > MAX_COUNT:
        return []
    w.counts[w.hero.name] += n
    more = f"{NUMBERS[n]} more {w.thing if n == 1 else THINGS[w.thing]}"
    return [f"At the {w.place} {w.hero.she} found {more}.", w.now_has(w.hero)]


def lose(w: World) -> list[str]:
    if w.counts[w.hero.name] < 2:
        return []
    w.counts[w.hero.name] -= 1
    return [
        f"On the way one {w.thing} fell out of {w.hero.her} bag and was gone.",
        f"{w.hero.she.title()} was sad for a while.",
        w.now_has(w.hero),
    ]


def search(w: World) -> list[str]:
    hero, lost = w.hero, w.rng.choice(CLOTHES)
    first, second = w.rng.sample(HIDING_PLACES, 2)
    return [
        f"But where was {hero.her} {lost}?",
        f"{hero.name} looked {first}, but the {lost} was not there.",
        f"Then {hero.she} looked {second}, and there was the {lost}!",
    ]


def feed_animal(w: World) -> list[str]:
    hero, animal = w.hero, f"{w.rng.choice(SIZES)} {w.rng.choice(ANIMALS)}"
    return [
        f"At the {w.place} {hero.name} saw a {animal}.",
        f"The {animal} was hungry, so {hero.name} gave it some bread.",
        f"After that the {animal} was not afraid of {hero.name}.",
    ]


def rest(w: World) -> list[str]:
    return [f"{w.hero.name} sat down near the {w.place} and ate {w.rng.choice(MEALS)}."]


def meet(w: World) -> list[str]:
    hero, friend = w.hero, w.friend
    w.counts[friend.name] = n = w.rng.randint(0, 4)
    return [
        f"At the {w.place} {hero.name} met {hero.her} friend {friend.name}.",
        f'"Hello, {hero.name}!" said {friend.name}.',
        f'"Hello, {friend.name}!" said {hero.name}.',
        f"{friend.name} had {w.owned(n)}.",
    ]


def give(w: World) -> list[str]:
    giver, taker = w.rng.choice([(w.hero, w.friend), (w.friend, w.hero)])
    n = w.rng.randint(1, 2)
    if w.counts[giver.name] < n or w.counts[taker.name] + n > MAX_COUNT:
        return []
    w.counts[giver.name] -= n
    w.counts[taker.name] += n
    return [
        f"{giver.name} gave {w.owned(n)} to {taker.name}.",
        f'"Thank you, {giver.name}," said {taker.name}.',
        w.now_has(giver),
        w.now_has(taker),
    ]


def ask(w: World) -> list[str]:
    asked, asker = w.rng.choice([(w.hero, w.friend), (w.friend, w.hero)])
    return [
        f'"How many {THINGS[w.thing]} do you have?" asked {asker.name}.',
        f'"I have {w.owned(w.counts[asked.name])}," said {asked.name}.',
    ]


def build(w: World) -> list[str]:
    built = w.rng.choice(BUILT)
    return [
        f"{w.hero.name} and {w.friend.name} wanted to build a {built}.",
        f"They worked all day, and then the {built} was ready.",
        f"They were very proud of the {built}.",
    ]


def play(w: World) -> list[str]:
    return [f"{w.hero.name} and {w.friend.name} {w.rng.choice(GAMES)} and laughed."]


def rain(w: World) -> list[str]:
    shelter = w.rng.choice(["old barn", "big tree", "wooden bridge"])
    return [
        "Suddenly it began to rain.",
        f"{w.hero.name} and {w.friend.name} waited under the {shelter}.",
        "Soon the sun was shining again.",
    ]


def move_on(w: World) -> list[str]:
    old, new = w.place, w.go_elsewhere()
    return [f"From the {old} {w.hero.name} and {w.friend.name} went to the {new}."]


def closing(w: World) -> list[str]:
    hero = w.hero
    return [
        f"In the evening {hero.name} went home with {w.owned(w.counts[hero.name])}.",
        f"{hero.she.title()} was {w.rng.choice(['happy', 'tired but happy', 'full of joy'])}.",
        "The end.",
    ]


ALONE: tuple[Scene, ...] = (find, lose, search, feed_animal, rest)
TOGETHER: tuple[Scene, ...] = (give, give, ask, build, play, rain, move_on)


def tell(rng: random.Random, hero: Person, friend: Person) -> list[str]:
    """The sentences of a story of `hero`, who meets `friend` on the way."""
    thing, color, place = rng.choice(list(THINGS)), rng.choice(COLORS), rng.choice(PLACES)
    world = World(rng, hero, friend, thing, color, place)
    alone = rng.sample(ALONE, rng.randint(1, 2))
    together = rng.sample(TOGETHER, rng.randint(1, 3))
    scenes = (opening, walk, *alone, meet, *together, closing)
    return [sentence for scene in scenes for sentence in scene(world)]
