"""People's pictures (data.py) as data: each in the size nearest to its shape, with its mirror image if asked.

For an inpainting teacher each is seen under several masks (masks.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..diffusion.denoiser import Cond
from ..diffusion.errors import BadInput
from ..runtime.files import save_tensors
from .data import Entry, Scan, entries
from .images import decoded, fitted, told_ids
from .masks import draw_masks, inpaint_cond
from .samples import (
    SHARD,
    Samples,
    content_key,
    derived_seed,
    kept_samples,
    kept_texts,
    latent_bytes,
    shard_path,
)
from .sizes import Size, nearest_size, told_sizes

log = logging.getLogger("fewstep")

MASKS_EACH = 4
"""Masks that each picture is seen under."""


@dataclass(frozen=True)
class ImageSampleRequest:
    """All that the samples of people's pictures depend on. ``teacher``: a hash of what encodes them;
    ``sizes``: those to choose from, which the UNet is told if ``told``; ``masks``: so many each, for an
    inpainting teacher.
    """

    teacher: str
    scan: Scan
    negative: str
    sizes: tuple[Size, ...]
    channels: int
    downscale: int
    flip: bool = False
    told: bool = False
    masks: int = 0
    version: int = 1
    """To be raised when the same request makes other samples."""

    evaluations = 0

    @property
    def each(self) -> int:
        """Samples of a picture."""
        return max(self.masks, 1) * (2 if self.flip else 1)

    @cached_property
    def chosen(self) -> list[Size]:
        """The size of each picture."""
        return [nearest_size(picture.size, self.sizes) for picture in self.scan.pictures]

    @cached_property
    def shards(self) -> list[tuple[int, ...]]:
        """The numbers of the pictures in each shard, which have one size."""
        count = max(1, SHARD // self.each)
        return [
            tuple(part.tolist())
            for size in sorted(set(self.chosen))
            for part in torch.tensor([i for i, own in enumerate(self.chosen) if own == size]).split(count)
        ]

    @property
    def bytes(self) -> int:
        """On the disk, in float16."""
        cells = sum(width * height for width, height in self.chosen) // self.downscale**2
        return self.each * latent_bytes(self.channels, cells, masked=self.masks > 0)

    def folder(self, cache: Path) -> Path:
        return cache / f"images-{content_key(asdict(self))}"

    def summary(self) -> str:
        return f"pictures: {told_sizes(self.chosen)}" + (", each mirrored too" if self.flip else "")

    def outcome(self, samples: Samples) -> str:
        """How many pictures are used, and how many were damaged."""
        used = len(samples) // self.each
        damaged = self.scan.damaged + len(self.scan.pictures) - used
        return f"{used} pictures" + (f"; {damaged} damaged ones were skipped" if damaged else "")


def make_image_samples(
    request: ImageSampleRequest,
    folder: Path,
    *,
    source: Path,
    encode_images: Callable[[Tensor], Tensor],
    encode: Callable[[Sequence[str]], Cond],
    progress: Callable[[Iterable[int]], Iterable[int]],
) -> Samples:
    """The samples of the pictures in ``source``, read in its own order; damaged ones are named and skipped.
    ``progress`` wraps a count of the pictures.

    A shard is written when the last of its pictures has passed.
    """
    pictures = request.scan.pictures
    texts, text_rows = kept_texts(folder, [p.caption for p in pictures], request.negative, encode)
    missing = [n for n in range(len(request.shards)) if not shard_path(folder, n).exists()]
    shard_of = {picture: number for number in missing for picture in request.shards[number]}
    made: dict[int, list[dict[str, Tensor]]] = {number: [] for number in missing}
    waiting = {number: len(request.shards[number]) for number in missing}
    passing = zip(progress(range(len(shard_of))), _wanted(request, source, shard_of), strict=False)
    for _, (picture, entry) in passing:
        number = shard_of[picture]
        try:
            sample = _sample(request, picture, entry, encode_images)
            made[number].append(sample | {"text": text_rows[picture].expand(request.each)})
        except BadInput as error:
            log.warning("%s; skipped", error)
        waiting[number] -= 1
        if not waiting[number]:
            parts = made.pop(number) or [{"text": torch.zeros(0, dtype=torch.int64)}]
            shard = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            save_tensors(shard, {}, shard_path(folder, number))
    if any(waiting.values()):
        raise BadInput(f"{source}: pictures went away while they were read; start again")
    samples = kept_samples(folder, len(request.shards), texts)
    if not len(samples):
        raise BadInput(f"{source}: all of its {len(pictures)} pictures are damaged; check the files")
    return samples


def _wanted(
    request: ImageSampleRequest, source: Path, shard_of: dict[int, int]
) -> Iterator[tuple[int, Entry]]:
    """The pictures whose shard is missing, by number, as the source has them."""
    numbers = {picture.name: number for number, picture in enumerate(request.scan.pictures)}
    for entry in entries(source):
        if (number := numbers.get(entry.name)) in shard_of:
            yield number, entry


def _sample(
    request: ImageSampleRequest, number: int, entry: Entry, encode_images: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The rows of one picture: under each mask, then its mirror image under each of others."""
    size = request.chosen[number]
    image = decoded(entry.data(), entry.name)
    picture = fitted(image, size)
    views = torch.stack([picture, picture.flip(-1)] if request.flip else [picture])
    masks = max(request.masks, 1)
    rows = {"x0": encode_images(views).half().repeat_interleave(masks, 0)}
    if request.told:
        rows["time_ids"] = torch.tensor(told_ids(image.size, size)).expand(request.each, -1)
    if request.masks:
        seeds = [derived_seed(number, mask) for mask in range(request.each)]
        drawn = draw_masks(seeds, size[1], size[0])
        rows["inpaint"] = inpaint_cond(views.repeat_interleave(masks, 0), drawn, encode_images).half()
    return rows
