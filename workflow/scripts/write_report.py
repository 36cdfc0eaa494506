"""Write a study's report: one HTML file with its charts, tables, what was run, what numbers mean, and what is missing.

`snakemake report` does this for a finished study, and a run whose jobs failed for what is there. By hand, at any time:

python workflow/scripts/write_report.py --configfile my-study.yaml
python workflow/scripts/write_report.py --configfile my-study.yaml --output my-report.html
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from espalier import cli, config, early_charts, report, tables
from espalier.study import Study


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--configfile", required=True, help="the study (YAML); - reads it from standard input, where it is JSON"
    )
    parser.add_argument(
        "--results",
        type=Path,
        nargs="+",
        help="raw results (JSON) of which its charts and tables were made; without it, what is there and up to date",
    )
    parser.add_argument("--output", type=Path, help=f"page to write (HTML); by default results/STUDY/{report.EARLY}")
    arguments = parser.parse_args(argv)
    piped = arguments.configfile == "-"
    file = "standard input" if piped else arguments.configfile
    study = Study(json.load(sys.stdin) if piped else config.read(Path(file)), file)
    if arguments.results:
        given = set(arguments.results)
        found = {one: tables.read(path) for one in study.everything() if (path := Path(study.path(one))) in given}
    else:
        current = early_charts.Current(study)
        found = {one: result for one in study.everything() if (result := current.result(one))}
    output = arguments.output or study.root / report.EARLY
    missing = report.write(study, found, output, fresh=arguments.results is not None)
    lacking = f", which lacks {len(missing)} of {len(missing) + len(found)} results and names them," if missing else ""
    print(f"The report{lacking} is {output}.")


if __name__ == "__main__":
    cli.run(main)
