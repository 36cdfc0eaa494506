"""Score a model on a suite by a method of espalier/evaluate: harness tasks, a GLUE task, or perplexity.

python workflow/scripts/evaluate_model.py --model results/demo/runs/tiny-llama/s0/dense/model \\
    --recipe '{"evaluate": "perplexity", "text": {…}, "window": 128}' \\
    --output my/result.json --study demo --model-name tiny-llama --seed 0 --chain dense --name mine
"""

from __future__ import annotations

from pathlib import Path

from espalier import cli, jobs


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder to measure")
    cli.add_recipe(parser, "evaluate")
    parser.add_argument("--output", type=Path, required=True, help="raw result to write (JSON)")
    cli.add_identity(parser)
    jobs.evaluate(parser.parse_args(argv), Path(__file__))


if __name__ == "__main__":
    cli.run(main)
