"""Distances between sets of pictures, and between pictures: pure torch, float64 where it counts.

Frechet distance: Heusel et al. 2017, "GANs trained by a two time-scale update rule ...", of Gaussians fitted
to features: ``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))``. Its size depends on the features and,
through the fit, on the number of samples: compare it with the distance of two sets that differ in nothing but
the noise.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

BEST_PSNR = 100.0
"""What equal pictures get, in dB, so that means stay finite."""


class Judge(Protocol):
    """Says whether pictures (B, 3, H, W) in [0, 1] show what their captions say, and what they have in
    common."""

    def adherence(self, images: Tensor, captions: list[str]) -> Tensor:
        """Bool (B,): the picture shows all that its caption says."""
        ...

    def features(self, images: Tensor) -> Tensor:
        """(B, F) for Frechet distances."""
        ...


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of the features a (N, F) and b (M, F), each of at least two rows."""
    return gaussian_frechet(*_moments(a), *_moments(b))


def gaussian_frechet(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """Frechet distance of two Gaussians: means (F,), covariances (F, F).

    ``tr (C_a C_b)^(1/2) = tr (R C_b R)^(1/2)`` with R the symmetric root of C_a: eigenvalues of a symmetric
    matrix, so that no complex root appears, and singular covariances (fewer samples than features) are no
    special case.
    """
    values, vectors = torch.linalg.eigh(covariance_a.double())
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    between = root @ covariance_b.double() @ root
    overlap = torch.linalg.eigvalsh((between + between.T) / 2).clamp(min=0).sqrt().sum()
    spread = covariance_a.double().trace() + covariance_b.double().trace() - 2 * overlap
    return max(float((mean_a.double() - mean_b.double()).square().sum() + spread), 0.0)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """(N,) peak signal-to-noise ratios in dB of pictures (N, 3, H, W) in [0, 1], at most BEST_PSNR."""
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return (-10 * error.clamp(min=10 ** (-BEST_PSNR / 10)).log10()).float()


@torch.no_grad()
def features(judge: Judge, images: Tensor, *, batch: int = 512) -> Tensor:
    """The judge's features (N, F) of pictures (N, 3, H, W)."""
    return torch.cat([judge.features(part) for part in images.split(batch)])


@torch.no_grad()
def adherence(judge: Judge, images: Tensor, captions: list[str], *, batch: int = 512) -> float:
    """Share of the pictures (N, 3, H, W) that show what their captions say."""
    right = 0
    for first in range(0, len(images), batch):
        last = first + batch
        right += int(judge.adherence(images[first:last], captions[first:last]).sum())
    return right / len(images)


def _moments(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (F,) and unbiased covariance (F, F) of samples (N, F), float64."""
    samples = samples.double()
    mean = samples.mean(0)
    centred = samples - mean
    return mean, centred.T @ centred / (len(samples) - 1)
