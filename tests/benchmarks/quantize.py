"""Time and memory of quantized models, as ratios to the models of float32 and bfloat16 weights that they come from.

make bench-quantize
python tests/benchmarks/quantize.py --hidden 2048 --rounds 15 --output quantize.jsonl

Models have random weights, because neither time nor memory depends on them. The variants of a library and both bases
share a process of their own, because a library's threads and its use of memory slow what runs beside it. There each
round times every model in turn: a ratio is that of two times of the same round, so that what slows the machine slows
both. Every work is done once untimed right before. Ratios are medians over the rounds, with their quartiles. A prefill
reads a prompt of batch 1 and computes the next token's logits; a decode step reads one token more, after that prompt.
The peak is that of a prefill. Bytes are those that docs/metrics.md defines, of each variant by itself.

At the end stands what must hold for arithmetic in integers to be worth its name; if it does not, the script fails.
"""

from __future__ import annotations

import ctypes
import json
import logging
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espalier import checkpoints, cli, memory, plugins
from espalier.errors import UserError
from espalier.files import whole_file
from espalier.progress import progress
from espalier.recipes import build

BASES = ("float32", "bfloat16")
INTEGERS = {"quantize": "round-to-nearest", "symmetric": True, "activations": 8}
# Label → recipe; each is made of a base of either dtype. "calibration" is filled in.
RECIPES = {
    "W8A8": {**INTEGERS, "bits": 8},
    "W4A8": {**INTEGERS, "bits": 4},
    "W4, unpacked": {"quantize": "round-to-nearest", "bits": 4, "group_size": 128},
    "bitsandbytes 8 bits": {"quantize": "bitsandbytes", "bits": 8},
    "bitsandbytes NF4": {"quantize": "bitsandbytes", "bits": 4},
    "GPTQ 4 bits": {"quantize": "gptq", "bits": 4, "group_size": 128, "calibration": None},
}
# Variant, base, what of the variant must be less.
CLAIMS = [
    *((f"W8A8 {dtype}", base, "prefill") for dtype in BASES for base in BASES),
    *((f"{label} {dtype}", dtype, "peak") for label in ("W8A8", "W4A8") for dtype in BASES),
]
STEPS = 4  # decode steps timed together


@dataclass
class Variant:
    """A model and what it occupies, in bytes."""

    label: str
    model: Any
    on_disk: int
    loaded: int
    after_forward: int
    peak: int


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    by_label: dict[str, dict] = {}  # of the bases those of the first process
    for method in progress(list(dict.fromkeys(recipe["quantize"] for recipe in RECIPES.values())), "libraries"):
        recipes = {label: recipe for label, recipe in RECIPES.items() if recipe["quantize"] == method}
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            for label, one in process.submit(measure, recipes, arguments).result().items():
                by_label.setdefault(label, one)
    lines = list(by_label.values())
    print(table(lines), flush=True)
    if arguments.output:
        with whole_file(arguments.output) as partial:
            partial.write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    false = claims(lines)
    if false and arguments.device == "cpu" and not arguments.quick:  # claimed of CPUs
        raise UserError("These ratios must be below 1: " + "; ".join(false) + ".")


def measure(recipes: dict[str, dict], arguments) -> dict[str, dict]:
    """Return a line for each base and for each variant that the recipes make of them."""
    keep_freed_memory()
    # It says in every product that it casts the inputs.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        variants = make_all(Path(folder), recipes, arguments)
    seconds = times(variants, arguments)
    return {variant.label: line(variant, variants, seconds, arguments) for variant in variants}


def parse(argv: list[str] | None):
    parser = cli.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds, and no failure")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size, a multiple of 128")
    parser.add_argument("--blocks", type=int, default=4, help="transformer blocks")
    parser.add_argument("--tokens", type=int, default=512, help="length of the prompt")
    parser.add_argument("--rounds", type=int, default=9, help="how often each variant is timed, at least 2")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    parser.add_argument("--output", type=Path, help="file to write JSON lines to, one a variant")
    arguments = parser.parse_args(argv)
    arguments.device = checkpoints.pick_device(arguments.device)
    if arguments.quick:
        arguments.hidden, arguments.blocks, arguments.tokens, arguments.rounds = 128, 1, 32, 2
    return arguments


def keep_freed_memory() -> None:
    """Tell glibc, where it is, to keep memory that is freed, for the next use.

    Otherwise it gives some back to the system, and each prefill may have to get it again: that takes up to a fifth of
    the time, and which variant pays depends on what others have left behind.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for parameter, size in ((-1, 2**30), (-3, 2**25)) if mallopt else ():  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
        mallopt(parameter, size)


def make_all(folder: Path, recipes: dict[str, dict], arguments) -> list[Variant]:
    """Make every variant as a study makes it, save and load it, and measure its memory."""
    random_weights = plugins.load("pretrain", "random-weights")
    config = {
        "model_type": "llama",
        "vocab_size": 1024,
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.hidden * 11 // 4 // 128 * 128,
        "num_hidden_layers": arguments.blocks,
        "num_attention_heads": arguments.hidden // 64,
        "max_position_embeddings": arguments.tokens + 2 * STEPS,
    }
    for dtype in BASES:
        recipe = build(random_weights.Recipe, {"config": config, "weights_dtype": dtype}, dtype)
        (folder / dtype).mkdir()
        random_weights.apply(None, folder / dtype, recipe, seed=0, device=arguments.device)
    variants = [measured(dtype, folder / dtype, arguments) for dtype in BASES]
    calibration = write_calibration(folder / "text")
    settings = [(label, dtype) for label in recipes for dtype in BASES]
    for label, dtype in progress(settings, "making variants"):
        name, content = f"{label} {dtype}", dict(recipes[label])
        module = plugins.load("quantize", content.pop("quantize"))
        if "calibration" in content:
            content["calibration"] = calibration
        (folder / name).mkdir()
        module.apply(
            folder / dtype, folder / name, build(module.Recipe, content, label), seed=0, device=arguments.device
        )
        variants.append(measured(name, folder / name, arguments))
    return variants


def write_calibration(folder: Path) -> dict:
    """Write documents, a token a byte; return the calibration set that reads them."""
    folder.mkdir()
    text = json.dumps({"text": "the red fox sees a blue bird " * 4}) + "\n"
    (folder / "calibration.jsonl").write_text(text * 64, encoding="utf-8")
    dataset = {"name": "text", "source": "local", "path": str(folder)}
    return {"text": {"dataset": dataset, "split": "calibration"}, "samples": 16, "length": 64}


def measured(label: str, folder: Path, arguments) -> Variant:
    """Load a checkpoint, and count what it adds to the bytes alive, before and after its first prefill."""
    device = arguments.device
    before = memory.allocated_bytes(device)
    model = checkpoints.load(folder, device=device).model
    loaded = memory.allocated_bytes(device) - before
    prefill(model, prompt(arguments))
    alive = memory.allocated_bytes(device)
    peak = memory.peaks(lambda: prefill(model, prompt(arguments)), device, alive)["allocated"]
    return Variant(label, model, checkpoints.weight_bytes(folder), loaded, alive - before, peak - before)


def prompt(arguments):
    import torch

    return torch.arange(3, 3 + arguments.tokens, device=arguments.device)[None] % 256


def prefill(model, tokens) -> Any:
    """Return the cache of keys and values, after the next token's logits were computed."""
    import torch

    with torch.inference_mode():
        return model(tokens, use_cache=True, logits_to_keep=1).past_key_values


def decode(model, token, cache) -> None:
    """Read the same token `STEPS` times, one after another."""
    import torch

    with torch.inference_mode():
        for _ in range(STEPS):
            model(token, past_key_values=cache, use_cache=True)


def times(variants: list[Variant], arguments) -> dict[str, dict[str, list[float]]]:
    """Return work → label → the seconds of one prefill, or of one decode step, of every round."""
    tokens = prompt(arguments)
    found = {work: {variant.label: [] for variant in variants} for work in ("prefill", "decode")}
    for number in progress(range(-1, arguments.rounds), "timing, rounds"):  # round −1 warms up
        for variant in variants if number % 2 else reversed(variants):
            cache, first = timed(arguments.device, prefill, variant.model, tokens)
            _, steps = timed(arguments.device, decode, variant.model, tokens[:, :1], cache)
            if number >= 0:
                found["prefill"][variant.label].append(first)
                found["decode"][variant.label].append(steps / STEPS)
    return found


def timed(device: str, work: Callable, *about) -> tuple[Any, float]:
    """Return what a work returns, and the seconds that it takes when it is done for a second time."""
    work(*about)
    wait(device)
    started = time.perf_counter()
    result = work(*about)
    wait(device)
    return result, time.perf_counter() - started


def wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def line(variant: Variant, variants: list[Variant], seconds: dict, arguments) -> dict:
    """Return all about one variant: bytes, seconds, and for each base the ratios to it."""
    import torch

    bases = {one.label: one for one in variants if one.label in BASES}
    return {
        "variant": variant.label,
        "hidden": arguments.hidden,
        "blocks": arguments.blocks,
        "tokens": arguments.tokens,
        "bytes": {name: getattr(variant, name) for name in ("on_disk", "loaded", "after_forward", "peak")},
        "seconds": {work: statistics.median(found[variant.label]) for work, found in seconds.items()},
        "all_seconds": {work: found[variant.label] for work, found in seconds.items()},
        "ratios": {
            base: {
                **{work: paired(found[variant.label], found[base]) for work, found in seconds.items()},
                "loaded": variant.loaded / bases[base].loaded,
                "peak": variant.peak / bases[base].peak,
            }
            for base in BASES
        },
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def paired(times: list[float], base: list[float]) -> dict[str, float]:
    """Return the median and the quartiles of the ratios of two lists of times, round by round."""
    ratios = [one / other for one, other in zip(times, base, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"low": low, "median": middle, "high": high}


def claims(lines: list[dict]) -> list[str]:
    """Print every claim, its ratio, and whether it holds; return those that do not."""
    ratios, false = {one["variant"]: one["ratios"] for one in lines}, []
    for label, base, quantity in CLAIMS:
        ratio = ratios[label][base][quantity]
        ratio = ratio["median"] if isinstance(ratio, dict) else ratio
        said = f"{quantity} of {label} / {base}: {ratio:.2f}"
        print(f"{'holds' if ratio < 1 else 'FALSE'}  {said}")
        false += [said] if ratio >= 1 else []
    return false


def table(lines: list[dict]) -> str:
    """Return what was measured as aligned columns; a ratio of times is median [first quartile, third quartile]."""
    first = lines[0]
    head = [f"prefill / {base}" for base in BASES] + [f"step / {base}" for base in BASES]
    rows = [("", "disk", "loaded", "run", "peak MB", "prefill ms", "step ms", *head)]
    for one in lines:
        megabytes = [f"{size / 2**20:.1f}" for size in one["bytes"].values()]
        milliseconds = [f"{1000 * seconds:.1f}" for seconds in one["seconds"].values()]
        ratios = [one["ratios"][base][work] for work in one["seconds"] for base in BASES]
        cells = [f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" for ratio in ratios]
        rows.append((one["variant"], *megabytes, *milliseconds, *cells))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = [
        f"hidden {first['hidden']}, {first['blocks']} blocks, prompt of {first['tokens']} tokens;"
        f" {first['device']}, {first['threads']} threads; MB of 2^20 bytes"
    ]
    for label, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        text.append("  ".join([label.ljust(widths[0]), *aligned]).rstrip())
    return "\n".join(text)


if __name__ == "__main__":
    cli.run(main)
