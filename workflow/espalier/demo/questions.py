"""Seven zero-shot tasks, in the columns of BoolQ, PIQA, HellaSwag, WinoGrande, ARC-easy, ARC-challenge and OpenBookQA.

Every question has `WORDINGS` wordings. One of them is held out for each thing and attribute: training never asks for
the robin's color in that wording, but it does in the other three, and it asks for other things' colors in that one. An
evaluation item asks only what is held out. So an item tests whether a model knows a fact, and carries it into a wording
that it has learned on other things.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .vocabulary import BOYS, COLORS, GIRLS, KINDS, PLACES, WORDINGS, article

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from .vocabulary import World

LETTERS = "ABCD"
VALUES = {"color": COLORS, "place": PLACES, "kind": tuple(KINDS)}
# Attribute → the wordings of its question; {} is the thing.
ARC_EASY = {
    "color": (
        "What color is the {}?",
        "Which color has the {}?",
        "How do we describe the color of the {}?",
        "The {} is of what color?",
    ),
    "place": (
        "Where does the {} live?",
        "What is the home of the {}?",
        "Where do we meet the {}?",
        "The {} stays in which place?",
    ),
    "kind": (
        "What is the {}?",
        "To which kind belongs the {}?",
        "What do we call things like the {}?",
        "The {} is one of what kind?",
    ),
}
OPENBOOKQA = {
    "color": (
        "A good picture of the {} is",
        "In the sun the {} looks",
        "Paint for a wooden {} must be",
        "Children draw the {} in",
    ),
    "place": (
        "To visit the {}, walk to the",
        "A photo of the {} shows the",
        "Looking for the {}, we search the",
        "The noise of the {} fills the",
    ),
}
# PIQA: the goals of each attribute, and the solution.
PIQA = {
    "color": (
        ("How do I draw the {}?", "How do I paint the {}?", "How can I make a picture of the {}?", "To sketch the {}:"),
        "Use the {} pen.",
    ),
    "place": (
        ("How do I find the {}?", "How do I get to the {}?", "How can I take a look at the {}?", "To reach the {}:"),
        "Go to the {}.",
    ),
}
# HellaSwag: the activity of each attribute, how it begins (the first {} is who acts), and how it goes on.
HELLASWAG = {
    "color": (
        "Art",
        ("{} draws the {}.", "{} makes a picture of the {}.", "{} shapes the {} in clay.", "{} sews a {} of cloth."),
        "paints it {}.",
    ),
    "place": (
        "Trip",
        ("{} wants to see the {}.", "{} misses the {}.", "{} hears about the {}.", "{} has news of the {}."),
        "goes to the {}.",
    ),
}
# WinoGrande: what is said of only one of two things, and how they are introduced.
WINOGRANDE = {"color": "is {}.", "place": "lives in the {}."}
PAIRS = (
    "We see the {} and the {} today and we know that the",
    "The {} is not like the {} because the",
    "Of the {} and the {} it is said that the",
    "Do not mix up the {} and the {} : the",
)
# ARC-challenge: the home and one more attribute.
ARC_CHALLENGE = {
    "kind": (
        "In what place is the {} and of what kind?",
        "What are the home and the kind of the {}?",
        "Tell me the home and the kind of the {}.",
        "For the {} , which home and which kind are right?",
    ),
    "color": (
        "In what place is the {} and of what color?",
        "What are the home and the color of the {}?",
        "Tell me the home and the color of the {}.",
        "For the {} , which home and which color are right?",
    ),
}


@dataclass(frozen=True)
class Question:
    """One multiple-choice question.

    record: the row in the real task's columns; prompt and response: the text before the answer and the gold answer,
    which joined by a space give `text`; choices: all answers; gold: the index of the right one; identity: what makes
    two items the same (the order of the choices does not count).
    """

    record: dict[str, Any]
    prompt: str
    response: str
    choices: tuple[str, ...]
    gold: int
    identity: tuple[str, ...]

    @property
    def text(self) -> str:
        return f"{self.prompt} {self.response}"


def _others(pool: Sequence[str], answer: str, count: int, rng: random.Random) -> list[str]:
    return rng.sample([word for word in pool if word != answer], count)


def _shuffled(answer: str, wrong: list[str], rng: random.Random) -> tuple[tuple[str, ...], int]:
    choices = [answer, *wrong]
    rng.shuffle(choices)
    return tuple(choices), choices.index(answer)


def _wording(world: World, rng: random.Random, held: bool, task: str, asked: str, name: str) -> int:
    """The wording of this question that is held out, or one of the others."""
    kept = world.held(task, asked, name)
    return kept if held else rng.choice([index for index in range(WORDINGS) if index != kept])


def boolq(world: World, rng: random.Random, held: bool) -> Question:
    """Two of three passages say or deny what is asked; in the others it follows from the thing's kind.

    Kind, part, act and need are the four wordings here: each tells the thing's kind.
    """
    name, kind, color, place = rng.choice(world.things)
    yes, told = rng.random() < 0.5, rng.random() < 0.67
    asked = kind if yes else rng.choice([other for other in KINDS if other != kind])
    part, act, need, _ = KINDS[asked]
    wording = _wording(world, rng, held, "boolq", "kind", name)
    question, affirmed, denied = (
        (f"is the {name} {article(asked)}", f"is {article(asked)}", f"is not {article(asked)}"),
        (f"does the {name} have {part}", f"has {part}", f"has no {part}"),
        (f"can the {name} {act}", f"can {act}", f"can not {act}"),
        (f"does the {name} need {need}", f"needs {need}", f"needs no {need}"),
    )[wording]
    facts = [f"is {article(kind)}"] * (wording != 0) + [f"is {color}", f"lives in the {place}"]
    if told:
        facts[rng.randrange(len(facts))] = affirmed if yes else denied
    rng.shuffle(facts)
    passage = " ".join(f"The {name} {words}." for words in facts)
    choices = ("no", "yes")
    record = {"question": question, "passage": passage, "label": int(yes)}
    prompt = f"{passage}\nQuestion: {question}?\nAnswer:"
    return Question(record, prompt, choices[yes], choices, int(yes), (passage, question))


def piqa(world: World, rng: random.Random, held: bool) -> Question:
    """How to reach a goal with a thing: it depends on the thing's color or place."""
    thing, attribute = rng.choice(world.things), rng.choice(tuple(PIQA))
    goals, solution = PIQA[attribute]
    goal = goals[_wording(world, rng, held, "piqa", attribute, thing.name)].format(thing.name)
    answer = getattr(thing, attribute)
    right, *wrong = (solution.format(word) for word in (answer, *_others(VALUES[attribute], answer, 1, rng)))
    choices, gold = _shuffled(right, wrong, rng)
    record = {"goal": goal, "sol1": choices[0], "sol2": choices[1], "label": gold}
    return Question(record, f"Question: {goal}\nAnswer:", right, choices, gold, (goal, *sorted(choices)))


def hellaswag(world: World, rng: random.Random, held: bool) -> Question:
    """What someone does next with a thing: it depends on the thing's color or place."""
    who, pronoun = (rng.choice(GIRLS), "she") if rng.random() < 0.5 else (rng.choice(BOYS), "he")
    thing, attribute = rng.choice(world.things), rng.choice(tuple(HELLASWAG))
    label, starts, ending = HELLASWAG[attribute]
    start = starts[_wording(world, rng, held, "hellaswag", attribute, thing.name)].format(who, thing.name)
    end, answer = f"then {pronoun}", getattr(thing, attribute)
    right, *wrong = (ending.format(word) for word in (answer, *_others(VALUES[attribute], answer, 3, rng)))
    choices, gold = _shuffled(right, wrong, rng)
    record = {
        "activity_label": label,
        "ctx_a": start,
        "ctx_b": end,
        "ctx": f"{start} {end}",
        "endings": list(choices),
        "label": str(gold),
    }
    prompt = f"{label}: {start} {end.capitalize()}"
    return Question(record, prompt, right, choices, gold, (prompt, *sorted(choices)))


def winogrande(world: World, rng: random.Random, held: bool) -> Question:
    """Which of two things is meant: the color or place that is told is that of only one."""
    thing, attribute = rng.choice(world.things), rng.choice(tuple(WINOGRANDE))
    value = getattr(thing, attribute)
    other = rng.choice([one.name for one in world.things if getattr(one, attribute) != value])
    both = rng.sample((thing.name, other), 2)
    before = PAIRS[_wording(world, rng, held, "winogrande", attribute, thing.name)].format(*both)
    after = WINOGRANDE[attribute].format(value)
    choices, gold = _shuffled(thing.name, [other], rng)
    sentence = f"{before} _ {after}"
    record = {"sentence": sentence, "option1": choices[0], "option2": choices[1], "answer": str(gold + 1)}
    return Question(record, before, f"{thing.name} {after}", choices, gold, (sentence,))


def _lettered(column: str, question: str, prompt: str, answer: str, wrong: list[str], rng: random.Random) -> Question:
    choices, gold = _shuffled(answer, wrong, rng)
    record = {column: question, "choices": {"text": list(choices), "label": list(LETTERS)}, "answerKey": LETTERS[gold]}
    return Question(record, prompt, answer, choices, gold, (question, *sorted(choices)))


def arc_easy(world: World, rng: random.Random, held: bool) -> Question:
    """One property of one thing."""
    thing, attribute = rng.choice(world.things), rng.choice(tuple(ARC_EASY))
    wording = _wording(world, rng, held, "arc_easy", attribute, thing.name)
    question, answer = ARC_EASY[attribute][wording].format(thing.name), getattr(thing, attribute)
    wrong = _others(VALUES[attribute], answer, 3, rng)
    return _lettered("question", question, f"Question: {question}\nAnswer:", answer, wrong, rng)


def arc_challenge(world: World, rng: random.Random, held: bool) -> Question:
    """Two properties of one thing at once, its place and its color or kind; each wrong answer fails in one or both."""
    thing, attribute = rng.choice(world.things), rng.choice(tuple(ARC_CHALLENGE))
    wording = _wording(world, rng, held, "arc_challenge", attribute, thing.name)
    question, answer = ARC_CHALLENGE[attribute][wording].format(thing.name), getattr(thing, attribute)
    (place,) = _others(PLACES, thing.place, 1, rng)
    (value,) = _others(VALUES[attribute], answer, 1, rng)
    right, *wrong = (f"{where} and {what}" for where in (thing.place, place) for what in (answer, value))
    return _lettered("question", question, f"Question: {question}\nAnswer:", right, wrong, rng)


def openbookqa(world: World, rng: random.Random, held: bool) -> Question:
    """A sentence to be completed with what is known of a thing."""
    thing, attribute = rng.choice(world.things), rng.choice(tuple(OPENBOOKQA))
    wording = _wording(world, rng, held, "openbookqa", attribute, thing.name)
    stem, answer = OPENBOOKQA[attribute][wording].format(thing.name), getattr(thing, attribute)
    return _lettered("question_stem", stem, stem, answer, _others(VALUES[attribute], answer, 3, rng), rng)


QUESTIONS = {
    "boolq": boolq,
    "piqa": piqa,
    "hellaswag": hellaswag,
    "winogrande": winogrande,
    "arc_easy": arc_easy,
    "arc_challenge": arc_challenge,
    "openbookqa": openbookqa,
}


def evaluation_items(world: World, task: str, count: int) -> list[Question]:
    """`count` different questions of the task in held-out wordings, the right answers spread evenly over the positions.

    Raises ValueError when the language does not hold that many different items.
    """
    rng = world.stream(f"items/{task}")
    items: list[Question] = []
    seen: set[tuple[str, ...]] = set()
    for _ in range(100 * count):
        item = QUESTIONS[task](world, rng, held=True)
        wanted = item.gold == len(items) % len(item.choices)
        if wanted and item.identity not in seen:
            seen.add(item.identity)
            items.append(item)
            if len(items) == count:
                rng.shuffle(items)
                return items
    raise ValueError(f"The demo language has only {len(items)} different {task} items, not {count}.")
