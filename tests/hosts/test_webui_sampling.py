"""Sampling in a real A1111, Forge or reForge, against independent loops on diffusers' UNet."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import hosts.reference as reference
import numpy as np
import pytest
import torch
from hosts.models import LORA_BAKED_GUIDANCE, Model
from hosts.reference import SCALE, Sampling, Unet, relative_error, student, timestep_of_strength
from hosts.webui import Picture, Refused, WebUI, parameters
from hosts.webui_models import WebUIModels
from PIL import Image
from torch import Tensor

from toolkit.diffusion.guidance import bias_shift

TIGHT = 1e-4
TRAINED = (999, 749, 499, 249)
SEED = 5


@cache
def unet(model: Model, *loras: Model, live: bool = True) -> Unet:
    """``live``: a student LoRA's dial instead of its baked guidance."""

    def change(state: dict[str, Tensor]) -> dict[str, Tensor]:
        for lora in loras:
            state = reference.merged(state, lora.tensors)
        cond_proj = state.pop("time_embedding.cond_proj.weight") if loras else None
        if cond_proj is not None and live:
            weight, bias = (f"time_embedding.linear_1.{name}" for name in ("weight", "bias"))
            state[bias] = state[bias] - bias_shift(state[weight], cond_proj, LORA_BAKED_GUIDANCE - 1).float()
            state["time_embedding.cond_proj.weight"] = cond_proj
        return state

    kind = "epsilon" if model.spec is None else model.spec.prediction_type
    tensors = {key: value.float() for key, value in model.tensors.items()}
    return Unet(tensors, prediction_type=kind, change=change)


def expected(
    network: Unet,
    picture: Picture,
    image: Tensor | None = None,
    *,
    guidance: float | None = 7.0,
    timesteps: Sequence[int] = TRAINED,
    concat: Tensor | None = None,
    **choices: Any,
) -> Tensor:
    """The latent, scaled, that the picture's own prompt and seed must give."""
    image = torch.zeros_like(picture.latent) if image is None else image
    denoise = student(network, picture.context, guidance, concat=concat)
    return SCALE * Sampling(denoise, timesteps, seed=SEED, **choices)(image / SCALE)


def assert_equal(found: Tensor, wanted: Tensor) -> None:
    error = relative_error(found, wanted)
    assert error < TIGHT, f"relative error {error:.1e}"


def of(model: Model) -> dict[str, Any]:
    return {"override_settings": {"sd_model_checkpoint": model.name}}


def said(picture: Picture) -> str:
    return "\n".join(picture.seen["comments"])


def drawing() -> Image.Image:
    rows, columns = np.mgrid[0:64, 0:64]
    return Image.fromarray(np.stack([rows * 4, columns * 4, (rows + columns) * 2], -1).astype(np.uint8))


def half_mask() -> Image.Image:
    return Image.fromarray(np.where(np.arange(64)[None] < 32, 0, 255).repeat(64, 0).astype(np.uint8))


@pytest.fixture(scope="module")
def plain(webui: WebUI) -> Picture:
    """What the student that is selected makes of the usual request."""
    return webui.txt2img()


# -- The picture and its cost ----------------------------------------------------------------------------


def test_the_sampler_is_listed(webui: WebUI) -> None:
    names = [entry["name"] for entry in webui.get("/sdapi/v1/samplers")]
    assert names.count("FewStep") == 1


def test_a_picture_is_what_the_reference_says_at_one_evaluation_a_step(
    plain: Picture, webui_models: WebUIModels
) -> None:
    assert plain.timesteps == list(TRAINED) and plain.rows == 4
    assert_equal(plain.latent, expected(unet(webui_models.epsilon), plain))
    assert "Sampler: FewStep" in plain.infotext and "Skip Early" not in plain.infotext
    assert said(plain) == ""


def test_the_cfg_slider_is_the_guidance(webui: WebUI, plain: Picture, webui_models: WebUIModels) -> None:
    picture = webui.txt2img(cfg_scale=2.5)
    assert picture.rows == 4 and picture.png != plain.png
    assert_equal(picture.latent, expected(unet(webui_models.epsilon), picture, guidance=2.5))


def test_guidance_out_of_the_trained_range_is_told_and_cut(webui: WebUI, webui_models: WebUIModels) -> None:
    picture = webui.txt2img(cfg_scale=30)
    assert "trained for guidance 1 to 15: 15 was taken for cfg 30" in said(picture)
    assert_equal(picture.latent, expected(unet(webui_models.epsilon), picture, guidance=15))


def test_a_negative_prompt_changes_nothing_and_is_told_once(webui: WebUI, plain: Picture) -> None:
    first = webui.txt2img(negative_prompt="a badger, " * 60)
    assert "the negative prompt has no effect on this student" in said(first)
    second = webui.txt2img(negative_prompt="a badger")
    assert said(second) == "" and first.rows == second.rows == 4
    assert torch.equal(first.latent, plain.latent) and torch.equal(second.latent, plain.latent)


def test_a_batch_is_its_pictures_one_by_one(webui: WebUI, plain: Picture) -> None:
    batch = webui.txt2img(batch_size=2)
    assert [call["rows"] for call in batch.seen["calls"]] == [2] * 4
    single = webui.txt2img(seed=SEED + 1)
    assert_equal(batch.latent, torch.cat([plain.latent, single.latent]))


def test_prompts_joined_by_and_are_averaged(webui: WebUI) -> None:
    whole = webui.txt2img(prompt="a fox")
    twice = webui.txt2img(prompt="a fox AND a fox :3")
    assert_equal(twice.latent, whole.latent)
    assert twice.rows == 8


@pytest.mark.parametrize("name", ["stochastic", "velocity"])
def test_other_kinds_of_students_are_what_the_reference_says(
    webui: WebUI, webui_models: WebUIModels, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Model = getattr(webui_models, name)
    webui.knows(model.name)
    if model.spec is not None and model.spec.ztsnr:
        root = np.sqrt(reference.ALPHAS_CUMPROD)
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        monkeypatch.setattr(reference, "ALPHAS_CUMPROD", np.maximum(root**2, 4.8973451890853435e-08))
    picture = webui.txt2img(**of(model))
    assert picture.rows == 4
    assert_equal(picture.latent, expected(unet(model), picture, stochastic=name == "stochastic"))


# -- Pictures from pictures ------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.2, 0.5, 0.6, 0.75])
def test_img2img_starts_at_the_strengths_timestep(
    webui: WebUI, webui_models: WebUIModels, strength: float
) -> None:
    picture = webui.img2img(drawing(), denoising_strength=strength)
    start = timestep_of_strength(strength)
    timesteps = [start, *(t for t in TRAINED if t < start)]
    assert picture.timesteps == timesteps and picture.rows == len(timesteps)
    wanted = expected(unet(webui_models.epsilon), picture, picture.start, timesteps=timesteps)
    assert_equal(picture.latent, wanted)


def test_img2img_of_all_or_nothing(webui: WebUI) -> None:
    assert webui.img2img(drawing(), denoising_strength=1).timesteps == list(TRAINED)
    nothing = webui.img2img(drawing(), denoising_strength=0)
    assert nothing.rows == 0 and torch.equal(nothing.latent, nothing.start)


@pytest.mark.parametrize("name", ["epsilon", "inpaint"])
def test_inpainting_keeps_what_is_outside_the_mask(
    webui: WebUI, webui_models: WebUIModels, name: str
) -> None:
    model: Model = getattr(webui_models, name)
    webui.knows(model.name)
    picture = webui.img2img(
        drawing(), mask=half_mask(), denoising_strength=0.75, mask_blur=0, inpainting_fill=1, **of(model)
    )
    assert picture.timesteps == [749, 499, 249] and picture.rows == 3
    before, after = (np.asarray(image).astype(int) for image in (drawing(), picture.pixels))
    assert np.abs(before - after)[:, :31].max() == 0 and np.abs(before - after)[:, 33:].max() > 0
    if webui.host.kind != "forge":  # which draws other noise outside the mask at every step, from no seed
        mask = torch.tensor(picture.seen["mask"])[:1][None]
        concat = torch.tensor(picture.seen["concat"]) if name == "inpaint" else None
        wanted = expected(
            unet(model), picture, picture.start, timesteps=picture.timesteps, mask=mask, concat=concat
        )
        assert_equal(picture.latent, wanted)


def test_hires_fix_starts_its_second_pass_in_between(webui: WebUI, webui_models: WebUIModels) -> None:
    second = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "denoising_strength": 0.5}
    if webui.host.kind != "a1111":
        second["hr_cfg"] = 7
    if webui.host.kind == "forge":
        second["hr_additional_modules"] = ["Use same choices"]  # without it its own API fails
    picture = webui.txt2img(**second)
    assert picture.timesteps == [*TRAINED, 499, 249] and picture.rows == 6
    assert picture.pixels.size == (128, 128)


def test_an_upscaling_script_starts_each_tile_at_its_strength(webui: WebUI) -> None:
    """Arguments: a text, the tiles' overlap, the upscaler, the factor."""
    script = {"script_name": "sd upscale", "script_args": ["", 16, "None", 1.5]}
    picture = webui.img2img(drawing(), denoising_strength=0.5, **script)
    assert picture.timesteps == [499, 249]


# -- The person's checkpoint -----------------------------------------------------------------------------


def test_a_checkpoints_student_is_taken_in_its_place(
    webui: WebUI, plain: Picture, webui_models: WebUIModels
) -> None:
    before = webui.state()
    picture = webui.txt2img(**of(webui_models.teacher))
    assert picture.png == plain.png and "Model: epsilon" in picture.infotext
    assert webui.state()["options"] == before["options"]


def test_of_several_students_the_one_of_these_steps_is_taken(webui: WebUI, webui_models: WebUIModels) -> None:
    webui.knows(webui_models.two_steps.name)
    picture = webui.txt2img(steps=2, **of(webui_models.teacher))
    assert picture.timesteps == [999, 499] and "Model: two_steps" in picture.infotext
    other = webui.txt2img(steps=20, **of(webui_models.teacher))
    assert other.timesteps == list(TRAINED) and "Steps: 4" in other.infotext
    assert "this checkpoint's students have 2, 4: epsilon.safetensors with 4 was taken" in said(other)


def test_a_checkpoint_without_a_student_is_an_error_with_a_sentence(
    webui: WebUI, webui_models: WebUIModels
) -> None:
    webui.knows(webui_models.stranger.name)
    with pytest.raises(Refused, match=r"stranger\.safetensors is none, nor was one among") as refused:
        webui.txt2img(**of(webui_models.stranger))
    assert refused.value.code == 500


def test_the_settings_name_a_student_or_another_sampler(webui: WebUI, webui_models: WebUIModels) -> None:
    webui.knows(webui_models.stranger.name, webui_models.epsilon.name)
    webui.post("/sdapi/v1/options", {"fewstep_defaults": "stranger = epsilon"})
    try:
        assert "Model: epsilon" in webui.txt2img(**of(webui_models.stranger)).infotext
        webui.post(
            "/sdapi/v1/options",
            {"fewstep_defaults": "", "fewstep_without": "Sample the checkpoint itself with DPM++ 2M"},
        )
        picture = webui.txt2img(**of(webui_models.stranger))
        assert "Sampler: DPM++ 2M" in picture.infotext and "DPM++ 2M was taken" in said(picture)
    finally:
        webui.post("/sdapi/v1/options", {"fewstep_defaults": "", "fewstep_without": "Stop with a message"})


def test_an_ordinary_sampler_on_a_student_is_warned_of_and_gets_the_usual_guidance(
    webui: WebUI, webui_models: WebUIModels
) -> None:
    picture = webui.txt2img(sampler_name="Euler", scheduler="Simple", cfg_scale=1)
    assert "Euler with these steps and this scheduler is not that" in said(picture)
    assert picture.timesteps == list(TRAINED)
    guided = expected(unet(webui_models.epsilon), picture, guidance=7.5)
    assert relative_error(picture.latent, guided) < 1e-2  # the host starts 2.3e-3 lower
    assert relative_error(picture.latent, expected(unet(webui_models.epsilon), picture, guidance=1)) > 1e-2


def test_a_students_lora_and_a_style_lora_work_together(webui: WebUI, webui_models: WebUIModels) -> None:
    names = (webui_models.student_lora.path.stem, webui_models.style_lora.path.stem)
    webui.post("/sdapi/v1/refresh-loras", {})
    chosen = of(webui_models.teacher)
    alone = webui.txt2img(prompt=f"a fox <lora:{names[0]}:1>", cfg_scale=3, **chosen)
    assert alone.rows == 4 and "Model: teacher" in alone.infotext
    network = unet(webui_models.teacher, webui_models.student_lora)
    assert_equal(alone.latent, expected(network, alone, guidance=3))
    both = webui.txt2img(
        prompt=f"a fox <lora:{names[0]}:1><lora:{names[1]}:1>", cfg_scale=LORA_BAKED_GUIDANCE, **chosen
    )
    network = unet(webui_models.teacher, webui_models.student_lora, webui_models.style_lora, live=False)
    assert_equal(both.latent, expected(network, both, guidance=None))


def test_a_refiner_takes_over_at_a_trained_step_or_is_refused(
    webui: WebUI, webui_models: WebUIModels
) -> None:
    webui.knows(webui_models.stochastic.name, webui_models.teacher.name, webui_models.two_steps.name)
    alone = webui.txt2img()
    refined = webui.txt2img(refiner_checkpoint=webui_models.stochastic.name, refiner_switch_at=0.5)
    assert refined.timesteps == list(TRAINED) and not torch.equal(refined.latent, alone.latent)
    with pytest.raises(Refused, match="is no student, so it cannot take over as refiner after 2 of 4 steps"):
        webui.txt2img(refiner_checkpoint=webui_models.teacher.name, refiner_switch_at=0.5)
    with pytest.raises(Refused, match="it was trained for 999, 499"):
        webui.txt2img(refiner_checkpoint=webui_models.two_steps.name, refiner_switch_at=0.25)
    assert webui.txt2img().png == alone.png


# -- What is left behind ---------------------------------------------------------------------------------


def test_an_infotext_reproduces_its_picture(webui: WebUI, plain: Picture) -> None:
    """As its values are pasted: the model by its hash, whatever is selected."""
    text = parameters(plain.png)
    fields = dict(part.split(": ", 1) for part in text.splitlines()[-1].split(", "))
    width, height = map(int, fields["Size"].split("x"))
    again = webui.txt2img(
        prompt=text.splitlines()[0],
        steps=int(fields["Steps"]),
        sampler_name=fields["Sampler"],
        cfg_scale=float(fields["CFG scale"]),
        seed=int(fields["Seed"]),
        width=width,
        height=height,
        override_settings={"sd_model_checkpoint": fields["Model hash"]},
    )
    assert again.png == plain.png


def test_an_xyz_plot_over_cfg_has_the_pictures_of_each_cfg(webui: WebUI) -> None:
    """X/Y/Z's arguments: axis, values and dropdown of each, and five switches."""
    xyz = next(
        entry
        for entry in webui.get("/sdapi/v1/script-info")
        if entry["name"] == "x/y/z plot" and entry["args"]
    )
    labels = [argument["label"] for argument in xyz["args"]]
    values: list[Any] = [argument["value"] for argument in xyz["args"]]
    axis = xyz["args"][labels.index("X type")]["choices"].index("CFG Scale")
    values[labels.index("X type")], values[labels.index("X values")] = axis, "2, 7"
    values[labels.index("Y type")] = values[labels.index("Z type")] = 0
    plot = webui.txt2img(script_name="x/y/z plot", script_args=values)
    singles = [webui.txt2img(cfg_scale=cfg) for cfg in (2, 7)]
    pictures = [single.pixels.tobytes() for single in singles]
    assert len(set(pictures)) == 2
    grid = plot.pixels
    found = [
        grid.crop((x, y, x + 64, y + 64)).tobytes()
        for y in range(grid.height - 63)
        for x in range(grid.width - 63)
        if grid.getpixel((x, y)) in {single.pixels.getpixel((0, 0)) for single in singles}
    ]
    assert set(pictures) <= set(found)


def test_a_stock_picture_is_the_same_before_and_after_and_nothing_stays_changed(
    webui: WebUI, webui_models: WebUIModels
) -> None:
    webui.knows(webui_models.teacher.name, webui_models.velocity.name)
    stock = {"sampler_name": "DPM++ 2M", "negative_prompt": "a badger", **of(webui_models.teacher)}
    before, state = webui.txt2img(**stock), webui.state()
    webui.txt2img(**of(webui_models.velocity))
    webui.img2img(drawing(), denoising_strength=0.6, **of(webui_models.teacher))
    after = webui.txt2img(**stock)
    assert before.png == after.png and before.rows == after.rows == 8
    found = webui.state()
    if webui.host.kind != "a1111":  # another model object for each checkpoint
        state["prediction"] = found["prediction"] = state["prediction"][1:]
    assert found == state
    assert not any(count for name, count in found["hooks"].items() if name)


def test_an_interrupted_picture_leaves_nothing_behind(webui: WebUI, plain: Picture) -> None:
    webui.txt2img()
    state = webui.state()
    interrupted = webui.txt2img(prompt="a fox (interrupt)", steps=4)
    assert 0 < interrupted.rows < 4
    assert webui.state() == state
    assert webui.txt2img().png == plain.png
