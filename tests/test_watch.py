"""The page on a run that goes on: what it shows, and that nothing else can be had from it."""

from __future__ import annotations

import http.client
import json
from pathlib import Path

import pytest
from PIL import Image

from toolkit.diffusion.errors import BadInput
from toolkit.evaluation import watch
from toolkit.evaluation.watch import page, watched
from toolkit.training import board


@pytest.fixture
def out(tmp_path) -> Path:
    run = tmp_path / "my run"
    (run / "samples").mkdir(parents=True)
    (run / "state").mkdir()
    for name in ("start", "guided-000100"):
        Image.new("RGB", (4, 4)).save(run / "samples" / f"{name}.png")
    line = {"time": 0.0, "phase": "guided", "phase_index": 0, "update": 100, "loss": 0.25, "lr": 1e-4}
    line |= {"images_per_second": 2.0, "eta_seconds": 600.0}
    (run / "run.jsonl").write_text(json.dumps(line) + '\n{"phase": "gui', encoding="utf-8")
    (run / "state" / "verdict.txt").write_text("pilot: going well, 1 < 2", encoding="utf-8")
    (run / "config.toml").write_text('ckpt = "/home/somebody/secret.safetensors"\n', encoding="utf-8")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "samples-secret.txt").write_text("secret", encoding="utf-8")
    return run


def asked(address: str, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers; the path goes out as it stands, which browsers would tidy."""
    host, port = address.removeprefix("http://").rstrip("/").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    connection.putrequest(method, path, skip_host=True)
    for name, value in {"Host": f"{host}:{port}", **headers}.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, answer.read(), dict(answer.getheaders())
    connection.close()
    return found


def test_the_page_shows_pictures_loss_time_left_and_verdict_and_reloads_itself(out):
    with watched(out) as address:
        status, body, headers = asked(address, "/")
        text = body.decode()
        assert status == 200 and "my run" in text and str(out.parent) not in text and "somebody" not in text
        assert "update 100: loss 0.25, 2 pictures a second, 10 min of training left" in text
        assert "pilot: going well, 1 &lt; 2" in text and 'http-equiv="refresh"' in text and "<svg" in text
        assert "default-src 'none'" in headers["Content-Security-Policy"] and "<script" not in text
        assert 'src="/samples/guided-000100.png"' in text and "/report.html" not in text
        assert asked(address, "/samples/start.png")[1] == (out / "samples" / "start.png").read_bytes()
        Image.new("RGB", (4, 4)).save(out / "samples" / "fold-2.png")
        (out / "report.html").write_text("<p>done", encoding="utf-8")
        text = asked(address, "/")[1].decode()
        assert "fold-2.png" in text and 'href="/report.html"' in text
        assert asked(address, "/report.html")[1] == b"<p>done"


def test_before_the_first_update_the_page_says_what_is_being_done(tmp_path):
    assert "being made" in page(tmp_path)


@pytest.mark.parametrize(
    "path",
    [
        *("/config.toml", "/run.jsonl", "/state/verdict.txt", "/samples/", "/samples", "/samples/none.png"),
        *("/../secret.png", "/samples/../../secret.png", "/samples/..%2f..%2fsecret.png", "//etc/passwd"),
        *("/samples/%2e%2e/%2e%2e/secret.png", "/samples/..\\..\\secret.png", "/samples//etc/passwd"),
        *(
            "/samples/link.png",
            "/%2e%2e/samples-secret.txt",
            "/samples/start.png/..",
            "/samples/start.png%00",
        ),
    ],
)
def test_nothing_but_the_page_the_pictures_and_the_report_can_be_read(out, path):
    try:
        (out / "samples" / "link.png").symlink_to(out.parent / "secret.png")
    except OSError:  # on Windows links need a right that few have
        pass
    with watched(out) as address:
        status, body, _ = asked(address, path)
        assert status == 404 and b"secret" not in body


def test_only_this_machine_is_answered_and_only_under_its_own_name(out):
    with watched(out) as address:
        port = address.rstrip("/").split(":")[-1]
        assert address == f"http://127.0.0.1:{port}/"
        for host in (
            "evil.example",
            f"evil.example:{port}",
            "127.0.0.1",
            f"127.0.0.1.evil.example:{port}",
            "",
        ):
            status, body, _ = asked(address, "/", Host=host)
            assert status == 403 and b"my run" not in body
        assert asked(address, "/", Host=f"localhost:{port}")[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_can_be_written(out, method):
    with watched(out) as address:
        assert asked(address, "/", method)[0] == 501
        assert asked(address, "/", "HEAD")[:2] == (200, b"")


def test_the_port_is_free_again_afterwards_and_two_runs_have_two(out):
    with watched(out) as first, watched(out) as second:
        assert first != second
    server = watch.RunServer(out, int(first.rstrip("/").split(":")[-1]))
    server.server_close()


def test_tensorboard_logs_have_each_phase_and_without_the_package_it_is_said(tmp_path, monkeypatch):
    import sys
    from types import ModuleType

    written: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str, flush_secs: int) -> None:
            self.folder = folder

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append((self.folder, 0, 0))

    module = ModuleType("torch.utils.tensorboard.writer")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", ModuleType("torch.utils.tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", module)
    with board.tensorboard(tmp_path) as told:
        told({"phase": "fold-2", "update": 10, "loss": 0.5, "lr": 0.1, "images_per_second": 3.0, "time": 1.0})
    assert written[0] == ("loss/fold-2", 0.5, 10) and written[-1][0] == str(tmp_path / "tensorboard")
    assert len(written) == 4
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(BadInput, match="pip install tensorboard"), board.tensorboard(tmp_path):
        pass
