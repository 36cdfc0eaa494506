"""Make the table of quantized variants with the published table's row names and keys.

python workflow/scripts/make_quantization_table.py --recipe '{"figures": "quantization_tradeoff", …}' \\
    --results results/demo/runs/tiny-llama/s0/dense/*/*.json --output quantization.json
"""

from __future__ import annotations

from pathlib import Path

from espalier import cli, tables
from espalier.figures import quantization_tradeoff
from espalier.files import write_json
from espalier.recipes import build


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--recipe", type=cli.mapping, required=True, help="JSON: the recipe of the chart quantization_tradeoff"
    )
    parser.add_argument("--results", type=Path, nargs="*", default=[], help="raw results (JSON)")
    parser.add_argument("--output", type=Path, required=True, help="table to write (JSON)")
    arguments = parser.parse_args(argv)
    content = {key: value for key, value in arguments.recipe.items() if key != "figures"}
    recipe = build(quantization_tradeoff.Recipe, content, "--recipe")
    metrics = tables.frame(tables.read(path) for path in arguments.results)
    write_json(arguments.output, quantization_tradeoff.row_values(recipe, metrics))


if __name__ == "__main__":
    cli.run(main)
