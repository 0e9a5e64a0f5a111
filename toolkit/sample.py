"""Make pictures with a student or a teacher: ``python -m toolkit.sample --help``."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .command import print_json, run
from .diffusion.errors import BadInput
from .evaluation.painter import (
    TEACHER_SAMPLERS,
    Fill,
    Painted,
    Painter,
    Plan,
    check_negative,
    check_size,
    make_plan,
)
from .evaluation.pictures import require_png, save_png, to_image
from .opening import (
    add_parts,
    add_prompting,
    choose_device,
    choose_dtype,
    open_for_people,
    parts_of,
    prompted,
)
from .runtime.samplers import start_timestep
from .training.checkpoint import Checkpoint
from .training.images import load_grey, load_picture, picture_size, size_in_cells
from .training.lora import with_loras
from .training.masks import at_latent_size
from .training.networks import DTYPES, place
from .training.tiny import open_tiny

log = logging.getLogger("fewstep")

EXAMPLES = """examples:
  python -m toolkit.sample --ckpt student.safetensors --prompt "a red fox" --guidance 5 --seed 7 -o fox.png
  python -m toolkit.sample --ckpt student.safetensors --prompt "a fox" --init-image a.png -o b.png
  python -m toolkit.sample --ckpt model.safetensors --prompt "a hat" --init-image a.png --mask m.png -o c.png
  python -m toolkit.sample --ckpt model.safetensors --prompt "a fox" --sampler dpmpp_2m --steps 20 -o fox.png
  python -m toolkit.sample --ckpt student.safetensors --decoder tiny.safetensors --prompt "a fox" -o d.png
  python -m toolkit.sample --ckpt toolkit/demo/teacher.safetensors --prompt "a red star" -o star.png
"""
HOST_NAMES = {"ddim": "DDIM", "dpmpp_2m": "DPM++ 2M"}
FEWSTEP = "FewStep"


def main(arguments: Sequence[str] | None = None) -> None:
    asked = _parser().parse_args(arguments)
    require_png(asked.out)
    if asked.strength is not None and asked.init_image is None:
        raise BadInput("--strength says how far to leave the picture of --init-image; give that one too")
    if asked.mask is not None and asked.init_image is None:
        raise BadInput("--mask says what to fill in the picture of --init-image; give that one too")
    if asked.mask is not None and (asked.width, asked.height) != (None, None):
        raise BadInput("with --mask the picture keeps its size; leave out --width and --height")
    if not 0 <= asked.seed <= 2**63 - asked.count or asked.count < 1:
        raise BadInput(
            f"seed {asked.seed} and count {asked.count}: the seed must be 0 to 2^63 - 1, the count at least 1"
        )
    device = choose_device(asked.device)
    checkpoint = prompted(with_loras(open_for_people(asked.ckpt, **parts_of(asked)), asked.lora), asked)
    plan = _checked_plan(checkpoint, asked)
    size = _size(checkpoint, asked)
    fill = None if asked.mask is None else _fill(asked)
    padded = None if fill is None else _padded(fill, checkpoint)
    log.info("%s", _announcement(checkpoint, plan, asked))
    dtype = choose_dtype(asked.precision, device)
    painter = Painter.open(checkpoint, device=device, dtype=dtype)
    if asked.decoder is not None:
        painter = dataclasses.replace(painter, decoder=_tiny(asked.decoder, checkpoint, device, dtype))
    x0 = None
    if asked.init_image is not None and fill is None:
        x0 = painter.encode(load_picture(asked.init_image, size[1], size[0])[None])
    painted = _paint(painter, plan, asked, x0=x0, fill=padded, size=size)
    images = painter.decode(painted.x0)
    if fill is not None:
        images = fill.paste(images[..., : fill.images.shape[2], : fill.images.shape[3]])
    files = _write(images, checkpoint, painted, asked)
    if asked.json:
        print_json(_answer(files, painted, asked))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.sample",
        description="Make pictures with a student, at its own steps and any guidance, or with a teacher.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--ckpt",
        type=Path,
        required=True,
        metavar="PATH",
        help="student or teacher: a file or a diffusers folder",
    )
    add("--prompt", required=True, metavar="TEXT", help="what the picture shows")
    add(
        "--guidance",
        type=float,
        metavar="G",
        help="guidance scale (cfg), 1 = unguided; default: the model's own",
    )
    add(
        "--steps",
        type=int,
        metavar="N",
        help="evaluations; a student has its own number, a teacher's default is 50",
    )
    add(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="a LoRA merged into the model first (default strength 1); repeatable",
    )
    add("--seed", type=int, default=0, metavar="S", help="of the first picture (default 0)")
    add("--count", type=int, default=1, metavar="N", help="pictures, with the seeds S, S + 1 ... (default 1)")
    add("--width", type=int, help="in pixels; default: the init image's, or the model's own")
    add("--height", type=int, help="in pixels; default: the init image's, or the model's own")
    add("--init-image", type=Path, metavar="PNG", help="start from this picture instead of noise")
    add(
        "--mask",
        type=Path,
        metavar="PNG",
        help="fill in only what is white here, in the init image's size; the rest stays, bit for bit",
    )
    add(
        "--strength",
        type=float,
        metavar="F",
        help="how far to leave the init image, above 0 to 1 (default 0.5; with --mask 1)",
    )
    add(
        "--negative",
        metavar="TEXT",
        help="what a teacher is guided away from; a student has its own distilled in",
    )
    add(
        "--sampler",
        choices=sorted(TEACHER_SAMPLERS),
        help="of a teacher (default ddim); a student brings its own",
    )
    add_prompting(parser)
    add_parts(parser)
    add(
        "--decoder",
        type=Path,
        metavar="FILE",
        help="a tiny decoder (toolkit.tiny, taesd_decoder) for the pictures, instead of the VAE's own",
    )
    add("--device", help="cpu, cuda, cuda:1, mps ...; default: the best one there is")
    add("--precision", choices=sorted(DTYPES), help="default: fp16 on a GPU, fp32 elsewhere")
    add("--json", action="store_true", help="say on stdout, as JSON, what was made")
    add("-o", "--out", type=Path, required=True, metavar="OUT.png", help="with --count, OUT-SEED.png each")
    return parser


def _tiny(path: Path, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """BadInput for one of another VAE's latents."""
    tiny = open_tiny(path)
    config = checkpoint.config("vae")
    own = (int(tiny.config["latent_channels"]), len(tiny.config["block_out_channels"]))
    if own != (int(config["latent_channels"]), len(config["block_out_channels"])):
        raise BadInput(
            f"{path.name}: this decoder is of latents with {own[0]} channels and cells of "
            f"{2 ** (own[1] - 1)} pixels, and {checkpoint.path.name} has {checkpoint.latent_channels} and "
            f"{checkpoint.downscale}; give one that was distilled from its VAE"
        )
    return place(tiny, device, dtype)


def _checked_plan(checkpoint: Checkpoint, asked: argparse.Namespace) -> Plan:
    """What will run; errors name the file that was asked."""
    try:
        if checkpoint.spec is not None:
            check_negative(checkpoint.spec, asked.negative)
        return make_plan(
            checkpoint.spec,
            checkpoint.schedule,
            guidance=asked.guidance,
            steps=asked.steps,
            sampler=asked.sampler,
            strength=_strength(asked),
        )
    except BadInput as error:
        raise BadInput(f"{checkpoint.path.name}: {error}") from None


def _strength(asked: argparse.Namespace) -> float:
    if asked.init_image is None:
        return 1.0
    usual = 0.5 if asked.mask is None else 1.0
    return usual if asked.strength is None else asked.strength


def _announcement(checkpoint: Checkpoint, plan: Plan, asked: argparse.Namespace) -> str:
    timesteps = ", ".join(map(str, plan.timesteps[:8])) + (" ..." if len(plan.timesteps) > 8 else "")
    guidance = "unguided (guidance 1)" if plan.guidance == 1 else f"guidance {plan.guidance:g}"
    plural = "" if plan.evaluations == 1 else "s"
    told = (
        f"{checkpoint.name}: {checkpoint.kind}, {guidance}, {plan.evaluations} evaluation{plural} a picture "
        f"at the timesteps {timesteps}"
    )
    if asked.mask is not None:
        how = "as it was trained to" if checkpoint.inpaint else "by blending"
        told += f"; it fills in what the mask says, {how}"
    elif checkpoint.inpaint:
        told += "; an inpainting model without a mask paints the whole picture"
    if checkpoint.clip_skip > 1:
        told += f"; clip skip {checkpoint.clip_skip}"
    absent = {each.name for each in checkpoint.spec.embeddings} if checkpoint.spec else set[str]()
    absent -= {each.name for each in checkpoint.embeddings}
    if missing := sorted(name for name in absent if name.lower() in asked.prompt.lower()):
        told += f"; {', '.join(missing)} was a textual inversion in training: give its file as --embedding"
    start = next(iter(plan.timesteps))
    wanted = start_timestep(_strength(asked), len(checkpoint.schedule))
    if asked.init_image is not None and start != wanted:
        told += f"; strength {_strength(asked):g} is timestep {wanted}, the nearest start it knows is {start}"
    return told


def _size(checkpoint: Checkpoint, asked: argparse.Namespace) -> tuple[int, int]:
    """(height, width) in pixels: what was asked for, else the init image's, rounded down, else the model's
    own."""
    width, height = checkpoint.resolution
    cell = checkpoint.downscale
    if asked.init_image is not None:
        width, height = size_in_cells(asked.init_image, cell)
    size = (height if asked.height is None else asked.height), (width if asked.width is None else asked.width)
    check_size(size, cell)
    return size


def _fill(asked: argparse.Namespace) -> Fill:
    """The init image and the mask as they are; BadInput for a mask that does not fit or says nothing."""
    width, height = picture_size(asked.init_image)
    mask = load_grey(asked.mask)
    if mask.shape[1:] != (height, width):
        raise BadInput(
            f"{asked.mask.name}: the mask is {mask.shape[2]} x {mask.shape[1]} pixels and the picture "
            f"{width} x {height}; both must have the same size"
        )
    if not mask.any():
        raise BadInput(f"{asked.mask.name}: the mask is all black; what is to be filled must be white")
    return Fill(load_picture(asked.init_image, width, height)[None], mask[None])


def _padded(fill: Fill, checkpoint: Checkpoint) -> Fill:
    """The same with whole latent cells, the last rows and columns repeated; BadInput for a mask of which no
    cell is left."""
    cell = checkpoint.downscale
    height, width = fill.images.shape[2:]
    more = (0, -width % cell, 0, -height % cell)
    padded = Fill(*(F.pad(values, more, mode="replicate") for values in (fill.images, fill.masks)))
    masks = at_latent_size(padded.masks, padded.masks[..., ::cell, ::cell])
    if not (masks.round() if checkpoint.inpaint else masks).any():
        raise BadInput(
            f"the mask is too thin or too dark: latents have cells of {cell} x {cell} pixels, and none of "
            "them would be filled; draw it wider, in white"
        )
    return padded


def _paint(
    painter: Painter,
    plan: Plan,
    asked: argparse.Namespace,
    *,
    x0: Tensor | None,
    fill: Fill | None,
    size: tuple[int, int],
) -> Painted:
    with tqdm(unit="step", dynamic_ncols=True, disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return painter.latents(
            [asked.prompt] * asked.count,
            seeds=range(asked.seed, asked.seed + asked.count),
            guidance=plan.guidance,
            steps=asked.steps,
            sampler=asked.sampler,
            negative=asked.negative,
            x0=x0,
            fill=fill,
            strength=_strength(asked),
            size=size,
            progress=progress,
        )


def _write(images: Tensor, checkpoint: Checkpoint, painted: Painted, asked: argparse.Namespace) -> list[Path]:
    files: list[Path] = []
    for number, image in enumerate(images):
        seed = asked.seed + number
        file = (
            asked.out
            if asked.count == 1
            else asked.out.with_name(f"{asked.out.stem}-{seed}{asked.out.suffix}")
        )
        save_png(to_image(image), file, {"parameters": _parameters(checkpoint, painted, image, asked, seed)})
        files.append(file)
    log.info("%s: %d written in %.1f s", asked.out.name, len(files), painted.seconds)
    return files


def _parameters(
    checkpoint: Checkpoint, painted: Painted, image: Tensor, asked: argparse.Namespace, seed: int
) -> str:
    """The settings as A1111 writes and reads them."""
    plan = painted.plan
    settings = {
        "Steps": str(asked.steps or (50 if checkpoint.spec is None else checkpoint.spec.steps)),
        "Sampler": FEWSTEP if checkpoint.spec is not None else HOST_NAMES[plan.sampler],
        "CFG scale": f"{plan.guidance:g}",
        "Seed": str(seed),
        "Size": f"{image.shape[2]}x{image.shape[1]}",
        "Model": checkpoint.name,
        **(
            {"LoRAs": ", ".join(f"{a.name} {a.strength:g}" for a in checkpoint.loras)}
            if checkpoint.loras
            else {}
        ),
    }
    if asked.init_image is not None:
        settings["Denoising strength"] = f"{_strength(asked):g}"
    settings["FewStep timesteps"] = " ".join(map(str, plan.timesteps))
    negative = checkpoint.spec.negative if checkpoint.spec is not None else asked.negative
    lines = [asked.prompt, *([f"Negative prompt: {negative}"] if negative else [])]
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in settings.items())])


def _answer(files: Sequence[Path], painted: Painted, asked: argparse.Namespace) -> dict[str, object]:
    plan = painted.plan
    return {
        "pictures": [{"file": str(file), "seed": asked.seed + number} for number, file in enumerate(files)],
        "sampler": plan.sampler,
        "guidance": plan.guidance,
        "steps": len(plan.timesteps),
        "timesteps": plan.timesteps,
        "evaluations": plan.evaluations,
        "strength": _strength(asked),
        "seconds_per_image": painted.seconds / len(files),
    }


if __name__ == "__main__":
    run(main)
