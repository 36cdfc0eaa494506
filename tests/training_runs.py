"""What tests of training share: tiny data, a recipe of each method, and the script run as a process that can be killed.

The processes are forked from a server that has imported the libraries once, so that each costs a fraction of a second.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path

import tiny
from conftest import ROOT

SCRIPT = ROOT / "workflow/scripts/tune_model.py"
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama", "peft", "gptqmodel"])
QUICK = {"steps": 8, "batch_size": 5, "micro_batch": 2, "warmup_steps": 2, "learning_rate": 5.0e-3}
VALIDATED = {"validation_samples": 6, "validate_every": 2}
METHODS = ("lora", "sft", "continued-pretraining")


def write(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def data(folder: Path) -> dict:
    """Write questions with answers and running text into `folder`; return it as a resolved dataset."""
    words = tiny.WORDS
    rows = [
        {"prompt": f"{words[i % 8]} {words[i % 5]} ", "response": " ".join(words[i % 3 : i % 3 + i % 4 + 1])}
        for i in range(40)
    ]
    write(folder / "train.jsonl", rows)
    write(folder / "text.jsonl", [{"text": " ".join(words[i % 7 :]) * (i % 3 + 1)} for i in range(25)])
    return {"name": "words", "source": "local", "path": str(folder)}


def recipe(method: str, dataset: dict, **options) -> dict:
    """Return a recipe of a method; LoRA's has dropout, so that its result depends on random numbers."""
    text = {"dataset": dataset, "split": "text"}
    own = {
        "lora": {"dataset": dataset, "r": 4, "dropout": 0.2, **VALIDATED},
        "sft": {"dataset": dataset, "weight_decay": 0.1, **VALIDATED},
        "continued-pretraining": {
            "text": text,
            "validation": text,
            "validation_windows": 3,
            "validate_every": 2,
            "length": 24,
        },
    }
    return {"tune": method, **QUICK, **own[method], **options}


def arguments(parent: Path, recipe: dict, folder: Path, *more: str) -> list[str]:
    """Return arguments of tune_model.py, and quantize_model.py: from `parent` to `folder`/model, by `folder`/state."""
    given = {
        "--parent": parent,
        "--recipe": json.dumps(recipe),
        "--output": folder / "model",
        "--step": folder / "step.json",
        "--state": folder / "state",
        "--device": "cpu",
        "--study": "test",
        "--model-name": "tiny",
        "--seed": "0",
        "--chain": "dense+x",
        "--name": "x",
    }
    return [*(str(word) for pair in given.items() for word in pair), *more]


def start(
    words: list[str],
    log: Path,
    place: dict[str, str] | None = None,
    kill: tuple | None = None,
    script: Path = SCRIPT,
):
    """Start tune_model.py, or another script, with these arguments.

    `kill` is ("during" | "after", n): SIGKILL at its nth saved state; or ("asked", n): SIGTERM after it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    process = SERVER.Process(target=_run, args=(words, str(log), place or {}, kill, str(script)))
    process.start()
    return process


def run(
    words: list[str], log: Path, processes: int = 1, kill: tuple | None = None, script: Path = SCRIPT
) -> tuple[int, str]:
    """Run tune_model.py, or another script, to its end, in one process or several; return its exit status and words."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    places: list[dict] = [{}]
    if processes > 1:
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
        places = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    logs = [log.with_name(f"{log.name}.{i}") for i in range(len(places))]
    running = [start(words, one, place, kill, script) for one, place in zip(logs, places, strict=True)]
    for one in running:
        one.join(120)
        one.kill()
    return running[0].exitcode, "".join(one.read_text() for one in logs if one.exists())


def report(folder: Path) -> dict:
    return json.loads((folder / "step.json").read_text())["samples"]


def weights(folder: Path) -> bytes:
    return (folder / "model/model.safetensors").read_bytes()


def _run(words: list[str], log: str, place: dict[str, str], kill: tuple | None, script: str) -> None:
    import torch

    from espalier.training_state import Saving

    sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115
    torch.set_num_threads(1)
    os.environ.update(place)
    if kill:
        moment, number = kill
        whole, counter = Saving.write, itertools.count(1)

        def half(state: dict, file: Path) -> None:
            file.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

        def killed(self: Saving, *state) -> None:
            now = next(counter) == number
            if now and moment == "during":
                torch.save = half
            whole(self, *state)
            if now:
                os.kill(os.getpid(), signal.SIGTERM if moment == "asked" else signal.SIGKILL)

        Saving.write = killed
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")
