"""The engine tensorrt-llm, against a stand-in that takes exactly its arguments: what is asked of it, and when."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from engine_stand_ins import OUTPUT, PROMPTS, answer, generate, install, load
from espalier.engines import tensorrt_llm
from espalier.worker import Unavailable

pytestmark = pytest.mark.usefixtures("kept_environment")


@dataclass(kw_only=True)
class TensorrtSampling:
    max_tokens: int
    end_id: int
    ignore_eos: bool
    detokenize: bool
    seed: int
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


class TensorrtRow:
    def __init__(self, tokens: list[int], streaming: bool, log: list):
        self.tokens, self.streaming, self.log = tokens, streaming, log

    def __next__(self):
        assert self.streaming
        self.log.append("next")
        return self

    def result(self):
        self.log.append("result")
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=self.tokens)])


@pytest.fixture
def fake_tensorrt(monkeypatch):
    """Install a stand-in for TensorRT-LLM; returns its arguments, its samplings and its log."""
    said = SimpleNamespace(options=None, error=None, samplings=[], streaming=[], log=[])

    class LLM:
        def __init__(
            self, *, model, dtype, trust_remote_code, skip_tokenizer_init, max_batch_size, max_num_tokens,
            max_seq_len, kv_cache_config,
        ):  # fmt: skip
            said.options = {k: v for k, v in locals().items() if k != "self"}
            if said.error:
                raise said.error

        def generate_async(self, inputs, *, sampling_params, streaming):
            said.samplings.append(sampling_params)
            said.streaming.append(streaming)
            return TensorrtRow(answer(inputs, sampling_params.max_tokens), streaming, said.log)

        def shutdown(self):
            said.log.append("shutdown")

    @dataclass(kw_only=True)
    class KvCacheConfig:
        enable_block_reuse: bool
        max_tokens: int

    install(
        monkeypatch,
        tensorrt_llm={"LLM": LLM, "SamplingParams": TensorrtSampling},
        tensorrt_llm__llmapi={"KvCacheConfig": KvCacheConfig},
    )
    return said


def test_tensorrt_makes_exactly_the_tokens_and_tells_of_the_last_rows_first_one(fake_tensorrt, llama):
    engine = tensorrt_llm.Engine()
    engine.load(load(llama, "cuda", seed=7))
    options = fake_tensorrt.options
    assert (options["model"], options["dtype"], options["max_batch_size"]) == (str(llama), "float32", 4)
    assert (options["max_seq_len"], options["skip_tokenizer_init"]) == (40, True)
    # 40 tokens are two blocks of 32, for each of four sequences
    assert vars(options["kv_cache_config"]) == {"enable_block_reuse": False, "max_tokens": 4 * 64}
    log = fake_tensorrt.log
    assert generate(engine, log) == [answer(prompt, OUTPUT) for prompt in PROMPTS]
    assert log == ["next", "first token", *["result"] * 4]
    assert fake_tensorrt.streaming == [False, False, False, True]
    greedy = {"max_tokens": OUTPUT, "end_id": -1, "ignore_eos": True, "detokenize": False, "seed": 7, "top_k": 1}
    assert vars(fake_tensorrt.samplings[0]) == {**greedy, "temperature": None, "top_p": None}
    generate(engine, log, sampling="top-k-top-p")
    assert vars(fake_tensorrt.samplings[-1]) == {**greedy, "temperature": 1.0, "top_k": 50, "top_p": 0.95}
    engine.close()
    assert log[-1] == "shutdown"


def test_tensorrt_tells_of_no_first_token_where_the_prompts_take_several_steps(fake_tensorrt, llama, monkeypatch):
    monkeypatch.setattr(tensorrt_llm, "PREFILL", 11)
    engine, log = tensorrt_llm.Engine(), []
    engine.load(load(llama, "cuda", max_tokens=11))
    assert fake_tensorrt.options["max_num_tokens"] == 11
    generate(engine, log, PROMPTS)  # 12 tokens
    assert log == []
    generate(engine, log, PROMPTS[:3])
    assert log == ["first token"]


def test_what_tensorrt_refuses_is_unavailable(fake_tensorrt, llama):
    fake_tensorrt.error = ValueError("Unknown architecture for AutoModelForCausalLM: X.\nmore")
    with pytest.raises(Unavailable, match=r"refuses the model: Unknown architecture for AutoModelForCausalLM: X$"):
        tensorrt_llm.Engine().load(load(llama, "cuda"))
