"""Refer to a model of the Hugging Face hub or of a local folder: checks that it is there, and counts its parameters.

The model is not copied. A model of the hub is downloaded into the hub's own cache, at the pinned revision.

python workflow/scripts/fetch_model.py --reference '{"path": "/models/llama", "task": "causal-lm", …}' \\
    --output my/model --step my/step.json --study mine --model-name llama --seed 0 --chain dense --name dense
"""

from __future__ import annotations

from pathlib import Path

from espalier import cli, jobs


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--reference", type=cli.mapping, required=True, help="JSON: path, or id and revision; task; dtype"
    )
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to write: a pointer")
    parser.add_argument("--step", type=Path, required=True, help="JSON file to write: what was found")
    cli.add_identity(parser)
    jobs.fetch(parser.parse_args(argv), Path(__file__))


if __name__ == "__main__":
    cli.run(main)
