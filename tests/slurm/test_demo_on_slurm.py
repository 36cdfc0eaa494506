"""The whole demo on a real Slurm: it measures what a finished demo in this folder measured (`make demo` first)."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from cluster import Cluster, Unavailable
from conftest import ROOT, copy_project
from disturbed import Study

pytestmark = pytest.mark.slurm_demo

TABLES = "results/demo/tables"
WITHOUT_TIMES = ("quantization_paired.csv", "calibration.json")
SECONDS = 3600


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    if not all((ROOT / TABLES / name).exists() for name in ("metrics.csv", "quantization.json", *WITHOUT_TIMES)):
        pytest.skip("There is no finished demo to compare with: make demo.")
    try:
        with Cluster() as cluster:
            study = Study(copy_project(tmp_path_factory.mktemp("demo")), cluster, "config.yaml")
            said = study.start().ends(0, SECONDS)
            jobs = int(re.search(r"(\d+) of \1 steps", said)[1]) - 1  # the target `all` runs nothing
            assert sum(study.starts().values()) == jobs, "no job ran twice"
            yield study.folder
    except Unavailable as reason:
        pytest.skip(str(reason))


def evaluated(project: Path) -> list[dict]:
    """Return the rows of the table of metrics that hold no time and no memory."""
    with (project / TABLES / "metrics.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["kind"] == "evaluate" or row["metric"] == "parameters"]
    return sorted(rows, key=lambda row: list(row.values()))


def test_all_measurements_but_times_are_those_of_a_local_run(finished):
    assert evaluated(finished) == evaluated(ROOT)


def test_accuracies_of_the_quantization_table_are_those_of_a_local_run(finished):
    here, there = (json.loads((folder / TABLES / "quantization.json").read_text()) for folder in (finished, ROOT))
    assert list(here) == list(there)
    assert [row["accuracy"] for row in here.values()] == [row["accuracy"] for row in there.values()]


@pytest.mark.parametrize("table", WITHOUT_TIMES)
def test_tables_without_times_are_those_of_a_local_run(finished, table):
    assert (finished / TABLES / table).read_text() == (ROOT / TABLES / table).read_text()
