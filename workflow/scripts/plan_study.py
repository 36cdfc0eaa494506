"""Print what a study will cost before anything runs: jobs, hours, disk, and the chain of jobs that bounds the time.

python workflow/scripts/plan_study.py config.yaml
python workflow/scripts/plan_study.py config.yaml --profile slurm

What would run is what `snakemake -n` says. Nothing runs, and no torch is needed. Exact sizes of pruned variants, and
peaks of memory: workflow/scripts/plan_sizes.py.
"""

from __future__ import annotations

import collections
import csv
import functools
import shutil
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from espalier import cli, config, needs
from espalier.files import whole_file
from espalier.job_times import ASSUMPTIONS, NEAR, Known, Times
from espalier.planned_jobs import Job, planned
from espalier.planning import RESULT_BYTES, Cost, chain_of, costs, critical_path
from espalier.study import Study

MARKS: dict[Known, str] = {"measured": " ", "like": "~", "assumed": "*"}  # behind a number, the surest first
WIDTH = 100  # columns


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("study", type=Path, metavar="STUDY.yaml", help="config of the study")
    parser.add_argument(
        "--profile", help="as for snakemake: a profile that says which jobs get a GPU and how many cores"
    )
    parser.add_argument("--csv", type=Path, help="file to write the same numbers to, one row a job")
    arguments = parser.parse_args(argv)
    study = Study(config.read(arguments.study), file=str(arguments.study))
    jobs = planned(arguments.study, arguments.profile)
    times = Times(study, jobs)
    found = costs(times)
    print(report(study, times, found))
    if arguments.csv:
        with whole_file(arguments.csv) as partial, partial.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, lineterminator="\n").writerows(rows(found))


def report(study: Study, times: Times, found: Sequence[Cost]) -> str:
    """Return the plan as text: a table by rule, the critical path, and what the numbers rest on."""
    running = [cost for cost in found if cost.job.runs]
    finished = [cost for cost in found if not cost.job.runs]
    unit = "hours" if sum(cost.seconds.value for cost in running) > 7200 else "minutes"
    parts = [table(found, unit)]
    if running:
        parts.append(path(running, critical_path(found), unit))
    if finished:
        past = [cost for cost in finished if cost.seconds.known == "measured"]
        kept = sum(cost.bytes.value for cost in finished)
        parts.append(
            f"{len(finished)} jobs are finished and fill {amount(kept)}; {len(past)} of them took"
            f" {sum(map(in_unit('hours'), past)):.2f} hours, measured."
        )
    parts.append(space(sum(cost.bytes.value for cost in running)))
    return "\n\n".join(map(wrapped, [*parts, *basis(study, times, running)]))


def table(found: Sequence[Cost], unit: str) -> str:
    """Return a line for each rule, in the order in which rules first run, and their sum; times are in hours or minutes.

    Devices are the GPUs that jobs ask for or, where none asks, one for each job that computes where the study says.
    """
    asks, taken = any(cost.job.gpus for cost in found), in_unit(unit)
    devices = f"{'GPU' if asks else 'device'}-{unit} "
    lines = [("rule", "to run", "finished", f"{unit} ", devices, f"core-{unit} ", "disk ")]
    rules = dict.fromkeys(cost.job.rule for cost in found)
    for name, group in [*((rule, [cost for cost in found if cost.job.rule == rule]) for rule in rules), ("sum", found)]:
        running = [cost for cost in group if cost.job.runs]
        known = [cost.seconds.known for cost in running]
        used = [(cost, cost.job.gpus if asks else int(cost.job.on_device)) for cost in running]
        lines.append(
            (
                name,
                str(len(running)),
                str(len(group) - len(running)),
                number(sum(map(taken, running)), known),
                number(sum(count * taken(cost) for cost, count in used), [one.seconds.known for one, n in used if n]),
                number(sum(cost.job.threads * taken(cost) for cost in running), known),
                amount(sum(cost.bytes.value for cost in running)) + weakest([cost.bytes.known for cost in running])
                if running
                else "",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(cells)
        ).rstrip()
        for line in lines
        for cells in [list(zip(line, widths, strict=True))]
    )


def path(running: Sequence[Cost], chain: Sequence[Cost], unit: str) -> str:
    """Return the critical path in words, and its jobs line by line."""
    taken = in_unit(unit)
    known = collections.Counter(cost.seconds.known for cost in running)
    text = (
        f"One after another, the {len(running)} jobs to run take {sum(map(taken, running)):.2f} {unit}:"
        f" {known['measured']} by what they took before, {known['like']} by what like jobs took, {known['assumed']} by"
        f" assumptions. With any number of nodes they take {sum(map(taken, chain)):.2f} {unit} and the time in the"
        f" queue, because each of these {len(chain)} waits for the one before:"
    )
    lines = [f"{number(taken(cost), [cost.seconds.known]):>9}  {label(cost.job)}" for cost in chain]
    return "\n".join([text, *lines])


def space(wanted: float) -> str:
    """Return what the disk of this folder has left, and whether it can hold so many bytes."""
    free = shutil.disk_usage(".").free
    lack = f", which cannot hold the {amount(wanted)} of the jobs to run" if wanted > free else ""
    return f"The disk of this folder has {amount(free)} free{lack}."


def basis(study: Study, times: Times, running: Sequence[Cost]) -> Iterable[str]:
    """Yield what the numbers rest on, in full sentences."""
    marks = {cost.seconds.known for cost in running} | {cost.bytes.known for cost in running}
    if "measured" in marks:
        yield (
            "Numbers without a mark were measured before: times when the same job last ran, with the recipe and on the"
            " machine of then; disk of what stands there now."
        )
    if "like" in marks:
        yield (
            "~ from jobs that were measured, of the same rule and recipe, or else method, on models of at most"
            f" {NEAR} times the size or a {NEAR}th of it, in proportion to their sizes."
        )
    if "assumed" in marks:
        yield (
            "* at least in part assumed, from the sizes of models. Disk: weights by parameters and bits, those of"
            f" pruned models as of the dense one; {amount(RESULT_BYTES)} any other result. What fetch_model downloads"
            " goes into the hub's cache; weights that it converts are written once more. A training also keeps its"
            " state while it runs, some 12 bytes a parameter that it trains."
        )
    if models := list(dict.fromkeys(cost.job.wildcards["model"] for cost in running if "model" in cost.job.wildcards)):
        yield "Models:\n" + "\n".join(map(functools.partial(model_line, study), models))
    if times.used:
        needed = [assumption for name, assumption in ASSUMPTIONS.items() if name in times.used]
        yield (
            "Assumptions on times (workflow/espalier/job_times.py), which jobs that ran once need no more:\n"
        ) + "\n".join(f"{assumption.number:9,g}  {assumption.meaning}" for assumption in needed)


def model_line(study: Study, model: str) -> str:
    """Return how large a model is, and how that is known."""
    size = needs.size(study, model)
    known = {
        "shape": "counted from its shape",
        "weight files": "read from its files",
        "assumed": "ASSUMED: not known before its files are here",
    }
    return f"  {model}: {size.parameters:,} parameters, {amount(size.bytes)}, {known[size.source]}"


def rows(found: Sequence[Cost]) -> Iterable[tuple]:
    """Yield the headings and a row for each job."""
    chain = {cost.job.number for cost in critical_path(found)}
    yield (
        *("rule", "model", "seed", "chain", "name", "runs", "critical", "seconds", "seconds_known", "gpus", "cores"),
        *("bytes", "bytes_known", "reason"),
    )
    for cost in found:
        job, named = cost.job, cost.job.wildcards
        model = named.get("model", "")
        yield (
            *(job.rule, model, named.get("seed", ""), chain_of(job) if model else "", name_of(job)),
            *(int(job.runs), int(job.number in chain), f"{cost.seconds.value:.2f}", cost.seconds.known),
            *(job.gpus, job.threads, round(cost.bytes.value), cost.bytes.known, job.reason),
        )


def label(job: Job) -> str:
    """Return a job in words: its rule, and which of its jobs."""
    model = job.wildcards.get("model")
    which = [model, f"seed {job.wildcards['seed']}", chain_of(job)] if model else []
    own = [] if "recipe" in job.wildcards else [name_of(job)]
    return " ".join(filter(None, [job.rule, *which, *own]))


def name_of(job: Job) -> str:
    """Return the name in the study of what a job makes: a recipe, suite, workload, chart, dataset or text."""
    named = job.wildcards
    return next((named[key] for key in named if key not in ("model", "seed", "chain", "parent")), "")


def in_unit(unit: str) -> Callable[[Cost], float]:
    """Return a function that says how long a job takes, in hours or minutes."""
    seconds = {"hours": 3600, "minutes": 60}[unit]
    return lambda cost: cost.seconds.value / seconds


def number(value: float, known: Sequence[Known]) -> str:
    """Return a sum with the mark of the least sure of its terms; nothing if it has no terms."""
    return f"{value:,.2f}{weakest(known)}" if known else ""


def amount(held: float) -> str:
    """Return bytes in words: 13.5 GB."""
    power = min(4, max(1, (len(str(round(held))) - 1) // 3))
    return f"{held / 1000**power:.3g} {' kMGT'[power]}B"


def weakest(known: Iterable[Known]) -> str:
    """Return the mark of the least sure of these."""
    order = list(MARKS)
    return MARKS[max(known, key=order.index, default="measured")]


def wrapped(text: str) -> str:
    """Return text with its first line broken into lines that fit, if it is a sentence; tables stay as they are."""
    first, *others = text.split("\n")
    return "\n".join([textwrap.fill(first, WIDTH) if "  " not in first else first, *others])


if __name__ == "__main__":
    cli.run(main)
