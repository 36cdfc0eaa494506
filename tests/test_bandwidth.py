"""Memory bandwidth: what a limit is by hand, how large caches are, and a measurement against bounds of any machine."""

from __future__ import annotations

import pytest
import torch

from espalier import bandwidth


def test_limit_by_hand():
    # 4 rows a step of (600 + 4 · 50) bytes at 1000 bytes/s: 1.25 steps a second.
    assert bandwidth.limit(600, 4 * 50, 4, 1000.0) == 5.0
    assert bandwidth.limit(500, 0, 1, 1000.0) == 2.0


SMALL = [(1, "0", "48K"), (2, "0", "1024K")]
# Of each core, the level of each cache, the cores that share it, and its size.
CACHES = [
    ([[*SMALL, (3, "0-1", "32768K")], [(1, "1", "48K"), (3, "0-1", "32768K")]], 2**25),
    ([[*SMALL, (3, "0-1", "32M")], [(3, "0-1", "32M")], [(3, "2-3", "96M")], [(3, "2-3", "96M")]], 2**27),
    ([[(2, "0", "2M")], [(2, "1", "2M")]], 2**22),
    ([[(3, "0", "2048")]], 2048),
    ([[(3, "0", "")]], bandwidth.UNKNOWN_CACHE),
    ([[(3, "0")]], bandwidth.UNKNOWN_CACHE),  # no file of that name
    ([[]], bandwidth.UNKNOWN_CACHE),
]


@pytest.mark.parametrize(("cores", "expected"), CACHES)
def test_the_last_level_caches_of_all_cores_add_up(cores, expected, tmp_path, monkeypatch):
    for core, caches in enumerate(cores):
        for number, said in enumerate(caches):
            folder = tmp_path / f"cpu{core}" / "cache" / f"index{number}"
            folder.mkdir(parents=True)
            for name, value in zip(("level", "shared_cpu_list", "size"), said, strict=False):
                (folder / name).write_text(f"{value}\n")
    monkeypatch.setattr(bandwidth, "PROCESSORS", tmp_path)
    assert bandwidth.last_level_cache("cpu") == expected


def test_bandwidth_is_the_best_way_in_bytes_a_second(monkeypatch):
    """Each way takes as many seconds as said here, and moves one buffer, the copy two."""
    monkeypatch.setattr(bandwidth, "last_level_cache", lambda _: 2**20)
    size = 4 * 2048 * 2048  # the smallest buffer, above four such caches
    seconds = iter([0.4, 0.5, 0.5, 0.9, 0.4, 0.5, 0.2, 0.9])

    def timed(work, device):
        work()
        return next(seconds)

    monkeypatch.setattr(bandwidth, "timed", timed)
    memory = bandwidth.Bandwidth("cpu")
    assert memory.measure(repeats=1) == size / 0.4
    assert memory.measure(repeats=1) == size / 0.2
    seconds = iter([0.4, 0.4, 0.4, 0.5])
    assert memory.measure(repeats=1) == 2 * size / 0.5


def test_measured_bandwidth_is_that_of_a_plain_sum_or_more(monkeypatch):
    monkeypatch.setattr(bandwidth, "last_level_cache", lambda _: 8 * 2**20)
    found = bandwidth.Bandwidth("cpu").measure()
    buffer = torch.ones(2**23)
    plain = buffer.nbytes / min(bandwidth.timed(buffer.sum, "cpu") for _ in range(3))
    assert plain / 3 < found < 1e13  # the machine may be busy now and not then


def test_a_gpu_is_busy_before_the_work_that_is_timed(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 2500.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
    assert bandwidth.timed(lambda: log.append("work"), "cuda") == 2.5
    assert log == ["sleep", "record", "work", "record", "wait"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_bandwidth_of_a_gpu():
    assert bandwidth.last_level_cache("cuda") > 2**20
    assert 1e11 < bandwidth.Bandwidth("cuda").measure() < 2e13
