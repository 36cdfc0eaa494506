"""Refer to a model of the Hugging Face hub or of a local folder: checks that it is there, and counts its parameters.

The model is not copied, unless the reference says `convert`: then weights in PyTorch's own format are written as
safetensors, and nothing in them is run. A model of the hub is downloaded into the hub's own cache, at the pinned
revision.

python workflow/scripts/fetch_model.py --reference '{"path": "/models/llama", "task": "causal-lm", …}' \\
    --output my/model --step my/step.json --study mine --model-name llama --seed 0 --chain dense --name dense
"""

from __future__ import annotations

from pathlib import Path

from espalier import cli, jobs, shapes


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--reference", type=cli.mapping, required=True, help="JSON: path, or id and revision; task; dtype; convert"
    )
    parser.add_argument("--shape", help="name of a file of reference/shapes that the model must agree with")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to write: a pointer")
    parser.add_argument("--step", type=Path, required=True, help="JSON file to write: what was found")
    cli.add_identity(parser)
    arguments = parser.parse_args(argv)

    def check(config: dict) -> None:
        shapes.check_config(arguments.shape, config, f"models.{arguments.model_name}.shape")

    jobs.fetch(arguments, Path(__file__), check if arguments.shape else None)


if __name__ == "__main__":
    cli.run(main)
