"""README and docs: each command has options that exist, each sentence is one that the software says, each
link leads somewhere, and the site is built from it all without anything from elsewhere.
"""

import argparse
import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from toolkit import start

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SITE = ROOT / "properdocs.yml"
SCRIPTS = {"./distill.sh": "toolkit.distill", "distill.bat": "toolkit.distill"}


class Parsed(Exception):
    """A command line was taken: nothing runs."""


def commands(text: str) -> list[str]:
    """What stands in code, in blocks and in lines, and begins as one of our commands."""
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.S | re.M)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    lines += [line.strip() for line in re.findall(r"^(?: {4}|\t)(.*)", text, re.M)]
    lines += re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    begins = re.compile(r"python3? -m toolkit[.\w]*  *\S|\./distill\.sh +\S|distill\.bat +\S")
    return list(dict.fromkeys(line for line in lines if begins.match(line)))


COMMANDS = [(page.name, line) for page in PAGES for line in commands(page.read_text(encoding="utf-8"))]


def words(line: str) -> tuple[str, list[str]]:
    """The module and its arguments; paths of Windows keep their backslashes."""
    first, *rest = shlex.split(line.replace("\\", "/"), comments=True)
    if first in SCRIPTS:
        return SCRIPTS[first], rest
    _, module, *arguments = rest
    if module == "toolkit.start":
        job, arguments = start.parse(arguments)
        module = start.JOBS[job].command[1]
        arguments = [*start.JOBS[job].command[2:], *arguments]
    return module, arguments


def test_the_commands_of_the_docs_are_found() -> None:
    names = {module for _, line in COMMANDS for module in [words(line)[0]]}
    assert len(COMMANDS) > 40 and {"toolkit.distill", "toolkit.sample", "toolkit.export"} <= names
    assert sum(name == "first-night.md" for name, _ in COMMANDS) >= 7


def test_every_command_in_the_docs_has_options_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    real = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> None:
        raise Parsed(real(self, args, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    wrong = []
    for page, line in COMMANDS:
        name, arguments = words(line)
        if name == "pytest":
            continue
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        try:
            getattr(module, "_parse", module.main)()
        except Parsed:
            continue
        except SystemExit as end:
            if end.code == 0:  # --help
                continue
            wrong.append(f"{page}: {line}")
        else:
            raise AssertionError(f"{name} ran")
    assert wrong == []


def spoken() -> list[str]:
    """Every text in the sources; where a value stands in one, a line's end, which no text of a page has."""
    found: list[str] = []
    for room in ("toolkit", "nodes", "a1111"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    parts = (p.value if isinstance(p, ast.Constant) else "\n" for p in node.values)
                    found.append("".join(map(str, parts)))
    return [*found, *((ROOT / name).read_text(encoding="utf-8") for name in ("distill.sh", "distill.bat"))]


def test_every_sentence_of_the_page_on_trouble_is_one_that_the_software_says() -> None:
    text = (ROOT / "docs" / "trouble.md").read_text(encoding="utf-8")
    firsts = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
    sentences = [said for first in firsts for said in re.findall(r'"([^"]+)"', first)]
    said = spoken()
    parts = [part.strip(" :;") for sentence in sentences for part in sentence.split("...")]
    assert len(sentences) > 25
    assert [part for part in parts if part and not any(part in text for text in said)] == []


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ +(.*)", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def links() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in link:
                yield page, link


def test_every_link_leads_somewhere() -> None:
    broken = []
    for page, link in links():
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            broken.append(f"{page.name}: {link}")
    assert broken == []


def test_the_site_has_every_page_and_takes_nothing_from_elsewhere(tmp_path: Path) -> None:
    """Built strictly: a broken link or anchor fails."""
    pytest.importorskip("properdocs", reason="properdocs is missing: pip install -r requirements-dev.txt")
    command = [sys.executable, "-m", "properdocs", "build", "--strict", "-f", str(SITE), "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    pages = [page.stem for page in PAGES if page.name not in ("README.md", "index.md")]
    assert all((tmp_path / page / "index.html").is_file() for page in pages)
    for file in tmp_path.rglob("*"):
        if file.suffix == ".html":
            assert loaded_from_elsewhere(file.read_text(encoding="utf-8")) == [], file
        elif file.suffix == ".css":
            assert not re.findall(
                r"(?:@import|url\()\s*[\"']?(?:https?:)?//", file.read_text(encoding="utf-8")
            )


def loaded_from_elsewhere(page: str) -> list[str]:
    """What a browser fetches from another host to show the page; links that people follow are none of it."""
    tags = re.findall(r"<(?:script|link|img|iframe|source|video|object|embed)\b[^>]*>", page)
    fetched = [tag for tag in tags if not re.search(r'rel="canonical"', tag)]
    return [tag for tag in fetched if re.search(r"(?:src|href|data)=[\"']?(?:https?:)?//", tag)]


def test_what_a_page_would_load_from_elsewhere_is_found() -> None:
    assert loaded_from_elsewhere('<script async src="https://cdn.example/x.js"></script>')
    assert loaded_from_elsewhere('<link rel="stylesheet" href="//fonts.example/css">')
    assert not loaded_from_elsewhere('<a href="https://example.org">x</a><script src="js/base.js"></script>')


def section(name: str, title: str) -> str:
    """What stands under a heading of the second rank."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@pytest.mark.slow
def test_the_demos_commands_run_as_they_are_written(tmp_path: Path) -> None:
    """Those of the first night and of the README, in their order; the demo itself in small."""
    short = ["--pictures", "64", "--updates", "8", "--report-prompts", "1"]
    first = commands(section("docs/first-night.md", "2. See it work, with the demo"))
    more = [line for line in commands(section("README.md", "Use a student")) if "runs/demo" in line]
    assert len(first) == 3 and len(more) == 5
    for line in [*first, *more]:
        module, arguments = words(line)
        command = [sys.executable, "-m", module, *arguments, *(short if module == "toolkit.distill" else [])]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False
        )
        assert done.returncode == 0, (line, done.stderr[-2000:])
    assert {"circle.png", "star.png", "baked.safetensors", "student-diffusers"} <= set(os.listdir(tmp_path))
    assert (tmp_path / "runs" / "demo-progressive-2" / "report.html").is_file()
