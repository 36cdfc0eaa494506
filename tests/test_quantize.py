"""Packed weights against dequantizations written out naively, and the checkpoints around them."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from espalier import checkpoints, gptq_loading, plugins, recipes
from espalier.errors import UserError
from tiny import calibration, llama

LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return calibration(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="module")
def made(dense, samples, tmp_path_factory):
    """Return a function that quantizes the dense model, each recipe once."""
    root, done = tmp_path_factory.mktemp("quantized"), {}

    def make(method: str, **mapping):
        key = json.dumps([method, mapping])
        if key not in done:
            folder = root / str(len(done))
            folder.mkdir()
            done[key] = folder, quantize(dense, folder, method, samples, **mapping)
        return done[key]

    return make


def quantize(parent, folder, method, samples, **mapping):
    module = plugins.load("quantize", method)
    if method == "gptq":
        mapping = {"group_size": 32, "calibration": samples, **mapping}
    return module.apply(parent, folder, recipes.build(module.Recipe, mapping, "recipe"), seed=0, device="cpu")


def weights(folder):
    return load_file(folder / "model.safetensors")


def unpack(words: list[int], bits: int, count: int) -> list[int]:
    """Return `count` numbers of `bits` bits from 32-bit words, lowest bits first."""
    stream = sum((word % 2**32) << (32 * place) for place, word in enumerate(words))
    return [(stream >> (bits * i)) % 2**bits for i in range(count)]


def naive_gptq(found: dict, name: str, bits: int) -> torch.Tensor:
    """Return the dense weight [in, out] of a layer: scale of the channel's group · (code − zero point)."""
    scales, groups = found[f"{name}.scales"].double(), found[f"{name}.g_idx"].tolist()
    codes = [unpack(column, bits, len(groups)) for column in found[f"{name}.qweight"].T.tolist()]
    # The format stores zero points less one.
    zeros = [[zero + 1 for zero in unpack(row, bits, len(codes))] for row in found[f"{name}.qzeros"].tolist()]
    codes, zeros = torch.tensor(codes, dtype=torch.double).T, torch.tensor(zeros, dtype=torch.double)
    return scales[groups] * (codes - zeros[groups])


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 32), (4, 32), (8, 32), (4, -1)])
def test_gptq_layers_multiply_by_what_is_in_the_file(made, bits, group):
    folder, _ = made("gptq", bits=bits, **({} if group == 32 else {"group_size": group}))
    found, model = weights(folder), checkpoints.load(folder, device="cpu").model
    for layer in LAYERS:
        name = f"model.layers.1.{layer}"
        weight = naive_gptq(found, name, bits)
        rows = torch.randn(5, weight.shape[0])
        product = model.get_submodule(name)(rows)
        assert product.dtype == torch.float32
        assert torch.allclose(product.double(), rows.double() @ weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("bits", "error"), [(2, 0.75), (3, 0.4), (4, 0.2), (8, 0.015)])
def test_gptq_weights_resemble_the_dense_ones_more_with_more_bits(dense, made, bits, error):
    found, before = weights(made("gptq", bits=bits)[0]), weights(dense)
    for layer in LAYERS:
        name = f"model.layers.0.{layer}"
        true = before[f"{name}.weight"].T.double()
        relative = (naive_gptq(found, name, bits) - true).norm() / true.norm()
        assert error / 20 < relative < error


def test_gptq_loses_less_on_its_samples_than_rounding(dense, made, samples):
    found, name = weights(made("gptq", bits=3)[0]), "model.layers.0.self_attn.q_proj"
    checkpoint = checkpoints.load(dense, device="cpu")
    module = plugins.load("quantize", "gptq")
    ids = recipes.build(module.Recipe, {"bits": 3, "calibration": samples}, "").calibration.token_ids(
        checkpoint.tokenizer
    )
    seen = []
    layer = checkpoint.model.get_submodule(name)
    layer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].flatten(0, 1).double()))
    with torch.no_grad():
        checkpoint.model(torch.tensor(ids))
    true = layer.weight.detach().T.double()
    groups = true.reshape(-1, 32, true.shape[1])
    scale = 2 * groups.abs().amax(1, keepdim=True) / 7  # symmetric 3 bits: codes −4 … 3
    rounded = ((groups / scale).round().clamp(-4, 3) * scale).reshape(true.shape)
    lost = {
        kind: (seen[0] @ (one - true)).norm() for kind, one in (("gptq", naive_gptq(found, name, 3)), ("rtn", rounded))
    }
    assert lost["gptq"] < 0.8 * lost["rtn"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_file_holds_as_many_bits_as_it_says(dense, made, bits):
    folder, report = made("gptq", bits=bits)
    packed = sum(one.numel() * 4 for name, one in weights(folder).items() if name.endswith("qweight"))
    blocks = sum(one.numel() for name, one in weights(dense).items() if name.endswith("proj.weight"))
    assert packed == blocks * bits / 8
    assert report["bytes"] == {"before": checkpoints.weight_bytes(dense), "after": checkpoints.weight_bytes(folder)}
    assert report["bytes"]["after"] < 0.65 * report["bytes"]["before"]
    described = checkpoints.describe(folder)
    assert (described["format"], described["bits"], described["dtype"]) == ("gptqmodel", bits, "float32")
    assert described["parameters"] == checkpoints.describe(dense)["parameters"]


def test_gptq_gives_the_same_logits_in_a_fresh_process(made, tmp_path):
    folder, _ = made("gptq", bits=4)
    script = (
        "import sys, torch; from espalier import checkpoints\n"
        "model = checkpoints.load(sys.argv[1], device='cpu').model\n"
        "with torch.no_grad(): torch.save(model(torch.arange(40)[None]).logits, sys.argv[2])\n"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(folder), str(tmp_path / "logits")], check=True, capture_output=True
    )
    with torch.no_grad():
        here = checkpoints.load(folder, device="cpu").model(torch.arange(40)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits"), here)


def test_gptq_reads_a_reference_like_the_model_it_points_to(dense, made, samples, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    reference, output = tmp_path / "reference", tmp_path / "output"
    reference.mkdir()
    output.mkdir()
    keys = dict.fromkeys(("id", "revision", "dtype"))
    checkpoints.refer(reference, {**keys, "path": str(dense), "task": "causal-lm", "trust_remote_code": False})
    quantize(reference, output, "gptq", samples, bits=4)
    direct, found = weights(made("gptq", bits=4)[0]), weights(output)
    assert all(torch.equal(found[name], one) for name, one in direct.items())
    assert "path" not in checkpoints.describe(output)
    # Nothing is left in the working directory, and no banner in the log.
    assert {entry.name for entry in tmp_path.iterdir()} == {"reference", "output"}
    assert capfd.readouterr().out == ""


def test_gptq_refuses_groups_that_do_not_divide_a_layer(dense, samples, tmp_path):
    with pytest.raises(UserError, match=r"down_proj .* maps 64 to 128 .* multiples of 128 .*group_size"):
        quantize(dense, tmp_path, "gptq", samples, bits=4, group_size=128)


def test_rows_that_blocks_of_four_bits_do_not_fill_are_refused_on_a_cpu(tmp_path):
    parent = llama(tmp_path / "parent", mlp=96)
    with pytest.raises(UserError, match=r"down_proj .* has 96 input features; 4 bits need a multiple of 64 .*round_to"):
        quantize(parent, tmp_path, "bitsandbytes", None, bits=4)


def test_a_kernel_of_the_gpu_is_refused_on_a_cpu_before_anything_is_loaded(dense, samples, tmp_path, monkeypatch):
    from espalier import jobs

    recipe = {"quantize": "gptq", "bits": 4, "group_size": 32, "calibration": samples, "kernel": "marlin"}
    about = {"model_name": "m", "chain": "dense+q", "name": "q", "device": "cpu", "parent": dense, "recipe": recipe}
    monkeypatch.setattr(checkpoints, "describe", None)
    with pytest.raises(UserError, match="kernel 'marlin' needs 'device: cuda', and the device is cpu"):
        jobs.step("quantize", argparse.Namespace(**about), None)


def test_a_checkpoint_for_a_kernel_of_the_gpu_is_not_run_by_another_one(made, tmp_path):
    folder, _ = made("gptq", bits=4)
    copy = shutil.copytree(folder, tmp_path / "copy")
    checkpoints.write_description(copy, {**checkpoints.describe(copy), "kernel": "marlin"})
    with pytest.raises(UserError, match="copy is to run by the kernel 'marlin', which needs cuda, not cpu"):
        checkpoints.load(copy, device="cpu")


def test_the_fast_kernel_of_the_cpu_computes_the_same_in_bfloat16(dense, samples, made, tmp_path):
    quantize(dense, tmp_path, "gptq", samples, bits=4, kernel="torch-aten")
    plain, fast = (checkpoints.load(folder, device="cpu").model for folder in (made("gptq", bits=4)[0], tmp_path))
    assert type(fast.model.layers[0].mlp.up_proj).__name__ == "TorchAtenLinear"
    assert fast.dtype == torch.bfloat16
    with torch.no_grad():
        expected, found = plain(torch.arange(40)[None]).logits, fast(torch.arange(40)[None]).logits
    assert (found - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes"])
def test_quantized_parent_is_refused(made, samples, tmp_path, method):
    with pytest.raises(UserError, match="quantized already"):
        quantize(made("bitsandbytes", bits=4)[0], tmp_path, method, samples, bits=4)


def test_gptqmodel_gets_two_workers_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.delenv("GPTQMODEL_CPU_WORKERS", raising=False)
    gptq_loading.prepare("cpu")
    assert os.environ["GPTQMODEL_CPU_WORKERS"] == "2"
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "5")
    gptq_loading.prepare("cpu")
    assert os.environ["GPTQMODEL_CPU_WORKERS"] == "5"


def naive_nf4(weight: torch.Tensor) -> torch.Tensor:
    """Return the round trip: blocks of 64 scaled by their largest magnitude, each value the nearest code."""
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    codes = torch.tensor(NF4)
    return (codes[((blocks / scale)[..., None] - codes).abs().argmin(-1)] * scale).reshape(weight.shape)


def test_nf4_is_the_nearest_of_sixteen_codes_in_blocks_of_64(dense, made):
    import bitsandbytes

    model, before = checkpoints.load(made("bitsandbytes", bits=4)[0], device="cpu").model, weights(dense)
    for layer in LAYERS:
        name = f"model.layers.1.{layer}"
        weight = model.get_submodule(name).weight
        round_trip = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.allclose(round_trip.float(), naive_nf4(before[f"{name}.weight"]), atol=1e-6)


def test_nf4_model_computes_with_these_weights(dense, made):
    packed = checkpoints.load(made("bitsandbytes", bits=4)[0], device="cpu").model
    plain = checkpoints.load(dense, device="cpu").model
    for name, layer in plain.named_modules():
        if name.endswith("proj"):
            layer.weight.data = naive_nf4(layer.weight.data)
    with torch.no_grad():
        expected, logits = plain(torch.arange(40)[None]).logits, packed(torch.arange(40)[None]).logits
    # Some CPUs multiply in bfloat16.
    assert (logits - expected).norm() / expected.norm() < 0.03


@pytest.mark.skipif("avx512_bf16" not in Path("/proc/cpuinfo").read_text(), reason="CPU without AVX512-BF16")
def test_weights_that_a_forward_pass_repacked_are_not_saved(dense, tmp_path):
    """On such CPUs the first forward pass repacks 4-bit weights, and bitsandbytes saves damaged ones afterwards."""
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    loaded = checkpoints.load(dense, "cpu", quantization_config=config, device_map={"": "cpu"}, dtype="float32")
    with torch.no_grad():
        before = loaded.model(torch.arange(40)[None]).logits
    with pytest.raises(ValueError, match=r"q_proj.weight was repacked by a forward pass; save a 4-bit model before"):
        checkpoints.save(loaded.model, loaded.tokenizer, tmp_path / "refused", loaded.info, format="bitsandbytes")
    assert not (tmp_path / "refused").exists()
    # Without the refusal: if this ever passes on to the same logits, bitsandbytes was mended and it can go.
    loaded.model.save_pretrained(tmp_path / "damaged")
    with torch.no_grad():
        after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "damaged")(torch.arange(40)[None]).logits
    assert (after - before).norm() > 0.3 * before.norm()


def test_repacked_weights_are_refused_on_every_machine(dense, tmp_path):
    checkpoint = checkpoints.load(dense, "cpu")
    checkpoint.model.lm_head.weight.quant_state = types.SimpleNamespace(packing_format_for_cpu=True)
    with pytest.raises(ValueError, match=r"lm_head.weight was repacked"):
        checkpoints.save(checkpoint.model, checkpoint.tokenizer, tmp_path / "refused", checkpoint.info)
    assert not (tmp_path / "refused").exists()


def test_a_cpu_without_avx512_is_not_said_to_multiply_integers(made, monkeypatch):
    """bitsandbytes multiplies float32 copies of the codes there."""
    folder, _ = made("bitsandbytes", bits=8)
    for capability, arithmetic in (("AVX512", "integer"), ("AVX2", "unpacked")):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda found=capability: found)
        assert checkpoints.load(folder, "cpu").info["arithmetic"] == arithmetic


def test_kernels_take_what_gptqmodel_says_that_they_take():
    gptq_loading.prepare("cpu")
    from gptqmodel.nn_modules.qlinear import exllamav2, machete, marlin, torch_aten_kernel, tritonv2
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    classes = {
        "torch": TorchLinear,
        "torch-aten": torch_aten_kernel.TorchAtenLinear,
        "triton": tritonv2.TritonV2Linear,
        "exllama-v2": exllamav2.ExllamaV2Linear,
        "marlin": marlin.MarlinLinear,
        "machete": machete.MacheteLinear,
    }
    for name, kernel in gptq_loading.KERNELS.items():
        cls = classes[name]
        assert set(kernel.bits) == set(cls.SUPPORTS_BITS) & {2, 3, 4, 8}
        assert set(kernel.group_sizes) == set(cls.SUPPORTS_GROUP_SIZE)
        assert kernel.asymmetric == (False in cls.SUPPORTS_SYM)


def test_int8_is_each_row_by_its_largest_magnitude(dense, made):
    found, before = weights(made("bitsandbytes", bits=8)[0]), weights(dense)
    for layer in LAYERS:
        name = f"model.layers.1.{layer}.weight"
        halves = before[name].half().float()  # LLM.int8 starts from float16
        largest = halves.abs().amax(1)
        assert torch.equal(found[name.replace("weight", "SCB")], largest)
        codes = halves / largest[:, None] * 127
        assert found[name].dtype == torch.int8
        assert (found[name] - codes).abs().max() < 0.5 + 1e-3


def test_bitsandbytes_files_shrink_and_say_what_they_are(dense, made):
    four, eight = made("bitsandbytes", bits=4)[0], made("bitsandbytes", bits=8)[0]
    sizes = [checkpoints.weight_bytes(folder) for folder in (four, eight, dense)]
    assert sizes[0] < sizes[1] < 0.6 * sizes[2]
    before = weights(dense)
    for name, one in weights(four).items():
        if name.endswith("proj.weight"):
            assert (one.dtype, one.numel()) == (torch.uint8, before[name].numel() / 2)
    described = checkpoints.describe(four)
    assert (described["format"], described["bits"], described["dtype"]) == ("bitsandbytes", 4, "float32")


def test_double_quantization_stores_the_scales_in_a_quarter(made):
    once, twice = (made("bitsandbytes", bits=4, double_quantization=double)[0] for double in (False, True))
    sizes = [
        sum(one.nbytes for name, one in weights(folder).items() if name.endswith("weight.absmax"))
        for folder in (once, twice)
    ]
    assert sizes[0] == 4 * sizes[1] > 0
