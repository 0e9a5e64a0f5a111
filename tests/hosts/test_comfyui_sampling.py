"""Sampling in a real ComfyUI, through its HTTP interface, against independent loops on diffusers' UNet."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hosts.bench import Bench, Link, random_conditioning, random_latent
from hosts.models import Model, Models
from hosts.reference import Sampling, Unet, relative_error, student, timestep_of_strength
from torch import Tensor

TIGHT = 1e-5
TRAINED = (999, 749, 499, 249)
SEED = 2**40 + 7
COND, NEGATIVE = random_conditioning(1), random_conditioning(2)


@cache
def unet(model: Model) -> Unet:
    kind = "epsilon" if model.spec is None else model.spec.prediction_type
    return Unet(model.tensors, prediction_type=kind)


def expected(
    model: Model,
    latent: Tensor,
    *,
    guidance: float | Sequence[float] | None = 7.0,
    timesteps: Sequence[int] = TRAINED,
    concat: Tensor | None = None,
    **choices: Any,
) -> Tensor:
    stochastic = model.spec is not None and model.spec.sampler == "stochastic"
    denoise = student(unet(model), COND, guidance, concat=concat)
    return Sampling(denoise, timesteps, seed=SEED, stochastic=stochastic, **choices)(latent)


def fewstep(bench: Bench, model: Link, latent: Link, **choices: Any) -> Link:
    """The pack's own node at guidance 7; ``positive`` defaults to COND."""
    inputs = {"positive": None, "seed": SEED, "guidance": 7.0, "denoise": 1.0, **choices}
    inputs["positive"] = inputs["positive"] or bench.conditioning(COND)
    return bench("FewStepKSampler", model=model, latent=latent, **inputs)[0]


def ksampler(bench: Bench, model: Link, latent: Link, **choices: Any) -> Link:
    """The stock node, cfg 7, as a graph of habit has it."""
    inputs = {"steps": 4, "cfg": 7.0, "sampler_name": "fewstep", "scheduler": "fewstep", "denoise": 1.0}
    inputs |= {"positive": None, "negative": None, **choices}
    inputs["positive"] = inputs["positive"] or bench.conditioning(COND)
    inputs["negative"] = inputs["negative"] or bench.conditioning(NEGATIVE)
    return bench("KSampler", model=model, latent_image=latent, seed=SEED, **inputs)[0]


def assert_equal(found: Tensor, reference: Tensor) -> None:
    error = relative_error(found, reference)
    assert error < TIGHT, f"relative error {error:.1e}"


EMPTY = torch.zeros(2, 4, 8, 8)


def test_a_stock_graph_without_fewstep_is_what_the_reference_says(bench: Bench, models: Models) -> None:
    """The yardstick itself: no node, sampler or scheduler of ours."""
    model = models.teacher
    out = ksampler(
        bench, bench.load(model)[0], bench.latent(EMPTY), cfg=1.0, sampler_name="euler", scheduler="simple"
    )
    assert_equal(bench.sampled(out), expected(model, EMPTY, guidance=None))


@pytest.mark.parametrize("name", ["epsilon", "velocity", "stochastic", "three_steps"])
@pytest.mark.parametrize("denoise", [1.0, 0.5, 0.62])
def test_txt2img_and_img2img(bench: Bench, models: Models, name: str, denoise: float) -> None:
    model = getattr(models, name)
    latent = EMPTY if denoise == 1 else random_latent(3, batch=2)
    loaded = bench(
        "FewStepLoadStudent", ckpt_name=model.name, cfg_is_guidance=True, guidance=0.0, live_negative=False
    )
    found = bench.sampled(fewstep(bench, loaded[0], bench.latent(latent), denoise=denoise))
    start = timestep_of_strength(denoise)
    timesteps = [start, *(t for t in model.spec.timesteps if t < start)]
    assert_equal(found, expected(model, latent, timesteps=timesteps))
