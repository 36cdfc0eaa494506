"""A study's config: read, expanded, resolved and checked, with every mistake named by file and key.

Nothing here imports torch: a dry-run reads the config and every recipe in it. The sections and their keys are the
dataclasses below; a recipe's own keys are its method's `Recipe`.

An axis is written once and used in names: with `axes: {task: [cola, rte]}`, an entry whose key (or, in a list, whose
text) holds `{task}` stands for two entries. A key `dataset` or `calibration` whose value is text refers to the entry of
that name; in the resolved recipe it is replaced by the entry's content, so that a job's parameters hold all that it
depends on.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from espalier import chains, plugins, shapes
from espalier.comparisons import Comparison
from espalier.data import Calibration, Dataset, fingerprint
from espalier.errors import UserError, did_you_mean
from espalier.recipes import as_dict, build

NAME = re.compile(chains.TOKEN)
STAGES = ("prune", "tune", "quantize")


@dataclass(frozen=True)
class Config:
    """The sections of a study."""

    study: str  # names the folders results/{study} and figures/{study}
    models: dict[str, dict]  # name: where a model comes from, and its seeds
    figures: dict[str, dict]  # name of a chart module: what the chart plots
    base: str | None = None  # path of another study, which this file then changes: see overlays.py
    title: str = ""  # one line for the report
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where jobs run; auto takes CUDA where there is one
    axes: dict[str, list[str | int]] = field(default_factory=dict)  # name: values that {name} stands for in other names
    datasets: dict[str, dict] = field(default_factory=dict)  # name: where rows come from
    calibrations: dict[str, dict] = field(default_factory=dict)  # name: a calibration set
    recipes: dict[str, dict] = field(default_factory=dict)  # token of a chain: stage and method, and its recipe
    suites: dict[str, dict] = field(default_factory=dict)  # name: an evaluation
    workloads: dict[str, dict] = field(default_factory=dict)  # name: a measurement of time and memory
    measure: list[Measure] = field(default_factory=list)  # what to measure beyond what the charts plot
    compare: list[Comparison] = field(default_factory=list)  # published values beside ours: tables/published.csv


@dataclass(frozen=True)
class Measure:
    """Suites and workloads to run on some variants of a model."""

    model: str  # name of a model
    chains: list[str]  # variants: dense, or dense+recipe+recipe
    suites: list[str] = field(default_factory=list)  # names of suites
    workloads: list[str] = field(default_factory=list)  # names of workloads


@dataclass(frozen=True)
class Model:
    """Where a model comes from: exactly one of pretrain, path and hub."""

    pretrain: str | None = None  # a method of espalier/pretrain; its recipe's keys stand beside this one
    path: str | None = None  # a local checkpoint folder
    hub: str | None = None  # an id of the Hugging Face hub
    revision: str | None = None  # for hub: the commit, 40 hexadecimal digits
    task: Literal["causal-lm", "masked-lm", "sequence-classification"] = "causal-lm"  # for path and hub
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # for path and hub: in which weights are loaded
    trust_remote_code: bool = False  # for path and hub: whether code in the checkpoint may run
    convert: bool = False  # for path and hub: weights in PyTorch's own format are written as safetensors first
    shape: str | None = None  # for hub: the file of reference/shapes that says its sizes until it is in the cache
    seeds: list[int] = field(default_factory=lambda: [0])  # each seed is a run of its own

    def check(self) -> None:
        if sum(source is not None for source in (self.pretrain, self.path, self.hub)) != 1:
            raise ValueError("a model needs exactly one of the keys 'pretrain', 'path' and 'hub'.")
        if self.hub and not re.fullmatch("[0-9a-f]{40}", self.revision or ""):
            raise ValueError("a model of the hub needs 'revision', the 40 hexadecimal digits of a commit.")
        if self.convert and self.pretrain:
            raise ValueError("'convert' is for a model of the hub or of a path.")
        if self.shape and self.path:
            raise ValueError("a model of a local folder says its sizes itself: leave out the key 'shape'.")
        if self.shape and self.hub:
            shapes.check(self.shape)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError("'seeds' must be different whole numbers from 0, at least one.")


@dataclass(frozen=True)
class DatasetEntry:
    """Where rows come from: exactly one of generate, path and hub."""

    generate: Literal["demo"] | None = None  # the demo's generated language; its recipe's keys stand beside this one
    path: str | None = None  # a local folder of {config}/{split}.jsonl
    hub: str | None = None  # an id of the Hugging Face hub
    revision: str | None = None  # for hub: the commit, 40 hexadecimal digits
    files: list[str] = field(default_factory=list)  # for hub: only these files or patterns, all as the split "train"

    def check(self) -> None:
        if sum(source is not None for source in (self.generate, self.path, self.hub)) != 1:
            raise ValueError("a dataset needs exactly one of the keys 'generate', 'path' and 'hub'.")
        if self.hub and not re.fullmatch("[0-9a-f]{40}", self.revision or ""):
            raise ValueError("a dataset of the hub needs 'revision', the 40 hexadecimal digits of a commit.")
        if self.files and not self.hub:
            raise ValueError("'files' are those of a dataset of the hub.")
        for file in self.files:
            if not file or file.startswith("/") or "://" in file or "::" in file or ".." in file.split("/"):
                raise ValueError(f"'files' are paths inside the repository of the dataset, and '{file}' is none.")


@dataclass(frozen=True)
class Step:
    """A named recipe, resolved: `content` is plain JSON, with its method under the key of its kind."""

    name: str
    kind: str  # the kind of plugin: pretrain, prune, tune, quantize, evaluate, profile, figures
    method: str
    recipe: Any  # the built Recipe of the method
    content: dict
    modules: list[str]  # the method's, and those of the plugins that its recipe names


@dataclass(frozen=True)
class Resolved:
    """A checked config; every mapping is by the names that the config gives."""

    config: Config
    models: dict[str, Model]
    pretrained: dict[str, Step]  # the models that the study trains itself
    generated: dict[str, Any]  # dataset name → recipe of espalier.demo.dataset
    calibrations: dict[str, Calibration]
    recipes: dict[str, Step]
    suites: dict[str, Step]
    workloads: dict[str, Step]
    figures: dict[str, Step]


def read(file: Path) -> dict:
    """Return a study's config as Snakemake reads it. Raises UserError for a file that is missing or no mapping."""
    import yaml

    try:
        mapping = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The study {file} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    except yaml.YAMLError as error:
        raise UserError(f"The study {file} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(mapping, dict):
        raise UserError(f"The study {file} must be a mapping of sections.")
    return mapping


def resolve(mapping: dict, file: str, results: str = "results") -> Resolved:
    """Return the checked study of a config mapping; `file` opens each error message. Raises UserError."""
    config = build(Config, expand(mapping, file), f"{file}:")
    _check_names(config, file)
    models, pretrain_entries = {}, {}
    datasets, generated = _datasets(config, file, results)
    calibrations = {
        name: build(Calibration, _refer(entry, {"dataset": datasets}, where), where)
        for name, entry in config.calibrations.items()
        for where in [f"{file}: calibrations.{name}"]
    }
    references = {"dataset": datasets, "calibration": {name: as_dict(entry) for name, entry in calibrations.items()}}
    for name, entry in config.models.items():
        where = f"{file}: models.{name}"
        own = set(Model.__dataclass_fields__)
        extra = {key: value for key, value in entry.items() if key not in own}
        if extra and entry.get("pretrain") is None:
            key = next(iter(extra))
            raise UserError(f"{where}: unknown key '{key}'.{did_you_mean(key, own)}")
        if "shape" in entry:  # of a model that the study makes, its recipe says what that means
            extra["shape"] = entry["shape"]
        models[name] = model = build(Model, {key: entry[key] for key in entry if key in own}, where)
        if model.pretrain:
            pretrain_entries[name] = {"pretrain": model.pretrain, **extra}
        elif model.path and not (Path(model.path) / "config.json").is_file():
            raise UserError(f"{where}.path: {model.path} is not a checkpoint folder: it has no config.json.")
    recipes = _steps(config.recipes, STAGES, "recipes", file, references)
    for name, step in recipes.items():
        plugins.check_device(
            plugins.load(step.kind, step.method), step.recipe, config.device, f"{file}: recipes.{name}"
        )
    return Resolved(
        config=config,
        models=models,
        generated=generated,
        calibrations=calibrations,
        pretrained=_steps(pretrain_entries, ("pretrain",), "models", file, references),
        recipes=recipes,
        suites=_steps(config.suites, ("evaluate",), "suites", file, references),
        workloads=_steps(config.workloads, ("profile",), "workloads", file, references),
        figures=_steps(
            {name: {"figures": name, **entry} for name, entry in config.figures.items()},
            ("figures",),
            "figures",
            file,
            {},
        ),
    )


def expand(mapping: dict, file: str) -> dict:
    """Return the config with every entry that names an axis repeated for each of the axis's values."""
    axes = mapping.get("axes") or {}
    if not isinstance(axes, dict) or not all(isinstance(values, list) and values for values in axes.values()):
        raise UserError(f"{file}: axes: expected name: [value, ...] with at least one value each.")
    return {key: value if key == "axes" else _expand(value, axes) for key, value in mapping.items()}


def _expand(node: Any, axes: dict) -> Any:
    if isinstance(node, dict):
        pairs = (
            (_fill(key, bound), _fill(value, bound))
            for key, value in node.items()
            for bound in _bindings(str(key) if isinstance(key, str) else "", axes)
        )
        return {key: _expand(value, axes) for key, value in pairs}
    if isinstance(node, list):
        return [
            _expand(_fill(item, bound), axes)
            for item in node
            for bound in _bindings(json.dumps(item, default=str), axes)
        ]
    return node


def _bindings(text: str, axes: dict) -> list[dict]:
    """Return one {axis: value} for each combination of the axes that `text` names; [{}] if it names none."""
    named = [axis for axis in axes if f"{{{axis}}}" in text]
    return [dict(zip(named, values, strict=True)) for values in itertools.product(*(axes[axis] for axis in named))]


def _fill(node: Any, bound: dict) -> Any:
    if not bound:
        return node
    if isinstance(node, dict):
        return {_fill(key, bound): _fill(value, bound) for key, value in node.items()}
    if isinstance(node, list):
        return [_fill(item, bound) for item in node]
    if isinstance(node, str):
        for axis, value in bound.items():
            if node == f"{{{axis}}}":
                return value  # a whole value keeps its type: bits: "{bits}" is a number
            node = node.replace(f"{{{axis}}}", str(value))
    return node


def _check_names(config: Config, file: str) -> None:
    sections = ("models", "datasets", "calibrations", "recipes", "suites", "workloads")
    names = [(section, name) for section in sections for name in getattr(config, section)]
    for section, name in [("study", config.study), *names]:
        if not NAME.fullmatch(name):
            where = "study" if section == "study" else f"{section}.{name}"
            raise UserError(f"{file}: {where}: the name '{name}' must be lower-case letters, digits, '-' and '.'.")


def _datasets(config: Config, file: str, results: str) -> tuple[dict[str, dict], dict[str, Any]]:
    datasets, generated = {}, {}
    for name, entry in config.datasets.items():
        where = f"{file}: datasets.{name}"
        own = set(DatasetEntry.__dataclass_fields__)
        extra = {key: value for key, value in entry.items() if key not in own}
        if extra and entry.get("generate") is None:
            key = next(iter(extra))
            raise UserError(f"{where}: unknown key '{key}'.{did_you_mean(key, own)}")
        source = build(DatasetEntry, {key: entry[key] for key in entry if key in own}, where)
        if source.generate:
            from espalier.demo.dataset import Recipe

            generated[name] = build(Recipe, extra, where)
            resolved = Dataset(name, "demo", path=f"{results}/{config.study}/data/{name}")
        elif source.path:
            if not Path(source.path).is_dir():
                raise UserError(f"{where}.path: there is no folder {source.path}.")
            resolved = Dataset(name, "local", path=source.path, fingerprint=fingerprint(Path(source.path)))
        else:
            resolved = Dataset(name, "hub", id=source.hub, revision=source.revision, files=tuple(source.files))
        datasets[name] = as_dict(resolved)
    return datasets, generated


def _refer(node: Any, references: dict[str, dict], where: str) -> Any:
    """Return `node` with each `dataset: name` and `calibration: name` replaced by the entry of that name."""
    if isinstance(node, dict):
        return {
            key: _entry(references[key], value, f"{where}.{key}", key)
            if key in references and isinstance(value, str)
            else _refer(value, references, f"{where}.{key}")
            for key, value in node.items()
        }
    if isinstance(node, list):
        return [_refer(item, references, f"{where}[{i}]") for i, item in enumerate(node)]
    return node


def _entry(entries: dict, name: str, where: str, kind: str) -> dict:
    if name not in entries:
        raise UserError(f"{where}: there is no {kind} '{name}'.{did_you_mean(name, entries)}")
    return entries[name]


def _steps(entries: dict, kinds: tuple[str, ...], section: str, file: str, references: dict) -> dict[str, Step]:
    steps = {}
    for name, entry in entries.items():
        where = f"{file}: {section}.{name}"
        if not isinstance(entry, dict):
            raise UserError(f"{where}: expected a mapping of keys.")
        named = [kind for kind in kinds if kind in entry]
        if len(named) != 1:
            near = next((did_you_mean(key, kinds) for key in entry if "'" in did_you_mean(key, kinds)), "")
            wanted = f"the key '{kinds[0]}'" if len(kinds) == 1 else f"exactly one of the keys {', '.join(kinds)}"
            raise UserError(f"{where}: {wanted} must say which method this is.{near}")
        (kind,) = named
        module = plugins.load(kind, entry[kind], f"{where}.{kind}")
        content = plugins.fill(module, {key: value for key, value in entry.items() if key != kind}, where)
        content = _refer(content, references, where)
        recipe = build(module.Recipe, content, where)
        # Defaults are written out: a result then says all of its recipe, and a changed default reruns its jobs.
        written = {kind: entry[kind], **as_dict(recipe)}
        try:
            modules = plugins.modules(module, recipe)
        except UserError as error:
            raise UserError(f"{where}.{error}") from None
        steps[name] = Step(name, kind, entry[kind], recipe, written, modules)
    return steps
