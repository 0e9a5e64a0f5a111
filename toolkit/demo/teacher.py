"""The demo's teacher: a latent diffusion model of the drawings, SD1's architecture in miniature.

Ho et al. 2020's epsilon loss on SD's scaled-linear schedule, 10 % of the captions dropped for classifier-free
guidance (Ho & Salimans 2022). Its weight, 1 / (SNR + 0.1) + 0.3 min(SNR, 5) / SNR, adds to Hang et al. 2023's
min-SNR a share for the noisiest steps, where the layout is decided. U-Net and text encoder are trained
together; what is kept is their exponential moving average. The training captions are partly wrong, which is
why guidance is needed.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..diffusion.schedule import NoiseSchedule
from .drawings import Scenes, captions
from .vocabulary import LENGTH

CONTEXT = 128
WIDTHS = (64, 96)
CAPTION_NOISE = 0.06
CAPTION_DROP = 0.08
UNCONDITIONAL = 0.1
_log = logging.getLogger("fewstep")


@dataclass(frozen=True)
class Teacher:
    """The three networks and the tokenizer, as one thing."""

    unet: UNet2DConditionModel
    text: CLIPTextModel
    vae: AutoencoderKL
    tokenizer: CLIPTokenizer


def new_unet() -> UNet2DConditionModel:
    """An untrained U-Net over 8 x 8 x 4 latents: cross-attention inside and in the middle, 8 heads."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=WIDTHS,
        layers_per_block=1,
        cross_attention_dim=CONTEXT,
        attention_head_dim=8,
        norm_num_groups=32,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained two-layer CLIP text encoder for the demo's vocabulary."""
    ids: list[int] = tokenizer("")["input_ids"]  # start and end
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=CONTEXT,
            intermediate_size=4 * CONTEXT,
            num_hidden_layers=2,
            num_attention_heads=CONTEXT // 64,
            max_position_embeddings=LENGTH,
            hidden_act="quick_gelu",
            bos_token_id=ids[0],
            eos_token_id=ids[-1],
            pad_token_id=ids[-1],
        )
    )


def tokens(tokenizer: CLIPTokenizer, texts: Iterable[str]) -> Tensor:
    """Padded token ids, int64 (B, LENGTH)."""
    padded = tokenizer(list(texts), padding="max_length", truncation=True, max_length=LENGTH)
    return torch.tensor(padded["input_ids"])


def loss_weights() -> Tensor:
    """(1000,): the weight of an epsilon error at each timestep."""
    noise_levels = NoiseSchedule.scaled_linear().alphas_cumprod.float()
    snr = noise_levels / (1 - noise_levels)
    return 1 / (snr + 0.1) + 0.3 * snr.clamp(max=5) / snr


def noised(latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Unit-variance noisy latents, their noise and timesteps (B,)."""
    batch, noise_levels = len(latents), NoiseSchedule.scaled_linear().alphas_cumprod.float()
    # one timestep in each of `batch` equal ranges: less variance than independent ones
    even = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    steps = (even * 1000).long().clamp(max=999)
    noise = torch.randn(latents.shape, generator=generator)
    level = noise_levels[steps].view(-1, 1, 1, 1)
    return level.sqrt() * latents + (1 - level).sqrt() * noise, noise, steps


def said_of(what: Scenes, rows: Tensor, generator: torch.Generator) -> list[str]:
    """The training captions of the scenes ``rows``: partly wrong, cut short or left out."""
    chosen = Scenes({name: label[rows] for name, label in what.labels.items()})
    said = captions(chosen, seed=generator.initial_seed(), noise=CAPTION_NOISE, drop=CAPTION_DROP)
    silent = torch.rand(len(rows), generator=generator) < UNCONDITIONAL
    return ["" if quiet else words for quiet, words in zip(silent.tolist(), said, strict=True)]


def follow(averages: Iterable[Tensor], values: Iterable[Tensor], decay: float) -> None:
    """One update of exponential moving averages, in place."""
    for average, value in zip(averages, values, strict=True):
        average.lerp_(value.detach(), 1 - decay)


def train_teacher(
    latents: Tensor,
    what: Scenes,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    keep: Path,
    *,
    updates: int,
    batch: int = 64,
    rate: float = 1.2e-3,
    seed: int = 31,
    every: int = 500,
    on_keep: Callable[[Teacher, int], None] | None = None,
) -> Teacher:
    """The averaged teacher, trained on unit-variance `latents` (N, 4, 8, 8) of the scenes `what`.

    The learning rate warms up, stays and falls linearly over the last 35 % of `updates`. The state is kept in
    `keep` every `every` updates (training goes on from there if the file exists), and `on_keep` sees the
    average so far.
    """
    torch.manual_seed(seed)
    unet, text = new_unet(), new_text_encoder(tokenizer)
    unet.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    both = nn.ModuleList((unet, text))
    teacher = copy.deepcopy(Teacher(unet, text, vae, tokenizer))
    average = nn.ModuleList((teacher.unet, teacher.text)).requires_grad_(False).eval()
    parameters, averaged = list(both.parameters()), list(average.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    start = 0
    if keep.exists():
        state = torch.load(keep, weights_only=True)
        both.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["update"]
    weights = loss_weights()
    known: dict[str, Tensor] = {}
    running = 0.0
    for update in range(start, updates):
        progress = update / updates
        for group in optimizer.param_groups:
            group["lr"] = rate * min((update + 1) / 200, 1.0, (1 - progress) / 0.35)
        generator = torch.Generator().manual_seed(seed * 1_000_000 + update)
        rows = torch.randint(len(latents), (batch,), generator=generator)
        said = said_of(what, rows, generator)
        known |= {words: tokens(tokenizer, [words])[0] for words in set(said) - known.keys()}
        noisy, noise, steps = noised(latents[rows], generator)
        cond = text(torch.stack([known[words] for words in said])).last_hidden_state
        guess = unet(noisy, steps, cond).sample
        loss = ((guess - noise).square().mean((1, 2, 3)) * weights[steps]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        follow(averaged, parameters, min(0.999, (1 + update) / (20 + update)))
        running += (float(loss.detach()) - running) / min(update - start + 1, 200)
        if update % 100 == 0:
            _log.info("teacher %d/%d: loss %.4f", update, updates, running)
        if (update + 1) % every == 0 or update + 1 == updates:
            state = {"model": both.state_dict(), "average": average.state_dict(), "update": update + 1}
            torch.save({**state, "optimizer": optimizer.state_dict()}, keep.with_suffix(".new"))
            keep.with_suffix(".new").replace(keep)
            if on_keep is not None:
                on_keep(teacher, update + 1)
    return teacher
