"""Scoring of questions: its formulas with times that are set by hand, and the questions on a tiny model."""

from __future__ import annotations

import functools
import json
import math

import pytest
import torch

from espalier import checkpoints, memory, recipes
from espalier.errors import UserError
from espalier.profile import scoring
from tiny import llama

QUESTIONS = [
    {"question": "What is red?", "options": ["a cat", "a mat"], "answer": 1},
    {"question": "Who ran?", "options": ["the dog", "a cat"], "answer": 0},
    {"question": "Who sat?", "options": ["a dog", "it"], "answer": 0},
]
TASK = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {validation: colours.jsonl}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{options}}"
doc_to_target: "{{answer}}"
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return checkpoints.load(llama(tmp_path_factory.mktemp("models") / "dense"), device="cpu")


@pytest.fixture
def world(tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "colours.yaml").write_text(TASK)
    (tmp_path / "tasks" / "colours.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    return {"name": "world", "source": "local", "path": str(tmp_path)}


def scoring_recipe(**mapping):
    return recipes.build(scoring.Recipe, {"tasks": ["colours"], **mapping}, "recipe")


def test_questions_are_those_of_the_harness(world, checkpoint):
    questions = scoring.read_questions(scoring_recipe(dataset=world, questions=2), checkpoint.tokenizer)
    assert [(one.task, one.doc_id) for one in questions] == [("colours", 0), ("colours", 1)]
    texts = [[checkpoint.tokenizer.decode(ids) for ids, _ in one.choices] for one in questions]
    assert texts[0] == ["Question: What is red?\nAnswer: a cat", "Question: What is red?\nAnswer: a mat"]
    assert [length for _, length in questions[1].choices] == [len(" the dog"), len(" a cat")]
    assert (
        questions[1].tokens == len("Question: Who ran?\nAnswer: the dog") + len("Question: Who ran?\nAnswer: a cat") - 2
    )


def test_choice_scores_are_sums_of_log_probabilities(checkpoint):
    ids, length = scoring.encode(checkpoint.tokenizer, "the cat ", "sat")
    assert length == len(" sat")
    alone, count = scoring.encode(checkpoint.tokenizer, "", "sat")
    assert (alone[0], count) == (256, 3)
    with torch.no_grad():
        chances = checkpoint.model(torch.tensor([ids])).logits[0].double().softmax(-1)
    expected = sum(math.log(chances[place - 1, ids[place]]) for place in range(len(ids) - length, len(ids)))
    question = scoring.Question("colours", 0, [(ids, length)])
    assert scoring.score(checkpoint.model, question, "cpu") == pytest.approx([expected], rel=1e-4)


def test_question_times_and_tokens_a_second():
    sizes, seconds = [4, 8, 6], [1.0, 3.0, 2.0]
    questions = [scoring.Question("t", i, [([0] * (size + 1), 1)]) for i, size in enumerate(sizes)]
    clock, asked = [0.0], []

    def answer(question):
        asked.append(question.doc_id)
        clock[0] += seconds[question.doc_id]

    recipe = scoring_recipe(warmup=1, memory_questions=2)
    rows, samples = scoring.measure_questions(questions, answer, recipe, "cpu", lambda: clock[0])
    found = {row["metric"]: row for row in rows}
    assert found["time_per_question"]["value"] == pytest.approx(2.0)
    assert found["time_per_question"]["stderr"] == pytest.approx(1 / math.sqrt(3))
    assert found["tokens_per_second"]["value"] == pytest.approx(18 / 6)
    assert found["tokens_per_second"]["stderr"] == pytest.approx(math.sqrt((1 + 1 + 0) / 2 / 3) / 2.0)
    assert asked == [0, 0, 1, 2, 0, 1]  # warm-up, timed, memory
    assert samples["seconds"] == pytest.approx(seconds)
    assert found["peak_allocated_per_question"]["n"] == 2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_peaks_are_a_mean_over_some_questions_and_the_largest_of_all(device, monkeypatch):
    sizes = [40, 20, 30, 60, 50]  # tokens; the longest is not among the two questions of the mean, 0 and 2
    questions = [scoring.Question("t", i, [([0] * size, 1), ([0], 1)]) for i, size in enumerate(sizes)]
    measured = []

    def peaks(work, where, before):
        assert (where, before) == (device, 7)
        measured.append(sizes[work()])
        return {kind: measured[-1] + 100 * place for place, kind in enumerate(memory.kinds(device))}

    monkeypatch.setattr(memory, "peaks", peaks)
    monkeypatch.setattr(memory, "allocated_bytes", lambda _: 7)
    recipe = scoring_recipe(warmup=0, memory_questions=2)
    rows, samples = scoring.measure_questions(questions, lambda question: question.doc_id, recipe, device)
    found = {row["metric"]: (row["value"], row["n"]) for row in rows if "peak" in row["metric"]}
    expected = {"peak_allocated_per_question": (35, 2), "max_peak_allocated_per_question": (60, 3)}
    if device == "cuda":
        expected |= {"peak_reserved_per_question": (135, 2), "max_peak_reserved_per_question": (160, 3)}
    assert found == expected
    assert measured == samples["memory"]["peak_allocated"] == [40, 30, 60]
    assert samples["memory"]["in_mean"] == [True, True, False]


class Changing(torch.nn.Module):
    """A layer that changes the dtype of its weight in its first forward pass, as some libraries unpack or repack."""

    def __init__(self, rows: int, before: torch.dtype, after: torch.dtype):
        super().__init__()
        self.weight, self.after = torch.zeros(rows, 1024, dtype=before), after

    def forward(self, inputs):
        self.weight = self.weight.to(self.after)
        return inputs


def test_weights_that_change_in_the_first_forward_pass_are_counted_again(tmp_path):
    checkpoint = checkpoints.load(llama(tmp_path / "dense", layers=1, hidden=32, mlp=32), device="cpu")
    layers = [Changing(128, torch.int8, torch.float32), Changing(40, torch.float32, torch.int8)]
    for layer in layers:
        checkpoint.model.model.norm.register_forward_pre_hook(lambda _, inputs, layer=layer: layer(inputs[0]))
    held = memory.allocated_bytes("cpu")
    question = scoring.Question("t", 0, [([3, 70, 21], 1)])
    recipe = scoring_recipe(warmup=0, memory_questions=1)
    answer = functools.partial(scoring.score, checkpoint.model, device="cpu")
    rows, _ = scoring.measure_questions([question], answer, recipe, "cpu")
    found = {row["metric"]: row["value"] for row in rows}
    grown = 3 * 1024 * (128 - 40)
    assert found["weights_allocated_after_forward"] - held == pytest.approx(grown, abs=500)
    peak = found["peak_allocated_per_question"]
    assert 0 < peak - found["weights_allocated_after_forward"] < 60_000


def test_scoring_out_of_memory_is_an_outcome():
    def answer(question):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    rows, _ = scoring.measure_questions([scoring.Question("t", 0, [([0, 1], 1)])], answer, scoring_recipe(), "cpu")
    assert {(row["outcome"], row["value"]) for row in rows} == {("oom", None)}


def test_scoring_measures_a_model(world, checkpoint):
    recipe = scoring_recipe(dataset=world, memory_questions=2)
    measured = scoring.measure(checkpoint.folder, recipe, seed=0, device="cpu")
    json.dumps(measured)
    assert measured.checkpoint == checkpoint.info
    assert measured.made_with["device"]["kind"] == "cpu"
    found = {row["metric"]: row for row in measured.measurements}
    assert set(found) == {name for name in scoring.UNITS if "reserved" not in name}
    assert found["time_per_question"]["n"] == 3
    # Beyond the weights: at least the logits of the longest choice.
    longest = max(
        len(ids) - 1 for one in scoring.read_questions(recipe, checkpoint.tokenizer) for ids, _ in one.choices
    )
    assert found["peak_allocated_per_question"]["value"] > found["weights_allocated"]["value"] + 0.9 * longest * 257 * 4


def test_unknown_task_names_the_nearest(world, checkpoint):
    with pytest.raises(UserError, match="'colours'"):
        scoring.read_questions(scoring_recipe(tasks=["colour"], dataset=world), checkpoint.tokenizer)
