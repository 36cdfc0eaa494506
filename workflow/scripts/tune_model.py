"""Train a model further by a method of espalier/tune: LoRA, supervised fine-tuning, continued pretraining …

python workflow/scripts/tune_model.py --parent results/demo/runs/tiny-llama/s0/dense/model \\
    --recipe '{"tune": "lora", "steps": 60, "dataset": {…}}' \\
    --output my/model --step my/step.json --study demo --model-name tiny-llama --seed 0 --chain dense+mine --name mine

With --state FOLDER the training saves itself there every --save-every seconds, and on SIGTERM; the same command goes on
from what was saved, to the same result. --processes 4 trains on four GPUs, or in four processes on the CPU.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from espalier import checkpoints, cli, jobs, parallel, training_state


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--parent", type=Path, required=True, help="checkpoint folder to start from")
    cli.add_recipe(parser, "tune")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--step", type=Path, required=True, help="JSON file to write: what was done")
    cli.add_state(parser)
    parser.add_argument("--processes", type=int, default=1, help="processes that share the training, a GPU each")
    cli.add_identity(parser)
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(argv)
    if arguments.processes > 1 and not parallel.launched():
        code = parallel.launch(arguments.processes, [sys.executable, __file__, *argv])
        if code:
            sys.exit(code)
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(parallel.group(checkpoints.pick_device(arguments.device)))
        saving = training_state.of_job("tune", arguments, Path(__file__)) if arguments.state else None
        if saving:
            stack.enter_context(saving)
        if parallel.rank() > 0:
            jobs.assist("tune", arguments, saving=saving)
            return
        jobs.step("tune", arguments, Path(__file__), saving=saving)
        if saving:
            saving.remove()


if __name__ == "__main__":
    cli.run(main)
