"""What people add to a model, on students in a real ComfyUI: LoRAs, a student's own LoRA, a ControlNet."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from diffusers import ControlNetModel
from hosts.bench import Bench, Link, random_conditioning, random_picture
from hosts.models import CONTROLNET, LORA_BAKED_GUIDANCE, Model, Models, controlnet_to_ldm
from hosts.reference import Sampling, Unet, merged, relative_error, student
from torch import Tensor

TRAINED = (999, 749, 499, 249)
SEED = 7
EMPTY = torch.zeros(2, 4, 8, 8)
COND, OTHER = random_conditioning(1), random_conditioning(2)


def changed(base: Model, *loras: tuple[Model, float]) -> Unet:
    def change(state: dict[str, Tensor]) -> dict[str, Tensor]:
        for lora, strength in loras:
            state = merged(state, lora.tensors, strength)
        return state

    return Unet(base.tensors, change=change)


def without_shift(lora: Model, base: Model) -> dict[str, Tensor]:
    """A student LoRA's tensors for a live dial: the bias without what the dial says at the baked guidance."""
    tensors = dict(lora.tensors)
    name, first = "lora_unet_time_embedding_linear_1", "model.diffusion_model.time_embed.0.weight"
    embedded = Unet.w_embedding([LORA_BAKED_GUIDANCE])[0].double()
    weight = base.tensors[first].double() + tensors[f"{name}.diff"].double()
    shift = weight @ (tensors["fewstep.cond_proj.weight"].double() @ embedded)
    tensors[f"{name}.diff_b"] = (tensors[f"{name}.diff_b"].double() - shift).float()
    return tensors


def sampled(bench: Bench, model: Link, **choices: object) -> Tensor:
    inputs = {"seed": SEED, "guidance": 5.0, "denoise": 1.0, "latent": bench.latent(EMPTY), **choices}
    inputs.setdefault("positive", bench.conditioning(COND))
    return bench.sampled(bench("FewStepKSampler", model=model, **inputs)[0])


def assert_equal(found: Tensor, network: Unet, guidance: float | None) -> None:
    reference = Sampling(student(network, COND, guidance), TRAINED, seed=SEED)(EMPTY)
    error = relative_error(found, reference)
    assert error < 1e-5, f"relative error {error:.1e}"


def style(bench: Bench, model: Link, models: Models, strength: float) -> Link:
    name = models.style_lora.name
    return bench("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=strength)[0]


def dial(bench: Bench, model: Link, models: Models, lora: Model | None = None) -> Link:
    choices = {"strength": 1.0, "cfg_is_guidance": True, "guidance": 0.0, "live_negative": False}
    name = (lora or models.student_lora).name
    return bench("FewStepLoadStudentLora", model=model, lora_name=name, **choices)[0]


def stock(bench: Bench, model: Link) -> Tensor:
    """A stock KSampler as a baked file wants it."""
    out = bench(
        "KSampler",
        model=model,
        positive=bench.conditioning(COND),
        negative=bench.conditioning(OTHER),
        latent_image=bench.latent(EMPTY),
        seed=SEED,
        steps=4,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    return bench.sampled(out[0])


def test_a_persons_lora_on_attention_and_on_the_time_embedding(bench: Bench, models: Models) -> None:
    model = style(bench, bench.load(models.epsilon)[0], models, 0.8)
    assert_equal(sampled(bench, model), changed(models.epsilon, (models.style_lora, 0.8)), 5.0)


@pytest.mark.parametrize("guidance", [2.0, LORA_BAKED_GUIDANCE])
def test_a_student_lora_has_a_live_dial(bench: Bench, models: Models, guidance: float) -> None:
    model = dial(bench, bench.load(models.teacher)[0], models)
    live = without_shift(models.student_lora, models.teacher)
    network = Unet(models.teacher.tensors, change=lambda state: merged(state, live))
    assert_equal(sampled(bench, model, guidance=guidance), network, guidance)


@pytest.mark.parametrize("order", ["style first", "student first"])
def test_a_student_lora_goes_with_a_style_lora(bench: Bench, models: Models, order: str) -> None:
    model = bench.load(models.teacher)[0]
    if order == "style first":
        model = dial(bench, style(bench, model, models, 0.8), models)
    else:
        model = style(bench, dial(bench, model, models), models, 0.8)

    def change(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        live = without_shift(models.student_lora, models.teacher)
        return merged(merged(state, live), models.style_lora.tensors, 0.8)

    assert_equal(sampled(bench, model), Unet(models.teacher.tensors, change=change), 5.0)


def test_a_student_lora_in_the_stock_loader_has_its_baked_guidance(bench: Bench, models: Models) -> None:
    loaded, name = bench.load(models.teacher)[0], models.student_lora.name
    model = bench("LoraLoaderModelOnly", model=loaded, lora_name=name, strength_model=1.0)[0]
    live = without_shift(models.student_lora, models.teacher)
    network = Unet(models.teacher.tensors, change=lambda state: merged(state, live))
    assert_equal(stock(bench, model), network, LORA_BAKED_GUIDANCE)


@pytest.mark.parametrize("guidance", [2.0, LORA_BAKED_GUIDANCE])
def test_a_trained_student_lora_is_its_merged_student(bench: Bench, models: Models, guidance: float) -> None:
    model = dial(bench, bench.load(models.teacher)[0], models, models.trained_lora)
    assert_equal(sampled(bench, model, guidance=guidance), Unet(models.trained.tensors), guidance)


def test_a_trained_student_lora_in_the_stock_loader_is_its_merged_student_at_the_baked_guidance(
    bench: Bench, models: Models
) -> None:
    loaded, name = bench.load(models.teacher)[0], models.trained_lora.name
    model = bench("LoraLoaderModelOnly", model=loaded, lora_name=name, strength_model=1.0)[0]
    assert_equal(stock(bench, model), Unet(models.trained.tensors), LORA_BAKED_GUIDANCE)


def test_a_controlnet(bench: Bench, models: Models) -> None:
    image, mask = random_picture(4)
    applied = bench(
        "ControlNetApplyAdvanced",
        positive=bench.conditioning(COND),
        negative=bench.conditioning(OTHER),
        control_net=bench("ControlNetLoader", control_net_name=models.controlnet.name)[0],
        image=bench.picture(image, mask)[0],
        strength=0.8,
        start_percent=0.0,
        end_percent=1.0,
    )
    found = sampled(bench, bench.load(models.epsilon)[0], positive=applied[0])
    control, network = controlnet(models.controlnet), Unet(models.epsilon.tensors)
    hint = image.movedim(-1, 1).expand(2, -1, -1, -1)

    @torch.inference_mode()
    def denoise(z: Tensor, timestep: int) -> Tensor:
        down, middle = control(
            z.float(),
            torch.tensor(timestep),
            COND.expand(2, -1, -1),
            hint,
            conditioning_scale=0.8,
            return_dict=False,
        )
        extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return network(z, timestep, COND, [5.0, 5.0], extra=extra)

    assert relative_error(found, Sampling(denoise, TRAINED, seed=SEED)(EMPTY)) < 1e-5
    assert relative_error(found, Sampling(student(network, COND, 5.0), TRAINED, seed=SEED)(EMPTY)) > 0.01


def controlnet(model: Model) -> ControlNetModel:
    with torch.device("meta"):
        network = ControlNetModel(**CONTROLNET).eval()
    own = controlnet_to_ldm({key: key for key in network.state_dict()})  # type: ignore[dict-item]
    network.load_state_dict({name: model.tensors[key].clone() for key, name in own.items()}, assign=True)
    return network
