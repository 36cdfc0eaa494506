"""TensorRT-LLM by its LLM API, on CUDA. Not verified on hardware.

The calls are checked against a stand-in with strict signatures (tests/test_external_engines.py). That proves their
shape and nothing else: no number of this engine belongs into a result before it has run on a GPU. Batches are formed in
flight, and requests begin in the order in which they came.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from espalier import checkpoints, provenance
from espalier.errors import first_line
from espalier.files import read_json
from espalier.models.anatomy import PRUNED
from espalier.worker import Unavailable, require_device

if TYPE_CHECKING:
    from espalier.worker import Load

ENVIRONMENTS = {"cuda": "tensorrt-llm"}
PACKAGES = ("tensorrt-llm", "torch", "transformers")
OPTIONS = {"greedy": {"top_k": 1}, "top-k-top-p": {"temperature": 1.0, "top_k": 50, "top_p": 0.95}}
SAMPLINGS = tuple(OPTIONS)
BLOCK = 32  # tokens of a cache block
PREFILL = 8192  # tokens that one step reads, its default; at least a whole prompt


def probe(device: str) -> None:
    """Raise Unavailable on a CPU, without the package, or if torch sees no GPU."""
    if device != "cuda":
        raise Unavailable("TensorRT-LLM runs on NVIDIA GPUs alone")
    if provenance.version("tensorrt-llm") is None:
        raise Unavailable("the package tensorrt-llm is not installed in this environment")
    require_device(device)


class Engine:
    """TensorRT-LLM's PyTorch backend, in this process."""

    name = "tensorrt-llm"
    keeps_cache = False  # the cache is as large as it will be once the model is loaded

    def load(self, load: Load) -> None:
        """Load the checkpoint in its own dtype. Raises Unavailable for a model or format that TensorRT-LLM refuses."""
        source = checkpoints.weights_folder(load.folder)
        config = read_json(source / "config.json")
        if config["model_type"].startswith(PRUNED):
            raise Unavailable("TensorRT-LLM's models have one width in all blocks, and this one's differ")
        os.environ["TLLM_WORKER_USE_SINGLE_PROCESS"] = "1"  # else the model runs, and takes memory, in another process
        from tensorrt_llm import LLM
        from tensorrt_llm.llmapi import KvCacheConfig

        self.seed = load.seed
        self.context = config["max_position_embeddings"]
        self.cache_tokens = load.max_batch * BLOCK * -(-load.max_tokens // BLOCK)
        self.prefill_budget = max(PREFILL, load.max_tokens)
        try:
            self.llm = LLM(
                model=str(source),
                dtype=checkpoints.weights_dtype(load.folder),
                trust_remote_code=checkpoints.describe(load.folder).get("trust_remote_code", False),
                skip_tokenizer_init=True,
                max_batch_size=load.max_batch,
                max_num_tokens=self.prefill_budget,
                max_seq_len=min(load.max_tokens, self.context),
                # The prompts of a batch are equal: with reuse all but one would not be read.
                kv_cache_config=KvCacheConfig(enable_block_reuse=False, max_tokens=self.cache_tokens),
            )
        except (ValueError, NotImplementedError) as error:
            raise Unavailable(f"TensorRT-LLM refuses the model: {first_line(error)}") from error

    def generate(
        self, token_ids: list[list[int]], output_tokens: int, sampling: str, first_token: Callable[[], None]
    ) -> list[list[int]]:
        """Return exactly `output_tokens` new tokens a prompt; the prompts are equally long.

        `first_token` is called once, when the first new token of every row is known; and not where the prompts do not
        fit into one step, because rows that were read early have then decoded more, and how many cannot be seen.
        """
        from tensorrt_llm import SamplingParams

        options = SamplingParams(
            max_tokens=output_tokens, end_id=-1, ignore_eos=True, detokenize=False, seed=self.seed, **OPTIONS[sampling]
        )
        # First come, first served: when the last row has its first token, all have. The others report at the end alone.
        last = len(token_ids) - 1
        rows = [
            self.llm.generate_async(prompt, sampling_params=options, streaming=row == last)
            for row, prompt in enumerate(token_ids)
        ]
        next(rows[last])
        if sum(map(len, token_ids)) <= self.prefill_budget:
            first_token()
        return [list(row.result().outputs[0].token_ids) for row in rows]

    def details(self) -> dict:
        """Return how many tokens the cache was asked to hold, and that nothing of this was verified."""
        return {"verified_on_hardware": False, "cache_tokens": self.cache_tokens, "prefill_budget": self.prefill_budget}

    def close(self) -> None:
        """End TensorRT-LLM's executor."""
        self.llm.shutdown()
