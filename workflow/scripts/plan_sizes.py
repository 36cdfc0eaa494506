"""Print how many parameters every variant of a study will have, without making one: no weights are needed.

python workflow/scripts/plan_sizes.py config.yaml

A prune step also says its peak on the device that it runs on, by arithmetic, with 16-bit weights. "about": the data
decide the last units, or a vocabulary may turn out smaller; a new head for another task is not counted.
"""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

from espalier import cli
from espalier.files import whole_file

HEADINGS = ("model", "chain", "parameters", "of dense", "at 16 bit", "peak")


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("study", type=Path, metavar="STUDY.yaml", help="config of the study")
    parser.add_argument("--csv", type=Path, help="file to write the same numbers to")
    arguments = parser.parse_args(argv)
    from espalier import config, sizes
    from espalier.study import Study

    rows = sizes.of_study(Study(config.read(arguments.study), file=str(arguments.study)))
    print(table(rows))
    if arguments.csv:
        with whole_file(arguments.csv) as partial, partial.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(field.name for field in dataclasses.fields(sizes.Size))
            writer.writerows(dataclasses.astuple(row) for row in rows)


def table(rows: list) -> str:
    """Return the sizes as lines of aligned columns: names to the left, numbers to the right."""
    lines = [HEADINGS]
    for row in rows:
        about = "" if row.exact else "about "
        peak = "" if row.peak_gb is None else gigabytes(row.peak_gb)
        share = f"{100 * row.share_of_dense:.1f} %"
        lines.append(
            (row.model, row.chain, f"{about}{row.parameters:,}", share, gigabytes(row.gb_at_16_bit), peak),
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join(cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(cells)).rstrip()
        for line in lines
        for cells in [list(zip(line, widths, strict=True))]
    ]
    return "\n".join(aligned)


def gigabytes(value: float) -> str:
    return f"{value:.3g} GB" if value >= 0.1 else f"{1000 * value:.3g} MB"


if __name__ == "__main__":
    cli.run(main)
