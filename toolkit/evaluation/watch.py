"""A page on a run that goes on: pictures as they appear, loss, time left, the verdict so far.

It only reads, answers this machine alone (127.0.0.1, and to no other name, so that no web page can ask it by
a name of its own), and hands out nothing but the page, the pictures in ``samples`` and the report. It needs
no JavaScript: the browser is told to load it again.
"""

from __future__ import annotations

import html
import json
import os
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from .report import STYLE, charts, timings

HERE = "127.0.0.1"
RELOAD_SECONDS = 15

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@contextmanager
def watched(out: Path) -> Generator[str]:
    """Serve the page of the run in ``out`` on a free port, until the end; gives its address."""
    server = RunServer(out)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.address
    finally:
        server.shutdown()
        server.server_close()


class RunServer(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = os.name != "nt"  # on Windows it would let two programs have one port

    def __init__(self, out: Path, port: int = 0) -> None:
        super().__init__((HERE, port), _Handler)
        self.out = out

    @property
    def address(self) -> str:
        return f"http://{HERE}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: RunServer  # type: ignore[reportIncompatibleVariableOverride]
    server_version, sys_version, timeout = "FewStep", "", 30

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is the run's."""

    def _answer(self, *, with_body: bool) -> None:
        port = self.server.server_port
        if self.headers.get("Host") not in (f"{HERE}:{port}", f"localhost:{port}"):
            return self._send(HTTPStatus.FORBIDDEN, "text/plain", b"asked by a foreign name", with_body)
        path = unquote(urlsplit(self.path).path)
        if path == "/":
            body = page(self.server.out).encode()
            return self._send(HTTPStatus.OK, "text/html; charset=utf-8", body, with_body)
        if (file := public_file(self.server.out, path)) is None:
            return self._send(HTTPStatus.NOT_FOUND, "text/plain", b"there is no such page", with_body)
        kind = "image/png" if file.suffix == ".png" else "text/html; charset=utf-8"
        return self._send(HTTPStatus.OK, kind, file.read_bytes(), with_body)

    def _send(self, status: HTTPStatus, kind: str, body: bytes, with_body: bool) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def public_file(out: Path, path: str) -> Path | None:
    """The file behind an address: the report, or one of the pictures by its bare name; no link out of the
    run's folder.
    """
    public = {f"/samples/{picture.name}": picture for picture in (out / "samples").glob("*.png")}
    public["/report.html"] = out / "report.html"
    file = public.get(path)
    if file is None or not file.is_file() or not file.resolve().is_relative_to(out.resolve()):
        return None
    return file


def page(out: Path) -> str:
    """The page, from what the run has written so far."""
    lines = _lines(out / "run.jsonl")
    pictures = sorted((out / "samples").glob("*.png"), key=lambda p: (-p.stat().st_mtime, p.name))
    parts = [f"<h1>{html.escape(out.resolve().name)}</h1>", f"<p>{html.escape(_status(lines))}</p>"]
    verdict = out / "state" / "verdict.txt"
    if verdict.exists():
        parts.append(f'<p class="verdict">{html.escape(verdict.read_text(encoding="utf-8"))}</p>')
    if (out / "report.html").exists():
        parts.append('<p><a href="/report.html">The report</a></p>')
    if lines:
        parts += [timings(lines), charts(lines)]
    if pictures:
        parts.append("<h2>Pictures, the latest first</h2>")
    parts += [
        f'<figure><div class="paper"><img loading="lazy" src="/samples/{quote(picture.name)}" '
        f'alt="{html.escape(picture.stem)}"></div><figcaption>{html.escape(picture.stem)}</figcaption></figure>'
        for picture in pictures
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="refresh" content="{RELOAD_SECONDS}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(out.resolve().name)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """Of run.jsonl; a last line that is being written is left out."""
    if not path.exists():
        return []
    found: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return found


def _status(lines: Sequence[dict[str, Any]]) -> str:
    if not lines:
        return "Nothing was trained yet: what is learned from is being made."
    last = lines[-1]
    return (
        f"Phase {last['phase']}, update {last['update']}: loss {last['loss']:.4g}, "
        f"{last['images_per_second']:.3g} pictures a second, {_told(last['eta_seconds'])} of training left."
    )


def _told(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
