"""What a result was made with: the code version of a method, and the machine, libraries and commit of a run.

The code version is a hash of the syntax trees of a script and of every espalier module that it imports, docstrings and
comments left out. It goes into a rule's params, so that an edit to a method's mathematics reruns what it affects, and
an edit to a comment, or a touch, reruns nothing.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

LIBRARY = Path(__file__).parent
PACKAGES = ("torch", "transformers", "peft", "lm-eval", "gptqmodel", "bitsandbytes", "datasets", "numpy")


def code_version(script: Path, modules: Iterable[str] = ()) -> str:
    """Return 16 hex digits for `script`, the espalier `modules` (dotted names) and all espalier modules they import."""
    files = set(_closure(script))
    for file in _module_files(modules):
        files |= _closure(file)
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: (file != script, file)):
        name = file.relative_to(LIBRARY) if file.is_relative_to(LIBRARY) else file.name
        digest.update(f"{name}\n{_fingerprint(file)}\n".encode())
    return digest.hexdigest()[:16]


@cache
def _closure(file: Path) -> frozenset[Path]:
    found, queue = set(), [file]
    while queue:
        current = queue.pop()
        if current not in found:
            found.add(current)
            queue.extend(_imports(current))
    return frozenset(found)


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the statements in a node, and in those; most of a tree are expressions, which are passed over.

    What stands under `if TYPE_CHECKING` never runs, and is passed over, too.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING" and not child.orelse:
            continue
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield child
            yield from _statements(child)


@cache
def _imports(file: Path) -> tuple[Path, ...]:
    """Return the files of the espalier modules that `file` imports, anywhere in it, their packages included."""
    names: set[str] = set()
    for node in _statements(_tree(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, (_package(file, node.level), node.module)))
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return tuple(sorted(_module_files(name for name in names if name.split(".")[0] == "espalier")))


def _module_files(names: Iterable[str]) -> set[Path]:
    """Return the files of espalier modules and of the packages that hold them; a name inside a module adds nothing."""
    parts = [name.split(".") for name in names]
    files = {_module_file(".".join(name[:i])) for name in parts for i in range(1, len(name) + 1)}
    return {file for file in files if file}


def _package(file: Path, level: int) -> str:
    """Return the dotted package that a relative import of `level` dots starts from; "" for an absolute import."""
    if not level or not file.is_relative_to(LIBRARY):
        return ""
    parts = ("espalier", *file.relative_to(LIBRARY).parts)
    return ".".join(parts[:-level])


@cache
def _module_file(name: str) -> Path | None:
    path = LIBRARY.joinpath(*name.split(".")[1:])
    for file in (path.with_suffix(".py") if path != LIBRARY else path / "__init__.py", path / "__init__.py"):
        if file.is_file():
            return file
    return None


@cache
def _fingerprint(file: Path) -> str:
    tree = _tree(file)
    for node in (tree, *_statements(tree)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node, clean=False
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def provenance(started: float, device: str) -> dict:
    """Return what a raw result records of its making; `started` is time.time() at the start, `device` cpu or cuda."""
    return circumstances(started) | made_with(device)


def made_with(device: str) -> dict:
    """Return what a raw result records of the process that made it."""
    return {"packages": packages(), "python": platform.python_version(), "device": describe_device(device)}


def circumstances(started: float) -> dict:
    """Return what a raw result records whatever process has made it."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "host": platform.node(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 3),
    }


def packages() -> dict[str, str]:
    """Return the versions of the libraries that results depend on, of those that are installed."""
    return {name: found for name in PACKAGES if (found := version(name))}


def describe_device(device: str) -> dict:
    """Return the kind, name and driver of the device; a device's name keeps two GPU models off one axis."""
    if device.startswith("cuda"):
        import torch

        properties = torch.cuda.get_device_properties(0)
        return {"kind": "cuda", "name": properties.name, "memory": properties.total_memory, "driver": _driver()}
    return {"kind": "cpu", "name": _processor(), "memory": None, "driver": None}


def _driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


def version(package: str) -> str | None:
    """Return the version of an installed package, None if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def _git(*arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(LIBRARY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
