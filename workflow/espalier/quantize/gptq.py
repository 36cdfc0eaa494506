"""GPTQ (Frantar et al. 2022, 2210.17323), by GPTQModel, the maintained successor of AutoGPTQ.

Each linear layer of the blocks is quantized column by column, and the columns that are left make up for the error, by
the Hessian of the layer's output on the calibration samples (the paper's equations 2 and 3). Embeddings and the output
head stay as they are. The defaults are GPTQModel's own: groups of 128 input channels, symmetric, damping 0.05, and
groups, but not columns, taken in the order of activation (`act_group_aware`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from espalier import checkpoints, gptq_loading
from espalier.data import Calibration
from espalier.errors import UserError
from espalier.progress import progress

TAKES = ("causal-lm",)
PACKED = 32  # weights are packed in words of 32 bits, along both sides


@dataclass(frozen=True)
class Recipe:
    """How weights are stored, and what the errors are measured on."""

    bits: Literal[2, 3, 4, 8]  # a weight
    calibration: Calibration
    group_size: Literal[-1, 16, 32, 64, 128, 256, 512, 1024] = 128  # input channels that share a scale; -1: all of them
    symmetric: bool = True  # zero is a code in the middle; otherwise every group has a zero point of its own
    desc_act: bool = False  # quantize the columns with the largest activations first
    act_group_aware: bool = True  # without desc_act: order whole groups by activation, at no cost when run
    damp: float = 0.05  # the share of the Hessian's mean diagonal that is added to its diagonal
    batch_size: int = 32  # samples computed at once; it does not change the result beyond rounding
    kernel: Literal["auto", "torch", "torch-aten", "triton", "exllama-v2", "marlin", "machete"] = "auto"  # of GPTQModel

    def check(self) -> None:
        if self.kernel != "auto":
            gptq_loading.check(self.kernel, self.bits, self.group_size, self.symmetric)
        if not 0 < self.damp < 1 or self.batch_size < 1:
            raise ValueError("'damp' must lie between 0 and 1, and 'batch_size' must be at least 1.")


def needs_device(recipe: Recipe) -> tuple[str, str] | None:
    """Return the only device that the result runs on, and why; None if it runs anywhere."""
    kernel = gptq_loading.KERNELS.get(recipe.kernel)
    return (kernel.device, f"the kernel '{recipe.kernel}'") if kernel and kernel.device else None


def apply(parent: Path, output: Path, recipe: Recipe, *, seed: int, device: str) -> dict:
    """Quantize the parent's blocks and save them packed; returns the error of every layer, and the bytes.

    Raises UserError for a parent that is quantized already, or whose layers do not divide into groups and words.
    """
    info = checkpoints.describe(parent)
    checkpoints.refuse_quantized(parent, "GPTQ")
    gptq_loading.prepare(device)
    import torch

    source, dtype = checkpoints.weights_folder(parent), checkpoints.weights_dtype(parent)
    checkpoints.know_pruned(source)
    tokenizer = checkpoints.load_tokenizer(parent)
    drawn = recipe.calibration.draw(tokenizer)
    torch.manual_seed(seed)
    trusted = info.get("trust_remote_code", False)
    with gptq_loading.quiet():
        from gptqmodel import GPTQModel, QuantizeConfig
    with gptq_loading.quiet(), gptq_loading.no_logs(), gptq_loading.no_carried_code(trusted):
        config = QuantizeConfig(
            bits=recipe.bits,
            group_size=recipe.group_size,
            sym=recipe.symmetric,
            desc_act=recipe.desc_act,
            # One group a row has no order of groups, and GPTQModel fails on it.
            act_group_aware=recipe.act_group_aware and not recipe.desc_act and recipe.group_size > 0,
            damp_percent=recipe.damp,
            offload_to_disk=False,
        )
        model = GPTQModel.load(
            str(source),
            config,
            dtype=getattr(torch, dtype),
            device=device,
            trust_remote_code=trusted,
        )
        _check_widths(model.model, recipe.group_size, parent)
        model.layer_callback = _Blocks(model.model.config.num_hidden_layers)
        started = time.monotonic()
        samples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in drawn.token_ids]
        log = model.quantize(samples, batch_size=recipe.batch_size)
        seconds = time.monotonic() - started
        model.save(str(output))
    tokenizer.save_pretrained(output)
    (output / "quant_log.csv").unlink(missing_ok=True)  # its content is in the report
    about = {
        "format": "gptqmodel",
        "bits": recipe.bits,
        "dtype": dtype,
        "arithmetic": "unpacked",
        "kernel": recipe.kernel,
    }
    checkpoints.write_description(output, {**checkpoints.inherited(info), **about})
    return {
        "seconds": seconds,
        "calibration": drawn.record,
        "bytes": {"before": checkpoints.weight_bytes(parent), "after": checkpoints.weight_bytes(output)},
        "layers": log,
    }


class _Blocks:
    """GPTQModel's callback after each block, as a line of progress."""

    def __init__(self, blocks: int):
        self.ticks = iter(progress(range(blocks), "gptq, blocks"))
        next(self.ticks)

    def layer_complete(self, layer_idx: int, submodule_finalized: bool) -> None:
        if not submodule_finalized:
            next(self.ticks, None)


def _check_widths(model, group_size: int, parent: Path) -> None:
    from espalier.models.lowbit import linear_layers

    step = max(group_size, PACKED)
    for name, layer in linear_layers(model).items():
        if layer.in_features % step or layer.out_features % PACKED:
            raise UserError(
                f"The layer {name} of {parent} maps {layer.in_features} to {layer.out_features} channels, but GPTQ"
                f" needs inputs in multiples of {step} (the key 'group_size', and {PACKED}) and outputs in multiples"
                f" of {PACKED}."
            )
