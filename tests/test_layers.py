"""The house's one rule, on the syntax tree: imports point downward, and `toolkit` never leaves itself."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

TRAINING_PACKAGES = {
    "accelerate",
    "bitsandbytes",
    "diffusers",
    "peft",
    "psutil",
    "transformers",
    "webdataset",
}
DATA_PACKAGES = {"PIL", "numpy", "safetensors", "torch", "tqdm"}
TOML = {"tomli", "tomllib"}  # the first stands in for the second, which Python 3.10 lacks
COMFYUI = {"aiohttp", "comfy", "comfy_api", "comfy_execution", "folder_paths", "latent_preview"}
COMFYUI |= {"node_helpers", "server"}
WEBUI = {"gradio", "modules"}


@dataclass(frozen=True)
class Room:
    """A folder and what it may import beside the standard library and itself."""

    ours: set[str]
    theirs: set[str]


ROOMS = {
    "toolkit/diffusion": Room(ours=set(), theirs={"torch"}),
    "toolkit/methods": Room(ours={"diffusion"}, theirs={"torch"}),
    "toolkit/runtime": Room(ours={"diffusion"}, theirs={"safetensors", "torch"}),
    "toolkit/training": Room(
        ours={"diffusion", "methods", "runtime"}, theirs=TRAINING_PACKAGES | DATA_PACKAGES | TOML
    ),
    "toolkit/evaluation": Room(
        ours={"diffusion", "runtime", "training"}, theirs={"PIL", "numpy", "torch", "transformers"}
    ),
    "toolkit/demo": Room(
        ours={"command", "diffusion", "evaluation", "methods", "runtime", "training"},
        theirs=TRAINING_PACKAGES | DATA_PACKAGES | {"sklearn"},
    ),
    "nodes": Room(ours={"diffusion", "runtime"}, theirs={"safetensors", "torch"} | COMFYUI),
    "a1111": Room(ours={"diffusion", "runtime"}, theirs={"safetensors", "torch"} | WEBUI),
    "scripts": Room(ours=set(), theirs=set()),
}


def imports(path: str, source: str) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether the import is relative) for each import; relative names as seen from the root.

    Raises ValueError where a relative import climbs out of the root.
    """
    package = Path(path).parent.parts
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, False
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or "", False
        elif isinstance(node, ast.ImportFrom):
            if node.level > len(package) + 1:
                raise ValueError(f"line {node.lineno} climbs out of the repository")
            base = [*package[: len(package) + 1 - node.level], *(node.module or "").split(".")]
            for alias in node.names:
                yield ".".join([part for part in base if part] + [alias.name]), True


def is_command(source: str) -> bool:
    """Whether the module runs as a program; such a one must not be imported (it would exist twice)."""
    return any(isinstance(n, ast.If) and "__main__" in ast.dump(n.test) for n in ast.parse(source).body)


def violations(path: str, source: str, *, commands: set[str]) -> list[str]:
    """What the file at `path` (from the root, with slashes) imports and should not."""
    folder = path.rpartition("/")[0]
    room_path = next((name for name in ROOMS if folder == name or folder.startswith(name + "/")), None)
    room = ROOMS[room_path] if room_path else None
    inside_toolkit = path.startswith("toolkit/")
    found: list[str] = []
    for name, relative in imports(path, source):
        top, _, rest = name.partition(".")
        if not relative:
            if top == "toolkit":
                found.append(f"{name}: our own code is imported relatively")
            elif top not in sys.stdlib_module_names and room is not None and top not in room.theirs:
                found.append(f"{name}: not among {sorted(room.theirs)}")
            continue
        if top != "toolkit":
            if inside_toolkit:
                found.append(f"{name}: leaves toolkit")
            continue
        target = rest.split(".")[0]
        if target in commands:
            found.append(f"{name}: a command, which nobody imports")
        elif room is not None and f"toolkit/{target}" != room_path:
            is_module = (ROOT / "toolkit" / target).is_dir() or (ROOT / "toolkit" / f"{target}.py").exists()
            if f"toolkit/{target}" in ROOMS or is_module:
                if target not in room.ours:
                    found.append(f"{name}: {room_path} may import {sorted(room.ours)} of ours")
    return found


def sources() -> dict[str, str]:
    """The text of every Python file of ours outside the tests."""
    places = ("toolkit", "nodes", "a1111", "scripts")
    files = [path for place in places for path in sorted((ROOT / place).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}


def commands() -> set[str]:
    return {Path(path).stem for path, text in sources().items() if path.count("/") == 1 and is_command(text)}


def test_every_import_points_downward() -> None:
    ours = commands()
    found = [
        f"{path}: {line}"
        for path, text in sources().items()
        for line in violations(path, text, commands=ours)
    ]
    assert not found, "\n".join(found)


def test_every_folder_of_the_toolkit_is_a_room_with_rules() -> None:
    folders = {path.rpartition("/")[0] for path in sources() if path.startswith("toolkit/")} - {"toolkit"}
    assert {
        folder for folder in folders if not any(f"{folder}/".startswith(f"{name}/") for name in ROOMS)
    } == set()


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("toolkit/diffusion/x.py", "import numpy"),
        ("toolkit/diffusion/x.py", "from ..runtime import samplers"),
        ("toolkit/diffusion/x.py", "def f():\n    from .. import methods"),
        ("toolkit/methods/x.py", "from ..runtime.samplers import walk"),
        ("toolkit/runtime/x.py", "import diffusers.models"),
        ("toolkit/runtime/x.py", "from ..methods import guided"),
        ("toolkit/training/x.py", "from ..evaluation import metrics"),
        ("toolkit/evaluation/x.py", "from ..demo import judge"),
        ("toolkit/training/x.py", "from ..distill import main"),
        ("toolkit/sample.py", "from .distill import main"),
        ("toolkit/sample.py", "from . import distill"),
        ("toolkit/sample.py", "from toolkit.runtime import samplers"),
        ("toolkit/runtime/x.py", "from ...nodes import loaders"),
        ("nodes/x.py", "from ..toolkit.training import loop"),
        ("nodes/x.py", "from toolkit.runtime import samplers"),
        ("nodes/x.py", "import diffusers"),
        ("a1111/x.py", "import comfy.sd"),
        ("a1111/x.py", "from ..toolkit.training import loop"),
        ("scripts/x.py", "import torch"),
    ],
)
def test_a_forbidden_import_is_seen(path: str, source: str) -> None:
    assert violations(path, source, commands={"distill"})


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("toolkit/diffusion/x.py", "import math\nfrom torch import Tensor\nfrom .grid import Grid"),
        ("toolkit/runtime/x.py", "from .. import __version__\nfrom ..diffusion.grid import Grid"),
        ("toolkit/training/x.py", "from ..diffusion import grid\nfrom ..methods import guided\nimport peft"),
        ("toolkit/sample.py", "from .runtime import samplers\nfrom .demo import judge\nimport numpy"),
        ("nodes/x.py", "from ..toolkit.runtime import samplers\nimport comfy.sd\nfrom . import loaders"),
    ],
)
def test_an_allowed_import_passes(path: str, source: str) -> None:
    assert violations(path, source, commands={"distill"}) == []


def test_an_import_that_climbs_out_of_the_repository_is_an_error() -> None:
    with pytest.raises(ValueError, match="line 1 climbs out"):
        list(imports("toolkit/runtime/x.py", "from .... import secrets"))


def test_toolkit_starts_before_anything_is_installed() -> None:
    for path in ("toolkit/__init__.py", "toolkit/start.py", "toolkit/cards.py"):
        for name, relative in imports(path, (ROOT / path).read_text(encoding="utf-8")):
            known = ("toolkit.cards",) if relative else sys.stdlib_module_names
            assert (name if relative else name.partition(".")[0]) in known, f"{path} imports {name}"


IMPORT_ALL = """
import importlib, importlib.abc, pkgutil, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ImportError(name + " is absent in a host")

sys.meta_path.insert(0, Absent())
for room in {rooms}:
    package = importlib.import_module("toolkit." + room)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
        print(module.name)
"""


def test_the_runtime_imports_where_the_training_packages_are_absent() -> None:
    script = IMPORT_ALL.format(blocked=sorted(TRAINING_PACKAGES), rooms=("diffusion", "runtime"))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert any(name.startswith("toolkit.runtime.") for name in done.stdout.split())


def test_commands_answer_help_without_loading_the_libraries_of_networks() -> None:
    """They take longer to load than torch itself; psutil does not."""
    slow = TRAINING_PACKAGES - {"psutil"}
    files = [path for path in (ROOT / "toolkit").glob("*.py") if "ArgumentParser(" in path.read_text("utf-8")]
    commands = [f"toolkit.{path.stem}" for path in files]
    script = f"import sys, {', '.join(commands)}; print(*({slow!r} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert len(commands) >= 10 and done.returncode == 0, done.stderr
    assert done.stdout.split() == []
