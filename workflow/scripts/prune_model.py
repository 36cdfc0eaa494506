"""Remove parts of a model: blocks, heads or neurons, by a method of espalier/prune.

python workflow/scripts/prune_model.py --parent results/demo/runs/tiny-llama/s0/dense/model \\
    --recipe '{"prune": "depth", "blocks": 1, "calibration": {…}}' \\
    --output my/model --step my/step.json --study demo --model-name tiny-llama --seed 0 --chain dense+mine --name mine
"""

from __future__ import annotations

from pathlib import Path

from espalier import cli, jobs


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--parent", type=Path, required=True, help="checkpoint folder to start from")
    cli.add_recipe(parser, "prune")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--step", type=Path, required=True, help="JSON file to write: what was done")
    cli.add_identity(parser)
    jobs.step("prune", parser.parse_args(argv), Path(__file__))


if __name__ == "__main__":
    cli.run(main)
