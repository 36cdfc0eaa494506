"""Run a model block by block on a device that does not hold it: only one block is there at a time.

The model itself stays on the CPU, and so do the hidden states of the samples. Calibration sends those of all samples
through block 0, then through block 1, and so on; a device needs room for one block and one batch. What stands before
the first block and behind the last one (embeddings, final norm, head) is the model's own code, run with blocks that do
nothing; so nothing here knows an architecture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from espalier.errors import UserError
from espalier.models.anatomy import blocks_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


LOSS_TOKENS = 2048  # tokens (or one window, if that is longer) whose logits are there at once


class BlockStream:
    """The blocks of `model` (on the CPU), run on `device`, `batch_size` samples at once.

    `dtype` is that in which they compute; None: that of the weights. `windows` are token ids, samples × length. Blocks
    may be removed from the model between two passes. Raises UserError for weights that are not finite numbers, and for
    windows that the model cannot read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: torch.Tensor,
        device: str,
        batch_size: int,
        dtype: torch.dtype | None = None,
    ):
        self.model, self.windows, self.device, self.batch_size, self.dtype = model, windows, device, batch_size, dtype
        self.evaluations = 0  # blocks run, each on all samples
        self._arguments: dict[int, list[dict]] = {}  # batch size → what the model gives each block beside its input
        check_finite(model)
        check_windows(model, windows)

    @property
    def blocks(self) -> torch.nn.ModuleList:
        return blocks_of(self.model)

    def __len__(self) -> int:
        return len(self.blocks)

    def enter(self) -> torch.Tensor:
        """Return the hidden states before the first block: samples × length × hidden size, on the CPU."""
        import torch

        hidden = []
        with torch.no_grad(), self.surroundings():
            for batch in self.windows.split(self.batch_size):
                seen: list[dict] = []

                def record(states, *, seen=seen, **arguments):
                    if not seen:
                        hidden.append(states.cpu())
                    seen.append(arguments)
                    return states

                with self._replaced(lambda index, record=record: record):
                    self.model(input_ids=batch.to(self.device), use_cache=False, logits_to_keep=1)
                self._arguments[len(batch)] = seen
        return torch.cat(hidden)

    @contextlib.contextmanager
    def resident(self, index: int) -> Iterator[torch.nn.Module]:
        """Hold a block on the device; afterwards its weights are what, and where, they were."""
        with _moved(_tensors(self.blocks[index]), self.device, self.dtype):
            yield self.blocks[index]

    def run(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return the hidden states behind block `index`, which must be resident; both are on the CPU."""
        import torch

        behind, block = torch.empty_like(hidden), self.blocks[index]
        with torch.no_grad():
            for batch, place in zip(hidden.split(self.batch_size), behind.split(self.batch_size), strict=True):
                place.copy_(block(batch.to(self.device), **self.arguments(index, len(batch))))
        self.evaluations += 1
        return behind

    def arguments(self, index: int, samples: int = 1) -> dict:
        """Return what the model gives block `index` beside its input, for a batch of `samples`; `enter` first."""
        return self._arguments[samples][index]

    def losses(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return each sample's mean next-token loss (nats, float32, on the CPU) from what is behind the last block."""
        import torch

        with torch.no_grad(), self.surroundings():
            return torch.cat([self._losses(states, ids).cpu() for states, ids in self._for_losses(hidden)])

    def loss_gradients(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the gradient of each sample's loss with respect to what is behind the last block, on the CPU."""
        import torch

        slopes = []
        # The backward pass needs the weights where the forward pass had them: batch by batch, before they go home.
        with self.surroundings(), torch.enable_grad():
            for states, ids in self._for_losses(hidden):
                states = states.detach().requires_grad_()
                slopes.append(torch.autograd.grad(self._losses(states, ids).sum(), states)[0].cpu())
        return torch.cat(slopes)

    def surroundings(self) -> contextlib.AbstractContextManager[None]:
        """Hold all but the blocks on the device: embeddings, final norm, head. What is there already is not moved."""
        inside = {id(one) for one in _tensors(self.blocks)}
        return _moved([one for one in _tensors(self.model) if id(one) not in inside], self.device, self.dtype)

    def _for_losses(self, hidden: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        few = max(1, LOSS_TOKENS // self.windows.shape[1])
        for states, ids in zip(hidden.split(few), self.windows.split(few), strict=True):
            yield states.to(self.device), ids.to(self.device)

    def _losses(self, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        from torch.nn.functional import cross_entropy

        with self._replaced(lambda index: lambda given, **_: states if index == 0 else given):
            logits = self.model(input_ids=ids, use_cache=False).logits
        each = cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        return each.view(len(ids), -1).mean(1)

    @contextlib.contextmanager
    def _replaced(self, instead: Callable[[int], Callable]) -> Iterator[None]:
        for index, block in enumerate(self.blocks):
            block.forward = instead(index)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward


def gradients(stream: BlockStream) -> Iterator[tuple[int, dict[str, tuple[torch.Tensor, torch.Tensor]]]]:
    """Yield (block, {parameter: (mean gradient, mean squared gradient)}), the last block first.

    Means are over samples; a sample's gradient is that of its mean next-token loss. The inputs of all blocks are kept
    on the CPU, and each block is run again when its turn comes, so that its gradients alone are on the device. The
    stream's `batch_size` must be 1.
    """
    import torch

    if stream.batch_size != 1:
        raise ValueError("gradients are taken sample by sample: the stream's batch size must be 1")
    inputs = [stream.enter()]
    with torch.no_grad():
        for index in range(len(stream)):
            with stream.resident(index):
                inputs.append(stream.run(index, inputs[-1]))
    above = stream.loss_gradients(inputs.pop())
    for index in reversed(range(len(stream))):
        with stream.resident(index) as block:
            weights = {name: one.detach().requires_grad_() for name, one in block.named_parameters()}
            means = {name: (torch.zeros_like(one), torch.zeros_like(one)) for name, one in weights.items()}
            entered, below = inputs.pop(), []
            for sample, slope in zip(entered.split(1), above.split(1), strict=True):
                sample = sample.to(stream.device).requires_grad_()
                with torch.enable_grad():
                    left = torch.func.functional_call(block, weights, (sample,), stream.arguments(index))
                grads = torch.autograd.grad(left, [sample, *weights.values()], slope.to(stream.device))
                below.append(grads[0].cpu())
                for (first, second), grad in zip(means.values(), grads[1:], strict=True):
                    first.add_(grad, alpha=1 / len(above))
                    second.addcmul_(grad, grad, value=1 / len(above))
                del left, grads, grad
            yield index, means
            # Who got the mapping may hold it until the next one comes, and its tensors are as large as the block.
            means.clear()
            del weights, first, second
        above = torch.cat(below)


def check_finite(model: PreTrainedModel) -> None:
    """Raise UserError, which names the weight, if one is not a finite number: its scores would mean nothing."""
    import torch

    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise UserError(f"The weight {name} of the model holds NaN or infinite numbers; no method works on it.")


def check_windows(model: PreTrainedModel, windows: torch.Tensor) -> None:
    """Raise UserError for windows that are longer than the model reads, or whose tokens it does not have."""
    if not windows.numel():
        return
    longest, known = model.config.max_position_embeddings, model.get_input_embeddings().num_embeddings
    if windows.shape[1] > longest:
        raise UserError(
            f"The calibration windows have {windows.shape[1]} tokens, and the model reads {longest} at most."
        )
    if int(windows.max()) >= known:
        raise UserError(
            f"The tokenizer gives the token {int(windows.max())}, and the model knows {known}: they do not go together."
        )


def _tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


@contextlib.contextmanager
def _moved(tensors: list[torch.Tensor], device: str, dtype: torch.dtype | None) -> Iterator[None]:
    """Hold tensors on the device; parameters in `dtype`. Afterwards they are what they were: changes are lost."""
    import torch

    homes = [one.data for one in tensors]
    for one in tensors:
        one.data = one.data.to(device, dtype if isinstance(one, torch.nn.Parameter) else None)
    try:
        yield
    finally:
        for one, home in zip(tensors, homes, strict=True):
            one.data = home
