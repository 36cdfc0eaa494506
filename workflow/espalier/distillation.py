"""Distillation of an encoder in one stage: the student learns its teacher's logits, attention scores and hidden states.

XTC (Wu et al. 2022, arXiv 2206.01859), section 3, with TernaryBERT's losses (Zhang et al. 2020, arXiv 2009.12812,
equations 7 to 9): labels are not used. Padding counts nowhere; in the authors' code it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import mse_loss

from espalier import glue_tasks, training
from espalier.models.encoders import AttentionScores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Distillation:
    """The loss of a student against its teacher on rows {"inputs"}, as `training.fit` asks for it.

    `layers` are the teacher's layers, from 0, that the student's are to be like, one after another.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        student: PreTrainedModel,
        layers: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        device: str,
        autocast: bool,
    ):
        self.teacher, self.layers = teacher.eval().requires_grad_(False), layers
        self.tokenizer, self.device, self.autocast = tokenizer, device, autocast
        self.teacher_scores, self.student_scores = AttentionScores(teacher), AttentionScores(student)

    def weight(self, item: dict) -> int:
        return 1

    def loss(self, model: PreTrainedModel, items: list[dict], total: int) -> torch.Tensor:
        """Return the mean loss of `items` as their share of a mean over `total` rows."""
        batch = glue_tasks.pad(self.tokenizer, [item["inputs"] for item in items], self.device)
        with training.autocast(self.device, self.autocast):
            with torch.no_grad():
                target = self.teacher(**batch, output_hidden_states=True)
                target_scores = self.teacher_scores.taken()
            found = model(**batch, output_hidden_states=True)
            scores = self.student_scores.taken()
        real = batch["attention_mask"].bool()
        pairs = (real[:, None, :, None] & real[:, None, None, :]).expand_as(scores[0])
        loss = logits_loss(found.logits.float(), target.logits.float())
        for own, number in zip(scores, self.layers, strict=True):
            loss = loss + mean_square(own, target_scores[number], pairs)
        # Before the first layer there are the embeddings, which every student has.
        for own, number in zip(found.hidden_states, [0, *(number + 1 for number in self.layers)], strict=True):
            loss = loss + mean_square(own, target.hidden_states[number], real[..., None].expand_as(own))
        return loss * (len(items) / total)


def logits_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the loss of logits, rows × labels, against the teacher's, at temperature 1.

    Soft cross-entropy, as a mean over rows and labels, as in the authors' code; the squared error for one output.
    """
    if logits.shape[1] == 1:
        return mse_loss(logits, target)
    return -(target.softmax(-1) * logits.log_softmax(-1)).mean()


def mean_square(found: torch.Tensor, target: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Return the mean squared difference over those elements that count, in float32."""
    difference = (found.float() - target.float()).masked_fill(~counted, 0)
    return difference.square().sum() / counted.sum()
