"""FewStep in ComfyUI: students as ordinary models. :mod:`.host` is the only module that knows comfy's
internals."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import host, routes
from .editing import FewStepEncodeToNoise
from .loading import FewStepLoadStudent, FewStepLoadStudentLora, FewStepStudentInfo
from .sampling import FewStepGuidance, FewStepKSampler, FewStepSamplerSelect, FewStepSigmas


class FewStepExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            FewStepLoadStudent,
            FewStepLoadStudentLora,
            FewStepGuidance,
            FewStepSigmas,
            FewStepSamplerSelect,
            FewStepKSampler,
            FewStepEncodeToNoise,
            FewStepStudentInfo,
        ]


async def comfy_entrypoint() -> ComfyExtension:
    return FewStepExtension()


host.register()
routes.register()
