"""The example workflows for the host's HTTP interface, on a test's own files."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hosts.models import SIZE, Models
from PIL import Image

FOLDER = Path(__file__).parents[2] / "example_workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
_NOTES = ("Note", "MarkdownNote")
_FIXED = ("fixed", "increment", "decrement", "randomize")

Workflow = dict[str, Any]


def read(name: str) -> Workflow:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def picture() -> bytes:
    """A PNG of the fixtures' size whose upper half is masked, as alpha."""
    image = Image.radial_gradient("L").resize(SIZE).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(SIZE).point(lambda value: 255 * (value > 127)))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def placeholders(models: Models, image: str) -> dict[str, str]:
    """Placeholder -> the name of a fixture; ``image``: an uploaded :func:`picture`."""
    return {
        "student.safetensors": models.epsilon.name,
        "encoder.safetensors": models.encoder.name,
        "inpainting-student.safetensors": models.inpaint.name,
        "your-checkpoint.safetensors": models.teacher.name,
        "teacher.safetensors": models.teacher.name,
        "your-style.safetensors": models.style_lora.name,
        "student-lora.safetensors": models.student_lora.name,
        "your-controlnet.safetensors": models.controlnet.name,
        "example.png": image,
    }


def filled(workflow: Workflow, files: Mapping[str, str]) -> Workflow:
    """The workflow on these files, at the fixtures' size; KeyError for a placeholder that none stands for."""
    for node in workflow["nodes"]:
        values = node.get("widgets_values", [])
        for i, value in enumerate(values):
            if isinstance(value, str) and value.endswith((".safetensors", ".png")):
                values[i] = files[value]
        if node["type"] == "EmptyLatentImage":
            values[:2] = SIZE
    return workflow


def as_prompt(workflow: Workflow, object_info: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """What the front end sends for a workflow of plain nodes and links (no reroutes, subgraphs, bypasses)."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt: dict[str, Any] = {}
    for node in workflow["nodes"]:
        if node["type"] in _NOTES:
            continue
        declared = object_info(node["type"])["input"]
        options = {name: spec for group in declared.values() for name, spec in group.items()}
        values = iter(node.get("widgets_values", []))
        inputs: dict[str, Any] = {}
        for slot in node["inputs"]:
            name = slot["name"]
            if "widget" in slot and name != "upload":
                inputs[name] = next(values)
                if (options[name][1:] or ({},))[0].get("control_after_generate"):
                    assert next(values) in _FIXED
            if slot["link"] is not None:
                inputs[name] = links[slot["link"]]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt
