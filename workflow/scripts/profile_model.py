"""Measure time and memory of a model under a workload by a method of espalier/profile.

python workflow/scripts/profile_model.py --model results/demo/runs/tiny-llama/s0/dense/model \\
    --recipe '{"profile": "generation", "batch_sizes": [1, 4], …}' \\
    --output my/result.json --study demo --model-name tiny-llama --seed 0 --chain dense --name mine
"""

from __future__ import annotations

from pathlib import Path

from espalier import cli, jobs


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder to measure")
    cli.add_recipe(parser, "profile")
    parser.add_argument(
        "--environment", type=Path, nargs="?", help="JSON that says where the engine's own Python is, if it has one"
    )
    parser.add_argument("--output", type=Path, required=True, help="raw result to write (JSON)")
    cli.add_identity(parser)
    jobs.profile(parser.parse_args(argv), Path(__file__))


if __name__ == "__main__":
    cli.run(main)
