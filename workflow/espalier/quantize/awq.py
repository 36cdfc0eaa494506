"""AWQ (Lin et al. 2023, arXiv 2306.00978): input channels with large activations get a finer grid. By llm-compressor.

The columns of the weights that read one activation are multiplied by s, channel by channel, and what gives that
activation is divided by it, so that the model computes what it did before; then weights are rounded to their nearest
codes, each group of channels with its own scale and zero point. The paper's equations 4 and 5,

    s* = argmin_s ‖ Q(W · diag(s)) (diag(s)⁻¹ · X) − W X ‖,    s = s_X^α,

are solved by trying values of α from 0 to 1; s_X is the mean magnitude of each channel of X on the calibration samples.
With `duo_scaling`, which is the published code's and not the paper's, s = s_X^α / s_W^(1−α), with s_W the mean of each
column's magnitudes, in shares of the largest one of their group. Four activations of a block are scaled: those behind
its two norms; those between value and output layer where their widths are the same, which they are not where query
heads share keys and values; and those between the MLP's layers where its activation function lets a factor pass.
Embeddings and the output head stay as they are. Products are computed in floating point: activations are not rounded.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from espalier import checkpoints, llm_compressor, lowbit_checkpoints
from espalier.data import Calibration
from espalier.models import smoothing
from espalier.models.anatomy import parts_of
from espalier.models.streaming import check_finite, check_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from espalier.models.lowbit import Scheme

TAKES = ("causal-lm",)


@dataclass(frozen=True)
class Recipe:
    """How weights are stored, and how scales are searched."""

    bits: Literal[2, 3, 4, 8]  # a weight
    calibration: Calibration
    group_size: Literal[-1, 16, 32, 64, 128, 256, 512, 1024] = 128  # input channels that share a scale; -1: all of them
    symmetric: bool = False  # no zero points; otherwise a group's values span from its smallest to its largest
    grid: int = 20  # candidates for the scales of each activation, from none to the largest
    duo_scaling: bool = True  # scales follow the weights' magnitudes too, not those of the activations alone
    batch_size: int = 8  # calibration samples a forward pass

    def check(self) -> None:
        if self.grid < 3 or self.batch_size < 1:
            raise ValueError("'grid' must be at least 3, and 'batch_size' must be at least 1.")


def apply(parent: Path, output: Path, recipe: Recipe, *, seed: int, device: str) -> dict:
    """Write the scaled and rounded parent into `output`; return the errors of each scaled activation, and the bytes.

    Raises UserError for a parent that is quantized already, whose layers the groups do not divide, whose norms are not
    known, or that cannot read the samples.
    """
    import torch

    from espalier.models import lowbit

    checkpoints.refuse_quantized(parent, "AWQ")
    skeleton = checkpoints.skeleton(parent)
    scheme = lowbit.Scheme(recipe.bits, recipe.group_size, recipe.symmetric)
    lowbit.check_widths(lowbit.linear_layers(skeleton), scheme, parent)
    smoothing.pairs_of(skeleton)
    drawn = recipe.calibration.draw(checkpoints.load_tokenizer(parent))
    check_windows(skeleton, torch.tensor(drawn.token_ids))
    # In float32: a grid in 16 bits would be coarser than 8-bit codes.
    checkpoint = checkpoints.load(parent, device="cpu", dtype=torch.float32)
    check_finite(checkpoint.model)
    started = time.monotonic()
    errors = scale_and_quantize(checkpoint.model, drawn.token_ids, recipe, scheme, device)
    dtype = checkpoints.weights_dtype(parent)
    llm_compressor.replace(checkpoint.model, scheme, getattr(torch, dtype))
    seconds = time.monotonic() - started
    lowbit_checkpoints.save(checkpoint.model, checkpoint.tokenizer, output, checkpoint.info, scheme, dtype)
    return {
        "seconds": seconds,
        "calibration": drawn.record,
        "bytes": {"before": checkpoints.weight_bytes(parent), "after": checkpoints.weight_bytes(output)},
        "scaled": errors,
    }


def scale_and_quantize(
    model: PreTrainedModel, token_ids: list[list[int]], recipe: Recipe, scheme: Scheme, device: str
) -> list[dict]:
    """Scale the weights of a model (float32, on the CPU) in place, and put their grids beside them.

    Returns for each activation that is scaled the mean squared error of what is computed from it, on the calibration
    samples: with weights rounded as they were, and with the best scales.
    """
    import torch

    found: list[dict] = []
    with llm_compressor.quiet():
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier

    class Reporting(AWQModifier):
        def on_finalize(self, state, **options) -> bool:
            found.extend(self._error_metrics)  # it clears them
            return super().on_finalize(state, **options)

    mappings = [AWQMapping(source, readers) for source, readers in scaled_activations(model)]
    search = Reporting(
        mappings=mappings, n_grid=recipe.grid, duo_scaling=recipe.duo_scaling, offload_device=torch.device("cpu")
    )
    modifiers = [search, QuantizationModifier(**llm_compressor.targets(model, scheme))]
    llm_compressor.calibrate(model, token_ids, modifiers, recipe.batch_size, device, "awq, blocks")
    return [
        {"behind": one["layer_name"], "mean_squared_error": {"nearest": one["initial_error"], "awq": one["best_error"]}}
        for one in found
    ]


def scaled_activations(model: PreTrainedModel) -> list[tuple[str, list[str]]]:
    """Return each activation that scales can be folded into: the module that gives it, and the layers that read it.

    Raises UserError for an architecture whose norms are not known.
    """
    found = []
    for (attention, mlp), parts in zip(smoothing.pairs_of(model), parts_of(model), strict=True):
        found += [(pair.norm, pair.readers) for pair in (attention, mlp)]
        if parts.value.out_features == parts.output.in_features:
            found.append((parts.value, [parts.output]))
        gated = len(parts.up) * parts.stacked > 1
        # Of gate and up, up comes last, and its rows are the last ones where both are stacked.
        if gated or getattr(model.config, "activation_function", None) == "relu":
            found.append((parts.up[-1], [parts.down]))
    names = {module: name for name, module in model.named_modules()}
    return [(names[source], [names[reader] for reader in readers]) for source, readers in found]
