"""Run a command that has GPUs of this machine for itself, until it ends: for machines without a scheduler.

python workflow/scripts/hold_gpus.py 1 python workflow/scripts/tune_model.py --parent …

It waits until so many GPUs are held by no other such command, and then becomes the command, which sees these alone
(CUDA_VISIBLE_DEVICES). profiles/workstation puts it before the commands of jobs that ask for the resource `gpu`.
"""

from __future__ import annotations

import argparse

from espalier import cli, devices


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("gpus", type=int, help="how many")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run, with its arguments")
    arguments = parser.parse_args(argv)
    if arguments.gpus < 1 or not arguments.command:
        parser.error("a number of GPUs, at least 1, and a command are needed")
    devices.run(arguments.gpus, arguments.command)


if __name__ == "__main__":
    cli.run(main)
