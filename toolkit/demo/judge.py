"""The judge: a small convolutional classifier that says whether a picture shows what its caption says.

One head per attribute of `drawings.ATTRIBUTES` over a shared 64-dimensional feature, which also serves
Frechet distances. It is trained on drawings only (with blur and noise, so that it tolerates generated
pictures), never on anything that a model made.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from . import JUDGE
from .drawings import ATTRIBUTES, SIZE, labels, render, scenes

FEATURES = 64
_WIDTHS = (32, 64, 64)
_log = logging.getLogger("fewstep")


class Judge(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1] to attributes; pictures of another size are resized to 32 x 32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, _WIDTHS[0], 5, stride=2, padding=2)
        self.middle = nn.Conv2d(_WIDTHS[0], _WIDTHS[1], 3, stride=2, padding=1)
        self.last = nn.Conv2d(_WIDTHS[1], _WIDTHS[2], 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in _WIDTHS)
        self.feature = nn.Linear(_WIDTHS[2] * (SIZE // 8) ** 2, FEATURES)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(FEATURES, len(words)) for name, words in ATTRIBUTES.items()}
        )

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Activations (B, 32, 16, 16) and (B, 64, 8, 8), for a perceptual distance."""
        if images.shape[-2:] != (SIZE, SIZE):
            images = F.interpolate(
                images, size=(SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False
            )
        fine = F.silu(self.norms[0](self.stem(images * 2 - 1)))
        coarse = F.silu(self.norms[1](self.middle(fine)))
        return fine, coarse

    def features_of(self, coarse: Tensor) -> Tensor:
        """The 64 features (B, 64) from the coarse map."""
        deep = F.silu(self.norms[2](self.last(coarse)))
        return self.feature(F.avg_pool2d(deep, 2).flatten(1))

    def features(self, images: Tensor) -> Tensor:
        """Features (B, 64) float32, before the heads' nonlinearity."""
        return self.features_of(self.maps(images)[1])

    def logits(self, features: Tensor) -> dict[str, Tensor]:
        """Scores (B, number of words) of each attribute."""
        return {name: head(F.silu(features)) for name, head in self.heads.items()}

    @torch.no_grad()
    def attributes(self, images: Tensor) -> dict[str, Tensor]:
        """Index (B,) of the most likely word of each attribute."""
        return {name: scores.argmax(1) for name, scores in self.logits(self.features(images)).items()}

    def adherence(self, images: Tensor, captions: list[str]) -> Tensor:
        """Bool (B,): every attribute that the caption names is right."""
        seen = self.attributes(images)
        right = [
            all(int(seen[name][row]) == index for name, index in labels(caption).items())
            for row, caption in enumerate(captions)
        ]
        return torch.tensor(right, dtype=torch.bool)


def load_judge(path: Path = JUDGE) -> Judge:
    """The trained judge, float32, in evaluation mode."""
    judge = Judge()
    judge.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return judge.eval().requires_grad_(False)


def train_judge(*, updates: int = 3000, batch: int = 128, pictures: int = 40_000, seed: int = 11) -> Judge:
    """A judge trained with cross-entropy on drawings."""
    torch.manual_seed(seed)
    what = scenes(pictures, seed=seed)
    images = render(what, seed=seed)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=updates, pct_start=0.05)
    generator = torch.Generator().manual_seed(seed)
    for update in range(updates):
        rows = torch.randint(pictures, (batch,), generator=generator)
        scores = judge.logits(judge.features(_roughen(images[rows], generator)))
        losses = [F.cross_entropy(scores[name], what.labels[name][rows]) for name in ATTRIBUTES]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if update % 200 == 0:
            _log.info("judge %d/%d: loss %.4f", update, updates, float(loss.detach()))
    return judge.eval().requires_grad_(False)


def _roughen(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture a little blurred and noisy, by an amount of its own."""
    mix = 0.7 * torch.rand(len(images), 1, 1, 1, generator=generator)
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    images = images + mix * (F.avg_pool2d(padded, 3, stride=1) - images)
    noise = torch.randn(images.shape, generator=generator)
    return images + 0.05 * torch.rand(len(images), 1, 1, 1, generator=generator) * noise
