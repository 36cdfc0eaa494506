"""The eight GLUE tasks over the demo's words, in GLUE's own columns and labels.

Labels are those of nyu-mll/glue: CoLA 1 = acceptable, SST-2 1 = positive, MRPC and QQP 1 = same meaning, MNLI
0/1/2 = entailment/neutral/contradiction, QNLI and RTE 0 = entailment, STS-B a float from 0 to 5. MNLI's mismatched
genre (reported speech) does not occur in its training rows.

A small BERT trained for seconds learns which words go together, not a free "same word?" comparison: so what must be
compared comes from small sets, and most differences are put into words ("someone else", "elsewhere"). Negation has to
be compared between the two sentences. A share of the labels is wrong, in training and validation rows alike, as in
the real data: it keeps the ceiling below 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from espalier.glue_tasks import TASKS

from .vocabulary import COLORS, KINDS, NAMES, PLACES, article, words

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

ORDER = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte")  # in which rows are drawn
COLUMNS = {task: TASKS[task].columns for task in ORDER}
LABELS = {task: TASKS[task].labels for task in ORDER}
WRONG_LABELS = {"cola": 0.06, "sst2": 0.04, "mrpc": 0.06, "qqp": 0.05, "mnli": 0.06, "qnli": 0.05, "rte": 0.10}
WORD_BY_WORD = 0.2  # the share of differences that only a comparison of single words reveals

GOOD = words("great lovely superb charming clever warm funny bright")
BAD = words("awful dull weak boring clumsy cold silly bleak")
WORKS = words("film story song actor scene plot book show")
NOUNS = tuple(noun for kind in KINDS.values() for noun in kind.members)
NEAR_COLORS, NEAR_PLACES = COLORS[:4], PLACES[:4]


class Verb(NamedTuple):
    """A verb's plain form and third person, and the same for a wording of equal meaning."""

    plain: str
    third: str
    other_plain: str
    other_third: str


VERBS = (
    Verb("see", "sees", "look at", "looks at"),
    Verb("buy", "buys", "get", "gets"),
    Verb("draw", "draws", "sketch", "sketches"),
    Verb("feed", "feeds", "give food to", "gives food to"),
)
ELSEWHERE = {
    "who": ("someone else", "another child"),
    "color": ("different", "strange"),
    "where": ("elsewhere", "far away"),
}
SCORE_LOST = {"never": 1.8, "where": 1.2, "color": 1.0, "who": 1.5}  # STS-B points that a difference in this slot costs


class Scene(NamedTuple):
    """Someone does, or never does, something to a thing of a color somewhere."""

    who: str
    verb: Verb
    color: str
    thing: str
    where: str
    never: bool = False


Inputs = tuple[str, ...]


def _other(pool: Sequence[Any], value: Any, rng: random.Random) -> Any:
    return rng.choice([item for item in pool if item != value])


def _scene(rng: random.Random, never: float = 0.0) -> Scene:
    thing = rng.choice(NOUNS)
    place = "in the " + rng.choice(NEAR_PLACES)
    return Scene(rng.choice(NAMES), rng.choice(VERBS), rng.choice(NEAR_COLORS), thing, place, rng.random() < never)


def _plain(scene: Scene) -> str:
    never = "never " if scene.never else ""
    return f"{scene.who} {never}{scene.verb.third} the {scene.color} {scene.thing} {scene.where}."


def _reworded(scene: Scene, rng: random.Random) -> str:
    doing = ("at no time " if scene.never else "") + scene.verb.other_third
    if rng.random() < 0.5:
        where = scene.where[0].upper() + scene.where[1:]
        return f"{where} {scene.who} {doing} the {scene.color} {scene.thing}."
    return f"The {scene.thing} that {scene.who} {doing} {scene.where} is {scene.color}."


def _changed(scene: Scene, slots: Sequence[str], rng: random.Random) -> Scene:
    """The scene with these slots different, most of them in words that say so."""
    fresh: dict[str, Any] = {}
    for slot in slots:
        value = getattr(scene, slot)
        if slot == "never":
            fresh[slot] = not value
        elif slot == "thing":
            fresh[slot] = _other(NOUNS, value, rng)
        elif slot == "verb":
            fresh[slot] = _other(VERBS, value, rng)
        elif rng.random() < WORD_BY_WORD:
            pools = {"who": NAMES, "color": NEAR_COLORS, "where": [f"in the {place}" for place in NEAR_PLACES]}
            fresh[slot] = _other(pools[slot], value, rng)
        else:
            fresh[slot] = rng.choice(ELSEWHERE[slot])
    return scene._replace(**fresh)


def cola(rng: random.Random) -> tuple[Inputs, int]:
    """Acceptable sentences, and the same with two words exchanged, one missing, one too many, or no agreement."""
    scene = _scene(rng, never=0.2)
    good = rng.choice(
        (
            _plain(scene),
            _reworded(scene, rng),
            f"{scene.who} can {scene.verb.plain} the {scene.thing} {scene.where}.",
            f"{scene.who} says that the {scene.thing} {scene.where} is {scene.color}.",
        )
    )
    if rng.random() < 0.55:
        return (good,), 1
    tokens = good[:-1].split()
    mistake = rng.choice(("order", "missing", "extra", "agreement"))
    if mistake == "order":
        at = rng.randrange(len(tokens) - 1)
        tokens[at], tokens[at + 1] = tokens[at + 1], tokens[at]
    elif mistake == "missing":
        droppable = ("the", "is", "in", *(verb.third for verb in VERBS), *(verb.plain for verb in VERBS))
        del tokens[rng.choice([at for at, word in enumerate(tokens) if word.lower() in droppable])]
    elif mistake == "extra":
        tokens.insert(rng.randrange(1, len(tokens)), rng.choice(("is", "the", "in", "can")))
    else:
        verbs = ("is", "says", "can", *(word for verb in VERBS for word in (verb.third, verb.other_third.split()[0])))
        tokens = [rng.choice(("are", "am", "be")) if word in verbs else word for word in tokens]
    bad = " ".join(tokens) + "."
    return (bad,), int(bad == good)


def sst2(rng: random.Random, twice: bool = False) -> tuple[Inputs, int]:
    """Praise and blame, a quarter of it through 'not' with the opposite word, some or all of it in two words."""
    positive, negated = rng.random() < 0.5, rng.random() < 0.25
    word = rng.choice(GOOD if positive != negated else BAD)
    work = rng.choice(WORKS)
    before = rng.choice(
        (
            f"to {rng.choice(NAMES)} ",
            f"{rng.choice(NAMES)} saw the {_other(WORKS, work, rng)} and ",
            f"at the {rng.choice(PLACES)} , ",
            f"i told {rng.choice(NAMES)} that ",
        )
    )
    again = f" and {rng.choice(GOOD if positive else BAD)}"
    after = again if twice else rng.choice(("", again, f" for {rng.choice(NAMES)}"))
    return (f"{before}the {work} is {'not ' if negated else ''}{word}{after} ",), int(positive)


def mrpc(rng: random.Random) -> tuple[Inputs, int]:
    """A scene and its rewording, or a rewording of a scene that differs."""
    scene, same = _scene(rng, never=0.3), rng.random() < 0.6
    slots = ("never",), ("verb",), ("where",), ("who",), ("verb", "where"), ("who", "thing")
    second = scene if same else _changed(scene, rng.choice(slots), rng)
    return (_plain(scene), _reworded(second, rng)), int(same)


def qqp(rng: random.Random) -> tuple[Inputs, int]:
    """Two wordings of one question, or two questions about the same scene."""
    who, verb, _, thing, _, _ = _scene(rng)
    wordings = {
        "color": (f"What color has the {thing} of {who}?", f"The {thing} of {who} has which color?"),
        "place": (f"Where does {who} keep the {thing}?", f"In which place is the {thing} of {who}?"),
        "helper": (f"Who feeds the {thing} of {who}?", f"The {thing} of {who} gets food from whom?"),
        "why": (
            f"Why does {who} {verb.plain} the {thing}?",
            f"For what reason does {who} {verb.other_plain} the {thing}?",
        ),
        "why not": (
            f"Why does {who} not {verb.plain} the {thing}?",
            f"For what reason does {who} never {verb.other_plain} the {thing}?",
        ),
    }
    different = {
        "color": (f"What size is the {thing} of {who}?", f"Why does {who} paint the {thing}?"),
        "place": (f"When did {who} lose the {thing}?", f"Why does {who} hide the {thing}?"),
        "helper": (f"When does the {thing} of {who} eat?", f"How much does the {thing} of {who} eat?"),
        "why": wordings["why not"],
        "why not": wordings["why"],
    }
    form, first, same = rng.choice(tuple(wordings)), rng.randint(0, 1), rng.random() < 0.42
    if same:
        second = wordings[form][1 - first]
    elif rng.random() < WORD_BY_WORD:
        second = wordings[_other(tuple(wordings), form, rng)][1 - first]
    else:
        second = rng.choice(different[form])
    return (wordings[form][first], second), int(same)


def stsb(rng: random.Random) -> tuple[Inputs, float]:
    """Five points, less what each difference costs, with a little noise."""
    scene = _scene(rng, never=0.2)
    slots = rng.sample(tuple(SCORE_LOST), rng.randint(0, 3))
    second = _changed(scene, slots, rng)
    score = 5 - sum(SCORE_LOST[slot] for slot in slots) + rng.gauss(0, 0.2)
    wording = _reworded(second, rng) if rng.random() < 0.5 else _plain(second)
    return (_plain(scene), wording), round(min(5.0, max(0.0, score)), 3)


def inference(rng: random.Random, genre: str | None = None) -> tuple[Inputs, int]:
    """A premise of one genre (plain, reworded, or reported for the mismatched rows) and a hypothesis; MNLI's labels."""
    scene, label = _scene(rng, never=0.25), rng.randint(0, 2)
    genre = genre or rng.choice(("plain", "reworded"))
    premise = _reworded(scene, rng) if genre == "reworded" else _plain(scene)
    if genre == "reported":
        premise = f"We read today that {premise}"
    who, verb, color, thing, where, never = scene
    kind = next(other for other, entry in KINDS.items() if thing in entry.members)
    place = where.removeprefix("in the ")
    does, does_not = f"{who} {verb.third} the {thing}.", f"{who} does not {verb.plain} the {thing}."
    if label == 1:
        options = [
            f"{_other(NAMES, who, rng)} is happy.",
            f"{who} is tired.",
            f"The {thing} is old.",
            f"{who} likes the {kind}.",
            f"The {kind} is hungry.",
            f"{who} has a friend.",
        ]
    elif label == 0 and never:
        options = [does_not]
    elif label == 0:
        options = [does, f"The {thing} is {color}.", f"There is {article(kind)} {where}.", f"{who} is {where}."]
    elif never:
        options = [does]
    elif rng.random() < WORD_BY_WORD:
        options = [
            f"The {thing} is {_other(NEAR_COLORS, color, rng)}.",
            f"{who} is in the {_other(NEAR_PLACES, place, rng)}.",
        ]
    else:
        options = [does_not, f"The {thing} is not {color}.", f"There is no {kind} {where}.", f"{who} is elsewhere."]
    return (premise, rng.choice(options)), label


def qnli(rng: random.Random) -> tuple[Inputs, int]:
    """A question, and a sentence that answers it or only mentions the same things."""
    who, verb, color, thing, where, _ = _scene(rng)
    kind = next(other for other, entry in KINDS.items() if thing in entry.members)
    asked = {
        "where": (f"Where does {who} keep the {thing}?", f"{who} keeps the {thing} {where}."),
        "color": (f"What color has the {thing} of {who}?", f"The {thing} of {who} is {color}."),
        "kind": (f"What kind of thing does {who} {verb.plain}?", f"The {thing} of {who} is {article(kind)}."),
        "who": (f"Who {verb.third} the {thing}?", f"{who} {verb.third} the {thing} every day."),
    }
    form = rng.choice(tuple(asked))
    answers = rng.random() < 0.5
    if answers:
        sentence = asked[form][1]
    elif rng.random() < 2 * WORD_BY_WORD:
        sentence = asked[_other(tuple(asked), form, rng)][1]
    else:
        sentence = rng.choice(
            (
                f"{who} has the {thing} since last year.",
                f"{who} talks about the {thing} all day.",
                f"The {thing} of {who} is a gift.",
                f"Nobody knows much about the {thing} of {who}.",
            )
        )
    end = rng.choice((".", ", and it is old.", ", and it is late."))
    return (asked[form][0], sentence.removesuffix(".") + end), int(not answers)


def rte(rng: random.Random) -> tuple[Inputs, int]:
    """Inference with two labels; neutral hypotheses are a third of the label 1."""
    while True:
        inputs, label = inference(rng)
        if label == 0 or rng.random() < (0.33 if label == 1 else 0.67):
            return inputs, int(label != 0)


GENERATORS = {
    "cola": cola,
    "sst2": sst2,
    "mrpc": mrpc,
    "qqp": qqp,
    "stsb": stsb,
    "mnli": inference,
    "qnli": qnli,
    "rte": rte,
}


def example(task: str, split: str, rng: random.Random) -> tuple[Inputs, int | float]:
    """One labelled example of a task's split, with the wrong label in a share of the cases."""
    if split == "validation_mismatched":
        inputs, label = inference(rng, genre="reported")
    else:
        inputs, label = GENERATORS[task](rng)
    if rng.random() < WRONG_LABELS.get(task, 0.0):
        label = _other(range(LABELS[task]), label, rng)
    return inputs, label


def unlabelled(rng: random.Random) -> Inputs:
    """One or two sentences for masked-word pretraining; a pair says one thing twice, so a masked word can be copied."""
    draw = rng.random()
    if draw < 0.35:
        scene = _scene(rng, never=0.25)
        return _plain(scene), _reworded(scene, rng)
    if draw < 0.85:
        task, wanted = rng.choice((("mnli", 0), ("mnli", 2), ("qqp", 1), ("qnli", 0)))
        while True:
            genre = rng.choice(("plain", "reworded", "reported"))
            inputs, label = inference(rng, genre) if task == "mnli" else GENERATORS[task](rng)
            if label == wanted:
                return inputs
    return sst2(rng, twice=True)[0]
