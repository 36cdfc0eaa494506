"""LoRA on prompts and responses, merged into the weights (Hu et al. 2021, 2106.09685; Kim et al. 2024, 2402.02834).

The loss is the mean negative log-likelihood over the tokens of the responses, the end token included; prompts are read
but not learned. The adapter with the lowest validation loss is kept, merged in float32, and saved as an ordinary
checkpoint. The defaults are the paper's, but for the number of steps or epochs, which has none.

With `base: nf4` it is QLoRA (Dettmers et al. 2023, 2305.14314): while the adapter trains, the linear layers of the
blocks are held in 4-bit NF4 with double quantization. What is merged and saved is what was validated: the dequantized
NF4 weight W' plus alpha / r · B·A, not the parent's W.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from espalier import instructions, parallel, training
from espalier.data import Dataset
from espalier.errors import UserError, did_you_mean
from espalier.token_loss import TokenLoss

if TYPE_CHECKING:
    from pathlib import Path

    from peft import PeftModel
    from transformers import PreTrainedModel

    from espalier.checkpoints import Checkpoint
    from espalier.training_state import Saving

TAKES = ("causal-lm",)


@dataclass(frozen=True)
class Recipe:
    """The data, the adapter, and how it is trained. Give exactly one of `steps` and `epochs`."""

    dataset: Dataset
    split: str = "train"  # rows that are trained on, and of which some are set aside
    config: str | None = None  # a subset of the dataset
    template: Literal["plain", "alpaca"] = "plain"  # columns: prompt, response; or instruction, input, output
    separator: str = ""  # plain: stands between prompt and response, and is learned with the response
    end_token: bool = True  # whether the end of a response is learned too
    base: Literal["full", "nf4"] = "full"  # how the frozen weights are held: as they are, or in 4 bits (QLoRA)
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
        self.dataset.check_part(self.split, self.config)
        if min(self.r, self.batch_size, self.micro_batch, self.validate_every) < 1:
            raise ValueError("'r', 'batch_size', 'micro_batch' and 'validate_every' must be at least 1.")
        if self.cutoff < 2 or self.validation_samples < 0 or self.warmup_steps < 0:
            raise ValueError("'cutoff' must be at least 2, 'validation_samples' and 'warmup_steps' at least 0.")
        if self.targets is not None and not self.targets:
            raise ValueError("'targets' names no layer; leave it out for all linear layers of the blocks.")


def processes(recipe: Recipe, most: int) -> int:
    """Return how many of `most` processes share the training: weights in NF4 are not divided."""
    return 1 if recipe.base == "nf4" else most


def apply(
    parent: Path, output: Path | None, recipe: Recipe, *, seed: int, device: str, saving: Saving | None = None
) -> dict:
    """Train an adapter on `parent`, merge the best one and save the model into `output` (None: take part, no more).

    Returns the loss curve, the validation losses, the step kept, the number of trained parameters and the seconds.
    Raises UserError for a parent with packed weights, into which an adapter cannot be merged.
    """
    from espalier import checkpoints

    training.refuse_packed(parent, "LoRA")
    if recipe.base == "nf4":
        from espalier import nf4

        parallel.refuse("LoRA on weights in NF4 (QLoRA)")
        nf4.check_widths(parent, device)
    checkpoint = load(parent, recipe, device)
    items, dropped = instructions.examples(checkpoint.tokenizer, recipe)
    train, validation = instructions.split_rows(items, recipe.validation_samples, seed)
    model = adapted(checkpoint.model, recipe, seed)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    steps = training.steps_of(len(train), recipe.batch_size, recipe.steps, recipe.epochs)
    plan = training.plan_of(recipe, steps)
    started = time.perf_counter()
    report = training.fit(
        model,
        training.Rows(train, recipe.batch_size, steps, seed),
        TokenLoss(checkpoint.tokenizer.pad_token_id, device, recipe.autocast),
        plan,
        device=device,
        label="training LoRA, steps",
        validation=validation,
        saving=saving,
    )
    seconds = time.perf_counter() - started

    def fresh() -> PeftModel:
        return adapted(load(parent, recipe, device, whole=True).model, recipe, seed)

    model = parallel.undivided(model, fresh, always=recipe.base == "nf4")
    if output is not None:
        merged = merge(model)
        parameters = checkpoints.logical_parameters(merged)
        checkpoints.save(merged, checkpoint.tokenizer, output, {**checkpoint.info, "parameters": parameters})
    counts = {"train_rows": len(train), "validation_rows": len(validation), "dropped_rows": dropped}
    return {**counts, "trained_parameters": trained, "seconds": round(seconds, 2), **report}


def load(parent: Path, recipe: Recipe, device: str, whole: bool = False) -> Checkpoint:
    """Load the frozen base. NF4: its blocks' layers packed; with `whole`, the values that those stand for, unpacked.

    A whole one lies in main memory, because the packed one is still on the device.
    """
    import torch

    from espalier import checkpoints

    options = {"dtype": getattr(torch, recipe.dtype), "attn_implementation": recipe.attention}
    if recipe.base == "full":
        return checkpoints.load(parent, parallel.loading_device(device), **options)
    from espalier import nf4

    if not whole:
        return nf4.load(parent, device, **options)
    checkpoint = checkpoints.load(parent, "cpu", **options)
    nf4.round_weights(checkpoint.model, device)
    return checkpoint


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


def merge(model: PeftModel) -> PreTrainedModel:
    """Return the model with the adapter added to its weights.

    The adapter is float32 whatever the weights are, so each sum is computed in float32 and rounded once.
    """
    return model.merge_and_unload()
