"""The LCM recipe of diffusers' example scripts, rebuilt to be measured against.

A step has the work of theirs (``train_lcm_distill_sd_wds.py``; ``train_lcm_distill_lora_sd_wds.py`` and their
SDXL siblings), and nothing of what they do at times only:

* captions through the text encoders and pictures through the VAE, in every step and anew in every epoch;
* the teacher twice, one forward after the other, with the caption and without;
* the student once, with gradients, asked with w (full) or without (LoRA);
* the target without gradients: of full training a third network, the student's running average; of a LoRA
  the student itself;
* boundary scalings, pseudo-Huber loss, clipped gradients, AdamW.

Where they leave a choice it is the one that favours them: the teacher and the VAE in the run's precision
(they keep the VAE in float32, and the teacher too unless told), and pictures and captions that are read, cut
and tokenised already. The mathematics is the house's own, in
sigma-space: on latents, it costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..diffusion.denoiser import Cond, Network, NetworkDenoiser, expand_cond
from ..diffusion.grid import Grid
from ..diffusion.prediction import prediction_from_velocity
from ..diffusion.schedule import like
from ..diffusion.solvers import euler_step
from .adapters import LoraShape
from .checkpoint import Checkpoint
from .families import TextEncoder
from .loop import autocast
from .networks import DTYPES, UNetNetwork, place, with_sizes

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel

SOLVER_STEPS = 50
GUIDANCE = (5.0, 15.0)
HUBER = 0.001
DECAY = 0.95
SIGMA_DATA, TIMESTEP_SCALE = 0.5, 10.0


class NewUnet:
    """Makes copies of a teacher's network, and counts the pictures that go through any of them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.made: list[UNet2DConditionModel] = []
        self.evaluations = 0

    def __call__(
        self, *, dtype: torch.dtype, conditioned: bool, exact: str | None = None
    ) -> UNet2DConditionModel:
        """Arguments as of :meth:`Checkpoint.unet`."""
        unet = self._checkpoint.unet(dtype=dtype, conditioned=conditioned, exact=exact)
        unet.register_forward_pre_hook(self._count)
        self.made.append(unet)
        return unet

    def _count(self, module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.evaluations += len(inputs[0])


@dataclass(frozen=True, eq=False)
class _Words:
    """A text encoder on the device."""

    of: TextEncoder
    model: Any


@dataclass(eq=False)
class LcmReference:
    """One run of the recipe; :meth:`step` is what is measured."""

    checkpoint: Checkpoint
    new_unet: NewUnet
    size: tuple[int, int]
    batch: int
    precision: str
    device: torch.device
    lora: LoraShape | None
    recompute: bool
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def __post_init__(self) -> None:
        checkpoint, device, dtype = self.checkpoint, self.device, DTYPES[self.precision]
        self._scaler = torch.GradScaler(device.type, enabled=self.precision == "fp16")
        self._vae: AutoencoderKL = place(checkpoint.vae(checkpoint.vae_dtype(dtype)), device)
        self._vae.requires_grad_(False)
        self._words = [
            _Words(of, place(checkpoint.text_encoder(dtype, part=of.part), device).requires_grad_(False))
            for of in checkpoint.of.text_encoders
        ]
        teacher = place(self.new_unet(dtype=dtype, conditioned=False), device).eval().requires_grad_(False)
        self._teacher = self._denoiser(UNetNetwork(teacher))
        if self.lora is None:
            student = self.new_unet(dtype=torch.float32, conditioned=True)
        else:
            student = _with_lora(self.new_unet(dtype=dtype, conditioned=False), self.lora)
        student = place(student, device).train()
        if self.recompute:
            student.enable_gradient_checkpointing()
        self._student = self._target = self._denoiser(autocast(UNetNetwork(student), device, dtype))
        self._trained: list[Parameter] = [p for p in student.parameters() if p.requires_grad]
        self._averages: list[tuple[Parameter, Parameter]] = []
        if self.lora is None:
            target = self.new_unet(dtype=torch.float32, conditioned=True)
            target = place(target, device).eval().requires_grad_(False)
            self._target = self._denoiser(autocast(UNetNetwork(target), device, dtype))
            self._averages = list(zip(target.parameters(), self._trained, strict=True))
        self._optimizer = torch.optim.AdamW(self._trained, lr=1e-6, weight_decay=1e-2)
        self._grid = Grid.trailing(SOLVER_STEPS, len(checkpoint.schedule))
        self._images = torch.rand(self.batch, 3, self.size[1], self.size[0], generator=self.generator)
        length = checkpoint.config("text_encoder")["max_position_embeddings"]
        # The highest number is the end mark's, which pooled texts are taken from.
        self._tokens = [
            torch.randint(words.model.config.vocab_size - 2, (self.batch, length), generator=self.generator)
            for words in self._words
        ]
        for words, tokens in zip(self._words, self._tokens, strict=True):
            tokens[:, -1] = words.model.config.vocab_size - 1
        self._uncond = self._encoded([tokens[:1] for tokens in self._tokens])

    def step(self) -> float:
        """One update; the loss."""
        x0 = self._pictures()
        cond = self._encoded(self._tokens)
        schedule, points = self.checkpoint.schedule, torch.tensor(self._grid.points)
        index = torch.randint(SOLVER_STEPS, (self.batch,), generator=self.generator)
        t, n = points[index].to(self.device), points[index + 1].clamp(min=0).to(self.device)
        sigma_t, sigma_n = schedule.sigma(t).float(), schedule.sigma(n).float()
        noise = torch.randn(x0.shape, generator=self.generator).to(x0)
        x = x0 + like(sigma_t, x0) * noise
        low, high = GUIDANCE
        w = (low + (high - low) * torch.rand(self.batch, generator=self.generator) - 1).to(self.device)
        told = w if self.lora is None else None
        found = self._bounded(x, t, self._student(x, sigma_t, cond=cond, w=told))
        with torch.no_grad():
            conditional = self._teacher.velocity(x, sigma_t, cond=cond)
            uncond = {**cond, **expand_cond(self._uncond, self.batch)}
            unconditional = self._teacher.velocity(x, sigma_t, cond=uncond)
            velocity = conditional + like(w, x) * (conditional - unconditional)
            guided = prediction_from_velocity(velocity, x, sigma_t, "sample")
            x_n = euler_step(x, guided, sigma_t, sigma_n)
            target = self._bounded(x_n, n, self._target(x_n, sigma_n, cond=cond, w=told))
        loss = (((found - target) ** 2 + HUBER**2).sqrt() - HUBER).mean()
        self._scaler.scale(loss).backward()
        self._scaler.unscale_(self._optimizer)
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for average, value in self._averages:
                average.lerp_(value, 1 - DECAY)
        return float(loss.detach())

    @torch.no_grad()
    def _pictures(self) -> Tensor:
        images = (self._images * 2 - 1).to(self._vae.device, self._vae.dtype)
        encoded: Any = self._vae.encode(images, return_dict=False)[0]
        noise = torch.randn(encoded.mean.shape, generator=self.generator).to(encoded.mean)
        return (encoded.mean + encoded.std * noise).float() * self.checkpoint.scaling_factor

    @torch.no_grad()
    def _encoded(self, tokens: Sequence[Tensor]) -> Cond:
        found: dict[str, Tensor] = {}
        texts: list[Tensor] = []
        for words, rows in zip(self._words, tokens, strict=True):
            answer: Any = words.model(rows.to(self.device), output_hidden_states=words.of.penultimate)
            texts.append(answer.hidden_states[-2] if words.of.penultimate else answer.last_hidden_state)
            if words.of.pooled:
                found["pooled"] = answer.text_embeds.float()
        found["text"] = torch.cat(texts, dim=-1).float()
        return with_sizes(found, width=self.size[0], height=self.size[1])

    def _bounded(self, x: Tensor, timestep: Tensor, x0: Tensor) -> Tensor:
        """``c_skip z + c_out x0``, which is the picture itself at the clean end (Luo et al. 2023)."""
        scaled = timestep.float() * TIMESTEP_SCALE
        c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        c_out = scaled / (scaled**2 + SIGMA_DATA**2).sqrt()
        return like(c_skip, x) * x + like(c_out, x) * x0

    def _denoiser(self, network: Network) -> NetworkDenoiser:
        return NetworkDenoiser(network, self.checkpoint.schedule, self.checkpoint.prediction_type)


def _with_lora(unet: UNet2DConditionModel, shape: LoraShape) -> UNet2DConditionModel:
    """The network frozen, with a low-rank update in float32."""
    from peft import LoraConfig

    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=shape.rank, lora_alpha=shape.rank, target_modules=list(shape.targets)))
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return unet
