"""A tiny decoder in place of a VAE's, for cheap pictures and previews: ``python -m toolkit.tiny --help``."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from .command import print_json, run
from .demo import TEACHER
from .demo.drawings import prompts as demo_prompts
from .diffusion.errors import BadInput
from .evaluation.metrics import psnr
from .evaluation.painter import Painter, make_plan
from .evaluation.pictures import grid, save_png
from .evaluation.race import clock_of, race, ratio, timed
from .neighbours import keep_to_free
from .opening import add_parts, choose_device, is_demo, open_for_people, parts_of
from .runtime.files import save_tensors
from .training.checkpoint import Checkpoint
from .training.data import scan
from .training.image_samples import ImageSampleRequest, make_image_samples
from .training.loop import raise_on_stops
from .training.memory import size as told
from .training.networks import decode_latents, encode_images, place
from .training.plan import duration, nearest
from .training.prompts import built_in_prompts, read_prompts, style_of
from .training.samples import Samples, content_key, derived_seed, kept_samples, latent_bytes, shard_path
from .training.settings import SMALL_PARAMETERS
from .training.sizes import bucket_sizes
from .training.tiny import (
    PAIRS,
    WINDOW,
    TinySettings,
    TinyTrainer,
    held_out,
    make_pairs,
    new_tiny,
    open_tiny,
    save_diffusers,
    taesd_tensors,
    tiny_loss,
)

log = logging.getLogger("fewstep")

EXAMPLES = """examples:
  python -m toolkit.tiny --demo --out tiny.safetensors
  python -m toolkit.tiny --ckpt student.safetensors --dry-run --out taesd_decoder.safetensors
  python -m toolkit.tiny --ckpt model.safetensors --data pictures --encoder --out taesd_decoder.safetensors
  python -m toolkit.tiny --ckpt model.safetensors --latents runs/cache/teacher-01...ef --out tiny.safetensors
  python -m toolkit.sample --ckpt student.safetensors --decoder tiny.safetensors --prompt "a fox" -o fox.png

It is taught by the VAE of --ckpt, on what the model paints (a student paints fastest), on pictures of yours
(--data), or on the latents that a run of toolkit.distill has kept (--latents).
"""
SMALL = {"pictures": 1024, "updates": 3000, "batch_size": 16, "lr": 2e-3}
LARGE = {"pictures": 1024, "updates": 20_000, "batch_size": 8, "lr": 5e-4}
"""A start, not measured on real weights."""

TEACHER_STEPS, JUDGED, SHOWN, CELLS_AT_ONCE = 16, 32, 6, 8192


Latents: TypeAlias = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class Source:
    """Where latents come from. ``key``: a hash of all that they depend on; ``groups``: numbers of those that
    make a shard; ``load()`` gives the scaled latents of some numbers; ``evaluations``: of the network, in
    all; ``cells``: of the largest latent, height and width; ``trial``: how to make one cheaply, and how many
    such make up a real one's work.
    """

    key: str
    groups: list[Tensor]
    load: Callable[[], Latents]
    evaluations: int
    cells: tuple[int, int]
    says: str
    trial: tuple[dict[str, Any], int] = ({}, 1)

    @property
    def count(self) -> int:
        return sum(map(len, self.groups))

    @property
    def batch(self) -> int:
        return max(1, min(PAIRS, CELLS_AT_ONCE // (self.cells[0] * self.cells[1])))


def main(arguments: Sequence[str] | None = None) -> None:
    raise_on_stops()
    asked = _parser().parse_args(arguments)
    checkpoint, device = _opened(asked), choose_device(asked.device)
    settings = _settings(asked, checkpoint)
    keep_to_free(device)
    vae = place(checkpoint.vae(), device).eval().requires_grad_(False)
    source = _source(asked, checkpoint, vae, device)
    folder = asked.cache_dir / f"decoder-{content_key([source.key, checkpoint.vae_sha256()])}"
    state = asked.out.with_suffix(".state")
    if asked.resume:
        if not state.exists():
            raise BadInput(f"{state}: there is nothing to go on with; leave out --resume")
    else:
        plan = _plan(asked, settings, source, folder, checkpoint, vae, device)
        if asked.dry_run:
            if asked.json:
                print_json(plan)
            return
        if state.exists():
            raise BadInput(f"{state}: training was begun here; go on by --resume, or delete that file")
        _require_room(asked, plan["disk_bytes"])
    pairs = make_pairs(
        folder,
        source.groups,
        _lazily(source.load),
        lambda x0: decode_latents(x0, vae),
        batch=source.batch,
        progress=lambda shards: tqdm(shards, desc="pictures", unit="shard", dynamic_ncols=True),
    )
    learned, judged = held_out(pairs, min(JUDGED, len(pairs) // 8))
    if not judged:
        raise BadInput(f"{len(pairs)} pictures are too few to learn from; give at least 16")
    torch.manual_seed(asked.seed)
    tiny = new_tiny(checkpoint.config("vae"))
    trainer = TinyTrainer(tiny, pairs, learned, settings, key=folder.name, device=device)
    trainer.run(state)
    files = _write(tiny, asked, checkpoint)
    answer = _judge(asked, checkpoint, vae, device, pairs, judged)
    state.unlink()
    log.info("%s", _told(answer, files, checkpoint))
    if asked.json:
        print_json({**answer, "files": [str(file) for file in files]})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.tiny",
        description="Distil a tiny decoder from a model's own VAE, for cheap pictures and previews.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--ckpt", type=Path, metavar="PATH", help="student or teacher: a file or a diffusers folder")
    add("--demo", action="store_true", help="the embedded teacher")
    add("--out", type=Path, required=True, metavar="FILE", help="what is written; ends in .safetensors")
    add("--diffusers", type=Path, metavar="DIR", help="write a folder for diffusers' AutoencoderTiny too")
    add(
        "--encoder",
        action="store_true",
        help="train an encoder too, for hosts' VAE loaders; an update takes about twice the time",
    )
    add(
        "--data",
        type=Path,
        metavar="DIR",
        help="pictures to learn from, or .tar shards; captions are not needed",
    )
    add(
        "--latents",
        type=Path,
        metavar="DIR",
        help="latents of this model that a run has kept in its --cache-dir",
    )
    add("--prompts", type=Path, metavar="FILE", help="one a line, for pictures that the model paints")
    add("--resolution", type=int, metavar="N", help="of --data, in pixels (default: the model's own)")
    add("--pictures", type=int, metavar="N", help="to paint (default: 1024)")
    add("--updates", type=int, metavar="N", help="default: 20000; for small networks 3000")
    add("--batch-size", type=int, metavar="N", help="default: 8; for small networks 16")
    add("--lr", type=float, metavar="RATE", help="default: 5e-4; for small networks 2e-3")
    add("--seed", type=int, default=0, metavar="S", help="default: 0")
    add("--cache-dir", type=Path, default=Path("runs/cache"), metavar="DIR", help="default: runs/cache")
    add_parts(parser)
    add("--device", help="cpu, cuda, cuda:1, mps ...; default: the best one there is")
    add("--dry-run", action="store_true", help="print the plan, for which --data is encoded, and stop")
    add("--resume", action="store_true", help="go on where the state beside --out stands")
    add("--json", action="store_true", help="machine-readable answer on stdout")
    return parser


def _opened(asked: argparse.Namespace) -> Checkpoint:
    if asked.out.suffix != ".safetensors":
        raise BadInput(f"{asked.out}: give --out a name that ends in .safetensors")
    if asked.demo == (asked.ckpt is not None):
        raise BadInput("name one model: --ckpt model.safetensors, or --demo for the embedded one")
    if sum(value is not None for value in (asked.data, asked.latents, asked.prompts)) > 1:
        raise BadInput("--data, --latents and --prompts each say what to learn from; give one of them")
    return open_for_people(asked.ckpt or TEACHER, **parts_of(asked))


def _settings(asked: argparse.Namespace, checkpoint: Checkpoint) -> TinySettings:
    """What was not asked for comes by the network's size; so does ``asked.pictures``."""
    usual = SMALL if checkpoint.unet_parameters < SMALL_PARAMETERS else LARGE
    values: dict[str, Any] = {
        name: usual[name] if getattr(asked, name) is None else getattr(asked, name) for name in usual
    }
    for name, value in values.items():
        if not value > 0:
            raise BadInput(f"--{name.replace('_', '-')} {value}: expected a number above 0")
    asked.pictures = values.pop("pictures")
    return TinySettings(**values, seed=asked.seed, encoder=asked.encoder)


def _source(asked: argparse.Namespace, checkpoint: Checkpoint, vae: Any, device: torch.device) -> Source:
    if asked.latents is not None:
        return _kept(asked.latents, checkpoint)
    return _painted(asked, checkpoint, device) if asked.data is None else _seen(asked, checkpoint, vae)


def _kept(folder: Path, checkpoint: Checkpoint) -> Source:
    """The latents of a run's cache; BadInput for a folder that is none, or of other channels."""
    count = len(list(folder.glob("[0-9]" * 5 + ".safetensors")))
    if not count:
        raise BadInput(f"{folder}: no latents were found; give a folder such as runs/cache/teacher-...")
    samples = kept_samples(folder, count, {})
    channels = samples.shards[0]["x0"].shape[1]
    if channels != checkpoint.latent_channels:
        raise BadInput(
            f"{folder}: these latents have {channels} channels, and the VAE's {checkpoint.latent_channels}"
        )
    return _of_samples(
        samples, f"{folder.resolve().name} {len(samples)}", f"{len(samples)} latents that a run has kept"
    )


def _of_samples(samples: Samples, key: str, says: str) -> Source:
    groups = [part for bucket in samples.buckets for part in bucket.split(PAIRS)]
    height, width = max((shard["x0"].shape[-2:] for shard in samples.shards), key=lambda hw: hw[0] * hw[1])

    def latents(numbers: Tensor) -> Tensor:
        return samples.rows(numbers)["x0"].float()

    return Source(key, groups, lambda: latents, 0, (height, width), says)


def _seen(asked: argparse.Namespace, checkpoint: Checkpoint, vae: Any) -> Source:
    """Pictures of --data, which are encoded at once: the plan counts them."""
    cell = checkpoint.downscale
    side = asked.resolution or min(checkpoint.resolution)
    if side < cell:
        raise BadInput(f"--resolution {side}: expected at least {cell}")
    request = ImageSampleRequest(
        teacher=checkpoint.vae_sha256(),
        scan=scan(asked.data, uncaptioned=""),
        negative="",
        sizes=bucket_sizes(side // cell * cell, cell=max(cell, 64 if side >= 256 else cell)),
        channels=checkpoint.latent_channels,
        downscale=cell,
    )
    samples = make_image_samples(
        request,
        request.folder(asked.cache_dir),
        source=asked.data,
        encode_images=lambda images: encode_images(images, vae),
        encode=lambda texts: {"text": torch.zeros(len(texts), 1, 1)},
        progress=lambda pictures: tqdm(pictures, desc="encoding", unit="", dynamic_ncols=True),
    )
    return _of_samples(samples, request.folder(asked.cache_dir).name, request.outcome(samples))


def _painted(asked: argparse.Namespace, checkpoint: Checkpoint, device: torch.device) -> Source:
    """What the model paints: a student in its own steps, a teacher in a few of DPM-Solver++'s."""
    walk: dict[str, Any] = {} if checkpoint.spec else {"steps": TEACHER_STEPS, "sampler": "dpmpp_2m"}
    plan = make_plan(checkpoint.spec, checkpoint.schedule, **walk)
    prompts = _prompts(asked, checkpoint)

    def load() -> Latents:
        painter = Painter.open(checkpoint, device=device)

        def paint(numbers: Tensor, **more: Any) -> Tensor:
            of = numbers.tolist()
            seeds = [derived_seed(asked.seed, n) for n in of]
            return painter.latents(
                [prompts[n % len(prompts)] for n in of], seeds=seeds, **{**walk, **more}
            ).x0

        return paint

    width, height = checkpoint.resolution
    return Source(
        key=content_key(
            [checkpoint.sha256, prompts, asked.pictures, asked.seed, walk, checkpoint.resolution]
        ),
        groups=list(torch.arange(asked.pictures).split(PAIRS)),
        load=load,
        evaluations=plan.evaluations * asked.pictures,
        cells=(height // checkpoint.downscale, width // checkpoint.downscale),
        says=f"{asked.pictures} pictures of the {checkpoint.kind}'s, {plan.evaluations} evaluations each",
        trial=({"steps": 1}, len(plan.timesteps)) if walk else ({}, 1),
    )


def _prompts(asked: argparse.Namespace, checkpoint: Checkpoint) -> list[str]:
    if asked.prompts is not None:
        return read_prompts(asked.prompts)
    if is_demo(checkpoint):
        return demo_prompts(asked.pictures, seed=asked.seed)
    return built_in_prompts(asked.pictures, seed=asked.seed, style=style_of(checkpoint.name))


def _plan(
    asked: argparse.Namespace,
    settings: TinySettings,
    source: Source,
    folder: Path,
    checkpoint: Checkpoint,
    vae: Any,
    device: torch.device,
) -> dict[str, Any]:
    """What it will cost; told, and as JSON."""
    tiny = place(new_tiny(checkpoint.config("vae")), device)
    seconds = _making_seconds(source, folder, checkpoint, vae, device)
    seconds["training"] = settings.updates * _update_seconds(tiny, settings, source, checkpoint, device)
    cells = source.cells[0] * source.cells[1]
    latent = latent_bytes(checkpoint.latent_channels, cells, masked=False)
    disk = source.count * (3 * cells * checkpoint.downscale**2 + latent)
    parameters = sum(p.numel() for p in tiny.decoder.parameters())
    log.info(
        "%s\n%s of %d parameters, %d updates of %d windows of at most %d x %d latent cells\n%s\n"
        "all about %s; disk %s",
        source.says,
        "an encoder, and a decoder" if settings.encoder else "a decoder",
        parameters,
        settings.updates,
        settings.batch_size,
        WINDOW,
        WINDOW,
        ", ".join(f"{name} about {duration(value)}" for name, value in seconds.items() if value),
        duration(sum(seconds.values())),
        told(disk),
    )
    return {
        "pictures": source.count,
        "evaluations": source.evaluations,
        "updates": settings.updates,
        "parameters": parameters,
        "seconds": {**seconds, "all": sum(seconds.values())},
        "disk_bytes": disk,
    }


def _making_seconds(
    source: Source, folder: Path, checkpoint: Checkpoint, vae: Any, device: torch.device
) -> dict[str, float]:
    """For the pairs that are not there yet; each kind of work timed once."""
    missing = [n for i, n in enumerate(source.groups) if not shard_path(folder, i).exists()]
    made = sum(map(len, missing))
    seconds = {"painting": 0.0, "decoding": 0.0}
    if made:
        x0 = torch.randn(1, checkpoint.latent_channels, *source.cells)
        seconds["decoding"] = made * _timed(lambda: decode_latents(x0, vae), device)
    if made and source.evaluations:
        latents = source.load()
        short, times = source.trial
        few = torch.arange(min(source.batch, source.count))
        seconds["painting"] = made * times * _timed(lambda: latents(few, **short), device) / len(few)
    return seconds


def _update_seconds(
    tiny: Any, settings: TinySettings, source: Source, checkpoint: Checkpoint, device: torch.device
) -> float:
    x0 = torch.randn(settings.batch_size, checkpoint.latent_channels, *source.cells, device=device)
    sides = (side * checkpoint.downscale for side in source.cells)
    picture = torch.rand(len(x0), 3, *sides, device=device)

    def step() -> None:
        tiny_loss(tiny, x0, picture, corner=torch.zeros(2), encoder=settings.encoder).backward()

    return _timed(step, device)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds, after once to warm up."""
    work()
    return timed(work, device)


def _require_room(asked: argparse.Namespace, needed: int) -> None:
    place = nearest(asked.cache_dir)
    if (free := shutil.disk_usage(place).free) < needed:
        raise BadInput(
            f"{told(needed)} of pictures are kept, and {place} has {told(free)} free; choose another "
            "--cache-dir, or fewer --pictures"
        )


def _lazily(load: Callable[[], Latents]) -> Latents:
    """What gives the latents, loaded when the first are wanted."""
    loaded: list[Latents] = []

    def latents(numbers: Tensor) -> Tensor:
        if not loaded:
            loaded.append(load())
        return loaded[0](numbers)

    return latents


def _write(tiny: Any, asked: argparse.Namespace, checkpoint: Checkpoint) -> list[Path]:
    metadata = {"fewstep.tiny": json.dumps({"of": checkpoint.name, "vae": checkpoint.vae_sha256()})}
    files = [asked.out]
    save_tensors(taesd_tensors(tiny, "decoder"), metadata, asked.out)
    if asked.encoder:
        files.append(encoder_path(asked.out))
        save_tensors(taesd_tensors(tiny, "encoder"), metadata, files[-1])
    if asked.diffusers is not None:
        save_diffusers(tiny, asked.diffusers, encoder=asked.encoder)
        files.append(asked.diffusers)
    return files


def encoder_path(decoder: Path) -> Path:
    """taesd_encoder beside taesd_decoder, as hosts call them; of another name, the same and -encoder."""
    name = decoder.name.replace("decoder", "encoder")
    return decoder.with_name(name if name != decoder.name else f"{decoder.stem}-encoder.safetensors")


def _judge(
    asked: argparse.Namespace,
    checkpoint: Checkpoint,
    vae: Any,
    device: torch.device,
    pairs: Samples,
    judged: Sequence[Tensor],
) -> dict[str, Any]:
    """The file as it was written, against the VAE, on pictures that it was not trained on."""
    tiny = place(open_tiny(asked.out), device)
    values: list[Tensor] = []
    cells: list[list[Tensor]] = []
    for numbers in (part for bucket in judged for part in bucket.split(SHOWN)):
        rows = pairs.rows(numbers)
        made, wanted = decode_latents(rows["x0"].float(), tiny), rows["picture"].float() / 255
        values.append(psnr(made, wanted))
        cells += [list(pair) for pair in zip(wanted, made, strict=True)]
    shown = cells[:SHOWN]
    picture = grid([list(row) for row in zip(*shown, strict=True)], rows=["VAE", "tiny"])
    save_png(picture, asked.out.with_suffix(".png"))
    x0 = pairs.rows(judged[0][:1])["x0"].float()
    works = {"full": lambda: decode_latents(x0, vae), "tiny": lambda: decode_latents(x0, tiny)}
    seconds = race(works, rounds=3, device=device)
    found = torch.cat(values)
    return {
        "psnr": {"mean": float(found.mean()), "least": float(found.min()), "pictures": len(found)},
        "decoding_ratio": ratio(seconds["full"], seconds["tiny"]),
        "clock": clock_of(device),
    }


def _told(answer: dict[str, Any], files: Sequence[Path], checkpoint: Checkpoint) -> str:
    of, factor = answer["psnr"], answer["decoding_ratio"]
    lines = [
        f"{files[0]}: {of['mean']:.1f} dB to the VAE on {of['pictures']} pictures that it was not trained on "
        f"(the worst {of['least']:.1f}), see {files[0].with_suffix('.png').name}; it decodes {factor[1]:.1f} "
        f"times as fast ({factor[0]:.1f} to {factor[2]:.1f}, {answer['clock']})"
    ]
    if checkpoint.downscale == 8:
        name = "taesdxl" if checkpoint.family == "sdxl" else "taesd"
        lines.append(
            f"previews in ComfyUI: put it into models/vae_approx as {name}_decoder.safetensors, and start "
            "it with --preview-method taesd"
        )
        if len(files) > 1 and files[1] == encoder_path(files[0]):
            lines.append(
                f"with {files[1].name} beside it, as {name}_encoder.safetensors, Load VAE has it as {name}"
            )
    else:
        lines.append(
            f"hosts read tiny decoders of VAEs with cells of 8 pixels; this VAE's have {checkpoint.downscale}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
