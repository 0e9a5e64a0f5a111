"""What ships to ComfyUI's users: no call that a registry's scanner flags, and nothing missing."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomllib
from PIL import Image

ROOT = Path(__file__).parents[1]
NODES = sorted((ROOT / "nodes").glob("*.py"))
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
OF_THE_HOST = {
    "aiohttp",
    "comfy",
    "comfy_api",
    "comfy_execution",
    "folder_paths",
    "latent_preview",
    "node_helpers",
    "server",
}
FLAGGED_MODULES = set(
    "subprocess multiprocessing pickle dill marshal shelve ctypes importlib runpy pip socket urllib http "
    "ftplib smtplib requests httpx huggingface_hub webbrowser".split()
)
FLAGGED_CALLS = set("eval exec compile __import__ os.system os.popen os.startfile os.execv".split())


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> set[Path]:
    """Git's reading of .comfyignore, whose syntax is .gitignore's, in a checkout and in a bare copy alike."""
    empty = tmp_path_factory.mktemp("empty") / "repository"
    subprocess.run(["git", "init", "--quiet", "--bare", str(empty)], check=True)
    # To a repository without an index every file is "other", tracked or not.
    command = ["git", f"--git-dir={empty}", f"--work-tree={ROOT}", "ls-files", "--others", "-z"]
    command += ["--exclude-standard", "--exclude-from=.comfyignore"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {ROOT / name for name in done.stdout.split("\0") if name}


def flagged(source: str) -> list[str]:
    """What a scanner would stop at."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FLAGGED_MODULES]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [node.module or ""] if (node.module or "").split(".")[0] in FLAGGED_MODULES else []
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            safe = any(
                key.arg == "weights_only" and ast.unparse(key.value) == "True" for key in node.keywords
            )
            found += [name] if name in FLAGGED_CALLS or (name == "torch.load" and not safe) else []
    return found


def imported(source: str) -> set[str]:
    """The top names of absolute imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


def node_classes() -> dict[str, ast.ClassDef]:
    """Class name -> class, of every class whose base is written ``io.ComfyNode``."""
    classes: dict[str, ast.ClassDef] = {}
    for path in NODES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and "io.ComfyNode" in map(ast.unparse, node.bases):
                classes[node.name] = node
    return classes


def node_id(node: ast.ClassDef) -> Any:
    """The value of ``node_id=`` in a node's schema; None if it is no literal, as a static scanner sees it."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "io.Schema":
            (value,) = [key.value for key in call.keywords if key.arg == "node_id"]
            return value.value if isinstance(value, ast.Constant) else None
    return None


def listed_nodes() -> set[str]:
    """The classes that the extension hands to the host."""
    tree = ast.parse((ROOT / "nodes" / "__init__.py").read_text(encoding="utf-8"))
    (returned,) = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Return) and isinstance(node.value, ast.List)
    ]
    return {ast.unparse(element) for element in returned.elts}


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess",
        "from urllib.request import urlopen",
        "eval('1')",
        "__import__('x')",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
    ],
)
def test_what_a_scanner_stops_at_is_found(source: str) -> None:
    assert flagged(source)


def test_nothing_that_ships_is_flagged(shipped: set[Path]) -> None:
    python = [path for path in shipped if path.suffix == ".py"]
    assert python
    found = {str(path.relative_to(ROOT)): flagged(path.read_text(encoding="utf-8")) for path in python}
    assert {name: what for name, what in found.items() if what} == {}


def test_what_the_nodes_need_ships_and_what_only_training_needs_does_not(shipped: set[Path]) -> None:
    names = {path.relative_to(ROOT).as_posix() for path in shipped}
    assert {"__init__.py", "nodes/host.py", "toolkit/runtime/student.py", "web/js/fewstep.js"} <= names
    assert {"LICENSE", "README.md", "pyproject.toml", "requirements.txt"} <= names
    assert "toolkit/demo/tokenizer/vocab.json" in names
    kept_out = (
        "tests/",
        ".ci/",
        "toolkit/training/",
        "toolkit/start.py",
        "distill.",
        "toolkit/demo/te",
        "toolkit/demo/j",
        "toolkit/demo/i",
    )
    assert [name for name in names if name.startswith(kept_out)] == []
    assert sum(path.stat().st_size for path in shipped) < 3e6


def test_every_relative_import_of_what_ships_leads_to_what_ships(shipped: set[Path]) -> None:
    python = {path for path in shipped if path.suffix == ".py"}
    missing: list[str] = []
    for path in python:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or node.level == 0:
                continue
            package = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            names = [package / alias.name for alias in node.names]
            for target in [package] if node.module else names:
                if not {target.with_suffix(".py"), target / "__init__.py"} & python:
                    missing.append(f"{path.relative_to(ROOT)}: {ast.unparse(node)}")
    assert missing == []


@pytest.mark.parametrize("path", NODES, ids=lambda path: path.name)
def test_a_node_file_imports_the_host_torch_safetensors_and_the_standard_library_alone(path: Path) -> None:
    allowed = set(sys.stdlib_module_names) | OF_THE_HOST | {"torch", "safetensors"}
    assert imported(path.read_text(encoding="utf-8")) - allowed == set()


def test_every_node_has_a_literal_id_that_is_its_class_name_and_is_listed() -> None:
    assert {name: node_id(node) for name, node in node_classes().items()} == {
        name: name for name in listed_nodes()
    }
    assert all(name.startswith("FewStep") for name in listed_nodes())


def test_every_node_has_a_help_page_that_names_all_of_its_inputs() -> None:
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "web" / "docs").glob("*.md")}
    assert set(pages) == listed_nodes()
    for name, node in node_classes().items():
        (execute,) = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "execute"]
        inputs = [argument.arg for argument in execute.args.args if argument.arg != "cls"]
        assert [i for i in inputs if f"`{i}`" not in pages[name]] == [], name


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_an_example_workflow_has_a_picture_and_whole_links(path: Path) -> None:
    with Image.open(path.with_suffix(".jpg")) as picture:
        picture.load()
        assert picture.format == "JPEG" and min(picture.size) >= 400
    workflow = json.loads(path.read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert any(node["type"].startswith("FewStep") for node in nodes.values())
    for link, source, output, target, slot, _ in workflow["links"]:
        assert link in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == link


def test_the_registry_finds_what_it_needs(shipped: set[Path]) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, comfy = settings["project"], settings["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9]*", project["name"]) and "comfy" not in project["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert isinstance(project["license"], dict)
    assert comfy["PublisherId"] and comfy["DisplayName"] and comfy["requires-comfyui"] == ">=0.3.64"
    assert ROOT / comfy["Icon"] in shipped


def test_the_extension_is_one_file_that_draws_nothing_itself() -> None:
    (script,) = (ROOT / "web").rglob("*.js")
    text = script.read_text(encoding="utf-8")
    assert not re.search(r"onDraw|getContext|\.draw\(|addCustomWidget|eval\(|innerHTML", text)
