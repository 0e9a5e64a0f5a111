"""The sampler ``FewStep``: the host's own k-diffusion sampler, on a student's grid, at one evaluation a step.

The host prepares the picture and steps through :meth:`FewStepSampler.walk`; what it would evaluate, and
where, is replaced: noise levels, the noise of the start, the guidance, which goes into the time embedding,
and the unconditional half, which is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from modules import sd_samplers, sd_samplers_common, shared
from modules.sd_samplers_kdiffusion import CFGDenoiserKDiffusion, KDiffusionSampler
from torch import Tensor

from ..toolkit.diffusion.errors import BadInput
from ..toolkit.diffusion.solvers import start_noise
from ..toolkit.diffusion.spec import StudentSpec
from ..toolkit.runtime.samplers import start_timestep
from ..toolkit.runtime.sentences import (
    UNGUIDED,
    baked_ignores,
    clip_skip_differs,
    negative_ignored,
    no_dial,
)
from ..toolkit.runtime.student import Walk, plan_walk, sigmas_from
from . import network
from .messages import tell, tell_once
from .students import Student, expect_student, student_of

NAME = "FewStep"
"""In the dropdown and in the infotext."""


@dataclass
class Run:
    """One call of the sampler. ``noise``: of unit variance, to start from nothing but it; ``before``: how
    many levels the host will cut off the front.
    """

    p: Any
    student: Student
    plan: Walk
    noise: Tensor | None = None
    before: int = 0


class FewStepDenoiser(CFGDenoiserKDiffusion):
    run: Run | None = None

    @property
    def inner_model(self) -> Any:
        if self.model_wrap is None:
            plain = super().inner_model
            if self.run is not None and not network.is_forge(shared.sd_model):
                self.model_wrap = network.denoiser(plain, self.run.student.spec)
        return self.model_wrap

    def update_inner_model(self) -> None:
        """The host has loaded the refiner in the midst of a run."""
        self.sampler.hand_over()
        super().update_inner_model()

    def forward(self, x: Tensor, sigma: Tensor, **arguments: Any) -> Tensor:
        assert self.run is not None
        with _positive_alone(self.run.p):
            return super().forward(x, sigma, **{**arguments, "cond_scale": 1.0, "s_min_uncond": 0.0})


class FewStepSampler(KDiffusionSampler):
    """A new one is made for each pass of each picture."""

    def __init__(self, model: Any) -> None:
        super().__init__(self.walk, model)
        self.model_wrap_cfg = FewStepDenoiser(self)
        self.model_wrap = self.model_wrap_cfg.inner_model
        self.fed: list[network.Fed] = []
        self.exits = ExitStack()

    def sample(self, p: Any, x: Tensor, conditioning: Any, *args: Any, **kwargs: Any) -> Tensor:
        self._prepare(p, strength=1.0)
        self.run = replace(self.run, noise=x)
        return super().sample(p, x, _averaged(conditioning), *args, **kwargs)

    def sample_img2img(
        self,
        p: Any,
        x: Tensor,
        noise: Tensor,
        conditioning: Any,
        unconditional_conditioning: Any,
        steps: int | None = None,
        image_conditioning: Any = None,
    ) -> Tensor:
        if not p.denoising_strength:
            return x
        self._prepare(p, strength=p.denoising_strength)
        count, last = sd_samplers_common.setup_img2img_steps(p, steps)
        self.run = replace(self.run, before=count - last - 1)
        prompts = (_averaged(conditioning), unconditional_conditioning)
        return super().sample_img2img(
            p, x, noise, *prompts, steps=steps, image_conditioning=image_conditioning
        )

    def get_sigmas(self, p: Any, steps: int) -> Tensor:
        sigmas = self.run.plan.sigmas.float()
        return torch.cat([sigmas[:1].expand(self.run.before), sigmas])

    def launch_sampling(self, steps: int, func: Any) -> Tensor:
        timesteps = self.run.plan.timesteps
        self.fed = []
        with self.exits:
            self._enter(self.run.student)
            samples = super().launch_sampling(len(timesteps), func)
        stopped = shared.state.interrupted or shared.state.skipped
        if not stopped and not all(fed.times for fed in self.fed):
            tell(self.run.p, "the guidance did not reach the network: is another UNet in its place?")
        return samples

    def walk(
        self,
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Any = None,
        callback: Any = None,
        disable: Any = None,
    ) -> Tensor:
        """k-diffusion's signature. ``sigmas`` are the plan's, in the host's precision."""
        plan, noise = self.run.plan, self.run.noise
        if noise is not None:
            x = start_noise(noise, plan.sigmas[0].to(noise) * noise.new_ones(len(noise)))
        return plan.sampler(model, x, plan.sigmas, extra_args, callback)

    def hand_over(self) -> None:
        """Go on with the student that the host has loaded as refiner."""
        self.exits.close()
        student = student_of(shared.sd_model.sd_checkpoint_info)
        assert student is not None, "checked before the first step"
        self._enter(student)

    @property
    def run(self) -> Any:
        return self.model_wrap_cfg.run

    @run.setter
    def run(self, run: Run) -> None:
        self.model_wrap_cfg.run = run

    def _prepare(self, p: Any, *, strength: float) -> None:
        student = expect_student(p)
        for text in student.warnings:
            tell(p, text)
        plan = plan_for(student.spec, strength=strength, steps=p.steps, seeds=p.seeds)
        if plan.note:
            tell(p, plan.note)
        _check_refiner(p, student.spec, plan.timesteps)
        if _has_negative(p, student.spec):
            tell_once(p, negative_ignored(student.spec))
        wanted = student.spec.unusual_clip_skip
        if wanted and wanted != getattr(shared.opts, "CLIP_stop_at_last_layers", wanted):
            tell_once(p, f"{clip_skip_differs(student.spec)}: set the Clip skip to {wanted} in the settings")
        self.run = Run(p, student, plan)
        self.model_wrap_cfg.model_wrap = None
        self.model_wrap = self.model_wrap_cfg.inner_model

    def _enter(self, student: Student) -> None:
        model = shared.sd_model
        guidance = guidance_for(self.run.p, student.spec)
        self.exits.enter_context(network.as_trained(model, student.spec))
        feeding = network.feeding(network.unet_of(model), student.shift(guidance))
        self.fed.append(self.exits.enter_context(feeding))


def plan_for(spec: StudentSpec, *, strength: float, steps: int, seeds: Sequence[int]) -> Walk:
    """The evaluations from a strength in (0, 1] on; ``steps`` matter to consistency students alone."""
    schedule = network.schedule_for(spec)
    chosen = steps if spec.sampler == "consistency" else 0
    sigmas = sigmas_from(spec, schedule, strength, chosen)
    plan = plan_walk(spec, schedule, sigmas, seeds=seeds)
    if strength < 1 and abs(plan.timesteps[0] - (asked := start_timestep(strength))) > 0:
        taken = plan.timesteps[0]
        note = f"timestep {asked} was asked for, and the nearest trained one, {taken}, was taken"
        return replace(plan, note=note)
    return plan


def guidance_for(p: Any, spec: StudentSpec) -> float:
    """The cfg of this pass, as far as the student goes; what is not heeded is told."""
    cfg = float(p.hr_cfg if getattr(p, "is_hr_pass", False) and hasattr(p, "hr_cfg") else p.cfg_scale)
    if spec.has_dial:
        taken = min(max(cfg, spec.guidance_min), spec.guidance_max)
        if taken != cfg:
            trained = f"{spec.guidance_min:g} to {spec.guidance_max:g}"
            tell(p, f"this student was trained for guidance {trained}: {taken:g} was taken for cfg {cfg:g}")
        if taken == 1:
            tell_once(p, UNGUIDED)
        return taken
    if spec.baked_guidance is not None and cfg not in (1, spec.baked_guidance):
        tell(p, baked_ignores(spec, cfg))
    elif spec.w_embedding is None and cfg != 1:
        tell(p, no_dial(cfg))
    return cfg


def refuse_refiner(
    spec: StudentSpec, refiner: StudentSpec | None, name: str, timesteps: Sequence[int], switch: int
) -> None:
    """BadInput unless a refiner can take over at ``timesteps[switch]``: it must be a student that was
    trained to go on from there."""
    if refiner is None:
        raise BadInput(
            f"{name} is no student, so it cannot take over as refiner after {switch} of {len(timesteps)} "
            "steps; choose no refiner, or a student of it"
        )
    if (refiner.family, refiner.ztsnr) != (spec.family, spec.ztsnr):
        raise BadInput(f"{name} is of another family or noise schedule; choose another refiner or none")
    rest = tuple(timesteps[switch:])
    if tuple(t for t in refiner.timesteps if t <= rest[0]) != rest:
        there, trained = ", ".join(map(str, rest)), ", ".join(map(str, refiner.timesteps))
        raise BadInput(
            f"{name} cannot take over as refiner at the timesteps {there}: it was trained for {trained}; "
            "choose another place to switch at, or none"
        )


def switch_position(timesteps: Sequence[int], at: float, *, by_steps: bool) -> int | None:
    """Before which evaluation the host loads the refiner, if at all."""
    for i, timestep in enumerate(timesteps):
        if (i / len(timesteps) if by_steps else (999 - timestep) / 1000) >= at:
            return i
    return None


def register() -> None:
    """Put the sampler into the host's lists, or in the place of an earlier one."""
    made = sd_samplers_common.SamplerData(NAME, FewStepSampler, [], {})
    there = sd_samplers.all_samplers
    position = next((i for i, each in enumerate(there) if each.name == NAME), len(there))
    there[position : position + 1] = [made]
    sd_samplers.all_samplers_map[NAME] = made
    sd_samplers.set_samplers()
    forget = getattr(getattr(sd_samplers, "get_sampler_and_scheduler", None), "cache_clear", None)
    if forget is not None:
        forget()


def _check_refiner(p: Any, spec: StudentSpec, timesteps: Sequence[int]) -> None:
    info, at = getattr(p, "refiner_checkpoint_info", None), getattr(p, "refiner_switch_at", None)
    if info is None or info == shared.sd_model.sd_checkpoint_info or not _refines_this_pass(p):
        return
    by_steps = shared.opts.refiner_switch_by_sample_steps or hasattr(shared.sd_model, "forge_objects")
    switch = switch_position(timesteps, at or 0.0, by_steps=by_steps)
    if switch is not None:
        found = student_of(info)
        refuse_refiner(spec, found and found.spec, info.name, timesteps, switch)


def _refines_this_pass(p: Any) -> bool:
    passes = {"first pass": False, "second pass": True}
    wanted = passes.get(shared.opts.hires_fix_refiner_pass)
    return not getattr(p, "enable_hr", False) or wanted is None or wanted == bool(p.is_hr_pass)


def _has_negative(p: Any, spec: StudentSpec) -> bool:
    return any(text.strip() != spec.negative for text in p.negative_prompts if text.strip())


def _averaged(conditioning: Any) -> Any:
    """The host's conditioning with the weights of prompts joined by AND made to sum to 1: without an
    unconditional prediction to start from, prompts can only be averaged."""
    batch = getattr(conditioning, "batch", None)
    if batch is None or all(len(parts) == 1 and parts[0].weight == 1 for parts in batch):
        return conditioning
    made = copy.copy(conditioning)
    made.batch = [[copy.copy(part) for part in parts] for parts in batch]
    for parts in made.batch:
        total = sum(part.weight for part in parts)
        for part in parts:
            part.weight /= total
    return made


@contextmanager
def _positive_alone(p: Any) -> Iterator[None]:
    """Within, the host evaluates no unconditional half, and fits no prompt to the negative one's length."""
    data, infotext = shared.opts.data, p.extra_generation_params
    with ExitStack() as stack:
        stack.enter_context(_restored(data, "skip_early_cond", "pad_cond_uncond", "pad_cond_uncond_v0"))
        stack.enter_context(_restored(infotext, "Skip Early CFG"))
        data.update(skip_early_cond=2.0, pad_cond_uncond=False, pad_cond_uncond_v0=False)
        yield


@contextmanager
def _restored(mapping: MutableMapping[str, Any], *keys: str) -> Iterator[None]:
    before = {key: mapping[key] for key in keys if key in mapping}
    try:
        yield
    finally:
        for key in keys:
            mapping.pop(key, None)
        mapping.update(before)
