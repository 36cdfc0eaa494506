"""What every script has in common: its arguments, its environment, and how it ends on an error."""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from espalier.errors import UserError

# Set before torch is imported, for by-hand runs as for jobs; what the caller has set stands.
ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "PYTHONHASHSEED": "0",
}
# They report, in every process, kernels that this machine does not need, and at every product that it casts its input.
CHATTERERS = ("torchao", "torch.utils._pytree", "bitsandbytes.autograd._functions")
# What every job with a model needs of transformers; they import torch, and much else.
NEEDED = ("transformers.modeling_utils", "transformers.models.auto.tokenization_auto")


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser whose help shows the script's docstring as it stands."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_identity(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which variant of which model a job is about."""
    group = parser.add_argument_group("identity, written into the result")
    group.add_argument("--study", required=True, help="name of the study")
    group.add_argument("--model-name", required=True, help="name of the model in the study")
    group.add_argument("--seed", type=int, required=True, help="seed of the run")
    group.add_argument("--chain", required=True, help="chain of the variant, such as dense+depth-1")
    group.add_argument("--name", required=True, help="name of the recipe, suite or workload in the study")


def add_recipe(parser: argparse.ArgumentParser, kind: str) -> None:
    """Add the recipe and the device; `kind` is the key that names the method in the recipe."""
    parser.add_argument(
        "--recipe", type=mapping, required=True, help=f'JSON, or a JSON file: {{"{kind}": METHOD, its recipe\'s keys}}'
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")


def add_state(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a training that goes on where it was stopped."""
    parser.add_argument("--state", type=Path, help="folder of the training's state, deleted at the end")
    parser.add_argument("--save-every", type=float, default=600.0, help="seconds between two saved states")


def mapping(text: str) -> dict:
    """Read a JSON object from the text itself, or from the file that it names."""
    try:
        value = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"neither a JSON object nor a JSON file: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("a JSON object is needed")
    return value


def identity(arguments: argparse.Namespace) -> dict:
    """Return the identity that goes into an envelope."""
    return {
        "study": arguments.study,
        "model": arguments.model_name,
        "seed": arguments.seed,
        "chain": arguments.chain,
        "name": arguments.name,
    }


def run(main: Callable[[], None]) -> None:
    """Run a script's main: a UserError ends it with one line and exit status 1."""
    prepare()
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        gc.freeze()  # else Python ends by looking for cycles in all that was imported: 1 s


def prepare() -> None:
    """Set what libraries read when they are imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in CHATTERERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def import_lightly() -> None:
    """Import torch and transformers, if they are not there yet, in half the time that this usually takes.

    Transformers does without libraries that no method here needs, which it would import for assisted decoding, for
    object detection, and for a quantization format. Python's garbage collector waits, and never looks at what was
    imported. `memory.allocated_bytes` asks it for all tensors: so this comes before there are any.
    """
    if NEEDED[0] in sys.modules:
        return
    gc.disable()
    try:
        import transformers.utils

        for name in ("is_sklearn_available", "is_scipy_available", "is_torchao_available"):
            setattr(transformers.utils, name, lambda: False)
        for name in NEEDED:
            importlib.import_module(name)
        gc.freeze()
    finally:
        gc.enable()
