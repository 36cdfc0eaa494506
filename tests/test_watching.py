"""One command shows what runs, waits and failed, from what a real snakemake writes down of its jobs.

Its jobs do nothing but what their names say. Slurm is a folder of fakes, which real code submits to and asks.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from conftest import ROOT, copy_project, environment, snakemake
from espalier import slurm_queue, watching

SNAKEFILE = """
import sys
from pathlib import Path
from espalier import takeover, watching

execute = workflow.execute

def alone(*given, **named):
    with takeover.alone(Path("results/mini/snakemake.lock"), "mini"):
        watching.record(Path("results/mini/events.jsonl"))
        return execute(*given, **named)

workflow.execute = alone

rule make:
    output: "results/mini/{job}.txt"
    log: "results/mini/logs/make/{job}.log"
    wildcard_constraints: job="[a-z]+"
    resources: mem_mb=700, runtime=5
    shell: sys.executable + " make.py {wildcards.job} {output} 2>&1 | tee {log}"

use rule make as task with:
    output: "results/mini/task/{job}.txt"
    log: "results/mini/logs/task/{job}.log"

use rule make as pair with:
    output: "results/mini/pair/{job}.txt"
    log: "results/mini/logs/pair/{job}.log"
    group: "pairs"

rule pairs:
    input: "results/mini/pair/a.txt", "results/mini/pair/b.txt"
    output: "results/mini/pairs.txt"
    group: "pairs"
    shell: "touch {output}"
"""

MAKE = """
import os, pathlib, sys, time
job, output = sys.argv[1:]
if job == "slow":
    print("step: 1 of 9", "step: 2 of 9", sep=chr(13), flush=True)
    while not os.path.exists("go"):
        time.sleep(0.05)
if job == "bad":
    print(*(f"line {i}" for i in range(20)), sep=chr(10))
    sys.exit(3)
if job == "shot":
    os.kill(os.getpid(), 9)
if job == "twice" and not os.path.exists("once"):
    pathlib.Path("once").touch()
    sys.exit(1)
if job != "lost":
    pathlib.Path(output).touch()
"""

# A job's state in the queue is what its name says: Snakemake's plugin writes the name into the job's comment.
SBATCH = """#!/bin/sh
case "$*" in *_wildcards_refused*) echo "sbatch: error: invalid partition specified: nowhere" >&2; exit 1;; esac
number=$$
case "$*" in
    *--array=*) lines="${number}_1|RUNNING|None|node3|0:05|T ${number}_2|PENDING|JobArrayTaskLimit||0:00|N/A";;
    *_wildcards_waiting*) lines="$number|PENDING|ReqNodeNotAvail,UnavailableNodes:n7||0:00|2030-01-02T03:04:05";;
    *_wildcards_memory*) lines="$number|OUT_OF_MEMORY|OutOfMemory|node1|0:09|T";;
    *_wildcards_late*) lines="$number|TIMEOUT|TimeLimit|node1|5:00|T";;
    *_wildcards_gone*) lines="";;
    *) lines="$number|RUNNING|None|node2|1-02:03:04|T";;
esac
for line in $lines; do echo "$line" >> queue; done
echo "$number"
"""
SQUEUE = """#!/bin/sh
case "$*" in
    *--me*) ;;
    *%N*) cat queue;;
    *) cut -d '|' -f 1,2 queue;;
esac
"""
FAKES = {"sbatch": SBATCH, "squeue": SQUEUE, "scancel": "#!/bin/sh\n", "sinfo": "#!/bin/sh\n"}
FAKES |= {"scontrol": "#!/bin/sh\necho 'MinJobAge = 300 sec'\n", "sacct": "#!/bin/sh\nexit 1\n"}


@pytest.fixture
def mini(tmp_path) -> Path:
    """A folder with a workflow of a few jobs that take no time."""
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    (tmp_path / "make.py").write_text(MAKE)
    (tmp_path / "config.yaml").write_text("study: mini\n")
    return tmp_path


@pytest.fixture
def start(mini):
    """Start snakemake in the folder; whatever still runs at the end of the test is ended."""
    begun = []

    def start(*arguments: str, path: Path | None = None) -> subprocess.Popen:
        settings = environment(ROOT)
        if path:
            settings["PATH"] = f"{path}{os.pathsep}{settings['PATH']}"
        command = [
            sys.executable,
            "-m",
            "snakemake",
            "--latency-wait",
            "0",
            "--keep-going",
            "--rerun-incomplete",
            "--nolock",
        ]
        with (mini / "said").open("w") as said:
            begun.append(subprocess.Popen([*command, *arguments], cwd=mini, env=settings, stdout=said, stderr=said))
        return begun[-1]

    yield start
    (mini / "go").touch()
    for process in begun:
        process.kill()
        process.wait()


def show(folder: Path, *arguments: str, path: str | None = None) -> str:
    """Return what the command says."""
    settings = {**environment(ROOT), "COLUMNS": "200", **({"PATH": path} if path else {})}
    command = [sys.executable, str(ROOT / "workflow/scripts/show_jobs.py"), *arguments]
    answer = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=60)
    return answer.stdout + answer.stderr


def until(folder: Path, condition) -> watching.Run:
    """Return the run that snakemake writes down, once the condition holds."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        run = watching.read(folder / "results/mini/events.jsonl")
        if run and condition(run):
            return run
        time.sleep(0.05)
    raise AssertionError((folder / "said").read_text())


def outputs(*names: str) -> list[str]:
    return [f"results/mini/{name}.txt" for name in names]


def test_a_run_on_this_machine(mini, start):
    assert show(mini) == "mini: no job has run yet: snakemake begins them (results/mini/events.jsonl is not there).\n"
    process = start("--cores", "9", "--retries", "1", *outputs("slow", "good", "bad", "shot", "lost", "twice"))
    until(mini, lambda run: len(run.of("failed")) == 3 and len(run.of("done")) == 2)
    said = show(mini)
    assert re.search(rf"^mini: snakemake \(process {process.pid} on \S+, since [\d: -]+\) is at work\.$", said, re.M)
    assert f"[{'#' * 10}{'-' * 20}] 2 of 6 jobs done, 1 running, 0 waiting in the queue, 3 failed, 0 to come\n" in said
    assert re.search(r"^  make  slow  00:\d\d  \S+ +step: 2 of 9$", said, re.M)
    assert "Failed: make bad, attempt 2: exit status 3." in said
    lines = "".join(f"  | line {i}\n" for i in range(12, 20))
    assert f"attempt 2: exit status 3.\n  results/mini/logs/make/bad.log\n{lines}  To repeat it by hand" in said
    assert f"\n  {sys.executable} make.py bad results/mini/bad.txt 2>&1 | tee results/mini/logs/make/bad.log\n" in said
    assert "Failed: make shot, attempt 2: ended by SIGKILL, most often for want of memory." in said
    assert "Failed: make lost, attempt 2: its command succeeded, but its outputs cannot be seen here;" in said
    assert "twice" not in said
    threading.Timer(1.0, (mini / "go").touch).start()
    followed = show(mini, "--follow", "0.2")
    assert followed.count(" is at work.\n") >= 2
    assert followed.count("the run ended") == 1
    assert process.wait(60) == 1
    said = show(mini, "config.yaml")
    assert re.match(r"mini: the run ended at [\d: -]+ with failures; the same command tries the failed", said)
    assert "3 of 6 jobs done, 0 running, 0 waiting in the queue, 3 failed, 0 to come" in said


def test_a_run_that_is_killed_and_one_that_ends_well(mini, start):
    process = start("--cores", "1", *outputs("slow", "good"))
    until(mini, lambda run: "slow" in [job.name for job in run.of("started")])
    process.kill()
    process.wait()
    said = show(mini)
    assert re.match(r"mini: snakemake was stopped or killed after [\d: -]+, with jobs under way; the same", said)
    assert re.search(r"^Running when snakemake ended\n.*\n  make  slow ", said, re.M)
    again = start("--cores", "1", *outputs("slow", "good"))
    # The job of the killed run waits for "go" too: let go before the jobs are planned, it would have done the work.
    until(mini, lambda run: run.pid == again.pid and "slow" in [job.name for job in run.of("started")])
    (mini / "go").touch()
    assert again.wait(60) == 0, (mini / "said").read_text()
    said = show(mini)
    assert re.match(r"mini: the run ended at [\d: -]+, all its jobs done\.\n", said)
    assert f"[{'#' * 30}] " in said
    assert "Failed" not in said
    assert "Running" not in said
    assert start("--cores", "1", *outputs("good")).wait(60) == 0
    assert re.match(r"mini: all was done already when snakemake looked, at [\d: -]+\.\n$", show(mini))


def test_a_run_on_slurm(mini, start, tmp_path):
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    for name, text in FAKES.items():
        (fakes / name).write_text(text)
        (fakes / name).chmod(0o755)
    jobs = outputs("running", "waiting", "memory", "late", "gone", "refused", "task/a", "task/b", "pairs")
    slurm = ["--executor", "slurm", "--jobs", "20", "--slurm-no-account", "--slurm-array-jobs", "task"]
    slurm += ["--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "1"]
    start(*slurm, "--default-resources", "slurm_partition=cpu", "--", *jobs, path=fakes)
    until(mini, lambda run: len(run.of("failed")) == 3 and len([job for job in run.jobs.values() if job.slurm]) == 10)
    said = show(mini, path=f"{fakes}{os.pathsep}{os.environ['PATH']}")
    assert "0 of 11 jobs done, 6 running, 2 waiting in the queue, 3 failed, 0 to come" in said
    table = said[said.index("Running\n") : said.index("Waiting")]
    for job in ("make   running", "pair   a      ", "pair   b      "):
        assert re.search(rf"^  {job} +1-02:03:04  Slurm job \d+ on node2$", table, re.M), table
    assert re.search(r"^  task   [ab] +0:05 +Slurm job \d+_1 on node3$", table, re.M), table
    assert re.search(r"gone .* Slurm job \d+ +no longer in Slurm; snakemake hears of it within 3 minutes", table), table
    table = said[said.index("Waiting") : said.index("Failed")]
    reason = "a node that it needs is down, drained or reserved (ReqNodeNotAvail,UnavailableNodes:n7)"
    assert re.search(rf"make  waiting  00:\d\d  \d+ +{re.escape(reason)}; expected to start 2030-01-02 03:04:05", table)
    assert re.search(r"task  [ab] +00:\d\d  \d+_2 +as many tasks of its array run as may run at once \(JobArray", table)
    assert re.search(r"Failed: make memory, attempt 1, Slurm job \d+: out of memory; it had mem_mb=700\.\n", said)
    assert re.search(r"Failed: make late, .*: past its time limit; it had runtime=5 minutes\.\n", said)
    assert "refused by Slurm: sbatch: error: invalid partition specified: nowhere." in said
    assert "results/mini/logs/make/memory.log (this attempt wrote nothing into it)" in said
    assert re.search(r"^  \.snakemake/slurm_logs/rule_make/memory/\d+\.log$", said, re.M)
    (fakes / "squeue").write_text(
        "#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"
    )
    said = show(mini, path=f"{fakes}{os.pathsep}{os.environ['PATH']}")
    assert "Slurm does not answer (slurm_load_jobs error: Unable to contact slurm controller): which of these" in said
    assert "8 running, 0 waiting" in said


def test_a_snakemake_that_plans_is_told_from_the_run_before_it(tmp_path):
    folder = tmp_path / "results/mini"
    folder.mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("study: mini\n")
    earlier = {"event": "run", "time": 0.0, "pid": 1, "host": "here"}, {"event": "planned", "time": 0.0, "total": 4}
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in earlier))
    with (folder / "snakemake.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(json.dumps({"pid": 2, "host": "there", "started": "today"}))
        lock.flush()
        planning = "mini: snakemake (process 2 on there, since today) is at work and has not begun a job yet.\n"
        assert show(tmp_path) == planning
        lock.truncate(0)
        assert show(tmp_path) == "mini: snakemake is at work and has not begun a job yet.\n"
    with (folder / "snakemake.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # somebody else watches at the same moment
        assert show(tmp_path).startswith("mini: snakemake was stopped or killed after ")
    (folder / "events.jsonl").write_text(json.dumps(earlier[0]) + "\n")
    said = show(tmp_path)
    assert re.match(r"mini: snakemake ended at [\d: -]+ before it began a job; \.snakemake/log/ has what it said", said)


def test_where_the_file_system_has_no_locks_the_process_is_looked_for(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / "lock").touch()
    for pid, host, there in (
        (os.getpid(), socket.gethostname(), True),
        (os.getpid(), "elsewhere", False),
        (2**22 + 1, socket.gethostname(), False),  # larger than any process number
    ):
        run = watching.Run(pid=pid, host=host, started=0.0, last=0.0)
        assert (watching.at_work(tmp_path / "lock", run) is not None) is there


def test_a_thousand_jobs_are_shown_within_three_seconds(tmp_path):
    folder = tmp_path / "results/mini"
    folder.mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("study: mini\n")
    events = [{"event": "run", "time": 0.0, "pid": 1, "host": "here"}, {"event": "planned", "time": 0, "total": 1000}]
    for number in range(1000):
        log = folder / f"logs/make/{number}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("step\n" * 1000)
        told = {"rule": "make", "log": str(log.relative_to(tmp_path)), "asked": {}, "local": False}
        events.append({"event": "started", "time": 1.0, "job": number, **told})
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"event": "do')
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = show(tmp_path)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    # The processor's time: a busy machine lengthens the clock's.
    assert (ended.ru_utime + ended.ru_stime) - (began.ru_utime + began.ru_stime) < 3
    assert "0 of 1000 jobs done, 1000 running, 0 waiting in the queue, 0 failed, 0 to come" in said
    assert said.count("  step\n") == 1000


def test_the_workflow_writes_down_its_own_jobs(tmp_path, monkeypatch):
    """The project's Snakefile records a run, with the log that its rule names, and a dry-run does not."""
    project = copy_project(tmp_path)
    events = project / "results/demo/events.jsonl"
    target = "results/demo/data/world"
    run = snakemake(project, "-n", target)
    assert run.returncode == 0, run.stdout + run.stderr
    assert not events.exists()
    stand_in = tmp_path / "stand-in"
    stand_in.mkdir()
    (stand_in / "sitecustomize.py").write_text(
        "import os, sys\nif sys.orig_argv[1:2] == ['workflow/scripts/generate_data.py']:\n"
        "    print('a mistake', flush=True)\n    os._exit(2)\n"
    )
    assert snakemake(project, "--cores", "1", target, python_path=[stand_in]).returncode == 1
    (job,) = watching.read(events).of("failed")
    assert (job.rule, job.name, job.why()) == ("generate_data", "world", "exit status 2")
    monkeypatch.chdir(project)
    assert job.tail(8) == ["a mistake"]
    assert job.command.startswith("python workflow/scripts/generate_data.py --recipe '{")


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Priority", "jobs of higher priority come first (Priority)"),
        ("(Resources)", "what it asks for is not free (Resources)"),
        ("QOSMaxGRESPerUser", "a limit of its quality of service is reached (QOSMaxGRESPerUser)"),
        ("AssocGrpCpuLimit", "a limit of its account is reached (AssocGrpCpuLimit)"),
        ("SomethingNew", "SomethingNew"),
    ],
)
def test_reasons_in_words(reason, words):
    assert slurm_queue.in_words(reason) == words


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ("Command 'a' returned non-zero exit status 1.\nCommand 'b' returned non-zero exit status 130.", "SIGINT"),
        ("Command 'a' died with <Signals.SIGTERM: 15>.", "ended by SIGTERM"),
        ("Command 'a' returned non-zero exit status 255.", "exit status 255"),
        ("the file system is full", "its command failed"),
    ],
)
def test_how_a_command_ended(told, words):
    assert words in watching.Job("make", None, {}, local=True, since=0.0, message=told).why()


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        ("mine.yaml", None, "The study mine.yaml cannot be read: No such file or directory."),
        ("mine.yaml", "models: {}", "The study mine.yaml has no key 'study', which names it."),
        ("mine.yaml", "study: {", "The study mine.yaml is not valid YAML: "),
    ],
)
def test_a_study_that_has_no_name(tmp_path, file, text, sentence):
    if text is not None:
        (tmp_path / file).write_text(text)
    assert show(tmp_path, file).startswith(f"error: {sentence}")
