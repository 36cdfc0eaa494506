"""Whether greedy tokens in bfloat16 are those of float32, but for ties that rounding decides."""

from __future__ import annotations

from pathlib import Path

import torch

from espalier import checkpoints


def differs_only_at_near_ties(folder: Path, prompts: list[list[int]], generated: list[list[int]]) -> None:
    """Assert that each token generated is the most likely one, as far as arithmetic in bfloat16 can tell.

    The same prefixes, prompt and tokens generated so far, are given to transformers' model in float32 and in bfloat16.
    The most by which the two sets of logits differ at a position, e, is what rounding does there: a token may be chosen
    wrongly if the best one is at most 2·e above it. Another order of the same sums has other errors of the same size,
    which twice as much allows for. So two right engines differ first where both of their tokens pass.
    """
    ids = torch.tensor([[*prompt, *row] for prompt, row in zip(prompts, generated, strict=True)])
    exact, rounded = (logits_of(folder, ids, len(prompts[0]), dtype) for dtype in (torch.float32, torch.bfloat16))
    chosen = exact.gather(-1, torch.tensor(generated)[..., None])[..., 0]
    short, allowed = exact.amax(-1) - chosen, 4 * (rounded - exact).abs().amax(-1)
    wrong = [(row, at, short[row, at].item(), allowed[row, at].item()) for row, at in (short > allowed).nonzero()]
    assert not wrong, f"(row, token, how far its logit is below the best, what rounding explains): {wrong}"


def logits_of(folder: Path, ids: torch.Tensor, prompt: int, dtype: torch.dtype) -> torch.Tensor:
    """Return rows × generated tokens × vocabulary, float32: what each token behind the prompt was chosen by."""
    model = checkpoints.load(folder, device="cpu", dtype=dtype).model
    with torch.no_grad():
        return model(ids, use_cache=False).logits[:, prompt - 1 : -1].float()
