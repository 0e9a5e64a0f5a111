"""Distances between sets of pictures in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from toolkit.evaluation.metrics import (
    BEST_PSNR,
    adherence,
    colourfulness,
    contrast,
    features,
    frechet_distance,
    gaussian_frechet,
    kernel_distance,
    precision_recall,
    psnr,
    sharpness,
)


def samples_with(mean: Tensor, covariance: Tensor, *, count: int, seed: int) -> Tensor:
    """(count, F) samples whose sample mean and unbiased covariance are exactly these."""
    noise = torch.randn(count, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    noise = noise - noise.mean(0)
    white = noise @ torch.linalg.inv(torch.linalg.cholesky(noise.T @ noise / (count - 1))).T
    return mean + white @ torch.linalg.cholesky(covariance).T


def test_equal_sets_have_no_distance_and_order_does_not_matter():
    samples = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(samples, samples.flip(0)) == pytest.approx(0, abs=1e-9)


def test_a_shift_costs_its_square():
    samples = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    shift = torch.arange(6.0)
    assert frechet_distance(samples, samples + shift) == pytest.approx(float((shift**2).sum()), rel=1e-6)


def test_independent_features_give_the_sum_of_squared_differences_of_spreads():
    a, b = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 0.1, 0.5]).double()
    zero = torch.zeros(3).double()
    found = frechet_distance(
        samples_with(zero, torch.diag(a**2), count=40, seed=1),
        samples_with(zero + 1, torch.diag(b**2), count=70, seed=2),
    )
    assert found == pytest.approx(3 + float(((a - b) ** 2).sum()), rel=1e-9)


def test_covariances_that_do_not_commute_agree_with_the_root_of_a_two_by_two_product():
    """``tr M^(1/2) = sqrt(tr M + 2 sqrt(det M))`` for M = C_a C_b in two dimensions."""
    a = torch.tensor([[2.0, 0.9], [0.9, 1.0]]).double()
    b = torch.tensor([[0.5, -0.4], [-0.4, 3.0]]).double()
    product = a @ b
    root = (product.trace() + 2 * torch.linalg.det(product).sqrt()).sqrt()
    expected = float(a.trace() + b.trace() - 2 * root)
    zero = torch.zeros(2).double()
    assert gaussian_frechet(zero, a, zero, b) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(
        samples_with(zero, a, count=30, seed=3), samples_with(zero, b, count=30, seed=4)
    ) == pytest.approx(expected, rel=1e-9)


def test_fewer_samples_than_features_are_no_special_case():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 64, generator=generator), torch.randn(5, 64, generator=generator)
    assert 0 < frechet_distance(a, b) < 1000
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_psnr_of_a_uniform_error_is_known_and_equal_pictures_stay_finite():
    pictures = torch.full((2, 3, 8, 8), 0.5)
    other = pictures + torch.tensor([0.1, 0.0]).reshape(2, 1, 1, 1)
    assert psnr(pictures, other).tolist() == pytest.approx([20.0, BEST_PSNR], abs=1e-4)


class BrightnessJudge:
    """A picture is right where its caption says whether it is bright."""

    def adherence(self, images: Tensor, captions: list[str]) -> Tensor:
        bright = images.mean((1, 2, 3)) > 0.5
        return bright == torch.tensor([caption == "bright" for caption in captions])

    def features(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


def test_a_judge_sees_every_picture_with_its_own_caption_whatever_the_batch():
    images = torch.tensor([0.9, 0.1, 0.9, 0.1, 0.9]).reshape(5, 1, 1, 1).expand(5, 3, 4, 4)
    captions = ["bright", "dark", "dark", "dark", "bright"]
    for batch in (1, 2, 5, 9):
        assert adherence(BrightnessJudge(), images, captions, batch=batch) == pytest.approx(0.8)
        assert torch.equal(features(BrightnessJudge(), images, batch=batch), images.mean((2, 3)))


def random_rows(count: int, seed: int, *, shift: float = 0.0) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed)) + shift


def test_the_kernel_distance_is_the_unbiased_sum_over_pairs():
    a, b = random_rows(5, 1).double(), random_rows(4, 2, shift=1).double()

    def kernel(x: Tensor, y: Tensor) -> float:
        return float((x @ y / 4 + 1) ** 3)

    within = [
        sum(kernel(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j)
        / (len(s) * (len(s) - 1))
        for s in (a, b)
    ]
    between = sum(kernel(x, y) for x in a for y in b) / 20
    assert kernel_distance(a, b) == pytest.approx(sum(within) - 2 * between, rel=1e-12)


def test_the_kernel_distance_of_one_kind_is_zero_on_average():
    found = [kernel_distance(random_rows(40, 2 * n), random_rows(40, 2 * n + 1)) for n in range(50)]
    assert abs(sum(found) / 50) < 0.05 < kernel_distance(random_rows(40, 0), random_rows(40, 1, shift=1))


def test_precision_falls_with_what_does_not_belong_and_recall_with_what_is_missing():
    both = torch.cat([random_rows(40, 1), random_rows(40, 2, shift=100)])
    one = random_rows(80, 3)
    precision, recall = precision_recall(one, both)
    assert precision > 0.8 and 0.3 < recall <= 0.5
    precision, recall = precision_recall(both, one)
    assert 0.3 < precision <= 0.5 and recall > 0.8
    assert precision_recall(one, one) == (1.0, 1.0)


def test_drifts_answer_to_what_they_are_called_after():
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) / 2 + 0.25
    grey = images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    assert colourfulness(grey) == pytest.approx(0, abs=1e-7) and contrast(grey) == contrast(images)
    flat = (images - 0.5) / 2 + 0.5
    assert contrast(flat) == pytest.approx(contrast(images) / 2, rel=1e-5)
    assert sharpness(flat) == pytest.approx(sharpness(images), rel=1e-5), "contrast is not sharpness"
    soft = torch.nn.functional.avg_pool2d(images, 3, stride=1)
    assert sharpness(soft) < 0.7 * sharpness(images)
