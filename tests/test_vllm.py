"""The engine vllm, against a stand-in that takes exactly its arguments: what is asked of it, and when.

The real one runs in tests/real_engines.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace

import pytest

from engine_stand_ins import OUTPUT, PROMPTS, answer, generate, install, load
from espalier.engines import vllm
from espalier.worker import Unavailable

pytestmark = pytest.mark.usefixtures("kept_environment")


class Kind(Enum):
    CUMULATIVE = 0
    FINAL_ONLY = 2


@dataclass(kw_only=True)
class VllmSampling:
    max_tokens: int
    ignore_eos: bool
    detokenize: bool
    output_kind: Kind
    temperature: float
    top_k: int = 0
    top_p: float = 1.0


class VllmEngine:
    """Reads one prompt a step, in order, and makes a token a step of those that are read."""

    def __init__(self, blocks: int):
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(architecture="LlamaForCausalLM"),
            compilation_config=SimpleNamespace(mode=SimpleNamespace(name="NONE"), backend=""),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=16),
            cache_config=SimpleNamespace(block_size=8, num_gpu_blocks=blocks),
        )
        self.requests, self.read, self.log, self.fails = {}, {}, [], False
        self.engine_core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=self))

    @property
    def running(self) -> list:
        return [SimpleNamespace(num_output_tokens=count) for count in self.read.values()]

    def add_request(self, request_id: str, prompt: dict, params: VllmSampling) -> None:
        assert params.ignore_eos
        assert not params.detokenize
        assert request_id not in self.requests
        self.requests[request_id] = (prompt, params)

    def abort_request(self, request_ids: list[str]) -> None:
        for name in request_ids:
            self.requests.pop(name, None)

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def step(self) -> list:
        if self.fails:
            raise RuntimeError("DefaultCPUAllocator: not enough memory")
        waiting = [name for name in self.requests if name not in self.read]
        self.read |= dict.fromkeys(waiting[:1], 0)
        outputs = []
        for name in self.read:
            self.read[name] += 1
            prompt, params = self.requests[name]
            done = self.read[name] == params.max_tokens
            if done or params.output_kind is Kind.CUMULATIVE:
                tokens = answer(prompt["tokens"], self.read[name])
                outputs.append(SimpleNamespace(request_id=name, outputs=[SimpleNamespace(token_ids=tokens)]))
            if done:
                del self.requests[name]
        self.read = {name: count for name, count in self.read.items() if name in self.requests}
        self.log.append(f"step, {len(waiting)} waiting")
        return outputs


@pytest.fixture
def fake_vllm(monkeypatch):
    """Install a stand-in for vLLM; returns where it keeps its arguments, what it raises, and its number of blocks."""
    said = SimpleNamespace(blocks=9, error=None, options=None)

    class LLM:
        def __init__(
            self, model, *, dtype, seed, trust_remote_code, skip_tokenizer_init, generation_config, max_model_len,
            max_num_seqs, kv_cache_memory_bytes, enable_prefix_caching, disable_log_stats, use_tqdm_on_load,
        ):  # fmt: skip
            said.options = {k: v for k, v in locals().items() if k != "self"}
            if said.error:
                raise said.error
            for create, shape in ((ops.create_onednn_mm, 10), (ops.create_onednn_scaled_mm, 3)):
                create(SimpleNamespace(nbytes=shape), 32)
            self.llm_engine = VllmEngine(said.blocks)

    ops = SimpleNamespace(create_onednn_mm=lambda weight, size: None, create_onednn_scaled_mm=lambda weight, size: None)
    install(
        monkeypatch,
        vllm={"LLM": LLM, "SamplingParams": VllmSampling, "_custom_ops": ops},
        vllm__inputs={"tokens_input": lambda tokens: {"tokens": tokens}},
        vllm__sampling_params={"RequestOutputKind": Kind},
        psutil={"virtual_memory": lambda: SimpleNamespace(available=64 << 30)},
    )
    return said


def vllm_of(folder, **changes):
    engine = vllm.Engine()
    engine.load(load(folder, **changes))
    return engine, engine.llm.llm_engine.log


def test_vllm_makes_exactly_the_tokens_and_tells_of_the_last_rows_first_one(fake_vllm, llama):
    engine, log = vllm_of(llama)
    log.clear()
    assert generate(engine, log) == [answer(prompt, OUTPUT) for prompt in PROMPTS]
    # One prompt is read a step: the last of four is read in the fourth, and that step makes its first token.
    assert log.index("first token") == 4
    assert log.count("first token") == 1
    log.clear()
    assert generate(engine, log, PROMPTS[:1], 1, "top-k-top-p") == [answer(PROMPTS[0], 1)]
    assert log == ["step, 1 waiting", "first token"]


@pytest.mark.parametrize(("tokens", "expected"), [(5, 4 + 3 + 2 + 1), (2, 2 + 2 + 2 + 1), (1, 4)])
def test_vllm_tells_how_many_tokens_are_known_by_then(fake_vllm, llama, tokens, expected):
    known = []
    vllm_of(llama)[0].generate(PROMPTS, tokens, "greedy", known.append)
    assert known == [expected]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [("greedy", (0.0, 0, 1.0)), ("top-k-top-p", (1.0, 50, 0.95))],
)
def test_vllm_samples_as_asked_and_only_the_last_row_reports_each_step(fake_vllm, llama, sampling, expected):
    engine, log = vllm_of(llama)
    core = engine.llm.llm_engine
    seen = []
    add = core.add_request
    core.add_request = lambda name, prompt, params: (seen.append(params), add(name, prompt, params))
    generate(engine, log, sampling=sampling)
    assert [params.output_kind for params in seen] == [Kind.FINAL_ONLY] * 3 + [Kind.CUMULATIVE]
    assert {(params.temperature, params.top_k, params.top_p) for params in seen} == {expected}


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        # 2 (keys, values) × 2 blocks × 4 heads × 32 channels × 4 bytes × 128 tokens, for 4 sequences and one of vLLM's
        (64 << 30, 5 * 2 * 2 * 4 * 32 * 4 * 128),
        (2_000_000, "share"),
    ],
)
def test_vllm_gets_a_cache_for_the_largest_batch_or_what_memory_holds(fake_vllm, llama, monkeypatch, free, expected):
    monkeypatch.setattr(sys.modules["psutil"], "virtual_memory", lambda: SimpleNamespace(available=free))
    vllm_of(llama)
    weights = sum(file.stat().st_size for file in llama.glob("*.safetensors"))
    expected = int(0.85 * (free - weights)) if expected == "share" else expected
    options = fake_vllm.options
    assert options["kv_cache_memory_bytes"] == expected
    assert (options["dtype"], options["max_model_len"], options["max_num_seqs"]) == ("float32", 40, 4)
    assert options["skip_tokenizer_init"]
    assert not options["enable_prefix_caching"]


def test_vllm_is_never_asked_for_more_tokens_than_the_model_has_positions(fake_vllm, llama):
    engine, _ = vllm_of(llama, max_tokens=1000)
    assert fake_vllm.options["max_model_len"] == engine.context == 128


def test_a_batch_that_vllms_cache_does_not_hold_whole_is_out_of_memory(fake_vllm, llama):
    fake_vllm.blocks = 4  # one is vLLM's own; a sequence of 8 tokens takes one of 8
    engine, log = vllm_of(llama)
    assert len(generate(engine, log, PROMPTS[:3])) == 3
    with pytest.raises(MemoryError, match="4 sequences of 8 tokens need 4 blocks of cache, and memory holds 3"):
        generate(engine, log)


def test_a_step_that_fails_leaves_no_request_behind(fake_vllm, llama):
    engine, log = vllm_of(llama)
    engine.llm.llm_engine.fails = True
    with pytest.raises(RuntimeError):
        generate(engine, log)
    engine.llm.llm_engine.fails = False
    assert generate(engine, log) == [answer(prompt, OUTPUT) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (RuntimeError("Unsupported head_dim=16"), Unavailable, "vLLM refuses the model in float32: Unsupported head_d"),
        (ValueError("1 error\n  Value error, no such kind. [type=x, y"), Unavailable, "float32: no such kind$"),
        (ValueError("Available memory on node 0 is less"), MemoryError, "Available memory"),
        (TypeError("unexpected argument"), TypeError, "unexpected"),  # a mistake of ours stays one
    ],
)
def test_what_vllm_refuses_is_unavailable_in_its_words(fake_vllm, llama, error, kind, text):
    fake_vllm.error = error
    with pytest.raises(kind, match=text):
        vllm_of(llama)


def test_vllm_counts_the_weights_that_onednn_keeps(fake_vllm, llama):
    engine, _ = vllm_of(llama)
    assert engine.details()["unseen_bytes"] == 13
    assert engine.details()["cache_blocks"] == 9
