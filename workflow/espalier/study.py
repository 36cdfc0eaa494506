"""What a study's jobs are: the questions that the Snakemake rules ask of a resolved config."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

from espalier import (
    chains,
    comparisons,
    devices,
    environments,
    glue_chains,
    group_sizes,
    overlays,
    plugins,
    published_points,
    study_data,
)
from espalier.config import Resolved, Step, resolve
from espalier.data import Calibration, Text
from espalier.errors import UserError, did_you_mean
from espalier.provenance import code_version
from espalier.recipes import as_dict
from espalier.results import path_of
from espalier.slurm_nodes import gpus_of

SCRIPTS = Path(__file__).parents[1] / "scripts"


class Wanted(NamedTuple):
    """One raw result: an evaluation or a profile of one variant."""

    model: str
    seed: int
    chain: str
    kind: str  # evaluate, profile or step
    name: str  # of the suite, the workload or the step's recipe


class Study:
    """A checked study; `mapping` is Snakemake's config, which `file` holds, for error messages and the path of a base.

    `submits` says whether its jobs are submitted to a cluster, whose devices cannot be seen from here.
    """

    def __init__(
        self,
        mapping: dict,
        file: str = "config.yaml",
        results: str = "results",
        figures: str = "figures",
        submits: Callable[[], bool] = lambda: False,
    ):
        self.configfile = file
        self.mapping, self.file = overlays.merged(mapping, file)
        self.resolved: Resolved = resolve(self.mapping, self.file, results)
        self.config = self.resolved.config
        self.name = self.config.study
        self.results, self.figures = Path(results), Path(figures) / self.name
        self.root = self.results / self.name
        study_data.check_tasks(self.resolved, self.file)
        glue_chains.check_data([*self.resolved.recipes.values(), *self.resolved.suites.values()], self.file)
        study_data.check_calibrations(self.resolved, self.file)
        self._check_environments(submits)
        self.wanted = self._wanted()

    # What to make -----------------------------------------------------------------------------------------------------

    def everything(self) -> list[Wanted]:
        """Return all raw results of the study: measurements, and the steps that lead to them."""
        steps = {
            Wanted(one.model, one.seed, chain, "step", chains.split(chain)[1] or chains.DENSE)
            for one in self.wanted
            for chain in chains.ancestors(one.chain)
        }
        return sorted(set(self.wanted) | steps)

    def raw_results(self) -> list[str]:
        """Return the paths of all raw results of the study."""
        return [self.path(one) for one in self.everything()]

    def figure_results(self, figure: str) -> list[str]:
        """Return the paths of the raw results that a chart plots."""
        return [self.path(one) for one in self._needs(self.resolved.figures[figure])]

    def comparison_results(self) -> list[str]:
        """Return the paths of the raw results that the table of published values compares, or that its charts plot."""
        of_charts = map(self.figure_results, comparisons.charts(self.resolved))
        return sorted({self.path(one) for one in self._compared()}.union(*of_charts))

    def path(self, one: Wanted) -> str:
        return str(path_of(self.results, study=self.name, **one._asdict()))

    # What a job depends on --------------------------------------------------------------------------------------------

    def step(self, section: str, name: str) -> Step:
        """Return the step `name` of a section of the resolved config (recipes, suites, workloads, figures …)."""
        return getattr(self.resolved, section)[name]

    def content(self, section: str, name: str) -> str:
        """Return a resolved recipe as JSON: the parameter that reruns a job when its recipe changes."""
        return json.dumps(self.step(section, name).content)

    def code(self, script: str, section: str | None = None, name: str | None = None, module: str | None = None) -> str:
        """Return the code version of a script, with a plugin's `module`, or the one that a recipe names."""
        modules = self.step(section, name).modules if section else [module] if module else []
        return _code(script, tuple(modules))

    def timed(self, workload: str) -> bool:
        """Return whether a workload measures time: then its jobs must share the machine with no other."""
        return plugins.load("profile", self.step("workloads", workload).method).TIMED

    def environment(self, workload: str) -> str | None:
        """Return the environment of its own that a workload's engine has on the study's device; None: the main one.

        The device `auto` is what this machine has; where jobs are submitted it is refused, if it matters.
        """
        of_engine = self._environments(workload)
        return of_engine.get(self._device) if of_engine else None

    def environment_file(self, environment: str) -> Path:
        """Return the study's file that says where the Python of an environment is."""
        return self.root / "environments" / f"{environment}.json"

    def environment_folder(self, environment: str) -> Path:
        """Return the folder of an environment, which all studies share."""
        return self.results / "environments" / environment

    def environment_files(self, workload: str | None = None) -> list[str]:
        """Return the files about the environments that a workload needs, or, without one, all that is measured."""
        workloads = {one.name for one in self.wanted if one.kind == "profile"} if workload is None else {workload}
        return sorted({str(self.environment_file(name)) for name in map(self.environment, workloads) if name})

    @property
    def environments(self) -> set[str]:
        """The environments that the study's engines have, on any device."""
        return {name for workload in self.resolved.workloads for name in self._environments(workload).values()}

    def processes(self, name: str, resources: Mapping) -> int:
        """Return how many processes share the training of a recipe: one a GPU asked for, if its method can divide it.

        GPUs are asked for by the resource `gpu`, or by Slurm's `gres`, such as "gpu:4" or "gpu:a100:4".
        """
        step = self.step("recipes", name)
        module = plugins.load(step.kind, step.method)
        if not hasattr(module, "processes"):
            return 1
        return module.processes(step.recipe, max(1, resources.get("gpu", 0), gpus_of(resources.get("gres", ""))))

    def gpus(self, resources: Mapping, submitted: bool) -> str:
        """Return what a job's command begins with: it takes its GPUs itself, unless it was submitted and given them."""
        count = 0 if submitted or self.config.device == "cpu" else resources.get("gpu", 0)
        return f"python workflow/scripts/hold_gpus.py {count} " if count else ""

    def generated(self, dataset: str) -> str:
        """Return the recipe of a generated dataset as JSON."""
        return json.dumps(as_dict(self.resolved.generated[dataset]), sort_keys=True)

    def data(self, section: str, name: str) -> list[str]:
        """Return the folders of generated datasets that a recipe reads, and what its method says it `reads`."""
        step = self.step(section, name)
        module = plugins.load(step.kind, step.method)
        files = module.reads(step.recipe) if hasattr(module, "reads") else []
        return sorted({found["path"] for found in _datasets(step.content)} | set(files))

    def calibrations(self, text: str | None = None) -> str:
        """Return the study's calibration sets by name, as JSON: all, or those of one text."""
        sets = self.resolved.calibrations if text is None else self.texts[text]
        return json.dumps({name: as_dict(calibration) for name, calibration in sets.items()})

    def suites(self) -> str:
        """Return the resolved recipes of the study's suites by name, as JSON."""
        return json.dumps({name: step.content for name, step in self.resolved.suites.items()})

    @cached_property
    def texts(self) -> dict[str, dict[str, Calibration]]:
        """The calibration sets by their text, whose name says its content: another text has another name."""
        texts: dict[str, dict[str, Calibration]] = {}
        for name, calibration in self.resolved.calibrations.items():
            texts.setdefault(_text_name(calibration.text), {})[name] = calibration
        return texts

    def calibration_data(self) -> list[str]:
        """Return the folders of generated datasets that calibration sets and suites read."""
        read = [json.loads(self.calibrations()), json.loads(self.suites())]
        return sorted({found["path"] for found in _datasets(read)})

    def calibration_code(self) -> str:
        """Return the code version of the check of calibration sets, with the methods of all suites."""
        modules = {module for step in self.resolved.suites.values() for module in step.modules}
        return code_version(SCRIPTS / "check_calibration.py", sorted(modules))

    def calibration_check(self, recipe: str) -> list[str]:
        """Return the file which says that the text that a recipe calibrates on, if it does, holds nothing evaluated."""
        calibration = getattr(self.step("recipes", recipe).recipe, "calibration", None)
        return [] if calibration is None else [f"{self.root}/calibration/{_text_name(calibration.text)}.json"]

    def calibration_table(self, figure: str) -> list[str]:
        """Return the table that sees every edit of a suite, if a chart shows what was calibrated."""
        steps = {token for one in self._needs(self.step("figures", figure)) for token in one.chain.split("+")[1:]}
        return [f"{self.root}/tables/calibration.json"] if any(map(self.calibration_check, steps)) else []

    def reference(self, model: str) -> str:
        """Return where a model of the hub or a local folder is, as JSON, with a fingerprint of a local one."""
        entry = self.resolved.models[model]
        return json.dumps(
            {
                "path": entry.path,
                "id": entry.hub,
                "revision": entry.revision,
                "task": entry.task,
                "dtype": entry.dtype,
                "trust_remote_code": entry.trust_remote_code,
                "convert": entry.convert,
                "fingerprint": _fingerprint(Path(entry.path)) if entry.path else None,
            },
            sort_keys=True,
        )

    def shape(self, model: str) -> str:
        """Return the argument that says which shape a model must agree with once it is there; "" for none."""
        shape = self.resolved.models[model].shape
        return f"--shape {shape}" if shape else ""

    # Wildcards --------------------------------------------------------------------------------------------------------

    def pattern(self, names: Iterable[str]) -> str:
        """Return a regular expression of exactly these names; one that matches nothing if there are none."""
        return "|".join(map(re.escape, sorted(names))) or "(?!)"

    chain_pattern = chains.CHAIN

    def rule_pattern(self, rule: str) -> str:
        """Return a regular expression of exactly the recipes whose steps a rule makes."""
        return self.pattern(name for name in self.resolved.recipes if self.rule(name) == rule)

    def rule(self, recipe: str) -> str:
        """Return the rule that makes a recipe's steps: that of its stage, but for quantizers that train."""
        step = self.resolved.recipes[recipe]
        trains = getattr(plugins.load(step.kind, step.method), "TRAINS", False)
        return "distill_model" if trains else f"{step.kind}_model"

    # Checks -----------------------------------------------------------------------------------------------------------

    @cached_property
    def stages(self) -> dict[str, str]:
        return {name: step.kind for name, step in self.resolved.recipes.items()}

    def _environments(self, workload: str) -> dict[str, str]:
        """Return device → environment of the engine that a workload's recipe names, if it names one."""
        engine = getattr(self.step("workloads", workload).recipe, "engine", None)
        return environments.of_engine(engine) if engine else {}

    @cached_property
    def _device(self) -> str:
        asked = self.config.device
        return asked if asked != "auto" else "cuda" if devices.present() else "cpu"

    def _check_environments(self, submits: Callable[[], bool]) -> None:
        """Refuse a workload whose engine needs an environment that has no lock, or that nobody here can choose."""
        for workload, step in self.resolved.workloads.items():
            of_engine = self._environments(workload)
            if self.config.device == "auto" and of_engine.get("cpu") != of_engine.get("cuda") and submits():
                raise UserError(
                    f"{self.file}: device: say cuda or cpu: the engine '{step.recipe.engine}' has another environment"
                    " on each."
                )
            for name in of_engine.values():
                if not (lock := environments.lock_file(name)).is_file():
                    raise UserError(
                        f"{self.file}: workloads.{workload}.engine: the engine '{step.recipe.engine}' needs the"
                        f" environment {name}, and its lock {lock} does not exist."
                    )

    def _wanted(self) -> list[Wanted]:
        wanted: set[Wanted] = set()
        for i, entry in enumerate(self.config.measure):
            where = f"{self.file}: measure[{i}]"
            for kind, names in (("evaluate", entry.suites), ("profile", entry.workloads)):
                for name in names:
                    for chain in entry.chains:
                        wanted.update(self._expand(entry.model, chain, kind, name, where))
        for step in self.resolved.figures.values():
            wanted.update(self._needs(step))
        return sorted(wanted.union(self._compared()))

    def _compared(self) -> list[Wanted]:
        found = comparisons.needs(self.resolved, self.file)
        return [one for need, where in found for one in self._expand(*need, where)]

    def _needs(self, step: Step) -> list[Wanted]:
        where = f"{self.file}: figures.{step.name}"
        module = plugins.load("figures", step.method)
        try:
            needs = module.needs(step.recipe)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        wanted = sorted({one for need in needs for one in self._expand(*need, where)})
        for one in wanted:
            if one.kind == "step" and (name := self._method(one.chain)) != module.STEP:
                raise UserError(
                    f"{where}: this chart shows steps of '{module.STEP}', and '{one.chain}' ends in '{name}'."
                )
        self._check_tasks(step, where)
        made = comparisons.made_here(self.resolved, {one.kind for one in wanted})
        published_points.check(step.recipe, {one.model for one in wanted}, made, where)
        return wanted

    def _check_tasks(self, step: Step, where: str) -> None:
        """Refuse a chart of tasks that its suite does not score: the chart would fail after all jobs have run."""
        plotted, suite = getattr(step.recipe, "tasks", {}), getattr(step.recipe, "suite", None)
        scored = getattr(self.resolved.suites[suite].recipe, "tasks", None) if isinstance(suite, str) else None
        for task in plotted if scored is not None else ():
            if task not in scored:
                raise UserError(f"{where}.tasks: the suite '{suite}' has no task '{task}'.{did_you_mean(task, scored)}")

    def _expand(self, model: str, chain: str, kind: str, name: str, where: str) -> list[Wanted]:
        """Return one Wanted a seed, after checking that model, chain and suite or workload exist and go together."""
        models = self.resolved.models
        if model not in models:
            raise UserError(f"{where}: there is no model '{model}'.{did_you_mean(model, models)}")
        if kind == "step":
            chains.check(chain, self.stages, where)
            self._task(model, chain, where)
            return [Wanted(model, seed, chain, kind, name) for seed in models[model].seeds]
        section = {"evaluate": "suites", "profile": "workloads"}[kind]
        known = getattr(self.resolved, section)
        if name not in known:
            raise UserError(f"{where}: there is no {section[:-1]} '{name}'.{did_you_mean(name, known)}")
        chains.check(chain, self.stages, where)
        task = self._task(model, chain, where)
        takes = plugins.load(kind, known[name].method).TAKES
        if task not in takes:
            raise UserError(
                f"{where}: {section}.{name} measures {' or '.join(takes)} models, but {model} with the chain '{chain}'"
                f" is a {task} model."
            )
        steps = [*(self.resolved.recipes[token] for token in chain.split("+")[1:]), known[name]]
        glue_chains.check(model, models[model], steps, f"{where}: the chain '{chain}' of {model}")
        return [Wanted(model, seed, chain, kind, name) for seed in models[model].seeds]

    def _method(self, chain: str) -> str:
        """Return the method of a chain's last step."""
        token = chains.split(chain)[1]
        return self.resolved.recipes[token].method if token else chains.DENSE

    def _task(self, model: str, chain: str, where: str) -> str:
        """Return what kind of model a chain ends in; refuses a method that cannot take what comes before it."""
        entry = self.resolved.models[model]
        task = plugins.load("pretrain", entry.pretrain).GIVES if entry.pretrain else entry.task
        for token in chain.split("+")[1:]:
            step = self.resolved.recipes[token]
            module = plugins.load(step.kind, step.method)
            if task not in module.TAKES:
                raise UserError(
                    f"{where}: the chain '{chain}' of {model} makes no sense: '{token}' ({step.kind}: {step.method})"
                    f" takes a {' or '.join(module.TAKES)} model, and finds a {task} model."
                )
            task = getattr(module, "GIVES", task)
        steps = [self.resolved.recipes[token] for token in chain.split("+")[1:]]
        group_sizes.check(
            group_sizes.sizes_of(entry, self.resolved.pretrained.get(model)), steps, f"{where}: the chain '{chain}'"
        )
        return task


@cache  # each of a study's jobs asks
def _code(script: str, modules: tuple[str, ...]) -> str:
    return code_version(SCRIPTS / script, modules)


def _text_name(text: Text) -> str:
    digest = hashlib.sha256(json.dumps(as_dict(text)).encode()).hexdigest()
    return f"{text.dataset.name}-{digest[:8]}"


def _datasets(node: Any) -> Iterable[dict]:
    """Yield the generated datasets anywhere in a resolved recipe."""
    if isinstance(node, dict):
        if node.get("source") == "demo" and "path" in node:
            yield node
        for value in node.values():
            yield from _datasets(value)
    elif isinstance(node, list):
        for value in node:
            yield from _datasets(value)


def _fingerprint(folder: Path) -> dict:
    """Return sizes of a checkpoint's files and the content of its config: cheap, and blind to a mere touch."""
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()}
    return {"sizes": sizes, "config": (folder / "config.json").read_text(encoding="utf-8")}
