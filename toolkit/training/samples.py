"""What a student is trained on: clean latents with their texts, computed once and kept in safetensors shards.

They are the teacher's own pictures (teacher_samples.py) or people's (image_samples.py). The folder of a cache
is named by a hash of all that its content depends on, so that a later run with the same needs finds it; a
shard is written whole or not at all, so making goes on where it was stopped. A shard holds pictures of one
size, and so does what a network is shown at once.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..diffusion.denoiser import Cond
from ..diffusion.method import Batch
from ..runtime.files import load_tensors, save_tensors

SHARD = 128
"""Samples in a shard, at most."""

KEEP_MINUTES = 5.0
"""After which what is made of a shard is kept."""


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

    @cached_property
    def buckets(self) -> list[Tensor]:
        """The numbers of the samples of each size, ascending; those of one bucket can be stacked."""
        numbers = torch.arange(len(self)).split([len(shard["text"]) for shard in self.shards])
        found: dict[torch.Size, list[Tensor]] = {}
        for shard, part in zip(self.shards, numbers, strict=True):
            found.setdefault(shard["x0"].shape[1:], []).append(part)
        return [torch.cat(parts) for parts in found.values()]

    def rows(self, indices: Tensor) -> dict[str, Tensor]:
        """The named tensors of the samples ``indices`` (B,), all of one bucket, stacked."""
        starts = torch.tensor([0, *(len(shard["text"]) for shard in self.shards)]).cumsum(0)
        places = torch.searchsorted(starts, indices, right=True) - 1
        picked = [
            (self.shards[p], int(i - starts[p]))
            for p, i in zip(places.tolist(), indices.tolist(), strict=True)
        ]
        return {name: torch.stack([shard[name][row] for shard, row in picked]) for name in self.shards[0]}

    @property
    def uncond(self) -> Cond:
        return taken(self.texts, torch.tensor([0]))

    def cond(self, rows: Mapping[str, Tensor]) -> Cond:
        """The conditioning of samples (:meth:`rows`)."""
        own = {name: rows[name].float() for name in ("time_ids", "inpaint") if name in rows}
        return {**taken(self.texts, rows["text"]), **own}


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
    cfg_rescale: float = 0.0,
    caption_dropout: float = 0.0,
    generator: torch.Generator,
    device: torch.device,
) -> Batch:
    """The batch of the samples ``indices``; a share of the teacher's own pictures keep their guidance and
    trajectory, and a share of all lose their caption, and with it the trajectory that it led.
    """
    rows = samples.rows(indices)
    scale = guidance.draw(len(indices), generator=generator)
    own = torch.rand(len(indices), generator=generator) < trajectory_share
    if caption_dropout:
        dropped = torch.rand(len(indices), generator=generator) < caption_dropout
        rows["text"] = rows["text"].masked_fill(dropped, 0)
        own &= ~dropped
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
        cfg_rescale=cfg_rescale,
    )


class Order:
    """Which samples the updates of a phase see: (numbers of) micro-batches, each from one bucket.

    Every bucket has an endless sequence of its own, one permutation after the other; which bucket a
    micro-batch continues is drawn by their lengths. All of it follows from the seed, at any update.
    """

    def __init__(
        self, buckets: Sequence[Tensor], *, batch: int, micro_batch: int, updates: int, seed: int
    ) -> None:
        self.buckets, self.seed = buckets, seed
        self.parts = [len(part) for part in torch.arange(batch).split(micro_batch)]
        lengths = torch.tensor(self.parts).repeat(updates)
        self.picks = torch.multinomial(
            torch.tensor([len(bucket) for bucket in buckets]).double(),
            len(lengths),
            replacement=True,
            generator=torch.Generator().manual_seed(seed),
        )
        self.starts = torch.zeros_like(lengths)
        for pick in range(len(buckets)):
            mine = self.picks == pick
            self.starts[mine] = lengths[mine].cumsum(0) - lengths[mine]

    def __call__(self, update: int) -> list[Tensor]:
        """The sample numbers of an update's micro-batches."""
        first = update * len(self.parts)
        parts: list[Tensor] = []
        for number, length in enumerate(self.parts, first):
            pick, start = int(self.picks[number]), int(self.starts[number])
            bucket = self.buckets[pick]
            parts.append(bucket[shuffled(len(bucket), start, length, seed=self.seed + pick)])
        return parts


def shuffled(count: int, start: int, length: int, *, seed: int) -> Tensor:
    """(length,) entries from ``start`` on of an endless sequence of permutations of 0 .. count - 1."""
    positions = torch.arange(start, start + length)
    epochs = positions // count
    orders = {
        int(epoch): torch.randperm(
            count, generator=torch.Generator().manual_seed(derived_seed(seed, int(epoch)))
        )
        for epoch in epochs.unique()
    }
    return torch.stack([orders[int(e)][int(p % count)] for e, p in zip(epochs, positions, strict=True)])


def derived_seed(*numbers: int) -> int:
    """A 63-bit seed that depends on all the numbers, and is none that a person types for a picture."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "big") >> 1


def kept_texts(
    folder: Path, prompts: Sequence[str], negative: str, encode: Callable[[Sequence[str]], Cond]
) -> tuple[Cond, Tensor]:
    """All different texts encoded once, M rows in float16, the unconditional first; and the row of each
    prompt.
    """
    different = [negative, *dict.fromkeys(prompts)]
    row_of = {prompt: row for row, prompt in reversed(list(enumerate(different)))}
    path = folder / "texts.safetensors"
    if not path.exists():
        found = encode(different)
        halved = {name: value.half() if value.is_floating_point() else value for name, value in found.items()}
        save_tensors(halved, {}, path)
    return load_tensors(path), torch.tensor([row_of[prompt] for prompt in prompts])


def taken(texts: Cond, rows: Tensor) -> Cond:
    """Some of the texts in float32, no longer than the longest of them; "length" if it takes one."""
    found = {name: value[rows].float() for name, value in texts.items()}
    if "length" not in found:
        return found
    length = found["length"].long()
    found["text"] = found["text"][:, : int(length.max())]
    if int(length.min()) == int(length.max()):
        del found["length"]
        return found
    return {**found, "length": length}


def kept_samples(folder: Path, count: int, texts: Cond, state_timesteps: tuple[int, ...] = ()) -> Samples:
    """Of a cache whose ``count`` shards are all there; those without a sample are left out."""
    shards = [load_tensors(shard_path(folder, number)) for number in range(count)]
    return Samples([shard for shard in shards if len(shard["text"])], texts, state_timesteps)


def gathered(
    path: Path, parts: Sequence[Tensor], make: Callable[[Tensor], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The rows of a shard, made part by part and kept beside it by the clock: on a slow machine a shard takes
    longer than one would like to lose. ``parts``: the numbers of the samples.
    """
    kept, ends = path.with_suffix(".part"), torch.tensor([0, *map(len, parts)]).cumsum(0).tolist()
    made: list[dict[str, Tensor]] = []
    if kept.exists():
        found = {name: value.clone() for name, value in load_tensors(kept).items()}
        made = [found] if len(found["x0"]) in ends else []
    done = ends.index(len(made[0]["x0"])) if made else 0
    saved = time.monotonic()
    for part in parts[done:]:
        made.append(make(part))
        if time.monotonic() - saved > 60 * KEEP_MINUTES:
            save_tensors(_joined(made), {}, kept)
            saved = time.monotonic()
    return _joined(made)


def forget_parts(path: Path) -> None:
    """To be called when the shard is written."""
    path.with_suffix(".part").unlink(missing_ok=True)


def _joined(made: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in made]) for name in made[0]}


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def latent_bytes(channels: int, cells: int, *, masked: bool) -> int:
    """Of a latent in float16, and of its mask and masked latent."""
    return 2 * cells * (2 * channels + 1 if masked else channels)


def content_key(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
