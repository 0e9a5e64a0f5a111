"""Guidance, the trained grid, the student's sampler, and all of it in one node."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import node_helpers
import torch
from comfy_api.latest import io, ui

from ..toolkit.diffusion.errors import BadInput
from ..toolkit.runtime.student import plan_walk, schedule_of, sigmas_from
from . import host
from .loading import CATEGORY


def _guidance_input() -> Any:
    return io.Float.Input(
        "guidance",
        default=7.5,
        min=0.0,
        max=100.0,
        step=0.1,
        round=0.01,
        tooltip="What cfg is elsewhere, within the range that the student was trained for. 1: unguided.",
    )


def steps_input(tooltip: str = "0: as trained. Only consistency students can take another number.") -> Any:
    return io.Int.Input(
        "steps",
        default=0,
        min=0,
        max=1000,
        optional=True,
        tooltip=tooltip,
    )


def _strength_input(name: str, tooltip: str) -> Any:
    return io.Float.Input(name, default=1.0, min=0.0, max=1.0, step=0.01, tooltip=tooltip)


class FewStepGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FewStepGuidance",
            display_name="Guidance (FewStep)",
            category=CATEGORY,
            description="The guidance of one prompt or region; it goes before every other setting.",
            inputs=[
                io.Conditioning.Input("conditioning"),
                _guidance_input(),
                io.String.Input(
                    "per_picture",
                    default="",
                    optional=True,
                    tooltip='One for each picture of the batch instead, such as "2, 4, 8".',
                ),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, conditioning: Any, guidance: float, per_picture: str = "") -> io.NodeOutput:
        value: float | list[float] = _numbers(per_picture) if per_picture.strip() else guidance
        return io.NodeOutput(node_helpers.conditioning_set_values(conditioning, {"guidance": value}))


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.replace(";", ",").split(",") if part.strip()]
    except ValueError:
        raise BadInput(
            f'per_picture is "{text}"; numbers with commas were expected, such as 2, 4, 8'
        ) from None


def start_sigmas(model: Any, start: float, steps: int) -> torch.Tensor:
    """(N + 1,) float32 noise levels of a student from a strength on; none for strength 0."""
    spec = host.expect_student(model, "the trained grid")
    if start <= 0:
        return torch.zeros(0)
    schedule = schedule_of(model.get_model_object("model_sampling").sigmas)
    return sigmas_from(spec, schedule, start, steps).float()


class FewStepSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FewStepSigmas",
            display_name="Trained Grid (FewStep)",
            category=CATEGORY,
            description="The noise levels that the student was trained on, for SamplerCustom and the like.",
            inputs=[
                io.Model.Input("model"),
                _strength_input("start", "How much noise to start from, as denoise elsewhere. 1: all."),
                steps_input(),
            ],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, model: Any, start: float, steps: int = 0) -> io.NodeOutput:
        return io.NodeOutput(start_sigmas(model, start, steps))


class FewStepSamplerSelect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FewStepSamplerSelect",
            display_name="Student's Sampler (FewStep)",
            category=CATEGORY,
            description="The sampler that the student's file names, on its trained timesteps, for "
            "SamplerCustom and the like.",
            inputs=[],
            outputs=[io.Sampler.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(comfy.samplers.sampler_object(host.KEY))


class FewStepKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FewStepKSampler",
            display_name="KSampler (FewStep)",
            category=CATEGORY,
            description="Runs a student as it was trained: its sampler and timesteps, one evaluation a step.",
            inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input("positive"),
                io.Latent.Input("latent"),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True),
                _guidance_input(),
                _strength_input("denoise", "1: from noise alone. Lower: more of the picture stays."),
                steps_input(),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="Connected, it is heeded, at two evaluations a step.",
                ),
                io.Boolean.Input(
                    "add_noise",
                    default=True,
                    optional=True,
                    tooltip="Off: the latent is noise already, as Encode to Noise (FewStep) makes it.",
                ),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        latent: dict[str, Any],
        seed: int,
        guidance: float,
        denoise: float,
        steps: int = 0,
        negative: Any = None,
        add_noise: bool = True,
    ) -> io.NodeOutput:
        spec = host.expect_student(model, "FewStepKSampler")
        model = host.choose(model, asked=guidance, live_negative=negative is not None)
        sigmas = start_sigmas(model, denoise, steps)
        guider = comfy.samplers.CFGGuider(model)
        guider.inner_set_conds({"positive": positive} | ({} if negative is None else {"negative": negative}))
        guider.set_cfg(guidance)
        start = starting_latent(model, latent)
        noise = torch.zeros_like(start)
        if add_noise:
            noise = comfy.sample.prepare_noise(start, seed, latent.get("batch_index"))
        samples = sample(guider, latent | {"samples": start}, sigmas, noise=noise, seed=seed)
        timesteps: tuple[int, ...] = ()
        if len(sigmas):
            schedule = schedule_of(model.get_model_object("model_sampling").sigmas)
            timesteps = plan_walk(spec, schedule, sigmas, seeds=[seed]).timesteps
        text = f"timesteps {', '.join(map(str, timesteps)) or 'none'}; guidance {guidance:g}"
        return io.NodeOutput({**latent, "samples": samples}, ui=ui.PreviewText(text))


def starting_latent(model: Any, latent: dict[str, Any]) -> torch.Tensor:
    """A LATENT's samples, an empty one's in the model's channels."""
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"])


def sample(
    guider: Any,
    latent: dict[str, Any],
    sigmas: torch.Tensor,
    *,
    noise: torch.Tensor,
    seed: int,
    sampler: str = host.KEY,
) -> torch.Tensor:
    """The host's own steps around a sampling run: mask, preview, and where results are kept."""
    if len(sigmas) == 0:
        return latent["samples"]
    samples = guider.sample(
        noise,
        latent["samples"],
        comfy.samplers.sampler_object(sampler),
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(guider.model_patcher, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return samples.to(comfy.model_management.intermediate_device())
