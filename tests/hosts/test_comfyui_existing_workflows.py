"""What people's graphs do with any model, done with students in a real ComfyUI: LoRAs, merging and saving,
regions, hooks, guiders and patches of the guidance, masks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts.bench import Bench, Link, random_latent, random_picture
from hosts.comfyui import Failed, Run
from hosts.models import Model, Models
from hosts.reference import Sampling, Unet, at_latent_size, merged, relative_error, student
from hosts.test_comfyui_patches import changed, dial, style, without_shift
from hosts.test_comfyui_sampling import (
    COND,
    EMPTY,
    OTHER,
    SEED,
    TRAINED,
    assert_equal,
    expected,
    fewstep,
    load_student,
    stock,
    unet,
)
from make_checkpoint import make_spec
from torch import Tensor

from toolkit.inspect import describe
from toolkit.runtime.files import load_tensors
from toolkit.runtime.student import read_student
from toolkit.training.layout import COND_PROJ, UNET_PREFIX, unet_from_ldm, unet_to_ldm

WIDE = torch.zeros(1, 4, 8, 16)


def reference(network: Unet, guidance: float | None = 7.0, **choices: Any) -> Tensor:
    return Sampling(student(network, COND, guidance), TRAINED, seed=SEED, **choices)(EMPTY)


def warnings(run: Run | None) -> list[str]:
    assert run is not None
    return [event["text"] for event in run.told("fewstep.say") if event["severity"] == "warn"]


def evaluations(bench: Bench, sample: Callable[[Link], Link], model: Link) -> tuple[Tensor, list[int]]:
    """The latent, and the rows of each evaluation that it took."""
    bench.files += 1
    path = bench.folder / f"evaluations-{bench.files}.jsonl"
    found = bench.sampled(sample(bench("ProbeWatch", model=model, path=str(path))[0]))
    return found, [json.loads(line)["rows"] for line in path.read_text().splitlines()]


# -- LoRA ------------------------------------------------------------------------------------------------


def cond_proj_lora(models: Models) -> Model:
    """A LoRA on the guidance input, as a host's own trainer names it."""
    generator = torch.Generator().manual_seed(21)
    name = "lora_unet_time_embed_cond_proj"
    tensors = {
        f"{name}.lora_down.weight": torch.randn((2, 256), generator=generator) / 16,
        f"{name}.lora_up.weight": torch.randn((320, 2), generator=generator),
        f"{name}.alpha": torch.tensor(2.0),
    }
    return models.lora("cond_proj", tensors, {})


def only(models: Models, word: str) -> Model:
    """The style LoRA's layers with that word in their names."""
    tensors = {key: value for key, value in models.style_lora.tensors.items() if word in key}
    return models.lora(word, tensors, {})


@pytest.mark.parametrize("loader", ["LoraLoader", "LoraLoaderModelOnly"])
@pytest.mark.parametrize("where", ["attentions", "time_embedding", "cond_proj"])
def test_a_lora_is_as_if_merged_into_the_students_file(
    bench: Bench, models: Models, where: str, loader: str
) -> None:
    lora = cond_proj_lora(models) if where == "cond_proj" else only(models, where)
    loaded = bench.load(models.epsilon)
    inputs: dict[str, Any] = {"model": loaded[0], "lora_name": lora.name, "strength_model": 0.8}
    if loader == "LoraLoader":
        inputs |= {"clip": loaded[1], "strength_clip": 0.8}
    found = bench.sampled(stock(bench, bench(loader, **inputs)[0]))
    as_diffusers_says = {
        key.replace("time_embed_cond", "time_embedding_cond"): value for key, value in lora.tensors.items()
    }
    network = Unet(models.epsilon.tensors, change=lambda state: merged(state, as_diffusers_says, 0.8))
    assert_equal(found, reference(network))
    assert relative_error(found, expected(models.epsilon)) > 1e-3


def test_two_loras_add_up_and_one_of_strength_0_is_none(bench: Bench, models: Models) -> None:
    model = style(bench, bench.load(models.epsilon)[0], models, 0.6)
    other = only(models, "attentions")
    for strength in (-0.5, 0.0):
        model = bench("LoraLoaderModelOnly", model=model, lora_name=other.name, strength_model=strength)[0]
    network = changed(models.epsilon, (models.style_lora, 0.6), (other, -0.5))
    assert_equal(bench.sampled(stock(bench, model)), reference(network))
    none = style(bench, bench.load(models.epsilon)[0], models, 0.0)
    plain = bench.sampled(stock(bench, bench.load(models.epsilon)[0]))
    assert torch.equal(bench.sampled(stock(bench, none)), plain)


@pytest.fixture(scope="module")
def merged_student(models: Models) -> Model:
    """``teacher`` with ``student_lora``, merged by hand into a student's checkpoint."""
    live = without_shift(models.student_lora, models.teacher)
    state = merged(unet_from_ldm(models.teacher.tensors), live)
    return models.student("merged", unet_to_ldm(state), make_spec())


@pytest.mark.parametrize("guidance", [1.5, 4.0, 14.0])
def test_a_student_lora_is_the_student_merged_by_hand(
    bench: Bench, models: Models, merged_student: Model, guidance: float
) -> None:
    model = dial(bench, bench.load(models.teacher)[0], models)
    found = bench.sampled(stock(bench, model, cfg=guidance))
    assert_equal(found, bench.sampled(stock(bench, bench.load(merged_student)[0], cfg=guidance)))
    assert_equal(found, expected(merged_student, guidance=guidance))


def test_a_student_lora_takes_one_evaluation_a_step(bench: Bench, models: Models) -> None:
    model = dial(bench, bench.load(models.teacher)[0], models)
    assert evaluations(bench, lambda watched: stock(bench, watched), model)[1] == [2, 2, 2, 2]


@pytest.mark.parametrize("wider", ["attn2_to_k.lora_down", "time_embedding_linear_1.diff", "cond_proj"])
def test_a_student_lora_of_other_shapes_is_one_sentence(bench: Bench, models: Models, wider: str) -> None:
    tensors = dict(models.student_lora.tensors)
    shapes = {"attn2_to_k.lora_down": (4, 1024), "time_embedding_linear_1.diff": (1536, 384)}
    for key in [key for key in tensors if wider in key and not key.endswith("diff_b")]:
        tensors[key] = torch.zeros(shapes.get(wider, (384, 256)))
    spec = make_spec(container="lora", baked_guidance=7.5, lora_rank=4)
    lora = models.lora("other_shapes", tensors, {"fewstep.spec": spec.to_json()}, spec)
    with pytest.raises(Failed) as failure:
        bench.sampled(stock(bench, load_student_lora(bench, bench.load(models.teacher)[0], lora)))
    assert re.fullmatch(r"other_shapes\.safetensors: [^\n]+", str(failure.value).strip())


def test_a_lora_of_other_layers_is_one_sentence(bench: Bench, models: Models) -> None:
    foreign = {
        key.replace("down_blocks_0", "down_blocks_7"): value
        for key, value in models.student_lora.tensors.items()
    }
    spec = make_spec(container="lora", baked_guidance=7.5, lora_rank=4)
    lora = models.lora("foreign", foreign, {"fewstep.spec": spec.to_json()}, spec)
    with pytest.raises(Failed, match=r"^foreign\.safetensors: 4 of 5 of its layers do not fit this model"):
        bench.sampled(stock(bench, load_student_lora(bench, bench.load(models.teacher)[0], lora)))


def test_an_ordinary_lora_is_not_taken_for_a_students(bench: Bench, models: Models) -> None:
    with pytest.raises(Failed, match=r"^style\.safetensors: this is no student LoRA .* Load LoRA"):
        model = load_student_lora(bench, bench.load(models.teacher)[0], models.style_lora)
        bench.sampled(stock(bench, model))


def test_a_student_takes_no_second_student(bench: Bench, models: Models) -> None:
    with pytest.raises(Failed, match="the model is a student already"):
        model = load_student_lora(bench, bench.load(models.epsilon)[0], models.student_lora)
        bench.sampled(stock(bench, model))


def load_student_lora(bench: Bench, model: Link, lora: Model) -> Link:
    choices = {"strength": 1.0, "cfg_is_guidance": True, "guidance": 0.0, "live_negative": False}
    return bench("FewStepLoadStudentLora", model=model, lora_name=lora.name, **choices)[0]


# -- Merging and saving ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blend:
    """0.6 of one model and 0.4 of the other; ``model``: as ModelMergeSimple makes it."""

    model: Link
    clip: Link
    vae: Link
    by_hand: dict[str, Tensor]


def blend(bench: Bench, first: Model, second: Model) -> Blend:
    one, two = bench.load(first), bench.load(second)
    node = bench("ModelMergeSimple", model1=one[0], model2=two[0], ratio=0.6)
    by_hand = {
        key: (0.6 * value.double() + 0.4 * second.tensors[key].double()).float()
        if key.startswith(UNET_PREFIX) and key in second.tensors
        else value
        for key, value in first.tensors.items()
    }
    return Blend(node[0], one[1], one[2], by_hand)


def save_checkpoint(bench: Bench, model: Link, clip: Link, vae: Link, name: str) -> Path:
    """Where the stock node put it; the host lists it among its checkpoints."""
    bench("CheckpointSave", model=model, clip=clip, vae=vae, filename_prefix=f"checkpoints/{name}")
    bench.last = bench.comfyui.run(bench.graph)
    return bench.comfyui.base / "output" / "checkpoints" / f"{name}_00001_.safetensors"


def test_a_merged_and_saved_student_keeps_its_dial_and_its_spec(
    bench: Bench, models: Models, tmp_path: Path
) -> None:
    mixed = blend(bench, models.three_steps, models.teacher)
    path = save_checkpoint(bench, mixed.model, mixed.clip, mixed.vae, "student_first")
    network = Unet(mixed.by_hand)
    by_hand = Sampling(student(network, COND, 7.0), (999, 640, 230), seed=SEED)(EMPTY)

    direct = bench.sampled(stock(bench, mixed.model, steps=3))
    later = Bench(bench.comfyui, tmp_path)
    for loaded in (later.load(Model(path))[0], load_student(later, Model(path))):
        found = later.sampled(stock(later, loaded, steps=3))
        assert warnings(later.last) == []
        assert_equal(found, by_hand)
        assert_equal(found, direct)
    said = read_student(path)
    assert (said.kind, said.stated, said.spec) == ("student", True, models.three_steps.spec)
    assert said.header.tensors[next(key for key in said.header.tensors if key.endswith(COND_PROJ))].shape
    described = describe(path)
    assert described["kind"] == "student" and described["spec"]["timesteps"] == (999, 640, 230)
    assert (described["missing"], described["damaged"]) == ([], [])
    assert all(".taesd_" in key or key in ("fewstep.spec",) for key in described["extra"])


def test_two_students_merged_are_the_first_ones_kind(bench: Bench, models: Models) -> None:
    mixed = blend(bench, models.epsilon, models.stochastic)
    found = bench.sampled(stock(bench, mixed.model))
    assert_equal(found, reference(Unet(mixed.by_hand)))


def test_a_student_merged_into_another_model_loses_its_dial_and_that_is_said(
    bench: Bench, models: Models
) -> None:
    mixed = blend(bench, models.teacher, models.epsilon)
    assert COND_PROJ not in mixed.by_hand
    out = stock(bench, mixed.model, sampler_name="euler", scheduler="simple", cfg=1.0)
    assert_equal(bench.sampled(out), reference(Unet(mixed.by_hand), guidance=None))
    assert any("dial" in text for text in warnings(bench.last)), "nobody said that the dial is gone"


def test_a_saved_student_with_a_lora_on_its_dial(bench: Bench, models: Models, tmp_path: Path) -> None:
    loaded, lora = bench.load(models.velocity), cond_proj_lora(models)
    model = bench("LoraLoaderModelOnly", model=loaded[0], lora_name=lora.name, strength_model=1.0)[0]
    direct = bench.sampled(stock(bench, model))
    path = save_checkpoint(bench, model, loaded[1], loaded[2], "with_lora")
    later = Bench(bench.comfyui, tmp_path)
    assert torch.equal(later.sampled(stock(later, later.load(Model(path))[0])), direct)
    assert relative_error(direct, expected(models.velocity)) > 1e-3
    assert read_student(path).spec == models.velocity.spec


def test_a_student_lora_on_its_checkpoint_can_be_saved_as_a_student(
    bench: Bench, models: Models, tmp_path: Path
) -> None:
    loaded = bench.load(models.teacher)
    model = dial(bench, loaded[0], models)
    direct = bench.sampled(stock(bench, model))
    path = save_checkpoint(bench, model, loaded[1], loaded[2], "lora_saved")
    if not any(key.endswith(COND_PROJ) for key in load_tensors(path)):
        assert any("dial" in text for text in warnings(bench.last)), "the dial is gone, and nobody said so"
        return
    later = Bench(bench.comfyui, tmp_path)
    assert_equal(later.sampled(stock(later, later.load(Model(path))[0])), direct)


def test_model_save_and_the_stock_loader_of_diffusion_models(
    bench: Bench, models: Models, tmp_path: Path
) -> None:
    loaded = bench.load(models.three_steps)
    direct = bench.sampled(stock(bench, loaded[0], steps=3))
    bench("ModelSave", model=loaded[0], filename_prefix="diffusion_models/alone")
    bench.comfyui.run(bench.graph)
    later = Bench(bench.comfyui, tmp_path)
    again = later("UNETLoader", unet_name="alone_00001_.safetensors", weight_dtype="default")
    found = later.sampled(stock(later, again[0], steps=3))
    told = warnings(later.last)
    assert torch.equal(found, direct) or any("metadata" in text for text in told)
    assert torch.equal(found, direct), f"the spec is lost, and it is said: {told}"


# -- Regions, times, hooks -------------------------------------------------------------------------------


def test_two_areas_have_two_guidances(bench: Bench, models: Models) -> None:
    """Areas that overlap, with the host's soft edges of at most a quarter of their width."""
    areas = []
    for cond, guidance, x, width in ((COND, 2.0, 0, 80), (OTHER, 12.0, 48, 80)):
        dialled = bench("FluxGuidance", conditioning=bench.conditioning(cond), guidance=guidance)[0]
        place = {"width": width, "height": 64, "x": x, "y": 0, "strength": 1.0}
        areas.append(bench("ConditioningSetArea", conditioning=dialled, **place)[0])
    both = bench("ConditioningCombine", conditioning_1=areas[0], conditioning_2=areas[1])[0]
    found = bench.sampled(
        fewstep(bench, load_student(bench, models.epsilon), bench.latent(WIDE), positive=both)
    )
    network = unet(models.epsilon)
    left, right = torch.ones(10), torch.ones(10)
    left[-2:] = torch.tensor([1.0, 0.5])
    right[:2] = torch.tensor([0.5, 1.0])

    def denoise(z: Tensor, timestep: int) -> Tensor:
        total, weight = torch.zeros_like(z), torch.zeros(16, dtype=torch.float64)
        for cond, guidance, columns, share in (
            (COND, 2.0, slice(0, 10), left),
            (OTHER, 12.0, slice(6, 16), right),
        ):
            total[..., columns] += share * student(network, cond, guidance)(z[..., columns], timestep)
            weight[columns] += share
        return total / weight

    assert_equal(found, Sampling(denoise, TRAINED, seed=SEED)(WIDE))


def test_a_prompt_and_a_guidance_for_each_part_of_the_steps(bench: Bench, models: Models) -> None:
    parts = []
    for cond, guidance, start, end in ((COND, 2.0, 0.0, 0.5), (OTHER, 12.0, 0.5, 1.0)):
        dialled = bench("FewStepGuidance", conditioning=bench.conditioning(cond), guidance=guidance)[0]
        parts.append(bench("ConditioningSetTimestepRange", conditioning=dialled, start=start, end=end)[0])
    both = bench("ConditioningCombine", conditioning_1=parts[0], conditioning_2=parts[1])[0]
    network = unet(models.epsilon)

    def denoise(z: Tensor, timestep: int) -> Tensor:
        cond, guidance = (COND, 2.0) if timestep > 500 else (OTHER, 12.0)
        return student(network, cond, guidance)(z, timestep)

    by_hand = Sampling(denoise, TRAINED, seed=SEED)(EMPTY)
    for sample in (stock, fewstep):
        assert_equal(
            bench.sampled(sample(bench, load_student(bench, models.epsilon), positive=both)), by_hand
        )


def test_a_lora_of_one_prompt_by_hooks(bench: Bench, models: Models) -> None:
    left = torch.zeros(1, 64, 64)
    left[:, :, :32] = 1
    lora = {"lora_name": models.style_lora.name, "strength_model": 0.8, "strength_clip": 0.0}
    hooks = bench("CreateHookLora", **lora)[0]
    regions = []
    for mask, more in ((left, {"hooks": hooks}), (1 - left, {})):
        drawn = bench.picture(torch.zeros(1, 64, 64, 3), mask)[1]
        props = {"strength": 1.0, "set_cond_area": "default", "mask": drawn, **more}
        regions.append(bench("ConditioningSetProperties", cond_NEW=bench.conditioning(COND), **props)[0])
    both = bench("ConditioningCombine", conditioning_1=regions[0], conditioning_2=regions[1])[0]
    found = bench.sampled(fewstep(bench, load_student(bench, models.epsilon), positive=both))
    styled, plain = changed(models.epsilon, (models.style_lora, 0.8)), unet(models.epsilon)
    share = at_latent_size(left, EMPTY).double()

    def denoise(z: Tensor, timestep: int) -> Tensor:
        one, two = (student(network, COND, 7.0)(z, timestep) for network in (styled, plain))
        return share * one + (1 - share) * two

    assert_equal(found, Sampling(denoise, TRAINED, seed=SEED)(EMPTY))
    assert_equal(bench.sampled(fewstep(bench, load_student(bench, models.epsilon))), expected(models.epsilon))


def test_a_picture_taken_out_of_a_batch_is_the_same(bench: Bench, models: Models) -> None:
    batch = bench.latent(random_latent(3, batch=3))
    taken = bench("LatentFromBatch", samples=batch, batch_index=2, length=1)[0]
    model = load_student(bench, models.epsilon)
    whole = bench.sampled(fewstep(bench, model, batch, denoise=0.62))
    for sample in (fewstep, stock):
        assert_equal(bench.sampled(sample(bench, model, taken, denoise=0.62, **steps_of(sample))), whole[2:])


def steps_of(sample: Any) -> dict[str, int]:
    """A stock KSampler must be given so many steps that its tail begins at 619."""
    return {"steps": 31, "scheduler": "simple"} if sample is stock else {}


# -- Guiders and patches of the guidance -----------------------------------------------------------------


def test_a_stock_graph_at_cfg_7_takes_one_evaluation_a_step(bench: Bench, models: Models) -> None:
    found, rows = evaluations(bench, lambda watched: stock(bench, watched), bench.load(models.epsilon)[0])
    assert rows == [2, 2, 2, 2], "one evaluation a step of a batch of two"
    assert_equal(found, expected(models.epsilon))
    habit = {"sampler_name": "euler", "scheduler": "simple"}
    teacher = bench.load(models.teacher)[0]
    rows = evaluations(bench, lambda watched: stock(bench, watched, **habit), teacher)[1]
    assert sum(rows) == 16, "the yardstick: a teacher takes two"


@pytest.mark.parametrize("guidance", [1.5, 7.0, 15.0])
@pytest.mark.parametrize("ask", ["our node", "cfg", "the prompt"])
def test_a_live_negative_prompt(bench: Bench, models: Models, ask: str, guidance: float) -> None:
    """``n + a (p - n)`` with p at g/a and n at (g - 1)/(a - 1): what u + g (p - u) is with n in u's place."""
    network = unet(models.epsilon)
    a = min(2.0, guidance)

    def denoise(z: Tensor, timestep: int) -> Tensor:
        positive = student(network, COND, guidance / a)(z, timestep)
        negative = student(network, OTHER, (guidance - 1) / (a - 1))(z, timestep)
        return negative + a * (positive - negative)

    def sample(model: Link) -> Link:
        if ask == "our node":
            return fewstep(bench, model, negative=bench.conditioning(OTHER), guidance=guidance)
        if ask == "cfg":
            return stock(bench, model, cfg=guidance)
        positive = bench("FluxGuidance", conditioning=bench.conditioning(COND), guidance=guidance)[0]
        return stock(bench, model, positive=positive, cfg=4.0)

    found, rows = evaluations(bench, sample, load_student(bench, models.epsilon, live_negative=True))
    assert sum(rows) == 16, "two evaluations a step of a batch of two"
    assert_equal(found, Sampling(denoise, TRAINED, seed=SEED)(EMPTY))


def test_rescale_cfg_has_no_effect_and_that_is_said_once(bench: Bench, models: Models) -> None:
    def sample(watched: Link) -> Link:
        return stock(bench, bench("RescaleCFG", model=watched, multiplier=0.7)[0])

    found, rows = evaluations(bench, sample, bench.load(models.epsilon)[0])
    [told] = warnings(bench.last)
    assert "RescaleCFG" in told and "no effect" in told
    assert rows == [2, 2, 2, 2]
    assert_equal(found, expected(models.epsilon))


@pytest.mark.parametrize(
    ("node", "choices"),
    [
        ("Mahiro", {}),
        ("TCFG", {}),
        ("CFGNorm", {"strength": 1.0}),
        ("CFGZeroStar", {}),
        ("PerpNeg", {"neg_scale": 1.0}),
        ("FreSca", {"scale_low": 1.0, "scale_high": 1.25, "freq_cutoff": 20}),
        ("HyperTile", {"tile_size": 256, "swap_size": 2, "max_depth": 0, "scale_depth": False}),
    ],
)
def test_other_changes_of_cfg_do_nothing_at_one_evaluation_a_step(
    bench: Bench, models: Models, node: str, choices: dict[str, Any]
) -> None:
    if node == "PerpNeg":
        choices = {**choices, "empty_conditioning": bench.conditioning(0 * COND)}

    def sample(watched: Link) -> Link:
        return stock(bench, bench(node, model=watched, **choices)[0])

    found, rows = evaluations(bench, sample, bench.load(models.epsilon)[0])
    assert rows == [2, 2, 2, 2]
    assert_equal(found, expected(models.epsilon))


@pytest.mark.parametrize(
    ("node", "choices", "evaluated"),
    [
        ("SelfAttentionGuidance", {"scale": 0.5, "blur_sigma": 2.0}, 24),
        ("APG", {"eta": 1.0, "norm_threshold": 5.0, "momentum": 0.0}, 8),
    ],
)
def test_corrections_that_still_act_are_said_once(
    bench: Bench, models: Models, node: str, choices: dict[str, Any], evaluated: int
) -> None:
    def sample(watched: Link) -> Link:
        return stock(bench, bench(node, model=watched, **choices)[0])

    found, rows = evaluations(bench, sample, bench.load(models.epsilon)[0])
    [told] = warnings(bench.last)
    assert ("SAG" if node == "SelfAttentionGuidance" else node) in told and "still act" in told
    assert sum(rows) == evaluated, "rows of a batch of two in four steps"
    assert relative_error(found, expected(models.epsilon)) > 1e-3


def test_pag_acts_at_one_evaluation_more_and_that_is_said_once(bench: Bench, models: Models) -> None:
    def sample(watched: Link) -> Link:
        return stock(bench, bench("PerturbedAttentionGuidance", model=watched, scale=2.0)[0])

    found, rows = evaluations(bench, sample, bench.load(models.epsilon)[0])
    [told] = warnings(bench.last)
    assert "PAG" in told and "still act" in told
    assert sum(rows) == 16
    network, perturbed = unet(models.epsilon), Unet(models.epsilon.tensors)
    attention = perturbed.network.mid_block.attentions[0].transformer_blocks[0].attn1  # type: ignore[union-attr]
    attention.processor = _values_alone

    def denoise(z: Tensor, timestep: int) -> Tensor:
        plain = student(network, COND, 7.0)(z, timestep)
        return plain + 2 * (plain - student(perturbed, COND, 7.0)(z, timestep))

    assert_equal(found, Sampling(denoise, TRAINED, seed=SEED)(EMPTY))


def _values_alone(attention: Any, hidden: Tensor, **_: Any) -> Tensor:
    return attention.to_out[0](attention.to_v(hidden))


def perp_neg(bench: Bench, model: Link, positive: Link) -> Link:
    others = {"negative": bench.conditioning(OTHER), "empty_conditioning": bench.conditioning(0 * COND)}
    return bench("PerpNegGuider", model=model, positive=positive, cfg=7.0, neg_scale=1.0, **others)[0]


def dual_cfg(bench: Bench, model: Link, positive: Link) -> Link:
    others = {"cond2": bench.conditioning(OTHER), "negative": bench.conditioning(0 * COND)}
    scales = {"cfg_conds": 7.0, "cfg_cond2_negative": 5.0, "style": "regular"}
    return bench("DualCFGGuider", model=model, cond1=positive, **others, **scales)[0]


def cfg_guider(bench: Bench, model: Link, positive: Link) -> Link:
    negative = bench.conditioning(OTHER)
    return bench("CFGGuider", model=model, positive=positive, negative=negative, cfg=7.0)[0]


@pytest.mark.parametrize("with_key", [True, False])
@pytest.mark.parametrize("make", [cfg_guider, perp_neg, dual_cfg])
def test_a_guider_with_arithmetic_of_its_own_evaluates_the_positive_prompt_alone(
    bench: Bench, models: Models, make: Callable[[Bench, Link, Link], Link], with_key: bool
) -> None:
    positive = bench.conditioning(COND)
    if with_key:
        positive = bench("FluxGuidance", conditioning=positive, guidance=3.0)[0]

    def sample(watched: Link) -> Link:
        return bench(
            "SamplerCustomAdvanced",
            noise=bench("RandomNoise", noise_seed=SEED)[0],
            guider=make(bench, watched, positive),
            sampler=bench("FewStepSamplerSelect")[0],
            sigmas=bench("FewStepSigmas", model=watched, start=1.0)[0],
            latent_image=bench.latent(EMPTY),
        )[0]

    found, rows = evaluations(bench, sample, bench.load(models.epsilon)[0])
    assert rows == [2, 2, 2, 2]
    told = [text for text in warnings(bench.last) if "positive prompt alone" in text]
    assert len(told) == (make is not cfg_guider)
    assert_equal(found, expected(models.epsilon, guidance=3.0 if with_key else 7.0))


# -- Masks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["epsilon", "stochastic"])
@pytest.mark.parametrize("denoise", [1.0, 0.62])
def test_the_latent_outside_a_hard_mask_stays(
    bench: Bench, models: Models, name: str, denoise: float
) -> None:
    latent, mask = random_latent(3), torch.zeros(1, 64, 64)
    mask[:, 16:48, 16:48] = 1
    drawn = bench.picture(random_picture(4)[0], mask)[1]
    masked = bench("SetLatentNoiseMask", samples=bench.latent(latent), mask=drawn)[0]
    model = load_student(bench, getattr(models, name))
    outside = (at_latent_size(mask, latent) == 0).expand_as(latent)
    for sample in (fewstep, stock):
        found = bench.sampled(sample(bench, model, masked, denoise=denoise, **steps_of(sample)))
        assert relative_error(found[outside], latent[outside]) < 1e-6
        assert relative_error(found[~outside], latent[~outside]) > 0.1


def test_a_mask_that_was_grown_for_inpainting(bench: Bench, models: Models) -> None:
    """VAEEncodeForInpaint greys what is masked and then grows the mask, so that the seam is repainted too."""
    loaded, (image, mask) = bench.load(models.epsilon), random_picture(4)
    picture = bench.picture(image, mask)
    encoded = bench("VAEEncodeForInpaint", vae=loaded[2], pixels=picture[0], mask=picture[1], grow_mask_by=6)
    latent = bench.run(latent=encoded[0])
    grown = torch.nn.functional.max_pool2d(mask.round()[:, None], 7, stride=1, padding=3)
    share = torch.nn.functional.interpolate(grown, size=(8, 8), mode="bilinear")
    found = bench.sampled(stock(bench, loaded[0], encoded[0]))
    assert_equal(found, expected(models.epsilon, latent["samples"], mask=share))
