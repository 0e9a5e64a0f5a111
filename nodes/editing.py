"""Text-guided editing: a picture's latent becomes the noise that the model would make it of.

The noise is left as ComfyUI leaves it between two sampling runs: a LATENT at the highest noise level, for any
sampler whose ``add_noise`` is off. Nothing is rescaled on the way, and no second kind of noise is needed.
"""

from __future__ import annotations

from typing import Any

import comfy.samplers
import torch
from comfy_api.latest import io, ui

from ..toolkit.diffusion.errors import BadInput
from . import host
from .loading import CATEGORY
from .messages import show_run
from .sampling import sample, starting_latent, steps_input


class FewStepEncodeToNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FewStepEncodeToNoise",
            display_name="Encode to Noise (FewStep)",
            category=CATEGORY,
            description="The noise that a picture is made of. Sampled with another prompt and add_noise off, "
            "it becomes the picture with what the prompts differ in changed.",
            inputs=[
                io.Model.Input("model", tooltip="An encoder (method inversion), or a teacher."),
                io.Conditioning.Input("positive", tooltip="What the picture shows."),
                io.Latent.Input("latent", tooltip="The picture, of VAE Encode."),
                steps_input("0: as trained, of a teacher 50. Only a teacher can take another number."),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, model: Any, positive: Any, latent: dict[str, Any], steps: int = 0) -> io.NodeOutput:
        if "noise_mask" in latent:
            raise BadInput("the latent has a mask, and a picture is encoded as a whole; connect it without")
        timesteps, sigmas = host.encoding_sigmas(model, steps)
        guider = comfy.samplers.CFGGuider(model)  # its cfg is 1: a guided encoding is hard to undo
        guider.inner_set_conds({"positive": positive})
        start = starting_latent(model, latent)
        given = latent | {"samples": start}
        noise = sample(guider, given, sigmas, noise=torch.zeros_like(start), seed=0, sampler="euler")
        text = f"timesteps {', '.join(map(str, timesteps))}"
        show_run(text)
        return io.NodeOutput(latent | {"samples": noise}, ui=ui.PreviewText(f"{text}; unguided"))
