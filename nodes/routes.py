"""GET /fewstep/student: what a file in "checkpoints" or "loras" says of itself, for the browser."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import folder_paths
from aiohttp import web
from server import PromptServer

from ..toolkit.diffusion.errors import BadInput
from ..toolkit.runtime.student import read_student
from .loading import facts

_FOLDERS = ("checkpoints", "loras")


def register() -> None:
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.routes.get("/fewstep/student")(student)


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


def _answer(kind: str, sentence: str) -> dict[str, object]:
    return {"kind": kind, "sentence": sentence, "spec": None, "guidance": None, "steps": None}
