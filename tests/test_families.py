"""Every family, in every kind of file, through every command, on small shapes."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.loaders import single_file_utils
from make_checkpoint import SHAPES, TINY, make_spec, make_student, make_teacher, make_tokenizer
from test_files import without_folders
from torch import Tensor

from toolkit import distill, inspect
from toolkit.diffusion.errors import BadInput
from toolkit.diffusion.grid import trailing_timesteps
from toolkit.evaluation.painter import Painter
from toolkit.runtime.files import load_tensors, save_tensors
from toolkit.training.checkpoint import Checkpoint, open_checkpoint
from toolkit.training.export import export_diffusers, pipeline_class
from toolkit.training.families import FAMILIES, UNET_PREFIX, VAE_PREFIX, Override, TextEncoder
from toolkit.training.layout import (
    PROJECTION,
    text_from_ldm,
    text_to_ldm,
    unet_from_ldm,
    unet_to_ldm,
    vae_from_ldm,
    vae_to_ldm,
)
from toolkit.training.networks import encode_prompts, load_encoders
from toolkit.training.recognise import recognise
from toolkit.training.samples import draw_batch
from toolkit.training.vocabulary import save_tokenizer

PROMPTS = ["a red fox", "", "as long as it can be in 24 now"]
LARGER = ["sd2", "sdxl"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random teacher of each family, and the words that they know."""
    folder = tmp_path_factory.mktemp("families")
    make_tokenizer(folder / "tokenizer")
    for family, shape in TINY.items():
        make_teacher(folder / f"{family}.safetensors", shape=shape)
    return folder


@pytest.fixture
def teacher(folder: Path, request: pytest.FixtureRequest) -> Checkpoint:
    return open_checkpoint(folder / f"{request.param}.safetensors")


def of_each(families: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("teacher", families, indirect=True)


def said(call: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    with pytest.raises(BadInput) as caught:
        call(*arguments, **named)
    assert "\n" not in str(caught.value)
    return without_folders(str(caught.value))


def same(a: Any, b: Any) -> bool:
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


def used(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What the networks hold, in float32, whatever the file was."""
    encoders = [checkpoint.text_encoder(part=encoder.part) for encoder in checkpoint.of.text_encoders]
    networks = [checkpoint.unet(), checkpoint.vae(), *encoders]
    return {
        f"{number}.{key}": value
        for number, network in enumerate(networks)
        for key, value in network.state_dict().items()
    }


def save_folder(checkpoint: Checkpoint, path: Path, **save: Any) -> Path:
    """The checkpoint as diffusers and transformers themselves write it."""
    checkpoint.unet().save_pretrained(path / "unet", **save)
    checkpoint.vae().save_pretrained(path / "vae", **save)
    for encoder in checkpoint.of.text_encoders:
        checkpoint.text_encoder(part=encoder.part).save_pretrained(path / encoder.part)
        save_tokenizer(checkpoint.tokenizer(encoder.part), path / encoder.tokenizer)
    scheduler(checkpoint).save_pretrained(path / "scheduler")
    return path


def scheduler(checkpoint: Checkpoint) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        timestep_spacing="trailing",
        prediction_type=checkpoint.prediction_type,
        rescale_betas_zero_snr=checkpoint.ztsnr,
    )


def stock_pipeline(checkpoint: Checkpoint) -> Any:
    """The family's own pipeline of diffusers, made of our networks."""
    components: dict[str, Any] = {"unet": checkpoint.unet(), "vae": checkpoint.vae()}
    for encoder in checkpoint.of.text_encoders:
        tokenizer = checkpoint.tokenizer(encoder.part)
        if encoder.pad is not None:
            tokenizer.pad_token = encoder.pad
        components[encoder.part] = checkpoint.text_encoder(part=encoder.part)
        components[encoder.tokenizer] = tokenizer
    if checkpoint.of.sizes:
        components |= {"force_zeros_for_empty_prompt": False, "add_watermarker": False}
    else:
        components |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = pipeline_class(checkpoint.of)(scheduler=scheduler(checkpoint), **components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# -- What a family implies -------------------------------------------------------------------------------


@of_each(LARGER)
def test_a_family_is_told_from_its_keys_with_all_that_it_implies(teacher: Checkpoint) -> None:
    unet = teacher.config("unet")
    assert teacher.kind == "teacher" and teacher.prediction_type == "epsilon" and not teacher.ztsnr
    assert unet["attention_head_dim"] == (1, 2) and unet["use_linear_projection"]
    if teacher.family == "sd2":
        assert teacher.scaling_factor == 0.18215 and unet.get("addition_embed_type") is None
        assert teacher.config("text_encoder")["num_hidden_layers"] == 2, "the last of 3 is never run"
        assert teacher.config("text_encoder")["hidden_act"] == "gelu"
    else:
        assert teacher.family == "sdxl" and teacher.scaling_factor == 0.13025
        assert unet["transformer_layers_per_block"] == (1, 2)
        assert unet["projection_class_embeddings_input_dim"] == 48 + 6 * 256
        assert teacher.config("text_encoder_2")["projection_dim"] == 48
        assert teacher.vae_dtype(torch.float16) == torch.float32
    assert [teacher.config(e.part)["hidden_act"] for e in teacher.of.text_encoders][-1] == "gelu"


@pytest.mark.parametrize("shape", ["sd21", "sdxl"])
def test_true_shapes_have_the_parameters_that_they_are_known_for(shape: str) -> None:
    """Counts of the published files' UNets: 865.9 M and 2,567.5 M."""
    from make_checkpoint import keys_of_shape

    ldm = keys_of_shape(shape)
    unet = sum(value.numel() for key, value in ldm.items() if key.startswith(UNET_PREFIX))
    assert unet == {"sd21": 865_910_724, "sdxl": 2_567_463_684}[shape]
    family = SHAPES[shape].family
    assert recognise(ldm).family == family.key
    assert set(unet_from_ldm(ldm)) and same_shapes(
        ldm, family.prefixes["unet"], unet_to_ldm(unet_from_ldm(ldm))
    )
    texts = {encoder.part: text_from_ldm(ldm, encoder) for encoder in family.text_encoders}
    count = sum(value.numel() for value in texts[family.text_encoders[-1].part].values())
    # OpenCLIP's ViT-H without its last block and projection, and bigG
    assert count == {"sd21": 340_387_840, "sdxl": 694_659_840}[shape]


def same_shapes(ldm: dict[str, Tensor], prefix: str, other: dict[str, Tensor]) -> bool:
    part = {key: value.shape for key, value in ldm.items() if key.startswith(prefix)}
    return part == {key: value.shape for key, value in other.items()}


# -- Conversion ------------------------------------------------------------------------------------------


@of_each(LARGER)
def test_single_file_keys_survive_the_round_trip(teacher: Checkpoint) -> None:
    tensors = dict(teacher.tensors)
    again = unet_to_ldm(unet_from_ldm(tensors)) | vae_to_ldm(vae_from_ldm(tensors))
    for encoder in teacher.of.text_encoders:
        again |= text_to_ldm(text_from_ldm(tensors, encoder), encoder)
    assert same(again, teacher.network_tensors())
    assert all("resblocks.2." in key or key.endswith("text_projection") for key in set(tensors) - set(again))


@of_each(LARGER)
def test_values_go_where_diffusers_own_loader_puts_them(teacher: Checkpoint) -> None:
    tensors = dict(teacher.tensors)
    theirs = single_file_utils.convert_ldm_unet_checkpoint(dict(tensors), config=teacher.config("unet"))
    assert same(theirs, unet_from_ldm(tensors))
    theirs = single_file_utils.convert_ldm_vae_checkpoint(dict(tensors), config=teacher.config("vae"))
    assert same(theirs, vae_from_ldm(tensors))
    for encoder in teacher.of.text_encoders:
        assert same(_their_text(teacher, encoder), text_from_ldm(tensors, encoder))


def _their_text(teacher: Checkpoint, encoder: TextEncoder) -> dict[str, Tensor]:
    if encoder.naming == "transformers":
        found = single_file_utils.convert_ldm_clip_checkpoint(
            dict(teacher.tensors), remove_prefix=encoder.prefix.removesuffix("text_model.")
        )
    else:
        network = teacher.text_encoder(part=encoder.part)
        if not hasattr(network, "text_model"):
            network.text_model = network
        found = single_file_utils.convert_open_clip_checkpoint(network, dict(teacher.tensors), encoder.prefix)
    bare = {key.removeprefix("text_model."): value for key, value in found.items()}
    # They know the unused layer by its number at the true size.
    unused = f"encoder.layers.{3 - encoder.unused_layers}."
    return {
        key: value
        for key, value in bare.items()
        if (encoder.pooled or key != PROJECTION) and not key.startswith(unused)
    }


@of_each(LARGER)
def test_a_folder_written_by_diffusers_equals_the_single_file(
    teacher: Checkpoint, folder: Path, tmp_path: Path
) -> None:
    found = open_checkpoint(save_folder(teacher, tmp_path / "saved"))
    assert found.family == teacher.family and same(used(found), used(teacher))
    assert same(found.network_tensors(), teacher.network_tensors())
    last = {
        key: v for key, v in found.tensors.items() if "cond_stage_model.model.transformer.resblocks.2." in key
    }
    assert bool(last) == (teacher.family == "sd2") and not any(value.any() for value in last.values())


@of_each(["sd1", *LARGER])
def test_a_sharded_folder_is_read_whole_and_variants_are_not_mixed(
    teacher: Checkpoint, folder: Path, tmp_path: Path
) -> None:
    path = save_folder(teacher, tmp_path / "saved", max_shard_size="400KB")
    shards = sorted((path / "unet").glob("*.safetensors"))
    assert len(shards) > 1
    teacher.unet(dtype=torch.float16).save_pretrained(path / "unet", variant="fp16", max_shard_size="400KB")
    assert len(list((path / "unet").glob("*.safetensors"))) > len(shards)
    assert same(used(open_checkpoint(path)), used(teacher))
    shards[0].unlink()
    assert "shards" in said(open_checkpoint, path)
    for shard in shards[1:]:
        shard.unlink()
    half = open_checkpoint(path).tensors[UNET_PREFIX + "input_blocks.0.0.weight"]
    assert half.dtype == torch.float16


# -- Files -----------------------------------------------------------------------------------------------

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("dtype", DTYPES)
@of_each(["sd1", *LARGER])
def test_weights_of_every_dtype_are_read_as_they_are(
    teacher: Checkpoint, dtype: str, suffix: str, tmp_path: Path
) -> None:
    cast = {key: value.to(DTYPES[dtype]) for key, value in teacher.tensors.items()}
    path = tmp_path / f"model{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": cast}, path)
    else:
        save_tensors(cast, {}, path)
    found, expected = used(open_checkpoint(path)), used(teacher)
    assert all(torch.equal(found[key], expected[key].to(DTYPES[dtype]).float()) for key in expected)
    assert inspect.describe(path)["dtype"] == {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}.get(
        dtype, dtype
    )


def test_scaled_float8_is_refused(folder: Path, tmp_path: Path) -> None:
    tensors = load_tensors(folder / "sdxl.safetensors")
    scaled = {UNET_PREFIX + "out.2.scale_weight": torch.ones(())}
    save_tensors(tensors | scaled, {}, tmp_path / "scaled.safetensors")
    assert "scaled float8" in said(open_checkpoint, tmp_path / "scaled.safetensors")
    four_bits = {UNET_PREFIX + "middle_block.1.proj_in.weight.quant_state.bitsandbytes__nf4": torch.ones(1)}
    save_tensors(tensors | four_bits, {}, tmp_path / "nf4.safetensors")
    assert "quantised" in said(open_checkpoint, tmp_path / "nf4.safetensors")


@pytest.mark.parametrize("naming", ["prefix", "comfy", "bare", "diffusers"])
@of_each(LARGER)
def test_a_unet_alone_with_its_parts_equals_the_whole(
    teacher: Checkpoint, naming: str, tmp_path: Path
) -> None:
    tensors = dict(teacher.tensors)
    ldm = {key: value for key, value in tensors.items() if key.startswith(UNET_PREFIX)}
    bare = {key.removeprefix(UNET_PREFIX): value for key, value in ldm.items()}
    named = {
        "prefix": ldm,
        "comfy": {f"diffusion_model.{key}": value for key, value in bare.items()},
        "bare": bare,
        "diffusers": unet_from_ldm(ldm),
    }[naming]
    save_tensors(named, {}, tmp_path / "unet.safetensors")
    vae = {key: value for key, value in tensors.items() if key.startswith(VAE_PREFIX)}
    save_tensors(vae, {}, tmp_path / "vae.safetensors")
    parts: dict[str, Path] = {}
    for encoder in teacher.of.text_encoders:
        assert "--text-encoder" in said(
            open_checkpoint, tmp_path / "unet.safetensors", vae=tmp_path / "vae.safetensors", **parts
        )
        parts[encoder.part] = _text_file(teacher, encoder, naming, tmp_path)
    found = open_checkpoint(tmp_path / "unet.safetensors", vae=tmp_path / "vae.safetensors", **parts)
    assert found.family == teacher.family and same(used(found), used(teacher))


def _text_file(teacher: Checkpoint, encoder: TextEncoder, naming: str, folder: Path) -> Path:
    """A text encoder by itself, named as people have them: OpenCLIP's, transformers', or a host's names."""
    path = folder / f"{encoder.part}.safetensors"
    own = {key: value for key, value in teacher.tensors.items() if key.startswith(encoder.prefix)}
    if naming == "prefix":
        save_tensors(own, {}, path)
    elif naming == "bare":
        save_tensors(
            {key.removeprefix(encoder.prefix.removesuffix("text_model.")): v for key, v in own.items()},
            {},
            path,
        )
    else:
        host = (
            f"clip_{'l' if encoder.naming == 'transformers' else 'g'}.transformer."
            if naming == "comfy"
            else ""
        )
        state = {
            host + (key if key == PROJECTION else f"text_model.{key}"): value.contiguous()
            for key, value in text_from_ldm(teacher.tensors, encoder).items()
        }
        save_tensors(state, {}, path)
    return path


# -- What is predicted -----------------------------------------------------------------------------------


@of_each(LARGER)
def test_v_prediction_is_told_by_marker_metadata_yaml_or_the_person(
    teacher: Checkpoint, folder: Path, tmp_path: Path
) -> None:
    tensors = dict(teacher.tensors)
    path = tmp_path / "model.safetensors"
    save_tensors(tensors | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, {}, path)
    found = open_checkpoint(path)
    assert found.prediction_type == "v_prediction" and found.ztsnr
    assert float(found.schedule.sigmas[-1]) > 4000
    save_tensors(tensors, {"modelspec.prediction_type": "v"}, path)
    assert open_checkpoint(path).prediction_type == "v_prediction" and not open_checkpoint(path).ztsnr
    save_tensors(tensors, {}, path)
    assert open_checkpoint(path).prediction_type == "epsilon"
    asked = Override.parse("prediction_type=v_prediction, ztsnr=true")
    assert open_checkpoint(path, override=asked).prediction_type == "v_prediction"
    assert open_checkpoint(path, override=asked).ztsnr
    path.with_suffix(".yaml").write_text("model:\n  params:\n    parameterization: v\n", encoding="utf-16")
    assert open_checkpoint(path).prediction_type == "v_prediction"
    assert open_checkpoint(path, override=Override(prediction_type="epsilon")).prediction_type == "epsilon"


@pytest.mark.parametrize(("spread", "expected"), [(0.15, "v_prediction"), (0.05, "epsilon")])
def test_stable_diffusion_2_without_a_word_is_judged_by_the_hosts_statistic(
    folder: Path, tmp_path: Path, spread: float, expected: str
) -> None:
    from toolkit.training.checkpoint import prediction_type_of
    from toolkit.training.recognise import Recognised
    from toolkit.training.weights import Weights

    tensors = load_tensors(folder / "sd2.safetensors")
    telling = UNET_PREFIX + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
    tensors[telling] = spread * torch.tensor([-1.0, 1.0]).repeat(16)
    weights = Weights(tmp_path / "m.safetensors", tensors)
    assert prediction_type_of(weights, None, Recognised("checkpoint", "sd2", tensors)) == expected
    assert prediction_type_of(weights, None, Recognised("checkpoint", "sdxl", tensors)) == "epsilon"
    inpainting = tensors | {UNET_PREFIX + "input_blocks.0.0.weight": torch.zeros(64, 9, 3, 3)}
    assert prediction_type_of(weights, None, Recognised("checkpoint", "sd2", inpainting)) == "epsilon"


def test_what_a_person_says_against_the_keys_is_taken_or_refused(folder: Path) -> None:
    assert "family=sd3" in said(Override.parse, "family=sd3")
    assert "prediction=v" in said(Override.parse, "prediction=v")
    assert Override.parse(None) == Override() and Override.parse("family=sd2").family == "sd2"
    text = said(open_checkpoint, folder / "sd2.safetensors", override=Override(family="sd1"))
    assert "--text-encoder" in text


@pytest.mark.parametrize("family", FAMILIES)
def test_nine_channels_are_opened_and_said(family: str, tmp_path: Path) -> None:
    path = make_teacher(tmp_path / "inpaint.safetensors", shape=TINY[family], in_channels=9)
    assert open_checkpoint(path).inpaint and inspect.describe(path)["inpaint"]
    assert inspect.describe(path)["family"] == family


# -- Texts and pictures ----------------------------------------------------------------------------------


@of_each(LARGER)
def test_texts_are_those_of_the_stock_pipeline(teacher: Checkpoint) -> None:
    pipeline = stock_pipeline(teacher)
    found = encode_prompts(PROMPTS, load_encoders(teacher))
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            text, _, *pooled = pipeline.encode_prompt(
                prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        torch.testing.assert_close(found["text"][row], text[0], atol=1e-5, rtol=1e-5)
        if teacher.of.sizes:
            torch.testing.assert_close(found["pooled"][row], pooled[0][0], atol=1e-5, rtol=1e-5)
    assert ("pooled" in found) == teacher.of.sizes
    assert float((found["text"][0] - found["text"][1]).abs().max()) > 0.1


@pytest.mark.parametrize("markers", [(), ("v_pred",), ("v_pred", "ztsnr")], ids=["epsilon", "v", "v ztsnr"])
@pytest.mark.parametrize("family", LARGER)
def test_a_teacher_paints_what_the_stock_pipeline_paints(
    family: str, markers: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    tensors = load_tensors(folder / f"{family}.safetensors")
    path = tmp_path / "model.safetensors"
    save_tensors(tensors | {key: torch.zeros(0) for key in markers}, {}, path)
    checkpoint = open_checkpoint(path, tokenizer=folder / "tokenizer")
    size = {"height": 48, "width": 32}
    expected = stock_pipeline(checkpoint)(
        "a red circle",
        negative_prompt="grey",
        num_inference_steps=5,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
        **size,
    ).images
    found = Painter.open(checkpoint).latents(
        ["a red circle"], seeds=[7], guidance=4.0, steps=5, negative="grey", size=(48, 32)
    )
    error = float((found.x0 - expected).norm() / expected.norm())
    assert error < (1e-3 if "ztsnr" in markers else 1e-5), error
    other = Painter.open(checkpoint).latents(["a blue one"], seeds=[7], guidance=4.0, steps=5, size=(48, 32))
    assert float((other.x0 - expected).norm() / expected.norm()) > 1e-2, "the text is heard"


@pytest.mark.parametrize("ztsnr", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("family", LARGER)
def test_an_exported_folder_in_the_stock_pipeline_paints_our_picture(
    family: str, prediction_type: str, ztsnr: bool, folder: Path, tmp_path: Path
) -> None:
    if ztsnr and prediction_type == "epsilon":
        pytest.skip("epsilon tells nothing at zero signal")
    spec = make_spec(
        family=family, prediction_type=prediction_type, ztsnr=ztsnr, timesteps=trailing_timesteps(3)
    )
    path = make_student(tmp_path / "student.safetensors", spec=spec, shape=TINY[family])
    student = open_checkpoint(path, tokenizer=folder / "tokenizer")
    assert export_diffusers(student, tmp_path / "exported").difference == 0
    pipeline = pipeline_class(student.of).from_pretrained(str(tmp_path / "exported"), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)

    def theirs(guidance: float) -> Tensor:
        return pipeline(
            "a cat",
            num_inference_steps=3,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(5),
            output_type="latent",
        ).images

    ours = Painter.open(student).latents(["a cat"], seeds=[5], guidance=4.0).x0
    error = float((theirs(4.0) - ours).norm() / ours.norm())
    assert error < (1e-3 if ztsnr else 1e-5), error
    assert float((theirs(1.0) - ours).norm() / ours.norm()) > 1e-2, "guidance_scale is the dial"


# -- The commands ----------------------------------------------------------------------------------------


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs a command as a person would; answers with its JSON."""

    def run(command: Any, *arguments: Any) -> Any:
        words = [str(argument) for argument in arguments]
        capsys.readouterr()
        if command is distill:
            monkeypatch.setattr(sys, "argv", ["distill", *words])
            before = signal.getsignal(signal.SIGTERM)
            try:
                distill.main()
            finally:
                signal.signal(signal.SIGTERM, before)
            return None
        command.main([*words, "--json"])
        return json.loads(capsys.readouterr().out)

    return run


COMMAND = [
    *("--steps", "2", "--finest", "4", "--pictures", "4", "--updates", "2", "--batch-size", "2"),
    *("--guidance", "1", "8", "--guidance-default", "4", "--report-prompts", "1", "--device", "cpu"),
]


def test_the_sizes_that_sdxl_is_told_are_the_pictures_own_and_batches_hold_one_size(
    folder: Path, tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    from toolkit.training import loop

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name, size in (("a", (80, 40)), ("b", (200, 300)), ("c", (100, 100))):
        Image.effect_noise(size, 90).save(pictures / f"{name}.png")
        (pictures / f"{name}.txt").write_text(f"a fox {name}", encoding="utf-8")
    seen: list[tuple[list[int], set[tuple[float, ...]]]] = []

    def spied(*rest: Any, **more: Any) -> Any:
        batch = draw_batch(*rest, **more)
        seen.append((list(batch.x0.shape[2:]), {tuple(row) for row in batch.cond["time_ids"].tolist()}))
        return batch

    monkeypatch.setattr(loop, "draw_batch", spied)
    call(
        distill,
        *("--ckpt", folder / "sdxl.safetensors", *COMMAND, "--report-prompts", "0", "--origin", "pair"),
        *("--data", pictures, "--resolution", "96"),
        *("--batch-size", "6", "--micro-batch", "1", "--updates", "1"),
        *("--out", tmp_path / "run", "--cache-dir", tmp_path / "cache"),
    )
    told = {
        (32, 64): (40.0, 80.0, 0.0, 0.0, 64.0, 128.0),
        (64, 32): (300.0, 200.0, 0.0, 10.0, 128.0, 64.0),
        (48, 48): (100.0, 100.0, 0.0, 0.0, 96.0, 96.0),
    }
    assert all(ids == {told[tuple(shape)]} for shape, ids in seen)
    assert {tuple(shape) for shape, _ in seen} == set(told)
