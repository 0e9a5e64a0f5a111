"""What a student is trained on: clean latents with their texts, computed once and kept in safetensors shards.

Either the teacher's own pictures (made with DPM-Solver++ 2M from prompts, the whole trajectory kept), or the
pictures of a folder with same-named .txt captions. For an inpainting teacher each sample has a mask too
(masks.py): its own pictures are first painted from nothing, then most of them once more, under a mask. The
folder of a cache is named by a hash of all that its content depends on, so that a later run with the same
needs finds it; a shard is written whole or not at all, so making goes on where it was stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..diffusion.denoiser import Cond, Denoiser, Guided
from ..diffusion.errors import BadInput
from ..diffusion.grid import Grid
from ..diffusion.method import Batch
from ..diffusion.schedule import NoiseSchedule
from ..runtime.files import load_tensors, save_tensors
from ..runtime.samplers import initial_latent, sample_dpmpp_2m
from .masks import FULL, Pictures, draw_masks, inpaint_cond
from .prompts import read_text

log = logging.getLogger("fewstep")

TEACHER_STEPS = 16
"""DPM-Solver++ 2M steps of the teacher's own pictures, at least."""

MASKS_EACH = 4
"""Masks that each picture of a folder is seen under."""

SHARD = 128
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True, eq=False)
class Samples:
    """``shards``: x0 (n, C, h, w) and text (n,) row numbers into ``texts``; the teacher's own also have
    guidance (n,) and states (n, K, C, h, w) at ``state_timesteps``. ``texts``: conditionings of M rows, row 0
    the unconditional one. Where the UNet is told the pictures' sizes, the shards have "time_ids" (n, 6); an
    inpainting teacher's have "inpaint" (n, 1 + C, h, w).
    """

    shards: Sequence[dict[str, Tensor]]
    texts: Cond
    state_timesteps: tuple[int, ...] = ()

    def __len__(self) -> int:
        return sum(len(shard["text"]) for shard in self.shards)

    def rows(self, indices: Tensor) -> dict[str, Tensor]:
        """The named tensors of the samples ``indices`` (B,), stacked."""
        starts = torch.tensor([0, *(len(shard["text"]) for shard in self.shards)]).cumsum(0)
        places = torch.searchsorted(starts, indices, right=True) - 1
        picked = [
            (self.shards[p], int(i - starts[p]))
            for p, i in zip(places.tolist(), indices.tolist(), strict=True)
        ]
        return {name: torch.stack([shard[name][row] for shard, row in picked]) for name in self.shards[0]}

    @property
    def uncond(self) -> Cond:
        return {name: value[:1].float() for name, value in self.texts.items()}

    def cond(self, rows: Mapping[str, Tensor]) -> Cond:
        """The conditioning of samples (:meth:`rows`)."""
        own = {name: rows[name].float() for name in ("time_ids", "inpaint") if name in rows}
        return {**_taken(self.texts, rows["text"]), **own}


@dataclass(frozen=True)
class GuidanceRange:
    """The guidance_scale interval that stays adjustable."""

    low: float
    high: float

    @property
    def unguided(self) -> bool:
        """Whether there is nothing to adjust but guidance 1: no guidance at all."""
        return self.low == self.high == 1

    def draw(self, count: int, *, generator: torch.Generator) -> Tensor:
        """(count,) guidance scales: half uniform (Meng et al.), half log-uniform.

        Pictures change most at low guidance; uniform draws alone leave the low end of the dial flat.
        """
        u = torch.rand(count, generator=generator)
        linear = self.low + (self.high - self.low) * u
        logarithmic = self.low * (self.high / self.low) ** u
        return torch.where(torch.rand(count, generator=generator) < 0.5, linear, logarithmic)


def draw_batch(
    samples: Samples,
    indices: Tensor,
    *,
    guidance: GuidanceRange,
    trajectory_share: float,
    generator: torch.Generator,
    device: torch.device,
) -> Batch:
    """The batch of the samples ``indices``; a share of the teacher's own pictures keep their guidance and
    trajectory.
    """
    rows = samples.rows(indices)
    scale = guidance.draw(len(indices), generator=generator)
    own = torch.rand(len(indices), generator=generator) < trajectory_share
    states: Tensor | None = None
    if "states" in rows:
        scale = torch.where(own, rows["guidance"], scale)
        states = rows["states"].to(device)
    return Batch(
        x0=rows["x0"].float().to(device),
        cond={name: value.to(device) for name, value in samples.cond(rows).items()},
        uncond={name: value.to(device) for name, value in samples.uncond.items()},
        w=None if guidance.unguided else (scale - 1).to(device),
        states=states,
        state_timesteps=samples.state_timesteps,
        on_trajectory=own.to(device),
    )


def trajectory_steps(finest: int) -> int:
    """Steps of a trajectory that has a point at every entry of the finest grid (and so of those it nests)."""
    return finest * -(-TEACHER_STEPS // finest)


@dataclass(frozen=True)
class TeacherSampleRequest:
    """All that the teacher's own pictures depend on. ``sizes``: what the UNet is told of theirs, if
    anything; ``masked``: whether they are painted under masks, which takes an inpainting teacher;
    ``timesteps``: of the walk, where it is not the trailing one of so many ``steps``."""

    teacher_sha256: str
    prompts: tuple[str, ...]
    negative: str
    guidance: tuple[float, float]
    shape: tuple[int, int, int]
    count: int
    seed: int
    precision: str
    steps: int
    sizes: tuple[int, ...] = ()
    masked: bool = False
    timesteps: tuple[int, ...] = ()

    def grid(self, schedule: NoiseSchedule) -> Grid:
        """Where the trajectories have points."""
        return Grid(self.timesteps) if self.timesteps else Grid.trailing(self.steps, len(schedule))

    def folder(self, cache: Path) -> Path:
        return cache / f"teacher-{_key(asdict(self))}"

    @property
    def evaluations(self) -> int:
        """Pictures through the network, two of the pair a step; those under a mask are painted twice."""
        pair = 1 if GuidanceRange(*self.guidance).unguided else 2
        return round(pair * self.steps * self.count * (2 - FULL if self.masked else 1))

    def bytes(self, latent: tuple[int, int, int]) -> int:
        """On the disk: x0 and the states in float16."""
        return self.count * (math.prod(latent) * 2 * (self.steps + 1) + _inpaint_bytes(latent, self.masked))


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
    texts, text_rows = _texts(folder, request.prompts, request.negative, encode)
    samplewise = torch.arange(request.count) % len(request.prompts)
    count = -(-request.count // SHARD)
    missing = [i for i in range(count) if not _shard_path(folder, i).exists()]
    guided = Guided(teacher, {name: value[:1].float().to(device) for name, value in texts.items()})
    grid = request.grid(schedule)
    sigmas = grid.sigmas(schedule)
    for number in progress(missing):
        numbers = torch.arange(number * SHARD, min((number + 1) * SHARD, request.count))
        parts = [
            paint(part, request, guided, _taken(texts, text_rows[samplewise[part]]), sigmas, device)
            for part in numbers.split(batch)
        ]
        shard = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        shard |= {"text": text_rows[samplewise[numbers]]}
        if request.sizes:
            shard["time_ids"] = torch.tensor(request.sizes).expand(len(numbers), -1)
        save_tensors(shard, {}, _shard_path(folder, number))
    return _open(folder, count, texts, grid.timesteps)


def _sample_part(
    numbers: Tensor,
    request: TeacherSampleRequest,
    guided: Guided,
    cond: Cond,
    sigmas: Tensor,
    device: torch.device,
) -> dict[str, Tensor]:
    seeds = [derived_seed(request.seed, int(n)) for n in numbers]
    return _walked(seeds, request, guided, cond, sigmas, device)


def _masked_part(
    numbers: Tensor,
    request: TeacherSampleRequest,
    guided: Guided,
    cond: Cond,
    sigmas: Tensor,
    device: torch.device,
    *,
    pictures: Pictures,
) -> dict[str, Tensor]:
    """Pictures from nothing; those that get a mask are painted anew under it, from other noise."""
    height, width = (side * pictures.downscale for side in request.shape[1:])
    inpaint = pictures.nothing(len(numbers), height, width)
    part = _sample_part(numbers, request, guided, {**cond, "inpaint": inpaint}, sigmas, device)
    masks = draw_masks([derived_seed(request.seed, int(n), 1) for n in numbers], height, width)
    rows = (masks.flatten(1).min(1).values == 0).nonzero()[:, 0]
    if len(rows) == 0:
        return part | {"inpaint": inpaint.half()}
    seen = inpaint_cond(pictures.decode(part["x0"][rows].float()), masks[rows], pictures.encode)
    again = _walked(
        [derived_seed(request.seed, int(n), 2) for n in numbers[rows]],
        request,
        guided,
        {name: value[rows] for name, value in cond.items()} | {"inpaint": seen},
        sigmas,
        device,
    )
    part |= {"inpaint": inpaint.half()}
    again |= {"inpaint": seen.half()}
    return {name: value.index_copy(0, rows, again[name]) for name, value in part.items()}


@torch.no_grad()
def _walked(
    seeds: Sequence[int],
    request: TeacherSampleRequest,
    guided: Guided,
    cond: Cond,
    sigmas: Tensor,
    device: torch.device,
) -> dict[str, Tensor]:
    """Pictures from the noise of these seeds, at guidances drawn from the first, with their trajectories."""
    sigma_0 = float(sigmas[0])
    x = torch.cat([initial_latent((1, *request.shape), seed=s, sigma=sigma_0) for s in seeds]).to(device)
    draw = torch.Generator().manual_seed(seeds[0])
    scale = GuidanceRange(*request.guidance).draw(len(seeds), generator=draw)
    if request.sizes:
        cond = {**cond, "time_ids": torch.tensor(request.sizes).float().expand(len(seeds), -1)}
    states: list[Tensor] = []
    x0 = sample_dpmpp_2m(
        guided,
        x,
        sigmas,
        extra_args={
            "cond": {name: value.to(device) for name, value in cond.items()},
            "w": None if GuidanceRange(*request.guidance).unguided else (scale - 1).to(device),
        },
        callback=lambda state: states.append(state["x"].half().cpu()),
    )
    return {"x0": x0.half().cpu(), "guidance": scale, "states": torch.stack(states, dim=1)}


@dataclass(frozen=True)
class ImageFolderRequest:
    """All that the latents of a folder of pictures depend on. ``sizes``: whether the UNet is told theirs;
    ``masks``: so many each, for an inpainting teacher."""

    teacher_sha256: str
    pictures: tuple[tuple[str, str, str], ...]
    negative: str
    width: int
    height: int
    sizes: bool = False
    masks: int = 0

    @property
    def evaluations(self) -> int:
        return 0

    def bytes(self, latent: tuple[int, int, int]) -> int:
        """On the disk: x0 in float16."""
        each = math.prod(latent) * 2 + _inpaint_bytes(latent, self.masks > 0)
        return len(self.pictures) * max(self.masks, 1) * each

    def folder(self, cache: Path) -> Path:
        return cache / f"images-{_key(asdict(self))}"


def derived_seed(*numbers: int) -> int:
    """A 63-bit seed that depends on all the numbers, and is none that a person types for a picture."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "big") >> 1


def scan_image_folder(folder: Path) -> tuple[tuple[str, str, str], ...]:
    """(file name, SHA-256, caption) of every picture in the folder; the caption is the same-named .txt's."""
    if not folder.is_dir():
        raise BadInput(
            f"{folder}: no such folder; --data needs a folder of pictures with same-named .txt captions"
        )
    found: list[tuple[str, str, str]] = []
    uncaptioned: list[str] = []
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES):
        caption = path.with_suffix(".txt")
        if not caption.exists():
            uncaptioned.append(path.name)
            continue
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        found.append((path.name, digest, " ".join(read_text(caption).split())))
    if uncaptioned:
        log.warning(
            "%d pictures without a .txt caption are left out, %s first", len(uncaptioned), uncaptioned[0]
        )
    if not found:
        raise BadInput(f"{folder}: no picture with a same-named .txt caption found; put both in the folder")
    return tuple(found)


def make_image_samples(
    request: ImageFolderRequest,
    folder: Path,
    *,
    source: Path,
    encode_images: Callable[[Tensor], Tensor],
    encode: Callable[[Sequence[str]], Cond],
    progress: Callable[[Iterable[int]], Iterable[int]],
) -> Samples:
    """Latents of the folder's pictures, scaled to cover and cropped at the centre; damaged ones are named and
    skipped.
    """
    texts, text_rows = _texts(
        folder, [caption for _, _, caption in request.pictures], request.negative, encode
    )
    count = -(-len(request.pictures) // SHARD)
    for number in progress([i for i in range(count) if not _shard_path(folder, i).exists()]):
        latents: list[Tensor] = []
        inpaint: list[Tensor] = []
        sizes: list[tuple[int, ...]] = []
        rows: list[int] = []
        for i in range(number * SHARD, min((number + 1) * SHARD, len(request.pictures))):
            try:
                picture = load_picture(source / request.pictures[i][0], request.width, request.height)
            except BadInput as error:
                log.warning("%s; skipped", error)
                continue
            each = max(request.masks, 1)
            latents += [encode_images(picture[None]).half()] * each
            sizes += [picture_sizes(source / request.pictures[i][0], request.width, request.height)] * each
            rows += [i] * each
            if request.masks:
                seeds = [derived_seed(i, mask) for mask in range(each)]
                masks = draw_masks(seeds, request.height, request.width)
                seen = inpaint_cond(picture.expand(each, -1, -1, -1), masks, encode_images)
                inpaint.append(seen.half())
        if not latents:
            raise BadInput(f"{source}: none of {SHARD} pictures in a row could be read; check the files")
        tensors = {"x0": torch.cat(latents), "text": text_rows[torch.tensor(rows)]}
        if request.sizes:
            tensors["time_ids"] = torch.tensor(sizes)
        if request.masks:
            tensors["inpaint"] = torch.cat(inpaint)
        save_tensors(tensors, {}, _shard_path(folder, number))
    samples = _open(folder, count, texts, ())
    used = len(samples) // max(request.masks, 1)
    if skipped := len(request.pictures) - used:
        log.warning("%d damaged pictures were skipped, %d are used", skipped, used)
    return samples


def load_picture(path: Path, width: int, height: int) -> Tensor:
    """(3, height, width) in [0, 1], scaled to cover and cropped at the centre; BadInput if it cannot be
    read.
    """
    image = _read(path, "RGB")
    image = image.resize(_covering(image.size, width, height), Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.reshape(height, width, 3).permute(2, 0, 1).float() / 255


def load_grey(path: Path) -> Tensor:
    """(1, H, W) in [0, 1], a picture's lightness as it is; BadInput if it cannot be read, or hides some."""
    if _read(path, "RGBA").getchannel("A").getextrema() != (255, 255):
        raise BadInput(f"{path.name}: parts of it are transparent; give a mask in black and white")
    image = _read(path, "L")
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.reshape(1, image.height, image.width).float() / 255


def _read(path: Path, mode: str) -> Image.Image:
    try:
        with Image.open(path) as opened:
            return opened.convert(mode)
    except (OSError, UnidentifiedImageError, SyntaxError):
        raise BadInput(
            f"{path.name}: not a picture that can be read; give a PNG, JPEG or WebP file"
        ) from None


def _covering(size: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    """(width, height) of a picture of ``size`` scaled to cover the wanted one."""
    scale = max(width / size[0], height / size[1])
    return max(width, round(size[0] * scale)), max(height, round(size[1] * scale))


def picture_sizes(path: Path, width: int, height: int) -> tuple[int, ...]:
    """What SDXL is told of a picture that :func:`load_picture` cuts: its own size, the crop's corner in the
    scaled picture, the target; each (height, width)."""
    with Image.open(path) as image:
        own = image.size
    covering = _covering(own, width, height)
    return (own[1], own[0], (covering[1] - height) // 2, (covering[0] - width) // 2, height, width)


def _texts(
    folder: Path, prompts: Sequence[str], negative: str, encode: Callable[[Sequence[str]], Cond]
) -> tuple[Cond, Tensor]:
    """All different texts encoded once, M rows in float16, the unconditional first; and the row of each
    prompt.
    """
    different = [negative, *dict.fromkeys(prompts)]
    row_of = {prompt: row for row, prompt in reversed(list(enumerate(different)))}
    path = folder / "texts.safetensors"
    if not path.exists():
        save_tensors({name: value.half() for name, value in encode(different).items()}, {}, path)
    return load_tensors(path), torch.tensor([row_of[prompt] for prompt in prompts])


def _taken(texts: Cond, rows: Tensor) -> Cond:
    return {name: value[rows].float() for name, value in texts.items()}


def _open(folder: Path, count: int, texts: Cond, state_timesteps: tuple[int, ...]) -> Samples:
    return Samples([load_tensors(_shard_path(folder, i)) for i in range(count)], texts, state_timesteps)


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def _inpaint_bytes(latent: tuple[int, int, int], masked: bool) -> int:
    """Of a mask and a masked latent in float16."""
    return 2 * (latent[0] + 1) * latent[1] * latent[2] if masked else 0


def _key(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
