"""Make the tidy table of all raw results of a study: one row a metric.

python workflow/scripts/make_metrics.py --results results/demo/runs/*/s*/*/*/*.json --output metrics.csv
"""

from __future__ import annotations

import sys
from pathlib import Path

from espalier import cli, tables
from espalier.files import whole_file


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--results", type=Path, nargs="+", required=True, help="raw results (JSON)")
    parser.add_argument("--output", type=Path, required=True, help="table to write (CSV)")
    arguments = parser.parse_args(argv)
    results = [tables.read(path) for path in arguments.results]
    for warning in tables.incomparable(results) + tables.disturbed(results):
        print(f"warning: {warning}", file=sys.stderr)
    with whole_file(arguments.output) as partial:
        tables.frame(results).to_csv(partial, index=False)


if __name__ == "__main__":
    cli.run(main)
