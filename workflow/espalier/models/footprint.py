"""The peak of a method that works block by block, from arithmetic: whether it fits is known before weights are there.

The model is on the CPU and `streaming.BlockStream` holds one block on the device, or what stands beside the blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.models.anatomy import blocks_of
from espalier.models.streaming import LOSS_TOKENS

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from espalier.data import Calibration


def peak_bytes(
    model: PreTrainedModel,
    calibration: Calibration,
    batch_size: int,
    *,
    copies: int,
    itemsize: int,
    losses: bool = False,
) -> int:
    """Return the most bytes on the device while a `BlockStream` works; `model` may be on the meta device.

    copies     tensors of the size of a block's weights alive at once: 1 in a forward pass
    itemsize   bytes of a number
    losses     whether losses are taken

    The peak is the larger of

        copies · block + batch · (2 · hidden size + linear outputs of a block)
        beside         + batch · hidden size,  or  few · (hidden size + vocabulary) · itemsize + few · vocabulary · 8

    with block: the bytes of the largest block's weights; beside: those of all weights outside the blocks; batch: the
    tokens of one batch; few: those whose losses are taken at once. A block keeps its input, the normed input and what
    its linear layers give; attention's scores are never whole (SDPA). A loss needs the logits in the stream's own type
    and twice in float32: themselves, and the logarithms of the softmax. Buffers, masks, what a backward pass keeps of
    one block and one sample, and the device's own context are left out; the hidden states of all samples are in the
    host's memory.
    """
    blocks = blocks_of(model)
    hidden, vocabulary, length = model.config.hidden_size, model.config.vocab_size, calibration.length
    batch = min(batch_size, calibration.samples) * length
    inside = [_weights(block) for block in blocks]
    beside = (_weights(model) - sum(inside)) * itemsize + batch * hidden * itemsize
    if losses:
        few = min(calibration.samples, max(1, LOSS_TOKENS // length)) * length
        beside += few * ((hidden + vocabulary) * itemsize + vocabulary * 8) - batch * hidden * itemsize
    working = batch * (2 * hidden + max(map(_linear_outputs, blocks))) * itemsize
    return max(copies * max(inside) * itemsize + working, beside)


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _linear_outputs(block: nn.Module) -> int:
    return sum(getattr(layer, "out_features", 0) for layer in block.modules())
