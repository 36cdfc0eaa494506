"""Teachers for GLUE: BERT, RoBERTa and DistilBERT with a head, tuned here or given, and the task that they are for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from espalier import checkpoints, glue_chains, glue_tasks
from espalier.config import Step
from espalier.errors import UserError
from espalier.evaluate import glue
from espalier.recipes import build
from espalier.study import Study
from espalier.tune import classify
from hub_encoders import LONGEST, WORDS, encoder


def described(folder: Path, task: str = "masked-lm") -> Path:
    checkpoints.write_description(folder, {"task": task, "parameters": 1})
    return folder


def write(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# The three families -------------------------------------------------------------------------------------------------

PAIRS = [
    {"premise": "the robin is red", "hypothesis": "a wing"},
    {"premise": "yes", "hypothesis": "no"},
    {"premise": "what is the robin not", "hypothesis": "the tulip has a blue leaf yes it is"},
    {"premise": "no yes " * 20, "hypothesis": "good"},
]


def alone(family: str, model, tokenizer, *texts: str) -> torch.Tensor:
    """Return the logits of one pair of texts, whose inputs are put together by hand."""
    first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    between = 2 if family == "roberta" else 1
    while len(first) + len(second) > LONGEST[family] - 2 - between:
        max(first, second, key=len).pop()
    start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    ids = [start, *first, *[end] * between, *second, end]
    inputs = {"input_ids": torch.tensor([ids])}
    if family == "bert":
        inputs["token_type_ids"] = torch.tensor([[0] * (len(first) + 2) + [1] * (len(second) + 1)])
    if family != "distilbert":
        begin = 2 if family == "roberta" else 0
        inputs["position_ids"] = torch.arange(begin, begin + len(ids))[None]
    with torch.no_grad():
        return model(**inputs).logits[0]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", LONGEST)
def test_a_padded_batch_gives_what_each_row_gives_alone(tmp_path, family, attention):
    folder = described(encoder(tmp_path / "model", family))
    found = checkpoints.load(folder, "cpu", "sequence-classification", num_labels=3, attn_implementation=attention)
    items = glue_tasks.encode(found, "mnli", PAIRS, 64)
    lengths = [len(item["input_ids"]) for item in items]
    assert max(lengths) == LONGEST[family] > min(lengths), "the last one is as long as the model allows"
    assert {"token_type_ids" in item for item in items} == {family == "bert"}
    with torch.no_grad():
        together = found.model(**glue_tasks.pad(found.tokenizer, items, "cpu")).logits
    expected = torch.stack([alone(family, found.model, found.tokenizer, *row.values()) for row in PAIRS])
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    torch.testing.assert_close(together, expected, rtol=0, atol=2e-6)
    shorter = glue_tasks.encode(found, "mnli", PAIRS, 10)
    assert max(len(item["input_ids"]) for item in shorter) == 10


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> dict:
    """Tasks that a word decides."""
    folder, draw = tmp_path_factory.mktemp("tasks"), torch.Generator().manual_seed(0)

    def words() -> str:
        count = int(torch.randint(1, 8, (), generator=draw))
        return " ".join(WORDS[i] for i in torch.randint(13, (count,), generator=draw))

    for split, count in (("train", 64), ("validation", 36)):
        rows = [{"sentence": f"{('bad', 'good')[i % 2]} {words()}", "label": i % 2} for i in range(count)]
        write(folder / "glue/sst2" / f"{split}.jsonl", rows)
        rows = [
            {"sentence1": f"{('no', 'robin', 'yes')[i % 3]} {words()}", "sentence2": words(), "label": 2.5 * (i % 3)}
            for i in range(count)
        ]
        write(folder / "glue/stsb" / f"{split}.jsonl", rows)
    return {"name": "tasks", "source": "local", "path": str(folder)}


@pytest.mark.parametrize(
    ("family", "task", "metric", "names"),
    [
        ("roberta", "stsb", "pearson", {0: "LABEL_0"}),
        ("roberta", "sst2", "accuracy", {0: "negative", 1: "positive"}),
        ("distilbert", "sst2", "accuracy", {0: "negative", 1: "positive"}),
    ],
)
def test_an_encoder_of_any_family_becomes_a_teacher(tasks, tmp_path, family, task, metric, names):
    """Of BERT see test_tune.py."""
    parent, teacher = described(encoder(tmp_path / "parent", family)), tmp_path / "teacher"
    teacher.mkdir()
    training = {"task": task, "dataset": tasks, "epochs": 10, "batch_size": 16, "learning_rate": 5.0e-3}
    classify.apply(parent, teacher, build(classify.Recipe, training, "recipe"), seed=0, device="cpu")
    found = checkpoints.load(teacher, "cpu")
    assert found.model.config.id2label == names
    suite = build(glue.Recipe, {"task": task, "dataset": tasks}, "suite")
    scores = {one["metric"]: one["value"] for one in glue.measure(found, suite, seed=0, device="cpu").measurements}
    assert scores[metric] > 0.9


@pytest.mark.parametrize("family", LONGEST)
def test_a_given_classifier_is_a_teacher_as_it_is(tasks, tmp_path, family):
    source = encoder(tmp_path / "given", family, AutoModelForSequenceClassification, num_labels=1)
    entry = {"path": str(source), "task": "sequence-classification"}
    study = one_study(entry, {}, "dense", "stsb", tasks["path"])
    (tmp_path / "pointer").mkdir()
    checkpoints.refer(tmp_path / "pointer", json.loads(study.reference("m")))
    found = checkpoints.load(tmp_path / "pointer", "cpu")
    suite = study.step("suites", "glue").recipe
    model = AutoModelForSequenceClassification.from_pretrained(source).eval()
    rows = glue_tasks.rows(suite.dataset, "stsb", "validation")
    expected = [alone(family, model, found.tokenizer, row["sentence1"], row["sentence2"]).item() for row in rows]
    assert max(expected) - min(expected) > 0.01
    assert glue.predict(found, suite, rows, "cpu") == pytest.approx(expected, abs=2e-6)
    assert found.info["parameters"] == sum(one.numel() for one in model.parameters())


# For which task -----------------------------------------------------------------------------------------------------

THREE, TWO = ["LABEL_0", "LABEL_1", "LABEL_2"], ["LABEL_0", "LABEL_1"]
NAMES = [
    ("cola", ["unacceptable", "acceptable"], ""),
    ("cola", ["acceptable", "unacceptable"], "are, in this order, unacceptable, acceptable"),
    ("cola", ["wrong", "right"], ""),
    ("cola", THREE, "gives 3 outputs, but GLUE task cola needs 2"),
    ("mnli", ["ENTAILMENT", "NEUTRAL", "CONTRADICTION"], ""),
    ("mnli", ["contradiction", "neutral", "entailment"], "are contradiction, neutral, entailment, but the labels"),
    ("mnli", ["LABEL_0", "contradiction", "LABEL_2"], "in this order, entailment, neutral, contradiction"),
    ("mnli", THREE, ""),
    ("mnli", TWO, "gives 2 outputs, but GLUE task mnli needs 3"),
    ("mrpc", ["not equivalent", "Equivalent"], ""),
    ("mrpc", ["equivalent", "not-equivalent"], "in this order, not_equivalent, equivalent"),
    ("qnli", ["entailment", "not_entailment"], ""),
    ("qnli", ["not_entailment", "entailment"], "in this order, entailment, not_entailment"),
    ("qqp", ["not_duplicate", "duplicate"], ""),
    ("qqp", ["Duplicate", "Not-Duplicate"], "in this order, not_duplicate, duplicate"),
    ("rte", ["Entailment", "Not Entailment"], ""),
    ("rte", ["NOT_ENTAILMENT", "ENTAILMENT"], "in this order, entailment, not_entailment"),
    ("sst2", ["NEGATIVE", "POSITIVE"], ""),
    ("sst2", ["POSITIVE", "NEGATIVE"], "in this order, negative, positive"),
    ("stsb", ["LABEL_0"], ""),
    ("stsb", TWO, "gives 2 outputs, but GLUE task stsb needs 1"),
]


@pytest.mark.parametrize(("task", "names", "message"), NAMES)
def test_outputs_in_another_order_than_glues_are_refused(task, names, message):
    numbered = dict(enumerate(names))
    if not message:
        glue_tasks.check_labels(numbered, task, "The checkpoint")
    else:
        with pytest.raises(UserError, match=message):
            glue_tasks.check_labels(numbered, task, "The checkpoint")


def test_a_teacher_of_another_order_is_not_scored(tmp_path):
    labels = {"id2label": {0: "contradiction", 1: "neutral", 2: "entailment"}}
    folder = encoder(tmp_path / "model", "roberta", AutoModelForSequenceClassification, num_labels=3, **labels)
    found = checkpoints.load(described(folder, "sequence-classification"), "cpu")
    suite = build(glue.Recipe, {"task": "mnli", "dataset": {"name": "d", "source": "local", "path": "absent"}}, "suite")
    with pytest.raises(UserError, match=f"{folder} says .* are contradiction, neutral, entailment, but the labels of"):
        glue.measure(found, suite, seed=0, device="cpu")


def one_study(model: dict, recipes: dict, chain: str, task: str, data: str | None = None) -> Study:
    """A study of one chain that is scored on one task; without `data`, on that of the hub."""
    source = {"path": data} if data else {"hub": "someone/glue", "revision": "b" * 40}
    mapping = {
        "study": "s",
        "models": {"m": model},
        "datasets": {"glue": source},
        "recipes": {name: {**keys, "dataset": "glue", "steps": 1} for name, keys in recipes.items()},
        "suites": {"glue": {"evaluate": "glue", "task": task, "dataset": "glue"}},
        "figures": {},
        "measure": [{"model": "m", "chains": [chain], "suites": ["glue"]}],
    }
    return Study(mapping, file="s.yaml")


HUB = {"hub": "someone/bert", "revision": "a" * 40}
COLA = {"cola": {"tune": "classify", "task": "cola"}}
STUDENT = {"student": {"quantize": "xtc", "bits": 1, "task": "cola"}}
MNLI_STUDENT = {"student": {"quantize": "xtc", "bits": 1, "task": "mnli"}}
HERE = r"^s.yaml: measure\[0\]: the chain "
CHAINS = {
    "a teacher, its student and its suite": ("masked-lm", COLA | STUDENT, "dense+cola+student", "cola", ""),
    "a suite of another task": (
        "masked-lm",
        COLA,
        "dense+cola",
        "mnli",
        f"{HERE}'dense.cola' of m: suites.glue is for GLUE task mnli, but recipes.cola is for cola",
    ),
    "a suite of another task than the student's": (
        "sequence-classification",
        STUDENT,
        "dense+student",
        "rte",
        f"{HERE}'dense.student' of m: suites.glue is for GLUE task rte, but recipes.student is for cola",
    ),
    "a student of another task": (
        "masked-lm",
        COLA | MNLI_STUDENT,
        "dense+cola+student",
        "mnli",
        f"{HERE}'dense.cola.student' of m: recipes.student is for GLUE task mnli, but recipes.cola is for cola",
    ),
}


@pytest.mark.parametrize("case", CHAINS)
def test_a_chain_of_two_tasks_is_refused_before_any_job(case):
    kind, recipes, chain, task, message = CHAINS[case]
    if not message:
        assert one_study(HUB | {"task": kind}, recipes, chain, task).raw_results()
    else:
        with pytest.raises(UserError, match=message):
            one_study(HUB | {"task": kind}, recipes, chain, task)


LOCAL = {
    "two outputs, of which transformers writes nothing": ({}, {}, {}, "cola", ""),
    "too few for the suite": (
        {},
        {},
        {},
        "mnli",
        r"suites.glue: the model models.m \(.*\) gives 2 outputs, but GLUE task mnli needs 3",
    ),
    "too many for a recipe": (
        {"id2label": {"0": "a", "1": "b", "2": "c"}},
        {},
        STUDENT,
        "cola",
        r"recipes.student: the model models.m \(.*\) gives 3 outputs, but GLUE task cola needs 2",
    ),
    "their order": (
        {"id2label": {"0": "not_entailment", "1": "entailment"}},
        {},
        {},
        "rte",
        r"suites.glue: the model models.m \(.*\) says .* are not_entailment, entailment, but the labels of GLUE task",
    ),
    "an old config's number": ({"num_labels": 3}, {}, {}, "mnli", ""),
    "trained here for another task": (
        {},
        {"glue_task": "qnli"},
        {},
        "rte",
        "suites.glue is for GLUE task rte, but models.m is for qnli",
    ),
}


@pytest.mark.parametrize("case", LOCAL)
def test_a_local_classifier_of_another_task_is_refused_before_any_job(tmp_path, case):
    config, description, recipes, task, message = LOCAL[case]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 32, **config}))
    if description:
        (tmp_path / "espalier.json").write_text(json.dumps(description))
    model = {"path": str(tmp_path), "task": "sequence-classification"}
    chain = "+".join(["dense", *recipes])
    if not message:
        assert one_study(model, recipes, chain, task).raw_results()
    else:
        with pytest.raises(UserError, match=rf"{HERE}'{chain.replace('+', '.')}' of m: {message}"):
            one_study(model, recipes, chain, task)


def test_a_key_task_of_another_method_is_none_of_glues():
    @dataclass(frozen=True)
    class Other:
        task: str

    glue_chains.check_data([Step("mine", "evaluate", "mine", Other("translation"), {}, [])], "study.yaml")
