"""Mistakes of a study in what is read: tasks that a dataset does not hold, and calibration on what is evaluated."""

from __future__ import annotations

from pathlib import Path

from espalier.config import Resolved
from espalier.errors import UserError, did_you_mean


def check_tasks(resolved: Resolved, file: str) -> None:
    """Raise UserError, opened by `file`, for a suite or workload that names a task which its dataset does not hold."""
    for section in ("suites", "workloads"):
        for name, step in getattr(resolved, section).items():
            dataset, tasks = getattr(step.recipe, "dataset", None), getattr(step.recipe, "tasks", None)
            if dataset is None or tasks is None:
                continue
            if dataset.source == "demo":
                from espalier.demo.questions import QUESTIONS as known
            else:
                known = [task.stem for task in (Path(dataset.path) / "tasks").glob("*.yaml")]
            for task in tasks:
                if task not in known:
                    where = f"{file}: {section}.{name}.tasks"
                    raise UserError(f"{where}: '{dataset.name}' has no task '{task}'.{did_you_mean(task, known)}")


def check_calibrations(resolved: Resolved, file: str) -> None:
    """Raise UserError for a calibration set without a name, or on the very rows that a suite evaluates.

    Evaluated text that stands elsewhere too is found in the text alone, by the job check_calibration.
    """
    for name, step in resolved.recipes.items():
        calibration = getattr(step.recipe, "calibration", None)
        if calibration is not None and calibration not in resolved.calibrations.values():
            where = f"{file}: recipes.{name}.calibration"
            raise UserError(f"{where}: expected the name of an entry of the section calibrations.")
    for name, calibration in resolved.calibrations.items():
        for suite, step in resolved.suites.items():
            text = getattr(step.recipe, "text", None)
            if text is not None and calibration.text.overlaps(text):
                raise UserError(
                    f"{file}: calibrations.{name}: its text (dataset '{calibration.text.dataset.name}', split"
                    f" '{calibration.text.split}') is what suites.{suite} evaluates (split '{text.split}')."
                    " Calibrate on other text."
                )
