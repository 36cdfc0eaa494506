"""Make the table of published values: ours beside each, the difference, and whether it lies inside the tolerance.

python workflow/scripts/make_published_table.py \\
    --comparisons '{"compare": […], "figures": {}, "made": {"evaluate": {}, "profile": {}}}' \\
    --published reference/papers --results results/my/runs/*/s*/*/*/*.json --output published.csv
"""

from __future__ import annotations

import csv
from pathlib import Path

from espalier import cli, published_rows, tables
from espalier.files import whole_file


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--comparisons",
        type=cli.mapping,
        required=True,
        help="JSON: the entries of the section compare, the recipes of their charts by name, and, for evaluations and"
        " for profiles, the models that Espalier made and what made them",
    )
    parser.add_argument("--published", type=Path, required=True, help="folder of published values")
    parser.add_argument("--results", type=Path, nargs="*", default=[], help="raw results (JSON)")
    parser.add_argument("--output", type=Path, required=True, help="table to write (CSV)")
    arguments = parser.parse_args(argv)
    results = [tables.read(path) for path in arguments.results]
    lines = published_rows.lines(arguments.comparisons, results, arguments.published)
    with whole_file(arguments.output) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, published_rows.COLUMNS, lineterminator="\n")
        writer.writeheader()
        # Ten digits tell every measurement apart, and leave out what subtraction adds at the end of a number.
        writer.writerows({key: f"{v:.10g}" if isinstance(v, float) else v for key, v in line.items()} for line in lines)


if __name__ == "__main__":
    cli.run(main)
