"""What a person sees of FewStep in a real A1111, Forge or reForge: the page, its messages, its merger."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from urllib.parse import urlencode

import pytest
from hosts.browser import Browser, Missing
from hosts.comfyui import Unavailable
from hosts.webui import Refused, WebUI
from hosts.webui_models import WebUIModels

READY = "() => document.querySelector('#txt2img_generate') && document.querySelector('#txt2img_sampling')"
IDLE = "() => getComputedStyle(document.querySelector('#txt2img_interrupt')).display === 'none'"
SHOWN = "(text) => document.querySelector('#html_log_txt2img')?.innerText.includes(text)"


@pytest.fixture(scope="module")
def page(webui: WebUI) -> Iterator[Browser]:
    try:
        with Browser() as browser:
            browser.goto(webui.url)
            browser.wait(READY)
            yield browser
    except Missing as error:
        pytest.skip(str(error))
    except Unavailable as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(str(error))


def select(webui: WebUI, name: str) -> None:
    webui.knows(name)
    webui.post("/sdapi/v1/options", {"sd_model_checkpoint": name})


def generate(page: Browser, text: str) -> None:
    """Press Generate, and wait for a message under the picture."""
    page.click("#txt2img_generate")
    for _ in range(5):  # half a minute each: reForge takes its time to change the checkpoint
        with contextlib.suppress(RuntimeError):
            return page.wait(SHOWN, text)
    page.wait(SHOWN, text)


def test_the_sampler_is_chosen_on_the_page_and_messages_are_shown_under_the_picture(
    webui: WebUI, webui_models: WebUIModels, page: Browser
) -> None:
    select(webui, webui_models.epsilon.name)
    page.click("#txt2img_sampling input")
    page.click("#txt2img_sampling [aria-label='FewStep']")
    page.evaluate(
        "() => { for (const id of ['width', 'height']) { const e = document.querySelector(`#txt2img_${id} "
        "input[type=number]`); e.value = 64; e.dispatchEvent(new Event('input')); } }"
    )
    page.evaluate(
        "() => { const e = document.querySelector('#txt2img_cfg_scale input[type=number]'); e.value = 20; "
        "e.dispatchEvent(new Event('input')); }"
    )
    generate(page, "15 was taken for cfg 20")
    try:
        select(webui, webui_models.stranger.name)
        sentence = "nor was one among the checkpoints distilled from it"
        # reForge's page loses the text of every error; its log has it
        generate(page, "NoneType" if webui.host.kind == "reforge" else sentence)
        assert webui.host.kind != "reforge" or sentence in webui.log
    finally:
        select(webui, webui_models.epsilon.name)
    assert page.errors() == []


def test_the_settings_have_a_page(page: Browser) -> None:
    found = page.evaluate(
        "() => ['folder', 'defaults', 'without'].map((name) => "
        "!!document.querySelector(`#setting_fewstep_${name}`))"
    )
    assert found == [True, True, True]


def test_the_merger_says_what_became_of_the_dial(webui: WebUI, webui_models: WebUIModels) -> None:
    student, teacher = webui_models.epsilon.name, webui_models.teacher.name
    webui.knows(student, teacher)
    try:
        kept = webui.get("/probe/merge?" + urlencode({"a": student, "b": teacher, "name": "kept"}))
        assert "it has model A's guidance dial, whole" in kept
        webui.knows("kept.safetensors")
        merged = webui.txt2img(override_settings={"sd_model_checkpoint": "kept.safetensors"})
        other = webui.txt2img(cfg_scale=2, override_settings={"sd_model_checkpoint": "kept.safetensors"})
        assert merged.rows == other.rows == 4 and merged.png != other.png
        assert not any("metadata is gone" in text for text in merged.seen["comments"])
        gone = webui.get("/probe/merge?" + urlencode({"a": teacher, "b": student, "name": "gone"}))
        assert "the guidance dial is gone" in gone
    finally:
        for name in ("kept", "gone"):
            for path in webui.base.glob(f"models/Stable-diffusion/{name}.*"):
                path.unlink()
        webui.post("/sdapi/v1/refresh-checkpoints", {})


def test_reload_ui_leaves_one_sampler_and_the_same_picture(webui: WebUI) -> None:
    before = webui.txt2img()
    loaded = webui.get("/probe/seen")["loaded"]
    webui.get("/probe/reload")
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, Refused):
            if webui.get("/probe/seen")["loaded"] != loaded:
                break
        time.sleep(0.5)
    names = [entry["name"] for entry in webui.get("/sdapi/v1/samplers")]
    assert names.count("FewStep") == 1
    assert webui.txt2img().png == before.png
