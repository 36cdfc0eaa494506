"""Trains the demo's decoder from nothing: a byte-level BPE tokenizer and a Llama of eight narrow blocks.

The MLP is narrow on purpose. With a wide one a few blocks learn the whole language and removing the others costs
nothing; with a narrow one every block is needed, so pruning has something to show. Matrices are trained by Muon
(Jordan et al. 2024), which at this size learns in a third of AdamW's time; embeddings and norms by AdamW.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from espalier.data import Text
from espalier.progress import progress

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")
TOKENIZER_DOCUMENTS = 5000
STEPS_A_REPORT = 50


GIVES = "causal-lm"


@dataclass(frozen=True)
class Recipe:
    """The model's sizes and how it is trained."""

    text: Text  # the training documents
    vocabulary: int = 1024  # at most
    hidden: int = 128  # width of the residual stream
    layers: int = 8  # transformer blocks
    heads: int = 4  # attention heads; they divide hidden
    mlp: int = 64  # neurons of each block; few, so that every block is needed
    init_std: float = 0.04  # standard deviation of the initial weights
    window: int = 64  # tokens of one training sample; documents are joined by the end token and cut into windows
    batch: int = 16  # windows an optimizer step
    steps: int = 1200  # optimizer steps
    muon_lr: float = 0.02  # peak learning rate of the matrices
    adamw_lr: float = 8e-3  # peak learning rate of the rest
    weight_decay: float = 0.05  # of the matrices
    warmup: float = 0.05  # share of the steps

    def check(self) -> None:
        if self.hidden % self.heads:
            raise ValueError("'heads' must divide 'hidden'.")
        if min(self.steps, self.batch, self.layers) < 1 or self.window < 2:
            raise ValueError("'steps', 'batch' and 'layers' must be at least 1 and 'window' at least 2.")


def sizes(recipe: Recipe) -> dict:
    """Return the widths of the layers, named as in a config.json."""
    return {"hidden_size": recipe.hidden, "intermediate_size": recipe.mlp}


def apply(parent: Path | None, output: Path, recipe: Recipe, *, seed: int, device: str) -> dict:
    """Train the decoder and save it into `output`; return the loss curve, the tokens read and the seconds taken.

    There is no parent. The result follows from the seed, bit by bit on one CPU thread.
    """
    import torch

    from espalier import checkpoints

    if parent is not None:
        raise ValueError("demo_decoder trains from nothing and takes no parent")
    device = checkpoints.pick_device(device)
    documents = recipe.text.documents()
    tokenizer = train_tokenizer(documents[:TOKENIZER_DOCUMENTS], recipe.vocabulary)
    windows = pack(tokenizer, documents, recipe.window)
    torch.manual_seed(seed)
    model = new_model(recipe, len(tokenizer)).to(device)
    started = time.perf_counter()
    losses = _train(model, windows, recipe, seed, device)
    seconds = time.perf_counter() - started
    model.eval().cpu()
    parameters = checkpoints.logical_parameters(model)
    checkpoints.save(model, tokenizer, output, {"task": "causal-lm", "parameters": parameters})
    return {
        "parameters": parameters,
        "vocabulary": len(tokenizer),
        "documents": len(documents),
        "distinct_tokens": windows.numel(),
        "trained_tokens": recipe.steps * recipe.batch * recipe.window,
        "seconds": round(seconds, 2),
        "losses": losses,
    }


def skeleton(recipe: Recipe) -> tuple[LlamaForCausalLM, bool]:
    """Return the model on the meta device, shapes without weights, and False: the text may give fewer tokens."""
    import torch

    with torch.device("meta"):
        return new_model(recipe, recipe.vocabulary), False


def train_tokenizer(documents: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocabulary` tokens, without a template: text gains no special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(documents, trainer)
    unknown, begin, end, pad = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        bos_token=begin,
        eos_token=end,
        pad_token=pad,
        model_max_length=256,
    )


def pack(tokenizer: PreTrainedTokenizerFast, documents: list[str], window: int) -> torch.Tensor:
    """All documents, each followed by the end token, cut into windows: int64 (windows, window)."""
    import torch

    ids: list[int] = []
    for document in tokenizer(documents, add_special_tokens=False)["input_ids"]:
        ids += [*document, tokenizer.eos_token_id]
    count = len(ids) // window
    return torch.tensor(ids[: count * window]).view(count, window)


def new_model(recipe: Recipe, vocabulary: int) -> LlamaForCausalLM:
    """The untrained model, with tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=recipe.init_std,
        bos_token_id=SPECIAL_TOKENS.index("<s>"),
        eos_token_id=SPECIAL_TOKENS.index("</s>"),
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
        attn_implementation="eager",  # faster than SDPA at this size
    )
    return LlamaForCausalLM(config)


def _optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    import torch

    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay, momentum=0.95),
        torch.optim.AdamW(others, lr=recipe.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def _train(model: LlamaForCausalLM, windows: torch.Tensor, recipe: Recipe, seed: int, device: str) -> list[dict]:
    """Train in place; return the mean loss of each `STEPS_A_REPORT` steps."""
    import torch
    from torch.nn.functional import cross_entropy

    generator = torch.Generator().manual_seed(seed)
    passes = math.ceil(recipe.steps * recipe.batch / len(windows))
    order = torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(passes)])
    optimizers = _optimizers(model, recipe)
    # Warm-up, then full speed for a tenth of the steps, then linearly to nothing.
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min(1.0, (step + 1) / (recipe.warmup * recipe.steps + 1e-9), (1 - step / recipe.steps) / 0.9),
        )
        for optimizer in optimizers
    ]
    losses: list[dict] = []
    total = torch.zeros((), device=device)
    model.train()
    for step in (bar := progress(range(1, recipe.steps + 1), "training the decoder")):
        batch = windows[order[(step - 1) * recipe.batch : step * recipe.batch]].to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            logits = model(input_ids=batch, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        total += loss.detach()
        if step % STEPS_A_REPORT == 0 or step == recipe.steps:
            steps = step - (losses[-1]["step"] if losses else 0)
            losses.append({"step": step, "loss": round(total.item() / steps, 4)})
            bar.note(f"loss {losses[-1]['loss']:.3f}")
            total.zero_()
    return losses
