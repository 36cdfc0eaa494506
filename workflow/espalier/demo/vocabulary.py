"""The words of the generated language, and the world that a seed makes of them.

A `World` says what color, place and size each thing has, and which questions are held out for evaluation. Everything
follows from the seed through `random.Random(str)` and SHA-256, so two processes build the same world.
"""

from __future__ import annotations

import hashlib
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


class Job(NamedTuple):
    """One verb's tool and third person, and two adjectives.

    The job succeeds when the tool is `helps` or its object is `yields`, and fails the other way round: so an adjective
    alone does not tell whether the tool or the object is meant.
    """

    tool: str
    helps: str
    yields: str
    third: str


class Thing(NamedTuple):
    """One thing of the world and its attributes."""

    name: str
    kind: str
    color: str
    place: str
    size: str


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
SIZES = ("small", "big")
VARIETIES = words("north south east west royal")
NAMED_MEMBERS = 2  # of each kind, in all varieties
GIRLS = words("Anna Mary Lucy Emma Kate Rose Jane Sara")
BOYS = words("Tom Jack Paul Mark Luke Sam Bill Fred")
NAMES = GIRLS + BOYS
JOBS = {
    "cut": Job("knife", "hard", "soft", "cuts"),
    "hit": Job("hammer", "heavy", "light", "hits"),
    "wash": Job("soap", "clean", "dirty", "washes"),
    "tie": Job("rope", "long", "short", "ties"),
    "burn": Job("match", "new", "old", "burns"),
    "lift": Job("crane", "large", "little", "lifts"),
    "paint": Job("brush", "wide", "narrow", "paints"),
    "glue": Job("paste", "thick", "thin", "glues"),
}
OBJECTS = words(
    "paper bread cloth wood box chair table shirt cup plate board basket door toy bench bottle "
    "carpet curtain drawer fence frame jar lamp ladder mirror pillow shelf stick sofa tray crate stool"
)
HELD_OUT_ONE_IN = 4


def article(word: str) -> str:
    """The word with its indefinite article: 'a robin', 'an owl'."""
    return ("an " if word[0] in "aeiou" else "a ") + word


def normal(text: str) -> str:
    """The text as lower-case words with one space between them: the form in which duplicates are looked for."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


class World:
    """The things of one seed and the fold of held-out questions.

    Things have names of two words ("north robin"): the color and place belong to the two together, so a model has to
    combine the words before it can recall anything, and no single embedding can hold the answer. Colors and places are
    spread evenly inside each kind, so that the kind does not give them away.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._folds: dict[tuple[str, ...], bool] = {}
        rng = self.stream("attributes")
        things = []
        for kind, (_, _, _, members) in KINDS.items():
            names = [f"{variety} {member}" for member in members[:NAMED_MEMBERS] for variety in VARIETIES]
            colors = list((COLORS * 2)[: len(names)])
            places = list((PLACES * 2)[: len(names)])
            rng.shuffle(colors)
            rng.shuffle(places)
            for name, color, place in zip(names, colors, places, strict=True):
                things.append(Thing(name, kind, color, place, rng.choice(SIZES)))
        self.things = tuple(things)

    def stream(self, purpose: str) -> random.Random:
        """The random stream of one purpose: different purposes never share draws."""
        return random.Random(f"{self.seed}/{purpose}")

    def held(self, *key: str) -> bool:
        """Whether the questions with this key are kept for evaluation (one key in `HELD_OUT_ONE_IN`)."""
        if key not in self._folds:
            digest = hashlib.sha256("|".join((str(self.seed), *key)).encode()).digest()
            self._folds[key] = int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0
        return self._folds[key]


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
