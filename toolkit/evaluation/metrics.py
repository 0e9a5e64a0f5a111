"""Distances between sets of pictures, and between pictures: pure torch, float64 where it counts.

Frechet distance: Heusel et al. 2017, "GANs trained by a two time-scale update rule ...", of Gaussians fitted
to features: ``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))``. Its size depends on the features and,
through the fit, on the number of samples: compare it with the distance of two sets that differ in nothing but
the noise. The kernel distance (Binkowski et al. 2018, "Demystifying MMD GANs") has no such bias. Precision
and recall: Kynkaanniemi et al. 2019, "Improved precision and recall metric for assessing generative models".
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


class Attributes(Protocol):
    """Says what pictures (B, 3, H, W) in [0, 1] show."""

    def attributes(self, images: Tensor) -> dict[str, Tensor]:
        """For each attribute the index (B,) of its most likely word."""
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


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Squared maximum mean discrepancy of the features a (N, F) and b (M, F) under the kernel
    ``(x y / F + 1)^3``, unbiased: 0 on average for sets of one kind, so that single values may be negative.
    """
    a, b = a.double(), b.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        values = kernel(x, x)
        return (values.sum() - values.trace()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def paired_distance(a: Tensor, b: Tensor) -> float:
    """Mean distance of the rows of a (N, F) from the same rows of b, each feature in units of its spread in
    b."""
    spread = b.double().std(0, correction=0).clamp(min=1e-6)
    return float(((a.double() - b.double()) / spread).norm(dim=1).mean())


def precision_recall(found: Tensor, reference: Tensor, *, neighbours: int = 3) -> tuple[float, float]:
    """Share of ``found`` (N, F) within the reach of ``reference`` (M, F), and the other way about.

    A set's reach: around each sample a ball up to its k-th nearest neighbour in the set. More than k samples
    are needed in both.
    """

    def share(inside: Tensor, of: Tensor) -> float:
        own = torch.cdist(of, of)
        radius = own.kthvalue(neighbours + 1, dim=1).values  # the nearest of all is the sample itself
        return float((torch.cdist(inside, of) <= radius).any(1).double().mean())

    found, reference = found.double(), reference.double()
    return share(found, reference), share(reference, found)


def colourfulness(images: Tensor) -> float:
    """Mean distance of the pixels of pictures (N, 3, H, W) from grey, in units of the range."""
    return float((images - images.mean(1, keepdim=True)).square().mean(1).sqrt().double().mean())


def contrast(images: Tensor) -> float:
    """Mean over pictures (N, 3, H, W) of the standard deviation of their brightness."""
    return float(images.mean(1).flatten(1).double().std(1).mean())


def sharpness(images: Tensor) -> float:
    """Mean step of brightness between neighbouring pixels of pictures (N, 3, H, W), over their contrast."""
    grey = images.mean(1).double()
    step = grey.diff(dim=1).abs().mean() + grey.diff(dim=2).abs().mean()
    return float(step / 2) / max(contrast(images), 1e-9)


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
