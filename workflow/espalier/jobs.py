"""What the scripts of the stages do: load the recipe, call its method, write the declared outputs whole."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from espalier import checkpoints, cli, plugins
from espalier.files import read_json, whole_folder, write_json
from espalier.measured import Measured
from espalier.progress import progress
from espalier.provenance import circumstances, code_version, provenance
from espalier.recipes import as_dict, build
from espalier.results import envelope


def step(kind: str, arguments: argparse.Namespace, script: Path, **more: object) -> None:
    """Make a checkpoint and its step.json from `arguments.parent` (None for pretraining) with a recipe.

    `more` goes to the method.
    """
    started = time.time()
    module, recipe, content = _start(kind, arguments)
    device = checkpoints.pick_device(arguments.device)
    plugins.check_device(module, recipe, device, "--recipe")
    with whole_folder(arguments.output) as folder:
        report = module.apply(arguments.parent, folder, recipe, seed=arguments.seed, device=device, **more)
        info = checkpoints.describe(folder)
    origin = _provenance(started, device, script, plugins.modules(module, recipe))
    _write_step(arguments, kind, content, info, report, origin)


def assist(kind: str, arguments: argparse.Namespace, **more: object) -> None:
    """Take part in what the `step` of another process makes, and write nothing."""
    module, recipe, _ = _start(kind, arguments)
    device = checkpoints.pick_device(arguments.device)
    module.apply(arguments.parent, None, recipe, seed=arguments.seed, device=device, **more)


def fetch(arguments: argparse.Namespace, script: Path, check_config: Callable[[dict], None] | None) -> None:
    """Write a pointer to a model of the hub or of a local folder, and its step.json.

    `check_config`, if there is one, gets what the model's config.json says, and may raise UserError.
    """
    started = time.time()
    with whole_folder(arguments.output) as folder:
        report = checkpoints.refer(folder, arguments.reference)
        if check_config:
            check_config(read_json(checkpoints.weights_folder(folder) / "config.json"))
        info = checkpoints.describe(folder)
    _write_step(arguments, "fetch", arguments.reference, info, report, _provenance(started, "cpu", script, []))


def evaluate(arguments: argparse.Namespace, script: Path) -> None:
    """Evaluate a checkpoint with a suite and write the raw result."""
    started = time.time()
    module, recipe, content = _start("evaluate", arguments)
    checkpoint = checkpoints.load(arguments.model, device=arguments.device)
    measured = module.measure(checkpoint, recipe, seed=arguments.seed, device=checkpoint.device)
    origin = _provenance(started, checkpoint.device, script, plugins.modules(module, recipe))
    _write_measured("evaluate", arguments, content, checkpoint.info, measured, origin)


def profile(arguments: argparse.Namespace, script: Path) -> None:
    """Measure time and memory of a checkpoint under a workload and write the raw result.

    `arguments.environment` is the file that says where the engine's own Python is, None where it has none. The model
    may run in another process: the workload says what it was made with.
    """
    started = time.time()
    module, recipe, content = _start("profile", arguments, lightly=False)
    where = {"device": arguments.device, "environment": arguments.environment}
    measured = module.measure(arguments.model, recipe, seed=arguments.seed, **where)
    code = code_version(script, plugins.modules(module, recipe))
    origin = {**circumstances(started), **measured.made_with, "code": code}
    _write_measured("profile", arguments, content, measured.checkpoint, measured, origin)


def _write_measured(
    kind: str, arguments: argparse.Namespace, content: dict, info: dict, measured: Measured, origin: dict
) -> None:
    write_json(
        arguments.output,
        envelope(
            kind=kind,
            identity=cli.identity(arguments),
            recipe=content,
            checkpoint=info,
            measurements=measured.measurements,
            samples=measured.samples,
            provenance=origin,
        ),
    )


def _write_step(arguments: argparse.Namespace, task: str, recipe: dict, info: dict, report: dict, origin: dict) -> None:
    """Write the step.json of a checkpoint that was made; `report` holds whatever the method has to say."""
    measurements = [
        {"task": task, "metric": "parameters", "value": info["parameters"], "unit": "parameters"},
        {"task": task, "metric": "seconds", "value": origin["seconds"], "unit": "s"},
    ]
    write_json(
        arguments.step,
        envelope(
            kind="step",
            identity=cli.identity(arguments),
            recipe=recipe,
            checkpoint=info,
            measurements=measurements,
            samples=report,
            provenance=origin,
        ),
    )


def _start(kind: str, arguments: argparse.Namespace, lightly: bool = True) -> tuple:
    if lightly:  # a process that drives another imports transformers not at all
        cli.import_lightly()
    progress.prefix = f"{arguments.model_name} {arguments.chain} {kind} {arguments.name}: "
    method = arguments.recipe.get(kind)
    module = plugins.load(kind, method, "--recipe")
    keys = {key: value for key, value in arguments.recipe.items() if key != kind}
    recipe = build(module.Recipe, plugins.fill(module, keys, "--recipe"), "--recipe")
    return module, recipe, {kind: method, **as_dict(recipe)}


def _provenance(started: float, device: str, script: Path, modules: list[str]) -> dict:
    return {**provenance(started, device), "code": code_version(script, modules)}
