"""The demo's inpainting teacher: the demo teacher with five more input channels, trained on to use them.

As Stable Diffusion's inpainting models were made: the first convolution gets zeros for the mask and the
masked picture's latent, so training starts from a network that ignores both, and goes on with the teacher's
own objective (see `teacher`) on drawings under random masks. Only the U-Net is trained; text encoder and
autoencoder stay the demo teacher's.

The stored one is `python -m toolkit.demo.train --inpaint`: 3,000 updates of 64 of 10,000 drawings, each under
one mask, at most 6e-4, falling over the second half; eleven minutes of one core.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from ..runtime.files import load_tensors, save_tensors
from ..training.checkpoint import open_checkpoint
from ..training.masks import draw_masks, inpaint_cond
from ..training.networks import encode_images, encode_texts
from . import TEACHER, TOKENIZER
from .drawings import SIZE, Scenes, render, scenes
from .storage import write_teacher
from .teacher import Teacher, follow, loss_weights, noised, said_of

PICTURES = 10_000
_log = logging.getLogger("fewstep")


def with_mask_input(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy that takes nine channels, latent, mask and masked latent, and does not mind the last five."""
    wider: Any = UNet2DConditionModel.from_config(dict(unet.config) | {"in_channels": 9})
    state = dict(unet.state_dict())
    old = state["conv_in.weight"]
    state["conv_in.weight"] = torch.cat([old, old.new_zeros(len(old), 5, *old.shape[2:])], dim=1)
    wider.load_state_dict(state)
    return wider


def train_inpainting_teacher(
    keep: Path,
    out: Path,
    *,
    updates: int,
    batch: int = 64,
    rate: float = 6e-4,
    seed: int = 51,
    every: int = 250,
) -> None:
    """Write the averaged teacher to ``out``; the state is kept in the folder ``keep``, and gone on from."""
    opened = open_checkpoint(TEACHER, tokenizer=TOKENIZER)
    torch.manual_seed(seed)
    unet = with_mask_input(opened.unet())
    average = copy.deepcopy(unet).requires_grad_(False).eval()
    text: Any = opened.text_encoder().eval()
    vae, tokenizer = opened.vae().eval(), opened.tokenizer()
    data, what = _data(keep / "masked-latents.safetensors", vae)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
    start, state_path = 0, keep / "inpainting-teacher.state"
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        unet.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["update"]
    weights = loss_weights()
    known: dict[str, Tensor] = {}
    running = 0.0
    for update in range(start, updates):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((update + 1) / 100, 1.0, (1 - update / updates) / 0.5)
        generator = torch.Generator().manual_seed(seed * 1_000_000 + update)
        rows = torch.randint(len(what), (batch,), generator=generator)
        said = said_of(what, rows, generator)
        if fresh := sorted(set(said) - known.keys()):
            known |= zip(fresh, encode_texts(fresh, tokenizer=tokenizer, text_encoder=text), strict=True)
        noisy, noise, steps = noised(data["x0"][rows].float(), generator)
        seen = torch.cat([noisy, data["inpaint"][rows].float()], dim=1)
        guess = unet(seen, steps, torch.stack([known[words] for words in said])).sample
        loss = ((guess - noise).square().mean((1, 2, 3)) * weights[steps]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        follow(average.parameters(), unet.parameters(), min(0.998, (1 + update) / (20 + update)))
        running += (float(loss.detach()) - running) / min(update - start + 1, 200)
        if update % 100 == 0:
            _log.info("inpainting teacher %d/%d: loss %.4f", update, updates, running)
        if (update + 1) % every == 0 or update + 1 == updates:
            state = {"model": unet.state_dict(), "average": average.state_dict(), "update": update + 1}
            torch.save({**state, "optimizer": optimizer.state_dict()}, state_path.with_suffix(".new"))
            state_path.with_suffix(".new").replace(state_path)
            write_teacher(Teacher(average, text, vae, tokenizer), out)


def _data(path: Path, vae: AutoencoderKL) -> tuple[dict[str, Tensor], Scenes]:
    """x0 (N, 4, 8, 8) and inpaint (N, 5, 8, 8) of drawings under random masks, and what they show."""
    what = scenes(PICTURES, seed=50)
    if not path.exists():
        _log.info("encoding %d drawings and what their masks leave of them", PICTURES)
        images = render(what, seed=50)
        masks = draw_masks(range(50 * 10**9, 50 * 10**9 + PICTURES), SIZE, SIZE)

        def encode(pictures: Tensor) -> Tensor:
            return encode_images(pictures, vae)

        data = {"x0": encode(images).half(), "inpaint": inpaint_cond(images, masks, encode).half()}
        save_tensors(data, {}, path)
    return load_tensors(path), what
