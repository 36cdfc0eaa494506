"""Statements of fact, and the documents that training, calibration and perplexity read.

A single fact ("The robin is red.") is one of a few hundred sentences, so no held-out document could be made of one
fact that training has not seen. A document therefore joins `PARAGRAPHS` independent paragraphs (a fact, a profile or
an answered training question each): fresh documents are samples of the training distribution whose exact text is new.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .questions import QUESTIONS
from .vocabulary import KINDS, article

if TYPE_CHECKING:
    import random

    from .vocabulary import World

PARAGRAPHS = 4
FACT_SHARE, PROFILE_SHARE = 0.25, 0.10
# BoolQ passages are dense in facts: most of what a model knows about the things is learned there.
QUESTION_WEIGHTS = {
    "boolq": 4,
    "piqa": 2,
    "hellaswag": 4,
    "winogrande": 2,
    "arc_easy": 4,
    "arc_challenge": 4,
    "openbookqa": 4,
}
WEIGHTED_TASKS = [task for task in QUESTIONS for _ in range(QUESTION_WEIGHTS[task])]


def fact(world: World, rng: random.Random) -> str:
    """One sentence about one thing."""
    name, kind, color, place = rng.choice(world.things)
    part, act, need, _ = KINDS[kind]
    return rng.choice(
        (
            f"The {name} is {article(kind)}.",
            f"The {name} has {part}.",
            f"The {name} can {act}.",
            f"The {name} needs {need}.",
            f"The {name} is {color}.",
            f"The {name} lives in the {place}.",
            f"The {color} {name} lives in the {place}.",
            f"The {name} is {article(kind)} and it has {part}.",
            f"One {color} {kind} is the {name}.",
            f"One {kind} in the {place} is the {name}.",
        )
    )


def profile(world: World, rng: random.Random) -> str:
    """Kind, color and place of one thing, in three sentences."""
    name, kind, color, place = rng.choice(world.things)
    return f"The {name} is {article(kind)}. The {name} is {color}. The {name} lives in the {place}."


def paragraph(world: World, rng: random.Random) -> str:
    """A fact, a profile, or a question in a wording of the training fold with its answer."""
    draw = rng.random()
    if draw < FACT_SHARE:
        return fact(world, rng)
    if draw < FACT_SHARE + PROFILE_SHARE:
        return profile(world, rng)
    return QUESTIONS[rng.choice(WEIGHTED_TASKS)](world, rng, held=False).text


def document(world: World, rng: random.Random) -> str:
    """`PARAGRAPHS` paragraphs, one a line (an answered question takes two or three lines)."""
    return "\n".join(paragraph(world, rng) for _ in range(PARAGRAPHS))
