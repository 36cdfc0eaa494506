"""DeepSpeed-Inference (Aminabadi et al. 2022, 2207.00032): `deepspeed.init_inference` around transformers' model.

Its kernels replace a model's blocks ("kernel injection") on CUDA alone, and only where DeepSpeed knows the architecture
and the replaced model still gives transformers' tokens; not verified on a GPU. Without them, which is always so on a
CPU, DeepSpeed hands each call to transformers' own `generate`, and its numbers are those of transformers.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from espalier import checkpoints, hf_generation, provenance
from espalier.errors import first_line
from espalier.worker import Unavailable

if TYPE_CHECKING:
    from deepspeed import InferenceEngine
    from transformers import PreTrainedModel

    from espalier.worker import Load

ENVIRONMENTS = {"cpu": "deepspeed", "cuda": "deepspeed"}
PACKAGES = ("deepspeed", *hf_generation.PACKAGES)
SAMPLINGS = hf_generation.SAMPLINGS
TRIAL_TOKENS = 8  # prompt and output of the comparison of injected kernels with transformers


def probe(device: str) -> None:
    """Raise Unavailable if DeepSpeed is not installed, or torch does not see the device."""
    if provenance.version("deepspeed") is None:
        raise Unavailable("the package deepspeed is not installed in this environment")
    hf_generation.probe(device)


class Engine(hf_generation.HFGeneration):
    """DeepSpeed's wrapper of the model, in this process alone."""

    name = "deepspeed"

    def load(self, load: Load) -> None:
        """Load the checkpoint and wrap it. Raises Unavailable for one whose weights are quantized."""
        stored = checkpoints.describe(load.folder)["format"]
        if stored not in ("transformers", "reference"):
            raise Unavailable(f"DeepSpeed casts all weights to one dtype, and these are packed ({stored})")
        super().load(load)
        self.model.module.generation_config = self.model.generation_config  # it is the wrapped model that generates

    def prepare(self, model: PreTrainedModel, load: Load) -> InferenceEngine:
        """Return DeepSpeed's wrapper of the model, with its kernels where they are right."""
        if load.device == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"  # also where there is a GPU
            self.injection = "left out: it needs CUDA"
            return _wrapped(model, load, inject=False)
        expected = _trial(model)
        try:
            injected = _wrapped(model, load, inject=True)
            if _trial(injected.module) == expected:
                self.injection = "used"
                return injected
            reason = "with it the tokens are not transformers'"
        except Exception as error:  # whatever DeepSpeed meets in a model that it does not know
            reason = first_line(error)
        self.injection = f"left out: {reason}"
        model.to("meta")  # its memory is free before the next one is loaded, whoever holds it still
        return _wrapped(checkpoints.load(load.folder, load.device).model, load, inject=False)

    def details(self) -> dict:
        """Return what transformers runs, and whether DeepSpeed's kernels are in it, or why not."""
        return {**super().details(), "kernel_injection": self.injection}


def _wrapped(model: PreTrainedModel, load: Load, inject: bool) -> InferenceEngine:
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed.init_inference(
        model, dtype=model.dtype, replace_with_kernel_inject=inject, max_out_tokens=load.max_tokens
    )


def _trial(model: PreTrainedModel) -> list[int]:
    """Return what the model makes of a short prompt, greedily."""
    import torch

    prompt = torch.arange(TRIAL_TOKENS, device=model.device)[None] % model.config.vocab_size
    with torch.inference_mode():
        options = {"min_new_tokens": TRIAL_TOKENS, "max_new_tokens": TRIAL_TOKENS, "do_sample": False}
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0].tolist()
