"""SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): 8-bit activations, whose outliers are first moved into the weights.

What each block's two norms give is divided by s, channel by channel, and the columns of the layers that read it (query,
key and value; the MLP's first) are multiplied by s: models/smoothing.py, equation 4. The largest magnitudes of the
activations are those of the original model, over all tokens of the calibration samples. Then every linear layer but the
output head is quantized, also those that are not smoothed: weights to 8 or 4 bits with one scale an output channel,
activations to 8 bits with one scale a token, found while the model runs; products are of integers. 4 bits beside 8-bit
activations (W4A8) are no part of the paper, and neither is `rounding: gptq`, which rounds the smoothed weights by GPTQ
(Frantar et al. 2022, arXiv 2210.17323), of llm-compressor. The paper's α is 0.5; for Llama models 0.8 to 0.9 is common.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from espalier import checkpoints, llm_compressor, lowbit_checkpoints
from espalier.data import Calibration
from espalier.models import smoothing
from espalier.models.streaming import BlockStream, check_windows
from espalier.progress import progress

TAKES = ("causal-lm",)


@dataclass(frozen=True)
class Recipe:
    """How many bits a weight has, how much is smoothed on what, and how weights are rounded."""

    bits: Literal[4, 8]  # a weight; an activation always has 8
    calibration: Calibration
    alpha: float = 0.5  # migration strength, 0 to 1: how much goes from activations into weights; Llama: 0.8 to 0.9
    rounding: Literal["nearest", "gptq"] = "nearest"  # of the smoothed weights; gptq makes up for the error of columns
    damp: float = 0.01  # gptq: the share of the Hessian's mean diagonal that is added to its diagonal
    batch_size: int = 8  # calibration samples a forward pass

    def check(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError("'alpha' must be at least 0 and at most 1.")
        if not 0 < self.damp < 1 or self.batch_size < 1:
            raise ValueError("'damp' must lie between 0 and 1, and 'batch_size' must be at least 1.")


def apply(parent: Path, output: Path, recipe: Recipe, *, seed: int, device: str) -> dict:
    """Write the smoothed and quantized parent into `output`; return activations before and after, seconds and bytes.

    Raises UserError for a parent that is quantized already, whose norms are not known, that cannot read the samples, or
    whose Hessians GPTQ cannot invert.
    """
    import torch

    from espalier.models import lowbit

    checkpoints.refuse_quantized(parent, "SmoothQuant")
    drawn = recipe.calibration.draw(checkpoints.load_tokenizer(parent))
    windows, skeleton = torch.tensor(drawn.token_ids), checkpoints.skeleton(parent)
    smoothing.pairs_of(skeleton)
    check_windows(skeleton, windows)
    checkpoint = checkpoints.load(parent, device="cpu")
    model, scheme = checkpoint.model, lowbit.Scheme(bits=recipe.bits, activations=8)
    started = time.monotonic()
    blocks = smooth_blocks(BlockStream(model, windows, device, recipe.batch_size), recipe.alpha)
    if recipe.rounding == "gptq":
        llm_compressor.gptq(model, drawn.token_ids, scheme, recipe.damp, recipe.batch_size, device)
    else:
        lowbit.round_layers(model, scheme)
    seconds = time.monotonic() - started
    dtype = checkpoints.weights_dtype(parent)
    lowbit_checkpoints.save(model, checkpoint.tokenizer, output, checkpoint.info, scheme, dtype)
    return {
        "seconds": seconds,
        "calibration": drawn.record,
        "bytes": {"before": checkpoints.weight_bytes(parent), "after": checkpoints.weight_bytes(output)},
        "blocks": blocks,
    }


def smooth_blocks(stream: BlockStream, alpha: float) -> list[dict]:
    """Smooth a model, block by block, in place; return each pair's largest activation before and after.

    A block is smoothed once the samples have passed it, and it gives what it gave: so all statistics are those of the
    original model.
    """
    report, hidden = [], stream.enter()
    for number, pairs in enumerate(progress(smoothing.pairs_of(stream.model), "smoothing blocks")):
        with stream.resident(number), smoothing.observed(*pairs) as ranges:
            hidden = stream.run(number, hidden)
        entry: dict = {"block": number}
        for pair, seen in zip(pairs, ranges, strict=True):
            factors = smoothing.factors(seen.largest, [layer.weight.data for layer in pair.readers], alpha)
            smoothing.smooth(pair, factors)
            largest = {"before": seen.largest.max().item(), "after": (seen.largest / factors).max().item()}
            entry[pair.name] = {"largest_activation": largest}
        report.append(entry)
    return report
