"""Raw results: one JSON envelope a job, that says what it is, what was measured, and with what."""

from __future__ import annotations

from pathlib import Path

VERSION = 1
IDENTITY = ("study", "model", "seed", "chain", "name")


def envelope(
    *,
    kind: str,
    identity: dict,
    recipe: dict,
    checkpoint: dict,
    measurements: list[dict],
    samples: dict,
    provenance: dict,
) -> dict:
    """Return a raw result. `identity` has study, model, seed, chain and name (of the suite, workload or recipe).

    `checkpoint` is the description of the model measured; `samples` holds every raw sample behind the measurements.
    """
    return {
        "version": VERSION,
        "kind": kind,
        "identity": {key: identity[key] for key in IDENTITY},
        "recipe": recipe,
        "checkpoint": checkpoint,
        "measurements": measurements,
        "samples": samples,
        "provenance": provenance,
    }


def path_of(root: Path, *, kind: str, study: str, model: str, seed: int, chain: str, name: str) -> Path:
    """Return where a raw result lies below `root` (the folder `results`)."""
    folder = Path(root) / study / "runs" / model / f"s{seed}" / chain
    return folder / "step.json" if kind == "step" else folder / kind / f"{name}.json"
