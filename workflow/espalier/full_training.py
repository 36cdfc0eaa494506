"""Loading a model for the training of all its weights, and saving it afterwards."""

from __future__ import annotations

from pathlib import Path

from espalier import checkpoints, parallel, training


def load(parent: Path, device: str, attention: str, gradient_checkpointing: bool, seed: int) -> checkpoints.Checkpoint:
    """Return `parent` in float32, every weight of which trains; `seed` is of a dropout that the model may have.

    Raises UserError for packed weights.
    """
    import torch

    training.refuse_packed(parent, "a training of all weights")
    checkpoint = checkpoints.load(
        parent, parallel.loading_device(device), dtype=torch.float32, attn_implementation=attention
    )
    if gradient_checkpointing:
        checkpoint.model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(seed)
    return checkpoint


def save(checkpoint: checkpoints.Checkpoint, output: Path | None, dtype: str) -> None:
    """Save the trained model into `output` in `dtype`; None, in a process that only takes part, saves nothing."""
    import torch

    def fresh():
        return checkpoints.load(checkpoint.folder, "cpu", dtype=torch.float32).model

    model = parallel.undivided(checkpoint.model, fresh)
    if output is not None:
        info = {**checkpoint.info, "parameters": checkpoints.logical_parameters(model)}
        checkpoints.save(model.to(getattr(torch, dtype)), checkpoint.tokenizer, output, info)
