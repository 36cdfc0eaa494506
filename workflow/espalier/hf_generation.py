"""What engines built on transformers' `model.generate` share: loading, a forced length, and the first token's moment.

Such an engine's file holds `probe`, `PACKAGES` and `SAMPLINGS` of this module and a class `Engine` derived from
`HFGeneration`, which says by `prepare` and `options` what is its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from espalier import checkpoints
from espalier.worker import Unavailable, require_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from espalier.worker import Load

PACKAGES = ("torch", "transformers")
probe = require_device
OPTIONS = {  # by sampling
    "greedy": {"do_sample": False},
    # Shortened LLaMA's own settings (Kim et al. 2024, 2402.02834).
    "top-k-top-p": {"do_sample": True, "top_k": 50, "top_p": 0.95},
}
SAMPLINGS = tuple(OPTIONS)


def refuse_window(model: PreTrainedModel, load: Load) -> None:
    """Raise Unavailable if the model's attention has a window that the longest sequence does not fit into."""
    window = getattr(model.config, "sliding_window", None)
    if window is not None and window < min(load.max_tokens, model.config.max_position_embeddings):
        raise Unavailable(f"this engine's cache has no window, and the model's attention sees {window} tokens alone")


class HFGeneration:
    """An engine around `model.generate`. Raises Unavailable from `load` for a model that it cannot run."""

    name: str
    keeps_cache = False

    def load(self, load: Load) -> None:
        """Load the checkpoint and take away its model's own generation settings."""
        from transformers import GenerationConfig

        checkpoint = checkpoints.load(load.folder, load.device)
        self.device, self.info = load.device, checkpoint.info
        self.model = self.prepare(checkpoint.model, load)
        # A model's end tokens and penalties would change how much is computed; without an end token nothing ends early.
        self.model.generation_config = GenerationConfig(pad_token_id=checkpoint.tokenizer.pad_token_id or 0)
        self.context = self.model.config.max_position_embeddings

    def prepare(self, model: PreTrainedModel, load: Load) -> PreTrainedModel:
        """Return the model that generates; raises Unavailable for one that this engine cannot run."""
        return model

    def options(self, batch: int, tokens: int) -> dict:
        """Return what `model.generate` gets beyond lengths and sampling, for a batch and prompt + output tokens."""
        return {}

    def generate(
        self, token_ids: list[list[int]], output_tokens: int, sampling: str, first_token: Callable[[], None]
    ) -> list[list[int]]:
        """Return exactly `output_tokens` new tokens a prompt; the prompts are equally long.

        `first_token` is called once, when the first new token of every row is known.
        """
        import torch

        prompts = torch.tensor(token_ids, device=self.device)
        with torch.inference_mode():
            tokens = self.model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=output_tokens,
                stopping_criteria=[FirstToken(first_token, self.device)],
                **OPTIONS[sampling],
                **self.options(len(token_ids), len(token_ids[0]) + output_tokens),
            )
        return tokens[:, prompts.shape[1] :].tolist()  # the copy to the host also waits for the device

    def details(self) -> dict:
        """Return which attention the model runs, by transformers' name, and the kind of cache."""
        return {"attention": self.model.config._attn_implementation, "cache": "dynamic"}

    def close(self) -> None:
        """Let go of the model."""
        del self.model


class FirstToken:
    """A stopping criterion that stops nothing: asked after each token, it reports the first one.

    It costs each further step one operation on as many bytes as there are rows. A streamer would copy every step's
    tokens to the host.
    """

    def __init__(self, report: Callable[[], None], device: str):
        self.report, self.device, self.waiting = report, device, True

    def __call__(self, *_: object, **__: object) -> bool:
        if self.waiting:
            self.waiting = False
            if self.device == "cuda":
                import torch

                torch.cuda.synchronize()
            self.report()
        return False
