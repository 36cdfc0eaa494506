"""The evaluators against scoring written out by hand, on tiny random models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from espalier import checkpoints, glue_tasks
from espalier.data import Dataset
from espalier.errors import UserError
from espalier.evaluate import glue, harness, perplexity
from espalier.recipes import build

WORDS = "red green blue robin tulip the is a has wing leaf which what not same other yes no".split()  # noqa: SIM905
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "<s>", "eos_token": "</s>"}
TASK = """
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {task}.jsonl
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{question}}}}?"
doc_to_target: label
doc_to_choice: choices
metric_list:
{metrics}
"""


def word_tokenizer(bos: bool = False, pairs: bool = False) -> PreTrainedTokenizerFast:
    names = [*SPECIAL.values(), "[CLS]", "[SEP]", *WORDS, "?", "."]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    if pairs:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 4), ("[SEP]", 5)]
        )
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if pairs else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **SPECIAL)


def decoder(bos: bool = False, seed: int = 0) -> checkpoints.Checkpoint:
    tokenizer = word_tokenizer(bos)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    model = LlamaForCausalLM(config).eval()
    return checkpoints.Checkpoint(model, tokenizer, {"task": "causal-lm"}, Path("decoder"), "cpu")


def classifier(labels: int) -> checkpoints.Checkpoint:
    tokenizer = word_tokenizer(pairs=True)
    torch.manual_seed(7 * labels)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
        num_labels=labels,
    )
    model = BertForSequenceClassification(config).eval()
    return checkpoints.Checkpoint(model, tokenizer, {"task": "sequence-classification"}, Path("classifier"), "cpu")


def sentence(draw: numpy.random.Generator, longest: int = 8) -> str:
    return " ".join(draw.choice(WORDS, size=draw.integers(1, longest)))


def write(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# The harness ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict:
    """Two tasks of 40 questions: `long` has choices of 1 to 5 words and both metrics, `short` has acc only."""
    folder, draw = tmp_path_factory.mktemp("world"), numpy.random.default_rng(0)
    for task, longest, metrics in (("long", 6, ("acc", "acc_norm")), ("short", 2, ("acc",))):
        rows = [
            {
                "question": sentence(draw),
                "choices": [sentence(draw, longest) for _ in range(4)],
                "label": int(draw.integers(4)),
            }
            for _ in range(40)
        ]
        write(folder / "tasks" / f"{task}.jsonl", rows)
        listed = "\n".join(f"  - metric: {metric}" for metric in metrics)
        (folder / "tasks" / f"{task}.yaml").write_text(TASK.format(task=task, metrics=listed), encoding="utf-8")
    return {"name": "world", "source": "local", "path": str(folder)}


def harness_recipe(world: dict, tasks: list[str], **options) -> harness.Recipe:
    return build(harness.Recipe, {"tasks": tasks, "dataset": world, **options}, "suite")


def log_likelihood(checkpoint: checkpoints.Checkpoint, context: str, choice: str) -> float:
    """The choice's tokens one at a time, each predicted from everything before it."""
    whole = checkpoint.tokenizer(context + " " + choice)["input_ids"]
    total = 0.0
    for position in range(len(checkpoint.tokenizer(context)["input_ids"]), len(whole)):
        with torch.no_grad():
            logits = checkpoint.model(input_ids=torch.tensor([whole[:position]])).logits[0, -1].double()
        total += (logits[whole[position]] - torch.logsumexp(logits, 0)).item()
    return total


@pytest.mark.parametrize("bos", [False, True])
def test_harness_equals_scoring_by_hand(world, bos):
    checkpoint = decoder(bos)
    measured = harness.measure(checkpoint, harness_recipe(world, ["long", "short"]), seed=0, device="cpu")
    for task in ("long", "short"):
        expected = {"acc": [], "acc_norm": []}
        for row in Dataset(**world).rows(task, "tasks"):
            scores = [log_likelihood(checkpoint, row["question"] + "?", choice) for choice in row["choices"]]
            by_length = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
            for metric, values in (("acc", scores), ("acc_norm", by_length)):
                expected[metric].append(int(values.index(max(values)) == row["label"]))
        found = measured.samples[task]
        assert found["doc_ids"] == list(range(40))
        assert found["acc"] == expected["acc"]
        if task == "long":
            assert found["acc_norm"] == expected["acc_norm"]
            assert found["acc"] != found["acc_norm"], "the data cannot tell the two metrics apart"
    assert "acc_norm" not in measured.samples["short"]
    assert [(one["task"], one["metric"]) for one in measured.measurements] == [
        ("long", "acc"),
        ("long", "acc_norm"),
        ("short", "acc"),
    ]


def test_special_tokens_are_the_tokenizer_s(world, monkeypatch):
    seen = []
    plain = LlamaForCausalLM.forward

    def forward(self, input_ids=None, **options):
        seen.append(input_ids[:, 0].tolist())
        return plain(self, input_ids=input_ids, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    for bos in (True, False):
        seen.clear()
        checkpoint = decoder(bos)
        harness.measure(checkpoint, harness_recipe(world, ["short"], limit=5), seed=0, device="cpu")
        first = {token for batch in seen for token in batch}
        assert (first == {checkpoint.tokenizer.bos_token_id}) is bos


def test_batch_size_and_limit(world):
    checkpoint = decoder()
    one = harness.measure(checkpoint, harness_recipe(world, ["long"], batch_size=1), seed=0, device="cpu")
    many = harness.measure(checkpoint, harness_recipe(world, ["long"]), seed=1, device="cpu")
    assert one == many
    few = harness.measure(checkpoint, harness_recipe(world, ["long"], limit=7), seed=0, device="cpu")
    assert few.samples["long"] == {key: values[:7] for key, values in many.samples["long"].items()}
    assert few.measurements[0]["n"] == 7


def test_standard_error_is_the_harness_s_and_its_state_is_restored(world):
    import lm_eval.utils
    from lm_eval.api.metrics import mean_stderr

    compiled = lm_eval.utils.env.from_string
    measured = harness.measure(decoder(), harness_recipe(world, ["long"]), seed=0, device="cpu")
    assert lm_eval.utils.env.from_string == compiled
    for one in measured.measurements:
        outcomes = measured.samples["long"][one["metric"]]
        assert one["value"] == sum(outcomes) / 40
        assert 0 < one["value"] < 1
        assert one["stderr"] == pytest.approx(mean_stderr(outcomes), rel=1e-12)
        assert (one["n"], one["unit"]) == (40, "fraction")


def test_harness_names_a_wrong_task_or_file(world, tmp_path):
    with pytest.raises(UserError, match="Did you mean 'short'"):
        harness.measure(decoder(), harness_recipe(world, ["shrot"]), seed=0, device="cpu")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "bad.yaml").write_text("task: bad\n", encoding="utf-8")
    recipe = harness_recipe({**world, "path": str(tmp_path)}, ["bad"])
    with pytest.raises(UserError, match=r"bad\.yaml"):
        harness.measure(decoder(), recipe, seed=0, device="cpu")
    with pytest.raises(UserError, match="none twice"):
        harness_recipe(world, ["long", "long"])


# Perplexity -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict:
    folder, draw = tmp_path_factory.mktemp("texts"), numpy.random.default_rng(1)
    blank = {3: "", 11: " ", 24: ""}  # such as WikiText has: they are joined too
    write(folder / "heldout.jsonl", [{"text": blank.get(row, sentence(draw, 30))} for row in range(28)])
    return {"dataset": {"name": "words", "source": "local", "path": str(folder)}, "split": "heldout"}


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("template", [True, False])
def test_perplexity_equals_a_loop_over_tokens(texts, bos, template):
    checkpoint = decoder(template)  # whatever the tokenizer adds by itself must not count
    options = {"window": 14, "bos_first_window": bos, "batch_size": 3, "joiner": " . "}
    recipe = build(perplexity.Recipe, {"text": texts, **options}, "suite")
    measured = perplexity.measure(checkpoint, recipe, seed=0, device="cpu")

    lines = (Path(texts["dataset"]["path"]) / "heldout.jsonl").read_text().splitlines()
    text = " . ".join(json.loads(line)["text"] for line in lines)
    ids = [checkpoint.tokenizer.convert_tokens_to_ids(word) for word in text.split()]
    ids = [2, *ids] if bos else ids
    losses = []
    for start in range(0, len(ids) - 13, 14):
        window = ids[start : start + 14]
        losses.append([])
        for position in range(1, 14):
            with torch.no_grad():
                logits = checkpoint.model(input_ids=torch.tensor([window[:position]])).logits[0, -1].double()
            losses[-1].append((torch.logsumexp(logits, 0) - logits[window[position]]).item())
    assert len(ids) % 14, "no incomplete window to drop"
    (one,), samples, *_ = measured
    assert samples["words"]["nll"] == pytest.approx([sum(window) for window in losses], rel=1e-5)
    assert samples["words"]["tokens"] == [13] * len(losses)
    means = numpy.mean(losses, axis=1)
    assert one["n"] == 13 * len(losses)
    assert one["value"] == pytest.approx(math.exp(means.mean()), rel=1e-5)
    assert one["stderr"] == pytest.approx(one["value"] * means.std(ddof=1) / math.sqrt(len(means)), rel=1e-4)
    assert (one["task"], one["metric"], one["unit"]) == ("words", "perplexity", "ppl")


def test_perplexity_of_a_broken_model_is_undefined_and_json(texts):
    checkpoint = decoder()
    with torch.no_grad():
        checkpoint.model.lm_head.weight.fill_(float("nan"))
    recipe = build(perplexity.Recipe, {"text": texts, "window": 16}, "suite")
    measured = perplexity.measure(checkpoint, recipe, seed=0, device="cpu")
    assert measured.measurements[0]["value"] is None
    assert measured.measurements[0]["outcome"].startswith("undefined")
    json.dumps(measured.samples, allow_nan=False)


def test_perplexity_refuses_too_short_a_text_and_a_missing_bos(texts):
    checkpoint = decoder()
    recipe = build(perplexity.Recipe, {"text": texts, "window": 4096}, "suite")
    with pytest.raises(UserError, match="fewer than one window"):
        perplexity.measure(checkpoint, recipe, seed=0, device="cpu")
    checkpoint.tokenizer.bos_token = None
    with pytest.raises(UserError, match="bos_first_window"):
        perplexity.measure(checkpoint, recipe, seed=0, device="cpu")


# GLUE -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory) -> dict:
    folder, draw = tmp_path_factory.mktemp("benchmark"), numpy.random.default_rng(2)
    for name, task in glue_tasks.TASKS.items():
        for split in task.splits.values():
            rows = []
            for i in range(50):
                label = float(draw.random() * 5) if task.labels == 1 else int(draw.integers(task.labels))
                rows.append({**{column: sentence(draw) for column in task.columns}, "label": label, "idx": i})
            write(folder / "glue" / name / f"{split}.jsonl", rows)
    return {"name": "words", "source": "demo", "path": str(folder)}


def by_hand(metric: str, predictions: list, labels: list) -> float:
    """The metrics from their definitions."""
    p, y = numpy.array(predictions, dtype=float), numpy.array(labels, dtype=float)
    if metric == "accuracy":
        return float((p == y).mean())
    tp, tn = ((p == 1) & (y == 1)).sum(), ((p == 0) & (y == 0)).sum()
    fp, fn = ((p == 1) & (y == 0)).sum(), ((p == 0) & (y == 1)).sum()
    if metric == "f1":
        return 2 * tp / (2 * tp + fp + fn)
    if metric == "mcc":
        return (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    if metric == "spearman":
        p, y = p.argsort().argsort().astype(float), y.argsort().argsort().astype(float)
    return float(((p - p.mean()) * (y - y.mean())).mean() / (p.std() * y.std()))


@pytest.mark.parametrize("name", list(glue_tasks.TASKS))
def test_glue_equals_scoring_by_hand(benchmark, name, monkeypatch):
    monkeypatch.setattr(checkpoints, "weight_bytes", lambda folder: 123)  # this one has no files
    task = glue_tasks.TASKS[name]
    checkpoint = classifier(task.labels)
    recipe = build(glue.Recipe, {"task": name, "dataset": benchmark, "batch_size": 7}, "suite")
    measured = glue.measure(checkpoint, recipe, seed=0, device="cpu")
    allocated, on_disk, *measurements = measured.measurements
    assert allocated["value"] >= sum(one.nbytes for one in checkpoint.model.parameters())
    assert on_disk == {"task": name, "metric": "weights_on_disk", "value": 123, "unit": "bytes"}
    expected = [(reported, metric) for reported in task.splits for metric in task.metrics]
    assert [(one["task"], one["metric"]) for one in measurements] == expected
    for reported, split in task.splits.items():
        rows, predictions = Dataset(**benchmark).rows(split, f"glue/{name}"), []
        for row in rows:
            inputs = checkpoint.tokenizer(*(row[column] for column in task.columns), return_tensors="pt")
            with torch.no_grad():
                logits = checkpoint.model(**inputs).logits[0]
            predictions.append(logits.item() if task.labels == 1 else logits.argmax().item())
        labels = [row["label"] for row in rows]
        assert measured.samples[reported]["labels"] == labels
        assert measured.samples[reported]["predictions"] == pytest.approx(predictions, abs=1e-5)
        assert len({round(one, 4) for one in predictions}) > 1
        for one in measurements:
            if one["task"] == reported:
                assert one["value"] == pytest.approx(by_hand(one["metric"], predictions, labels), abs=1e-6)
                assert (one["n"], one["unit"]) == (50, "fraction")


def test_glue_refuses_a_checkpoint_of_another_task(benchmark):
    recipe = build(glue.Recipe, {"task": "mnli", "dataset": benchmark}, "suite")
    with pytest.raises(UserError, match="gives 2 outputs, but GLUE task mnli needs 3"):
        glue.measure(classifier(2), recipe, seed=0, device="cpu")
    other = classifier(3)
    other.info["glue_task"] = "cola"
    with pytest.raises(UserError, match="trained for GLUE task cola"):
        glue.measure(other, recipe, seed=0, device="cpu")


def test_glue_rows_are_checked(tmp_path):
    dataset = Dataset("words", "local", str(tmp_path))
    write(tmp_path / "rte" / "validation.jsonl", [{"sentence1": "a", "sentence2": "b", "label": 2}])
    with pytest.raises(UserError, match="label 2 in row 1"):
        glue_tasks.rows(dataset, "rte", "validation")
    write(tmp_path / "rte" / "validation.jsonl", [{"sentence1": "a", "sentense2": "b", "label": 0}])
    with pytest.raises(UserError, match="Did you mean 'sentense2'"):
        glue_tasks.rows(dataset, "rte", "validation")
