"""Seven zero-shot tasks, in the columns of BoolQ, PIQA, HellaSwag, WinoGrande, ARC-easy, ARC-challenge and OpenBookQA.

A question is held out by its key, such as (arc_easy, color, robin): training never asks for the robin's color in any
wording of that task, though it states the color elsewhere; an evaluation item asks only that. So an item tests whether
a model carries what it knows into a question form that it has learned on other things.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .vocabulary import BOYS, COLORS, GIRLS, JOBS, KINDS, OBJECTS, PLACES, article

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from .vocabulary import World

LETTERS = "ABCD"


@dataclass(frozen=True)
class Question:
    """One multiple-choice question.

    key: what is held out; record: the row in the real task's columns; prompt and response: the text before the answer
    and the gold answer, which joined by a space give `text`; choices: all answers; gold: the index of the right one;
    identity: what makes two items the same (the order of the choices does not count).
    """

    key: tuple[str, ...]
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


def boolq(world: World, rng: random.Random) -> Question:
    """Two of three passages say or deny what is asked; in the others it follows from the thing's kind."""
    name, kind, color, place, _ = rng.choice(world.things)
    yes, told, form = rng.random() < 0.5, rng.random() < 0.67, rng.choice(("kind", "part", "act", "need"))
    asked = kind if yes else rng.choice([other for other in KINDS if other != kind])
    part, act, need, _ = KINDS[asked]
    question, affirmed, denied = {
        "kind": (f"is the {name} {article(asked)}", f"is {article(asked)}", f"is not {article(asked)}"),
        "part": (f"does the {name} have {part}", f"has {part}", f"has no {part}"),
        "act": (f"can the {name} {act}", f"can {act}", f"can not {act}"),
        "need": (f"does the {name} need {need}", f"needs {need}", f"needs no {need}"),
    }[form]
    facts = [f"is {article(kind)}"] * (form != "kind") + [f"is {color}", f"lives in the {place}"]
    if told:
        facts[rng.randrange(len(facts))] = affirmed if yes else denied
    rng.shuffle(facts)
    passage = " ".join(f"The {name} {words}." for words in facts)
    choices = ("no", "yes")
    record = {"question": question, "passage": passage, "label": int(yes)}
    prompt = f"{passage}\nQuestion: {question}?\nAnswer:"
    return Question(("boolq", form, name), record, prompt, choices[yes], choices, int(yes), (passage, question))


def piqa(world: World, rng: random.Random) -> Question:
    """How to reach a goal: half of the goals need a tool, half the knowledge of a thing's place or color."""
    if rng.random() < 0.5:
        verb, thing = rng.choice(tuple(JOBS)), rng.choice(OBJECTS)
        (wrong,) = _others([job.tool for job in JOBS.values()], JOBS[verb].tool, 1, rng)
        key, goal = (verb, thing), f"How do I {verb} the {thing}?"
        right, tempting = f"Use the {JOBS[verb].tool} on the {thing}.", f"Use the {wrong} on the {thing}."
    else:
        name, _, color, place, _ = rng.choice(world.things)
        form, goal, answer, pool, solution = rng.choice(
            (
                ("place", f"How do I find the {name}?", place, PLACES, "Go to the {}."),
                ("color", f"How do I draw the {name}?", color, COLORS, "Use the {} pen."),
            )
        )
        key = (form, name)
        right, tempting = solution.format(answer), solution.format(*_others(pool, answer, 1, rng))
    choices, gold = _shuffled(right, [tempting], rng)
    record = {"goal": goal, "sol1": choices[0], "sol2": choices[1], "label": gold}
    identity = (goal, *sorted(choices))
    return Question(("piqa", *key), record, f"Question: {goal}\nAnswer:", right, choices, gold, identity)


def _deed(verb: str, succeeds: bool, thing: str) -> str:
    return f"{JOBS[verb].third} the {thing}." if succeeds else f"can not {verb} the {thing}."


def hellaswag(world: World, rng: random.Random) -> Question:
    """What someone does next: a third work with a tool fit for it or not, the others draw a thing or travel to it."""
    name, pronoun = (rng.choice(GIRLS), "she") if rng.random() < 0.5 else (rng.choice(BOYS), "he")
    label = rng.choice(("Work", "Trip", "Art"))
    if label == "Work":
        verb, thing = rng.choice(tuple(JOBS)), rng.choice(OBJECTS)
        job, succeeds = JOBS[verb], rng.random() < 0.5
        right = _deed(verb, succeeds, thing)
        wrong = [_deed(verb, not succeeds, thing)]
        wrong += [_deed(other, rng.random() < 0.5, thing) for other in _others(tuple(JOBS), verb, 2, rng)]
        state = f"The {job.tool} is {job.helps if succeeds else job.yields}."
        key, start = (verb, thing), f"{name} takes the {job.tool} and the {thing}. {state}"
    else:
        named = rng.choice(world.things)
        key, start, answer, pool, ending = {
            "Trip": (
                ("place", named.name),
                f"{name} wants to see the {named.name}.",
                named.place,
                PLACES,
                "goes to the {}.",
            ),
            "Art": (
                ("color", named.name),
                f"{name} makes a picture of the {named.name}.",
                named.color,
                COLORS,
                "paints it {}.",
            ),
        }[label]
        right, *wrong = (ending.format(word) for word in (answer, *_others(pool, answer, 3, rng)))
    choices, gold = _shuffled(right, wrong, rng)
    end = f"then {pronoun}"
    record = {
        "activity_label": label,
        "ctx_a": start,
        "ctx_b": end,
        "ctx": f"{start} {end}",
        "endings": list(choices),
        "label": str(gold),
    }
    prompt = f"{label}: {start} {end.capitalize()}"
    return Question(("hellaswag", *key), record, prompt, right, choices, gold, (prompt, *sorted(choices)))


def winogrande(world: World, rng: random.Random) -> Question:
    """Whether the tool or its object is meant; all sentences about the same two are held out together."""
    verb, thing = rng.choice(tuple(JOBS)), rng.choice(OBJECTS)
    job, succeeds, about_tool = JOBS[verb], rng.random() < 0.5, rng.random() < 0.5
    opening = rng.choice(("The", "Today the", "Here the"))
    answer, other = (job.tool, thing) if about_tool else (thing, job.tool)
    adjective = job.helps if succeeds == about_tool else job.yields
    deed = job.third if succeeds else f"can not {verb}"
    before, after = f"{opening} {job.tool} {deed} the {thing} because the", f"is {adjective}."
    choices, gold = _shuffled(answer, [other], rng)
    sentence = f"{before} _ {after}"
    record = {"sentence": sentence, "option1": choices[0], "option2": choices[1], "answer": str(gold + 1)}
    return Question(("winogrande", verb, thing), record, before, f"{answer} {after}", choices, gold, (sentence,))


def _lettered(
    key: tuple[str, ...], column: str, question: str, prompt: str, answer: str, wrong: list[str], rng: random.Random
) -> Question:
    choices, gold = _shuffled(answer, wrong, rng)
    record = {column: question, "choices": {"text": list(choices), "label": list(LETTERS)}, "answerKey": LETTERS[gold]}
    return Question(key, record, prompt, answer, choices, gold, (question, *sorted(choices)))


def arc_easy(world: World, rng: random.Random) -> Question:
    """One property of one thing."""
    name, kind, color, place, _ = rng.choice(world.things)
    part, act, need, _ = KINDS[kind]
    form, answer, pool, question = rng.choice(
        (
            ("part", part, [k.part for k in KINDS.values()], f"What does the {name} have?"),
            ("act", act, [k.act for k in KINDS.values()], f"What can the {name} do?"),
            ("need", need, [k.need for k in KINDS.values()], f"What does the {name} need?"),
            ("color", color, COLORS, f"What color is the {name}?"),
            ("place", place, PLACES, f"Where does the {name} live?"),
        )
    )
    prompt = f"Question: {question}\nAnswer:"
    return _lettered(("arc_easy", form, name), "question", question, prompt, answer, _others(pool, answer, 3, rng), rng)


def arc_challenge(world: World, rng: random.Random) -> Question:
    """Two conditions at once, kind and color or kind and place; each wrong answer fails one or both."""
    name, kind, color, place, _ = rng.choice(world.things)
    field, value = rng.choice((("color", color), ("place", place)))
    question = f"Which {kind} is {color}?" if field == "color" else f"Which {kind} lives in the {place}?"

    def one(same_kind: bool, same_value: bool) -> str:
        fits = [t.name for t in world.things if (t.kind == kind) == same_kind]
        values = {t.name: getattr(t, field) for t in world.things}
        return rng.choice([thing for thing in fits if (values[thing] == value) == same_value])

    wrong = [one(True, False), one(False, True), one(False, False)]
    prompt = f"Question: {question}\nAnswer:"
    return _lettered(("arc_challenge", kind, value), "question", question, prompt, name, wrong, rng)


def openbookqa(world: World, rng: random.Random) -> Question:
    """A sentence to be completed with what is known of a thing or follows from its kind."""
    name, kind, color, place, _ = rng.choice(world.things)
    form, stem, answer, pool = rng.choice(
        (
            ("need", f"If the {name} is hungry, it looks for", KINDS[kind].need, [k.need for k in KINDS.values()]),
            ("part", f"On the body of the {name} we see", KINDS[kind].part, [k.part for k in KINDS.values()]),
            ("color", f"A good picture of the {name} is", color, COLORS),
            ("place", f"To visit the {name}, walk to the", place, PLACES),
        )
    )
    wrong = _others(pool, answer, 3, rng)
    return _lettered(("openbookqa", form, name), "question_stem", stem, stem, answer, wrong, rng)


QUESTIONS = {
    "boolq": boolq,
    "piqa": piqa,
    "hellaswag": hellaswag,
    "winogrande": winogrande,
    "arc_easy": arc_easy,
    "arc_challenge": arc_challenge,
    "openbookqa": openbookqa,
}


def training_question(world: World, task: str, rng: random.Random) -> Question:
    """A random question of the task whose key is not held out."""
    while True:
        question = QUESTIONS[task](world, rng)
        if not world.held(*question.key):
            return question


def evaluation_items(world: World, task: str, count: int) -> list[Question]:
    """`count` different questions of the task with held-out keys, the right answers spread evenly over the positions.

    Raises ValueError when the language does not hold that many different items.
    """
    rng = world.stream(f"items/{task}")
    items: list[Question] = []
    seen: set[tuple[str, ...]] = set()
    for _ in range(400 * count):
        item = QUESTIONS[task](world, rng)
        wanted = item.gold == len(items) % len(item.choices)
        if wanted and item.identity not in seen and world.held(*item.key):
            seen.add(item.identity)
            items.append(item)
            if len(items) == count:
                rng.shuffle(items)
                return items
    raise ValueError(f"The demo language has only {len(items)} different {task} items, not {count}.")
