"""Measure speed and memory as ratios, side by side in one run: ``python -m toolkit.benchmark --help``."""

from __future__ import annotations

import argparse
import gc
import logging
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from . import __version__
from .command import print_json, run
from .demo import TEACHER
from .diffusion.denoiser import NetworkDenoiser
from .diffusion.errors import BadInput
from .diffusion.grid import Grid, trailing_timesteps
from .diffusion.spec import StudentSpec
from .evaluation.painter import Painter, cached_texts
from .evaluation.race import Work, clock_of, peak_memory, race, ratio, spread, timed
from .opening import choose_device, open_for_people
from .runtime.samplers import sample_deterministic
from .training.adapters import CHECKPOINT_GRADIENTS_ABOVE, LoraShape
from .training.checkpoint import Checkpoint, save_student
from .training.memory import size as told
from .training.networks import DTYPES, UNetNetwork, decode_latents, place, random_cond, with_sizes
from .training.reference import LcmReference, NewUnet
from .training.rehearsal import STEPS, Rehearsal
from .training.settings import (
    LARGE,
    LORA_LARGE,
    LORA_SMALL,
    SMALL,
    SMALL_PARAMETERS,
    parse_resolution,
)
from .training.shapes import SHAPES, random_checkpoint
from .training.tiny import new_tiny
from .training.tuning import MEMORY_FORMATS, tuned

log = logging.getLogger("fewstep")

EXAMPLES = """examples:
  python -m toolkit.benchmark
  python -m toolkit.benchmark --shape sd15 --student lora --batch-size 4 --device cuda --json
  python -m toolkit.benchmark --shape sdxl --student lora --batch-size 1 --only training

Random weights are as good as real ones here. The reference is the LCM recipe of diffusers' example scripts,
rebuilt (toolkit/training/reference.py says what of it). Ratios are quotients of the same round; above 1 ours
is faster, below 1 it takes less memory.
"""
PARTS = ("training", "sampling", "decoding", "layout", "start")
TEACHERS = {"ddim_50": ("ddim", 50), "dpmpp_2m_25": ("dpmpp_2m", 25)}
GUIDANCE = 7.5


@dataclass(frozen=True, eq=False)
class Bench:
    """All that both sides have in common; ``size``: width and height in pixels."""

    checkpoint: Checkpoint
    size: tuple[int, int]
    batch: int
    precision: str
    device: torch.device
    lora: LoraShape | None
    recompute: bool
    rounds: int

    def training(self) -> dict[str, Any]:
        """Memory of each side alone, then both in turn."""
        with TemporaryDirectory() as folder:
            out = Path(folder)
            peaks = {
                "reference": peak_memory(lambda: _twice(self._reference()[0]), self.device),
                "ours": peak_memory(lambda: _twice(self._ours(out)[0]), self.device),
            }
            gc.collect()
            reference, theirs = self._reference()
            ours, own = self._ours(out)
            evaluations = {
                "reference": self._evaluations(theirs, reference.step),
                "ours": self._evaluations(own, ours.step),
                "cached": self._evaluations(own, ours.cached_step),
            }
            works = {
                "reference": reference.step,
                "ours": ours.step,
                "cached": ours.cached_step,
                "making": ours.making_step,
            }
            seconds = race(works, rounds=self.rounds, device=self.device)
        share = ours.making_steps / ours.uses
        seconds["amortised"] = [
            cached + share * making
            for cached, making in zip(seconds["cached"], seconds["making"], strict=True)
        ]
        faster = {
            name: ratio(seconds["reference"], seconds[name]) for name in ("ours", "cached", "amortised")
        }
        memory = peaks["ours"] / peaks["reference"]
        return {
            "images_per_second_ratio": faster["ours"],
            "cached_images_per_second_ratio": faster["cached"],
            "amortised_images_per_second_ratio": faster["amortised"],
            "peak_memory_ratio": [memory] * 3,
            "peak_bytes": peaks,
            "evaluations_per_image": evaluations,
            "images_per_second": {
                name: spread([self.batch / each for each in values])
                for name, values in seconds.items()
                if name != "making"
            },
            "trajectory": {"steps": ours.making_steps, "uses": ours.uses},
        }

    def sampling(self) -> dict[str, Any]:
        """The student's sampler over bare forwards of its network, and teacher over student, decoded."""
        checkpoint, device, dtype = self.checkpoint, self.device, DTYPES[self.precision]
        unet = place(checkpoint.unet(dtype=dtype, conditioned=True), device).eval().requires_grad_(False)
        network = UNetNetwork(unet)
        student = NetworkDenoiser(network, checkpoint.schedule, checkpoint.prediction_type)
        width, height = self.size
        texts = random_cond(checkpoint, 2, generator=torch.Generator().manual_seed(0))
        sized = with_sizes(texts, width=width, height=height)
        cond = {name: value[1:].to(device) for name, value in sized.items()}
        cells = (height // checkpoint.downscale, width // checkpoint.downscale)
        x = torch.randn(1, checkpoint.latent_channels, *cells).to(device)
        w = x.new_full((1,), GUIDANCE - 1)
        grid = Grid.trailing(STEPS, len(checkpoint.schedule))
        timesteps = [torch.tensor([t], device=device) for t in grid.timesteps]
        sigmas = grid.sigmas(checkpoint.schedule)

        @torch.no_grad()
        def bare() -> None:
            for timestep in timesteps:
                network(x, timestep, cond, w)

        @torch.no_grad()
        def sampled() -> None:
            sample_deterministic(student, x, sigmas, {"cond": cond, "w": w})

        walk = race({"bare": bare, "sampler": sampled}, rounds=self.rounds, device=device)
        vae = place(checkpoint.vae(checkpoint.vae_dtype(dtype)), device).eval()

        def painter(spec: StudentSpec | None) -> Painter:
            return Painter(
                denoiser=student,
                vae=vae,
                texts=cached_texts(["", "a picture"], texts),
                schedule=checkpoint.schedule,
                size=(height, width),
                spec=spec,
                device=device,
            )

        students, teachers = painter(self.spec), painter(None)
        asked: dict[str, Any] = {"seeds": [0], "guidance": GUIDANCE}
        works = {"student": lambda: students.paint(["a picture"], **asked)}
        for name, (sampler, steps) in TEACHERS.items():
            works[name] = _painting(teachers, {**asked, "sampler": sampler, "steps": steps})
        whole = race(works, rounds=self.rounds, device=device)
        return {
            "overhead_ratio": ratio(walk["sampler"], walk["bare"]),
            "teacher_over_student": {name: ratio(whole[name], whole["student"]) for name in TEACHERS},
            "student_steps": STEPS,
        }

    def decoding(self) -> dict[str, Any]:
        """One picture through the VAE's decoder and a tiny one's, over one evaluation of the network."""
        checkpoint, device, dtype = self.checkpoint, self.device, DTYPES[self.precision]
        unet = place(checkpoint.unet(dtype=dtype), device).eval().requires_grad_(False)
        network, config = UNetNetwork(unet), checkpoint.config("vae")
        vae = place(checkpoint.vae(checkpoint.vae_dtype(dtype)), device).eval()
        tiny = place(new_tiny(config), device, dtype).eval()
        cond = random_cond(checkpoint, 1, generator=torch.Generator().manual_seed(0))
        cond = {name: value.to(device) for name, value in cond.items()}
        cells = (side // checkpoint.downscale for side in reversed(self.size))
        x0 = torch.randn(1, checkpoint.latent_channels, *cells).to(device)
        timestep = torch.tensor([500], device=device)
        works: dict[str, Work] = {
            "evaluation": torch.no_grad()(lambda: network(x0, timestep, cond, None)),
            "full": lambda: decode_latents(x0, vae),
            "tiny": lambda: decode_latents(x0, tiny),
        }
        seconds = race(works, rounds=self.rounds, device=device)
        return {
            "full_over_evaluation": ratio(seconds["full"], seconds["evaluation"]),
            "tiny_over_evaluation": ratio(seconds["tiny"], seconds["evaluation"]),
            "full_over_tiny": ratio(seconds["full"], seconds["tiny"]),
            "parameters": {
                "full": sum(p.numel() for p in vae.decoder.parameters()),
                "tiny": sum(p.numel() for p in tiny.decoder.parameters()),
            },
        }

    def layout(self) -> dict[str, Any]:
        """A forward and backward pass of the network, laid out in memory as it is and channels last."""
        checkpoint, device = self.checkpoint, self.device
        cond = random_cond(checkpoint, self.batch, generator=torch.Generator().manual_seed(0))
        cond = {name: value.to(device) for name, value in cond.items()}
        cells = (side // checkpoint.downscale for side in reversed(self.size))
        x = torch.randn(self.batch, checkpoint.latent_channels, *cells).to(device)
        timestep = torch.full((self.batch,), 500, device=device)

        def step(memory_format: str) -> Work:
            unet = place(checkpoint.unet(dtype=DTYPES[self.precision]), device)
            if self.recompute:
                unet.train().enable_gradient_checkpointing()
            network = UNetNetwork(tuned(unet, memory_format=memory_format, compiled=False))

            def work() -> None:
                network(x, timestep, cond, None).float().square().mean().backward()
                unet.zero_grad(set_to_none=True)

            return work

        works = {name: step(name) for name in MEMORY_FORMATS}
        seconds = race(works, rounds=self.rounds, device=device)
        return {"channels_last_speed_ratio": ratio(seconds["contiguous"], seconds["channels_last"])}

    def start(self) -> dict[str, Any]:
        """Wall-clock seconds: of processes that only start, of loading, and of writing a student."""
        bare = [sys.executable, "-c", "import torch"]
        commands = {
            "import torch": bare,
            "import of the runtime": [sys.executable, "-c", "import toolkit.runtime.student"],
            "distill --help": [sys.executable, "-m", "toolkit.distill", "--help"],
            "sample --help": [sys.executable, "-m", "toolkit.sample", "--help"],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(self.rounds):
            for name, command in commands.items():
                seconds[name].append(_wall(command))
        torch_alone = seconds["import torch"]
        beyond = {
            name: spread([a - b for a, b in zip(values, torch_alone, strict=True)])
            for name, values in seconds.items()
            if values is not torch_alone
        }
        found: dict[str, Any] = {"seconds": {name: spread(values) for name, values in seconds.items()}}
        found["seconds_beyond_torch"] = beyond
        with TemporaryDirectory() as folder:
            file = Path(folder) / "student.safetensors"
            unet = self.checkpoint.unet(conditioned=True)

            def write() -> None:
                state = unet.state_dict()
                dtype = torch.float16
                save_student(file, unet_state=state, spec=self.spec, source=self.checkpoint, dtype=dtype)

            cpu = torch.device("cpu")
            found["seconds"]["write a student"] = spread([timed(write, cpu) for _ in range(self.rounds)])
            load = [timed(lambda: open_for_people(file).unet(), cpu) for _ in range(self.rounds)]
            found["seconds"]["open it and load its UNet"] = spread(load)
        return found

    @property
    def spec(self) -> StudentSpec:
        """Of a student that was never trained."""
        return StudentSpec(
            family=self.checkpoint.family,
            prediction_type=self.checkpoint.prediction_type,
            ztsnr=self.checkpoint.ztsnr,
            method="progressive",
            timesteps=trailing_timesteps(STEPS, len(self.checkpoint.schedule)),
            teacher_sha256="0" * 64,
            teacher_name=self.checkpoint.name,
            toolkit=__version__,
        )

    def _reference(self) -> tuple[LcmReference, NewUnet]:
        new_unet = NewUnet(self.checkpoint)
        return LcmReference(self.checkpoint, new_unet, **self._common()), new_unet

    def _ours(self, out: Path) -> tuple[Rehearsal, NewUnet]:
        new_unet = NewUnet(self.checkpoint)
        return Rehearsal(self.checkpoint, new_unet, **self._common(), out=out), new_unet

    def _common(self) -> dict[str, Any]:
        return {
            "size": self.size,
            "batch": self.batch,
            "precision": self.precision,
            "device": self.device,
            "lora": self.lora,
            "recompute": self.recompute,
        }

    def _evaluations(self, networks: NewUnet, step: Any) -> float:
        """Pictures through any UNet, forward, for each that is learned from."""
        before = networks.evaluations
        step()
        return (networks.evaluations - before) / self.batch


def main(arguments: Sequence[str] | None = None) -> None:
    asked = _parser().parse_args(arguments)
    bench = _bench(asked)
    log.info(
        "%s, %s, %s, %d x %d, batch %d, activations %s, on %s by %s",
        asked.ckpt or asked.shape,
        "every weight" if bench.lora is None else f"LoRA of rank {bench.lora.rank}",
        bench.precision,
        *bench.size,
        bench.batch,
        "recomputed" if bench.recompute else "kept",
        bench.device,
        clock_of(bench.device),
    )
    answer: dict[str, Any] = {
        "shape": bench.checkpoint.name if asked.ckpt else asked.shape,
        "student": asked.student,
        "rank": None if bench.lora is None else bench.lora.rank,
        "resolution": list(bench.size),
        "batch_size": bench.batch,
        "activations": "recomputed" if bench.recompute else "kept",
        "precision": bench.precision,
        "device": _device_name(bench.device),
        "clock": clock_of(bench.device),
        "rounds": bench.rounds,
    }
    works = {name: getattr(bench, name) for name in PARTS}
    for part in PARTS:
        if part in asked.only:
            answer[part] = works[part]()
            log.info("%s", table(part, answer[part]))
    if asked.json:
        print_json(answer)


def table(part: str, found: Mapping[str, Any]) -> str:
    """A part of the answer as Markdown."""
    rows: list[tuple[str, str]] = []
    if part == "training":
        evaluations = found["evaluations_per_image"]
        for name, key in (("ours", ""), ("cached", "cached_"), ("amortised", "amortised_")):
            rows.append((f"images per second, {SAID[name]}", _ratio(found[f"{key}images_per_second_ratio"])))
        peaks = ", ".join(f"{name} {told(count)}" for name, count in found["peak_bytes"].items())
        rows.append(("peak memory", f"{found['peak_memory_ratio'][1]:.2f} ({peaks})"))
        counts = ", ".join(f"{name} {count:g}" for name, count in evaluations.items())
        rows.append(("UNet evaluations an image", counts))
    elif part == "sampling":
        rows.append(("sampler over bare forwards", _ratio(found["overhead_ratio"], digits=3)))
        steps = found["student_steps"]
        rows += [
            (
                f"teacher, {sampler} {count} steps, over a student of {steps}",
                _ratio(found["teacher_over_student"][name]),
            )
            for name, (sampler, count) in TEACHERS.items()
        ]
    elif part == "decoding":
        rows.append(("the VAE's decoder over an evaluation", _ratio(found["full_over_evaluation"])))
        rows.append(("a tiny decoder over an evaluation", _ratio(found["tiny_over_evaluation"], digits=3)))
        rows.append(("the VAE's decoder over a tiny one", _ratio(found["full_over_tiny"])))
    elif part == "layout":
        rows.append(("speed channels last, over contiguous", _ratio(found["channels_last_speed_ratio"])))
    else:
        rows += [(name, f"{_ratio(values)} s") for name, values in found["seconds"].items()]
        rows += [
            (f"{name}, beyond torch", f"{_ratio(values)} s")
            for name, values in found["seconds_beyond_torch"].items()
        ]
    lines = [f"| {part} | median (least to greatest) |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)]
    return "\n" + "\n".join(lines) + "\n"


SAID = {
    "ours": "teacher with w",
    "cached": "kept trajectories",
    "amortised": "kept trajectories, their making included",
}


def _ratio(values: Sequence[float], *, digits: int = 2) -> str:
    low, middle, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} ({low} to {high})"


def _twice(side: LcmReference | Rehearsal) -> Work:
    """Two updates: the first makes the optimiser's moments."""

    def work() -> None:
        for _ in range(2):
            side.step()

    return work


def _painting(painter: Painter, asked: Mapping[str, Any]) -> Any:
    return lambda: painter.paint(["a picture"], **asked)


def _wall(command: Sequence[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, check=True)
    return time.perf_counter() - started


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _bench(asked: argparse.Namespace) -> Bench:
    device = choose_device(asked.device)
    if device.type not in ("cpu", "cuda"):
        raise BadInput(f"--device {device}: times are taken on cpu and cuda; try --device cpu")
    for name in ("rounds", "batch_size", "rank"):
        value = getattr(asked, name)
        if value is not None and value < 1:
            raise BadInput(f"--{name.replace('_', '-')} {value}: expected 1 or more")
    if asked.rank is not None and asked.student == "full":
        raise BadInput(f"--rank {asked.rank} is of a LoRA; leave it out, or add --student lora")
    checkpoint = _checkpoint(asked)
    small = checkpoint.unet_parameters < SMALL_PARAMETERS
    size = parse_resolution(asked.resolution) if asked.resolution else checkpoint.resolution
    cell = checkpoint.downscale * 2 ** (len(checkpoint.config("unet")["block_out_channels"]) - 1)
    if any(side % cell for side in size):
        raise BadInput(f"--resolution {asked.resolution}: this teacher needs multiples of {cell}")
    usual = (LORA_SMALL if small else LORA_LARGE).values["rank"]
    recompute = asked.activations == "recomputed"
    if asked.activations is None:
        recompute = checkpoint.unet_parameters > CHECKPOINT_GRADIENTS_ABOVE
    return Bench(
        checkpoint=checkpoint,
        size=size,
        batch=asked.batch_size or (SMALL if small else LARGE).values["micro_batch"],
        precision=asked.precision or ("bf16" if device.type == "cuda" and not small else "fp32"),
        device=device,
        lora=None if asked.student == "full" else LoraShape(asked.rank or usual),
        recompute=recompute,
        rounds=asked.rounds,
    )


def _checkpoint(asked: argparse.Namespace) -> Checkpoint:
    if asked.ckpt is None and asked.shape != "demo":
        return random_checkpoint(asked.shape)
    checkpoint = open_for_people(asked.ckpt or TEACHER)
    if checkpoint.kind != "teacher":
        raise BadInput(
            f"{checkpoint.path}: this is a {checkpoint.kind}; give the checkpoint that it was distilled from"
        )
    if checkpoint.inpaint:
        raise BadInput(
            f"{checkpoint.path}: this is an inpainting checkpoint, for which there is no such recipe; give "
            "an ordinary one"
        )
    return checkpoint


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.benchmark",
        description="Measure speed and memory as ratios, side by side in one run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    of = parser.add_mutually_exclusive_group()
    of.add_argument("--ckpt", type=Path, metavar="FILE", help="a checkpoint whose shapes are measured")
    of.add_argument(
        "--shape",
        choices=["demo", *SHAPES],
        default="demo",
        help="the demo teacher, or random weights of that shape (default: demo)",
    )
    add("--student", choices=["full", "lora"], default="full", help="what is trained (default: full)")
    add("--rank", type=int, metavar="R", help="of the LoRA (default: 64, small networks 32)")
    add("--resolution", metavar="N|WxH", help="pixels (default: the checkpoint's)")
    add(
        "--batch-size",
        type=int,
        metavar="N",
        help="pictures an update, all at once (default: 1, small networks 32)",
    )
    add(
        "--activations",
        choices=["kept", "recomputed"],
        help="in the backward pass, on both sides (default: recomputed for large networks)",
    )
    add("--precision", choices=list(DTYPES), help="default: fp32, on a GPU for large networks bf16")
    add("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    add("--rounds", type=int, default=5, metavar="N", help="times that each work is timed (default: 5)")
    add("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    add("--json", action="store_true", help="machine-readable answer on stdout")
    return parser


if __name__ == "__main__":
    run(main)
