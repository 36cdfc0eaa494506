"""The words of the generated language, and the world that a seed makes of them.

A `World` says what color and place each thing has, and which wordings of which questions are held out for evaluation.
Everything follows from the seed through `random.Random(str)`, so two processes build the same world.
"""

from __future__ import annotations

import random
import re
from typing import NamedTuple


def words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


class Kind(NamedTuple):
    """What all things of one kind share: `part` they have, `act` they can do, `need` they look for."""

    part: str
    act: str
    need: str
    members: tuple[str, ...]


class Thing(NamedTuple):
    """One thing of the world and its attributes."""

    name: str
    kind: str
    color: str
    place: str


KINDS = {
    "bird": Kind("feathers", "fly", "seeds", words("robin sparrow eagle crow duck owl parrot swan wren hawk")),
    "fish": Kind("fins", "swim", "worms", words("trout salmon shark cod carp tuna perch pike herring bass")),
    "mammal": Kind("fur", "run", "meat", words("dog cat horse cow sheep goat rabbit fox bear wolf")),
    "insect": Kind("wings", "crawl", "leaves", words("ant bee wasp moth beetle mantis cricket ladybug gnat flea")),
    "tree": Kind("branches", "grow", "rain", words("oak pine maple birch willow cedar elm ash palm spruce")),
    "vehicle": Kind("wheels", "drive", "fuel", words("car truck bus van taxi tractor train tram jeep wagon")),
}
COLORS = words("red blue green yellow white black brown gray")
PLACES = words("forest garden river field city barn hill lake")
GIRLS = words("Anna Mary Lucy Emma Kate Rose Jane Sara")
BOYS = words("Tom Jack Paul Mark Luke Sam Bill Fred")
NAMES = GIRLS + BOYS
VARIETIES = words("north south")
NAMED_MEMBERS = 4  # of each kind, in all varieties
WORDINGS = 4  # of every question; one of them is held out


def article(word: str) -> str:
    """The word with its indefinite article: 'a robin', 'an owl'."""
    return ("an " if word[0] in "aeiou" else "a ") + word


def normal(text: str) -> str:
    """The text as lower-case words with one space between them: the form in which duplicates are looked for."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


class World:
    """The things of one seed and the held-out wordings of questions about them.

    Things have names of two words ("north robin"): the color and place belong to the two together, so a model has to
    combine the words before it can recall anything, and no single embedding can hold the answer. Each kind
    has every color and every place once, so that the kind does not give them away.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._held: dict[tuple[str, ...], int] = {}
        rng = self.stream("attributes")
        things = []
        for kind, (_, _, _, members) in KINDS.items():
            names = [f"{variety} {member}" for member in members[:NAMED_MEMBERS] for variety in VARIETIES]
            colors, places = (rng.sample(pool, len(names)) for pool in (COLORS, PLACES))
            things += map(Thing, names, [kind] * len(names), colors, places)
        self.things = tuple(things)

    def stream(self, purpose: str) -> random.Random:
        """The random stream of one purpose: different purposes never share draws."""
        return random.Random(f"{self.seed}/{purpose}")

    def held(self, task: str, asked: str, name: str) -> int:
        """Which of the `WORDINGS` is kept for evaluation, each for a quarter of the things."""
        if (task, asked, name) not in self._held:
            names = [thing.name for thing in self.things]
            self.stream(f"held/{task}/{asked}").shuffle(names)
            self._held |= {(task, asked, one): place % WORDINGS for place, one in enumerate(names)}
        return self._held[task, asked, name]


class Held:
    """The normal forms of everything an evaluation reads: no training text may equal one of them."""

    def __init__(self) -> None:
        self.forms: set[str] = set()

    def add(self, *parts: str) -> bool:
        """Register one evaluation input of one or more parts; False if it was registered before."""
        form = " | ".join(normal(part) for part in parts)
        if form in self.forms:
            return False
        self.forms.add(form)
        return True

    def holds(self, *parts: str) -> bool:
        """Whether a training text of these parts repeats an evaluation input: whole, in reverse, or in one part."""
        forms = [normal(part) for part in parts]
        whole = {" | ".join(forms), " | ".join(reversed(forms)), " ".join(forms), *forms}
        return not whole.isdisjoint(self.forms)
