"""Store a model's weights in fewer bits by a method of espalier/quantize.

python workflow/scripts/quantize_model.py --parent results/demo/runs/tiny-llama/s0/dense/model \\
    --recipe '{"quantize": "bitsandbytes", "bits": 4}' \\
    --output my/model --step my/step.json --study demo --model-name tiny-llama --seed 0 --chain dense+mine --name mine

For a method that trains what it quantizes, such as xtc, --state FOLDER saves the training there every --save-every
seconds, and on SIGTERM; the same command goes on from what was saved.
"""

from __future__ import annotations

from pathlib import Path

from espalier import cli, jobs, plugins, training_state
from espalier.errors import UserError


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--parent", type=Path, required=True, help="checkpoint folder to start from")
    cli.add_recipe(parser, "quantize")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--step", type=Path, required=True, help="JSON file to write: what was done")
    cli.add_state(parser)
    cli.add_identity(parser)
    arguments = parser.parse_args(argv)
    if not arguments.state:
        jobs.step("quantize", arguments, Path(__file__))
        return
    method = arguments.recipe.get("quantize")
    if not getattr(plugins.load("quantize", method, "--recipe"), "TRAINS", False):
        raise UserError(f"--state is for methods that train what they quantize, and {method} does not: leave it out.")
    with training_state.of_job("quantize", arguments, Path(__file__)) as saving:
        jobs.step("quantize", arguments, Path(__file__), saving=saving)
        saving.remove()


if __name__ == "__main__":
    cli.run(main)
