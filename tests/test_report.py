"""A report holds its study, all of it and nothing else: charts, numbers, definitions, and what is missing."""

from __future__ import annotations

import base64
import csv
import json
import os
import re
import runpy
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from conftest import ROOT, environment
from espalier import definitions, drawing, early_charts, report, report_runs, report_tables, tables
from espalier.early_charts import Current
from espalier.study import Study
from test_docs import LIBRARY, metrics_of, page
from test_early_figures import COLA, DENSE, changed, config, finish, without

PICTURE = '<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"><rect width="9" height="9"/></svg>'
NUMBERS = "panel,value,outcome,device\nCoLA,0.12345678,ok,CPU: p\nRTE,,oom,CPU: p\n"


class Page(HTMLParser):
    """A page as a test reads it: its text, tables by label, pictures, ids, links, and headings in order."""

    VOID = ("meta", "img", "link", "br", "wbr")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.ids, self.links, self.levels, self.pictures, self.tags = [], [], [], [], [], []
        self.tables, self.label, self.words = {}, "", []
        self.feed(text)
        self.text = " ".join("".join(self.words).split())
        assert self.open == [], "a tag is not closed"

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append((tag, given))
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if "href" in given else []
        self.pictures += [given] if tag == "img" else []
        self.levels += [int(tag[1])] if re.fullmatch("h[1-6]", tag) else []
        self.label = given.get("aria-label", self.label)
        if tag == "tr":
            self.tables.setdefault(self.label, []).append([])
        if tag in ("td", "th") and self.label in self.tables:
            self.tables[self.label][-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.words.append(data)
        if ("td" in self.open or "th" in self.open) and self.tables.get(self.label):
            self.tables[self.label][-1][-1] += data


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A finished study in the working directory, with a chart."""
    monkeypatch.chdir(tmp_path)
    study = finish()
    draw(study)
    return study


def compared():
    """Return the study with its chart's values beside published ones, which it has made a table of."""
    study = Study(config() | {"compare": [{"figure": "glue_bits", "tolerance": 1}]})
    table = study.root / "tables/published.csv"
    table.parent.mkdir(exist_ok=True)
    verdicts = [("yes", ""), ("yes", ""), ("no", ""), ("", "oom"), ("", "not measured"), ("", "oom")]
    lines = [f"file,{i},{inside},{why}" for i, (inside, why) in enumerate(verdicts)]
    table.write_text("\n".join(["source,published,inside,why", *lines]) + "\n")
    return study


def draw(study, folder="", ago=0):
    """Write files of the study's chart into a folder beside it, as if they had been drawn so many seconds ago."""
    place = study.figures / folder
    place.mkdir(parents=True, exist_ok=True)
    there = sum(Path(path).exists() for path in study.figure_results("glue_bits"))
    mark = drawing.mark("glue_bits", study.step("figures", "glue_bits").recipe, there)
    (place / "glue_bits.svg").write_text(PICTURE.replace("<rect", f'<rect id="{mark}"'))
    (place / "glue_bits.csv").write_text(NUMBERS)
    drawn = time.time() - ago
    os.utime(place / "glue_bits.svg", (drawn, drawn))


def written(study, output="report.html"):
    """Return the page of a report of what is there."""
    current = Current(study)
    found = {one: result for one in study.everything() if (result := current.result(one))}
    report.write(study, found, Path(output))
    return Page(Path(output).read_text(encoding="utf-8"))


# The page -------------------------------------------------------------------------------------------------------------


def test_a_report_is_one_file_that_asks_for_no_other(finished):
    found = written(finished)
    assert found.tags[0] == ("html", {"lang": "en"})
    assert {tag for tag, _ in found.tags}.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "svg"})
    assert all(given["src"].startswith("data:") for _, given in found.tags if "src" in given)
    assert not re.search(r"https?://|url\(|@import", Path("report.html").read_text())
    assert {link[1:] for link in found.links if link.startswith("#")} <= set(found.ids)
    assert all(link.startswith("#") for link in found.links)
    assert len(found.ids) == len(set(found.ids))


def test_headings_never_skip_a_level_and_every_picture_says_what_it_shows(finished):
    found = written(finished)
    assert found.levels[0] == 1
    assert found.levels.count(1) == 1
    assert all(below <= above + 1 for above, below in zip(found.levels, found.levels[1:], strict=False))
    (picture,) = found.pictures
    assert picture["alt"].startswith("Chart “My GLUE”. GLUE scores of 32-")


def test_a_chart_is_its_own_bytes_with_its_numbers_beside_it(finished):
    found = written(finished)
    (picture,) = found.pictures
    drawn = (finished.figures / "glue_bits.svg").read_bytes()
    assert base64.b64decode(picture["src"].partition("base64,")[2]) == drawn
    assert found.tables["numbers of My GLUE"] == [
        ["panel", "value", "outcome"], ["CoLA", "0.1235", "ok"], ["RTE", "", "oom"]
    ]  # fmt: skip
    assert "In every row: device CPU: p." in found.text
    assert "Points without a value: oom (1)." in found.text


def test_text_from_a_config_is_never_markup(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finish()
    evil = "</title><script>alert(1)</script>\"'&"
    study = Study(
        config() | {"title": evil, "figures": {"glue_bits": config()["figures"]["glue_bits"] | {"title": evil}}}
    )
    draw(study)
    found = written(study)
    assert "script" not in {tag for tag, _ in found.tags}
    assert found.text.count("<script>alert(1)</script>") >= 3
    assert evil in found.pictures[0]["alt"]


def test_what_was_run_is_there(finished):
    found = written(finished)
    head, *lines = found.tables["variants"]
    variants = {line[1]: dict(zip(head, line, strict=True)) for line in lines}
    assert list(variants) == ["dense", "dense+cola", "dense+rte"]
    assert variants["dense+cola"] | {"arithmetic": ""} == {
        "model": "m", "chain": "dense+cola", "parameters": "1,000", "bits": "", "arithmetic": "", "seeds made": "0",
        "seconds of last step": "10", "measured": "glue-cola", "on": "CPU: p",
    }  # fmt: skip
    steps = {line[0]: line for line in found.tables["Steps"][1:]}
    assert steps["cola"][1] == "tune: classify"
    assert "task cola; dataset world; steps 3" in steps["cola"][3].replace("; split train", "")
    assert "5 jobs made or measured models" in found.text
    assert "the first begun 2026-01-01 00:01:00 UTC, the last 2026-01-01 00:03:00 UTC" in found.text
    assert "local folder model" in " ".join(found.tables["models and data"][1])
    assert "Nothing: every result that the study asks for is there" in found.text


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"bits": 4, "kernel": None, "symmetric": True, "damp": 0.01}, "bits 4; symmetric yes; damp 0.01"),
        ({"tasks": ["a", "b"], "none": []}, "tasks a, b"),
        ({"dataset": {"name": "world", "source": "demo", "path": "p"}}, "dataset world"),
        ({"text": {"dataset": {"name": "w", "source": "hub"}, "split": "s"}}, "text (dataset w; split s)"),
        ({"joiner": "\n\n", "lr": 2e-05}, "joiner '\\n\\n'; lr 2e-05"),
    ],
)
def test_recipes_in_words(finished, keys, expected):
    assert report_runs.words(finished, keys) == expected


# What must be known ---------------------------------------------------------------------------------------------------


def test_random_weights_are_told_of_before_any_result_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = {"pretrain": "random-encoder", "config": {"model_type": "bert", "hidden_size": 64}}
    study = Study(config() | {"models": {"m": model}})
    assert report_runs.models(study, {})[0].warning.startswith("Its weights are random: its accuracies mean nothing")


def test_a_local_model_that_espalier_made_is_no_published_one(finished):
    assert report_runs.models(finished, {})[0].warning == ""
    Path("model/espalier.json").write_text("{}")
    assert report_runs.models(finished, {})[0].warning.startswith("It is made by Espalier: its numbers say nothing")


def test_a_model_of_random_weights_is_named_before_any_number(finished):
    for one in finished.everything():
        changed(one, "checkpoint", weights="random")(finished)
    before = written(finished).text.partition("In every row")[0]
    assert "m: Its weights are random: its accuracies mean nothing" in before


def test_missing_results_are_named_and_the_early_chart_stands_in(finished):
    without(COLA)(finished)
    changed(DENSE._replace(chain="dense+cola", name="cola"), "provenance", code="0" * 16)(finished)
    draw(finished, "early")
    (finished.figures / "early/glue_bits.csv").write_text("panel,value\nRTE,7\nRTE,8\n")
    found = written(finished)
    assert [line[2:] for line in found.tables["results that are not there"][1:]] == [
        ["dense+cola", "evaluate", "glue-cola", "not there"],
        ["dense+cola", "step", "cola", "out of date"],
    ]
    assert "2 of 5 results." in found.text
    assert "Early: 1 of its 2 results are there." in found.text
    assert found.tables["numbers of My GLUE"] == [["value"], ["7"], ["8"]]


def test_a_chart_that_is_older_than_its_results_is_left_out_unless_snakemake_vouches_for_it(finished):
    draw(finished, ago=60)
    found = written(finished)
    assert found.pictures == []
    assert "There is no chart that is up to date: 2 of its 2 results are there." in found.text
    assert "Nothing: every result" not in found.text
    assert "1 of the charts and tables is not there or not up to date: which." in found.text
    assert "chart “My GLUE”" in found.text.partition("Charts and tables that are not up to date")[2]
    results = {one: tables.read(Path(finished.path(one))) for one in finished.everything()}
    report.write(finished, results, Path("vouched.html"), fresh=True)
    assert len(Page(Path("vouched.html").read_text()).pictures) == 1


def test_an_early_chart_that_is_older_than_a_result_that_is_there_is_left_out(finished):
    without(COLA)(finished)
    draw(finished, "early", ago=60)
    assert written(finished).pictures == []
    draw(finished, "early")
    assert len(written(finished).pictures) == 1


def test_an_early_chart_of_more_results_than_are_there_is_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = finish(seeds=(0, 1))
    without(COLA)(study)
    draw(study, "early")
    assert "Early: 3 of its 4 results are there." in written(study).text
    without(COLA._replace(seed=1))(study)
    found = written(study)
    assert found.pictures == []
    assert "There is no chart that is up to date: 2 of its 4 results are there." in found.text


@pytest.mark.parametrize("early", [False, True], ids=["whole", "early"])
@pytest.mark.parametrize("other", ["title", "code"])
def test_a_real_chart_of_another_recipe_or_other_code_is_left_out(finished, monkeypatch, early, other):
    if early:
        without(COLA)(finished)
        assert early_charts.draw(finished, "glue_bits", Current(finished))
    else:
        recipe = finished.content("figures", "glue_bits")
        given = ["--figure", "glue_bits", "--recipe", recipe, "--output", str(finished.figures / "glue_bits")]
        script = runpy.run_path(str(ROOT / "workflow/scripts/draw_figure.py"))
        script["main"]([*given, "--results", *finished.figure_results("glue_bits")])
    assert len(written(finished).pictures) == 1
    if other == "title":
        changed_title = config()
        changed_title["figures"]["glue_bits"]["title"] = "Another"
        finished = Study(changed_title)
    else:
        monkeypatch.setattr(drawing, "code_version", lambda *_: "0" * 16)
    assert written(finished).pictures == []


def test_measurements_without_a_value_are_listed_by_condition(finished):
    lost = {"task": "g", "value": None, "unit": "s", "batch_size": 16, "input_tokens": 4, "outcome": "oom"}
    result = json.loads(Path(finished.path(COLA)).read_text())
    result["measurements"] += [lost | {"metric": "latency"}, lost | {"metric": "throughput"}]
    Path(finished.path(COLA)).write_text(json.dumps(result))
    found = written(finished)
    assert found.tables["measurements without a value"][1:] == [
        ["m", "dense+cola", "glue-cola", "0", "batch 16, in 4", "latency, throughput", "oom"]
    ]
    assert "Nothing: every result" not in found.text


def test_results_of_edited_files_and_of_two_devices_are_told(finished):
    changed(COLA, "provenance", dirty=True, device={"kind": "cuda", "name": "H200", "driver": "5.1"})(finished)
    found = written(finished)
    assert "Some results were made with edited files that no commit holds." in found.text
    assert {line[0]: line[-1] for line in found.tables["devices and libraries"][1:]} == {"H200": "1", "CPU: p": "4"}


def test_published_values_are_counted_and_those_without_a_verdict_say_why(finished):
    found = written(compared())
    assert "2 inside the tolerance that the study states for it, 1 outside, 3 without a verdict." in found.text
    assert found.text.count("2: oom 1: not measured") == 2, "where they are counted, and under what is missing"
    assert "Nothing: every result" not in found.text
    assert len(found.tables["published values and ours"]) == 7
    assert re.search(r"Made 20\d\d-.{14} UTC; a change of its recipe or code since then is not noticed\.", found.text)


def test_published_values_of_a_study_that_compares_nothing_any_more_are_not_shown(finished):
    compared()
    found = written(finished)
    assert "Published against measured" not in found.text
    assert "published values and ours" not in found.tables
    assert "table of published values" not in found.text
    assert "Nothing: every result" in found.text


@pytest.mark.parametrize("spoil", ["a result is gone", "a result is out of date", "it is older", "it is gone"])
def test_a_table_that_is_not_of_todays_results_is_named_as_missing(finished, spoil):
    study = compared()
    table = study.root / "tables/published.csv"
    if spoil == "a result is gone":
        without(COLA)(study)
    elif spoil == "a result is out of date":
        changed(COLA, "provenance", code="0" * 16)(study)
        os.utime(table, (time.time() + 9,) * 2)
    elif spoil == "it is older":
        os.utime(table, (1, 1))
    else:
        table.unlink()
    found = written(study)
    assert "Published against measured" not in found.text
    assert "table of published values" in found.text.partition("Charts and tables that are not up to date")[2]


def test_a_whole_report_takes_the_early_one_away(finished):
    cola = Path(finished.path(COLA)).read_bytes()
    without(COLA)(finished)
    written(finished, finished.root / report.EARLY)
    written(finished, finished.root / "report.html")
    assert (finished.root / report.EARLY).exists()
    Path(finished.path(COLA)).write_bytes(cola)
    written(finished, finished.root / "report.html")
    assert not (finished.root / report.EARLY).exists()


# Numbers and tables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [(276160.0, "276,160"), (0.123456, "0.1235"), (32.0, "32"), (9860.067, "9,860"), (2e-7, "2e-07"), (-1.5, "-1.5")],
)
def test_numbers_as_people_read_them(value, expected):
    assert report_tables.number(value) == expected


def test_a_table_names_a_column_of_one_value_once_and_leaves_empty_ones_out():
    rows = [{"a": "x", "b": "1.50", "c": "", "d": "same"}, {"a": "y", "b": "inf", "c": "", "d": "same"}]
    found = report_tables.table(rows)
    assert found.columns == ["a", "b"]
    assert found.constant == [("d", "same")]
    assert [[(cell.text, cell.number) for cell in row] for row in found.rows] == [
        [("x", False), ("1.5", True)], [("y", False), ("inf", False)]
    ]  # fmt: skip
    assert report_tables.table(rows[:1]).columns == ["a", "b", "d"], "one row alone is shown whole"


@pytest.mark.parametrize(
    ("column", "texts", "shown", "numbers"),
    [
        ("value", ["1500.25", "", "-2e-07"], ["1,500", "", "-2e-07"], [True, False, True]),
        ("value", [1500.25, None, 7], ["1,500", "", "7"], [True, False, True]),
        ("value", ["1500.25", "nan", "-inf"], ["1,500", "nan", "-inf"], [True, False, False]),
        ("value", ["1500", "7%"], ["1500", "7%"], [False, False]),
        ("value", ["4_8", "1"], ["4_8", "1"], [False, False]),
        ("value", ["007", "1"], ["007", "1"], [False, False]),
        ("value", ["1e3", "1"], ["1e3", "1"], [False, False]),
        *((name, ["2000", "0.50"], ["2000", "0.50"], [False, False])
          for name in ("model", "chain", "series", "row", "panel", "variant", "versus", "seed")),
    ],
)  # fmt: skip
def test_a_name_is_never_changed_into_a_number(column, texts, shown, numbers):
    found = report_tables.table([{column: text} for text in texts])
    assert [row[0].text for row in found.rows] == shown
    assert [row[0].number for row in found.rows] == numbers


# Definitions ----------------------------------------------------------------------------------------------------------


def test_every_metric_of_the_code_is_defined():
    files = [LIBRARY / "jobs.py", *LIBRARY.glob("evaluate/[!_]*.py"), *LIBRARY.glob("profile/[!_]*.py")]
    names = {name for file in files for name in metrics_of(file)}
    found, unknown = definitions.of_metrics([*names, "nonsense"])
    assert {one.metric for one in found} == names
    assert unknown == ["nonsense"]
    assert all(one.unit and one.text for one in found)


@pytest.mark.demo
def test_every_metric_of_the_demo_is_defined():
    with (ROOT / "results/demo/tables/metrics.csv").open(newline="") as stream:
        names = {row["metric"] for row in csv.DictReader(stream)}
    assert len(names) > 20
    assert definitions.of_metrics(names)[1] == []


def test_a_definition_is_that_of_the_page():
    found = {
        one.metric: one for one in definitions.of_metrics(["f1", "max_peak_reserved_per_question", "perplexity"])[0]
    }
    assert (found["f1"].unit, found["f1"].made_by) == ("fraction", "evaluate: glue")
    assert f"| {found['f1'].text} |" in page("docs/metrics.md")
    assert found["max_peak_reserved_per_question"].stderr == "none: one value"
    assert found["perplexity"].stderr == "perplexity × (standard deviation of the windows' mean losses) / sqrt(windows)"


def test_sections_are_html_whose_links_stay_inside(tmp_path):
    file = tmp_path / "page.md"
    file.write_text(
        "# Title\n\nFirst, **[there](#units-of-it)**.\n\n| metric | definition |\n|---|---|\n| `a` | b |\n\n"
        "## Units of it\n\n### Deeper\n\nSee [other](other.md#x) <b>.\n\n| k | v |\n|---|---|\n| 1 | 2 |\n"
    )
    first, second = definitions.sections(file)
    assert (first.title, second.title, second.anchor) == ("Metrics", "Units of it", "metrics-units-of-it")
    assert first.text == '<p>First, <strong><a href="#metrics-units-of-it">there</a></strong>.</p>\n'
    assert "See other &lt;b&gt;." in second.text
    assert "<h4>Deeper</h4>" in second.text
    assert '<div class="scroll"><table>' in second.text
    assert '<th scope="col">k</th>' in second.text


# By hand --------------------------------------------------------------------------------------------------------------

RUN = """
import runpy, sys
sys.argv = ["write_report.py", *sys.argv[1:]]
runpy.run_path(sys.argv.pop(1), run_name="__main__")
heavy = {"torch", "pandas", "matplotlib", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""


def test_the_script_writes_what_is_there_without_heavy_libraries(finished):
    without(COLA)(finished)
    Path("study.json").write_text(json.dumps(config()))
    script = str(ROOT / "workflow/scripts/write_report.py")
    for given, piped in ((["--configfile", "study.json"], None), (["--configfile", "-"], json.dumps(config()))):
        command = [sys.executable, "-c", RUN, script, *given]
        settings = {"env": environment(ROOT), "capture_output": True, "text": True, "check": False}
        run = subprocess.run(command, input=piped, **settings)
        assert run.returncode == 0, run.stderr
        assert run.stdout == (
            "The report, which lacks 1 of 5 results and names them, is results/e/early-report.html.\n"
        )
        Path("results/e/early-report.html").unlink()
