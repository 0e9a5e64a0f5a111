"""What Windows does otherwise, simulated: files in use, consoles, long paths, line ends, processes."""

import ast
import errno
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from toolkit import command
from toolkit.diffusion.errors import BadInput
from toolkit.evaluation.report import write_report
from toolkit.runtime import files
from toolkit.runtime.files import atomic_path, free_path, load_tensors, save_tensors
from toolkit.training.vocabulary import _write_tokenizer

ROOT = Path(__file__).resolve().parent.parent
NEW, OLD = {"x": torch.ones(3)}, {"x": torch.zeros(3)}
SOURCES = [path for room in ("toolkit", "nodes", "a1111", "scripts") for path in (ROOT / room).rglob("*.py")]


def lock(monkeypatch: pytest.MonkeyPatch, path: Path, *, times: int = 10**6) -> list[Path]:
    """os.replace refuses to replace `path` so many times; the attempts. Nobody waits."""
    attempts: list[Path] = []
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if path in (Path(source), Path(target)):
            attempts.append(Path(target))
            if len(attempts) <= times:
                raise PermissionError(errno.EACCES, "Access is denied")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    return attempts


def test_a_file_that_is_in_use_for_a_moment_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_tensors(OLD, {}, tmp_path / "student.safetensors")
    attempts = lock(monkeypatch, path, times=3)
    assert save_tensors(NEW, {}, path) == path and len(attempts) == 4
    assert torch.equal(load_tensors(path)["x"], NEW["x"]) and not caplog.messages


def test_a_student_that_a_host_has_open_is_left_and_the_new_one_stands_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_tensors(OLD, {}, tmp_path / "student.safetensors")
    (tmp_path / "student-2.safetensors").write_bytes(b"somebody's")
    lock(monkeypatch, path)
    written = save_tensors(NEW, {}, path)
    assert written.name == "student-3.safetensors"
    assert torch.equal(load_tensors(written)["x"], NEW["x"])
    assert torch.equal(load_tensors(path)["x"], OLD["x"])
    assert len(caplog.messages) == 1 and "another program has this file open" in caplog.text
    assert "student-3.safetensors" in caplog.text and len(os.listdir(tmp_path)) == 3


def test_a_report_that_is_open_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old", encoding="utf-8")
    lock(monkeypatch, path)
    write_report(path, title="t", facts={}, pictures=(), rows=(), curves=(), command="c", verdict=None)
    assert path.read_text(encoding="utf-8") == "old"
    assert "<title>t" in (tmp_path / "report-2.html").read_text(encoding="utf-8")


def test_a_folder_in_which_a_file_is_open_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "unet").write_text("old", encoding="utf-8")
    lock(monkeypatch, tmp_path / "student")
    with free_path(tmp_path / "student") as place:
        place.partial.mkdir()
    assert place.path == tmp_path / "student-2" and place.path.is_dir()
    assert (tmp_path / "student" / "unet").read_text(encoding="utf-8") == "old"


def test_what_may_have_no_other_name_is_a_sentence_that_says_what_to_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "latest.pt"
    path.write_text("old", encoding="utf-8")
    lock(monkeypatch, path)
    with pytest.raises(BadInput, match="close the program that has it open"), atomic_path(path) as partial:
        partial.write_text("new", encoding="utf-8")
    assert os.listdir(tmp_path) == ["latest.pt"]


def test_a_path_that_is_too_long_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"its path has \d+ characters, too many"):
        save_tensors(NEW, {}, tmp_path / ("long" * 100) / "student.safetensors")


def speaking(monkeypatch: pytest.MonkeyPatch, main: Callable[[], None]) -> bytes:
    """What a command says on a console of 256 letters."""
    said = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(said, encoding="cp1252", write_through=True))
    with pytest.raises(SystemExit):
        command.run(main)
    return said.getvalue()


def test_a_console_of_256_letters_gets_every_message_and_progress_bar(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def main() -> None:
        print("狐.safetensors: σ ≥ 1")
        for _ in tqdm(range(2), desc="狐"):
            pass
        raise BadInput("é 狐.safetensors: no such file")

    said = speaking(monkeypatch, main)
    assert said.startswith(rb"\u72d0.safetensors: \u03c3 \u2265 1") and b"2/2" in said
    assert b"\xe9 \\u72d0.safetensors: no such file" in said


def test_files_that_are_shared_have_the_same_line_ends_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_text(self: Path, text: str, encoding: str | None = None, newline: str | None = None) -> None:
        self.write_bytes(
            text.replace("\n", "\r\n" if newline is None else newline).encode(encoding or "cp1252")
        )

    monkeypatch.setattr(Path, "write_text", write_text)
    _write_tokenizer(tmp_path, {"a": 0}, ["a b"])
    assert (tmp_path / "merges.txt").read_bytes() == b"#version: 0.2\na b\n"


def calls_of(tree: ast.AST) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def test_nothing_forks_or_needs_triton_and_importing_a_command_does_not_run_it() -> None:
    """Windows starts a worker by importing the main module anew, and has no os.fork and no triton."""
    modules = {"multiprocessing", "triton", "fcntl", "resource", "pwd"}
    calls = {"os.fork", "torch.compile", "DataLoader", "torch.utils.data.DataLoader"}
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = list(ast.walk(tree))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not modules & {name.partition(".")[0] for name in names}, path
        allowed = {"torch.compile"} if path.name == "tuning.py" else set()  # asked for, and with a way back
        assert not (calls - allowed) & calls_of(tree), path
        at_import = [node for node in tree.body if isinstance(node, ast.Expr | ast.Assign)]
        assert not any({"run", "main"} & calls_of(node) for node in at_import), path


def test_the_public_checks_run_the_readmes_test_command_on_windows_too() -> None:
    yaml = pytest.importorskip("yaml")
    text = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    (job,) = yaml.safe_load(text)["jobs"].values()
    assert job["runs-on"] == "${{ matrix.os }}" and "windows-latest" in job["strategy"]["matrix"]["os"]
    runs = [step["run"] for step in job["steps"] if "run" in step]
    assert runs[0] == "python -m toolkit.start test"
    assert f"    {runs[0]}\n" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert runs[1].startswith("python -m toolkit.start demo")
