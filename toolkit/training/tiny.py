"""A tiny autoencoder that stands in for a VAE: TAESD's layout (diffusers' AutoencoderTiny), distilled from
the VAE itself.

It learns from pairs: a scaled latent x0, and the picture that the VAE decodes it to, clamped and in 8 bits.
Kept once, they cost the VAE's slow decoder once. An update takes the same window of its pictures, and leaves
out of the loss what lies so near to a cut that the tiny decoder, unlike the VAE, could not see its
surroundings. The decoder's loss is the absolute error of the pixels and of their differences to the right and
below; the encoder's, where one is wanted, the squared error of the latents.

In the files of hosts a decoder's layers count from 1, because their clamp is a layer (TAESD's own layout).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..diffusion.errors import BadInput
from ..runtime.files import save_tensors
from .loop import Interrupted, load_state, lr_factor, save_state, stop_requests
from .networks import place
from .samples import (
    Order,
    Samples,
    derived_seed,
    forget_parts,
    gathered,
    kept_samples,
    shard_path,
)
from .weights import read_weights

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

log = logging.getLogger("fewstep")

PAIRS = 64
"""In a shard, at most."""

WINDOW, MARGIN = 32, 4
"""In latent cells: the largest side that is trained on at once, and what is left out of the loss at a cut."""

STATE_MINUTES = 2.0

Side = Literal["encoder", "decoder"]


def new_tiny(vae: Mapping[str, Any]) -> AutoencoderTiny:
    """Untrained, for a VAE of this configuration: as many levels, half of its narrowest width throughout,
    which for Stable Diffusion's is TAESD, the only one that hosts can read.
    """
    widths = vae["block_out_channels"]
    return _built(len(widths), width=max(8, widths[0] // 2), channels=int(vae["latent_channels"]))


def _built(levels: int, *, width: int, channels: int, blocks: Sequence[int] = ()) -> AutoencoderTiny:
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    return AutoencoderTiny(
        encoder_block_out_channels=(width,) * levels,
        decoder_block_out_channels=(width,) * levels,
        num_encoder_blocks=(1, *(3,) * (levels - 1)),
        num_decoder_blocks=tuple(blocks) or (*(3,) * (levels - 1), 1),
        latent_channels=channels,
    )


def make_pairs(
    folder: Path,
    groups: Sequence[Tensor],
    latents: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    *,
    batch: int,
    progress: Callable[[Iterable[int]], Iterable[int]],
) -> Samples:
    """Each group of numbers is a shard of pairs of one size; ``latents`` gives the scaled ones of some
    numbers, ``decode`` their pictures in [0, 1]. Shards that are there already are kept.
    """

    def make(numbers: Tensor) -> dict[str, Tensor]:
        x0 = latents(numbers).half()
        picture = (decode(x0.float()) * 255).round().byte()
        return {"x0": x0, "picture": picture, "text": torch.zeros(len(numbers), dtype=torch.int64)}

    for index in progress([i for i in range(len(groups)) if not shard_path(folder, i).exists()]):
        path = shard_path(folder, index)
        save_tensors(gathered(path, groups[index].split(batch), make), {}, path)
        forget_parts(path)
    return kept_samples(folder, len(groups), {})


def held_out(pairs: Samples, count: int) -> tuple[list[Tensor], list[Tensor]]:
    """The numbers to learn from and those to judge by, about ``count``, from every size its share."""
    learned: list[Tensor] = []
    judged: list[Tensor] = []
    for bucket in pairs.buckets:
        few = max(1, round(count * len(bucket) / len(pairs))) if len(bucket) > 1 else 0
        learned.append(bucket[: len(bucket) - few])
        judged.append(bucket[len(bucket) - few :])
    return learned, [numbers for numbers in judged if len(numbers)]


@dataclass(frozen=True)
class TinySettings:
    """``encoder``: whether it is trained too."""

    updates: int
    batch_size: int
    lr: float
    seed: int
    encoder: bool = False
    warmup: int = 100


class TinyTrainer:
    """``tiny`` learns from those ``pairs`` whose numbers are in ``buckets``. ``key``: what else the weights
    depend on; a state of another key is refused.
    """

    def __init__(
        self,
        tiny: AutoencoderTiny,
        pairs: Samples,
        buckets: Sequence[Tensor],
        settings: TinySettings,
        *,
        key: str,
        device: torch.device,
    ) -> None:
        self.tiny, self.pairs, self.settings, self.device = place(tiny, device), pairs, settings, device
        self.key = f"{key} {asdict(settings)}"
        self.update = 0
        trained: list[Any] = [tiny.decoder, *([tiny.encoder] if settings.encoder else [])]
        self.trained = [parameter for part in trained for parameter in part.parameters()]
        self.optimizer = torch.optim.AdamW(self.trained, lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.order = Order(
            buckets,
            batch=settings.batch_size,
            micro_batch=settings.batch_size,
            updates=settings.updates,
            seed=derived_seed(settings.seed, -1),
        )

    def run(self, state: Path) -> None:
        """To the end from where ``state`` stands; Interrupted, the state saved, when asked to stop."""
        saved = load_state(state)
        if saved is not None:
            self.restore(saved, state)
        last = time.monotonic()
        total = self.settings.updates
        with (
            stop_requests() as stop,
            tqdm(total=total, initial=self.update, unit="update", dynamic_ncols=True) as bar,
        ):
            while self.update < total:
                loss = self.step()
                bar.update(1)
                if self.update % 20 == 0:
                    bar.set_postfix(loss=f"{float(loss):.4f}", refresh=False)
                if stop.requested or time.monotonic() - last > 60 * STATE_MINUTES or self.update == total:
                    save_state(state, self.state())
                    last = time.monotonic()
                if stop.requested and self.update < total:
                    raise Interrupted

    def step(self) -> Tensor:
        """One update; returns its loss."""
        settings = self.settings
        lr = settings.lr * lr_factor(self.update, settings.updates, settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        rows = self.pairs.rows(self.order(self.update)[0])
        x0, picture = rows["x0"].float().to(self.device), rows["picture"].to(self.device).float() / 255
        loss = tiny_loss(
            self.tiny,
            x0,
            picture,
            corner=torch.rand(
                2, generator=torch.Generator().manual_seed(derived_seed(settings.seed, self.update))
            ),
            encoder=settings.encoder,
        )
        if not torch.isfinite(loss):
            raise BadInput(
                f"the loss became {float(loss)} at update {self.update}; start anew with a lower --lr, such "
                f"as {settings.lr / 3:.1g}"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.update += 1
        return loss.detach()

    def state(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "update": self.update,
            "tiny": self.tiny.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, saved: dict[str, Any], path: Path) -> None:
        if saved["key"] != self.key:
            raise BadInput(
                f"{path}: this was begun with other settings or other pictures; give them again as they "
                "were, or delete it to start anew"
            )
        self.update = saved["update"]
        self.tiny.load_state_dict(saved["tiny"])
        self.optimizer.load_state_dict(saved["optimizer"])


def tiny_loss(tiny: AutoencoderTiny, x0: Tensor, picture: Tensor, *, corner: Tensor, encoder: bool) -> Tensor:
    """Of latents (B, C, h, w) and their pictures in [0, 1]; ``corner``: where the window lies, (2,) in
    [0, 1)."""
    cell = picture.shape[-1] // x0.shape[-1]
    cuts = [_cut(side, float(u)) for side, u in zip(x0.shape[-2:], corner, strict=True)]
    (rows, inner_rows), (columns, inner_columns) = cuts
    seen = x0[..., rows, columns]
    wanted = picture[..., _times(rows, cell), _times(columns, cell)]
    made: Any = tiny.decode(seen, return_dict=False)[0] / 2 + 0.5
    inner = (..., _times(inner_rows, cell), _times(inner_columns, cell))
    loss = _distance(made[inner], wanted[inner])
    if encoder:
        latent: Any = tiny.encode(wanted * 2 - 1, return_dict=False)[0]
        inner = (..., inner_rows, inner_columns)
        loss = loss + F.mse_loss(latent[inner], seen[inner])
    return loss


def _cut(side: int, u: float) -> tuple[slice, slice]:
    """A window of a side of so many cells, and the part of it that counts."""
    start = int(u * (max(side - WINDOW, 0) + 1))
    stop = min(start + WINDOW, side)
    first, last = MARGIN if start else 0, MARGIN if stop < side else 0
    return slice(start, stop), slice(first, stop - start - last)


def _times(cells: slice, cell: int) -> slice:
    return slice(cells.start * cell, cells.stop * cell)


def _distance(made: Tensor, wanted: Tensor) -> Tensor:
    error = made - wanted
    return error.abs().mean() + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def taesd_tensors(tiny: AutoencoderTiny, side: Side) -> dict[str, Tensor]:
    """One half under the keys that hosts know."""
    half: Any = getattr(tiny, side)
    return {
        _renumbered(key, int(side == "decoder")): value for key, value in half.layers.state_dict().items()
    }


def _renumbered(key: str, by: int) -> str:
    number, _, rest = key.partition(".")
    return f"{int(number) + by}.{rest}"


def open_tiny(path: Path) -> AutoencoderTiny:
    """The decoder in a file of TAESD's layout, or in diffusers', whatever its width and depth; its encoder
    is not to be used. BadInput for another file.
    """
    found = read_weights(path).tensors
    state = {key.removeprefix("taesd_decoder."): value for key, value in found.items()}
    if any(key.startswith("decoder.layers.") for key in found):
        begins = "decoder.layers."
        state = {_renumbered(k.removeprefix(begins), 1): v for k, v in found.items() if k.startswith(begins)}
    state = {key: value for key, value in state.items() if key.partition(".")[0].isdigit()}
    convolutions = sorted(
        int(key.partition(".")[0]) for key in state if key.count(".") == 1 and "weight" in key
    )
    blocks = [int(key.partition(".")[0]) for key in state if key.endswith(".conv.0.weight")]
    first = state.get("1.weight")
    if first is None or len(convolutions) < 2 or not blocks:
        raise BadInput(
            f"{path}: no tiny decoder was found in it; python -m toolkit.tiny makes one, and it reads "
            "taesd_decoder files too"
        )
    ends = pairwise(convolutions)
    counts = [sum(low < block < high for block in blocks) for low, high in ends]
    tiny = _built(len(counts), width=first.shape[0], channels=first.shape[1], blocks=counts)
    decoder: Any = tiny.decoder
    own = decoder.layers.state_dict()
    given = {_renumbered(key, -1): value.float() for key, value in state.items()}
    if own.keys() != given.keys() or any(own[key].shape != given[key].shape for key in own):
        raise BadInput(f"{path}: this tiny decoder is of another kind than TAESD's, and cannot be used")
    decoder.layers.load_state_dict(given)
    return tiny.eval().requires_grad_(False)


def save_diffusers(tiny: AutoencoderTiny, folder: Path, *, encoder: bool) -> None:
    """A folder for AutoencoderTiny.from_pretrained; an encoder that was not trained gives NaN, lest wrong
    pictures be taken for right ones.
    """
    if not encoder:
        half: Any = tiny.encoder
        for parameter in half.parameters():
            parameter.data.fill_(float("nan"))
    tiny.save_pretrained(folder)
