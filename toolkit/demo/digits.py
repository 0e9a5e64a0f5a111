"""Distillation in pixel space, on real data: `python -m toolkit.demo.digits --out DIR`.

The founding paper's other half (Meng et al. 2023 distil class-conditional pixel models as well), at the size
of a CPU: scikit-learn's bundled handwritten digits (1,797 pictures of 8 x 8 in 17 grey levels; Alpaydin &
Kaynak 1998), a class-conditional UNet2DModel as the teacher, and the toolkit's own training loop and methods.
The autoencoder is the identity, the prompt is a class, and there is no guidance: the student has no dial.

DIR gets teacher.safetensors, student.safetensors (its metadata say all that sampling needs), digits.png and
results.json: Frechet distances in features of a classifier that was trained on the same pictures, and how
often that classifier sees the class that was asked for.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor, nn
from tqdm import tqdm

from ..command import run
from ..diffusion.denoiser import NetworkDenoiser
from ..diffusion.errors import BadInput
from ..diffusion.grid import Grid
from ..diffusion.method import Phase, Setting
from ..diffusion.prediction import velocity_from
from ..diffusion.schedule import NoiseSchedule
from ..diffusion.solvers import roll
from ..diffusion.spec import StudentSpec
from ..evaluation.metrics import frechet_distance
from ..evaluation.pictures import grid, save_png
from ..methods import sfddm
from ..runtime.files import SPEC_KEY, atomic_path, load_tensors, read_metadata, save_tensors, sha256_of
from ..runtime.samplers import sample_deterministic, walk
from ..training.loop import Job, LoopSettings, train
from ..training.networks import denoiser
from ..training.samples import GuidanceRange, Samples
from ..training.teacher_samples import trajectory_steps

_log = logging.getLogger("fewstep")
CLASSES, SIZE = 10, 8
SCHEDULE = NoiseSchedule.scaled_linear()
CONFIG: dict[str, Any] = {
    "sample_size": SIZE,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "num_class_embeds": CLASSES,
}
"""Constructor arguments of diffusers' UNet2DModel."""


class ClassUNet(UNet2DModel):
    """A UNet2DModel that is told its class where Stable Diffusion's UNet is told its text: (B, 1, 1)."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> tuple[Tensor, ...]:
        labels = encoder_hidden_states[:, 0, 0].long()
        answer: Any = super().forward(sample, timestep, class_labels=labels, return_dict=False)
        return answer


class Reader(nn.Module):
    """Says which digit a picture (B, 1, 8, 8) in [-1, 1] shows."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(64 * 16, 64),
        )
        self.head = nn.Linear(64, CLASSES)

    def forward(self, pictures: Tensor) -> Tensor:
        """Scores (B, 10)."""
        return self.head(F.silu(self.body(pictures)))


@dataclass(frozen=True, eq=False)
class Digits:
    """``pictures`` (N, 1, 8, 8) in [-1, 1] and their ``labels`` (N,)."""

    pictures: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load() -> tuple[Digits, Digits]:
    """What is learned from (1,500), and what was held back (297); BadInput without scikit-learn."""
    try:
        from sklearn.datasets import load_digits  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise BadInput(
            "the digits come with scikit-learn, which is not installed; python -m pip install scikit-learn"
        ) from None
    found: Any = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    pictures = torch.from_numpy(found.images).float()[order, None] / 8 - 1
    labels = torch.from_numpy(found.target).long()[order]
    return Digits(pictures[:1500], labels[:1500]), Digits(pictures[1500:], labels[1500:])


def train_teacher(data: Digits, *, updates: int, batch: int = 64) -> ClassUNet:
    """A network that predicts v (Salimans & Ho 2022) at every timestep; its averaged weights."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(1)  # for the initial weights
    unet = ClassUNet(**CONFIG)
    average = {name: value.detach().clone() for name, value in unet.state_dict().items()}
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    model = denoiser(unet, schedule=SCHEDULE, prediction_type="v_prediction")
    for update in tqdm(range(updates), desc="teacher", unit="update", dynamic_ncols=True):
        rows = torch.randint(len(data), (batch,), generator=generator)
        x0, noise = data.pictures[rows], torch.randn((batch, 1, SIZE, SIZE), generator=generator)
        sigma = SCHEDULE.sigma(torch.randint(len(SCHEDULE), (batch,), generator=generator)).float()
        x = x0 + sigma.reshape(-1, 1, 1, 1) * noise
        target = velocity_from(x0, x, sigma, "sample")
        found = model.velocity(x, sigma, cond=_cond(data.labels[rows]))
        loss = (found - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        decay = min(0.999, (1 + update) / (10 + update))
        for name, value in unet.state_dict().items():
            average[name].lerp_(value.detach(), 1 - decay)
    unet.load_state_dict(average)
    return unet.eval().requires_grad_(False)


def train_reader(data: Digits, *, updates: int = 1500) -> Reader:
    """The classifier, on pictures with a little noise, so that it does not mind generated ones."""
    generator = torch.Generator().manual_seed(2)
    torch.manual_seed(2)
    reader = Reader()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=2e-3, weight_decay=1e-2)
    for _ in range(updates):
        rows = torch.randint(len(data), (128,), generator=generator)
        pictures = data.pictures[rows]
        noisy = pictures + 0.2 * torch.randn(pictures.shape, generator=generator)
        loss = F.cross_entropy(reader(noisy), data.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return reader.eval().requires_grad_(False)


@torch.no_grad()
def trajectories(teacher: ClassUNet, *, count: int, kept: Grid) -> Samples:
    """The teacher's own pictures of all classes with their ways from noise, by DDIM of at least 48 steps, at
    the timesteps ``kept``: exact targets that training need not ask it for.
    """
    model = denoiser(teacher, schedule=SCHEDULE, prediction_type="v_prediction")
    every = -(-48 // len(kept))
    sigmas = walk(kept.refined(every, len(SCHEDULE)).timesteps, SCHEDULE)
    generator = torch.Generator().manual_seed(3)
    shards: list[dict[str, Tensor]] = []
    for labels in (torch.arange(count) % CLASSES).split(512):
        x = float(sigmas[0]) * torch.randn((len(labels), 1, SIZE, SIZE), generator=generator)
        states = [x]
        for number in range(len(sigmas) - 1):
            levels = [sigma.float().expand(len(x)) for sigma in sigmas[number : number + 2]]
            x = roll(model, x, levels, cond=_cond(labels), w=None)
            if (number + 1) % every == 0:
                states.append(x)
        guidance = torch.ones(len(labels))
        x0 = states.pop()
        shards.append({"x0": x0, "text": labels, "guidance": guidance, "states": torch.stack(states, dim=1)})
    return Samples(shards, {"text": torch.arange(CLASSES).reshape(-1, 1, 1)}, kept.timesteps)


def distil(teacher: ClassUNet, out: Path, *, steps: int, updates: int, pictures: int) -> Path:
    """One fold without guidance by the toolkit's loop, resumed where it was stopped; the student's file."""
    setting = Setting(schedule=SCHEDULE, prediction_type="v_prediction", steps=steps, guided=False)
    phases = sfddm.phases(sfddm.Config(), setting)
    teacher_file = out / "teacher.safetensors"

    def finished(phase: Phase, state: Mapping[str, Tensor]) -> None:
        save(out / "student.safetensors", state, spec_of(phase, teacher_file))

    finest = phases[-1].grid.refined(trajectory_steps(steps) // steps, len(SCHEDULE))
    job = Job(
        phases=phases,
        teacher_prediction="v_prediction",
        schedule=SCHEDULE,
        samples=trajectories(teacher, count=pictures, kept=finest),
        new_unet=lambda: _filled(teacher.state_dict()),  # pyright: ignore[reportArgumentType]
        finished=finished,
        look=lambda name, student, phase: None,
        out=out,
    )
    settings = LoopSettings(
        updates=(updates,),
        batch_size=64,
        micro_batch=64,
        lr=3e-4,
        warmup=20,
        clip=1.0,
        ema=0.995,
        seed=0,
        precision="fp32",
        guidance=GuidanceRange(1, 1),
        trajectory_share=1.0,
    )
    train(job, settings, device=torch.device("cpu"))
    return out / "student.safetensors"


def spec_of(phase: Phase, teacher: Path) -> StudentSpec:
    """What the student's file says of it: no dial, guidance 1."""
    return StudentSpec(
        family="pixel",
        prediction_type=phase.prediction_type,
        method="sfddm",
        timesteps=phase.grid.timesteps,
        teacher_sha256=sha256_of(teacher),
        teacher_name=teacher.stem,
        any_start=phase.any_start,
        guidance_min=1.0,
        guidance_max=1.0,
        guidance_default=1.0,
        w_embedding=None,
    )


def save(path: Path, state: Mapping[str, Tensor], spec: StudentSpec | None = None) -> None:
    """Weights under diffusers' names, the network's shape as JSON, and a student's spec."""
    metadata = {"config": json.dumps(CONFIG)} | ({} if spec is None else {SPEC_KEY: spec.to_json()})
    save_tensors(dict(state), metadata, path)


def open_model(path: Path) -> tuple[NetworkDenoiser, StudentSpec | None]:
    """A teacher or student from its file."""
    metadata = read_metadata(path)
    unet = _filled(load_tensors(path), json.loads(metadata["config"]))
    spec = StudentSpec.from_json(metadata[SPEC_KEY]) if SPEC_KEY in metadata else None
    prediction = "v_prediction" if spec is None else spec.prediction_type
    return denoiser(unet.eval(), schedule=SCHEDULE, prediction_type=prediction), spec


@torch.no_grad()
def paint(model: NetworkDenoiser, labels: Tensor, timesteps: Sequence[int], *, seed: int) -> Tensor:
    """Pictures (N, 1, 8, 8) in [-1, 1] of the classes ``labels`` (N,)."""
    sigmas = walk(timesteps, SCHEDULE)
    noise = torch.randn((len(labels), 1, SIZE, SIZE), generator=torch.Generator().manual_seed(seed))
    parts = [
        sample_deterministic(model, x, sigmas, {"cond": _cond(some)})
        for x, some in zip((float(sigmas[0]) * noise).split(512), labels.split(512), strict=True)
    ]
    return torch.cat(parts).clamp(-1, 1)


def measure(reader: Reader, real: Digits, made: Tensor, labels: Tensor) -> dict[str, float]:
    """``frechet``: distance to the real pictures in the reader's features, in units of their mean spread;
    ``right``: share of the pictures in which it sees their class.
    """
    unit = reader.body(real.pictures).std(0).mean()
    return {
        "frechet": frechet_distance(reader.body(made) / unit, reader.body(real.pictures) / unit),
        "right": float((reader(made).argmax(1) == labels).float().mean()),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    asked = _parser().parse_args(arguments)
    for name in ("steps", "updates", "teacher_updates", "pictures", "samples"):
        if getattr(asked, name) < 1:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(asked, name)}: expected 1 or more")
    seen, held_back = load()
    out: Path = asked.out
    out.mkdir(parents=True, exist_ok=True)
    teacher_file = out / "teacher.safetensors"
    if not teacher_file.exists():
        save(teacher_file, train_teacher(seen, updates=asked.teacher_updates).state_dict())
    teacher = _filled(load_tensors(teacher_file))
    student_file = distil(teacher, out, steps=asked.steps, updates=asked.updates, pictures=asked.pictures)
    reader = train_reader(seen)
    results = {"held back": measure(reader, seen, held_back.pictures, held_back.labels)}
    labels = torch.arange(asked.samples) % CLASSES
    model, _ = open_model(teacher_file)
    student, spec = open_model(student_file)
    assert spec is not None
    rows: dict[str, Tensor] = {}
    for count in sorted({50, 16, asked.steps}, reverse=True):
        timesteps = Grid.trailing(count, len(SCHEDULE)).timesteps
        rows[f"teacher, {count} steps"] = paint(model, labels, timesteps, seed=7)
    rows[f"student, {spec.steps} steps"] = paint(student, labels, spec.timesteps, seed=7)
    results |= {name: measure(reader, seen, made, labels) for name, made in rows.items()}
    with atomic_path(out / "results.json") as partial:
        partial.write_text(json.dumps(results, indent=2), encoding="utf-8")
    shown = {"real": torch.cat([seen.pictures[seen.labels == label][:1] for label in range(CLASSES)]), **rows}
    save_png(_grid(shown), out / "digits.png")
    for name, row in results.items():
        _log.info("%-20s Frechet distance %.3f, %.1f %% right", name, row["frechet"], 100 * row["right"])


def _parser() -> argparse.ArgumentParser:
    head, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.demo.digits",
        description=head,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="results; a stopped run goes on there")
    add("--steps", type=int, default=4, metavar="N", help="of the student (default 4)")
    add("--teacher-updates", type=int, default=3000, metavar="N", help="default 3000")
    add("--updates", type=int, default=3000, metavar="N", help="of the student (default 3000)")
    add("--pictures", type=int, default=4096, metavar="N", help="the teacher's own, to learn from (4096)")
    add("--samples", type=int, default=1000, metavar="N", help="pictures a row (default 1000)")
    return parser


def _filled(state: Mapping[str, Tensor], config: Mapping[str, Any] = CONFIG) -> ClassUNet:
    unet = ClassUNet(**config)
    unet.load_state_dict(dict(state))
    return unet


def _cond(labels: Tensor) -> dict[str, Tensor]:
    return {"text": labels.reshape(-1, 1, 1).float()}


def _grid(rows: Mapping[str, Tensor]) -> Any:
    """One line a model, one column a class, eight screen pixels to one of theirs."""
    cells = [
        [
            F.interpolate(picture[None].expand(1, 3, -1, -1) / 2 + 0.5, scale_factor=8.0)[0]
            for picture in pictures[:CLASSES]
        ]
        for pictures in rows.values()
    ]
    return grid(cells, rows=list(rows), columns=[str(label) for label in range(CLASSES)])


if __name__ == "__main__":
    run(main)
