"""Sampling in a real ComfyUI, through its HTTP interface, against independent loops on diffusers' UNet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hosts.bench import Bench, Link, random_conditioning, random_latent, random_picture
from hosts.comfyui import Failed
from hosts.models import BAKED_GUIDANCE, Model, Models
from hosts.reference import (
    SCALE,
    Sampling,
    Unet,
    at_latent_size,
    encode,
    level,
    relative_error,
    student,
    timestep_of_strength,
    without_the_masked,
)
from torch import Tensor

TIGHT = 1e-5
TRAINED = (999, 749, 499, 249)
SEED = 2**40 + 7
EMPTY = torch.zeros(2, 4, 8, 8)
COND, OTHER = random_conditioning(1), random_conditioning(2)


@cache
def unet(model: Model) -> Unet:
    kind = "epsilon" if model.spec is None else model.spec.prediction_type
    return Unet(model.tensors, prediction_type=kind)


def expected(
    model: Model,
    latent: Tensor = EMPTY,
    *,
    guidance: float | Sequence[float] | None = 7.0,
    timesteps: Sequence[int] = TRAINED,
    concat: Tensor | None = None,
    **choices: Any,
) -> Tensor:
    stochastic = model.spec is not None and model.spec.sampler == "stochastic"
    denoise = student(unet(model), COND, guidance, concat=concat)
    return Sampling(denoise, timesteps, seed=SEED, stochastic=stochastic, **choices)(latent)


def assert_equal(found: Tensor, reference: Tensor) -> None:
    error = relative_error(found, reference)
    assert error < TIGHT, f"relative error {error:.1e}"


def fewstep(bench: Bench, model: Link, latent: Link | None = None, **choices: Any) -> Link:
    """The pack's own node: COND at guidance 7 on two empty latents, unless said otherwise."""
    inputs = {"seed": SEED, "guidance": 7.0, "denoise": 1.0, **choices}
    inputs.setdefault("positive", bench.conditioning(COND))
    return bench("FewStepKSampler", model=model, latent=latent or bench.latent(EMPTY), **inputs)[0]


def stock(bench: Bench, model: Link, latent: Link | None = None, **choices: Any) -> Link:
    """The stock KSampler as a graph of habit has it: cfg 7 and a negative prompt."""
    inputs = {"seed": SEED, "steps": 4, "cfg": 7.0, "denoise": 1.0} | prompts(bench, choices)
    return bench("KSampler", model=model, latent_image=latent or bench.latent(EMPTY), **inputs)[0]


def prompts(bench: Bench, choices: dict[str, Any]) -> dict[str, Any]:
    inputs = {"sampler_name": "fewstep", "scheduler": "fewstep", **choices}
    inputs.setdefault("positive", bench.conditioning(COND))
    inputs.setdefault("negative", bench.conditioning(OTHER))
    return inputs


def load_student(bench: Bench, model: Model, **choices: Any) -> Link:
    inputs = {"cfg_is_guidance": True, "guidance": 0.0, "live_negative": False, **choices}
    return bench("FewStepLoadStudent", ckpt_name=model.name, **inputs)[0]


def below(model: Model, start: int) -> list[int]:
    assert model.spec is not None
    return [start, *(t for t in model.spec.timesteps if t < start)]


# -- Stock nodes alone -----------------------------------------------------------------------------------


def test_a_teacher_in_a_stock_graph_is_what_the_reference_says(bench: Bench, models: Models) -> None:
    """The yardstick itself: no node, sampler or scheduler of ours."""
    model = models.teacher
    out = stock(bench, bench.load(model)[0], cfg=1.0, sampler_name="euler", scheduler="simple")
    assert_equal(bench.sampled(out), expected(model, guidance=None))


@pytest.mark.parametrize(
    "choices",
    [
        {"sampler_name": "euler", "scheduler": "simple", "cfg": 1.0},
        {"sampler_name": "euler", "scheduler": "simple", "cfg": 7.0},
        {"sampler_name": "fewstep", "scheduler": "fewstep", "cfg": BAKED_GUIDANCE},
    ],
    ids=str,
)
def test_a_baked_file_has_its_guidance_whatever_the_cfg(
    bench: Bench, models: Models, choices: dict[str, Any]
) -> None:
    found = bench.sampled(stock(bench, bench.load(models.baked)[0], **choices))
    assert_equal(found, expected(models.epsilon, guidance=BAKED_GUIDANCE))


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        *((name, "fewstep") for name in ("epsilon", "velocity", "stochastic", "three_steps")),
        *(("epsilon", scheduler) for scheduler in ("simple", "normal", "karras")),
        ("stochastic", "karras"),
    ],
)
def test_stock_nodes_with_the_sampler_fewstep_are_the_packs_own_pixel_for_pixel(
    bench: Bench, models: Models, name: str, scheduler: str
) -> None:
    model = getattr(models, name)
    ours = bench.sampled(fewstep(bench, load_student(bench, model)))
    found = bench.sampled(stock(bench, bench.load(model)[0], scheduler=scheduler, steps=model.spec.steps))
    if scheduler in ("fewstep", "simple"):
        assert torch.equal(found, ours)
    else:  # their first noise level is the highest but for rounding
        assert_equal(found, ours)


@pytest.mark.parametrize("name", ["epsilon", "velocity", "three_steps"])
def test_stock_euler_on_the_scheduler_fewstep_is_the_packs_own_node_pixel_for_pixel(
    bench: Bench, models: Models, name: str
) -> None:
    model = getattr(models, name)
    loaded = bench.load(model)[0]
    euler = stock(bench, loaded, sampler_name="euler", steps=model.spec.steps)
    assert torch.equal(bench.sampled(euler), bench.sampled(fewstep(bench, loaded)))


@pytest.mark.parametrize(
    "choices",
    [
        {"steps": 4, "sampler_name": "fewstep"},
        {"steps": 10, "sampler_name": "fewstep"},
        {"steps": 4, "sampler_name": "fewstep", "scheduler": "simple"},
        {"steps": 2, "sampler_name": "euler"},
    ],
    ids=str,
)
def test_a_denoise_of_half_starts_at_499(bench: Bench, models: Models, choices: dict[str, Any]) -> None:
    latent = random_latent(3, batch=2)
    out = stock(bench, bench.load(models.epsilon)[0], bench.latent(latent), denoise=0.5, **choices)
    assert_equal(bench.sampled(out), expected(models.epsilon, latent, timesteps=[499, 249]))


def test_ksampler_advanced_split_in_two_is_one_run(bench: Bench, models: Models) -> None:
    model = bench.load(models.epsilon)[0]
    inputs = {"model": model, "noise_seed": SEED, "steps": 4, "cfg": 7.0} | prompts(bench, {})
    first = bench(
        "KSamplerAdvanced",
        latent_image=bench.latent(EMPTY),
        add_noise="enable",
        start_at_step=0,
        end_at_step=2,
        return_with_leftover_noise="enable",
        **inputs,
    )[0]
    second = bench(
        "KSamplerAdvanced",
        latent_image=first,
        add_noise="disable",
        start_at_step=2,
        end_at_step=10000,
        return_with_leftover_noise="disable",
        **inputs,
    )[0]
    halfway, end = bench.sampled(first), bench.sampled(second)
    whole = bench.sampled(stock(bench, model))
    assert_equal(halfway, expected(models.epsilon, timesteps=[999, 749], land=499))
    assert_equal(end, whole)
    assert_equal(end, expected(models.epsilon))


def test_ksampler_advanced_started_late_adds_the_noise_of_that_level(bench: Bench, models: Models) -> None:
    latent = random_latent(3, batch=2)
    found = bench.sampled(
        bench(
            "KSamplerAdvanced",
            model=bench.load(models.velocity)[0],
            noise_seed=SEED,
            steps=4,
            cfg=7.0,
            latent_image=bench.latent(latent),
            add_noise="enable",
            start_at_step=1,
            end_at_step=10000,
            return_with_leftover_noise="disable",
            **prompts(bench, {}),
        )[0]
    )
    assert_equal(found, expected(models.velocity, latent, timesteps=[749, 499, 249]))


# -- The pack's own nodes --------------------------------------------------------------------------------


@pytest.mark.parametrize("denoise", [1.0, 0.62, 0.2])
@pytest.mark.parametrize("name", ["epsilon", "velocity", "stochastic", "three_steps"])
def test_txt2img_and_img2img(bench: Bench, models: Models, name: str, denoise: float) -> None:
    model = getattr(models, name)
    latent = EMPTY if denoise == 1 else random_latent(3, batch=2)
    found = bench.sampled(fewstep(bench, load_student(bench, model), bench.latent(latent), denoise=denoise))
    timesteps = below(model, timestep_of_strength(denoise))
    assert_equal(found, expected(model, latent, timesteps=timesteps))


def test_the_node_says_which_timesteps_ran(bench: Bench, models: Models) -> None:
    node = bench(
        "FewStepKSampler",
        model=load_student(bench, models.epsilon),
        positive=bench.conditioning(COND),
        latent=bench.latent(EMPTY),
        seed=SEED,
        guidance=6.5,
        denoise=0.62,
    )
    bench.sampled(node[0])
    assert bench.last is not None
    [text] = bench.last.outputs[node.id]["text"]
    assert "619, 499, 249" in text and "6.5" in text


@pytest.mark.parametrize("start", [1.0, 0.5])
def test_sampler_custom_with_the_packs_sampler_and_sigmas_is_the_packs_own_node(
    bench: Bench, models: Models, start: float
) -> None:
    model, latent = bench.load(models.epsilon)[0], random_latent(3, batch=2)
    sigmas = bench("FewStepSigmas", model=model, start=start)[0]
    positive = bench.conditioning(COND)
    custom = bench(
        "SamplerCustom",
        model=model,
        add_noise=True,
        noise_seed=SEED,
        cfg=7.0,
        positive=positive,
        negative=bench.conditioning(OTHER),
        sampler=bench("FewStepSamplerSelect")[0],
        sigmas=sigmas,
        latent_image=bench.latent(latent),
    )
    found = bench.sampled(custom[0])
    ours = fewstep(bench, model, bench.latent(latent), positive=positive, denoise=start)
    assert torch.equal(found, bench.sampled(ours))
    levels = [level(t) for t in below(models.epsilon, timestep_of_strength(start))]
    trained = torch.tensor([s / a for a, s in levels] + [0.0])
    assert relative_error(bench.run(sigmas=sigmas)["sigmas"], trained) < 1e-6


def test_a_guider_without_cfg_takes_the_students_default(bench: Bench, models: Models) -> None:
    found = bench.sampled(with_basic_guider(bench, bench.load(models.epsilon)[0]))
    assert_equal(found, expected(models.epsilon, guidance=7.5))


def test_a_guider_without_cfg_takes_the_loaders_guidance(bench: Bench, models: Models) -> None:
    model = load_student(bench, models.epsilon, guidance=3.0)
    assert_equal(bench.sampled(with_basic_guider(bench, model)), expected(models.epsilon, guidance=3.0))


def with_basic_guider(bench: Bench, model: Link) -> Link:
    guider = bench("BasicGuider", model=model, conditioning=bench.conditioning(COND))
    return bench(
        "SamplerCustomAdvanced",
        noise=bench("RandomNoise", noise_seed=SEED)[0],
        guider=guider[0],
        sampler=bench("FewStepSamplerSelect")[0],
        sigmas=bench("FewStepSigmas", model=model, start=1.0)[0],
        latent_image=bench.latent(EMPTY),
    )[0]


def test_a_picture_of_a_batch_can_be_made_alone(bench: Bench, models: Models) -> None:
    index = torch.tensor([1])
    alone = bench.latent(EMPTY[:1], batch_index=index)
    found = bench.sampled(fewstep(bench, load_student(bench, models.epsilon), alone))
    assert_equal(found, expected(models.epsilon)[1:])


# -- Guidance --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", ["FluxGuidance", "FewStepGuidance"])
def test_the_prompts_guidance_goes_before_the_samplers(bench: Bench, models: Models, node: str) -> None:
    positive = bench(node, conditioning=bench.conditioning(COND), guidance=3.0)[0]
    model = load_student(bench, models.epsilon)
    in_stock = bench.sampled(stock(bench, model, positive=positive))
    assert torch.equal(in_stock, bench.sampled(fewstep(bench, model, positive=positive)))
    assert_equal(in_stock, expected(models.epsilon, guidance=3.0))


def test_the_loaders_guidance_is_taken_where_cfg_is_not_guidance(bench: Bench, models: Models) -> None:
    model = load_student(bench, models.epsilon, cfg_is_guidance=False, guidance=5.0)
    assert_equal(bench.sampled(stock(bench, model)), expected(models.epsilon, guidance=5.0))
    assert_equal(bench.sampled(fewstep(bench, model)), expected(models.epsilon, guidance=7.0))


@pytest.mark.parametrize("name", ["epsilon", "stochastic"])
def test_each_picture_of_a_batch_has_its_guidance(bench: Bench, models: Models, name: str) -> None:
    model = getattr(models, name)
    positive = bench(
        "FewStepGuidance", conditioning=bench.conditioning(COND), guidance=7.0, per_picture="2, 11.5"
    )[0]
    found = bench.sampled(fewstep(bench, load_student(bench, model), positive=positive))
    assert_equal(found, expected(model, guidance=[2.0, 11.5]))
    assert torch.equal(bench.sampled(stock(bench, bench.load(model)[0], positive=positive)), found)


def test_two_regions_have_two_guidances(bench: Bench, models: Models) -> None:
    left = torch.zeros(1, 64, 64)
    left[:, :, :24] = 1
    network = unet(models.epsilon)
    regions = []
    for mask, cond, guidance in ((left, COND, 2.0), (1 - left, OTHER, 12.0)):
        drawn = bench.picture(torch.zeros(1, 64, 64, 3), mask)[1]
        dialled = bench("FewStepGuidance", conditioning=bench.conditioning(cond), guidance=guidance)[0]
        regions.append(
            bench(
                "ConditioningSetMask",
                conditioning=dialled,
                mask=drawn,
                strength=1.0,
                set_cond_area="default",
            )[0]
        )
    both = bench("ConditioningCombine", conditioning_1=regions[0], conditioning_2=regions[1])[0]
    found = bench.sampled(fewstep(bench, load_student(bench, models.epsilon), positive=both))
    share = at_latent_size(left, EMPTY).double()

    def denoise(z: Tensor, timestep: int) -> Tensor:
        return share * student(network, COND, 2.0)(z, timestep) + (1 - share) * student(network, OTHER, 12.0)(
            z, timestep
        )

    assert_equal(found, Sampling(denoise, TRAINED, seed=SEED)(EMPTY))
    assert_equal(bench.sampled(stock(bench, bench.load(models.epsilon)[0], positive=both)), found)


def asked_of_our_node(bench: Bench, model: Link, guidance: float) -> Link:
    return fewstep(bench, model, guidance=guidance)


def asked_as_cfg(bench: Bench, model: Link, guidance: float) -> Link:
    return stock(bench, model, cfg=guidance)


def asked_of_the_prompt(bench: Bench, model: Link, guidance: float) -> Link:
    positive = bench("FewStepGuidance", conditioning=bench.conditioning(COND), guidance=guidance)[0]
    return stock(bench, model, positive=positive)


@pytest.mark.parametrize("guidance", [15.5, 0.5])
@pytest.mark.parametrize("ask", [asked_of_our_node, asked_as_cfg, asked_of_the_prompt])
def test_guidance_out_of_the_trained_range_names_the_range(
    bench: Bench, models: Models, ask: Callable[[Bench, Link, float], Link], guidance: float
) -> None:
    out = ask(bench, bench.load(models.epsilon)[0], guidance)
    with pytest.raises(Failed, match=rf"guidance {guidance:g} was asked for, .* guidance 1 to 15\b"):
        bench.sampled(out)


def test_a_guidance_for_each_picture_of_another_batch_fails(bench: Bench, models: Models) -> None:
    positive = bench(
        "FewStepGuidance", conditioning=bench.conditioning(COND), guidance=7.0, per_picture="2, 4, 8"
    )[0]
    with pytest.raises(Failed, match=r"3 guidances .* batch of 2"):
        bench.sampled(fewstep(bench, load_student(bench, models.epsilon), positive=positive))


def test_a_student_without_metadata_has_its_familys_defaults_and_a_warning(
    bench: Bench, models: Models
) -> None:
    found = bench.sampled(stock(bench, bench.load(models.nameless)[0]))
    assert_equal(found, expected(models.epsilon))
    assert bench.last is not None
    [told] = [each for each in bench.last.told("fewstep.say") if "metadata" in each["text"]]
    assert told["severity"] == "warn"
    assert torch.equal(bench.sampled(fewstep(bench, load_student(bench, models.nameless))), found)


# -- Inpainting ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("denoise", [1.0, 0.62])
@pytest.mark.parametrize("name", ["epsilon", "velocity", "stochastic"])
def test_a_soft_mask_on_an_ordinary_student(bench: Bench, models: Models, name: str, denoise: float) -> None:
    model, latent, (image, mask) = getattr(models, name), random_latent(3), random_picture(4)
    masked = bench("SetLatentNoiseMask", samples=bench.latent(latent), mask=bench.picture(image, mask)[1])[0]
    found = bench.sampled(fewstep(bench, load_student(bench, model), masked, denoise=denoise))
    timesteps = below(model, timestep_of_strength(denoise))
    share = at_latent_size(mask, latent)
    assert_equal(found, expected(model, latent, timesteps=timesteps, mask=share))


def test_vae_encode_for_inpainting(bench: Bench, models: Models) -> None:
    loaded, (image, mask) = bench.load(models.epsilon), random_picture(4)
    picture = bench.picture(image, mask)
    encoded = bench("VAEEncodeForInpaint", vae=loaded[2], pixels=picture[0], mask=picture[1], grow_mask_by=0)
    found = bench.sampled(stock(bench, loaded[0], encoded[0]))
    latent = encode(models.epsilon.tensors, without_the_masked(image, mask))
    share = at_latent_size(mask.round(), latent)
    assert_equal(found, expected(models.epsilon, latent, mask=share))


def test_differential_diffusion_lets_each_place_change_in_its_share_of_the_steps(
    bench: Bench, models: Models
) -> None:
    latent, (image, mask) = random_latent(3), random_picture(4)
    masked = bench("SetLatentNoiseMask", samples=bench.latent(latent), mask=bench.picture(image, mask)[1])[0]
    model = bench("DifferentialDiffusion", model=bench.load(models.epsilon)[0])[0]
    found = bench.sampled(fewstep(bench, model, masked))
    share = at_latent_size(mask, latent)
    assert_equal(
        found, expected(models.epsilon, latent, mask=lambda timestep: (share >= timestep / 999).float())
    )


@pytest.mark.parametrize("noise_mask", [True, False])
@pytest.mark.parametrize("denoise", [1.0, 0.62])
def test_an_inpainting_student(bench: Bench, models: Models, denoise: float, noise_mask: bool) -> None:
    model, (image, mask) = models.inpaint, random_picture(4)
    loaded, picture = bench.load(model), bench.picture(image, mask)
    prepared = bench(
        "InpaintModelConditioning",
        positive=bench.conditioning(COND),
        negative=bench.conditioning(OTHER),
        vae=loaded[2],
        pixels=picture[0],
        mask=picture[1],
        noise_mask=noise_mask,
    )
    found = bench.sampled(fewstep(bench, loaded[0], prepared[2], positive=prepared[0], denoise=denoise))
    latent = encode(model.tensors, image)
    share = at_latent_size(mask, latent)
    seen = SCALE * encode(model.tensors, without_the_masked(image, mask))
    reference = expected(
        model,
        latent,
        timesteps=below(model, timestep_of_strength(denoise)),
        concat=torch.cat([share.round(), seen], dim=1),
        mask=share if noise_mask else None,
    )
    assert_equal(found, reference)
    if denoise == 1:
        again = stock(bench, loaded[0], prepared[2], positive=prepared[0], negative=prepared[1])
        assert torch.equal(bench.sampled(again), found)
