"""Encoders of 1- and 2-bit weights, trained as such: XTC (Wu et al. 2022, arXiv 2206.01859).

The student begins as its teacher, the parent, a fine-tuned classifier, or as some of its layers. From the first step on
it computes with binary or ternary weights (models/packed.py) in its encoder layers and its table of word embeddings,
and with activations of 8 bits; it learns what the teacher computes (distillation.py), by straight-through gradients
(models/latent.py). The position embeddings, the norms, the pooler and the classifier stay in float32.

The finished student is stored in 1 or 2 bits a weight, and computes exactly what the student of the training does.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from espalier import glue_tasks, parallel, training
from espalier.data import Dataset

if TYPE_CHECKING:
    from pathlib import Path

    from espalier.training_state import Saving

TAKES = ("sequence-classification",)
TRAINS = True  # so it is a job of the rule distill_model, and `apply` gets `saving`
PACKS_EMBEDDINGS = True

# Task → epochs under the budgets A, B and C. As remembered from the paper's tables, but for 18 epochs of MNLI, which
# the authors' script has; where the paper gives a range for C, its lower end.
EPOCHS = {
    "cola": (1, 3, 12),
    "mnli": (3, 9, 18),
    "mrpc": (1, 3, 12),
    "qnli": (1, 3, 6),
    "qqp": (3, 9, 18),
    "rte": (1, 3, 12),
    "sst2": (1, 3, 12),
    "stsb": (1, 3, 12),
}
LARGE = ("mnli", "qqp")  # trained on their own rows alone
COPIES = 20  # of every row of the other tasks, as many as in TinyBERT's augmentation (Jiao et al. 2020, 1909.10351)
PRESETS = {
    f"budget-{budget}-{task}": {
        "task": task,
        "epochs": epochs[number],
        "augmentation": 0 if task in LARGE else COPIES,
    }
    for task, epochs in EPOCHS.items()
    for number, budget in enumerate("abc")
}
PRESET_FIXES = ("task",)


@dataclass(frozen=True)
class Recipe:
    """The student's weights, and how it is trained. Give exactly one of `steps` and `epochs`, or a preset."""

    task: glue_tasks.Name  # the GLUE task that the teacher was trained for
    dataset: Dataset
    bits: Literal[1, 2, 32]  # of a weight: 1 binary, 2 ternary; 32: nothing is quantized, activations neither
    split: str = "train"  # rows that are trained on; their labels are checked, and not learned
    activations: Literal[8] | None = 8  # bits that the inputs of quantized layers are rounded to; null: not rounded
    scales: Literal["tensor", "row", "group"] = "tensor"  # what shares a scale: a whole matrix, a row, a group
    group_size: int = -1  # input channels that share a scale, for `scales: group`
    layers: list[int] | None = None  # the teacher's layers that the student has, from 0; null: all
    steps: int | None = None  # optimizer steps
    epochs: float | None = None  # passes over the rows, augmented ones included
    augmentation: int = 0  # copies of each row in which words are replaced by near ones
    batch_size: int = 32  # rows an optimizer step
    learning_rate: float = 5.0e-5  # peak, of AdamW; it rises and falls linearly
    warmup: float = 0.06  # share of the steps; the authors' script warms up in 1 of 18 epochs
    weight_decay: float = 0.01  # of matrices; never of biases and norms
    adam_beta2: float = 0.999  # AdamW's decay of squared gradients
    max_gradient_norm: float = 1.0  # gradients are scaled down to this norm
    max_length: int = 128  # tokens; longer inputs are cut
    autocast: bool = False  # other products, and those of gradients, in bfloat16; weights and updates stay in float32
    attention: Literal["sdpa", "eager"] = "sdpa"  # eager is faster for tiny models on a CPU

    def check(self) -> None:
        training.check_duration(self.steps, self.epochs)
        if self.batch_size < 1 or self.max_length < 4 or self.augmentation < 0:
            raise ValueError("'batch_size' must be at least 1, 'max_length' at least 4 and 'augmentation' at least 0.")
        if not 0 <= self.warmup < 1:
            raise ValueError("'warmup' is a share of the steps: at least 0 and below 1.")
        if (self.scales == "group") != (self.group_size > 0):
            raise ValueError("'group_size' goes with 'scales: group', and must then be at least 1.")
        if self.layers is not None and (not self.layers or sorted(set(self.layers)) != self.layers):
            raise ValueError("'layers' must be different numbers in rising order, at least one.")
        if self.layers and self.layers[0] < 0:
            raise ValueError("'layers' count from 0.")


def apply(parent: Path, output: Path, recipe: Recipe, *, seed: int, device: str, saving: Saving | None = None) -> dict:
    """Train a student of `parent` and save it, packed, into `output`; return rows, steps, losses and seconds.

    Raises UserError for a parent that is no classifier of the task, or has not the layers asked for, before training.
    """
    import copy

    import torch

    from espalier import augmentation, checkpoints, packed_checkpoints
    from espalier.distillation import Distillation
    from espalier.models import encoders, latent
    from espalier.models.packed import Scheme

    parallel.refuse("Training of 1- and 2-bit weights")
    training.refuse_packed(parent, "the training of a student")
    found = glue_tasks.rows(recipe.dataset, recipe.task, recipe.split)
    torch.manual_seed(seed)  # dropout
    checkpoint = checkpoints.load(parent, device, dtype=torch.float32, attn_implementation=recipe.attention)
    glue_tasks.check_classifier(checkpoint, recipe.task)
    teacher, tokenizer = checkpoint.model, checkpoint.tokenizer
    student = copy.deepcopy(teacher)
    layers = recipe.layers or list(range(len(encoders.layers_of(teacher))))
    encoders.keep_layers(student, layers)
    scheme = Scheme(recipe.bits, recipe.scales, recipe.group_size, recipe.activations)
    if recipe.bits < 32:
        latent.make_latent(student, scheme)
    items = [{"inputs": one} for one in glue_tasks.encode(checkpoint, recipe.task, found, recipe.max_length)]
    if recipe.augmentation:
        near = augmentation.nearest_words(teacher, tokenizer)
        items = augmentation.Augmented(items, recipe.augmentation, near, seed)
    steps = training.steps_of(len(items), recipe.batch_size, recipe.steps, recipe.epochs)
    started = time.perf_counter()
    report = training.fit(
        student,
        training.Rows(items, recipe.batch_size, steps, seed),
        Distillation(teacher, student, layers, tokenizer, device, recipe.autocast),
        training.plan_of_rows(recipe, steps),
        device=device,
        label=f"{recipe.bits}-bit student on {recipe.task}",
        saving=saving,
    )
    seconds = time.perf_counter() - started
    info = {**checkpoint.info, "parameters": checkpoints.logical_parameters(student), "glue_task": recipe.task}
    if recipe.bits < 32:
        latent.pack_latent(student)
        packed_checkpoints.save(student, tokenizer, output, info, scheme)
    else:
        checkpoints.save(student, tokenizer, output, info)
    losses = report["losses"]
    return {
        "rows": len(found),
        "augmented_rows": len(items),
        "steps": len(losses),
        "seconds": round(seconds, 2),
        "losses": losses,
    }
