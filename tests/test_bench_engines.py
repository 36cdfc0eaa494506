"""The benchmark of engines: ratios and shares by hand, from fake engines, and a run of real ones on a tiny model."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import engines
from espalier import environments, plugins
from espalier.engine_process import Died, Generated, Loaded
from espalier.worker import Load, Unavailable

ARGUMENTS = SimpleNamespace(
    **{"rounds": 3, "output": 5, "context": 8, "hidden": 10, "layers": 3, "vocabulary": 20, "dtype": "float32"},
    **{"device": "cpu", "threads": 1, "batch": [2]},
)


class Fake:
    """An engine whose calls take the seconds that it is given; at None it dies. `known` tokens are there at first."""

    def __init__(self, log: list, name: str, seconds: list, first: float | None = 1.0, token: int = 7, known: int = 2):
        self.log, self.name, self.seconds, self.first, self.token, self.closed = log, name, seconds, first, token, False
        self.known = None if first is None else known

    def generate(self, prompt: list[list[int]], output: int) -> Generated:
        self.log.append((self.name, output))
        seconds = self.seconds.pop(0)
        if seconds is None:
            raise Died("its worker was killed")
        return Generated([[self.token] * output for _ in prompt], seconds, self.first, 2 * seconds, None, self.known)

    def held(self) -> tuple[int, dict]:
        return 0, {"about": self.name}

    def close(self) -> None:
        self.closed = True


def turns(*fakes: Fake):
    workers, missing = {fake.name: fake for fake in fakes}, {}
    bandwidths = iter([1000.0, 3000.0, 2000.0, 9000.0])
    found = engines.take_turns(workers, missing, [[3] * 8] * 2, ARGUMENTS, lambda: next(bandwidths))
    return found, workers, missing


def test_ratios_and_shares_by_hand():
    log = []
    # The first call warms up. Then 2 rows of 4 tokens after the first in seconds − 1: 8, 2, 4 and 16, 8, 2 tokens/s.
    found, _, missing = turns(
        Fake(log, "hf", [99.0, 2.0, 5.0, 3.0]), Fake(log, "trellis", [99.0, 1.5, 2.0, 5.0], token=8)
    )
    assert not missing
    assert [sample.decode for sample in found.samples if sample.engine == "trellis"] == [16.0, 8.0, 2.0]
    # They swap places every round, so that neither is always the second.
    names = [name for name, _ in log]
    assert names == ["hf", "trellis", "trellis", "hf", "hf", "trellis", "trellis", "hf"]
    # Bandwidth: the median of 1000, 3000, 2000 and 9000. Parameters: 250, of which 200 are the embedding's. A step
    # reads 50 · 4 bytes of weights, and for 2 rows, 8 + 2.5 tokens, 3 layers the keys and values of 10 channels.
    summary = engines.summary(found, 2, 250, ARGUMENTS)
    assert summary["bandwidth"] == 2500
    assert summary["limit"] == pytest.approx(2 * 2500 / (200 + 2 * 10.5 * 3 * 2 * 10 * 4))
    ours = summary["engines"]["trellis"]
    assert ours["decode"] == 8
    assert ours["ratio"] == {"least": 0.5, "median": 2.0, "most": 4.0}  # of 16/8, 8/2 and 2/4
    assert ours["share"] == pytest.approx(8 / summary["limit"])
    assert ours["details"] == {"about": "trellis"}
    assert ours["same_tokens"] is False
    assert summary["ratio_to_rival"] is None
    assert summary["engines"]["hf"]["ratio"] == {"least": 1.0, "median": 1.0, "most": 1.0}
    assert summary["engines"]["hf"]["same_tokens"] is True
    assert [sample["cpu_seconds"] for sample in summary["samples"] if sample["engine"] == "hf"] == [4.0, 10.0, 6.0]


def test_an_engine_that_tells_no_first_token_is_asked_for_one_token():
    log = []
    found, *_ = turns(Fake(log, "vllm", [99.0, 9.0, 3.0, 1.0, 3.0, 2.0, 6.0, 2.0], first=None))
    assert [output for _, output in log] == [5, 1] * 4
    assert [sample.first_token_seconds for sample in found.samples] == [1.0, 2.0, 2.0]
    assert [sample.decode for sample in found.samples] == [4.0, 8.0, 2.0]
    assert engines.summary(found, 2, 250, ARGUMENTS)["engines"]["vllm"]["ratio"] is None


def test_tokens_known_with_the_first_do_not_count_as_decoded():
    # Of 2 · 5 tokens 4 were there after 1 s: 6 are decoded.
    found, *_ = turns(Fake([], "vllm", [99.0, 2.0, 4.0, 3.0], known=4))
    assert [sample.decode for sample in found.samples] == [6.0, 2.0, 3.0]
    assert [sample.first_tokens for sample in found.samples] == [4, 4, 4]


def test_an_engine_that_dies_is_named_and_the_others_go_on():
    dying = Fake([], "deepspeed", [99.0, 2.0, None])
    found, workers, missing = turns(Fake([], "hf", [99.0, 2.0, 3.0, 5.0]), dying)
    assert dying.closed
    assert list(workers) == ["hf"]
    assert missing == {"deepspeed": "failed: its worker was killed, at batch 2"}
    assert engines.summary(found, 2, 250, ARGUMENTS)["engines"]["deepspeed"]["ratio"]["median"] == 1.0


def test_the_ratio_to_the_rival_is_of_the_same_round():
    found, *_ = turns(Fake([], "vllm", [99.0, 2.0, 5.0, 3.0]), Fake([], "trellis", [99.0, 1.5, 2.0, 5.0]))
    ratio = engines.summary(found, 2, 250, ARGUMENTS)["ratio_to_rival"]
    assert ratio == {"least": 0.5, "median": 2.0, "most": 4.0}


ON_CPU, ON_CUDA = ("cpu", "float32", 2048, 8), ("cuda", "bfloat16", 4096, 32)


def of_size(device: str, dtype: str, hidden: int, layers: int) -> SimpleNamespace:
    size = {"device": device, "dtype": dtype, "hidden": hidden, "layers": layers}
    return SimpleNamespace(**{**vars(ARGUMENTS), **size})


@pytest.mark.parametrize(
    ("size", "batch", "ratio", "share", "said"),
    [
        (ON_CPU, 1, 1.31, 0.86, ["reached  trellis / hf: 1.31", "reached  trellis of the limit: 0.86"]),
        (ON_CPU, 1, 1.29, 0.84, ["MISSED  trellis / hf: 1.29", "MISSED  trellis of the limit: 0.84"]),
        (ON_CPU, 8, 0.99, 0.1, ["MISSED  trellis / hf: 0.99"]),
        (ON_CPU, 2, 0.99, 0.1, []),
        (("cpu", "bfloat16", 2048, 8), 1, 0.99, 0.1, []),
        (("cpu", "float32", 1024, 8), 1, 0.99, 0.1, []),
        (("cpu", "float32", 2048, 4), 1, 0.99, 0.1, []),
        (ON_CUDA, 1, 0.99, 0.79, ["MISSED  trellis of the limit: 0.79"]),
        (ON_CUDA, 8, 0.99, 0.1, []),
    ],
)
def test_goals_are_said_to_be_reached_or_missed(size, batch, ratio, share, said):
    ours = {"decode": 10.0, "share": share, "ratio": dict.fromkeys(("least", "median", "most"), ratio)}
    found = {"batch": batch, "bandwidth": 1e10, "limit": 20.0, "engines": {"trellis": {**ours, "same_tokens": True}}}
    text = engines.table(found, of_size(*size))
    assert text.count("reached") + text.count("MISSED") == len(said)
    assert all(line in text for line in said)


# Each batch with the ratios of trellis to hf and to vllm, None where either did not run.
@pytest.mark.parametrize(
    ("size", "batches", "said"),
    [
        (
            ON_CUDA,
            {1: (4.9, 1.1), 8: (3.0, 1.0), 64: (2.0, 0.5)},
            [
                "reached  best trellis / hf: 4.90, goal 4.86",
                "reached  least trellis / vllm, batches 1 to 8: 1.00, goal 1.00",
            ],
        ),
        (ON_CUDA, {1: (4.8, 1.1), 8: (None, 0.9)}, ["MISSED  best trellis / hf: 4.80", "MISSED  least trellis / vllm"]),
        (ON_CUDA, {1: (4.9, None), 16: (1.0, 0.5)}, ["reached  best trellis / hf"]),
        (ON_CPU, {1: (4.9, 1.1)}, []),
    ],
)
def test_goals_over_batches(size, batches, said):
    found = []
    for batch, ratios in batches.items():
        to_base, to_rival = ({"median": ratio} if ratio else None for ratio in ratios)
        found.append({"batch": batch, "engines": {"trellis": {"ratio": to_base}}, "ratio_to_rival": to_rival})
    found.append({"batch": 128, "engines": {}, "ratio_to_rival": None})
    lines = engines.over_batches(found, of_size(*size))
    assert len(lines) == len(said)
    assert all(line.startswith(start) for line, start in zip(lines, said, strict=True))


def test_an_environment_that_is_not_built_is_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "of_engine", lambda name: {"cpu": "vllm-cpu"} if name == "vllm" else {})
    arguments = SimpleNamespace(device="cpu", environments=tmp_path)
    assert engines.own_python("hf", arguments) is None
    lock = environments.lock_file("vllm-cpu")
    python = environments.venv_folder(lock, tmp_path / "vllm-cpu") / "bin" / "python"
    with pytest.raises(Unavailable, match=f"there is no {python}"):
        engines.own_python("vllm", arguments)
    python.parent.mkdir(parents=True)
    python.touch()
    assert engines.own_python("vllm", arguments) == python
    with pytest.raises(Unavailable, match="no environment for the device cuda"):
        engines.own_python("vllm", SimpleNamespace(device="cuda", environments=tmp_path))


class InProcess(Fake):
    """A real engine, here and not in a worker."""

    def __init__(self, name: str, python: None, *, threads: int):
        self.engine = plugins.load("engines", name).Engine()
        assert (python, threads) == (None, 1)

    def probe(self, device: str) -> None:
        assert device == "cpu"

    def load(self, folder: Path, *, device: str, max_tokens: int, max_batch: int, seed: int) -> Loaded:
        self.engine.load(Load(folder, device, 1, max_tokens, max_batch, seed))
        return Loaded(device, self.engine.context, 5, {}, {"threads": "1"})

    def generate(self, prompt: list[list[int]], output: int) -> Generated:
        started, stamps = time.perf_counter(), []
        tokens = self.engine.generate(prompt, output, "greedy", lambda: stamps.append(time.perf_counter() - started))
        return Generated(tokens, time.perf_counter() - started, stamps[0], 0.0, None, len(prompt))

    def held(self) -> tuple[int, dict]:
        return 5, self.engine.details()

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()


def test_real_engines_on_a_tiny_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engines, "EngineProcess", InProcess)
    output = tmp_path / "engines.json"
    shape = {"hidden": 64, "layers": 1, "vocabulary": 300, "batch": 2, "context": 5, "output": 3, "rounds": 2}
    options = [text for name, value in shape.items() for text in (f"--{name}", str(value))]
    engines.main(
        ["--engines", "hf", "flash-decoding", *options, "--threads", "1", "--device", "cpu", "--json", str(output)]
    )
    found = json.loads(output.read_text())
    (batch,) = found["batches"]
    assert found["missing"] == {}
    assert found["engines"]["hf"] == {"threads": "1", "allocated": 5}
    assert found["arguments"]["json"] == str(output)
    # An embedding and a head, four square matrices, an MLP of 172 channels, three norms; in float32.
    read = 300 * 64 + 4 * 64**2 + 3 * 64 * 172 + 3 * 64
    kv = 2 * 6.5 * 2 * 64  # of two rows, 5 + 3 / 2 tokens
    assert batch["limit"] == pytest.approx(2 * batch["bandwidth"] / (4 * (read + kv)))
    assert len(batch["bandwidths"]) == 3
    speeds = {}
    for sample in batch["samples"]:
        assert sample["seconds"] > sample["first_token_seconds"] > 0
        decode = 2 * 2 / (sample["seconds"] - sample["first_token_seconds"])
        assert sample["decode"] == pytest.approx(decode)
        speeds.setdefault(sample["engine"], []).append(decode)
    assert set(speeds) == {"hf", "flash-decoding"}
    for name, own in speeds.items():
        one = batch["engines"][name]
        ratios = [mine / its for mine, its in zip(own, speeds["hf"], strict=True)]
        assert one["ratio"]["median"] == pytest.approx(sum(ratios) / 2)
        assert one["share"] == pytest.approx(sum(own) / 2 / batch["limit"])
        assert one["same_tokens"] is True
    said = capsys.readouterr().out
    assert "batch 2: float32, hidden 64, 1 blocks, context 5, output 3" in said
    assert "flash-decoding" in said
