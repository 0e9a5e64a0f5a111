"""A real A1111, Forge or reForge, started for the tests and talked to through its HTTP interface.

It is the one at ``WEBUI_PATH``, run by ``WEBUI_PYTHON``; its own files stay as they are.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from toolkit.training.vocabulary import load_tokenizer, save_tokenizer

SITE = Path(__file__).with_name("site")
START_SECONDS = 240
SETTINGS: dict[str, Any] = {
    "randn_source": "CPU",  # noise as torch.Generator of that seed draws it
    "samples_save": False,
    "grid_save": False,
    "show_progress_type": "Approx cheap",  # else a preview model is downloaded
    "sd_checkpoints_limit": 1,
}
CLIP_CONFIG = {
    "model_type": "clip_text_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "vocab_size": 49408,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}


class Unavailable(Exception):
    """No WebUI can be had here, and why."""


class Refused(Exception):
    """The host answered with an error; ``code``: HTTP's."""

    def __init__(self, code: int, answer: Mapping[str, Any]) -> None:
        super().__init__(str(answer.get("errors") or answer.get("detail") or answer))
        self.code = code


@dataclass(frozen=True)
class Host:
    """``kind``: "a1111", "forge" or "reforge"."""

    folder: Path
    python: Path
    kind: str


@dataclass(frozen=True)
class Picture:
    """``png``: the file's bytes; ``seen``: what the probe saw meanwhile, of the last picture alone."""

    pngs: list[bytes]
    info: dict[str, Any]
    seen: dict[str, Any]

    @property
    def png(self) -> bytes:
        return self.pngs[0]

    @property
    def infotext(self) -> str:
        return self.info["infotexts"][0]

    @property
    def rows(self) -> int:
        """UNet evaluations, each row of a batch counted."""
        return sum(call["rows"] for call in self.seen["calls"])

    @property
    def timesteps(self) -> list[int]:
        return [round(call["timesteps"][0]) for call in self.seen["calls"]]

    @property
    def latent(self) -> torch.Tensor:
        """(B, 4, H, W) as it left the sampler."""
        return torch.tensor(self.seen["samples"][-1])

    @property
    def start(self) -> torch.Tensor:
        """(B, 4, H, W) as it entered the last pass: noise, or the picture's latent."""
        return torch.tensor(self.seen["start"])

    @property
    def context(self) -> torch.Tensor:
        """The prompt as the UNet got it, of the last evaluation."""
        return torch.tensor(self.seen["context"])

    @property
    def pixels(self) -> Image.Image:
        return Image.open(io.BytesIO(self.png)).convert("RGB")


def find_host() -> Host:
    """Raises Unavailable, or ValueError for a WEBUI_PATH that holds no WebUI."""
    given = os.environ.get("WEBUI_PATH")
    if not given:
        raise Unavailable("WEBUI_PATH names no A1111, Forge or reForge to test with")
    folder = Path(given)
    if not (folder / "launch.py").is_file():
        raise ValueError(f"WEBUI_PATH={given}: there is no launch.py in that folder")
    kind = "a1111" if not (folder / "modules_forge").is_dir() else "reforge"
    kind = "forge" if (folder / "backend").is_dir() else kind
    return Host(folder, Path(os.environ.get("WEBUI_PYTHON") or sys.executable), kind)


class WebUI:
    """A running server with a data directory of its own, as a context manager.

    ``extensions``: name -> folder. Raises RuntimeError, with the end of the log, if it does not come up.
    """

    def __init__(
        self, host: Host, base: Path, extensions: Mapping[str, Path], settings: Mapping[str, Any]
    ) -> None:
        for name in ("extensions", "models/Stable-diffusion", "models/Lora", "models/VAE", "embeddings"):
            (base / name).mkdir(parents=True, exist_ok=True)
        for name, folder in extensions.items():
            if not (link := base / "extensions" / name).exists():
                link.symlink_to(folder.resolve(), target_is_directory=True)
        (base / "config.json").write_text(json.dumps({**SETTINGS, **settings}), encoding="utf-8")
        (base / "ui-config.json").write_text("{}", encoding="utf-8")
        self.host, self.base, self.log_file = host, base, base / "webui.log"

    def __enter__(self) -> WebUI:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        slow = ["--use-cpu", "all"] if self.host.kind == "a1111" else ["--always-cpu", "--all-in-fp32"]
        arguments = ["--skip-prepare-environment", "--skip-torch-cuda-test", "--skip-python-version-check"]
        arguments += ["--skip-version-check", "--no-half", "--do-not-download-clip", "--no-download-sd-model"]
        arguments += ["--api", "--server-name", "127.0.0.1", "--port", str(self.port)]
        arguments += ["--data-dir", str(self.base), "--gradio-allowed-path", str(self.host.folder), *slow]
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": str(self._tokenizer())}
        quiet = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
        with open(self.log_file, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [str(self.host.python), "launch.py", *arguments],
                cwd=self.host.folder,
                env={**os.environ, **offline, **quiet, "PYTHONPATH": str(SITE), "COMMANDLINE_ARGS": ""},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait_until_it_answers()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def txt2img(self, **choices: Any) -> Picture:
        return self._picture("txt2img", choices)

    def img2img(self, image: Image.Image, **choices: Any) -> Picture:
        mask = choices.pop("mask", None)
        more = {} if mask is None else {"mask": encoded(mask)}
        return self._picture("img2img", {"init_images": [encoded(image)], **more, **choices})

    def knows(self, *names: str) -> None:
        """Let the host list checkpoints and LoRAs that were made since it started."""
        listed = {Path(entry["filename"]).name for entry in self.get("/sdapi/v1/sd-models")}
        if not set(names) <= listed:
            self.post("/sdapi/v1/refresh-checkpoints", {})

    def state(self) -> dict[str, Any]:
        return self.get("/probe/state")

    def get(self, path: str) -> Any:
        return self._fetch(path)

    def post(self, path: str, value: Any) -> Any:
        return self._fetch(path, json.dumps(value).encode())

    def _picture(self, path: str, choices: Mapping[str, Any]) -> Picture:
        usual = {"prompt": "a fox", "seed": 5, "steps": 4, "width": 64, "height": 64, "cfg_scale": 7}
        answer = self.post(f"/sdapi/v1/{path}", {**usual, "sampler_name": "FewStep", **choices})
        pngs = [base64.b64decode(image.split(",", 1)[-1]) for image in answer["images"]]
        return Picture(pngs, json.loads(answer["info"]), self.get("/probe/seen"))

    def _fetch(self, path: str, body: bytes | None = None) -> Any:
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        try:
            with _DIRECT.open(request, timeout=600) as answer:
                return json.loads(answer.read() or "null")
        except urllib.error.HTTPError as error:
            text = error.read().decode()
            raise Refused(error.code, json.loads(text) if text[:1] == "{" else {"detail": text}) from None

    def _tokenizer(self) -> Path:
        """A hub cache with CLIP's vocabulary, which A1111 would download."""
        model = self.base / "hub" / "hub" / "models--openai--clip-vit-large-patch14"
        snapshot = model / "snapshots" / "local"
        if not snapshot.is_dir():
            snapshot.mkdir(parents=True)
            (model / "refs").mkdir()
            (model / "refs" / "main").write_text("local", encoding="utf-8")
            save_tokenizer(load_tokenizer(None), snapshot)
            (snapshot / "tokenizer.json").unlink(missing_ok=True)  # of a newer transformers than the host's
            (snapshot / "tokenizer_config.json").write_text('{"model_max_length": 77}', encoding="utf-8")
            (snapshot / "config.json").write_text(json.dumps(CLIP_CONFIG), encoding="utf-8")
        return self.base / "hub"

    def _wait_until_it_answers(self) -> None:
        """Nothing is asked before the host says it is up: A1111 cannot start once a request has come in
        between its page and its API.
        """
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            if "Startup time" in self.log:
                with suppress(OSError, Refused):
                    self.get("/probe/seen")
                    return
            time.sleep(0.5)
        raise RuntimeError(f"the WebUI did not start:\n{self.log[-4000:]}")

    def _end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def encoded(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def parameters(png: bytes) -> str:
    """The infotext in a PNG."""
    found = Image.open(io.BytesIO(png))
    assert isinstance(found, PngImageFile)
    return str(found.text["parameters"])


def small_config(host: Host, target: Path, *, inpaint: bool) -> None:
    """A1111 reads a UNet's shape from a file beside the checkpoint: its own, with the small shape's."""
    name = "v1-inpainting-inference.yaml" if inpaint else "v1-inference.yaml"
    lines: Sequence[str] = (host.folder / "configs" / name).read_text(encoding="utf-8").splitlines()
    changes = {"attention_resolutions": "[ 1 ]", "num_res_blocks": "1", "channel_mult": "[ 1, 1 ]"}
    made: list[str] = []
    for line in lines:
        key = line.split(":")[0].strip()
        if key in changes:
            line = line.split(":")[0] + ": " + changes.pop(key)  # the UNet's stand before the VAE's
        made.append(line)
    target.write_text("\n".join(made), encoding="utf-8")


def remove(base: Path) -> None:
    shutil.rmtree(base, ignore_errors=True)


_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
