"""Hugging Face transformers: `model.generate` with its dynamic key-value cache, in this process.

An engine is a class `Engine` with a `name`, built from the device. It loads a checkpoint once, turns a rectangle of
token ids into exactly as many new tokens as asked for, and says what memory that takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from espalier import memory

if TYPE_CHECKING:
    from espalier.checkpoints import Checkpoint

Sampling = Literal["greedy", "top-k-top-p"]
SAMPLINGS = {
    "greedy": {"do_sample": False},
    # Shortened LLaMA's own settings (Kim et al. 2024, 2402.02834).
    "top-k-top-p": {"do_sample": True, "top_k": 50, "top_p": 0.95},
}


class Engine:
    """The reference engine: whatever transformers does for this model by default."""

    name = "hf"

    def __init__(self, device: str):
        self.device = device
        self.model = None
        self.held = None

    def load(self, checkpoint: Checkpoint) -> None:
        """Take the checkpoint's model, and take away its own generation settings."""
        from transformers import GenerationConfig

        self.model = checkpoint.model.eval()
        # A model's end tokens and penalties would change how much is computed; without an end token nothing ends early.
        self.model.generation_config = GenerationConfig(pad_token_id=checkpoint.tokenizer.pad_token_id or 0)

    def generate(
        self, token_ids: list[list[int]], output_tokens: int, sampling: Sampling = "greedy"
    ) -> list[list[int]]:
        """Return exactly `output_tokens` new tokens a prompt; the prompts are equally long."""
        import torch

        prompts = torch.tensor(token_ids, device=self.device)
        with torch.inference_mode():
            tokens = self.model.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=output_tokens, **SAMPLINGS[sampling]
            )
        return tokens[:, prompts.shape[1] :].tolist()  # the copy to the host also waits for the device

    def allocated_bytes(self) -> int:
        """Return the bytes that are held now."""
        return memory.allocated_bytes(self.device)

    def peaks(self, token_ids: list[list[int]], output_tokens: int, sampling: Sampling) -> dict[str, int]:
        """Return the peak bytes while generating, by `memory.kinds`; on a CPU this run is slower than others."""
        if self.held is None:  # the cache of one call is freed at its end, so this stays as it is
            self.held = self.allocated_bytes()
        return memory.peaks(lambda: self.generate(token_ids, output_tokens, sampling), self.device, self.held)
