"""What is checked before any job of a run starts, and before a dry-run: what jobs would find out hours later."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import TYPE_CHECKING

from espalier import needs
from espalier.study import Study

if TYPE_CHECKING:
    from snakemake.workflow import Workflow

LOCAL = ("local", "touch")


def check(workflow: Workflow, study: Study, executor: str) -> None:
    """Raise UserError for what this run lacks, with what to do about it.

    Jobs that are submitted have the hub switched off, and read what `snakemake prefetch` put into its cache; so do
    local jobs where the user has switched it off.
    """
    from espalier import folders, hub, hub_cache, slurm_site

    if set(workflow.dag_settings.targets) == {"prefetch"}:
        return
    dry = executor == "dryrun"
    if dry:
        executor = _asked_for()
    submits = executor not in LOCAL
    if submits:
        folders.check(study.root)
    if executor == "slurm" and not (dry and slurm_site.lacking()):  # a dry-run may be done on a laptop
        slurm_site.check(*slurm_site.requested(workflow.resource_settings, _largest_jobs(study)))
    if submits or hub_cache.switched_off():
        hub.check(study)
        os.environ.update(hub.environment(study))


def _largest_jobs(study: Study) -> dict[str, dict[str, str]]:
    """Return, for each rule that makes or measures models, the wildcard of the largest one."""
    models = {"pretrain_model": set(study.resolved.pretrained)}
    for one in study.wanted:
        for kind in (one.kind, *(study.stages[token] for token in one.chain.split("+")[1:])):
            models.setdefault(f"{kind}_model", set()).add(one.model)
    return {
        rule: {"model": max(names, key=lambda name: needs.size(study, name).bytes)}
        for rule, names in models.items()
        if names
    }


def _asked_for() -> str:
    """Return the executor that would run the jobs which a dry-run lists."""
    from snakemake.cli import parse_args

    with contextlib.redirect_stderr(io.StringIO()):  # it says once more which profiles it reads
        _, arguments = parse_args(sys.argv[1:])
    return arguments.executor or "local"
