"""Look for evaluated text in the text of calibration sets: an error where there is any, a table of what was compared.

python workflow/scripts/check_calibration.py --output calibration.json \\
    --calibrations '{"general": {"text": {…}, "samples": 128, "length": 64}}' \\
    --suites '{"heldout": {"evaluate": "perplexity", "text": {…}}}'
"""

from __future__ import annotations

import sys
from pathlib import Path

from espalier import cli, contamination, plugins
from espalier.data import Calibration
from espalier.errors import UserError
from espalier.files import write_json
from espalier.recipes import build


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--calibrations", type=cli.mapping, required=True, help="JSON: the calibration sets, by name")
    parser.add_argument("--suites", type=cli.mapping, required=True, help="JSON: the recipes of the suites, by name")
    parser.add_argument("--output", type=Path, required=True, help="table to write (JSON)")
    arguments = parser.parse_args(argv)
    suites = {name: suite(name, content) for name, content in arguments.suites.items()}
    calibrations = {
        name: build(Calibration, content, f"--calibrations {name}") for name, content in arguments.calibrations.items()
    }
    write_json(arguments.output, contamination.report(calibrations, suites))


def suite(name: str, content: dict) -> contamination.Suite:
    """Return what a suite evaluates; data that cannot be read here are said to be unchecked, on stderr and in it."""
    where = f"--suites {name}"
    module = plugins.load("evaluate", content["evaluate"], where)
    recipe = build(module.Recipe, {key: value for key, value in content.items() if key != "evaluate"}, where)
    if not hasattr(module, "passages"):
        unknown = f"The method '{content['evaluate']}' does not say what it scores."
    else:
        try:
            return contamination.Suite(list(module.passages(recipe)))
        except UserError as error:
            unknown = str(error)
    print(f"warning: the suite '{name}' is not checked against calibration text. {unknown}", file=sys.stderr)
    return contamination.Suite([], unknown)


if __name__ == "__main__":
    cli.run(main)
