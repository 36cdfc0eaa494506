"""What is written about the project is true of it: configs, keys, metrics, links, commands, trees, scripts."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import jsonschema
import pytest
import yaml

from conftest import ROOT, copy_project, snakemake
from espalier import config, glue_tasks, plugins, quantization_rows, reference
from espalier.config import expand
from espalier.data import Calibration, Text
from espalier.demo import dataset
from espalier.recipes import fields_of
from espalier.study import Study

SCRIPTS = sorted((ROOT / "workflow" / "scripts").glob("*.py"))
RULES = sorted((ROOT / "workflow" / "rules").glob("*.smk"))
LIBRARY = ROOT / "workflow" / "espalier"
HEAVY = ("torch", "transformers", "datasets", "pandas", "matplotlib", "numpy", "snakemake")


@cache
def tracked() -> tuple[str, ...]:
    """Return the files that git tracks, or would."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split("\0")
    return tuple(name for name in names if name and (ROOT / name).exists())


PAGES = [name for name in tracked() if name.endswith(".md")]
EXAMPLES = [name for name in tracked() if re.fullmatch(r"docs/examples/[^/]+\.yaml", name)]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def headings(text: str) -> set[str]:
    """Return the anchors that a page's headings have on its host."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


# Configs and their keys ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.yaml", *EXAMPLES])
def test_every_study_is_valid(name, tmp_path):
    """The study is valid by the code and by the schema, once the folders that a user must name are there."""
    text = page(name)
    for placeholder in sorted(set(re.findall(r"/path/to/your/\w+", text))):
        folder = tmp_path / placeholder.strip("/")
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        text = text.replace(placeholder, str(folder))
    study = yaml.safe_load(text)
    assert Study(study, name).raw_results()
    schema = json.loads(page("workflow/schemas/study.schema.json"))
    jsonschema.Draft202012Validator.check_schema(schema)
    assert [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(expand(study, name))] == []


def test_the_schema_refuses_what_the_code_refuses(demo_config):
    schema = json.loads(page("workflow/schemas/study.schema.json"))
    demo_config["recipes"]["lora"]["stepz"] = 3
    assert list(jsonschema.Draft202012Validator(schema).iter_errors(expand(demo_config, "config.yaml")))


def test_the_reference_of_keys_is_up_to_date():
    command = [sys.executable, "workflow/scripts/write_reference.py", "--check"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def recipe_classes() -> list[type]:
    """Return every dataclass that reads keys of a config, those nested in others included."""
    queue = [config.Config, config.Measure, config.Model, config.DatasetEntry, Calibration, Text, dataset.Recipe]
    kinds = tuple(kind for kind in plugins.KINDS if kind != "engines")
    queue += [cls for _, _, cls in reference.methods(kinds)]
    found: list[type] = []
    while queue:
        cls = queue.pop()
        if cls not in found and cls is not config.Dataset:
            found.append(cls)
            kinds_of_fields = [kind for kind, _ in fields_of(cls).values()]
            queue += [part for kind in kinds_of_fields for part in reference._dataclasses(kind)]
    return found


def test_every_key_has_a_meaning():
    unexplained = [
        f"{cls.__module__}.{cls.__name__}.{name}"
        for cls in recipe_classes()
        for name, comment in reference.comments(cls).items()
        if not comment and fields_of(cls)[name][0] not in reference.REFERENCES
    ]
    assert unexplained == [], "write a comment on the field's line"


def test_every_class_of_keys_has_a_docstring_and_is_in_the_page():
    text = page("docs/config.md")
    for cls in recipe_classes():
        assert cls.__doc__
        assert not cls.__doc__.startswith(f"{cls.__name__}("), f"{cls} has only the docstring that dataclass makes"
        for field in dataclasses.fields(cls):
            assert f"| `{field.name}` |" in text


# Metrics --------------------------------------------------------------------------------------------------------------


def written(file: Path) -> dict[str, str | None]:
    """Return metric → unit of the measurements written out in a module: dicts with "metric" and "unit"."""
    found = {}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            entry = {k.value: v.value for k, v in pairs if isinstance(k, ast.Constant) and isinstance(v, ast.Constant)}
            if "metric" in entry:
                found[entry["metric"]] = entry.get("unit")
    return found


def metrics_of(file: Path) -> dict[str, str | None]:
    """Return metric → unit (None: not said there) of a module, from its tables and from what it writes out."""
    module = importlib.import_module(".".join(file.relative_to(LIBRARY.parent).with_suffix("").parts))
    found = dict(getattr(module, "UNITS", {})) | dict.fromkeys(getattr(module, "METRICS", ()))
    if getattr(module, "glue_tasks", None) is glue_tasks:
        found |= dict.fromkeys(metric for task in glue_tasks.TASKS.values() for metric in task.metrics)
    return found | written(file)


def test_the_table_of_metrics_names_exactly_those_of_the_code():
    files = [LIBRARY / "jobs.py", *LIBRARY.glob("evaluate/[!_]*.py"), *LIBRARY.glob("profile/[!_]*.py")]
    in_code: dict[str, str | None] = {}
    for file in files:
        found = metrics_of(file)
        assert found, f"{file.name} has no metrics that this test can see: give it a table UNITS or METRICS"
        in_code |= found
    rows = r"^\| `(\w+)` \| ([\w/]+) \| (?:evaluate|profile|both|every)"
    table = dict(re.findall(rows, page("docs/metrics.md"), flags=re.M))
    assert table.keys() == in_code.keys()
    assert {name: unit for name, unit in in_code.items() if unit} == {
        name: table[name] for name, unit in in_code.items() if unit
    }


def test_the_numbers_of_the_quantization_table_are_defined():
    known = metrics_of(LIBRARY / "profile" / "scoring.py")
    assert set(quantization_rows.METRICS.values()) <= known.keys()
    text = page("docs/metrics.md")
    assert all(f"`{key}`" in text for key in ("avg_peak_vram_MB", "score_acc_over_vram"))
    assert quantization_rows.score(0.5, 250.0) == 1000 * 0.5 / 250


# Methods, modules, files ---------------------------------------------------------------------------------------------


def test_every_method_is_in_the_list_of_methods():
    text = page("docs/methods.md")
    for kind in plugins.KINDS:
        for name in plugins.names(kind):
            said = {"figures": f"| `{name}` |", "engines": f"| `engine: {name}` |"}.get(kind, f"| `{kind}: {name}` |")
            assert said in text, f"docs/methods.md lacks {said}"
    for named in re.findall(r"`(\w+/\w+\.py)` \|$", text, flags=re.M):
        assert (LIBRARY / named).is_file(), named


def test_every_module_is_in_the_table_of_modules():
    rows = re.findall(r"^\| ((?:`[\w./]+` ?)+)\|", page("docs/architecture.md"), flags=re.M)
    named = {name for row in rows for name in re.findall(r"`([\w./]+)`", row)}
    folders = {f"{folder.parent.name}/" for folder in LIBRARY.glob("*/__init__.py")}
    assert named == folders | {file.name for file in LIBRARY.glob("[!_]*.py")}


def tree() -> list[str]:
    """Return the paths of the tree in README.md."""
    block = re.search(r"^```text\n(Snakefile .*?)^```", page("README.md"), flags=re.M | re.S)[1]
    parents: list[str] = []
    paths = []
    for line in block.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        assert len(line.split()) > 1, f"the tree says nothing about {name}"
        parents[depth:] = [name]
        paths.append("".join(parents))
    return paths


def test_the_tree_in_the_readme_is_the_tree():
    paths = tree()
    for path in paths:
        assert (ROOT / path).exists(), path
        assert (ROOT / path).is_dir() == (path.endswith("/") or path == "slurm"), path
    tops = {name.split("/")[0] for name in tracked() if not name.startswith(".")}
    assert {path.rstrip("/") for path in paths if path.count("/") - path.endswith("/") == 0} == tops
    packages = {f"workflow/espalier/{folder.parent.name}/" for folder in LIBRARY.glob("*/__init__.py")}
    assert packages <= set(paths)


@pytest.mark.parametrize("name", PAGES)
def test_every_relative_link_leads_somewhere(name):
    text = re.sub(r"^```.*?^```", "", page(name), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), f"{name} links to {target}"
        assert not anchor or anchor in headings(file.read_text(encoding="utf-8")), f"{name} links to {target}"


# Commands -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project in which nothing has run."""
    return copy_project(tmp_path_factory.mktemp("project"))


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z-]+):", page("Makefile"), flags=re.M))
    code = [name for name in tracked() if name.startswith("workflow/") and name.endswith(".py")]
    pages = [*PAGES, "config.yaml", *code]
    named = {target for name in pages for target in re.findall(r"(?:`|^|or: )make ([a-z-]+)", page(name), flags=re.M)}
    assert {"demo", "test"} <= named
    assert named <= targets


def test_every_snakemake_command_of_the_readme_can_be_planned(project):
    """The charts and targets that the README names exist: a dry-run of all of them together succeeds."""
    text = page("README.md")
    commands = re.findall(r"^snakemake (\w+)", text, flags=re.M)
    named = re.findall(r"`(\w+)`", re.search(r"The others are (.*?)\.", text, flags=re.S)[1])
    assert {*commands, *named} == {"reference_figures", "prefetch", "report", *plugins.names("figures")}
    run = snakemake(project, "-n", *commands, *named)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_profile_for_slurm_loads(project):
    run = snakemake(project, "-n", "--cores", "64", "--profile", "slurm")
    assert run.returncode == 0, run.stdout + run.stderr
    jobs = run.stdout.split("\nrule ")[1:]
    profiles = [job for job in jobs if job.startswith("profile_model:")]
    assert profiles
    for job in profiles:
        assert re.search(r"resources:.*runtime=\d+, gres=gpu:1, slurm_extra=--exclusive", job)
        assert "threads: 8" in job
    assert not [job for job in jobs if job.startswith("draw_figure:") and "gres" in job]
    rules = {rule for file in RULES for rule in re.findall(r"^rule (\w+):", file.read_text(), flags=re.M)}
    profile = yaml.safe_load(page("profiles/slurm/config.yaml"))
    assert {*profile["set-threads"], *profile["set-resources"]} <= rules


LISTEN = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
loaded = sorted(set(sys.modules) & set({heavy!r}))
sys.exit(f"it imports {{', '.join(loaded)}}" if loaded else 0)
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_every_script_answers_help_without_heavy_imports(script):
    command = [sys.executable, "-c", LISTEN.format(heavy=HEAVY), str(script)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    first_line = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))).splitlines()[0]
    assert first_line in run.stdout
    usage = run.stdout.split("options:")[1]
    for option in set(re.findall(r"add_argument\(\s*\"(--[\w-]+)\"", script.read_text(encoding="utf-8"))):
        assert re.search(rf"^  {option}\b.*\n?\s+\S", usage, flags=re.M), f"{option} has no help"


BY_HAND = ("plan_sizes.py", "plan_study.py", "show_jobs.py", "hold_gpus.py", "draw_early_figures.py")


def test_every_rule_calls_a_script_and_every_script_of_a_stage_has_a_rule():
    rules = "".join(file.read_text(encoding="utf-8") for file in RULES)
    called = set(re.findall(r"workflow/scripts/(\w+\.py)", rules))
    assert called == {script.name for script in SCRIPTS} - {"write_reference.py", *BY_HAND}
