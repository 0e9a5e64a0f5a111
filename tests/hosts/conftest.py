"""One host for all tests of its kind, with this repository and a probe linked into it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts.bench import Bench
from hosts.comfyui import ComfyUI, Host, Unavailable, find_host
from hosts.models import Models
from hosts.webui import Unavailable as NoWebUI
from hosts.webui import WebUI, remove
from hosts.webui import find_host as find_webui
from hosts.webui_models import WebUIModels

ROOT = Path(__file__).parents[2]
PACKS = {"fewstep": ROOT, "probe": Path(__file__).with_name("probe")}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("webui" if item.path.name.startswith("test_webui") else "comfyui")


@pytest.fixture(scope="session")
def comfyui_host() -> Host:
    """A ComfyUI that can be started; without one the tests skip, and fail where CI=true promised one."""
    try:
        return find_host()
    except Unavailable as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def comfyui_base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The server's base directory; gone at the end, as the models are large."""
    base = tmp_path_factory.mktemp("comfyui")
    yield base
    shutil.rmtree(base, ignore_errors=True)


@pytest.fixture(scope="session")
def models(comfyui_base: Path) -> Models:
    """Made on first use: the host lists its folders anew at each prompt."""
    return Models(comfyui_base / "models")


@pytest.fixture(scope="session")
def comfyui(comfyui_host: Host, comfyui_base: Path) -> Iterator[ComfyUI]:
    """The running server."""
    with ComfyUI(comfyui_host, comfyui_base, PACKS, ["--preview-method", "latent2rgb"]) as server:
        yield server


@pytest.fixture
def bench(comfyui: ComfyUI, tmp_path: Path) -> Bench:
    """An empty graph on the server, and a folder for what goes in and out."""
    return Bench(comfyui, tmp_path)


EXTENSIONS = {"fewstep": ROOT, "fewstep_probe": Path(__file__).with_name("webui_probe")}


@pytest.fixture(scope="session")
def webui_base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    base = tmp_path_factory.mktemp("webui")
    yield base
    remove(base)


@pytest.fixture(scope="session")
def webui_models(webui_base: Path) -> WebUIModels:
    """Skips where WEBUI_PATH names no host."""
    try:
        return WebUIModels(find_webui(), webui_base / "models")
    except NoWebUI as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def webui(webui_models: WebUIModels, webui_base: Path) -> Iterator[WebUI]:
    """The running server, with a student selected."""
    selected = {"sd_model_checkpoint": webui_models.epsilon.name}
    with WebUI(webui_models.host, webui_base, EXTENSIONS, selected) as server:
        yield server
