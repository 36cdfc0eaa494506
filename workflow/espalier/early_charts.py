"""Charts of a study that lacks results: drawn from those that are there, and saying which are not.

A raw result counts as there if this config and this code would make the same: it and every step before it have the
recipe and the code version of now, none began before the step that it was made from, and no generated data set or file
that it read is newer. Snakemake would make any other again, and a chart of it would show the numbers of another config.
"""

from __future__ import annotations

import calendar
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from espalier import chains, drawing, tables
from espalier.errors import UserError
from espalier.study import Study, Wanted

NAMED = 4  # missing results that a chart names; the others are counted


class Early(NamedTuple):
    """An early chart: the path of its files without their suffix, and how many of its results it shows."""

    prefix: Path
    there: int
    wanted: int


@dataclass
class Current:
    """The raw results of a study that count as there; each is read once."""

    study: Study
    _found: dict[Wanted, dict | None] = field(default_factory=dict)

    def result(self, one: Wanted) -> dict | None:
        """Return a raw result, None if it is not there, damaged, or not what would be made now."""
        if one not in self._found:
            try:
                result = tables.read(Path(self.study.path(one)))
            except UserError:
                result = None
            self._found[one] = result if result and self._holds(one, result) else None
        return self._found[one]

    def _holds(self, one: Wanted, result: dict) -> bool:
        origin = result["provenance"]
        recipe, code, data = self._made_with(one)
        if (result["recipe"], origin["code"]) != (json.loads(recipe), code):
            return False
        before = _step_before(one)
        parent = self.result(before) if before else None
        if before and (parent is None or parent["provenance"]["started"] > origin["started"]):
            return False
        # Whole seconds of the start are recorded, so that the end may be later by one.
        ended = calendar.timegm(time.strptime(origin["started"], "%Y-%m-%dT%H:%M:%SZ")) + origin["seconds"] + 1
        return all(self._unchanged(Path(path), ended) for path in data)

    def _made_with(self, one: Wanted) -> tuple[str, str, list[str]]:
        """Return the recipe (JSON) and code version that a result would have now, and what it would read besides."""
        study = self.study
        if one.kind == "step" and one.chain == chains.DENSE and one.model not in study.resolved.pretrained:
            return study.reference(one.model), study.code("fetch_model.py"), []
        if one.kind == "step":
            token = chains.split(one.chain)[1]
            section, name = ("recipes", token) if token else ("pretrained", one.model)
        else:
            section, name = {"evaluate": "suites", "profile": "workloads"}[one.kind], one.name
        script = f"{study.step(section, name).kind}_model.py"
        return study.content(section, name), study.code(script, section, name), study.data(section, name)

    def _unchanged(self, path: Path, ended: float) -> bool:
        """Return whether what a job read that ended then is still the same: a generated data set, or a file."""
        generated = path.name in self.study.resolved.generated and path.parent == self.study.root / "data"
        try:
            if generated:
                summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
                if summary["recipe"] != json.loads(self.study.generated(path.name)):
                    return False
                path /= "summary.json"
            return path.stat().st_mtime <= ended
        except (OSError, ValueError):
            return False


def _step_before(one: Wanted) -> Wanted | None:
    """Return the step that made the model which a result is about, or from which a step made its own."""
    chain, token = chains.split(one.chain)
    if one.kind == "step" and token is None:
        return None
    chain = chain if one.kind == "step" else one.chain
    return one._replace(chain=chain, kind="step", name=chains.split(chain)[1] or chains.DENSE)


def draw(study: Study, figure: str, current: Current) -> Early | None:
    """Draw a chart early, if some of its results are there, but not all; remove its early chart otherwise.

    Raises UserError if it cannot be drawn from these results.
    """
    by_path = {study.path(one): one for one in study.wanted}
    wanted = [by_path[path] for path in study.figure_results(figure)]
    results = [result for one in wanted if (result := current.result(one))]
    if not results or len(results) == len(wanted):
        drawing.remove_early(study.figures / figure)
        return None
    prefix = drawing.early(study.figures / figure)
    points, title = drawing.measured(figure, study.step("figures", figure).content, results)
    missing = [one for one in wanted if not current.result(one)]
    count = f"{len(results)} of {len(wanted)} results"
    note = f"Early: {count}; missing: {_listed(study, wanted, missing)}."
    drawing.save(figure, points, f"{title} (early: {count})", prefix, note)
    return Early(prefix, len(results), len(wanted))


def _listed(study: Study, wanted: Sequence[Wanted], missing: Sequence[Wanted]) -> str:
    """Return the first missing results by chain, suite or workload, and, where a chart has several, model and seed."""
    models = {one.model for one in wanted}
    named = []
    for one in missing[:NAMED]:
        about = [] if one.kind == "step" else [one.name]
        about += [f"seed {one.seed}"] if len(study.resolved.models[one.model].seeds) > 1 else []
        about += ["out of date"] if Path(study.path(one)).exists() else []
        chain = f"{one.model} {one.chain}" if len(models) > 1 else one.chain
        named.append(f"{chain} ({', '.join(about)})" if about else chain)
    more = len(missing) - NAMED
    return ", ".join(named) + (f", and {more} more" if more > 0 else "")
