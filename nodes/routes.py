"""What the host's web server does for us: GET /fewstep/student says what a file in "checkpoints" or "loras"
is, for the browser; and a look at each graph that is queued, for what no node of ours would notice.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import folder_paths
from aiohttp import web
from server import PromptServer

from ..toolkit.diffusion.errors import BadInput
from ..toolkit.runtime.student import read_student
from .loading import facts
from .messages import say

_FOLDERS = ("checkpoints", "loras")
_SAVERS = ("CheckpointSave", "ModelSave")


def register() -> None:
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.routes.get("/fewstep/student")(student)
        server.add_on_prompt_handler(look_at_graph)


async def student(request: web.Request) -> web.Response:
    """``folder`` and ``name`` as the host lists them -> kind, sentence, spec, guidance, steps."""
    folder, name = request.query.get("folder", "checkpoints"), request.query.get("name", "")
    if folder not in _FOLDERS or name not in folder_paths.get_filename_list(folder):
        return web.json_response({"error": f"there is no {name!r} in {folder!r}"}, status=404)
    path = Path(folder_paths.get_full_path_or_raise(folder, name))
    if path.suffix != ".safetensors":
        return web.json_response(_answer("other", f"{path.name}: no FewStep student"))
    try:
        found = read_student(path)
    except BadInput as error:
        return web.json_response(_answer("other", str(error).replace(str(path), path.name)))
    answer = _answer(found.kind, facts(path.name, found))
    if (spec := found.spec) is not None:
        answer["spec"], answer["steps"] = asdict(spec), spec.steps
        if spec.has_dial:
            answer["guidance"] = [spec.guidance_min, spec.guidance_max, spec.guidance_default]
    return web.json_response(answer)


def look_at_graph(request: dict[str, Any]) -> dict[str, Any]:
    """Say so if a student LoRA's model is about to be saved: the host saves the checkpoint with the LoRA in
    it, and has no place for the LoRA's dial. The request goes on as it is."""
    graph: dict[str, Any] = request.get("prompt") or {}
    if any(node.get("class_type") in _SAVERS and _has_student_lora(graph, node) for node in graph.values()):
        say(
            "a student LoRA's guidance dial is not saved with the checkpoint: the saved file is no student; "
            "share the LoRA, or the merged student that `python -m toolkit.distill` writes beside it",
            once=False,
        )
    return request


def _has_student_lora(graph: dict[str, Any], node: dict[str, Any]) -> bool:
    seen: set[str] = set()
    link = node["inputs"].get("model")
    while isinstance(link, list) and link[0] in graph and link[0] not in seen:
        seen.add(link[0])
        node = graph[link[0]]
        if node.get("class_type") == "FewStepLoadStudentLora":
            return True
        link = node["inputs"].get("model", node["inputs"].get("model1"))
    return False


def _answer(kind: str, sentence: str) -> dict[str, object]:
    return {"kind": kind, "sentence": sentence, "spec": None, "guidance": None, "steps": None}
