"""Formulas of the timings with a clock that is set by hand, and the engine and the questions on a tiny model."""

from __future__ import annotations

import functools
import json
import math
from types import SimpleNamespace

import pytest
import torch

from espalier import checkpoints, memory, plugins, recipes
from espalier.engines import hf
from espalier.errors import UserError
from espalier.profile import generation, scoring
from espalier.profile import memory as memory_workload
from espalier.prompts import prompt
from espalier.tables import COLUMNS
from tiny import llama


class FakeEngine:
    """An engine whose prompt takes 1 s, whose tokens take 0.1 s each, and that holds at most `room` tokens."""

    name = "fake"

    def __init__(self, room: float = math.inf, error: Exception | None = None, extra: int = 0, device: str = "cpu"):
        self.device = device
        self.room, self.error, self.extra = room, error or torch.OutOfMemoryError("CUDA out of memory."), extra
        self.now, self.calls, self.jitter = 0.0, [], iter(())

    def clock(self) -> float:
        return self.now

    def generate(self, token_ids, output_tokens, sampling):
        batch, length = len(token_ids), len(token_ids[0])
        assert all(row == token_ids[0] for row in token_ids)
        self.calls.append((length, output_tokens, batch))
        if batch * (length + output_tokens) > self.room:
            raise self.error
        self.now += 1 + 0.1 * (output_tokens - 1) + next(self.jitter, 0.0)
        return [[0] * (output_tokens + self.extra)] * batch

    def load(self, checkpoint):
        pass

    def allocated_bytes(self):
        return 500 if self.calls else 900  # as a library that repacks weights when it first needs them

    def peaks(self, token_ids, output_tokens, sampling):
        self.generate(token_ids, output_tokens, sampling)
        return {
            kind: size * len(token_ids) for kind, size in zip(memory.kinds(self.device), (1000, 1024), strict=False)
        }


def run(engine, **mapping):
    recipe = recipes.build(generation.Recipe, mapping, "recipe")
    rows, samples = generation.measure_engine(engine, list(range(100)), recipe, 0, engine.clock)
    keys = ("metric", "input_tokens", "output_tokens", "batch_size")
    return {tuple(row[key] for key in keys): row for row in rows}, samples


def test_rates_follow_from_latencies():
    rows, samples = run(FakeEngine(), input_tokens=[5], output_tokens=[11], batch_sizes=[1, 4], repeats=3)
    assert rows["latency", 5, 11, 4]["value"] == pytest.approx(2.0)
    assert rows["time_to_first_token", 5, 1, 4]["value"] == pytest.approx(1.0)
    assert rows["throughput", 5, 11, 4]["value"] == pytest.approx(4 * 11 / 2.0)
    assert rows["decode_throughput", 5, 11, 4]["value"] == pytest.approx(4 * 10 / 1.0)
    assert rows["throughput", 5, 11, 1]["value"] == pytest.approx(11 / 2.0)
    assert rows["peak_allocated", 5, 11, 4]["value"] == 4000
    assert rows["weights_allocated_after_forward", None, None, None]["value"] == 500
    assert {row["n"] for row in rows.values()} == {3, None}
    assert len(rows) == 2 * 5 + 1
    timing = {(one["output_tokens"], one["batch_size"]): one["seconds"] for one in samples["timings"]}
    assert timing[11, 4] == pytest.approx([2.0] * 3)
    assert timing[1, 1] == pytest.approx([1.0] * 3)


def test_spread_becomes_a_standard_error():
    engine = FakeEngine()
    # One call to begin with; then for 1 and for 11 tokens: one to warm up and two timed.
    engine.jitter = iter([0, 9, 0.2, 0.4, 9, 0.1, 0.3])
    rows, _ = run(engine, input_tokens=[5], output_tokens=[11], batch_sizes=[2], repeats=2)
    assert rows["latency", 5, 11, 2]["value"] == pytest.approx(2.2)
    assert rows["latency", 5, 11, 2]["stderr"] == pytest.approx(0.1)
    assert rows["throughput", 5, 11, 2]["stderr"] == pytest.approx(22 / 2.2 * 0.1 / 2.2)
    decode = rows["decode_throughput", 5, 11, 2]
    assert decode["value"] == pytest.approx(20 / (2.2 - 1.3))
    assert decode["stderr"] == pytest.approx(20 / 0.9 * math.hypot(0.1, 0.1) / 0.9)


def test_decoding_faster_than_the_noise_is_a_gap_and_not_a_number():
    engine = FakeEngine()
    engine.jitter = iter([0, 0, 5.0, 0, 0])
    rows, _ = run(engine, input_tokens=[5], output_tokens=[3], batch_sizes=[1], repeats=1)
    row = rows["decode_throughput", 5, 3, 1]
    assert row["value"] is None
    assert row["outcome"].startswith("unavailable: ")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_running_out_of_memory_is_an_outcome_and_larger_batches_are_not_tried(error):
    engine = FakeEngine(room=50, error=error)
    rows, samples = run(engine, input_tokens=[5, 20], output_tokens=[8], batch_sizes=[1, 2, 4, 8, 16])
    outcomes = {key[1:]: row["outcome"] for key, row in rows.items() if key[0] == "latency"}
    assert {key[2] for key in outcomes if outcomes[key] == "ok" and key[0] == 5} == {1, 2}
    assert {key[2] for key in outcomes if outcomes[key] == "ok" and key[0] == 20} == {1}
    assert set(outcomes.values()) == {"ok", "oom"}
    tried = {call for call in engine.calls if call[1] == 8}
    assert tried == {(5, 8, 1), (5, 8, 2), (5, 8, 4), (20, 8, 1), (20, 8, 2)}
    assert rows["throughput", 5, 8, 8]["value"] is None
    assert {rows[name, 5, 8, 8]["outcome"] for name in ("throughput", "decode_throughput", "peak_allocated")} == {"oom"}
    assert rows["time_to_first_token", 5, 1, 8]["outcome"] == "ok"
    assert rows["time_to_first_token", 5, 1, 16]["outcome"] == "oom"
    assert [one["seconds"] for one in samples["timings"] if one["batch_size"] == 16] == [None] * 4


def test_generation_on_cuda_reports_what_is_reserved(monkeypatch):
    shapes = {"input_tokens": [5], "output_tokens": [8], "batch_sizes": [2, 16]}
    engine = FakeEngine(room=50, device="cuda")
    timed, _ = run(engine, **shapes)
    assert (timed["peak_allocated", 5, 8, 2]["value"], timed["peak_reserved", 5, 8, 2]["value"]) == (2000, 2048)
    monkeypatch.setattr(
        plugins, "load", lambda *_: SimpleNamespace(Engine=lambda device: FakeEngine(50, device=device))
    )
    monkeypatch.setattr(memory_workload, "prompt", lambda *_: list(range(100)))
    monkeypatch.setattr(checkpoints, "weight_bytes", lambda _: 700)
    checkpoint = SimpleNamespace(folder=None)
    untimed = memory_workload.measure(checkpoint, memory_workload.Recipe(**shapes), seed=0, device="cuda")
    found = {(row["metric"], row.get("batch_size")): row for row in untimed.measurements}
    held = [found[name, None]["value"] for name in memory_workload.UNITS if name.startswith("weights")]
    assert held == [900, 500, 700]
    for rows in (found, {(key[0], key[3]): row for key, row in timed.items()}):
        assert [rows[f"peak_{kind}", 2]["value"] for kind in ("allocated", "reserved")] == [2000, 2048]
        assert [rows[f"peak_{kind}", 16]["outcome"] for kind in ("allocated", "reserved")] == ["oom"] * 2


def test_other_errors_and_wrong_lengths_are_not_swallowed():
    shapes = {"input_tokens": [5], "output_tokens": [8], "batch_sizes": [4]}
    with pytest.raises(RuntimeError, match="shapes"):
        run(FakeEngine(room=20, error=RuntimeError("shapes do not match")), **shapes)
    with pytest.raises(RuntimeError, match="did not generate 4 rows of"):
        run(FakeEngine(extra=1), **shapes)


def test_recipe_refuses_empty_shapes():
    with pytest.raises(UserError, match="batch_sizes"):
        run(FakeEngine(), input_tokens=[5], output_tokens=[8], batch_sizes=[])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return checkpoints.load(llama(tmp_path_factory.mktemp("models") / "dense"), device="cpu")


def greedy(model, ids, count):
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1)[:, None]], 1)
    return ids[:, -count:].tolist()


def test_engine_generates_the_most_likely_tokens_and_never_stops_early(checkpoint):
    prompts = [[3, 70, 21, 9], [90, 4, 4, 61]]
    expected = greedy(checkpoint.model, torch.tensor(prompts), 6)
    checkpoint.model.generation_config.eos_token_id = expected[0][1]  # the second token would end the first row
    checkpoint.model.generation_config.repetition_penalty = 5.0
    engine = hf.Engine("cpu")
    engine.load(checkpoint)
    assert engine.generate(prompts, 6) == expected
    assert engine.generate(prompts, 1) == [row[:1] for row in expected]


def test_engine_samples_from_the_likely_tokens(checkpoint):
    engine = hf.Engine("cpu")
    engine.load(checkpoint)
    prompts = [[3, 70, 21, 9]] * 200
    with torch.no_grad():
        likely = set(checkpoint.model(torch.tensor(prompts[:1])).logits[0, -1].topk(50).indices.tolist())
    torch.manual_seed(1)
    drawn = [row[0] for row in engine.generate(prompts, 1, "top-k-top-p")]
    assert len(set(drawn)) > 10
    assert set(drawn) <= likely


def test_generation_measures_a_model(checkpoint):
    module = plugins.load("profile", "generation")
    shapes = {"input_tokens": [4], "output_tokens": [3], "batch_sizes": [1, 8], "repeats": 2}
    measured = module.measure(checkpoint, recipes.build(module.Recipe, shapes, ""), seed=0, device="cpu")
    assert all(set(row) <= set(COLUMNS) for row in measured.measurements)
    json.dumps(measured)
    found = {(row["metric"], row["batch_size"]): row["value"] for row in measured.measurements}
    assert found["weights_on_disk", None] == (checkpoint.folder / "model.safetensors").stat().st_size
    assert found["weights_allocated", None] >= 4 * checkpoint.info["parameters"]
    # Beyond the weights: at the very least the keys and values of both layers, of 4 + 2 tokens of 128 channels.
    cache = 2 * 2 * 6 * 128 * 4
    assert found["peak_allocated", 1] >= found["weights_allocated", None] + cache
    assert found["peak_allocated", 8] >= found["peak_allocated", 1] + 7 * cache
    assert found["throughput", 8] > found["throughput", 1] > 0


def test_prompt_is_fixed_and_ordinary(checkpoint):
    tokens = prompt(checkpoint, 1000, 0)
    assert tokens == prompt(checkpoint, 1000, 0) != generation.prompt(checkpoint, 1000, 1)
    assert 256 not in tokens
    assert set(tokens) <= set(range(256))


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


@pytest.mark.parametrize("workload", ["scoring", "memory", "generation"])
def test_weights_that_change_in_the_first_forward_pass_are_counted_again(tmp_path, workload):
    checkpoint = checkpoints.load(llama(tmp_path / "dense", layers=1, hidden=32, mlp=32), device="cpu")
    layers = [Changing(128, torch.int8, torch.float32), Changing(40, torch.float32, torch.int8)]
    for layer in layers:
        checkpoint.model.model.norm.register_forward_pre_hook(lambda _, inputs, layer=layer: layer(inputs[0]))
    held = memory.allocated_bytes("cpu")
    if workload == "scoring":
        question = scoring.Question("t", 0, [([3, 70, 21], 1)])
        recipe = scoring_recipe(warmup=0, memory_questions=1)
        answer = functools.partial(scoring.score, checkpoint.model, device="cpu")
        rows, _ = scoring.measure_questions([question], answer, recipe, "cpu")
    else:
        module = plugins.load("profile", workload)
        recipe = module.Recipe(input_tokens=[3], output_tokens=[2], batch_sizes=[1])
        rows = module.measure(checkpoint, recipe, seed=0, device="cpu").measurements
    found = {row["metric"]: row["value"] for row in rows}
    assert found.get("weights_allocated", held) == held
    grown = 3 * 1024 * (128 - 40)
    assert found["weights_allocated_after_forward"] - held == pytest.approx(grown, abs=500)
    peak = found["peak_allocated_per_question" if workload == "scoring" else "peak_allocated"]
    assert 0 < peak - found["weights_allocated_after_forward"] < 60_000


def test_scoring_out_of_memory_is_an_outcome():
    def answer(question):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    rows, _ = scoring.measure_questions([scoring.Question("t", 0, [([0, 1], 1)])], answer, scoring_recipe(), "cpu")
    assert {(row["outcome"], row["value"]) for row in rows} == {("oom", None)}


def test_scoring_measures_a_model(world, checkpoint):
    recipe = scoring_recipe(dataset=world, memory_questions=2)
    measured = scoring.measure(checkpoint, recipe, seed=0, device="cpu")
    json.dumps(measured)
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


def test_memory_is_measured_untimed_and_a_shape_that_does_not_fit_is_a_row(checkpoint, monkeypatch):
    """The same peaks as the timed workload's, once a shape; running out of memory is an outcome."""
    shapes = {"input_tokens": [4], "output_tokens": [3], "batch_sizes": [1, 2]}
    timed = generation.measure(checkpoint, generation.Recipe(**shapes, repeats=1), seed=0, device="cpu")
    untimed = memory_workload.measure(checkpoint, memory_workload.Recipe(**shapes), seed=0, device="cpu")

    def peaks(measured):
        rows = [row for row in measured.measurements if row["metric"] == "peak_allocated"]
        return {row["batch_size"]: row["value"] for row in rows}

    assert peaks(untimed) == pytest.approx(peaks(timed), rel=0.02)
    assert {row["metric"] for row in untimed.measurements} == set(memory_workload.UNITS) - {"peak_reserved"}
    original = hf.Engine.peaks

    def full(self, prompts, output, sampling):
        if len(prompts) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return original(self, prompts, output, sampling)

    monkeypatch.setattr(hf.Engine, "peaks", full)
    rows = memory_workload.measure(checkpoint, memory_workload.Recipe(**shapes), seed=0, device="cpu").measurements
    outcomes = {row["batch_size"]: row.get("outcome", "ok") for row in rows if "batch_size" in row}
    assert outcomes == {1: "ok", 2: "oom"}
