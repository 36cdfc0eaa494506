"""A study on a real Slurm: undisturbed, and through every fault, after which nothing differs but the clock.

The study is run once. Every fault gets a copy of it, in which a few jobs are to be done again, and disturbs these.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from cluster import GPUS, Cluster, Unavailable
from conftest import copy_project
from disturbed import EVALUATE, EVALUATE_TUNED, OUTPUTS, PRUNE, TUNE, Study, ended, wait_until
from espalier import needs

pytestmark = pytest.mark.slurm

# Without its GPU the pruned model is made beside other tests, whatever these do with the GPUs.
LOG = "results/slurm/logs/tune_model/tiny-llama.s3.dense+lora.log"
NO_GPU = ("--set-resources", "prune_model:mem_mb=4000")


@pytest.fixture(scope="module")
def cluster():
    try:
        with Cluster() as cluster:
            yield cluster
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory) -> Study:
    """The study, finished; while it runs, each of its jobs is asked what it was given."""
    study = Study(copy_project(tmp_path_factory.mktemp("undisturbed")), cluster)
    study.snakemake()
    return study


def test_the_command_as_typed_lists_the_demo(undisturbed):
    """`snakemake --profile slurm -n`, with nothing else."""
    command = [Path(sys.executable).with_name("snakemake"), "--profile", "slurm", "-n", "--quiet", "rules"]
    run = subprocess.run(
        command, cwd=undisturbed.folder, env=undisturbed.environment(), capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "prune_model" in run.stdout


def test_every_job_runs_once_and_those_of_models_have_a_gpu(undisturbed):
    assert set(undisturbed.starts().values()) == {1}
    for start in undisturbed.started():
        of_a_model = start["job"].split()[0] in ("pretrain_model", "prune_model", "tune_model", "evaluate_model")
        assert (start["gpus"] in [str(gpu) for gpu in range(GPUS)]) == of_a_model
    jobs = undisturbed.jobs()
    assert len(jobs) == 7
    assert {job["JobState"] for job in jobs} == {"COMPLETED"}
    assert all(("gres:gpu:1" in job.get("TresPerNode", "")) == ("_model" in job["Comment"]) for job in jobs)


def test_a_second_run_has_nothing_to_do(undisturbed):
    assert "Nothing to be done" in undisturbed.snakemake("-n")


def job_cancelled(undisturbed: Study, folder: Path) -> None:
    """`scancel` of a job that runs: it is tried again."""
    study = undisturbed.copy(folder, PRUNE)
    study.hold(PRUNE)
    run = study.start(*NO_GPU)
    run.holds(PRUNE)
    study.cluster.run("scancel", study.jobs(PRUNE)[-1]["JobId"])
    run.until(lambda: study.states(PRUNE)[0] == "CANCELLED")
    study.release(PRUNE)
    run.ends(0)
    study.check(undisturbed, {PRUNE: 2})


def out_of_memory(undisturbed: Study, folder: Path) -> None:
    """A job that needs more memory than it asked for: it is tried again with more."""
    study = undisturbed.copy(folder, PRUNE)
    run = study.start("--set-resources", f"prune_model:mem_mb={needs.memory(base=450)}")
    run.ends(0)
    first, second = study.jobs(PRUNE)
    assert "exceeded memory limit" in Path(first["StdOut"]).read_text()
    assert [first["MinMemoryNode"], second["MinMemoryNode"]] == ["450M", "900M"]
    study.check(undisturbed, {PRUNE: 2})


def past_its_time(undisturbed: Study, folder: Path) -> None:
    """A job that takes longer than it asked for: it is tried again with more time."""
    study = undisturbed.copy(folder, PRUNE)
    study.hold(PRUNE)
    run = study.start("--set-resources", f"prune_model:runtime={needs.minutes(base=1)}", "prune_model:mem_mb=4000")
    run.holds(PRUNE)
    run.until(lambda: study.states(PRUNE)[0] == "TIMEOUT")
    study.release(PRUNE)
    run.ends(0)
    assert [job["TimeLimit"] for job in study.jobs(PRUNE)] == ["00:01:00", "00:02:00"]
    study.check(undisturbed, {PRUNE: 2})


def training_stopped(undisturbed: Study, folder: Path) -> None:
    """A training that is told, as two minutes before the end of its time, to save itself: the next one goes on."""
    study = undisturbed.copy(folder, TUNE)
    study.hold(TUNE, at=f"handler of signal {signal.SIGTERM:d}")
    run = study.start("--set-resources", "tune_model:mem_mb=4000", "evaluate_model:mem_mb=4000")
    run.holds(TUNE)
    study.cluster.run("scancel", "--signal=TERM", study.jobs(TUNE)[-1]["JobId"])
    time.sleep(1)
    study.release(TUNE)
    run.ends(0)
    assert "going on after step" in (folder / LOG).read_text()
    study.check(undisturbed, {TUNE: 2, EVALUATE_TUNED: 1})


def killed_while_writing(undisturbed: Study, folder: Path) -> None:
    """A job all of whose processes are killed when its model is there, and its record half written."""
    study = undisturbed.copy(folder, PRUNE)
    study.hold(PRUNE, at=".step.json.partial")
    run = study.start(*NO_GPU)
    run.holds(PRUNE)
    assert (study.folder / OUTPUTS[PRUNE] / "model").is_dir()
    study.cluster.run("scancel", "--signal=KILL", "--full", study.jobs(PRUNE)[-1]["JobId"])
    run.until(lambda: study.states(PRUNE)[0] in ("FAILED", "CANCELLED"))
    study.release(PRUNE)
    run.ends(0)
    study.check(undisturbed, {PRUNE: 2})


def disk_full(undisturbed: Study, folder: Path) -> None:
    """No space for a model, nor for anything else: the run ends and says so; with space again, the command goes on."""
    folder.mkdir()
    with small_disk(folder):
        study = undisturbed.copy(folder, PRUNE)
        study.hold(PRUNE)
        run = study.start(*NO_GPU, "--retries", "0")
        run.holds(PRUNE)
        ballast = folder / "ballast"
        with ballast.open("wb", buffering=0) as stream, pytest.raises(OSError, match="No space left"):
            while True:
                stream.write(bytes(4096))
        study.release(PRUNE)
        run.ends(1)
        assert not (folder / OUTPUTS[PRUNE] / "step.json").exists()
        assert "the file system is full" in study.start(*NO_GPU).ends(1)
        ballast.unlink()
        study.snakemake(*NO_GPU)
        study.check(undisturbed, {PRUNE: 2})


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Put a file system of 64 MB at a folder."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"A small disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def two_at_once(undisturbed: Study, folder: Path) -> None:
    """A second snakemake on the same study is refused with a sentence, and the first one goes on."""
    study = undisturbed.copy(folder, PRUNE)
    study.hold(PRUNE)
    run = study.start(*NO_GPU)
    run.holds(PRUNE)
    refused = study.start(*NO_GPU).ends(1)
    assert refused.count("Another snakemake is at work on the study 'slurm'") == 1
    assert "Traceback" not in refused
    study.release(PRUNE)
    run.ends(0)
    study.check(undisturbed, {PRUNE: 1})


def node_drained(undisturbed: Study, folder: Path) -> None:
    """A node drained while a job runs there: that one ends well, the next one waits until the node is back."""
    study = undisturbed.copy(folder, PRUNE, EVALUATE)
    study.hold(PRUNE)
    run = study.start("--jobs", "1", "--prioritize", f"{OUTPUTS[PRUNE]}/step.json")
    run.holds(PRUNE)
    study.cluster.drain()
    study.release(PRUNE)
    run.until(lambda: study.states(EVALUATE) == ["PENDING"])
    assert study.states(PRUNE) == ["COMPLETED"]
    time.sleep(3)
    assert study.states(EVALUATE) == ["PENDING"]
    study.cluster.resume()
    run.ends(0)
    study.check(undisturbed, {PRUNE: 1, EVALUATE: 1})


def controller_killed(undisturbed: Study, folder: Path) -> None:
    """slurmctld is killed; a job ends while it is away; it is started again."""
    study = undisturbed.copy(folder, PRUNE)
    study.hold(PRUNE)
    run = study.start()
    process = run.holds(PRUNE)
    study.cluster.kill_controller()
    study.release(PRUNE)
    wait_until(lambda: ended(process))
    study.cluster.start_controller()
    run.ends(0)
    study.check(undisturbed, {PRUNE: 1})


def job_preempted(undisturbed: Study, folder: Path) -> None:
    """An urgent job takes the GPUs: the job goes back to the queue and begins anew under its number."""
    study = undisturbed.copy(folder, PRUNE)
    study.hold(PRUNE)
    run = study.start()
    run.holds(PRUNE)
    study.cluster.preempt()
    run.until(lambda: study.states(PRUNE) == ["PENDING"])
    study.release(PRUNE)
    run.ends(0)
    assert [job["Restarts"] for job in study.jobs(PRUNE)] == ["1"]
    study.check(undisturbed, {PRUNE: 2})


def snakemake_killed(undisturbed: Study, folder: Path) -> None:
    """`kill -9` of snakemake, with a job that waits, one that runs on, and one that ends before it is back."""
    three = (PRUNE, EVALUATE, EVALUATE_TUNED)
    study = undisturbed.copy(folder, *three)
    study.hold(*three)
    run = study.start()
    run.until(lambda: len(study.jobs()) == 3 and len(study.held()) == GPUS)
    run.process.send_signal(signal.SIGKILL)
    run.ends(-signal.SIGKILL)
    (waiting,) = (job for job in study.jobs() if job["JobState"] == "PENDING")
    study.cluster.run("scontrol", "hold", waiting["JobId"])  # the GPU that gets free is somebody else's
    first, process = next(iter(study.held().items()))
    study.release(first)
    wait_until(lambda: ended(process))
    run = study.start()
    run.until(lambda: "Cancelling 1 job" in run.text())
    for job in set(three) - {first}:
        study.release(job)
    run.ends(0)
    study.check(undisturbed, dict.fromkeys(three, 1))


# What runs side by side: those that disturb the whole cluster, and use its GPUs, one after another; the others beside.
LANES = (
    (snakemake_killed, job_preempted, controller_killed, node_drained),
    (past_its_time, two_at_once),
    (killed_while_writing, out_of_memory, training_stopped),
    (job_cancelled, disk_full),
)
FAULTS = [fault for lane in LANES for fault in lane]


@pytest.fixture(scope="module")
def faults(request, undisturbed, tmp_path_factory) -> Iterator[dict[Callable, Future]]:
    """Begin the faults whose tests were asked for; each one's future holds the seconds that it took, or its failure."""
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    ends = {given["fault"]: Future() for given in parameters if "fault" in given}

    def run(lane: tuple[Callable, ...]) -> None:
        for fault in [fault for fault in lane if fault in ends]:
            started = time.monotonic()
            try:
                fault(undisturbed, tmp_path_factory.getbasetemp() / fault.__name__)
                ends[fault].set_result(time.monotonic() - started)
            except BaseException as error:
                ends[fault].set_exception(error)

    with ThreadPoolExecutor(len(LANES)) as lanes:
        for lane in LANES:
            lanes.submit(run, lane)
        yield ends
        for process in psutil.Process().children():  # left only if the tests were interrupted
            if "snakemake" in process.cmdline():
                process.kill()


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.__name__ for fault in FAULTS])
def test_after_a_fault_all_is_as_if_there_had_been_none(faults, fault):
    print(f"{fault.__name__}: {faults[fault].result():.0f} s")
