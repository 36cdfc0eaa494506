"""Charts that lack results are drawn from those that are there, say what they lack, and show nothing out of date."""

from __future__ import annotations

import base64
import json
import math
import os
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from snakemake.exceptions import WorkflowError

from chart_rows import frame, row, text_of
from conftest import ROOT, copy_project, snakemake
from espalier import drawing, early_charts, takeover
from espalier.demo.dataset import Recipe as World
from espalier.errors import UserError
from espalier.figures import (
    block_importance,
    engine_speedup,
    glue_bits,
    latency_throughput,
    quantization_tradeoff,
    size_tradeoff,
)
from espalier.files import write_json
from espalier.recipes import build
from espalier.results import envelope
from espalier.study import Study, Wanted
from test_block_importance import depth_step
from test_figures import GLUE, glue_recipe, glue_rows, size_recipe, variant
from test_figures_speed import latency_recipe, timing
from test_quantization_tradeoff import quantization_recipe, scored

TASKS = ("cola", "rte")
DATA = Path("results/e/data/world")
BEGIN = 1767225600  # 2026-01-01T00:00:00Z


def config(seeds=(0,)):
    """Return a study of two scored teachers, and one chart of them."""
    return {
        "study": "e",
        "datasets": {"world": {"generate": "demo", "seed": 5}},
        "models": {"m": {"path": "model", "task": "masked-lm", "seeds": list(seeds)}},
        "recipes": {task: {"tune": "classify", "task": task, "dataset": "world", "steps": 3} for task in TASKS},
        "suites": {f"glue-{task}": {"evaluate": "glue", "task": task, "dataset": "world"} for task in TASKS},
        "figures": {
            "glue_bits": {
                "title": "My GLUE",
                "model": "m",
                "suite": {task: f"glue-{task}" for task in TASKS},
                "teacher": {task: f"dense+{task}" for task in TASKS},
            }
        },
    }


def at(task, kind="evaluate", seed=0):
    return Wanted("m", seed, f"dense+{task}", kind, f"glue-{task}" if kind == "evaluate" else task)


DENSE = Wanted("m", 0, "dense", "step", "dense")


def write_result(study, one, recipe, code, minute):
    """Write a raw result as a job would that began in that minute of 2026 and took ten seconds."""
    scores = [
        {"task": one.name.removeprefix("glue-"), "metric": metric, "value": 0.5, "stderr": 0.1, "n": 9, "unit": ""}
        for metric in ("mcc", "accuracy")
    ]
    origin = {"commit": "c", "packages": {}, "device": {"kind": "cpu", "name": "p"}, "code": code, "seconds": 10.0}
    file = Path(study.path(one))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        file,
        envelope(
            kind=one.kind,
            identity={"study": "e"} | one._asdict(),
            recipe=json.loads(recipe),
            checkpoint={"format": "transformers", "task": "sequence-classification", "parameters": 1000},
            measurements=scores,
            samples={},
            provenance=origin | {"started": f"2026-01-01T00:{minute:02}:00Z"},
        ),
    )


def finish(seeds=(0,)):
    """Make the working directory one in which the study is finished, but for its chart, and return the study."""
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    DATA.mkdir(parents=True)
    study = Study(config(seeds))
    (DATA / "summary.json").write_text(json.dumps({"recipe": json.loads(study.generated("world"))}))
    os.utime(DATA / "summary.json", (BEGIN, BEGIN))
    for seed in seeds:
        chains = [study.root / f"runs/m/s{seed}" / chain for chain in ("dense", *(f"dense+{task}" for task in TASKS))]
        for chain in chains:
            (chain / "model").mkdir(parents=True)
        write_result(study, DENSE._replace(seed=seed), study.reference("m"), study.code("fetch_model.py"), minute=1)
        for task in TASKS:
            code = study.code("tune_model.py", "recipes", task)
            write_result(study, at(task, "step", seed), study.content("recipes", task), code, minute=2)
            suite = f"glue-{task}"
            code = study.code("evaluate_model.py", "suites", suite)
            write_result(study, at(task, seed=seed), study.content("suites", suite), code, minute=3)
    return study


@pytest.fixture
def finished(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return finish()


def draw(study):
    return early_charts.draw(study, "glue_bits", early_charts.Current(study))


def without(*gone):
    def edit(study):
        for one in gone:
            os.unlink(study.path(one))

    return edit


def changed(one, part, **values):
    """Return an edit of a part of a raw result."""

    def edit(study):
        result = json.loads(Path(study.path(one)).read_text())
        result[part].update(values)
        write_json(study.path(one), result)

    return edit


COLA, TEACHER = at("cola"), at("cola", "step")
# What happened → (the edit of a finished study, how many of its two scores still count).
STALE = {
    "nothing": (lambda study: None, 2),
    "a score is gone": (without(COLA), 1),
    "a score is cut off": (lambda study: os.truncate(study.path(COLA), 99), 1),
    "another suite": (changed(COLA, "recipe", batch_size=7), 1),
    "other code": (changed(COLA, "provenance", code="0" * 16), 1),
    "a teacher that is gone": (without(TEACHER), 1),
    "another teacher": (changed(TEACHER, "recipe", steps=4), 1),
    "a teacher of other code": (changed(TEACHER, "provenance", code="0" * 16), 1),
    "a teacher made after its score": (changed(TEACHER, "provenance", started="2026-01-01T00:03:01Z"), 1),
    "another model": (changed(DENSE, "recipe", path="elsewhere"), 0),
    "data made after the teachers": (lambda study: os.utime(DATA / "summary.json", (BEGIN + 150, BEGIN + 150)), 0),
    "other data": (lambda study: study.resolved.generated.update(world=World(seed=6)), 0),
    "data that are gone": (lambda study: os.unlink(DATA / "summary.json"), 0),
}


@pytest.mark.parametrize("case", STALE)
def test_a_result_counts_only_if_it_would_be_made_the_same_again(finished, case):
    edit, there = STALE[case]
    edit(finished)
    current = early_charts.Current(finished)
    assert len([task for task in TASKS if current.result(at(task))]) == there


def test_an_early_chart_stands_apart_says_what_it_lacks_and_goes_with_the_complete_one(finished):
    assert draw(finished) is None, "it lacks nothing"
    assert not finished.figures.exists()
    changed(COLA, "recipe", batch_size=7)(finished)
    early = draw(finished)
    assert early == (finished.figures / "early/glue_bits", 1, 2)
    assert {file.name for file in finished.figures.iterdir()} == {"early"}
    assert {file.suffix for file in early.prefix.parent.iterdir()} == set(drawing.SUFFIXES)
    said = early.prefix.with_suffix(".svg").read_text()  # its letters are drawn, and stand in comments
    assert "<!-- My GLUE (early: 1 of 2 results) -->" in said
    assert "<!-- Early: 1 of 2 results; missing: dense+cola (glue-cola, out of date). " in said
    assert "<!-- No results: CoLA -->" in said
    script = runpy.run_path(str(ROOT / "workflow/scripts/draw_figure.py"))["main"]
    results = [finished.path(at(task)) for task in TASKS]
    recipe = finished.content("figures", "glue_bits")
    script(["--figure", "glue_bits", "--recipe", recipe, "--output", "figures/e/glue_bits", "--results", *results])
    assert {file.name for file in finished.figures.iterdir()} == {f"glue_bits{suffix}" for suffix in drawing.SUFFIXES}


def test_an_early_chart_goes_when_all_its_results_are_there_and_when_none_counts(finished):
    for edit in (lambda study: None, without(DENSE)):
        edit(finished)
        early = drawing.early(finished.figures / "glue_bits").with_suffix(".png")
        early.parent.mkdir(parents=True)
        early.touch()
        assert draw(finished) is None
        assert not early.parent.exists()


def test_the_first_that_are_missing_are_named_with_their_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = finish(seeds=(0, 1, 2))
    without(*(at(task, seed=seed) for task in TASKS for seed in (0, 1, 2) if (task, seed) != ("cola", 0)))(study)
    notes = []
    monkeypatch.setattr(drawing, "save", lambda *given: notes.append(given[-1]))
    draw(study)
    assert notes == [
        "Early: 1 of 6 results; missing: dense+rte (glue-rte, seed 0), dense+cola (glue-cola, seed 1), dense+rte"
        " (glue-rte, seed 1), dense+cola (glue-cola, seed 2), and 1 more."
    ]


def test_the_script_says_what_it_drew_and_goes_on_after_a_chart_that_it_cannot_draw(finished, monkeypatch, capsys):
    script = runpy.run_path(str(ROOT / "workflow/scripts/draw_early_figures.py"))["main"]
    mapping = config()
    mapping["figures"] = {"block_importance": {"title": "t", "model": "m", "panels": {}}, **mapping["figures"]}
    write_json("study.json", mapping)
    script(["--configfile", "study.json"])
    assert capsys.readouterr().out.startswith("No chart can be drawn early: ")
    with pytest.raises(UserError, match="Did you mean 'glue_bits'"):
        script(["--configfile", "study.json", "--figure", "glue_bit"])
    without(COLA)(finished)
    monkeypatch.setattr(
        early_charts,
        "draw",
        lambda study, name, current, own=early_charts.draw: {"glue_bits": own}[name](study, name, current),
    )
    with pytest.raises(UserError, match=r"cannot be drawn .*: block_importance \(KeyError: 'block_importance'\)\."):
        script(["--configfile", "study.json"])
    assert "are in figures/e/early: glue_bits (1 of 2 results)." in capsys.readouterr().out


# What each chart says ------------------------------------------------------------------------------------------------


def size_chart():
    rows = variant("dense", 652_000, {1: (0.5, 0.7), 2: (0.5, 0.7)}, 3 * 2**20)
    rows += variant("a", 471_000, {1: (0.4, 0.5)}, 2 * 2**20)
    rows += [one for one in variant("b", 471_000, {1: (0.4, 0.5)}, 2 * 2**20) if one["kind"] == "profile"]
    recipe = size_recipe({"Original": ["dense"], "Ours": ["a", "c", "d"], "FLAP": ["b"]})
    return size_tradeoff.draw(size_tradeoff.measured(recipe, frame(rows)), "T")


def latency_chart():
    recipe = latency_recipe({"Original": "dense", "Ours": ["a", "b"]})
    return latency_throughput.draw(latency_throughput.measured(recipe, frame(timing("a", 1, 2.0))), "T")


def engine_chart():
    about = {"kind": "profile", "suite": "hf", "chain": "dense", "metric": "decode_throughput", "batch_size": 1}
    panel = {"title": "P", "model": "m", "chain": "dense", "series": {"HF": "hf", "Ours": "own"}}
    recipe = build(engine_speedup.Recipe, {"title": "T", "panels": [panel]}, "figures.e")
    rows = [row(**about, input_tokens=8, value=5.0)]
    return engine_speedup.draw(engine_speedup.measured(recipe, frame(rows)), "T")


def quantization_chart():
    results = scored("b", [1, 0], 0.2, 250 * 2**20) + scored("c", [1, 1], 0.2, 250 * 2**20)[:1]
    recipe = quantization_recipe(rows={"Base Model": "a", "SFT Model": "b"}, extra_rows={"AWQ 3bit": "c"})
    return quantization_tradeoff.draw(quantization_tradeoff.measured(recipe, results), "T")


def block_chart():
    recipe = {"title": "T", "model": "m", "panels": {"One": "dense+a", "Two": "dense+b"}}
    points = block_importance.measured(
        build(block_importance.Recipe, recipe, "figures.b"), [depth_step("dense+b", [{0: 1.0, 1: 2.0}], [0])]
    )
    return block_importance.draw(points, "T")


# Chart → what its panels say, left to right.
LACKS = {
    size_chart: [
        ["No result: Ours (c), Ours (d)", "1 of 2 seeds: Ours 471K, FLAP 471K"],
        ["missing", "No result: Ours (c), Ours (d), FLAP 471K", "1 of 2 seeds: Ours 471K"],
    ],
    latency_chart: [["No result: Original (dense), Ours (b)"]],
    engine_chart: [["No result: Ours"]],
    quantization_chart: [["missing"], *[["missing", "missing"]] * 4],
    block_chart: [["One", "No result"], ["Two"]],
}


@pytest.mark.parametrize("chart", LACKS, ids=lambda chart: chart.__name__)
def test_each_panel_says_what_it_lacks(chart):
    drawn = chart()
    panels = [part for figure in (drawn.subfigs or [drawn]) for part in figure.axes]
    for axes, wanted in zip(panels, LACKS[chart], strict=True):
        said = [" ".join(text.get_text().split()) for text in (*axes.texts, axes.title)]
        for sentence in wanted:
            assert sum(sentence in one for one in said) == wanted.count(sentence), said
    assert "No results in this study: Original" not in text_of(drawn), (
        "what is missing is no series that nobody asked for"
    )


def test_no_average_of_seven_tasks_and_no_line_over_a_point_that_is_missing():
    students = {"Budget-A": {bits: {task: f"a{bits}-{task}" for task in GLUE} for bits in (2, 1)}}
    rows = glue_rows("t", GLUE) + glue_rows("t", GLUE, seed=2)
    rows += glue_rows("a2", GLUE.keys() - {"rte"}) + glue_rows("a2", GLUE.keys() - {"cola"}, seed=2)
    rows += glue_rows("a1", GLUE) + glue_rows("a1", GLUE.keys() - {"cola", "rte"}, seed=2)
    points = glue_bits.measured(glue_recipe(GLUE, students), frame(rows))
    average = points[points["panel"] == "Ave. 8 Tasks"].set_index(["series", "bits"])
    assert math.isnan(average.loc[("Budget-A", 2), "value"]), "each seed lacks another task"
    assert average["seeds"].to_dict() == {("teacher", 32): 2, ("Budget-A", 2): 0, ("Budget-A", 1): 1}
    drawn = glue_bits.draw(points, "T")
    panels = {axes.get_title(): axes for axes in drawn.axes}
    said = {name: [" ".join(text.get_text().split()) for text in axes.texts] for name, axes in panels.items()}
    assert said["CoLA"] == ["1 of 2 seeds: Budget-A 2-bit, Budget-A 1-bit"]
    assert said["MNLI"] == []
    assert said["Ave. 8 Tasks"] == ["No result: Budget-A 2-bit (without rte) 1 of 2 seeds: Budget-A 1-bit"]
    lines = {name: [line.get_ydata() for line in axes.get_lines()] for name, axes in panels.items()}
    assert any(len(y) == 2 and math.isnan(y[0]) and not math.isnan(y[1]) for y in lines["Ave. 8 Tasks"])
    assert not any(len(y) == 2 and not any(map(math.isnan, y)) for y in lines["Ave. 8 Tasks"]), "no line joins two"


# At the end of a run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failed", "touch", "dry", "drawn"),
    [(1, False, False, True), (0, False, False, False), (1, True, False, False), (1, False, True, False)],
    ids=["a job failed", "stopped by a person", "--touch", "dry-run"],
)
def test_early_charts_are_drawn_where_jobs_ran_and_failed(tmp_path, monkeypatch, failed, touch, dry, drawn):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(takeover.preflight, "check", lambda *_: None)
    monkeypatch.setattr(takeover.watching, "record", lambda _: None)
    monkeypatch.setattr(takeover, "_settle", lambda *_: None)
    calls = []
    monkeypatch.setattr(takeover, "_draw_early", lambda *given: calls.append(given))

    def execute(**_):
        raise WorkflowError("At least one job did not complete successfully.")

    study = SimpleNamespace(root=tmp_path / "results/e", name="e")
    workflow = SimpleNamespace(
        execute=execute,
        config={"study": "e"},
        touch=touch,
        remote_exec=False,
        is_main_process=True,
        execution_settings=SimpleNamespace(lock=True),
        dag_settings=SimpleNamespace(targets=set()),
        scheduler=SimpleNamespace(failed={"job"} if failed else set()),
    )
    plugin = SimpleNamespace(cli_prefix="local", common_settings=SimpleNamespace(dryrun_exec=dry))
    takeover.guard(workflow, study)
    with pytest.raises(WorkflowError, match="At least one job"):
        workflow.execute(executor_plugin=plugin, executor_settings=None)
    assert calls == ([(study,)] if drawn else [])


def test_what_goes_wrong_with_early_charts_is_only_told(finished, monkeypatch):
    said = []
    monkeypatch.setattr(takeover, "_say", said.append)
    finished.mapping = {"study": "e"}  # no study: each script ends with the same sentence, which is said once
    takeover._draw_early(finished)
    assert len(said) == 1
    assert said[0].startswith("error: standard input: the key 'models' is missing")


FAILS = """
import os, sys
if len(sys.orig_argv) > 1 and sys.orig_argv[1].endswith("/evaluate_model.py"):
    print("error: it cannot be scored")
    os._exit(1)
"""


def test_a_run_with_a_failed_job_ends_with_an_early_chart(tmp_path, monkeypatch):
    """Of the study as this command says it, in several files."""
    project = copy_project(tmp_path / "project")
    monkeypatch.chdir(project)
    without(COLA)(finish())
    write_json("study.json", config())
    write_json("more.json", {"figures": {"glue_bits": {"title": "Another title"}}})
    (tmp_path / "sitecustomize.py").write_text(FAILS)
    given = ["--cores", "1", "--keep-going", "--configfile", "study.json", "more.json", "--", "glue_bits"]
    run = snakemake(project, *given, python_path=[tmp_path])
    assert run.returncode == 1
    assert "Early charts, which say what they lack, are in figures/e/early: glue_bits (1 of 2 results)." in run.stderr
    assert "The report, which lacks 1 of 5 results and names them, is results/e/early-report.html." in run.stderr
    page = Path("results/e/early-report.html").read_text()
    assert base64.b64encode(Path("figures/e/early/glue_bits.svg").read_bytes()).decode() in page
    assert "At least one job did not complete successfully." in run.stderr
    assert "<!-- Another title (early: 1 of 2 results) -->" in Path("figures/e/early/glue_bits.svg").read_text()
    assert not Path("figures/e/glue_bits.svg").exists()
