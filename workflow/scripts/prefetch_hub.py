"""Download what a study needs of the Hugging Face hub into the hub's cache, and write a manifest of it.

Jobs on nodes without internet then read the cache. An access token comes from HF_TOKEN or from `hf auth login`.

python workflow/scripts/prefetch_hub.py --study mine --manifest results/mine/prefetch.json \\
    --needed '{"items": [{"kind": "model", "id": "someone/llama", "revision": "0123…"}]}'
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from espalier import cli, hub
from espalier.recipes import build

# The hub is asked here, whatever the shell says of jobs; a slow hub is not a dead one.
ENVIRONMENT = {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
SECONDS_TO_WAIT = {"HF_HUB_DOWNLOAD_TIMEOUT": "30", "HF_HUB_ETAG_TIMEOUT": "30"}


def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--study", required=True, help="name of the study")
    parser.add_argument("--needed", type=cli.mapping, required=True, help="JSON: items, each kind, id, revision, …")
    parser.add_argument("--manifest", type=Path, required=True, help="JSON file to write: what was found")
    arguments = parser.parse_args(argv)
    items = [build(hub.Item, item, f"--needed items[{i}]") for i, item in enumerate(arguments.needed["items"])]
    os.environ.update(ENVIRONMENT)
    for name, seconds in SECONDS_TO_WAIT.items():
        os.environ.setdefault(name, seconds)
    from espalier import hub_download

    for library in ("huggingface_hub", "datasets"):
        logging.getLogger(library).setLevel(logging.ERROR)
    manifest = hub_download.prefetch(arguments.study, items, arguments.manifest)
    files = [file for item in manifest["items"] for file in item["files"]]
    gigabytes = sum(file["size"] for file in files) / 1e9
    print(
        f"The study {arguments.study} finds {len(manifest['items'])} models and data sets in the hub's cache:"
        f" {len(files)} files, {gigabytes:.1f} GB, listed in {arguments.manifest}.",
        file=sys.stderr,
    )


if __name__ == "__main__":
    cli.run(main)
