"""The one training loop: a seeded order of batches, AdamW, the learning-rate schedule, and the best weights kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from espalier import checkpoints, parallel, training_state
from espalier.errors import UserError
from espalier.progress import progress
from espalier.training_state import Saving, digest

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

UNSEEN = -100  # the label of a token that is not learned, as in torch's cross_entropy
Schedule = Literal["linear", "cosine"]


@dataclass(frozen=True)
class Plan:
    """How long and how fast a model is trained."""

    steps: int  # optimizer steps
    learning_rate: float  # peak, of AdamW
    warmup: int  # steps in which it rises
    weight_decay: float  # of matrices; never of biases and norms
    max_gradient_norm: float  # gradients are scaled down to this norm
    micro_batch: int  # samples computed at once
    schedule: Schedule = "linear"  # how the learning rate falls to zero
    adam_beta2: float = 0.999  # AdamW's decay of squared gradients
    validate_every: int = 1  # steps; the last step is always validated


def plan_of(recipe: Any, steps: int) -> Plan:
    """Return the plan of a recipe with the keys of `Plan`, but `warmup_steps` for warmup; what it lacks is default."""
    named = {key: getattr(recipe, key) for key in Plan.__dataclass_fields__ if hasattr(recipe, key)}
    return Plan(**{**named, "steps": steps, "warmup": recipe.warmup_steps})


def plan_of_rows(recipe: Any, steps: int) -> Plan:
    """Return the plan of a recipe whose `warmup` is a share of the steps, and whose batches are computed at once."""
    named = {key: getattr(recipe, key) for key in Plan.__dataclass_fields__ if hasattr(recipe, key)}
    return Plan(**{**named, "steps": steps, "warmup": round(recipe.warmup * steps), "micro_batch": recipe.batch_size})


class Batches(Protocol):
    """Where the samples of each step come from; `position` is a plain value, to which `seek` goes back."""

    def take(self) -> list: ...
    def position(self) -> Any: ...
    def seek(self, position: Any) -> None: ...
    def fingerprint(self) -> str: ...


class Objective(Protocol):
    """`loss` is the samples' share of a mean over `total`, of which each sample has `weight`."""

    def weight(self, item: Any) -> int: ...
    def loss(self, model: Any, items: list, total: int) -> torch.Tensor: ...


def refuse_packed(parent: Path, what: str) -> None:
    """Raise UserError for a parent with packed weights; `what` is the training, such as LoRA."""
    described = checkpoints.describe(parent)
    if described.get("format", "transformers") not in ("transformers", "reference"):
        raise UserError(
            f"The checkpoint {parent} has packed weights ({described['format']}), which {what} cannot change: put this"
            " step before quantization."
        )


class Rows:
    """Batches of rows, each pass in a new seeded order. Rows that are no list give their `fingerprint` themselves."""

    def __init__(self, items: Sequence, batch_size: int, steps: int, seed: int):
        self.items, self.taken = items, 0
        self.order = batches(len(items), batch_size, steps, seed)

    def take(self) -> list:
        self.taken += 1
        return [self.items[i] for i in next(self.order)]

    def position(self) -> int:
        return self.taken

    def seek(self, position: int) -> None:
        while self.taken < position:
            next(self.order)
            self.taken += 1

    def fingerprint(self) -> str:
        return digest(self.items) if isinstance(self.items, list) else self.items.fingerprint()


def steps_of(count: int, batch_size: int, steps: int | None, epochs: float | None) -> int:
    """Return the number of optimizer steps: `steps`, or those of `epochs` passes over `count` samples."""
    return steps if steps is not None else math.ceil(epochs * math.ceil(count / batch_size))


def check_duration(steps: int | None, epochs: float | None) -> None:
    """Raise ValueError unless exactly one of the two is given, and positive."""
    if (steps is None) == (epochs is None):
        raise ValueError("give exactly one of 'steps' and 'epochs'.")
    if (steps if steps is not None else epochs) <= 0:
        raise ValueError("'steps' or 'epochs' must be positive.")


def batches(count: int, batch_size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Yield `steps` lists of sample indices: each pass takes every sample once, in a new seeded order.

    The last batch of a pass is smaller where `batch_size` does not divide `count`.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    done = 0
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count, batch_size):
            if done == steps:
                return
            done += 1
            yield order[start : start + batch_size]


def warmup_then_linear(step: int, steps: int, warmup: int) -> float:
    """Return the learning rate's factor at `step` (from 0): up to 1 over `warmup` steps, then down to 0 at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / max(1, steps - warmup)


def warmup_then_cosine(step: int, steps: int, warmup: int) -> float:
    """Return the factor that rises as `warmup_then_linear` does, then falls as half a cosine, to 0 at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


SCHEDULES = {"linear": warmup_then_linear, "cosine": warmup_then_cosine}


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def autocast(device: str, enabled: bool) -> torch.autocast:
    """Return a context in which matrix products run in bfloat16 if `enabled`."""
    import torch

    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)


def adamw(
    weights: Iterable[torch.nn.Parameter], learning_rate: float, weight_decay: float, beta2: float
) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov & Hutter 2017, 1711.05101) with weight decay on matrices only."""
    import torch

    weights = list(weights)
    groups = [
        {"params": [one for one in weights if one.ndim >= 2], "weight_decay": weight_decay},
        {"params": [one for one in weights if one.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, beta2), fused=True)


def fit(
    model: PreTrainedModel,
    source: Batches,
    objective: Objective,
    plan: Plan,
    *,
    device: str,
    label: str,
    validation: Sequence = (),
    saving: Saving | None = None,
) -> dict:
    """Train in place what requires gradients; leave the weights with the lowest validation loss (the last without one).

    A step's loss is the mean over its batch, weighted by the objective, however the batch is divided into micro-batches
    and processes. Returns the steps, the step kept, each step's loss and the validation losses. With `saving` it goes
    on from a saved state; raises UserError when it was asked to stop, and where a loss or a gradient is not finite.
    With several processes the model is divided among them here, and stays so.
    """
    import torch

    parallel.shard(model, device)
    named = {name: one for name, one in model.named_parameters() if one.requires_grad}
    weights = list(named.values())
    optimizer = adamw(weights, plan.learning_rate, plan.weight_decay, plan.adam_beta2)
    losses: list[float] = []
    validations: list[dict] = []
    best: dict[str, torch.Tensor | None] = {}
    data = digest([source.fingerprint(), list(validation)]) if saving else ""
    if saving and (saved := training_state.resume(saving, data, named, optimizer)):
        losses, validations, best = saved["losses"], saved["validations"], saved["best"]
        source.seek(saved["position"])
    model.train()
    bar = progress(range(len(losses), plan.steps), label, plan.steps - len(losses))
    for step in bar if parallel.rank() == 0 else bar.iterable:
        rate = SCHEDULES[plan.schedule](step, plan.steps, min(plan.warmup, plan.steps))
        set_learning_rate(optimizer, plan.learning_rate * rate)
        [loss] = parallel.total([backward(model, source.take(), objective, plan.micro_batch)])
        _check_finite(loss, "loss", step)
        norm = torch.nn.utils.clip_grad_norm_(weights, plan.max_gradient_norm)
        _check_finite(parallel.number(norm), "gradient's norm", step)  # before it reaches the weights and a state
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(round(loss, 5))
        bar.note(f"loss {losses[-1]:.3f}")
        if validation and ((step + 1) % plan.validate_every == 0 or step + 1 == plan.steps):
            found = mean_loss(model, validation, objective, plan.micro_batch)
            _check_finite(found, "validation loss", step)
            if not validations or found < min(one["loss"] for one in validations):
                best = {name: parallel.whole(one) for name, one in named.items()}
            validations.append({"step": step + 1, "loss": found})
        stopped, due = parallel.total([*saving.asked()]) if saving else (False, False)
        if due or stopped:
            run = {"losses": losses, "validations": validations, "best": best, "position": source.position()}
            training_state.save(saving, data, run, named, optimizer)
        if stopped:
            raise saving.farewell(step + 1, plan.steps)
    if validations:
        with torch.no_grad():
            for name, weight in named.items():
                weight.copy_(parallel.divided(best[name], weight))
    kept = min(validations, key=lambda one: one["loss"])["step"] if validations else plan.steps
    model.eval()
    return {"steps": plan.steps, "kept_step": kept, "losses": losses, "validation": validations}


def backward(model: PreTrainedModel, items: list, objective: Objective, micro_batch: int) -> float:
    """Set the gradient of the mean loss of `items`, with none there before; return this process's share of that loss.

    A token's share of a mean over thousands is below what float16 can hold. So the loss is scaled up on its way through
    the model, to about a sum over tokens, and the gradients down again: by a power of two, which rounds nothing.
    """
    total = sum(map(objective.weight, items))
    scale = 2.0 ** math.floor(math.log2(total))
    loss_here = 0.0
    for part, factor in _parts(items, micro_batch):
        loss = factor * objective.loss(model, part, total)
        (scale * loss).backward()
        loss_here += loss.item()
    for one in model.parameters():
        if one.grad is not None:
            one.grad.div_(scale)
    return loss_here


def _check_finite(value: float, name: str, step: int) -> None:
    if not math.isfinite(value):
        raise UserError(
            f"The {name} of step {step + 1} is {value}: lower 'learning_rate', or look for NaN in the parent's weights."
        )


def mean_loss(model: PreTrainedModel, items: Sequence, objective: Objective, micro_batch: int) -> float:
    """Return the mean loss of all items over all processes, without dropout."""
    import torch

    was_training = model.training
    model.eval()
    summed = 0.0
    with torch.no_grad():
        for part, factor in _parts(items, micro_batch):
            summed += factor * objective.loss(model, part, 1).item()
    model.train(was_training)
    return parallel.total([summed])[0] / sum(map(objective.weight, items))


def _parts(items: Sequence, micro_batch: int) -> Iterator[tuple[list, float]]:
    """Yield this process's share of the items in micro-batches, each with a factor of 1.

    All processes compute equally many, because each computation is one that they make together: those that have run out
    compute a part again with a factor of 0.
    """
    own = list(items[parallel.rank() :: parallel.size()])
    most = math.ceil(len(items) / parallel.size())
    for start in range(0, most, micro_batch):
        part = own[start : start + micro_batch]
        yield (part, 1.0) if part else (list(items[:1]), 0.0)
