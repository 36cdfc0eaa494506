"""Decode speed of the engines, as ratios to HF's and as shares of what the memory's bandwidth allows.

make bench-engines
python tests/benchmarks/engines.py --engines hf trellis --batch 1 --rounds 9 --json engines.json

All engines hold the same Llama of random weights, because time does not depend on the weights, each in a worker of its
own, and they take turns: in each round every one generates once, so that what slows the machine slows all. Before, each
was warmed up by one call of the same shape. Decode tokens/s are those after the first token of every row: (batch ×
output − tokens known by then) / (seconds of the call − seconds until then). A ratio is that of two speeds of the same
round; the table has the median over the rounds, with least and most. The memory's bandwidth is measured before every
round and after the last one; a share is the median speed over the limit at the median bandwidth (docs/metrics.md). The
last column says whether an engine's tokens are HF's.

Engines that cannot run here are named with the reason. One that has an environment of its own is looked for where
studies build them, in results/environments.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from espalier import checkpoints, cli, environments, plugins, prompts
from espalier.bandwidth import Bandwidth, limit
from espalier.engine_process import Died, EngineProcess, OutOfMemory
from espalier.files import write_json
from espalier.progress import progress
from espalier.recipes import build
from espalier.worker import Unavailable

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes
BASE = "hf"
OURS = "trellis"
RIVAL = "vllm"
# Of Espalier's own engine: device, dtype, hidden size, blocks, batch → least ratio to HF, least share of the limit.
GOALS = {
    ("cpu", "float32", 2048, 8, 1): (1.3, 0.85),
    ("cpu", "float32", 2048, 8, 8): (1.0, None),
    ("cuda", "bfloat16", 4096, 32, 1): (None, 0.8),
}
# Where → the least that its best ratio to HF may be; the batches at which it may not be slower than its rival.
GOALS_OVER_BATCHES = {("cuda", "bfloat16", 4096, 32): (4.86, range(1, 9))}


@dataclass(frozen=True)
class Sample:
    """One timed call of one engine."""

    engine: str
    round: int
    seconds: float  # of the call
    first_token_seconds: float  # until every row's first token, or of a call that generates these alone
    first_tokens: int  # of all rows, known then
    cpu_seconds: float
    decode: float  # tokens/s


@dataclass
class Turns:
    """What came of the turns at one batch."""

    samples: list[Sample] = field(default_factory=list)
    bandwidths: list[float] = field(default_factory=list)  # bytes/s
    tokens: dict[str, list[list[int]]] = field(default_factory=dict)  # engine → what it generated last
    details: dict[str, dict] = field(default_factory=dict)  # engine → what it says of how it works


def main(argv: list[str] | None = None) -> None:
    import torch

    arguments = parse(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        make_model(folder, arguments)
        workers, about, missing = start(folder, arguments, stack)
        said = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
        found = {"arguments": said, "engines": about, "missing": missing, "batches": []}
        memory = Bandwidth(arguments.device)
        tokens = prompts.prompt(folder, arguments.context, seed=0)
        for batch in arguments.batch:
            turns = take_turns(workers, missing, [tokens] * batch, arguments, memory.measure)
            found["batches"].append(summary(turns, batch, checkpoints.describe(folder)["parameters"], arguments))
            print(table(found["batches"][-1], arguments), flush=True)
    for line in over_batches(found["batches"], arguments):
        print(line)
    for name, reason in missing.items():
        print(f"{name}: {reason}")
    if arguments.json:
        write_json(arguments.json, found)


def parse(argv: list[str] | None):
    parser = cli.parser(__doc__)
    parser.add_argument("--engines", nargs="+", help="by default all of espalier/engines that can run here")
    parser.add_argument("--hidden", type=int, default=2048, help="hidden size, a multiple of 64")
    parser.add_argument("--layers", type=int, default=8, help="transformer blocks")
    parser.add_argument("--vocabulary", type=int, default=32000, help="tokens that there are")
    parser.add_argument("--dtype", choices=SIZES, default="float32", help="of the weights")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="prompts at once, in rising order")
    parser.add_argument("--context", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=32, help="new tokens of each prompt, at least 2")
    parser.add_argument("--rounds", type=int, default=5, help="how often each engine is timed")
    parser.add_argument("--threads", type=int, help="by default OMP_NUM_THREADS, or as many as there are cores")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    parser.add_argument(
        "--environments", type=Path, default=Path("results/environments"), help="folder of the engines' environments"
    )
    parser.add_argument("--json", type=Path, help="file to write every sample to")
    arguments = parser.parse_args(argv)
    arguments.device = checkpoints.pick_device(arguments.device)
    return arguments


def make_model(folder: Path, arguments) -> None:
    """Write a Llama of random weights in Llama 2's proportions: heads of 64 channels, an MLP of 43/16 of the width."""
    random_weights = plugins.load("pretrain", "random-weights")
    config = {
        "model_type": "llama",
        "vocab_size": arguments.vocabulary,
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.hidden * 43 // 16,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.hidden // 64,
        "max_position_embeddings": arguments.context + arguments.output,
    }
    recipe = build(random_weights.Recipe, {"config": config, "weights_dtype": arguments.dtype}, "the benchmark's model")
    random_weights.apply(None, folder, recipe, seed=0, device=arguments.device)


def start(
    folder: Path, arguments, stack: ExitStack
) -> tuple[dict[str, EngineProcess], dict[str, dict], dict[str, str]]:
    """Return engine → its worker, which has loaded the model; engine → what it says of itself; and why others cannot.

    `stack` closes the workers.
    """
    workers, about, missing = {}, {}, {}
    for name in progress(arguments.engines or plugins.names("engines"), "loading, engines"):
        try:
            python = own_python(name, arguments)
            worker = stack.enter_context(EngineProcess(name, python, threads=arguments.threads))
            worker.probe(arguments.device)
            loaded = worker.load(
                folder,
                device=arguments.device,
                max_tokens=arguments.context + arguments.output,
                max_batch=max(arguments.batch),
                seed=0,
            )
            workers[name], about[name] = worker, {**loaded.made_with, "allocated": loaded.allocated}
        except (Unavailable, OutOfMemory, Died) as error:
            missing[name] = reason(error)
    return workers, about, missing


def own_python(name: str, arguments) -> Path | None:
    """Return the Python of an engine's own environment, None if it has none; raises Unavailable if it is not built."""
    own = environments.of_engine(name)
    if not own:
        return None
    if arguments.device not in own:
        raise Unavailable(f"it has no environment for the device {arguments.device}")
    environment = own[arguments.device]
    folder = environments.venv_folder(environments.lock_file(environment), arguments.environments / environment)
    python = folder / "bin" / "python"
    if not python.exists():
        raise Unavailable(f"there is no {python}: a study that measures it builds it")
    return python


def take_turns(
    workers: dict[str, EngineProcess],
    missing: dict[str, str],
    prompt: list[list[int]],
    arguments,
    bandwidth: Callable[[], float],
) -> Turns:
    """Time all engines in turn, and measure the bandwidth in between.

    An engine that fails is closed and moved from `workers` to `missing`.
    """
    turns = Turns()
    for number in progress(range(-1, arguments.rounds), f"batch {len(prompt)}, rounds"):  # round −1 warms up
        turns.bandwidths += [bandwidth()] if number >= 0 else []
        for name in list(workers) if number % 2 else reversed(list(workers)):
            try:
                sample, turns.tokens[name] = timed(name, workers[name], prompt, number, arguments.output)
                turns.samples += [sample] if number >= 0 else []
                if number == arguments.rounds - 1:
                    turns.details[name] = workers[name].held()[1]
            except (Unavailable, OutOfMemory, Died) as error:
                workers.pop(name).close()
                missing[name] = f"{reason(error)}, at batch {len(prompt)}"
    turns.bandwidths.append(bandwidth())
    return turns


def timed(
    name: str, worker: EngineProcess, prompt: list[list[int]], number: int, output: int
) -> tuple[Sample, list[list[int]]]:
    """Have an engine generate once; return how long it took, and the tokens."""
    call = worker.generate(prompt, output)
    first, known = call.first_token_seconds, call.first_tokens
    if first is None:
        first, known = worker.generate(prompt, 1).seconds, len(prompt)
    speed = (len(prompt) * output - known) / (call.seconds - first)
    return Sample(name, number, call.seconds, first, known, call.cpu_seconds, speed), call.token_ids


def summary(turns: Turns, batch: int, parameters: int, arguments) -> dict:
    """Return what follows from the turns at one batch, and every sample.

    The limit counts all weights but the embedding, and the keys and values that a step reads in the mean: from those
    of context + 1 tokens in a call's first step to context + output − 1 in its last.
    """
    size = SIZES[arguments.dtype]
    read = (parameters - arguments.vocabulary * arguments.hidden) * size
    tokens = arguments.context + arguments.output / 2
    kv = batch * tokens * 2 * arguments.layers * arguments.hidden * size
    bandwidth = statistics.median(turns.bandwidths)
    most = limit(read, kv, batch, bandwidth)
    speeds: dict[str, dict[int, float]] = {}
    for sample in turns.samples:
        speeds.setdefault(sample.engine, {})[sample.round] = sample.decode
    base = turns.tokens.get(BASE)
    engines = {
        name: {
            "decode": statistics.median(own.values()),
            "ratio": paired(own, speeds.get(BASE, {})),
            "share": statistics.median(own.values()) / most,
            "same_tokens": None if base is None else turns.tokens[name] == base,
            "details": turns.details.get(name),
        }
        for name, own in ((name, speeds[name]) for name in turns.tokens if name in speeds)
    }
    samples = [asdict(sample) for sample in turns.samples]
    measured = {"bandwidth": bandwidth, "limit": most, "engines": engines, "bandwidths": turns.bandwidths}
    rival = paired(speeds.get(OURS, {}), speeds.get(RIVAL, {}))
    return {"batch": batch, **measured, "ratio_to_rival": rival, "samples": samples}


def paired(speeds: dict[int, float], base: dict[int, float]) -> dict[str, float] | None:
    """Return the least, the median and the greatest ratio of two speeds of the same round; None if there are none."""
    ratios = [speed / base[number] for number, speed in speeds.items() if number in base]
    return {"least": min(ratios), "median": statistics.median(ratios), "most": max(ratios)} if ratios else None


def table(found: dict, arguments) -> str:
    """Return what was measured at one batch as aligned columns, and whether Espalier's own engine is at its goal."""
    rows = [("", "tokens/s", f"/ {BASE}", "least", "most", "of limit", f"tokens as {BASE}")]
    for name, one in found["engines"].items():
        ratio = [f"{one['ratio'][key]:.2f}" for key in ("median", "least", "most")] if one["ratio"] else [""] * 3
        same = {True: "same", False: "other", None: ""}[one["same_tokens"]]
        rows.append((name, f"{one['decode']:.1f}", *ratio, f"{one['share']:.0%}", same))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = [
        f"\nbatch {found['batch']}: {arguments.dtype}, hidden {arguments.hidden}, {arguments.layers} blocks, context"
        f" {arguments.context}, output {arguments.output}; {arguments.device}, {arguments.rounds} rounds; memory reads"
        f" {found['bandwidth'] / 1e9:.1f} GB/s, which allows {found['limit']:.1f} tokens/s"
    ]
    for name, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        text.append("  ".join([name.ljust(widths[0]), *aligned]).rstrip())
    ours = found["engines"].get(OURS)
    least_ratio, least_share = GOALS.get((*size_of(arguments), found["batch"]), (None, None))
    if ours and ours["ratio"] and least_ratio:
        text.append(goal(f"{OURS} / {BASE}", ours["ratio"]["median"], least_ratio))
    if ours and least_share:
        text.append(goal(f"{OURS} of the limit", ours["share"], least_share))
    return "\n".join(text)


def size_of(arguments) -> tuple[str, str, int, int]:
    """Return what goals are of: device, dtype, hidden size, blocks."""
    return arguments.device, arguments.dtype, arguments.hidden, arguments.layers


def over_batches(batches: list[dict], arguments) -> list[str]:
    """Return lines that say whether Espalier's own engine is at the goals over several batches, where there are any."""
    if size_of(arguments) not in GOALS_OVER_BATCHES:
        return []
    least, among = GOALS_OVER_BATCHES[size_of(arguments)]
    ours = [found["engines"][OURS]["ratio"] for found in batches if OURS in found["engines"]]
    to_base = [ratio["median"] for ratio in ours if ratio]
    to_rival = [found["ratio_to_rival"] for found in batches if found["batch"] in among]
    to_rival = [ratio["median"] for ratio in to_rival if ratio]
    lines = [goal(f"best {OURS} / {BASE}", max(to_base), least)] if to_base else []
    batched = f"batches {among[0]} to {among[-1]}"
    return lines + ([goal(f"least {OURS} / {RIVAL}, {batched}", min(to_rival), 1.0)] if to_rival else [])


def goal(what: str, value: float, least: float) -> str:
    """Return a line that says whether a goal is reached."""
    return f"{'reached' if value >= least else 'MISSED'}  {what}: {value:.2f}, goal {least:.2f}"


def reason(error: Exception) -> str:
    """Return why an engine is not measured, in words."""
    if isinstance(error, OutOfMemory):
        return "memory ran out"
    return f"{'failed' if isinstance(error, Died) else 'unavailable'}: {error}"


if __name__ == "__main__":
    cli.run(main)
