"""What `make test-studies` made: every chart of the papers' studies in small, with all its results, and no claim."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas
import pytest

from conftest import ROOT, snakemake
from espalier.config import read
from espalier.study import Study

pytestmark = pytest.mark.studies

FILES = sorted((ROOT / "studies" / "shape").glob("*.yaml"))
CANNOT_RUN = {"TensorRT-LLM"}  # on a CPU


@pytest.fixture(scope="module", params=FILES, ids=lambda file: file.stem)
def study(request) -> Study:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        study = Study(read(request.param), str(request.param.relative_to(ROOT)))
        if not (study.root / "tables" / "metrics.csv").exists():
            pytest.skip(f"{study.name} has not been run: make test-studies")
        yield study


def test_nothing_is_left_to_do(study):
    run = snakemake(ROOT, "-n", "--configfile", study.configfile, "--", "all", "report")
    assert run.returncode == 0, run.stderr
    assert "Nothing to be done" in run.stdout + run.stderr


def test_every_chart_is_drawn_with_all_its_results(study):
    for name in study.resolved.figures:
        for suffix in (".pdf", ".svg", ".png"):
            assert (study.figures / f"{name}{suffix}").stat().st_size > 5000
        points = pandas.read_csv(study.figures / f"{name}.csv")
        lacking = points[points["outcome"].fillna("ok") != "ok"]
        assert set(lacking.get("series", ())) <= CANNOT_RUN, lacking.to_string()
        assert len(points) > len(lacking)


def test_every_result_says_that_its_weights_are_random(study):
    for path in map(Path, study.raw_results()):
        result = json.loads(path.read_text())
        assert result["checkpoint"]["weights"] == "random", path


def test_nothing_is_compared_with_published_values(study):
    table = pandas.read_csv(study.root / "tables" / "published.csv")
    assert len(table)
    assert table["measured"].isna().all()
    assert table["inside"].isna().all()
    assert table["why"].str.contains("is made by Espalier").all()


def test_the_report_says_so_at_its_top(study):
    page = (study.root / "report.html").read_text()
    top = re.sub(r"<[^>]+>", " ", page[page.index("<body") :])[:3000]
    assert "random weights" in top
