"""Names of the harness's tasks, found without the harness, and judged against its own index."""

from __future__ import annotations

import subprocess
import sys

import pytest

from espalier import harness_names
from espalier.hub import Item


def tasks(*names: str) -> list[Item]:
    return [Item("task", name, needed_by=("suites.zero-shot", "workloads.ask")) for name in names]


@pytest.fixture(scope="module")
def index() -> dict:
    from lm_eval.tasks import TaskManager

    return TaskManager().task_index


def test_every_name_of_the_index_is_accepted_and_few_others(index):
    found = harness_names.names()
    assert set(index) - found == set()
    assert len(found - set(index)) < 30, "names that only templates declare"
    assert harness_names.mistakes(tasks(*index)) == []


def test_the_data_sets_of_tasks_are_those_that_the_harness_reads(index):
    plain = sorted(name for name, entry in index.items() if entry.kind.name == "TASK")[::20]
    paths = {name: index[name].cfg.get("dataset_path") for name in plain}
    expected = {name: {path} if isinstance(path, str) else set() for name, path in paths.items()}
    assert {name: harness_names.data_sets(name) for name in plain} == expected
    group, tag = index["mmlu"], index["ai2_arc"]
    assert (group.kind.name, harness_names.data_sets("mmlu")) == ("GROUP", {"cais/mmlu"})
    assert (tag.kind.name, harness_names.data_sets("ai2_arc")) == ("TAG", {"allenai/ai2_arc"})


def test_all_unknown_names_are_told_with_their_keys_and_the_nearest_right_ones():
    keys = "suites.zero-shot.tasks, workloads.ask.tasks: the lm-evaluation-harness has no task"
    assert harness_names.mistakes(tasks("hellaswag", "piqua", "bolq", "arc_easy")) == [
        f"{keys} 'bolq'. Did you mean 'boolq'?",
        f"{keys} 'piqua'. Did you mean 'piqa'?",
    ]
    assert harness_names.mistakes([Item("model", "piqua/none", needed_by=("models.m",))]) == []


LOOK = """
import sys
from espalier import harness_names, hub
print(harness_names.mistakes([hub.Item("task", name) for name in ("boolq", "mmlu", "nowhere")]))
print({"lm_eval", "torch", "transformers", "datasets", "yaml", "pandas"}.intersection(sys.modules))
"""


def test_neither_the_harness_nor_torch_is_imported():
    run = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=True)
    mistakes, imported = run.stdout.splitlines()
    assert "no task 'nowhere'" in mistakes
    assert imported == "set()"
