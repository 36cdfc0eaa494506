"""The jobs of a study as Snakemake plans them, with what depends on what and why each would run: a dry-run's own graph.

Snakemake is run in a process of its own, because it reads its command line wherever it likes, and so do profiles. That
process is this module: python -m espalier.planned_jobs JOBS.json -n …
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from espalier.errors import UserError
from espalier.files import read_json, write_json
from espalier.slurm_nodes import gpus_of

if TYPE_CHECKING:
    from snakemake.dag import DAG

UNLIMITED = "100000"  # cores; a dry-run would take one, and cap each job's threads at it


@dataclass(frozen=True)
class Job:
    """One job that makes files."""

    number: int  # in this list
    rule: str
    wildcards: dict[str, str]
    outputs: list[str]  # paths
    benchmark: str | None  # where Snakemake writes how long it took
    runs: bool  # False: it is finished, and nothing that it depends on has changed
    reason: str  # why it runs
    threads: int
    gpus: int  # that it asks for
    on_device: bool  # whether it computes where the study's key `device` says
    parents: list[int]  # numbers of the jobs whose files it reads


def planned(study: Path, profile: str | None = None) -> list[Job]:
    """Return all jobs that `snakemake -n --configfile STUDY` has in its graph, finished ones too; parents come first.

    Raises UserError with Snakemake's words if it cannot plan.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "jobs.json"
        command = [sys.executable, "-m", __name__, str(found), "-n", "--quiet", "rules", "progress"]
        command += ["--configfile", str(study), "--cores", UNLIMITED]
        command += ["--profile", profile] if profile else []
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode or not found.is_file():
            said = " ".join((run.stderr + run.stdout).split())
            raise UserError(f"Snakemake cannot plan the study {study}: {said[-1000:]}")
        return [Job(**job) for job in read_json(found)["jobs"]]


def _jobs(dag: DAG) -> Iterator[Job]:
    """Yield the jobs of a graph, without those that only name targets."""
    numbers = {}
    levels = (sorted(level, key=lambda job: (job.rule.name, list(job.output))) for level in dag.toposorted())
    for job in (job for level in levels for job in level if job.output):
        numbers[job] = len(numbers)
        parents = sorted(numbers[parent] for parent in dag.dependencies[job] if parent in numbers)
        yield Job(
            number=numbers[job],
            rule=job.rule.name,
            wildcards=dict(job.wildcards_dict),
            outputs=[str(path) for path in job.output],
            benchmark=str(job.benchmark) if job.benchmark else None,
            runs=dag.needrun(job),
            reason=str(dag.reason(job)) if dag.needrun(job) else "",
            threads=job.threads,
            gpus=max(job.resources.get("gpu", 0), gpus_of(job.resources.get("gres", ""))),
            on_device="device" in job.params.keys(),  # noqa: SIM118  (not a mapping)
            parents=parents,
        )


def main() -> None:
    """Run snakemake with the command line behind the first argument, and write its graph into the file named there."""
    from snakemake import cli

    from espalier import takeover

    file = Path(sys.argv.pop(1))

    def guard(workflow, *_) -> None:
        """In place of what the Snakefile calls before jobs run: none runs, and what a site lacks matters later."""
        execute = workflow.execute

        def executed(**given) -> None:
            execute(**given)
            write_json(file, {"jobs": [asdict(job) for job in _jobs(workflow.dag)]})

        workflow.execute = executed

    takeover.guard = guard
    cli.main()


if __name__ == "__main__":
    main()
