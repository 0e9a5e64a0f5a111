"""ComfyUI's column of docs/teachers.md's table: every family's student, bake and LoRA in the real host.

The UNets are the narrowest that ComfyUI's classes of the families take. It builds text encoders of the true
sizes only, so the graphs get random texts; test_comfyui_families.py has the text encoders.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hosts.bench import Bench
from hosts.comfyui import Host
from hosts.models import Model
from hosts.reference import relative_error
from hosts.test_comfyui_families import work
from make_checkpoint import TINY, make_spec, make_tensors
from safetensors.torch import load_file, save_file
from test_table import ROWS, Row
from torch import Tensor

from toolkit.diffusion.grid import trailing_timesteps
from toolkit.diffusion.guidance import w_embedding
from toolkit.diffusion.prediction import PredictionType
from toolkit.evaluation.painter import Painter
from toolkit.runtime.files import save_tensors, spec_tensor
from toolkit.training.adapters import LoraShape, OneNetwork
from toolkit.training.checkpoint import Checkpoint, open_checkpoint, seen_by_comfyui, write_checkpoint
from toolkit.training.export import export_baked
from toolkit.training.families import UNET_PREFIX
from toolkit.training.networks import denoiser, random_cond, with_sizes
from toolkit.training.student_lora import lora_path, save_lora_student

GUIDANCE = 4.0

WORKER = """
import comfy.lora, comfy.model_patcher
import comfy.utils

asked, answers, said = json.loads((folder / "asked.json").read_text()), {}, {}

def built(path, spec=None):
    state = load_file(path)
    if spec is not None:
        state[UNET + "fewstep.spec"] = torch.tensor(spec, dtype=torch.uint8)
    config = comfy.model_detection.model_config_from_unet(state, UNET)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model(state, UNET, device="cpu")
    model.load_model_weights(state, UNET)
    return model

for name, entry in asked.items():
    inputs = load_file(folder / f"{name}.inputs.safetensors")

    def answer(kind, model, **more):
        if "pooled" in inputs:
            more["y"] = model.encode_adm(pooled_output=inputs["pooled"], width=96, height=128)
        if "inpaint" in inputs:
            more["c_concat"] = inputs["inpaint"]
        found = model.apply_model(inputs["x"], inputs["sigma"], c_crossattn=inputs["text"], **more)
        answers[f"{name}/{kind}"] = found.float().contiguous()
        said[f"{name}/{kind}"] = [type(model.model_config).__name__, model.model_type.name]

    if "student" in entry["kinds"]:
        answer("student", built(folder / f"{name}.safetensors", entry["spec"]), fewstep_w=inputs["w"])
    if "baked" not in entry["kinds"]:
        continue
    answer("baked", built(folder / f"{name}.baked.safetensors"))
    model = built(folder / f"{name}.teacher.safetensors")
    lora = comfy.utils.load_torch_file(str(folder / f"{name}-lora.safetensors"))
    patches = comfy.lora.load_lora(lora, comfy.lora.model_lora_keys_unet(model, {}))
    patcher = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    patcher.add_patches(patches, 1.0)
    patcher.patch_model()
    answer("lora", model)
    said[f"{name}/patches"] = len(patches)

save_file(answers, folder / "answers.safetensors")
(folder / "said.json").write_text(json.dumps(said))
"""


SHAPE = {"sd1": "comfy", "sd2": "comfy-sd2", "sdxl": "comfy-sdxl"}
KINDS = ("student", "baked", "lora")


def make(row: Row, folder: Path, shape: str) -> Checkpoint:
    """The row's teacher with a student of it as a LoRA run leaves it, every layer changed, and its bake."""
    texts = ("text_encoder", "text_encoder_2") if row.family == "sdxl" else ("text_encoder",)
    tensors = make_tensors(shape, in_channels=row.channels, parts=("unet",), seed=ROWS.index(row))
    tensors |= make_tensors("tiny", parts=("vae",))
    tensors |= make_tensors(TINY["sd1"] if row.family == "sd1" else shape, parts=texts)
    path = folder / f"{row.name}.teacher.safetensors"
    save_tensors(tensors | {key: torch.zeros(0) for key in row.markers}, {}, path)
    teacher = open_checkpoint(path)
    holder = OneNetwork(
        lambda: teacher.unet(conditioned=True),
        LoraShape(rank=2),
        seed=1,
        device=torch.device("cpu"),
        dtype=torch.float32,
        autocast=lambda network: network,
    )
    generator = torch.Generator().manual_seed(2)
    scales = {"lora_A": 0.1, "lora_B": 0.1, "cond_proj": 1 / 16, "linear_1": 0.02}
    trained = {
        name: value.detach()
        + next(scale for part, scale in scales.items() if part in name)
        * torch.randn(value.shape, generator=generator)
        for name, value in holder.pair(None, teacher="pair").trained.items()
    }
    spec = make_spec(
        family=row.family,
        inpaint=row.channels == 9,
        prediction_type=teacher.prediction_type,
        ztsnr=teacher.ztsnr,
        lora_rank=2,
        guidance_default=GUIDANCE,
    )
    student = folder / f"{row.name}.safetensors"
    save_lora_student(student, trained, spec=spec, source=teacher, dtype=torch.float32)
    opened = open_checkpoint(student)
    export_baked(opened, folder / f"{row.name}.baked.safetensors", guidance=GUIDANCE)
    return opened


def inputs_of(student: Checkpoint) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    cond = random_cond(student, 2, generator=generator)
    sigma = student.schedule.sigma(torch.tensor([999, 249])).float()
    x = torch.randn(2, 4, 16, 12, generator=generator) * (1 + sigma**2).sqrt().reshape(-1, 1, 1, 1)
    made = {"x": x, "sigma": sigma, "w": w_embedding(torch.full((2,), GUIDANCE - 1)), "text": cond["text"]}
    if "pooled" in cond:
        made["pooled"] = cond["pooled"]
    if student.inpaint:
        made["inpaint"] = torch.randn(2, 5, 16, 12, generator=generator)
    return made


@dataclasses.dataclass(frozen=True)
class Answers:
    students: dict[str, Checkpoint]
    inputs: dict[str, dict[str, Tensor]]
    tensors: dict[str, Tensor]
    said: dict[str, Any]


@pytest.fixture(scope="module")
def answers(comfyui_host: Host, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Answers]:
    """The host's answers to a shape's rows, asked once."""

    @cache
    def ask(shape: str, rows: tuple[Row, ...], kinds: tuple[str, ...]) -> Answers:
        folder = tmp_path_factory.mktemp("table")
        students = {row.name: make(row, folder, shape) for row in rows}
        inputs = {name: inputs_of(student) for name, student in students.items()}
        asked: dict[str, Any] = {}
        for name, student in students.items():
            save_file(inputs[name], folder / f"{name}.inputs.safetensors")
            asked[name] = {"spec": spec_tensor(student.spec).tolist(), "kinds": kinds}
        (folder / "asked.json").write_text(json.dumps(asked))
        work(comfyui_host, WORKER, folder)
        said = json.loads((folder / "said.json").read_text())
        return Answers(students, inputs, load_file(folder / "answers.safetensors"), said)

    return ask


CLASSES = {"sd1": "SD15", "sd2": "SD20", "sdxl": "SDXL"}


def cells() -> list[Any]:
    """The bakes and LoRAs of SDXL take a gigabyte each, as narrow as a stock host allows."""
    return [
        pytest.param(
            row,
            kind,
            marks=pytest.mark.slow if row.family == "sdxl" and kind != "student" else [],
            id=f"{row.name}-{kind}",
        )
        for row in ROWS
        for kind in KINDS
    ]


@pytest.mark.parametrize(("row", "kind"), cells())
def test_a_cell(answers: Callable[..., Answers], row: Row, kind: str) -> None:
    rows, kinds, shape = tuple(r for r in ROWS if r.family == row.family), KINDS, SHAPE[row.family]
    if row.family == "sdxl":
        rows = rows if kind == "student" else (row,)
        kinds, shape = (("student",), shape) if kind == "student" else (("baked", "lora"), "stock-sdxl")
    told = answers(shape, rows, kinds)
    student, inputs = told.students[row.name], told.inputs[row.name]
    found, (kept_as, predicts) = told.tensors[f"{row.name}/{kind}"], told.said[f"{row.name}/{kind}"]
    assert kept_as == ("FewStep" if kind == "student" else "") + CLASSES[row.family]
    taken: PredictionType = student.prediction_type
    if kind != "student":  # a stock host's own opinion; what to do about it is said by the export
        taken = seen_by_comfyui(student.tensors, row.family)
    assert predicts == ("V_PREDICTION" if taken == "v_prediction" else "EPS")
    schedule = student.schedule
    if kind != "student" and row.family != "sdxl":
        schedule = dataclasses.replace(student, ztsnr=False).schedule
    network = denoiser(student.unet(), schedule=schedule, prediction_type=taken)
    cond = {name: inputs[name] for name in ("text", "pooled", "inpaint") if name in inputs}
    with torch.no_grad():
        cond = with_sizes(cond, width=96, height=128)
        ours = network(inputs["x"], inputs["sigma"], cond=cond, w=torch.full((2,), GUIDANCE - 1))
        other = network(inputs["x"], inputs["sigma"], cond=cond, w=torch.full((2,), 1.0))
    assert relative_error(found, ours) < 1e-4
    assert relative_error(found, other) > 1e-3, "it is this guidance"
    if kind == "lora":
        trained = load_file(lora_path(student.path))
        layers = {key.rsplit(".", 2)[0] for key in trained if "lora_down" in key}
        assert told.said[f"{row.name}/patches"] == len(layers) + 2


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.family != "sd1" and row.channels == 4], ids=lambda row: row.name
)
def test_a_students_graph_in_the_server_gives_our_latents(bench: Bench, comfyui_base: Path, row: Row) -> None:
    """Load Checkpoint, KSampler with the sampler and scheduler of the pack, VAE Decode."""
    spec = make_spec(
        family=row.family,
        prediction_type="v_prediction" if "v_pred" in row.markers else "epsilon",
        ztsnr="ztsnr" in row.markers,
        timesteps=trailing_timesteps(4),
    )
    shape = f"comfy-{row.family}"
    tensors = make_tensors(shape, parts=("unet",), dial=1.0) | make_tensors("comfy", parts=("vae",))
    path = comfyui_base / "models" / "checkpoints" / f"table {row.name}.safetensors"
    write_checkpoint(path, tensors=tensors, spec=spec, resolution=(64, 64))
    cond, pooled = random_text(tensors)
    loader = bench.load(Model(path, spec))
    more = {} if pooled is None else {"pooled_output": pooled}
    sampled = bench(
        "KSampler",
        model=loader[0],
        positive=bench.conditioning(cond, **more),
        negative=bench.conditioning(cond, **more),
        latent_image=bench("EmptyLatentImage", width=64, height=96, batch_size=1)[0],
        seed=7,
        steps=4,
        cfg=GUIDANCE,
        sampler_name="fewstep",
        scheduler="fewstep",
        denoise=1.0,
    )[0]
    found = bench.run(latent=sampled, image=bench("VAEDecode", samples=sampled, vae=loader[2])[0])
    assert found["image"].shape == (1, 96, 64, 3) and bool(found["image"].isfinite().all())

    vae = path.with_name(f"{row.name} vae.safetensors")
    save_tensors(make_tensors("tiny", parts=("vae",)), {}, vae)
    texts = {}
    for part in ("text_encoder", "text_encoder_2")[: 2 if row.family == "sdxl" else 1]:
        texts[part] = path.with_name(f"{row.name} {part}.safetensors")
        save_tensors(make_tensors(shape, parts=(part,)), {}, texts[part])
    student = open_checkpoint(path, vae=vae, **texts)
    painter = Painter(
        denoiser=denoiser(student.unet(), schedule=student.schedule, prediction_type=spec.prediction_type),
        # Of the host's: eight pixels a cell, which SDXL's sizes are told in.
        vae=SimpleNamespace(config={"block_out_channels": (1,) * 4, "latent_channels": 4}),
        texts=lambda prompts: {"text": cond} | ({} if pooled is None else {"pooled": pooled}),
        schedule=student.schedule,
        size=(96, 64),
        spec=spec,
    )
    scale = student.of.scaling_factor
    expected = painter.latents(["x"], seeds=[7], guidance=GUIDANCE, size=(96, 64)).x0
    assert relative_error(found["samples"] * scale, expected) < (1e-3 if spec.ztsnr else 1e-4)


def random_text(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """What the UNet attends to, and SDXL's pooled text, at random."""
    generator = torch.Generator().manual_seed(3)
    width = next(v.shape[1] for key, v in tensors.items() if key.endswith("attn2.to_k.weight"))
    cond = torch.randn(1, 77, width, generator=generator)
    if UNET_PREFIX + "label_emb.0.0.weight" not in tensors:
        return cond, None
    return cond, torch.randn(1, 1280, generator=generator)
