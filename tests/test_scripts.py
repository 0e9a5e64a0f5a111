"""distill.sh and distill.bat, and what a person reads whose Python or whose torch will not do."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit import cards, start

ROOT = Path(__file__).resolve().parent.parent
NEW_CARD, OLD_DRIVER, OLD_CARD = "580.65.06, 8.6", "560.94, 8.9", "581.1, 6.1"

FAKE = """#!/bin/sh
case "$1" in -c) exit {refuses} ;; esac
printf '%s\\n' "$0" "$PWD" "$PYTHONPATH" "$@"
exit 7
"""

unix = pytest.mark.skipif(os.name == "nt", reason="a shell script")


def run_script(folder: Path, pythons: dict[str, int]) -> subprocess.CompletedProcess[str]:
    """distill.sh in a folder, with these Pythons (name -> exit code of the test of their version) alone."""
    tools = folder / "tools"
    tools.mkdir()
    (tools / "dirname").symlink_to("/usr/bin/dirname")
    for name, refuses in pythons.items():
        (tools / name).write_text(FAKE.format(refuses=refuses))
        (tools / name).chmod(0o755)
    command = ["/bin/sh", str(ROOT / "distill.sh"), "--ckpt", "a b.safetensors"]
    environment = {"PATH": str(tools), "PYTHONPATH": "/mine"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@unix
def test_the_shell_script_runs_in_the_callers_folder_with_what_was_typed(tmp_path: Path) -> None:
    done = run_script(tmp_path, {"python3": 0})
    assert done.returncode == 7, done.stderr
    python, folder, path, *words = done.stdout.splitlines()
    assert Path(python).name == "python3" and Path(folder).samefile(tmp_path) and path == f"{ROOT}:/mine"
    assert words == ["-m", "toolkit.start", "distill", "--ckpt", "a b.safetensors"]


@unix
def test_the_shell_script_passes_over_an_old_python_and_says_when_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    done = run_script(tmp_path / "some", {"python3": 1, "python3.12": 0})
    assert Path(done.stdout.splitlines()[0]).name == "python3.12"
    (tmp_path / "none").mkdir()
    done = run_script(tmp_path / "none", {"python3": 1})
    assert done.returncode == 2 and "no Python 3.11" in done.stderr and len(done.stderr.splitlines()) == 1


@unix
def test_the_shell_script_can_be_called() -> None:
    assert (ROOT / "distill.sh").stat().st_mode & stat.S_IXUSR


def test_the_batch_file_is_one_that_cmd_reads() -> None:
    """No Windows here: what is known to break batch files is looked for."""
    data = (ROOT / "distill.bat").read_bytes()
    assert data.count(b"\n") == data.count(b"\r\n") and data.isascii()
    lines = [line for line in data.decode().splitlines() if not line.startswith("rem ")]
    labels = {line[1:] for line in lines if line.startswith(":")}
    assert {word for line in lines for word in re.findall(r"goto (\w+)", line)} == labels
    assert not any(line.rstrip().endswith("(") for line in lines), "a ) in a file's name would end a block"
    runs = [line for line in lines if line.endswith("distill %*")]
    assert [line.split()[0] for line in runs] == ["py", "python", '"%EMBEDDED%"']
    assert all(lines[lines.index(line) + 1] == "exit /b %errorlevel%" for line in runs)
    assert start.INSTALL_PYTHON in data.decode()


def test_git_keeps_the_scripts_line_ends() -> None:
    kept = (ROOT / ".gitattributes").read_text(encoding="utf-8")
    assert "*.bat text eol=crlf" in kept and "*.sh text eol=lf" in kept


def test_a_portable_comfyuis_python_is_answered_with_what_to_type(tmp_path: Path) -> None:
    """By its path and isolated, as such a Python runs a file: neither the package nor its folder is known."""
    prefix = tmp_path / "ComfyUI_windows_portable" / "python_embeded"
    script = (
        "import runpy, sys; "
        f"sys.prefix = {str(prefix)!r}; sys.argv = ['start.py', 'distill', '--ckpt', 'a b.safetensors']; "
        f"runpy.run_path({str(ROOT / 'toolkit' / 'start.py')!r}, run_name='__main__')"
    )
    command = [sys.executable, "-I", "-S", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    sentence, install, again = done.stderr.splitlines()
    assert sentence.startswith("fewstep: python_embeded is the Python of a portable ComfyUI")
    assert install.strip() == "winget install -e --id Python.Python.3.12"
    assert again.strip() == f'"{ROOT / "distill.bat"}" --ckpt "a b.safetensors"'
    assert not prefix.exists()


def test_an_embedded_python_is_told_from_others(tmp_path: Path) -> None:
    assert start.is_embedded(tmp_path / "python_embeded", has_venv=True)
    assert start.is_embedded(tmp_path / "Python_Embedded", has_venv=False)
    assert not start.is_embedded(tmp_path, has_venv=False)
    (tmp_path / "python312._pth").touch()
    assert start.is_embedded(tmp_path, has_venv=False)
    assert not start.is_embedded(tmp_path, has_venv=True)


@pytest.mark.parametrize(
    ("told", "windows", "index"),
    [
        (NEW_CARD, True, "https://download.pytorch.org/whl/cu130"),
        (NEW_CARD, False, None),
        (OLD_DRIVER, True, "https://download.pytorch.org/whl/cu126"),
        (OLD_CARD, False, "https://download.pytorch.org/whl/cu126"),
        ("", True, None),
        ("No devices were found", True, None),
    ],
)
def test_the_index_follows_the_card_and_its_driver(told: str, windows: bool, index: str | None) -> None:
    assert cards.index(told, windows=windows, environment={}) == index
    assert cards.index(told, windows=windows, environment={"PIP_EXTRA_INDEX_URL": "https://mine"}) is None


def test_nvidia_smi_that_is_not_there_or_fails_tells_of_no_card() -> None:
    for query in (("no-such-nvidia-smi",), (sys.executable, "-c", "print('580, 8.6'); raise SystemExit(9)")):
        assert cards.ask(query) == ""
    assert cards.ask((sys.executable, "-c", f"print({NEW_CARD!r})")) == NEW_CARD


def test_a_card_beside_a_torch_without_cuda_is_one_sentence_with_the_command() -> None:
    python = r"C:\Users\me\.venv\Scripts\python.exe"
    said = cards.mending(NEW_CARD, torch="2.13.0+cpu", computes=False, python=python)
    assert said is not None and "\n" not in said
    assert said.endswith(
        f'"{python}" -m pip install torch==2.13.0+cu130 --extra-index-url https://download.pytorch.org/whl/cu130'
    )
    assert cards.mending(NEW_CARD, torch="2.13.0+cu130", computes=True, python=python) is None
    assert cards.mending("", torch="2.13.0+cpu", computes=False, python=python) is None


def test_the_commands_say_it_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    torch = pytest.importorskip("torch")
    from toolkit import assembly, opening

    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "xpu", None, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cards, "ask", lambda: NEW_CARD)
    opening.say_unused_card.cache_clear()
    assert assembly._device({}) == "cpu" and assembly._device({}) == "cpu"
    opening.choose_device(None)
    assert len(caplog.messages) == 1 and "-m pip install torch==" in caplog.messages[0]
    opening.say_unused_card.cache_clear()
    opening.choose_device("cpu")
    assert len(caplog.messages) == 1, "whoever asks for the processor knows"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    opening.choose_device(None)
    assert len(caplog.messages) == 1
    opening.say_unused_card.cache_clear()
