"""The host's network for one sampling call: its time embedding, and how its output becomes x0.

All of it is put in place as a call begins and taken away as it ends: A1111 uses one UNet object for many
checkpoints.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..toolkit.diffusion.schedule import NoiseSchedule
from ..toolkit.diffusion.spec import StudentSpec


@dataclass
class Fed:
    """How often a guidance reached the network."""

    times: int = 0


def is_forge(model: Any) -> bool:
    """Whether a host's model is one of Forge's family, whose UNet answers with x0."""
    return hasattr(model, "forge_objects")


def unet_of(model: Any) -> nn.Module:
    inner = model.forge_objects.unet.model if is_forge(model) else model.model
    return inner.diffusion_model


def schedule_for(spec: StudentSpec) -> NoiseSchedule:
    """The schedule that a student was trained on; the host's own may be set otherwise."""
    plain = NoiseSchedule.scaled_linear()
    return plain.zero_terminal_snr() if spec.ztsnr else plain


@contextmanager
def feeding(unet: nn.Module, shift: Tensor | None) -> Iterator[Fed]:
    """Within, ``shift`` (C,) joins the sinusoid of each timestep; None: nothing does."""
    fed = Fed()

    def join(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        fed.times += 1
        if shift is None:
            return None
        return (inputs[0] + shift.to(inputs[0]), *inputs[1:])

    handle = unet.time_embed.register_forward_pre_hook(join)  # type: ignore[reportArgumentType]
    try:
        yield fed
    finally:
        handle.remove()


@contextmanager
def as_trained(model: Any, spec: StudentSpec) -> Iterator[None]:
    """Within, Forge's family reads the network's output as the student's prediction, on its schedule.

    In A1111 the denoiser of each sampler does that: :func:`denoiser`.
    """
    if not is_forge(model):
        yield
        return
    inner = model.forge_objects.unet.model
    name = "predictor" if hasattr(inner, "predictor") else "model_sampling"
    before = getattr(inner, name)
    setattr(inner, name, _prediction(inner, before, spec))
    try:
        yield
    finally:
        setattr(inner, name, before)


def denoiser(plain: Any, spec: StudentSpec) -> Any:
    """A1111's k-diffusion denoiser for a student's prediction and schedule; ``plain``: the host's choice."""
    external = sys.modules[type(plain).__module__]
    kind = external.CompVisVDenoiser if spec.prediction_type == "v_prediction" else external.CompVisDenoiser
    made = kind(plain.inner_model, quantize=True)  # sigmas are those of whole timesteps
    sigmas = schedule_for(spec).sigmas
    made.sigmas.copy_(sigmas)
    made.log_sigmas.copy_(sigmas.log())
    made.register_forward_pre_hook(_without_uncond, with_kwargs=True)
    return made


def _without_uncond(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """A1111 drops the unconditional rows of x and of the prompt, but not of an inpainting model's picture."""
    rows, cond = len(inputs[0]), named["cond"]
    concat = [part[:rows] for part in cond.get("c_concat", [])]
    return inputs, {**named, "cond": {**cond, "c_concat": concat} if concat else cond}


def _prediction(inner: Any, before: Any, spec: StudentSpec) -> Any:
    if hasattr(before, "prediction_type"):
        made = copy.deepcopy(before)
        made.prediction_type = spec.prediction_type
    else:
        base = importlib.import_module("ldm_patched.modules.model_base")
        kind = "V_PREDICTION" if spec.prediction_type == "v_prediction" else "EPS"
        made = base.model_sampling(inner.model_config, base.ModelType[kind])
    made.set_sigmas(schedule_for(spec).sigmas.to(before.sigmas.device, torch.float32))
    return made
