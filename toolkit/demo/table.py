"""The teacher's own figures: what each number of DDIM steps and each guidance gives.

Adherence is the judge's verdict on all attributes. Frechet distance (Heusel et al. 2017) compares the judge's
features, divided by their mean standard deviation on drawings, with those of fresh drawings. Diversity is the
mean feature distance between pictures of one caption, over the same for drawings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .drawings import SPOKEN, Scenes, captions, render, scenes
from .judge import Judge
from .teacher import Teacher, sample

SETTINGS: tuple[tuple[int, float], ...] = (
    (50, 4.0),
    (16, 4.0),
    (8, 4.0),
    (4, 4.0),
    (2, 4.0),
    (1, 4.0),
    (50, 1.0),
    (50, 2.0),
    (50, 8.0),
)
"""(steps, guidance scale) of the table's rows."""

_EACH = 4


@dataclass(frozen=True)
class Row:
    """One line of the table; every figure but the counts is a mean over the pictures."""

    steps: int
    guidance_scale: float
    adherence: float
    frechet: float
    diversity: float
    attributes: dict[str, float]

    @staticmethod
    def heading() -> str:
        """Column names."""
        return "steps  guidance  adherence  frechet  diversity  " + "  ".join(SPOKEN)

    def __str__(self) -> str:
        each = "  ".join(f"{self.attributes[name]:{len(name)}.2f}" for name in SPOKEN)
        figures = f"{self.adherence:9.3f}  {self.frechet:7.2f}  {self.diversity:9.2f}"
        return f"{self.steps:5d}  {self.guidance_scale:8.1f}  {figures}  {each}"


def measure(
    teacher: Teacher,
    judge: Judge,
    *,
    prompt_count: int = 64,
    settings: tuple[tuple[int, float], ...] = SETTINGS,
    seed: int = 7,
) -> list[Row]:
    """The table: `prompt_count` captions, four noises each, the same in all rows; row one is drawings."""
    what = scenes(prompt_count, seed=seed)
    spoken = {name: what.labels[name].repeat_interleave(_EACH) for name in SPOKEN}
    what = Scenes({**scenes(prompt_count * _EACH, seed=seed + 2).labels, **spoken})
    texts = captions(what, seed=seed)
    real = judge.features(render(scenes(4096, seed=seed + 1), seed=seed + 1))
    unit = real.std(0).mean()
    drawn = render(what, seed=seed)
    usual = _spread(judge.features(drawn))

    def row(pictures: Tensor, steps: int, guidance_scale: float) -> Row:
        features = judge.features(pictures)
        seen = judge.attributes(pictures)
        return Row(
            steps=steps,
            guidance_scale=guidance_scale,
            adherence=float(judge.adherence(pictures, texts).float().mean()),
            frechet=frechet(features / unit, real / unit),
            diversity=_spread(features) / usual,
            attributes={name: float((seen[name] == what.labels[name]).float().mean()) for name in SPOKEN},
        )

    rows = [row(drawn, 0, 0.0)]
    for steps, guidance_scale in settings:
        pictures = sample(teacher, texts, steps=steps, guidance_scale=guidance_scale, seed=seed)
        rows.append(row(pictures, steps, guidance_scale))
    return rows


def frechet(a: Tensor, b: Tensor) -> float:
    """|mean difference|^2 + tr(A + B - 2 (A B)^(1/2)) of the Gaussians of features (N, F) and (M, F)."""
    a, b = a.double(), b.double()
    covariance_a, covariance_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(covariance_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    crossed = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp(min=0).sqrt().sum()
    shift = (a.mean(0) - b.mean(0)).square().sum()
    return float(shift + covariance_a.trace() + covariance_b.trace() - 2 * crossed)


def _spread(features: Tensor) -> float:
    """Mean distance between the features of the four pictures of each caption."""
    groups = features.view(-1, _EACH, features.shape[-1])
    return float(torch.cdist(groups, groups).sum((1, 2)).mean() / (_EACH * (_EACH - 1)))
