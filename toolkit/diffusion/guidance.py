"""The guidance weight w = guidance_scale - 1 as a network input, and as a shift of one bias."""

from __future__ import annotations

import math

import torch
from torch import Tensor

W_DIM = 256
W_SCALE = 1000.0


def w_embedding(w: Tensor, *, dim: int = W_DIM, scale: float = W_SCALE) -> Tensor:
    """(B, dim) float32 sinusoid of w (B,): ``[sin(scale w f), cos(scale w f)]``, f from 1 down to 1e-4.

    diffusers' convention (``get_guidance_scale_embedding``), for interchange. float32 whatever w's dtype: in
    bf16 the argument 1000 w would be wrong by whole radians.
    """
    return torch.cat(
        [torch.sin(a := scale * w.float()[:, None] * w_frequencies(dim, w.device)), torch.cos(a)], dim=1
    )


def w_frequencies(dim: int = W_DIM, device: torch.device | str | None = None) -> Tensor:
    """(dim / 2,) float32: ``exp(-i ln(10000) / (dim/2 - 1))``."""
    half = dim // 2
    return torch.exp(
        torch.arange(half, dtype=torch.float32, device=device) * (-math.log(10000.0) / (half - 1))
    )


def smooth_features(*, dim: int = W_DIM, scale: float = W_SCALE) -> Tensor:
    """(dim,) mask of the features that turn by at most one radian a unit of w.

    The faster ones tell w = 3.000 from w = 3.001: for continuous w they are noise, and training leaves their
    columns at zero.
    """
    slow = (w_frequencies(dim) * scale <= 1.0).float()
    return torch.cat([slow, slow])


def bias_shift(
    time_embed_weight: Tensor, cond_proj_weight: Tensor, w: float, *, scale: float = W_SCALE
) -> Tensor:
    """The shift of the first time-embedding bias that stands for one w, exactly: ``W1 P e(w)``, float64.

    ``W1 (sin_t + P e(w)) + b1 = W1 sin_t + (b1 + W1 P e(w))``. Shapes: W1 (E, C), P (C, dim); result (E,).
    """
    embedded = w_embedding(torch.tensor([w]), dim=cond_proj_weight.shape[1], scale=scale)[0].double()
    return time_embed_weight.double() @ (cond_proj_weight.double() @ embedded)
