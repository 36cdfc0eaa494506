"""Others on the machine while something is timed, and the energy that it takes: real processes, fake counters."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from espalier import devices, energy, neighbours

BUSY = "import time\nuntil = time.time() + 20\nwhile time.time() < until: pass"
# What a job does: it watches a stretch in which another job of its run, and a process that is none, are at work.
JOB = """
import json, time
from espalier import neighbours
watch = neighbours.Watch("cpu")
with watch.during() as found:
    time.sleep(0.5)
print(json.dumps([sorted(watch.jobs), watch.cpu_of_others(), found]))
"""


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A machine whose /proc is a folder: `system(machine, {pid: (parent, ticks…, name)})` writes it."""
    monkeypatch.setattr(neighbours, "PROC", tmp_path)

    def write(machine, processes):
        (tmp_path / "stat").write_text(f"cpu  {' '.join(map(str, machine))} 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n")
        for pid, (parent, ticks, name) in processes.items():
            (tmp_path / str(pid)).mkdir(exist_ok=True)
            times = " ".join(map(str, ticks))
            line = f"{pid} ({name}) R {parent} 1 1 0 -1 0 0 0 0 0 {times} 20 0 1 0\n"
            (tmp_path / str(pid) / "stat").write_text(line)

    return write


def test_the_share_of_others_is_what_is_busy_beyond_the_own_processes(system):
    """Own are this process, what it started, what that started, and children that ended: user, system, theirs twice."""
    me, other = os.getpid(), {7: (1, (500, 100, 0, 0), "snakemake")}
    watch = neighbours.Watch("cpu")
    system(
        (1000, 0, 200, 5000, 50, 0, 0, 0),
        {me: (1, (10, 5, 1, 1), "python"), 20: (me, (100, 0, 0, 0), "a ) b"), 21: (20, (50, 0, 0, 0), "core")} | other,
    )
    with watch.during() as found:
        # Of 1000 ticks 400 + 100 + 60 (steal) are busy, and 20 + 10 + 30 + 40 + 200 are the own ones'.
        system(
            (1400, 0, 300, 5420, 70, 0, 0, 60),
            {me: (1, (30, 15, 31, 41), "python"), 20: (me, (300, 0, 0, 0), "a ) b"), 21: (20, (50, 0, 0, 0), "core")},
        )
    assert found == {"cpu_of_others": pytest.approx((560 - 300) / 1000)}
    with watch.during() as found:
        system((1500, 0, 300, 5420, 70, 0, 0, 60), {me: (1, (40, 15, 31, 41), "python")})
    assert found == {"cpu_of_others": pytest.approx(0.9)}
    assert watch.cpu_of_others() == pytest.approx((260 + 90) / 1100)


def test_a_stretch_without_a_tick_says_nothing_and_one_that_ends_in_an_error_does_not_count(system):
    watch = neighbours.Watch("cpu")
    system((1000, 0, 0, 1000, 0, 0, 0, 0), {os.getpid(): (1, (0, 0, 0, 0), "python")})
    with watch.during() as found:
        pass
    assert found == {"cpu_of_others": None}
    with contextlib.suppress(ZeroDivisionError), watch.during() as found:
        system((1900, 0, 0, 1000, 0, 0, 0, 0), {})
        raise ZeroDivisionError
    assert watch.cpu_of_others() is None


def test_a_job_beside_a_timing_is_seen_if_it_is_of_the_same_run(tmp_path):
    """The shell and the pipe that a job of Snakemake runs in are its own; another run's job is only busy."""
    (tmp_path / "busy.py").write_text(BUSY)
    (tmp_path / "job.py").write_text(JOB)
    started = []

    def start(mark, script):
        pipeline = ["bash", "-c", f"{sys.executable} {tmp_path / script} | cat"]
        settings = {"env": {**os.environ, neighbours.MARK: mark}, "stdout": subprocess.PIPE, "start_new_session": True}
        started.append(subprocess.Popen(pipeline, **settings))
        return started[-1]

    try:
        beside = start("here:mine", "busy.py")
        start("here:another", "busy.py")
        jobs, share, found = json.loads(start("here:mine", "job.py").stdout.read())
        assert [job.partition(":")[0] for job in jobs] == [f"process {beside.pid}"]
        assert "busy.py" in jobs[0]
        assert share == found["cpu_of_others"] > 0.4 / os.cpu_count()
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def test_a_child_that_works_is_not_another():
    """A busy process that this one started has most of a core; it is taken off, to the tick, what the machine did."""
    with subprocess.Popen([sys.executable, "-c", BUSY]) as child:
        try:
            before = neighbours.Watch("cpu")._look()
            time.sleep(0.4)
            after = neighbours.Watch("cpu")._look()
        finally:
            child.kill()
    assert after.own - before.own > 0.05
    assert after.busy - before.busy > after.own - before.own - 0.1
    assert after.jobs == frozenset()


# A GPU ----------------------------------------------------------------------------------------------------------------


class Nvml:
    """NVIDIA's library with one GPU, on which `pids` compute, and that has used `millijoules`."""

    class NVMLError(Exception):
        pass

    def __init__(self, pids=(), millijoules=None):
        self.pids, self.millijoules = pids, millijoules

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert uuid == "GPU-1"
        return "handle"

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        assert handle == "handle"
        return [SimpleNamespace(pid=pid) for pid in self.pids]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if self.millijoules is None:
            raise self.NVMLError("not supported")
        return self.millijoules


@pytest.fixture
def gpu(monkeypatch):
    def use(library, shown=("GPU-1", "GPU-2")):
        monkeypatch.setitem(sys.modules, "pynvml", library)
        monkeypatch.setattr(devices, "present", lambda: {str(i): name for i, name in enumerate(shown)})
        return library

    return use


@pytest.mark.parametrize(
    ("pids", "others"),
    [
        ([os.getpid()], 0),
        ([os.getpid(), 4_000_001, 4_000_002], 2),
        ([4_000_001], None),  # in a container its numbers may be others than ours: nobody is known
        ([], None),
    ],
)
def test_others_on_the_gpu(gpu, pids, others):
    gpu(Nvml(pids))
    with neighbours.Watch("auto").during() as found:
        pass
    assert found["gpu_processes_of_others"] == others


def test_without_a_gpu_or_its_library_nothing_is_said_of_it(gpu, monkeypatch):
    gpu(Nvml([os.getpid()]), shown=())
    with neighbours.Watch("auto").during() as found:
        pass
    assert set(found) == {"cpu_of_others"}
    assert energy.counter("cuda") is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy.counter("cuda") is None


# Energy ---------------------------------------------------------------------------------------------------------------


def test_a_gpus_counter_is_in_joules(gpu):
    library = gpu(Nvml(millijoules=5000))
    joules = energy.counter("cuda")
    before = joules()
    library.millijoules += 2500
    assert joules() - before == pytest.approx(2.5)
    gpu(Nvml())
    assert energy.counter("cuda") is None


@pytest.fixture
def powercap(tmp_path, monkeypatch):
    """RAPL's zones: a socket with its cores and memory, and the whole board, which holds the socket."""
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)

    def write(**counters):
        names = {"package": "intel-rapl:0", "core": "intel-rapl:0:0", "dram": "intel-rapl:0:1", "psys": "intel-rapl:1"}
        for name, value in counters.items():
            folder = tmp_path / names[name]
            folder.mkdir(exist_ok=True)
            (folder / "name").write_text("package-0\n" if name == "package" else f"{name}\n")
            (folder / "energy_uj").write_text(f"{value}\n")
            (folder / "max_energy_range_uj").write_text("1000000000\n")
        return tmp_path

    return write


def test_energy_of_sockets_and_memory_beyond_the_counters_range(powercap):
    powercap(package=999_000_000, core=5, dram=100_000_000, psys=7)
    joules = energy.counter("cpu")
    start = joules()
    powercap(package=999_500_000, core=900_000_000, dram=100_250_000, psys=900_000_000)
    assert joules() - start == pytest.approx(0.5 + 0.25)
    powercap(package=2_000_000, dram=100_250_000)  # the socket's counter began again at 1000 J
    assert joules() - start == pytest.approx(0.5 + 0.25 + 0.5 + 2.0)
    powercap(package=3_000_000)
    assert joules() - start == pytest.approx(0.75 + 2.5 + 1.0)


def test_a_counter_that_cannot_be_read_is_none(powercap):
    assert energy.counter("cpu") is None
    folder = powercap(package=1)
    (folder / "intel-rapl:0" / "energy_uj").unlink()  # as for all but root
    assert energy.counter("cpu") is None
