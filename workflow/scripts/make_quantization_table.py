"""Make the table of quantized variants with the published table's names and keys, and the paired test of every two.

python workflow/scripts/make_quantization_table.py --recipe '{"figures": "quantization_tradeoff", …}' \\
    --results results/demo/runs/tiny-llama/s0/dense/*/*.json --output quantization.json --paired paired.csv
"""

from __future__ import annotations

import csv
from pathlib import Path

from espalier import cli, paired, quantization_rows, tables
from espalier.figures import quantization_tradeoff
from espalier.files import whole_file, write_json
from espalier.recipes import build


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--recipe", type=cli.mapping, required=True, help="JSON: the recipe of the chart quantization_tradeoff"
    )
    parser.add_argument("--results", type=Path, nargs="*", default=[], help="raw results (JSON)")
    parser.add_argument("--output", type=Path, required=True, help="table to write (JSON)")
    parser.add_argument("--paired", type=Path, required=True, help="table of paired tests to write (CSV)")
    arguments = parser.parse_args(argv)
    content = {key: value for key, value in arguments.recipe.items() if key != "figures"}
    recipe = build(quantization_tradeoff.Recipe, content, "--recipe")
    results = [tables.read(path) for path in arguments.results]
    values = quantization_rows.values(recipe, tables.frame(results))
    write_json(arguments.output, values)
    with whole_file(arguments.paired) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, paired.COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(quantization_rows.pairs(recipe, results))


if __name__ == "__main__":
    cli.run(main)
