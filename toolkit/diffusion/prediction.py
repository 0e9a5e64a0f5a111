"""What networks predict, and how one prediction becomes another.

With ``z = alpha x0 + sigma_vp eps`` the velocity is ``v = alpha eps - sigma_vp x0`` (Salimans & Ho 2022), so
``x0 = alpha z - sigma_vp v`` and ``eps = sigma_vp z + alpha v``. In sigma-space ``z = alpha x``,
``sigma_vp = alpha sigma``, ``alpha = 1 / sqrt(1 + sigma^2)``.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .schedule import alpha, like

PredictionType = Literal["epsilon", "v_prediction", "sample"]
PREDICTION_TYPES: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")


def x0_from(prediction: Tensor, x: Tensor, sigma: Tensor, prediction_type: PredictionType) -> Tensor:
    """Clean latent (B, C, H, W) from a network's output at x with sigma (B,)."""
    s, a = like(sigma, x), like(alpha(sigma), x)
    if prediction_type == "epsilon":
        return x - s * prediction
    if prediction_type == "v_prediction":
        return a * a * x - a * s * prediction
    return prediction


def velocity_from(prediction: Tensor, x: Tensor, sigma: Tensor, prediction_type: PredictionType) -> Tensor:
    """Velocity v from a network's output; from x0 it needs sigma > 0, where v carries the noise."""
    s, a = like(sigma, x), like(alpha(sigma), x)
    if prediction_type == "epsilon":
        return prediction / a - s * a * x
    if prediction_type == "v_prediction":
        return prediction
    return (a * a * x - prediction) / (a * s)


def prediction_from_velocity(
    velocity: Tensor, x: Tensor, sigma: Tensor, prediction_type: PredictionType
) -> Tensor:
    """Inverse of :func:`velocity_from`."""
    s, a = like(sigma, x), like(alpha(sigma), x)
    if prediction_type == "epsilon":
        return a * (velocity + s * a * x)
    if prediction_type == "v_prediction":
        return velocity
    return a * a * x - a * s * velocity
