"""Draw the charts that still lack results from the results that are there, each saying what it lacks.

A run whose jobs failed does this at its end. By hand, at any time, also while a run goes on:

python workflow/scripts/draw_early_figures.py --configfile my-study.yaml
python workflow/scripts/draw_early_figures.py --configfile my-study.yaml --figure glue_bits
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from espalier import cli, config, early_charts
from espalier.drawing import EARLY
from espalier.errors import UserError, did_you_mean
from espalier.study import Study


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--configfile", required=True, help="the study (YAML); - reads it from standard input, where it is JSON"
    )
    parser.add_argument("--figure", nargs="+", default=[], help="which charts; without it, all of the study")
    arguments = parser.parse_args(argv)
    piped = arguments.configfile == "-"
    file = "standard input" if piped else arguments.configfile
    study = Study(json.load(sys.stdin) if piped else config.read(Path(file)), file)
    known = study.resolved.figures
    for name in arguments.figure:
        if name not in known:
            raise UserError(f"{file}: there is no chart '{name}' in this study.{did_you_mean(name, known)}")
    current, drawn, failed = early_charts.Current(study), [], []
    for figure in arguments.figure or known:
        try:
            if early := early_charts.draw(study, figure, current):
                drawn.append(f"{figure} ({early.there} of {early.wanted} results)")
        except Exception as error:  # one chart, perhaps a person's own, must not take the others away
            failed.append(f"{figure} ({type(error).__name__}: {' '.join(str(error).split())})")
    if drawn:
        print(f"Early charts, which say what they lack, are in {study.figures / EARLY}: {', '.join(drawn)}.")
    elif not failed:
        print("No chart can be drawn early: each has all of its results, or none.")
    if failed:
        raise UserError(f"These charts cannot be drawn without all of their results: {'; '.join(failed)}.")


if __name__ == "__main__":
    cli.run(main)
