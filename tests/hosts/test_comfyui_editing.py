"""Editing by inversion in a real ComfyUI: encoded with one prompt, decoded with another."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts.bench import Bench, Link, random_conditioning, random_latent
from hosts.comfyui import Failed, Host
from hosts.models import SIZE, Model, Models, encoder_spec, student_lora_tensors
from hosts.reference import SCALE, Sampling, Unet, encoding, level, merged, relative_error, student
from hosts.test_comfyui_families import work
from make_checkpoint import make_spec, make_student
from safetensors.torch import load_file, save_file
from torch import Tensor

from toolkit.demo import TEACHER
from toolkit.demo.drawings import draw
from toolkit.diffusion.grid import Grid
from toolkit.evaluation.editing import Editor
from toolkit.evaluation.painter import Painter
from toolkit.opening import open_for_people
from toolkit.runtime.files import spec_tensor
from toolkit.runtime.samplers import sample_deterministic
from toolkit.training.checkpoint import open_checkpoint, save_student, student_metadata
from toolkit.training.networks import denoiser, random_cond, with_sizes

TIGHT = 1e-5
SEED = 2**40 + 7
TRAINED, UPWARDS = (999, 749, 499, 249), (0, 249, 499, 749)
BEFORE, AFTER = random_conditioning(1), random_conditioning(2)
PICTURES = random_latent(3, batch=2)
NOISE = random_latent(4, batch=2) / 5


@cache
def unet(model: Model) -> Unet:
    return Unet(
        model.tensors, prediction_type="epsilon" if model.spec is None else model.spec.prediction_type
    )


def encode(bench: Bench, model: Link, **choices: Any) -> Link:
    """The pack's node: BEFORE on PICTURES, unless said otherwise."""
    inputs = {"model": model, "steps": 0, **choices}
    inputs.setdefault("positive", bench.conditioning(BEFORE))
    inputs.setdefault("latent", bench.latent(PICTURES))
    return bench("FewStepEncodeToNoise", **inputs)[0]


def decode(bench: Bench, model: Link, latent: Link, **choices: Any) -> Link:
    inputs = {"seed": SEED, "guidance": 7.0, "denoise": 1.0, "add_noise": False, **choices}
    return bench("FewStepKSampler", model=model, latent=latent, positive=bench.conditioning(AFTER), **inputs)[
        0
    ]


def stock(bench: Bench, model: Link, latent: Link, node: str = "KSampler", **choices: Any) -> Link:
    inputs = {"sampler_name": "fewstep", "scheduler": "fewstep", "steps": 4, "cfg": 7.0, **choices}
    if node == "KSampler":
        inputs |= {"seed": SEED, "denoise": 1.0}
    else:
        inputs |= {"noise_seed": SEED, "start_at_step": 0, "end_at_step": 10000}
        inputs |= {"return_with_leftover_noise": "disable"}
    prompt = bench.conditioning(AFTER)
    return bench(node, model=model, latent_image=latent, positive=prompt, negative=prompt, **inputs)[0]


def encoded(model: Model, timesteps: tuple[int, ...] = UPWARDS, **choices: Any) -> Tensor:
    network = Unet(model.tensors, **choices) if choices else unet(model)
    return encoding(student(network, BEFORE, 1.0), timesteps, PICTURES)


def assert_equal(found: Tensor, reference: Tensor) -> None:
    error = relative_error(found, reference)
    assert error < TIGHT, f"relative error {error:.1e}"


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [("encoder", "epsilon"), ("velocity_encoder", "velocity"), ("encoder", "stochastic")],
)
def test_a_picture_becomes_noise_and_the_noise_another_picture(
    bench: Bench, models: Models, encoder: str, decoder: str
) -> None:
    first, second = getattr(models, encoder), getattr(models, decoder)
    noise = encode(bench, bench.load(first)[0])
    edited = decode(bench, bench.load(second)[0], noise)
    found = bench.sampled(noise)
    assert_equal(found, encoded(first))
    sampling = Sampling(
        student(unet(second), AFTER, 7.0), TRAINED, seed=SEED, stochastic=decoder == "stochastic"
    )
    assert_equal(bench.sampled(edited), sampling(found, is_noisy=True))


def test_stock_samplers_that_add_no_noise_decode_it_bit_for_bit(bench: Bench, models: Models) -> None:
    model = bench.load(models.epsilon)[0]
    noise = encode(bench, bench.load(models.encoder)[0])
    ours = bench.sampled(decode(bench, model, noise))
    found = bench.sampled(stock(bench, model, noise, "KSamplerAdvanced", add_noise="disable"))
    assert torch.equal(found, ours)
    said = bench("FewStepGuidance", conditioning=bench.conditioning(AFTER), guidance=7.0)[0]
    custom = bench(
        "SamplerCustomAdvanced",
        noise=bench("DisableNoise")[0],
        guider=bench("BasicGuider", model=model, conditioning=said)[0],
        sampler=bench("FewStepSamplerSelect")[0],
        sigmas=bench("FewStepSigmas", model=model, start=1.0)[0],
        latent_image=noise,
    )[0]
    assert torch.equal(bench.sampled(custom), ours)


def test_a_teacher_encodes_in_as_many_steps_as_are_asked_for(bench: Bench, models: Models) -> None:
    found = bench.sampled(encode(bench, bench.load(models.teacher)[0], steps=10))
    assert_equal(found, encoded(models.teacher, Grid.encoding(10).timesteps))


def test_a_persons_lora_acts_on_an_encoder(bench: Bench, models: Models) -> None:
    lora = models.style_lora
    choices = {"lora_name": lora.name, "strength_model": 0.8}
    model = bench("LoraLoaderModelOnly", model=bench.load(models.encoder)[0], **choices)[0]
    found = bench.sampled(encode(bench, model))
    with_lora = encoded(models.encoder, change=lambda state: merged(state, lora.tensors, 0.8))
    assert_equal(found, with_lora)
    assert relative_error(found, encoded(models.encoder)) > 1e-3


def test_an_encoder_as_a_lora_on_its_teacher_encodes(bench: Bench, models: Models) -> None:
    tensors = student_lora_tensors(models.teacher.tensors)
    del tensors["fewstep.cond_proj.weight"]
    spec = encoder_spec(container="lora", lora_rank=4)
    lora = models.lora("encoder", tensors, student_metadata(spec, SIZE), spec)
    choices = {"cfg_is_guidance": True, "guidance": 0.0, "live_negative": False, "strength": 1.0}
    teacher = bench.load(models.teacher)[0]
    model = bench("FewStepLoadStudentLora", model=teacher, lora_name=lora.name, **choices)[0]
    found = bench.sampled(encode(bench, model))
    assert_equal(found, encoded(models.teacher, change=lambda state: merged(state, tensors)))


@pytest.mark.parametrize(
    ("node", "choices"),
    [
        ("FewStepKSampler", {"add_noise": True}),
        ("KSampler", {}),
        ("KSampler", {"sampler_name": "euler"}),
        ("KSampler", {"sampler_name": "euler", "scheduler": "simple"}),
        ("KSampler", {"sampler_name": "dpmpp_2m", "scheduler": "karras", "steps": 20}),
    ],
    ids=str,
)
def test_an_encoder_makes_no_pictures(
    bench: Bench, models: Models, node: str, choices: dict[str, Any]
) -> None:
    model, latent = bench.load(models.encoder)[0], bench.latent(PICTURES)
    made = (decode if node == "FewStepKSampler" else stock)(bench, model, latent, **choices)
    with pytest.raises(Failed, match="this student is an encoder, it turns pictures into noise; load the"):
        bench.sampled(made)


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("decoder", "this student makes pictures of noise; to make noise of pictures takes an encoder"),
        ("steps", "5 steps were asked for, but this encoder was trained for 4"),
        ("mask", "the latent has a mask, and a picture is encoded as a whole; connect it without"),
        ("flow", "is no Stable Diffusion 1, 2 or SDXL, and only those are encoded"),
    ],
)
def test_what_cannot_be_encoded_is_refused(bench: Bench, models: Models, case: str, sentence: str) -> None:
    model = bench.load(models.epsilon if case == "decoder" else models.encoder)[0]
    choices: dict[str, Any] = {"steps": 5 if case == "steps" else 0}
    if case == "mask":
        choices["latent"] = bench.latent(PICTURES, noise_mask=torch.ones(2, 64, 64))
    if case == "flow":
        model = bench("ModelSamplingSD3", model=bench.load(models.teacher)[0], shift=3.0)[0]
    with pytest.raises(Failed, match=sentence):
        bench.sampled(encode(bench, model, **choices))


@pytest.mark.parametrize("sampler", ["FewStepKSampler", "KSampler", "euler"])
def test_noise_is_not_added_to_noise(bench: Bench, models: Models, sampler: str) -> None:
    # A random network makes no noise of the right size, so here is some, as an encoder leaves it.
    model, noise = bench.load(models.epsilon)[0], bench.latent(level(999)[1] / level(999)[0] / SCALE * NOISE)
    if sampler == "FewStepKSampler":
        made = decode(bench, model, noise, add_noise=True)
    else:
        made = stock(bench, model, noise, sampler_name="euler" if sampler == "euler" else "fewstep")
    with pytest.raises(Failed, match="this latent is noise already"):
        bench.sampled(made)


def test_a_demo_picture_is_edited_as_by_the_toolkit(bench: Bench, models: Models) -> None:
    """Encoder, decoder, text encoder and VAE, from the picture to the picture."""
    teacher = open_for_people(TEACHER)
    state = teacher.unet(conditioned=True).state_dict()
    dial = state["time_embedding.cond_proj.weight"]
    dial.copy_(0.05 * torch.randn(dial.shape, generator=torch.Generator().manual_seed(0)))
    specs = [make(teacher_sha256=teacher.sha256) for make in (encoder_spec, make_spec)]
    undialled = {key: value for key, value in state.items() if "cond_proj" not in key}
    paths = [models.folder / "checkpoints" / f"demo-{name}.safetensors" for name in ("encoder", "decoder")]
    for path, unet_state, spec in zip(paths, (undialled, state), specs, strict=True):
        save_student(path, unet_state=unet_state, spec=spec, source=teacher, dtype=torch.float32)
    images, before = draw(2, seed=1)
    after = ["a small blue square on a black background", "a large red star on a white background"]

    choices = {"cfg_is_guidance": True, "guidance": 0.0, "live_negative": False}
    encoder, decoder = (bench("FewStepLoadStudent", ckpt_name=path.name, **choices) for path in paths)
    painters = [Painter.open(open_for_people(path)) for path in paths]
    expected = Editor(painters[0], painters[1]).edit(images, before, after, guidance=4.0)
    for row in range(2):
        pixels = bench.picture(images[row : row + 1].movedim(1, -1).contiguous(), torch.zeros(1, 32, 32))[0]
        noise = encode(
            bench,
            encoder[0],
            latent=bench("VAEEncode", pixels=pixels, vae=decoder[2])[0],
            positive=bench("CLIPTextEncode", clip=encoder[1], text=before[row])[0],
        )
        said = bench("CLIPTextEncode", clip=decoder[1], text=after[row])[0]
        inputs = {"seed": 0, "guidance": 4.0, "denoise": 1.0, "add_noise": False}
        edited = bench("FewStepKSampler", model=decoder[0], positive=said, latent=noise, **inputs)[0]
        found = bench.run(image=bench("VAEDecode", samples=edited, vae=decoder[2])[0])["image"]
        torch.testing.assert_close(found.movedim(-1, 1), expected[row : row + 1], atol=1e-3, rtol=0)
    assert float((expected - images).abs().mean()) > 0.05


FAMILIES = {
    "sd2 v": {"family": "sd2", "prediction_type": "v_prediction"},
    "sdxl ztsnr": {"family": "sdxl", "prediction_type": "v_prediction", "ztsnr": True},
}

ENCODE = """
from comfy.model_patcher import ModelPatcher

editing = importlib.import_module("pack.nodes.editing")
answers = {}
for label, spec in json.loads((folder / "asked.json").read_text()).items():
    state = load_file(folder / f"{label}.safetensors")
    state["model.diffusion_model.fewstep.spec"] = torch.tensor(spec, dtype=torch.uint8)
    inputs = load_file(folder / f"{label}.inputs.safetensors")
    config = comfy.model_detection.model_config_from_unet(state, UNET)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model(state, UNET, device="cpu")
    model.load_model_weights(state, UNET)
    patcher = ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    said = {"pooled_output": inputs["pooled"]} if "pooled" in inputs else {}
    positive, latent = [[inputs["text"], said]], {"samples": inputs["latent"]}
    answers[label] = editing.FewStepEncodeToNoise.execute(patcher, positive, latent).result[0]["samples"]
save_file(answers, folder / "answers.safetensors")
"""


def test_every_familys_encoder_makes_the_toolkits_noise(comfyui_host: Host, tmp_path: Path) -> None:
    asked, students, inputs = {}, {}, {}
    for label, choices in FAMILIES.items():
        spec = encoder_spec(**choices)
        make_student(tmp_path / f"{label}.safetensors", shape=f"comfy-{spec.family}", spec=spec, dial=None)
        students[label] = open_checkpoint(tmp_path / f"{label}.safetensors")
        cond = random_cond(students[label], 2, generator=torch.Generator().manual_seed(1))
        inputs[label] = {name: value for name, value in cond.items() if name != "time_ids"}
        save_file(
            {"latent": random_latent(5, batch=2, size=(16, 12)), **inputs[label]},
            tmp_path / f"{label}.inputs.safetensors",
        )
        asked[label] = spec_tensor(spec).tolist()
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    work(comfyui_host, ENCODE, tmp_path)
    found = load_file(tmp_path / "answers.safetensors")
    for label, checkpoint in students.items():
        schedule, scale = checkpoint.schedule, checkpoint.of.scaling_factor
        network = denoiser(checkpoint.unet(), schedule=schedule, prediction_type=checkpoint.prediction_type)
        cond = with_sizes(inputs[label], width=96, height=128)
        x = scale * random_latent(5, batch=2, size=(16, 12))
        with torch.no_grad():
            noise = sample_deterministic(network, x, Grid(UPWARDS, end=999).sigmas(schedule), {"cond": cond})
        assert_equal(found[label], noise / scale)
