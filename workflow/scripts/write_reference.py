"""Write the reference of every config key: workflow/schemas/study.schema.json and docs/config.md.

python workflow/scripts/write_reference.py            # or: make docs
python workflow/scripts/write_reference.py --check    # write nothing; fail if either is out of date
"""

from __future__ import annotations

import json
from pathlib import Path

from espalier import cli, reference
from espalier.errors import UserError
from espalier.files import whole_file

ROOT = Path(__file__).parents[2]


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if a file is out of date")
    arguments = parser.parse_args(argv)
    for path, text in (
        (ROOT / "workflow" / "schemas" / "study.schema.json", json.dumps(reference.schema(), indent=1) + "\n"),
        (ROOT / "docs" / "config.md", reference.page()),
    ):
        if arguments.check:
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                raise UserError(f"{path.relative_to(ROOT)} is out of date: run `make docs`.")
        else:
            with whole_file(path) as partial:
                partial.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
