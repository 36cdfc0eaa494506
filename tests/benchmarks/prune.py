"""Time and memory of every pruning method, as ratios to one forward pass of its calibration set through the model.

make bench-prune
python tests/benchmarks/prune.py --shape llama-7b --device cuda --output prune.jsonl

Models have random weights, because neither time nor memory depends on them. Every work is done once to warm up, once
for its memory, and then, in turn with all others, for its time; times are medians. Reading and writing checkpoints is
left out. Memory is the peak on the device: on a CPU that includes the model, on a GPU what the method puts there.
The column "said" is the method's own peak by arithmetic. The last line compares the perplexity scan of depth pruning,
which shares the hidden states before the removed block, with one that runs the whole model without each block.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from espalier import checkpoints, cli, memory, plugins
from espalier.files import whole_file
from espalier.recipes import build

RATIO = 0.25
CALIBRATED = {"ratio": RATIO, "calibration": None, "batch_size": None}  # None: filled in from the arguments
WHOLE = {"keep_first": 0, "keep_last": 0}
# Method → label → recipe.
SETTINGS: dict[str, dict[str, dict]] = {
    "depth": {
        **{f"depth {name}": {"criterion": name, **CALIBRATED} for name in ("perplexity", "taylor", "block-influence")},
        **{f"depth {name}": {"criterion": name, "ratio": RATIO} for name in ("magnitude", "random")},
    },
    "flap": {f"flap {name}": {"structure": name, **CALIBRATED} for name in ("AL-AM", "UL-UM")},
    "llm-pruner": {
        f"llm-pruner {name}": {"order": name, "ratio": RATIO, "calibration": None, **WHOLE}
        for name in ("first", "mixed")
    },
    "wanda-sp": {"wanda-sp": CALIBRATED},
}
SHARED, NAIVE, FORWARD = "depth perplexity", "naive perplexity scan", "forward pass"


@dataclasses.dataclass
class Work:
    """Something to measure. `prepare` returns what is run; it gets a copy of the model that it may change."""

    label: str
    prepare: Callable[[object], Callable[[], object]]
    recipe: dict | None = None
    said: int | None = None  # bytes by arithmetic


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    lines = []
    for name, recipe in models(arguments):
        with tempfile.TemporaryDirectory() as folder:
            lines += measure(name, recipe, Path(folder), arguments)
        print(table([line for line in lines if line["model"] == name]), flush=True)
    if arguments.output:
        with whole_file(arguments.output) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def parse(argv: list[str] | None):
    parser = cli.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="one small model, one repeat")
    parser.add_argument("--shape", action="append", default=[], help="file of reference/shapes; may be given again")
    parser.add_argument("--layers", type=int, help="blocks of the models; by default their own number")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--length", type=int, default=64, help="tokens a window")
    parser.add_argument("--batch-size", type=int, default=4, help="windows a forward pass")
    parser.add_argument("--repeats", type=int, default=3, help="how often each work is timed")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    parser.add_argument("--output", type=Path, help="file to write JSON lines to, one a work")
    arguments = parser.parse_args(argv)
    arguments.device = checkpoints.pick_device(arguments.device)
    if arguments.quick:
        arguments.repeats = 1
    return arguments


def models(arguments) -> Iterator[tuple[str, dict]]:
    """Yield the name and the recipe of random weights of each model."""
    layers = {} if arguments.layers is None else {"layers": arguments.layers}
    for shape in arguments.shape:
        yield shape, {"shape": shape, **layers}
    for hidden, blocks in () if arguments.shape else ((128, 8),) if arguments.quick else ((128, 8), (256, 8), (512, 8)):
        config = {
            "model_type": "llama",
            "vocab_size": 1000,
            "hidden_size": hidden,
            "intermediate_size": hidden * 43 // 16,
            "num_hidden_layers": blocks,
            "num_attention_heads": hidden // 32,
        }
        yield f"hidden {hidden}", {"config": config, "weights_dtype": "float32", **layers}


def measure(name: str, recipe: dict, folder: Path, arguments) -> list[dict]:
    """Return one line a work for one model, which is made in `folder`."""
    import torch

    random_weights = plugins.load("pretrain", "random-weights")
    (folder / "model").mkdir()
    random_weights.apply(
        None, folder / "model", build(random_weights.Recipe, recipe, name), seed=0, device=arguments.device
    )
    checkpoint = checkpoints.load(folder / "model", device="cpu")
    calibration = write_calibration(folder / "text", arguments)
    all_work = [reference(FORWARD, forward, checkpoint, calibration, arguments)]
    all_work += [reference(NAIVE, naive_scan, checkpoint, calibration, arguments)]
    all_work += prunings(checkpoint, calibration, arguments)
    for work in all_work:  # to warm up
        timed(work, checkpoint.model, arguments.device)
    peaks = {work.label: peak(work, checkpoint.model, arguments.device) for work in all_work}
    seconds: dict[str, list[float]] = {work.label: [] for work in all_work}
    for _ in range(arguments.repeats):
        for work in all_work:
            seconds[work.label].append(timed(work, checkpoint.model, arguments.device))
    medians = {label: statistics.median(times) for label, times in seconds.items()}
    on = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    return [
        {
            "model": name,
            "parameters": checkpoint.info["parameters"],
            "blocks": checkpoint.model.config.num_hidden_layers,
            "samples": arguments.samples,
            "length": arguments.length,
            "batch_size": arguments.batch_size,
            "work": work.label,
            "recipe": work.recipe,
            "seconds": medians[work.label],
            "all_seconds": seconds[work.label],
            "seconds_ratio": medians[work.label] / medians[FORWARD],
            "peak_bytes": peaks[work.label],
            "peak_ratio": peaks[work.label] / peaks[FORWARD],
            "said_bytes": work.said,
            "device": on,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        for work in all_work
    ]


def write_calibration(folder: Path, arguments) -> dict:
    """Write documents, a token a byte, that fill all windows; return the calibration set that reads them."""
    folder.mkdir()
    document = json.dumps({"text": "the red fox sees a blue bird"}) + "\n"
    lines = document * (1 + arguments.samples * arguments.length // 28)
    (folder / "calibration.jsonl").write_text(lines, encoding="utf-8")
    dataset = {"name": "text", "source": "local", "path": str(folder)}
    text = {"dataset": dataset, "split": "calibration"}
    return {"text": text, "samples": arguments.samples, "length": arguments.length}


def reference(label: str, run: Callable, checkpoint, calibration: dict, arguments) -> Work:
    """Return a work on the whole model, which is on the device before it starts."""
    import torch

    from espalier.data import Calibration

    ids = build(Calibration, calibration, "calibration").token_ids(checkpoint.tokenizer)
    windows = torch.tensor(ids, device=arguments.device)

    def prepare(model):
        model = model.to(arguments.device)
        return lambda: run(model, windows, arguments.batch_size)

    return Work(label, prepare)


def prunings(checkpoint, calibration: dict, arguments) -> list[Work]:
    """Return a work for each setting of each method: its `apply`, on a checkpoint that is in memory already."""
    fill = {"calibration": calibration, "batch_size": arguments.batch_size}
    found = []
    for method in plugins.names("prune"):
        module = plugins.load("prune", method)
        for label, setting in SETTINGS[method].items():
            content = {key: fill[key] if value is None else value for key, value in setting.items()}
            recipe = build(module.Recipe, content, label)

            def prepare(model, module=module, recipe=recipe):
                return lambda: in_memory(module, recipe, dataclasses.replace(checkpoint, model=model), arguments.device)

            said = module.peak_bytes(checkpoints.skeleton(checkpoint.folder), recipe)
            found.append(Work(label, prepare, {"prune": method, **setting}, said))
    return found


def in_memory(module, recipe, checkpoint, device: str) -> None:
    """Prune a checkpoint that is in memory already, and write nothing."""

    def load(*_, **__):
        return checkpoint

    def load_tokenizer(_):
        return checkpoint.tokenizer

    def save(*_, **__):
        pass

    # Functions, not mocks: these would keep the model until the next collection of garbage.
    with mock.patch.multiple(checkpoints, load=load, load_tokenizer=load_tokenizer, save=save):
        module.apply(checkpoint.folder, Path(), recipe, seed=0, device=device)


def forward(model, windows, batch_size: int) -> float:
    """Return the mean next-token loss of the windows."""
    import torch

    total = 0.0
    with torch.no_grad():
        for batch in windows.split(batch_size):
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
            ).item()
    return total / (len(windows) * (windows.shape[1] - 1))


def naive_scan(model, windows, batch_size: int) -> list[float]:
    """Return the loss of the whole model, and of the model without each block, each from a pass of its own."""
    import torch

    decoder, whole = model.get_decoder(), model.get_decoder().layers
    losses = [forward(model, windows, batch_size)]
    for removed in range(len(whole)):
        decoder.layers = torch.nn.ModuleList(block for i, block in enumerate(whole) if i != removed)
        losses.append(forward(model, windows, batch_size))
    decoder.layers = whole
    return losses


def timed(work: Work, model, device: str) -> float:
    """Return the seconds that a work takes on a fresh copy of the model."""
    run = work.prepare(copy.deepcopy(model))
    wait(device)
    started = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - started


def peak(work: Work, model, device: str) -> int:
    """Return the most bytes on the device while a work is done; on a CPU, the whole model and what is added."""
    model = copy.deepcopy(model)
    weights = [one.data for one in model.parameters()]  # held to the end: what a method frees of them is not its merit
    return memory.peaks(work.prepare(model), device, before=sum(one.nbytes for one in weights))["allocated"]


def wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def table(lines: list[dict]) -> str:
    """Return what was measured of one model, as aligned columns, and the two scans against each other."""
    first = lines[0]
    rows = [("", "seconds", "ratio", "peak MB", "ratio", "said MB")]
    for line in lines:
        said = "" if line["said_bytes"] is None else f"{line['said_bytes'] / 1e6:.1f}"
        seconds, megabytes = f"{line['seconds']:.3f}", f"{line['peak_bytes'] / 1e6:.1f}"
        rows.append(
            (line["work"], seconds, f"{line['seconds_ratio']:.1f}", megabytes, f"{line['peak_ratio']:.2f}", said)
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = [
        f"\n{first['model']}: {first['parameters']:,} parameters in {first['blocks']} blocks;"
        f" {first['samples']} windows of {first['length']} tokens, {first['batch_size']} at once;"
        f" {first['device']}, {first['threads']} threads"
    ]
    for label, *numbers in rows:
        cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        text.append("  ".join([label.ljust(widths[0]), *cells]).rstrip())
    took = {line["work"]: line["seconds"] for line in lines}
    text.append(f"shared perplexity scan / naive one: {took[SHARED] / took[NAIVE]:.2f} of the time")
    return "\n".join(text)


if __name__ == "__main__":
    cli.run(main)
