"""Write the demo's generated language: training and calibration text, seven zero-shot tasks, eight GLUE tasks.

python workflow/scripts/generate_data.py --recipe '{"seed": 0}' --output my/data
"""

from __future__ import annotations

from pathlib import Path

from espalier import cli
from espalier.demo import dataset
from espalier.files import whole_folder
from espalier.recipes import build


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--recipe", type=cli.mapping, required=True, help="JSON, or a JSON file: the dataset's recipe")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args(argv)
    recipe = build(dataset.Recipe, arguments.recipe, "--recipe")
    with whole_folder(arguments.output) as folder:
        dataset.write(folder, recipe)


if __name__ == "__main__":
    cli.run(main)
