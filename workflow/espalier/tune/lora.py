"""LoRA on prompts and responses, merged into the weights (Hu et al. 2021, 2106.09685; Kim et al. 2024, 2402.02834).

The loss is the mean negative log-likelihood over the tokens of the responses, the end token included; prompts are read
but not learned. The adapter with the lowest validation loss is kept, merged in float32, and saved as an ordinary
checkpoint. The defaults are the paper's, but for the number of steps or epochs, which has none.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from espalier import training
from espalier.data import Dataset
from espalier.errors import UserError, did_you_mean
from espalier.progress import progress

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


TAKES = ("causal-lm",)
UNSEEN = -100  # the label of a token that is not learned, as in torch's cross_entropy
ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
ALPACA_PAIRED = ", paired with an input that provides further context"


@dataclass(frozen=True)
class Recipe:
    """The data, the adapter, and how it is trained. Give exactly one of `steps` and `epochs`."""

    dataset: Dataset
    split: str = "train"  # rows that are trained on, and of which some are set aside
    config: str | None = None  # a subset of the dataset
    template: Literal["plain", "alpaca"] = "plain"  # columns: prompt, response; or instruction, input, output
    separator: str = ""  # plain: stands between prompt and response, and is learned with the response
    end_token: bool = True  # whether the end of a response is learned too
    r: int = 8  # rank of the update of each layer
    alpha: float = 16.0  # the update is alpha / r · B·A
    dropout: float = 0.05  # of the adapter's input, while it is trained
    targets: list[str] | None = None  # names of linear layers, such as q_proj; none: all linear layers of the blocks
    steps: int | None = None  # optimizer steps
    epochs: float | None = None  # passes over the training rows
    batch_size: int = 64  # rows in an optimizer step
    micro_batch: int = 4  # rows computed at once; it does not change the result beyond rounding and dropout
    learning_rate: float = 1.0e-4  # peak, of AdamW; it rises and falls linearly
    warmup_steps: int = 100  # steps in which the learning rate rises
    weight_decay: float = 0.0  # of the adapter
    max_gradient_norm: float = 1.0  # gradients are scaled down to this norm
    cutoff: int = 256  # tokens of prompt and response; what is longer is cut
    validation_samples: int = 2000  # rows set aside, drawn by the seed; 0: keep the last adapter
    validate_every: int = 200  # steps; the last step is always validated
    autocast: bool = False  # matrix products in bfloat16
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the frozen weights, and of the result
    attention: Literal["sdpa", "eager"] = "sdpa"  # eager is faster for tiny models on a CPU

    def check(self) -> None:
        training.check_duration(self.steps, self.epochs)
        if min(self.r, self.batch_size, self.micro_batch, self.validate_every) < 1:
            raise ValueError("'r', 'batch_size', 'micro_batch' and 'validate_every' must be at least 1.")
        if self.cutoff < 2 or self.validation_samples < 0 or self.warmup_steps < 0:
            raise ValueError("'cutoff' must be at least 2, 'validation_samples' and 'warmup_steps' at least 0.")
        if self.targets is not None and not self.targets:
            raise ValueError("'targets' names no layer; leave it out for all linear layers of the blocks.")


def apply(parent: Path, output: Path, recipe: Recipe, *, seed: int, device: str) -> dict:
    """Train an adapter on `parent`, merge the best one and save the model into `output`.

    Returns the loss curve, the validation losses, the step kept, the number of trained parameters and the seconds.
    Raises UserError for a parent with packed weights, into which an adapter cannot be merged.
    """
    import torch

    from espalier import checkpoints

    described = checkpoints.describe(parent)
    if described.get("format", "transformers") not in ("transformers", "reference"):
        raise UserError(
            f"The checkpoint {parent} has packed weights ({described['format']}), into which LoRA cannot be merged:"
            " put this step before quantization."
        )
    checkpoint = checkpoints.load(
        parent, device, dtype=getattr(torch, recipe.dtype), attn_implementation=recipe.attention
    )
    items, dropped = examples(checkpoint.tokenizer, recipe)
    train, validation = split_rows(items, recipe.validation_samples, seed)
    model = adapted(checkpoint.model, recipe, seed)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    started = time.perf_counter()
    report = fit(model, checkpoint.tokenizer, train, validation, recipe, seed=seed, device=checkpoint.device)
    seconds = time.perf_counter() - started
    merged = merge(model)
    parameters = checkpoints.logical_parameters(merged)
    checkpoints.save(merged, checkpoint.tokenizer, output, {**checkpoint.info, "parameters": parameters})
    counts = {"train_rows": len(train), "validation_rows": len(validation), "dropped_rows": dropped}
    return {**counts, "trained_parameters": trained, "seconds": round(seconds, 2), **report}


def examples(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> tuple[list[dict], int]:
    """Return {"input_ids", "labels"} of each row, and how many rows were dropped because the cut left no response.

    Prompt and response are tokenized together; the response's tokens are those after as many as the prompt has alone,
    which is how the evaluation harness divides them too. The end token follows a response that was not cut, unless the
    recipe leaves it out.
    """
    rows = recipe.dataset.rows(recipe.split, recipe.config)
    columns = ("prompt", "response") if recipe.template == "plain" else ("instruction", "input", "output")
    for column in columns:
        if rows and column not in rows[0]:
            raise UserError(
                f"The dataset '{recipe.dataset.name}', split '{recipe.split}', has no column '{column}', which the"
                f" template '{recipe.template}' needs.{did_you_mean(column, rows[0])}"
            )
    if not rows:
        raise UserError(f"The dataset '{recipe.dataset.name}', split '{recipe.split}', has no rows.")
    pairs = [_pair(row, recipe) for row in rows]
    prompts = tokenizer([prompt for prompt, _ in pairs], verbose=False)["input_ids"]
    wholes = tokenizer([prompt + response for prompt, response in pairs], verbose=False)["input_ids"]
    items, end = [], [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for prompt, whole in zip(prompts, wholes, strict=True):
        # Some tokenizers put the end token after every text by themselves, the prompt alone included.
        prompt = prompt[:-1] if end and prompt[-1:] == end else prompt
        whole = whole[:-1] if end and whole[-1:] == end else whole
        whole += end if recipe.end_token else []
        whole = whole[: recipe.cutoff]
        # The first token of a text is never predicted, so a response without a prompt loses it.
        learned = max(1, len(prompt))
        if len(whole) > learned:
            items.append({"input_ids": whole, "labels": [UNSEEN] * learned + whole[learned:]})
    return items, len(rows) - len(items)


def _pair(row: dict, recipe: Recipe) -> tuple[str, str]:
    if recipe.template == "plain":
        return row["prompt"], recipe.separator + row["response"]
    given = row["input"]
    prompt = ALPACA.format(
        paired=ALPACA_PAIRED if given else "",
        instruction=row["instruction"],
        input=f"### Input:\n{given}\n\n" if given else "",
    )
    return prompt, row["output"]


def split_rows(items: list[dict], validation: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Return the training rows and `validation` rows drawn by the seed. Raises UserError if none is left to train."""
    if validation >= len(items):
        raise UserError(
            f"The recipe sets {validation} of {len(items)} usable rows aside for validation and leaves none to train:"
            " lower 'validation_samples'."
        )
    chosen = set(random.Random(f"validation-{seed}").sample(range(len(items)), validation))
    return [one for i, one in enumerate(items) if i not in chosen], [items[i] for i in sorted(chosen)]


def adapted(model: PreTrainedModel, recipe: Recipe, seed: int) -> PeftModel:
    """Return the model with a new adapter, the only part that trains: A random by the seed, B zero."""
    import torch
    from peft import LoraConfig, get_peft_model

    known = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    for target in recipe.targets or ():
        if target not in known:
            raise UserError(
                f"The model has no linear layer '{target}' for the LoRA recipe's 'targets'."
                + did_you_mean(target, known)
            )
    torch.manual_seed(seed)
    config = LoraConfig(
        r=recipe.r,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=recipe.targets or "all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def fit(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train: list[dict],
    validation: list[dict],
    recipe: Recipe,
    *,
    seed: int,
    device: str,
) -> dict:
    """Train the adapter in place and leave the one with the lowest validation loss in the model (the last without one).

    A step's loss is the mean over all learned tokens of its batch, however the batch is divided into micro-batches.
    """
    import torch

    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)
    steps = training.steps_of(len(train), recipe.batch_size, recipe.steps, recipe.epochs)
    losses: list[float] = []
    validations: list[dict] = []
    best: list[torch.Tensor] = []
    model.train()
    bar = progress(training.batches(len(train), recipe.batch_size, steps, seed), "training LoRA, steps", steps)
    for step, rows in enumerate(bar):
        rate = recipe.learning_rate * training.warmup_then_linear(step, steps, min(recipe.warmup_steps, steps))
        training.set_learning_rate(optimizer, rate)
        losses.append(round(_backward(model, tokenizer, [train[i] for i in rows], recipe, device), 5))
        torch.nn.utils.clip_grad_norm_(weights, recipe.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.note(f"loss {losses[-1]:.3f}")
        if validation and ((step + 1) % recipe.validate_every == 0 or step + 1 == steps):
            loss = mean_loss(model, tokenizer, validation, recipe, device)
            if not validations or loss < min(one["loss"] for one in validations):
                best = [weight.detach().clone() for weight in weights]
            validations.append({"step": step + 1, "loss": loss})
    kept = steps
    if validations:
        kept = min(validations, key=lambda one: one["loss"])["step"]
        with torch.no_grad():
            for weight, value in zip(weights, best, strict=True):
                weight.copy_(value)
    model.eval()
    return {"steps": steps, "kept_step": kept, "losses": losses, "validation": validations}


def _backward(model, tokenizer, items: list[dict], recipe: Recipe, device: str) -> float:
    """Add the gradient of the batch's mean loss over learned tokens; return that loss."""
    tokens = sum(_learned(item) for item in items)
    total = 0.0
    for start in range(0, len(items), recipe.micro_batch):
        part = items[start : start + recipe.micro_batch]
        loss = summed_loss(model, tokenizer, part, recipe.autocast, device) / tokens
        loss.backward()
        total += loss.item()
    return total


def mean_loss(model, tokenizer, items: list[dict], recipe: Recipe, device: str) -> float:
    """Return the mean loss over the learned tokens of all items, without dropout."""
    import torch

    was_training = model.training
    model.eval()
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(items), recipe.micro_batch):
            part = items[start : start + recipe.micro_batch]
            total += summed_loss(model, tokenizer, part, recipe.autocast, device).item()
    model.train(was_training)
    return total / sum(_learned(item) for item in items)


def summed_loss(model, tokenizer, items: list[dict], autocast: bool, device: str) -> torch.Tensor:
    """Return the negative log-likelihood summed over the learned tokens (nats)."""
    import torch
    from torch.nn.functional import cross_entropy

    longest = max(len(item["input_ids"]) for item in items)
    ids = torch.full((len(items), longest), tokenizer.pad_token_id)
    labels = torch.full((len(items), longest), UNSEEN)
    for row, item in enumerate(items):
        ids[row, : len(item["input_ids"])] = torch.tensor(item["input_ids"])
        labels[row, : len(item["labels"])] = torch.tensor(item["labels"])
    ids, labels = ids.to(device), labels.to(device)
    # Padding is on the right and attention is causal: no learned token sees it, and no mask is needed.
    with training.autocast(device, autocast):
        logits = model(input_ids=ids, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")


def merge(model: PeftModel) -> PreTrainedModel:
    """Return the model with the adapter added to its weights.

    The adapter is float32 whatever the weights are, so each sum is computed in float32 and rounded once.
    """
    return model.merge_and_unload()


def _learned(item: dict) -> int:
    return sum(label != UNSEEN for label in item["labels"])
