"""What is checked before any job of a run starts, and before a dry-run: what jobs would find out hours later."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from snakemake_interface_executor_plugins.settings import SharedFSUsage

from espalier import needs
from espalier.errors import UserError
from espalier.study import Study

if TYPE_CHECKING:
    from snakemake.jobs import Job
    from snakemake.workflow import Workflow

    from espalier.hub import Item

LOCAL = ("local", "touch")
RULES = tuple(f"{kind}_model" for kind in ("pretrain", "prune", "tune", "quantize", "distill", "evaluate", "profile"))
BEGIN = ("pretrain_model", "fetch_model")  # rules that make dense models
COMPARE_TEXTS = ("check_calibration", "make_calibration_table")  # rules that read all calibration sets and suites
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def prefetches(workflow: Workflow) -> bool:
    """Return whether this run downloads what others need, and does nothing else."""
    return set(workflow.dag_settings.targets) == {"prefetch"}


def submits() -> bool:
    """Return whether the snakemake that this process is, also in a dry-run, is asked to submit its jobs."""
    return _asked_for()[0] not in LOCAL


def check(workflow: Workflow, study: Study, executor: str, settings: object) -> None:
    """Raise UserError for what this run lacks, with what to do about it.

    Jobs that are submitted on a shared file system have the hub switched off, and read what `snakemake prefetch` put
    into its cache; so do local jobs where the user has switched it off. `settings` are the executor's own.
    """
    from espalier import folders, hub, hub_cache, slurm_site

    dry = executor == "dryrun"
    if dry:
        executor, settings = _asked_for()
    submits = executor not in LOCAL and SharedFSUsage.PERSISTENCE in workflow.storage_settings.shared_fs_usage
    if submits:
        folders.check(study.root, hub.written(study))
    if executor == "slurm" and not (dry and slurm_site.lacking()):  # a dry-run may be done on a laptop
        largest = _largest_jobs(study)
        resources, default, threads = slurm_site.requested(workflow.resource_settings, largest)
        for rule in set(RULES) - set(largest):  # of no job of this study
            resources.pop(rule, None)
            threads.pop(rule, None)
        chooses = getattr(settings, "partition_config", None) or os.environ.get("SNAKEMAKE_SLURM_PARTITIONS")
        slurm_site.check(resources, default, threads, plugin_chooses=bool(chooses))
    offline = submits or hub_cache.switched_off()
    _check_hub(study, offline, asks=executor == "local" and not dry)
    if offline:
        os.environ.update(hub.environment(study))
        _check_cache_later(workflow, study)
    if submits:
        for name in TOKENS:  # Slurm keeps the environment of its jobs, and these ask no hub
            os.environ.pop(name, None)


def _check_hub(study: Study, offline: bool, asks: bool) -> None:
    """Raise UserError for tasks that the harness lacks; as the run ends here, it says all that is wrong at once.

    Otherwise what is wrong with what the jobs read is said once they are known: where they are `offline` what the cache
    lacks (`_check_cache_later`), and of a run that `asks` what the hub refuses (`ask_hub`).
    """
    from espalier import harness_names, hub, hub_questions

    needed = hub.needed(study)
    mistakes = [f"{study.file}: {sentence}" for sentence in harness_names.mistakes(needed)]
    if not mistakes:
        return
    if offline:
        try:
            hub.check(study, needed)
        except UserError as error:
            mistakes.append(str(error))
    elif asks:
        mistakes += [f"{study.file}: {sentence}" for sentence in hub_questions.refusals(study, needed)]
    raise UserError("\n".join(mistakes))


def _check_cache_later(workflow: Workflow, study: Study) -> None:
    """Have `workflow` raise UserError for all that its jobs need of the hub and the cache lacks, once they are known.

    Also in a dry-run, where Snakemake calls no `onstart`.
    """
    from espalier import hub

    build = workflow._build_dag

    def build_and_check() -> None:
        build()
        if not workflow.touch:
            hub.check(study, _needed(workflow, study))

    workflow._build_dag = build_and_check


def ask_hub(workflow: Workflow, study: Study) -> None:
    """Raise UserError for all that the jobs of this run would ask the hub for in vain.

    Called when the jobs are known and none has started. Only the main process of a run on this machine asks.
    """
    from espalier import hub_cache, hub_questions

    here = workflow.is_main_process and workflow.local_exec and not workflow.touch
    if not here or prefetches(workflow) or hub_cache.switched_off():
        return
    if refusals := hub_questions.refusals(study, _needed(workflow, study)):
        raise UserError("\n".join(f"{study.file}: {sentence}" for sentence in refusals))


def _needed(workflow: Workflow, study: Study) -> list[Item]:
    """Return what the jobs of this run read of the hub."""
    from espalier import hub

    read = _entries_read(workflow.dag.needrun_jobs(), study)
    return [item for item in hub.needed(study) if read.intersection(item.needed_by)]


def _entries_read(jobs: Iterable[Job], study: Study) -> set[str]:
    """Return the entries of the study, such as suites.zero-shot, that jobs read, as `hub.needed` names them.

    Of a model that the study makes or converts, only the job that does so reads what its entry names.
    """
    sections = {"model": "models", "suite": "suites", "workload": "workloads", "recipe": "recipes"}
    read = set()
    for job in jobs:
        read |= {
            f"{sections[key]}.{name}"
            for key, name in job.wildcards_dict.items()
            if key in sections and (key != "model" or job.rule.name in BEGIN or _points_to_hub(study, name))
        }
        if job.rule.name in COMPARE_TEXTS:
            read |= {
                f"{section}.{name}"
                for section in ("calibrations", "suites")
                for name in getattr(study.resolved, section)
            }
    return read


def _points_to_hub(study: Study, model: str) -> bool:
    """Return whether a model's own folder is a pointer to the hub's cache."""
    entry = study.resolved.models[model]
    return entry.hub is not None and not entry.convert


def _largest_jobs(study: Study) -> dict[str, dict[str, str]]:
    """Return, for each rule that makes or measures models, the wildcard of the largest one."""
    models = {"pretrain_model": set(study.resolved.pretrained)}
    for one in study.wanted:
        for rule in (f"{one.kind}_model", *map(study.rule, one.chain.split("+")[1:])):
            models.setdefault(rule, set()).add(one.model)
    return {
        rule: {"model": max(names, key=lambda name: needs.size(study, name).bytes)}
        for rule, names in models.items()
        if names
    }


def _asked_for() -> tuple[str, object]:
    """Return the executor that would run the jobs which a dry-run lists, and its settings."""
    from snakemake.cli import parse_args
    from snakemake_interface_executor_plugins.registry import ExecutorPluginRegistry

    with contextlib.redirect_stderr(io.StringIO()):  # it says once more which profiles it reads
        _, arguments = parse_args(sys.argv[1:])
    executor = arguments.executor or "local"
    return executor, ExecutorPluginRegistry().get_plugin(executor).get_settings(arguments)
