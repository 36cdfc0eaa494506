"""Train a small model from scratch by a method of espalier/pretrain.

python workflow/scripts/pretrain_model.py --recipe '{"pretrain": "demo-decoder", "dataset": {…}, "steps": 700}' \\
    --output my/model --step my/step.json --study demo --model-name tiny-llama --seed 0 --chain dense --name dense
"""

from __future__ import annotations

from pathlib import Path

from espalier import cli, jobs


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    cli.add_recipe(parser, "pretrain")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--step", type=Path, required=True, help="JSON file to write: what was done")
    parser.set_defaults(parent=None)
    cli.add_identity(parser)
    jobs.step("pretrain", parser.parse_args(argv), Path(__file__))


if __name__ == "__main__":
    cli.run(main)
