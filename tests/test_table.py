"""docs/teachers.md's table: every family in every kind of file, to its student in diffusers.

A quarter of the cells, in which every row and column is, run by default; all with ``-m "not comfyui"``.
ComfyUI's column is tests/hosts/test_comfyui_table.py.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from make_checkpoint import TINY, make_spec, make_student, make_teacher, make_tokenizer
from test_families import save_folder
from torch import Tensor

from toolkit import distill, evaluate, export, inspect, sample
from toolkit.evaluation.painter import Painter
from toolkit.runtime.files import load_tensors, read_header, read_spec, save_tensors
from toolkit.training.checkpoint import open_checkpoint
from toolkit.training.export import pipeline_class
from toolkit.training.families import UNET_PREFIX, VAE_PREFIX
from toolkit.training.layout import unet_from_ldm

DOCUMENT = Path(__file__).parents[1] / "docs" / "teachers.md"


@dataclass(frozen=True)
class Row:
    """A family in the table; ``override``: what a file that has no marker needs to be told."""

    name: str
    family: str
    channels: int = 4
    markers: tuple[str, ...] = ()

    @property
    def override(self) -> str:
        said = {"v_pred": "prediction_type=v_prediction", "ztsnr": "ztsnr=true"}
        return ",".join(said[marker] for marker in self.markers)


ROWS = (
    Row("Stable Diffusion 1", "sd1"),
    Row("Stable Diffusion 1, v", "sd1", markers=("v_pred",)),
    Row("Stable Diffusion 1, inpainting", "sd1", 9),
    Row("Stable Diffusion 2", "sd2"),
    Row("Stable Diffusion 2, v", "sd2", markers=("v_pred",)),
    Row("Stable Diffusion 2, inpainting", "sd2", 9),
    Row("SDXL", "sdxl"),
    Row("SDXL, v with zero-terminal SNR", "sdxl", markers=("v_pred", "ztsnr")),
    Row("SDXL, inpainting", "sdxl", 9),
)
DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8 e4m3": torch.float8_e4m3fn,
    "fp8 e5m2": torch.float8_e5m2,
}
SIZE = (32, 32)
KINDS = (*DTYPES, ".ckpt", "UNet and parts", "folder", "sharded fp16 folder")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table")
    make_tokenizer(folder / "tokenizer")
    for row in ROWS:
        path = make_teacher(
            folder / f"{row.name}.safetensors", shape=TINY[row.family], in_channels=row.channels
        )
        tensors = load_tensors(path)
        size = {"modelspec.resolution": "32x32"}
        save_tensors(tensors | {key: torch.zeros(0) for key in row.markers}, size, path)
    return folder


def teacher_file(row: Row, kind: str, teachers: Path, folder: Path) -> tuple[Path, list[str]]:
    """The row's teacher in a kind of file, and the options that it needs."""
    source = teachers / f"{row.name}.safetensors"
    tensors = load_tensors(source)
    if kind in DTYPES:
        cast = {key: value.to(DTYPES[kind]) for key, value in tensors.items()}
        save_tensors(cast, {}, folder / "model.safetensors")
        return folder / "model.safetensors", []
    if kind == ".ckpt":
        torch.save({"state_dict": {key: v.half() for key, v in tensors.items()}}, folder / "model.ckpt")
        return folder / "model.ckpt", []
    opened = open_checkpoint(source, tokenizer=teachers / "tokenizer")
    if kind == "UNet and parts":
        prefixes = {"vae": VAE_PREFIX} | {e.part: e.prefix for e in opened.of.text_encoders}
        options: list[str] = ["--override", row.override] if row.override else []
        for part, prefix in prefixes.items():
            found = {key: value for key, value in tensors.items() if key.startswith(prefix)}
            save_tensors(found, {}, folder / f"{part}.safetensors")
            options += ["--" + part.replace("_", "-"), str(folder / f"{part}.safetensors")]
        unet = unet_from_ldm({key: value for key, value in tensors.items() if key.startswith(UNET_PREFIX)})
        save_tensors(unet, {}, folder / "unet.safetensors")
        return folder / "unet.safetensors", options
    if kind == "folder":
        return save_folder(opened, folder / "model"), []
    path = save_folder(opened, folder / "model", variant="fp16", max_shard_size="400KB")
    assert not list(path.glob("unet/diffusion_pytorch_model.safetensors")), "the variant is alone there"
    return path, []


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs a command as a person would; answers with its JSON."""

    def run(command: Any, *arguments: Any) -> Any:
        words = [*map(str, arguments), "--json"]
        capsys.readouterr()
        if command is distill:
            monkeypatch.setattr(sys, "argv", ["distill", *words])
            before = signal.getsignal(signal.SIGTERM)
            try:
                distill.main()
            finally:
                signal.signal(signal.SIGTERM, before)
        else:
            command.main(words)
        return json.loads(capsys.readouterr().out)

    return run


def cells() -> list[Any]:
    """In those that are not slow every row has a LoRA student and one trained in full."""
    return [
        pytest.param(row, kind, marks=[] if (r + k) % 4 == 0 else pytest.mark.slow, id=f"{row.name}-{kind}")
        for r, row in enumerate(ROWS)
        for k, kind in enumerate(KINDS)
    ]


@pytest.mark.parametrize(("row", "kind"), cells())
def test_a_cell(row: Row, kind: str, teachers: Path, tmp_path: Path, call: Callable[..., Any]) -> None:
    path, options = teacher_file(row, kind, teachers, tmp_path)
    words = ["--tokenizer", str(teachers / "tokenizer")]
    predicted = "v_prediction" if "v_pred" in row.markers else "epsilon"

    found = call(inspect, path, *options[: 2 if row.override else 0])
    assert (found["family"], found["inpaint"], found["channels"]) == (
        row.family,
        row.channels == 9,
        row.channels,
    )
    assert (found["prediction_type"], found["ztsnr"]) == (predicted, "ztsnr" in row.markers)

    is_lora = (ROWS.index(row) // 4 + KINDS.index(kind) // 4) % 2 == 0
    call(
        distill,
        *("--ckpt", path, *words, *options, "--out", tmp_path / "run", "--cache-dir", tmp_path / "cache"),
        *("--student", "lora" if is_lora else "full", "--steps", 1, "--origin", "pair", "--substeps", 2),
        *("--pictures", 2, "--updates", 2, "--batch-size", 1, "--report-prompts", 0, "--device", "cpu"),
        *("--velocity-at", 0, "--guidance", 1, 8, "--guidance-default", 4, "--resolution", "32x32"),
    )
    student = tmp_path / "run" / "student.safetensors"
    spec = read_spec(student)
    assert spec is not None and (spec.family, spec.inpaint) == (row.family, row.channels == 9)
    assert (spec.prediction_type, spec.ztsnr) == (predicted, "ztsnr" in row.markers)
    assert {*row.markers} == {"v_pred", "ztsnr"} & set(read_header(student).tensors)

    more = [*words, "--device", "cpu"]
    more += ["--width", "32", "--height", "32"]
    call(sample, "--ckpt", student, "--prompt", "a fox", *more, "-o", tmp_path / "student.png")
    opened = open_checkpoint(student, tokenizer=teachers / "tokenizer")
    expected = Painter.open(opened).paint(["a fox"], seeds=[5], guidance=4.0, size=SIZE)
    assert bool(expected.isfinite().all()) and float(expected.std()) > 0.01
    for to, name in (("checkpoint", "c.safetensors"), ("baked", "b.safetensors"), ("diffusers", "d")):
        assert call(export, student, "--to", to, *words, "-o", tmp_path / name)["max_difference"] < 1e-5
        again = open_checkpoint(tmp_path / name, tokenizer=teachers / "tokenizer")
        assert again.family == row.family and again.kind == ("baked" if to == "baked" else "student")
        painted = Painter.open(again).paint(["a fox"], seeds=[5], guidance=4.0, size=SIZE)
        torch.testing.assert_close(painted, expected, atol=1e-4, rtol=0)
    call(export, student, "--to", "lora", "-o", tmp_path / "l.safetensors")
    assert inspect.describe(tmp_path / "l.safetensors")["kind"] == "lora"
    if row.channels == 4:  # tests/test_inpaint.py has the others' pipeline
        stock = stock_picture(tmp_path / "d", opened, guidance=4.0)
        torch.testing.assert_close(stock, expected, atol=2e-3 if spec.ztsnr else 1e-3, rtol=0)


def stock_picture(folder: Path, student: Any, *, guidance: float) -> Tensor:
    pipeline = pipeline_class(student.of).from_pretrained(
        str(folder), local_files_only=True, torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "a fox",
        num_inference_steps=1,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
        height=SIZE[0],
        width=SIZE[1],
    ).images


@pytest.mark.parametrize("row", ROWS[::3], ids=lambda row: row.family)
def test_every_family_is_evaluated(
    row: Row, teachers: Path, tmp_path: Path, call: Callable[..., Any]
) -> None:
    spec = make_spec(family=row.family)
    student = make_student(tmp_path / "student.safetensors", spec=spec, shape=TINY[row.family])
    rows = call(
        evaluate,
        *("--teacher", teachers / f"{row.name}.safetensors", "--student", student),
        *("--samples", 2, "--reference-steps", 3, "--steps", 4),
        *("--tokenizer", teachers / "tokenizer", "--device", "cpu", "-o", tmp_path / "measured"),
    )["rows"]
    assert {row["model"] for row in rows} == {"teacher", "student"}
