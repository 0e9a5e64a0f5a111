"""The teacher's own pictures as data: made with DPM-Solver++ 2M from prompts, the whole trajectory kept.

For an inpainting teacher they are first painted from nothing, then most of them once more, under a mask
(masks.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..diffusion.denoiser import Cond, Denoiser, Guided
from ..diffusion.grid import Grid
from ..diffusion.schedule import NoiseSchedule
from ..runtime.files import save_tensors
from ..runtime.samplers import initial_latent, sample_dpmpp_2m
from .families import size_ids
from .masks import FULL, Pictures, draw_masks, inpaint_cond
from .samples import (
    SHARD,
    GuidanceRange,
    Samples,
    content_key,
    derived_seed,
    forget_parts,
    gathered,
    kept_samples,
    kept_texts,
    latent_bytes,
    shard_path,
    taken,
)
from .sizes import Size, told_sizes

TEACHER_STEPS = 16
"""DPM-Solver++ 2M steps of the teacher's own pictures, at least."""


def trajectory_steps(finest: int) -> int:
    """Steps of a trajectory that has a point at every entry of the finest grid (and so of those it nests)."""
    return finest * -(-TEACHER_STEPS // finest)


@dataclass(frozen=True)
class TeacherSampleRequest:
    """All that the teacher's own pictures depend on. ``teacher``: a hash of all of it that takes part;
    ``sizes``: in pixels, equally many of each, which the UNet is told if ``told``; ``masked``: whether they
    are painted under masks, which takes an inpainting teacher; ``timesteps``: of the walk, where it is not
    the trailing one of so many ``steps``.
    """

    teacher: str
    prompts: tuple[str, ...]
    negative: str
    guidance: tuple[float, float]
    sizes: tuple[Size, ...]
    channels: int
    downscale: int
    count: int
    seed: int
    precision: str
    steps: int
    told: bool = False
    masked: bool = False
    timesteps: tuple[int, ...] = ()
    cfg_rescale: float = 0.0
    version: int = 1
    """To be raised when the same request makes other pictures."""

    def grid(self, schedule: NoiseSchedule) -> Grid:
        """Where the trajectories have points."""
        return Grid(self.timesteps) if self.timesteps else Grid.trailing(self.steps, len(schedule))

    def folder(self, cache: Path) -> Path:
        content = asdict(self)
        if not self.cfg_rescale:  # caches made before there was the field are still found
            del content["cfg_rescale"]
        return cache / f"teacher-{content_key(content)}"

    @property
    def evaluations(self) -> int:
        """Pictures through the network, two of the pair a step; those under a mask are painted twice."""
        pair = 1 if GuidanceRange(*self.guidance).unguided else 2
        return round(pair * self.steps * self.count * (2 - FULL if self.masked else 1))

    def parts(self) -> list[tuple[Size, Tensor]]:
        """The size and the numbers of the pictures of each, in order."""
        numbers = torch.arange(self.count).tensor_split(len(self.sizes))
        return [(size, part) for size, part in zip(self.sizes, numbers, strict=True) if len(part)]

    @property
    def bytes(self) -> int:
        """On the disk: x0 and the states in float16."""
        return sum(
            len(part)
            * (
                latent_bytes(self.channels, self._cells(size), masked=self.masked)
                + latent_bytes(self.channels, self._cells(size), masked=False) * self.steps
            )
            for size, part in self.parts()
        )

    def summary(self) -> str:
        counts = told_sizes(size for size, part in self.parts() for _ in part)
        return f"pictures: the teacher's own, {counts}"

    def outcome(self, samples: Samples) -> str:
        """How many pictures are used."""
        return f"{len(samples)} pictures of the teacher's own"

    def _cells(self, size: Size) -> int:
        return size[0] * size[1] // self.downscale**2


@dataclass(frozen=True, eq=False)
class _Painting:
    """What all pictures of a request are painted with."""

    request: TeacherSampleRequest
    guided: Guided
    sigmas: Tensor
    device: torch.device


def make_teacher_samples(
    request: TeacherSampleRequest,
    folder: Path,
    *,
    teacher: Denoiser,
    encode: Callable[[Sequence[str]], Cond],
    schedule: NoiseSchedule,
    device: torch.device,
    batch: int,
    progress: Callable[[Iterable[int]], Iterable[int]],
    pictures: Pictures | None = None,
) -> Samples:
    """The teacher's own pictures; shards that are there already are kept. ``progress`` wraps the shard
    numbers; ``pictures`` masks them, where the request says so.
    """
    paint = _sample_part
    if request.masked:
        if pictures is None:
            raise ValueError("masks need pictures to draw them on")
        paint = partial(_masked_part, pictures=pictures)
    texts, text_rows = kept_texts(folder, request.prompts, request.negative, encode)
    samplewise = torch.arange(request.count) % len(request.prompts)
    grid = request.grid(schedule)
    painting = _Painting(
        request,
        Guided(
            teacher,
            {name: value.to(device) for name, value in taken(texts, torch.tensor([0])).items()},
            request.cfg_rescale,
        ),
        grid.sigmas(schedule),
        device,
    )
    shards = [(size, numbers) for size, part in request.parts() for numbers in part.split(SHARD)]
    for number in progress([i for i in range(len(shards)) if not shard_path(folder, i).exists()]):
        size, numbers = shards[number]

        def make(part: Tensor, size: Size = size) -> dict[str, Tensor]:
            return paint(part, size, taken(texts, text_rows[samplewise[part]]), painting)

        shard = gathered(shard_path(folder, number), numbers.split(batch), make)
        shard |= {"text": text_rows[samplewise[numbers]]}
        if request.told:
            shard["time_ids"] = torch.tensor(size_ids(*size)).expand(len(numbers), -1)
        save_tensors(shard, {}, shard_path(folder, number))
        forget_parts(shard_path(folder, number))
    return kept_samples(folder, len(shards), texts, grid.timesteps)


def _sample_part(numbers: Tensor, size: Size, cond: Cond, painting: _Painting) -> dict[str, Tensor]:
    seeds = [derived_seed(painting.request.seed, int(n)) for n in numbers]
    return _walked(seeds, size, cond, painting)


def _masked_part(
    numbers: Tensor, size: Size, cond: Cond, painting: _Painting, *, pictures: Pictures
) -> dict[str, Tensor]:
    """Pictures from nothing; those that get a mask are painted anew under it, from other noise."""
    (width, height), seed = size, painting.request.seed
    inpaint = pictures.nothing(len(numbers), height, width)
    part = _sample_part(numbers, size, {**cond, "inpaint": inpaint}, painting)
    part |= {"inpaint": inpaint.half()}
    masks = draw_masks([derived_seed(seed, int(n), 1) for n in numbers], height, width)
    rows = (masks.flatten(1).min(1).values == 0).nonzero()[:, 0]
    if len(rows) == 0:
        return part
    seen = inpaint_cond(pictures.decode(part["x0"][rows].float()), masks[rows], pictures.encode)
    known = {name: value[rows] for name, value in cond.items()} | {"inpaint": seen}
    again = _walked([derived_seed(seed, int(n), 2) for n in numbers[rows]], size, known, painting)
    again |= {"inpaint": seen.half()}
    return {name: value.index_copy(0, rows, again[name]) for name, value in part.items()}


@torch.no_grad()
def _walked(seeds: Sequence[int], size: Size, cond: Cond, painting: _Painting) -> dict[str, Tensor]:
    """Pictures from the noise of these seeds, at guidances drawn from the first, with their trajectories."""
    request, device, sigma_0 = painting.request, painting.device, float(painting.sigmas[0])
    shape = (1, request.channels, size[1] // request.downscale, size[0] // request.downscale)
    x = torch.cat([initial_latent(shape, seed=seed, sigma=sigma_0) for seed in seeds]).to(device)
    draw = torch.Generator().manual_seed(seeds[0])
    scale = GuidanceRange(*request.guidance).draw(len(seeds), generator=draw)
    if request.told:
        cond = {**cond, "time_ids": torch.tensor(size_ids(*size)).float().expand(len(seeds), -1)}
    states: list[Tensor] = []
    x0 = sample_dpmpp_2m(
        painting.guided,
        x,
        painting.sigmas,
        extra_args={
            "cond": {name: value.to(device) for name, value in cond.items()},
            "w": None if GuidanceRange(*request.guidance).unguided else (scale - 1).to(device),
        },
        callback=lambda state: states.append(state["x"].half().cpu()),
    )
    return {"x0": x0.half().cpu(), "guidance": scale, "states": torch.stack(states, dim=1)}
