"""Show what the jobs of a study do: which run, wait and failed, and the last lines of each failed job's log.

python workflow/scripts/show_jobs.py config.yaml
python workflow/scripts/show_jobs.py config.yaml --follow

It is run in the folder that snakemake runs in, from another shell, on this machine or as jobs of Slurm, during a run or
after it. It writes nothing, and neither waits for snakemake nor keeps it waiting.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

from espalier import cli, config, slurm_queue, watching
from espalier.errors import UserError
from espalier.slurm_queue import Queued
from espalier.watching import Job, Run

BAR = 30  # characters
LOG_LINES = 8  # of a failed job
LONGEST_COMMAND = 6000  # characters; a table's names every result of its study
UNHEARD = "; snakemake hears of it within 3 minutes"  # how long it may wait before it looks into the queue again


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    study = {"type": Path, "nargs": "?", "default": Path("config.yaml"), "metavar": "STUDY.yaml"}
    parser.add_argument("study", **study, help="config of the study; without it config.yaml")
    parser.add_argument(
        "--follow",
        type=float,
        nargs="?",
        const=10.0,
        metavar="SECONDS",
        help="show it again every SECONDS seconds (10 if no number is given) until the run has ended",
    )
    arguments = parser.parse_args(argv)
    name = config.read(arguments.study).get("study")
    if name is None:
        raise UserError(f"The study {arguments.study} has no key 'study', which names it.")
    while True:
        text, working = show(name, Path("results") / name)
        if arguments.follow and sys.stdout.isatty():
            print("\033[2J\033[H", end="")  # an empty screen
        print(text, flush=True)
        if not (arguments.follow and working):
            return
        time.sleep(arguments.follow)


def show(name: str, folder: Path) -> tuple[str, bool]:
    """Return what there is to see of a study's run, and whether a snakemake is at work on it."""
    run = watching.read(folder / watching.EVENTS)
    holder = watching.at_work(folder / watching.LOCK, run)
    if holder is not None and (run is None or run.total is None or holder.get("pid") != run.pid):
        return f"{name}: {_who(holder)} is at work and has not begun a job yet.", True
    if run is None:
        return f"{name}: no job has run yet: snakemake begins them ({folder / watching.EVENTS} is not there).", False
    if not run.total:
        return f"{name}: {_idle(run)}", holder is not None
    working, jobs, silent = holder is not None, run.of("started"), ""
    submitted = sorted({job.slurm for job in jobs if job.slurm})
    try:
        queued = slurm_queue.queue(submitted) if submitted else {}
    except OSError as error:
        queued, silent = None, f"Slurm does not answer ({error}): which of these jobs run and which wait is not known."
    waiting = [job for job in jobs if queued and (found := queued.get(job.slurm)) and found.state == "PENDING"]
    running = [job for job in jobs if job not in waiting]
    parts = [f"{name}: {_state(run, holder)}\n{_counts(run, len(running), len(waiting))}", silent]
    if running:
        title = "Running" if working else "Running when snakemake ended"
        rows = [_running(job, run, queued, working) for job in running]
        parts.append(_table(title, ("rule", "job", "for", "where", "last line of its log"), rows))
    if waiting:
        rows = [_waiting(job, queued[job.slurm]) for job in waiting]
        parts.append(_table("Waiting in the queue", ("rule", "job", "for", "Slurm job", "why"), rows))
    if again := run.of("again"):
        rows = [(job.rule, job.name, f"attempt {job.attempt}", job.why()) for job in again]
        parts.append(_table("Failed, and to be tried again", ("rule", "job", "", "why"), rows))
    parts += map(_failed, run.of("failed"))
    return "\n\n".join(filter(None, parts)), working


def _who(holder: dict) -> str:
    """Return a name for a snakemake; one that has just begun has not said its own."""
    if not holder:
        return "snakemake"
    return f"snakemake (process {holder['pid']} on {holder['host']}, since {holder['started']})"


def _idle(run: Run) -> str:
    """Return in one sentence why a run had no jobs."""
    if run.total is None:
        return f"snakemake ended at {_clock(run.last)} before it began a job; .snakemake/log/ has what it said."
    return f"all was done already when snakemake looked, at {_clock(run.last)}."


def _state(run: Run, holder: dict | None) -> str:
    """Return in one sentence whether the run goes on, has ended, or was cut off."""
    if holder is not None:
        return f"{_who(holder)} is at work."
    last = _clock(run.last)
    if run.of("started", "again"):
        return f"snakemake was stopped or killed after {last}, with jobs under way; the same command goes on."
    if run.of("failed"):
        return f"the run ended at {last} with failures; the same command tries the failed jobs again and goes on."
    if len(run.of("done")) < run.total:
        return f"snakemake was stopped or killed after {last}; the same command goes on."
    return f"the run ended at {last}, all its jobs done."


def _counts(run: Run, running: int, waiting: int) -> str:
    done, failed, again = (len(run.of(state)) for state in ("done", "failed", "again"))
    to_come = run.total - done - running - waiting - failed - again
    filled = BAR * done // run.total
    counted = [f"{done} of {run.total} jobs done", f"{running} running", f"{waiting} waiting in the queue"]
    counted += [f"{failed} failed", *([f"{again} to be tried again"] if again else []), f"{to_come} to come"]
    return f"[{'#' * filled}{'-' * (BAR - filled)}] {', '.join(counted)}"


def _running(job: Job, run: Run, queued: dict[str, Queued] | None, working: bool) -> tuple[str, ...]:
    where, elapsed = run.host, _elapsed((time.time() if working else run.last) - job.since)
    told = next(iter(job.tail(1)), "")
    if job.slurm:
        found = queued.get(job.slurm) if queued else None
        where = f"Slurm job {job.slurm}" + (f" on {found.node}" if found and found.node else "")
        elapsed = found.elapsed if found else elapsed
        if queued is not None and (found is None or found.state not in slurm_queue.RUN):
            told = (f"{found.state} in Slurm" if found else "no longer in Slurm") + (UNHEARD if working else "")
    elif not job.local:
        where = "not in Slurm's queue yet"
    return job.rule, _name(job), elapsed, where, told


def _waiting(job: Job, found: Queued) -> tuple[str, ...]:
    start = "" if found.start in ("N/A", "") else f"; expected to start {found.start.replace('T', ' ')}"
    waits = slurm_queue.in_words(found.reason)
    return job.rule, _name(job), _elapsed(time.time() - job.since), str(job.slurm), waits + start


def _failed(job: Job) -> str:
    number = f", Slurm job {job.slurm}" if job.slurm else ""
    lines = [f"Failed: {job.rule} {_name(job, first=True)}{number}: {job.why()}."]
    told = job.tail(LOG_LINES)
    if job.log:
        lines.append(f"  {job.log}" + ("" if told else " (this attempt wrote nothing into it)"))
        lines += [f"  | {line}" for line in told]
    if job.slurm_log:
        lines.append(f"  {os.path.relpath(job.slurm_log)}")
        lines += [f"  | {line}" for line in ([] if told else watching.last_lines(job.slurm_log, LOG_LINES))]
    if len(job.command) > LONGEST_COMMAND:
        lines.append("  Its command is too long to be shown; snakemake --printshellcmds prints it.")
    elif job.command:
        lines += ["  To repeat it by hand, with the environment activated:", f"  {job.command.strip()}"]
    return "\n".join(lines)


def _name(job: Job, first: bool = False) -> str:
    return f"{job.name}, attempt {job.attempt}" if first or job.attempt > 1 else job.name


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _elapsed(seconds: float) -> str:
    """Return a time as Slurm writes it: 05:12, 1:02:03, 1-02:03:04."""
    minutes, second = divmod(int(max(0, seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}-{hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute:02}:{second:02}"


def _table(title: str, headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return rows under a title, in columns as wide as they need; a terminal's width ends the last one."""
    widths = [max(len(row[i]) for row in (headings, *rows)) for i in range(len(headings) - 1)]
    width = shutil.get_terminal_size((200, 0)).columns
    lines = []
    for row in (headings, *rows):
        cells = [cell.ljust(size) for cell, size in zip(row, widths, strict=False)]
        lines.append("  ".join(["", *cells, row[-1]]).rstrip()[:width])
    return "\n".join([title, *lines])


if __name__ == "__main__":
    cli.run(main)
