"""The front end in a real browser, classic and Nodes 2.0: example workflows, and what the extension does."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hosts import workflows
from hosts.browser import Browser, Missing
from hosts.comfyui import ComfyUI, Graph, Host, Unavailable
from hosts.conftest import PACKS
from hosts.models import Model, Models

READY = "() => window.app?.graph && window.app.extensionManager?.setting && document.querySelector('canvas')"
SETTINGS = """async (settings) => {
    for (const [name, value] of Object.entries(settings)) await app.extensionManager.setting.set(name, value);
}"""
LOAD = """async (workflow) => {
    app.extensionManager.toast.removeAll?.();
    await app.loadGraphData(workflow);
}"""
TOASTS = "() => [...document.querySelectorAll('.p-toast-detail')].map((detail) => detail.textContent)"
MIDDLE_OF_WIDGET = """([id, name]) => {
    const node = app.graph.getNodeById(id);
    const widget = node.widgets.find((w) => w.name === name);
    const at = [node.pos[0] + node.size[0] / 2, node.pos[1] + widget.y + 10];
    const [x, y] = app.canvas.ds.convertOffsetToCanvas(at);
    const { left, top } = app.canvas.canvas.getBoundingClientRect();
    return [x + left, y + top];
}"""


@pytest.fixture(scope="module")
def server(
    comfyui_host: Host, comfyui_base: Path, models: Models, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ComfyUI]:
    """A server whose messages nobody has heard yet, on the models of the other tests."""
    base = tmp_path_factory.mktemp("browser")
    for folder in ("checkpoints", "loras", "controlnet"):
        (comfyui_base / "models" / folder).mkdir(parents=True, exist_ok=True)
    (base / "models").symlink_to(comfyui_base / "models", target_is_directory=True)
    with ComfyUI(comfyui_host, base, PACKS) as running:
        running.run(Graph(sampling(models.epsilon)))  # what the server says once and for all is said
        yield running


@pytest.fixture(scope="module")
def files(server: ComfyUI, models: Models) -> dict[str, str]:
    for name in ("epsilon", "three_steps", "stochastic", "baked", "encoder"):
        getattr(models, name)  # made before the page asks for the lists
    return workflows.placeholders(models, server.upload("example.png", workflows.picture()))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    try:
        with Browser() as browser:
            yield browser
    except Missing as error:
        pytest.skip(str(error))
    except Unavailable as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["classic", "nodes 2.0"])
def front(
    request: pytest.FixtureRequest, chromium: Browser, server: ComfyUI, files: dict[str, str]
) -> Iterator[Browser]:
    """The page with one of the two front ends, all files known to it."""
    settings = {
        "Comfy.VueNodes.Enabled": request.param == "nodes 2.0",
        "Comfy.TutorialCompleted": True,
        "Comfy.Minimap.Visible": False,
        "Comfy.Workflow.Persist": False,
    }
    for _ in range(2):  # the setting holds from the next load on
        chromium.goto(server.url)
        chromium.wait(READY)
        chromium.evaluate(SETTINGS, settings)
    chromium.wait("() => app.extensions.some(({ name }) => name === 'FewStep')")
    yield chromium


@pytest.fixture
def shots(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where screenshots go: FEWSTEP_SCREENSHOTS, to look at them, or away."""
    kept = os.environ.get("FEWSTEP_SCREENSHOTS")
    folder = Path(kept) if kept else tmp_path
    folder.mkdir(parents=True, exist_ok=True)
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    return folder / f"{name}.png"


def toasts(front: Browser) -> list[str]:
    return front.evaluate(TOASTS)


def wait_for_toast(front: Browser, part: str) -> None:
    front.wait(f"(part) => ({TOASTS})().some((text) => text.includes(part))", part)


def queue(front: Browser, server: ComfyUI) -> dict[str, Any]:
    """Press the button, in effect; the history entry of the prompt, which has ended."""
    before = set(server.get("/history"))
    front.evaluate("async () => { await app.queuePrompt(0); }")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if done := {id: entry for id, entry in server.get("/history").items() if id not in before}:
            (entry,) = done.values()
            return entry
        time.sleep(0.2)
    raise RuntimeError(f"no prompt ended: {server.log[-2000:]}")


def plain(prompt: dict[str, Any]) -> dict[str, Any]:
    return {id: {"class_type": node["class_type"], "inputs": node["inputs"]} for id, node in prompt.items()}


def sent(front: Browser) -> dict[str, Any]:
    return plain(front.evaluate("async () => (await app.graphToPrompt()).output"))


def graph(front: Browser, prompt: dict[str, Any]) -> None:
    """Open a prompt as a person opens a file in the API's format."""
    front.evaluate(
        "(prompt) => { app.extensionManager.toast.removeAll?.(); app.loadApiJson(prompt, 'test'); }", prompt
    )


def sampling(
    model: Model, *, negative: str = "", loader: str = "CheckpointLoaderSimple", **choices: Any
) -> dict[str, Any]:
    """A prompt with a stock KSampler whose ``choices`` are its inputs."""
    more = {"cfg_is_guidance": True, "guidance": 0.0, "live_negative": choices.pop("live_negative", False)}
    inputs = {
        "seed": 1,
        "steps": 4,
        "cfg": 7.0,
        "sampler_name": "fewstep",
        "scheduler": "fewstep",
        "denoise": 1.0,
    }
    return {
        "1": {
            "class_type": loader,
            "inputs": {"ckpt_name": model.name, **(more if loader == "FewStepLoadStudent" else {})},
        },
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a lighthouse", "clip": ["1", 1]}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": negative, "clip": ["1", 1]}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "5": {
            "class_type": "KSampler",
            "inputs": {
                **inputs,
                **choices,
                "model": ["1", 0],
                "positive": ["2", 0],
                "negative": ["3", 0],
                "latent_image": ["4", 0],
            },
        },
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {"class_type": "PreviewImage", "inputs": {"images": ["6", 0]}},
    }


def widgets(front: Browser, node: int) -> dict[str, Any]:
    return front.evaluate(
        "(id) => Object.fromEntries(app.graph.getNodeById(id).widgets.map((w) => [w.name, w.value]))", node
    )


def choose_by_hand(front: Browser, node: int, name: str, value: str) -> None:
    """As a click in the widget's list does: the value, then the widget's callback."""
    front.evaluate(
        """([id, name, value]) => {
            const node = app.graph.getNodeById(id);
            const widget = node.widgets.find((w) => w.name === name);
            widget.value = value;
            widget.callback(value, app.canvas, node);
            app.api.dispatchCustomEvent("graphChanged", {});
        }""",
        [node, name, value],
    )


@pytest.mark.parametrize("name", workflows.NAMES)
def test_an_example_workflow_opens_runs_and_survives_a_round_trip(
    front: Browser, server: ComfyUI, files: dict[str, str], shots: Path, name: str
) -> None:
    workflow = workflows.filled(workflows.read(name), files)
    front.evaluate(LOAD, workflow)
    time.sleep(0.5)
    unknown = (
        "() => app.graph.nodes.filter((n) => !(n.type in LiteGraph.registered_node_types)).map((n) => n.type)"
    )
    assert front.evaluate(unknown) == []
    expected = workflows.as_prompt(workflows.filled(workflows.read(name), files), server.object_info)
    assert sent(front) == expected
    entry = queue(front, server)
    assert entry["status"]["status_str"] == "success"
    assert entry["outputs"], "a run that shows nothing"
    time.sleep(1)  # the pictures' own loading
    assert toasts(front) == []
    front.screenshot(shots)
    front.evaluate("async () => { await app.loadGraphData(app.graph.serialize()); }")
    assert sent(front) == expected
    front.screenshot(shots.with_stem(f"{shots.stem}-again"))
    assert front.errors() == []


def test_the_facts_of_a_student_appear_on_its_loader(front: Browser, models: Models, shots: Path) -> None:
    graph(front, sampling(models.epsilon, loader="FewStepLoadStudent"))
    note = "() => app.graph.getNodeById(1).widgets.find((w) => w.name === 'student').value"
    front.wait(f"() => ({note})().includes('4 steps, guidance 1 to 15')")
    assert "progressive" in front.evaluate(note) and "random" in front.evaluate(note)
    front.wait("() => [...document.querySelectorAll('textarea')].some((t) => t.value.includes('1 to 15'))")
    front.screenshot(shots)


@pytest.mark.parametrize("loader", ["CheckpointLoaderSimple", "FewStepLoadStudent"])
def test_a_student_chosen_by_hand_fills_its_trained_values_and_a_teacher_does_not(
    front: Browser, models: Models, loader: str
) -> None:
    start = sampling(models.teacher, loader=loader, steps=20, cfg=3.0)
    graph(front, start)
    time.sleep(0.5)
    choose_by_hand(front, 1, "ckpt_name", models.three_steps.name)
    front.wait("() => app.graph.getNodeById(5).widgets.find((w) => w.name === 'steps').value === 3")
    assert widgets(front, 5)["cfg"] == 7.5
    choose_by_hand(front, 1, "ckpt_name", models.baked.name)
    front.wait("() => app.graph.getNodeById(5).widgets.find((w) => w.name === 'steps').value === 4")
    assert widgets(front, 5)["cfg"] == 1
    choose_by_hand(front, 1, "ckpt_name", models.teacher.name)
    time.sleep(1)
    assert (widgets(front, 5)["steps"], widgets(front, 5)["cfg"]) == (4, 1)


def test_a_student_chosen_with_the_mouse_fills_its_trained_values(
    front: Browser, files: dict[str, str], models: Models
) -> None:
    front.evaluate(LOAD, workflows.filled(workflows.read("txt2img"), files))
    sampler = front.evaluate("() => app.graph.nodes.find((node) => node.type === 'KSampler').id")
    time.sleep(1)
    if front.evaluate("() => app.extensionManager.setting.get('Comfy.VueNodes.Enabled')"):
        front.click('[data-node-id="1"] [role="combobox"]')
        front.click(f'[role="option"]:has-text("{models.three_steps.name}")')
    else:
        front.click_at(*front.evaluate(MIDDLE_OF_WIDGET, [1, "ckpt_name"]))
        front.click(f'.litemenu-entry:has-text("{models.three_steps.name}")')
    steps = "(id) => app.graph.getNodeById(id).widgets.find((w) => w.name === 'steps').value === 3"
    front.wait(steps, sampler)
    assert widgets(front, sampler)["cfg"] == 7.5


def test_opening_a_saved_graph_changes_none_of_its_values(front: Browser, models: Models) -> None:
    # The loader comes last, when the sampler is connected to it already.
    saved = json.loads(json.dumps(sampling(models.three_steps, steps=20, cfg=3.0)).replace('"1"', '"9"'))
    graph(front, saved)
    time.sleep(1)
    assert sent(front) == saved
    workflow = front.evaluate("() => app.graph.serialize()")
    front.evaluate(LOAD, workflow)
    time.sleep(1)
    assert sent(front) == saved


def test_only_the_samplers_that_a_loader_feeds_are_filled(front: Browser, models: Models) -> None:
    prompt = sampling(models.teacher, steps=20, cfg=3.0)
    prompt["8"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": models.teacher.name}}
    prompt["9"] = {"class_type": "KSampler", "inputs": {**prompt["5"]["inputs"], "model": ["8", 0]}}
    graph(front, prompt)
    time.sleep(0.5)
    choose_by_hand(front, 8, "ckpt_name", models.epsilon.name)
    front.wait("() => app.graph.getNodeById(9).widgets.find((w) => w.name === 'steps').value === 4")
    assert widgets(front, 5)["steps"] == 20


@pytest.mark.parametrize(
    ("name", "choices", "reason"),
    [
        ("epsilon", {"sampler_name": "dpmpp_2m"}, "dpmpp_2m with these steps"),
        ("epsilon", {"sampler_name": "euler", "scheduler": "karras"}, "made for the sampler fewstep"),
        ("epsilon", {"sampler_name": "euler", "steps": 20}, "made for the sampler fewstep"),
        ("stochastic", {"sampler_name": "euler"}, "made for the sampler fewstep"),
        ("baked", {"cfg": 7.0}, "baked in: cfg 7 has no effect"),
        ("epsilon", {"negative": "ugly"}, "the negative prompt has no effect"),
    ],
)
def test_an_unsuitable_graph_is_told_why_once_by_browser_and_server_together(
    front: Browser,
    server: ComfyUI,
    models: Models,
    shots: Path,
    name: str,
    choices: dict[str, Any],
    reason: str,
) -> None:
    graph(front, sampling(getattr(models, name), **choices))
    assert queue(front, server)["status"]["status_str"] == "success"
    wait_for_toast(front, reason)
    time.sleep(0.5)
    front.screenshot(shots)
    told = [text for text in toasts(front) if reason in text]
    assert len(told) == 1, told


def test_an_encoder_in_a_sampler_is_told_and_refused_in_one_sentence(
    front: Browser, server: ComfyUI, models: Models
) -> None:
    graph(front, sampling(models.encoder, sampler_name="euler"))
    entry = queue(front, server)
    assert entry["status"]["status_str"] == "error"
    wait_for_toast(front, "this student is an encoder, it turns pictures into noise")
    assert len(toasts(front)) == 1
    front.evaluate("() => document.querySelector('.p-dialog-close-button')?.click()")


def test_guidance_out_of_range_is_marked_on_the_node_and_said(
    front: Browser, server: ComfyUI, models: Models, shots: Path
) -> None:
    graph(front, sampling(models.epsilon))
    time.sleep(0.5)
    choose_by_hand(front, 5, "cfg", 20)  # type: ignore[arg-type]
    wait_for_toast(front, "trained for guidance 1 to 15")
    assert "guidance 20 was asked for" in widgets(front, 5)["student"]
    front.screenshot(shots)
    choose_by_hand(front, 5, "cfg", 5)  # type: ignore[arg-type]
    front.wait("() => app.graph.getNodeById(5).widgets.every((w) => w.name !== 'student')")


def test_a_merge_that_loses_the_dial_is_told_once(front: Browser, server: ComfyUI, models: Models) -> None:
    prompt = sampling(models.teacher, steps=2, cfg=1.0)
    prompt["8"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": models.epsilon.name}}
    merge = {"model1": ["1", 0], "model2": ["8", 0], "ratio": 0.5}
    prompt["9"] = {"class_type": "ModelMergeSimple", "inputs": merge}
    prompt["5"]["inputs"] |= {"model": ["9", 0], "sampler_name": "euler", "scheduler": "simple"}
    graph(front, prompt)
    assert queue(front, server)["status"]["status_str"] == "success"
    wait_for_toast(front, "the dial is gone")
    time.sleep(0.5)
    assert len([text for text in toasts(front) if "dial" in text]) == 1


def test_suitable_graphs_are_told_nothing(front: Browser, server: ComfyUI, models: Models) -> None:
    for prompt in (
        sampling(models.epsilon),
        sampling(models.epsilon, sampler_name="euler", scheduler="simple"),
        sampling(models.three_steps, scheduler="karras", denoise=0.5),
        sampling(models.epsilon, loader="FewStepLoadStudent", negative="ugly", live_negative=True),
        sampling(models.teacher, steps=3, sampler_name="dpmpp_2m", cfg=20.0, negative="ugly"),
    ):
        graph(front, prompt)
        assert queue(front, server)["status"]["status_str"] == "success"
        time.sleep(0.5)
        assert toasts(front) == []


def test_what_the_server_says_becomes_a_toast(front: Browser, server: ComfyUI, models: Models) -> None:
    prompt = sampling(models.epsilon)
    prompt["8"] = {"class_type": "RescaleCFG", "inputs": {"model": ["1", 0], "multiplier": 0.7}}
    prompt["5"]["inputs"]["model"] = ["8", 0]
    graph(front, prompt)
    queue(front, server)
    wait_for_toast(front, "RescaleCFG")


def test_the_info_node_shows_its_text(front: Browser, server: ComfyUI, models: Models, shots: Path) -> None:
    graph(front, {"1": {"class_type": "FewStepStudentInfo", "inputs": {"ckpt_name": models.epsilon.name}}})
    queue(front, server)
    front.wait(
        "() => app.graph.getNodeById(1).widgets.some((w) => String(w.value).includes('timesteps 999'))"
    )
    front.screenshot(shots)


def test_the_help_panel_shows_a_nodes_page(front: Browser, models: Models, shots: Path) -> None:
    graph(front, sampling(models.epsilon, loader="FewStepLoadStudent"))
    front.evaluate("() => app.canvas.selectNode(app.graph.getNodeById(1))")
    info = "document.querySelector('[data-testid=info-button]')"
    front.wait(f"() => {info}")
    front.evaluate(f"() => {info}.click()")
    front.wait("() => document.body.textContent.includes('Loads a distilled checkpoint')")
    front.screenshot(shots)


def test_the_templates_browser_shows_every_workflow_with_its_picture(
    front: Browser, server: ComfyUI, shots: Path
) -> None:
    assert sorted(server.get("/workflow_templates")["fewstep"]) == workflows.NAMES
    front.evaluate("async () => { await app.extensionManager.command.execute('Comfy.BrowseTemplates'); }")
    front.click('[role="dialog"] :text-is("fewstep")')
    pictures = (
        "[...document.querySelectorAll('[role=dialog] img')].filter((image) => image.naturalWidth >= 400)"
    )
    front.wait(f"(count) => {pictures}.length === count", len(workflows.NAMES))
    front.screenshot(shots)
    front.click('[role="dialog"] :text-is("teacher_and_student")')
    front.wait("() => app.graph.nodes.filter((node) => node.type === 'PreviewImage').length === 2")
    front.screenshot(shots.with_stem(f"{shots.stem}-opened"))
