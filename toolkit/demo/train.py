"""Make the demo's files from nothing: `python -m toolkit.demo.train --out DIR`.

Three stages (judge, autoencoder, teacher), each skipped if its result is in DIR and resumed if it was
interrupted. DIR then holds judge.safetensors, tokenizer/ and teacher.safetensors (SD1's single-file
layout, fp16). About an hour and a quarter on one core.

With --inpaint instead: the 9-channel teacher of `inpainting`, from the stored demo teacher, as
DIR/inpaint-teacher.safetensors, in eleven minutes of one core.

The stored teacher is not one uninterrupted run of this command: updates 0 to 2,500 used a plain min-SNR-5
weight, and until update 4,000 the captions named the position too. A run from nothing will be similar, not
identical.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from .autoencoder import SCALING_FACTOR, decode, encode, normalise, train_autoencoder
from .drawings import Scenes, captions, render, scenes
from .inpainting import train_inpainting_teacher
from .judge import load_judge, train_judge
from .storage import load_autoencoder, write_half, write_teacher
from .teacher import Teacher, train_teacher
from .vocabulary import write_tokenizer

PICTURES = 40_000
_log = logging.getLogger("fewstep")


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m toolkit.demo.train", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the results and the state in between"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--stage", choices=("judge", "autoencoder", "teacher", "all"), default="all")
    parser.add_argument("--judge-updates", type=int, default=3000)
    parser.add_argument("--autoencoder-updates", type=int, default=4500)
    parser.add_argument("--teacher-updates", type=int, default=8000)
    parser.add_argument("--inpaint", action="store_true", help="train the inpainting teacher, nothing else")
    parser.add_argument("--inpaint-updates", type=int, default=3000)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    torch.set_num_threads(options.threads)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    if options.inpaint:
        path = out / "inpaint-teacher.safetensors"
        train_inpainting_teacher(out, path, updates=options.inpaint_updates)
        print(f"inpainting teacher: {path}")
        return 0
    stages = ("judge", "autoencoder", "teacher") if options.stage == "all" else (options.stage,)
    if "judge" in stages:
        print(judge_stage(out, updates=options.judge_updates))
    if "autoencoder" in stages:
        print(autoencoder_stage(out, updates=options.autoencoder_updates))
    if "teacher" in stages:
        print(teacher_stage(out, updates=options.teacher_updates))
    return 0


def judge_stage(out: Path, *, updates: int) -> str:
    """Train the judge unless it is there; says how often it is right on fresh drawings."""
    path = out / "judge.safetensors"
    if not path.exists():
        write_half(train_judge(updates=updates).state_dict(), path)
    what = scenes(4096, seed=99)
    right = load_judge(path).adherence(render(what, seed=99), captions(what, seed=0)).float().mean()
    return f"judge: all attributes right on {float(right):.4f} of 4096 fresh drawings"


def autoencoder_stage(out: Path, *, updates: int) -> str:
    """Train and normalise the autoencoder unless it is there; says what its reconstructions keep."""
    path = out / "autoencoder.safetensors"
    judge = load_judge(out / "judge.safetensors")
    if not path.exists():
        model = train_autoencoder(judge, out / "autoencoder.state", updates=updates)
        normalise(model, render(scenes(8192, seed=22), seed=22))
        write_half(model.state_dict(), path)
    model = load_autoencoder(path)
    what = scenes(2048, seed=98)
    images = render(what, seed=98)
    latents = encode(model, images)
    made = decode(model, latents)
    right = judge.adherence(made, captions(what, seed=0)).float().mean()
    error = -10 * (made - images).square().mean().log10()
    z = latents * SCALING_FACTOR
    spread = ", ".join(f"{float(mean):.2f}+-{float(std):.2f}" for mean, std in zip(*_moments(z), strict=True))
    return f"autoencoder: {float(right):.4f} of 2048 still right, {float(error):.1f} dB, latents {spread}"


def teacher_stage(out: Path, *, updates: int) -> str:
    """Train the teacher, keeping its average as one file."""
    vae = load_autoencoder(out / "autoencoder.safetensors")
    write_tokenizer(out / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    latents, what = _latents(out / "latents.safetensors", vae)

    def publish(teacher: Teacher, update: int) -> None:
        write_teacher(teacher, out / "teacher.safetensors")
        _log.info("kept the teacher of update %d", update)

    train_teacher(latents, what, vae, tokenizer, out / "teacher.state", updates=updates, on_keep=publish)
    return (
        "teacher: copy the three files into toolkit/demo and measure it by python -m toolkit.evaluate "
        "--teacher toolkit/demo/teacher.safetensors"
    )


def _latents(path: Path, vae: AutoencoderKL) -> tuple[Tensor, Scenes]:
    """Unit-variance latents of the training drawings and their attributes, from the cache if it is there."""
    what = scenes(PICTURES, seed=30)
    if not path.exists():
        _log.info("encoding %d drawings", PICTURES)
        z = encode(vae, render(what, seed=30)) * SCALING_FACTOR
        save_file({"z": z.contiguous()}, path.with_name(path.name + ".new"))
        path.with_name(path.name + ".new").replace(path)
    return load_file(path)["z"], what


def _moments(z: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel."""
    return z.mean((0, 2, 3)).tolist(), z.std((0, 2, 3)).tolist()


if __name__ == "__main__":
    sys.exit(main())
