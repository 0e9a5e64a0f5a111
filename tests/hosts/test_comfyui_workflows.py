"""Every example workflow, run by a real ComfyUI on the tests' own files."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hosts import workflows
from hosts.comfyui import ComfyUI, Graph, Run
from hosts.models import SIZE, Models
from PIL import Image

SECOND_PASS = (SIZE[0] * 3 // 2, SIZE[1] * 3 // 2)


def run_workflow(
    comfyui: ComfyUI, models: Models, name: str, **changes: dict[str, Any]
) -> tuple[Run, list[Image.Image]]:
    """The run and its pictures in the order of their nodes; ``changes``: node type -> inputs."""
    files = workflows.placeholders(models, comfyui.upload("example.png", workflows.picture()))
    prompt = workflows.as_prompt(workflows.filled(workflows.read(name), files), comfyui.object_info)
    for node in prompt.values():
        node["inputs"] |= changes.get(node["class_type"], {})
    run = comfyui.run(Graph(prompt))
    shown = [run.outputs[id]["images"] for id in sorted(run.outputs, key=int) if "images" in run.outputs[id]]
    return run, [
        Image.open(io.BytesIO(comfyui.view(image))).convert("RGB") for images in shown for image in images
    ]


@pytest.mark.parametrize("name", workflows.NAMES)
def test_an_example_workflow_runs_and_makes_pictures_of_the_expected_size(
    comfyui: ComfyUI, models: Models, name: str
) -> None:
    run, pictures = run_workflow(comfyui, models, name)
    assert run.status == "success"
    expected = {"img2img": [SIZE, SECOND_PASS], "teacher_and_student": [SIZE, SIZE]}.get(name, [SIZE])
    assert [picture.size for picture in pictures] == expected
    for picture in pictures:
        assert len(picture.getcolors(SECOND_PASS[0] * SECOND_PASS[1])) > 100, "a picture of one colour"


def test_student_and_teacher_side_by_side_differ(comfyui: ComfyUI, models: Models) -> None:
    _, (student, teacher) = run_workflow(comfyui, models, "teacher_and_student")
    assert student.tobytes() != teacher.tobytes()


@pytest.mark.parametrize("name", ["txt2img", "inpaint_9_channel", "student_lora"])
def test_cfg_is_the_students_guidance_in_an_example_workflow(
    comfyui: ComfyUI, models: Models, name: str
) -> None:
    _, (usual,) = run_workflow(comfyui, models, name)
    _, (higher,) = run_workflow(comfyui, models, name, KSampler={"cfg": 12.0})
    assert usual.tobytes() != higher.tobytes()


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("student_lora", {"LoraLoader": {"strength_model": 0.0, "strength_clip": 0.0}}),
        ("student_lora", {"ControlNetApplyAdvanced": {"strength": 0.0}}),
        ("inpaint_4_channel", {"GrowMask": {"expand": 24}}),
    ],
)
def test_each_part_of_a_workflow_takes_part_in_the_picture(
    comfyui: ComfyUI, models: Models, name: str, other: dict[str, Any]
) -> None:
    _, (usual,) = run_workflow(comfyui, models, name)
    _, (changed,) = run_workflow(comfyui, models, name, **other)
    assert usual.tobytes() != changed.tobytes()


def test_img2img_says_which_timesteps_each_pass_ran(comfyui: ComfyUI, models: Models) -> None:
    before = len(comfyui.log)
    run_workflow(comfyui, models, "img2img", KSampler={"seed": 77})
    log = comfyui.log[before:]
    assert "timesteps 666, 499, 249" in log  # stock KSampler's denoise 0.6 of 4 steps
    assert "timesteps 499, 249" in log.replace("666, 499, 249", "")
