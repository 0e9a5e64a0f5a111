"""What looks at pictures where nobody can: features for Frechet distances, kernel distances, precision and
recall.

The teacher's own UNet is always at hand and needs no download; Inception and CLIP are the field's yardsticks,
for those who have their weights on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffusion.denoiser import Cond, NetworkDenoiser, expand_cond
from ..diffusion.errors import BadInput
from ..training.networks import UNetNetwork, with_sizes
from .painter import Painter, unit_noise

Eyes = Callable[[Tensor], Tensor]
"""Pictures (N, 3, H, W) in [0, 1] -> features (N, F) float32 on the CPU."""

TIMESTEP, READING_TIMESTEP = 100, 450
"""The noise at which the teacher looks at pictures, and at which it reads prompts out of them."""


@dataclass(frozen=True, eq=False)
class TeacherEyes:
    """A UNet's second block on the way up, averaged over the picture, while it denoises slightly noised
    latents without a prompt. That its activations carry what a picture shows: Tang et al. 2023, "Emergent
    correspondence from image diffusion". On the demo it ranks students more as the judge does than the middle
    block and the blocks on the way down (docs/judging.md).
    """

    painter: Painter
    batch: int = 16

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        network = self._network()
        seen: list[Tensor] = []

        def look(_module: Any, _inputs: Any, output: Tensor) -> None:
            seen.append(output.float().mean((2, 3)).cpu())

        blocks = network.unet.get_submodule("up_blocks")
        hook = list(blocks.children())[:2][-1].register_forward_hook(look)
        try:
            for part in images.split(self.batch):
                self._denoise(part)
        finally:
            hook.remove()
        return torch.cat(seen)

    def _denoise(self, images: Tensor) -> None:
        """One evaluation; every picture gets the same noise, so that only pictures differ."""
        painter, count = self.painter, len(images)
        x0 = painter.encode(images).to(painter.device)
        sigma = painter.schedule.sigma(torch.tensor([TIMESTEP])).to(x0)
        noise = unit_noise(x0.shape, seeds=[0]).to(x0)
        cond = self._told(images, [""])
        painter.denoiser.velocity(x0 + sigma * noise, sigma.expand(count), cond=cond)

    @torch.no_grad()
    def found(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(N,): by how much less the network errs at denoising each picture once it is told the picture's
        prompt. Li et al. 2023, "Your diffusion model is secretly a zero-shot classifier".
        """
        parts: list[Tensor] = []
        for first in range(0, len(images), self.batch):
            rows = slice(first, first + self.batch)
            parts.append(self._found(images[rows], prompts[rows], range(first, len(images))))
        return torch.cat(parts)

    def _found(self, images: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        painter, count = self.painter, len(images)
        x0 = painter.encode(images).to(painter.device)
        sigma = painter.schedule.sigma(torch.tensor([READING_TIMESTEP])).to(x0)
        x = x0 + sigma * unit_noise(x0.shape, seeds=seeds[:count]).to(x0)

        def error(said: Sequence[str]) -> Tensor:
            x0_hat = painter.denoiser(x, sigma.expand(count), cond=self._told(images, said))
            return (x0_hat - x0).float().square().flatten(1).mean(1).cpu()

        return error([""]) - error(prompts)

    def _told(self, images: Tensor, prompts: Sequence[str]) -> Cond:
        """The conditioning of one prompt each, or of one for all, for pictures of this size."""
        count, height, width = len(images), *images.shape[2:]
        cond = {name: rows.to(self.painter.device) for name, rows in self.painter.texts(prompts).items()}
        cond = dict(expand_cond(with_sizes(cond, width=width, height=height), count))
        if self.painter.inpaint:
            cond["inpaint"] = self.painter.seen(None, count, height, width).to(self.painter.device)
        return cond

    def _network(self) -> UNetNetwork:
        denoiser = self.painter.denoiser
        if isinstance(denoiser, NetworkDenoiser) and isinstance(denoiser.network, UNetNetwork):
            return denoiser.network
        raise TypeError(f"{type(denoiser).__name__} is not a UNet's denoiser")


@dataclass(frozen=True, eq=False)
class InceptionEyes:
    """Features of the Inception network that Frechet inception distances are defined by."""

    network: Callable[..., Tensor]
    device: torch.device | str = "cpu"
    batch: int = 32

    @classmethod
    def open(cls, path: Path, device: torch.device | str = "cpu") -> InceptionEyes:
        """From the TorchScript file ``inception-2015-12-05.pt``, as StyleGAN and clean-fid use it."""
        try:
            network = torch.jit.load(path, map_location=device).eval()
        except (OSError, RuntimeError, ValueError) as error:
            raise BadInput(
                f"--inception {path}: no TorchScript file could be read there ({_first_line(error)}); give "
                "inception-2015-12-05.pt"
            ) from None
        return cls(network, device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        parts = [
            self.network(_bytes(part).to(self.device), return_features=True)
            for part in images.split(self.batch)
        ]
        return torch.cat([part.flatten(1).float().cpu() for part in parts])


@dataclass(frozen=True, eq=False)
class Clip:
    """A CLIP model: features, and how well pictures go with texts (Hessel et al. 2021, "CLIPScore")."""

    model: Any
    processor: Any
    batch: int = 32

    @classmethod
    def open(cls, folder: Path, device: torch.device | str = "cpu") -> Clip:
        """From a folder as CLIPModel.save_pretrained and CLIPProcessor.save_pretrained write it."""
        from transformers import CLIPModel, CLIPProcessor

        try:
            model = CLIPModel.from_pretrained(folder, local_files_only=True)
            processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, ImportError) as error:
            raise BadInput(
                f"--clip {folder}: no CLIP model could be read there ({_first_line(error)}); give a folder "
                "with config.json, model.safetensors, the tokenizer and preprocessor_config.json"
            ) from None
        torch.nn.Module.to(model, device).eval()
        return cls(model, processor)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return torch.cat([self._look(part) for part in images.split(self.batch)])

    @torch.no_grad()
    def score(self, images: Tensor, captions: Sequence[str]) -> float:
        """Mean of ``100 max(cos, 0)`` of pictures (N, 3, H, W) and their N captions."""
        texts = self.processor.tokenizer(
            list(dict.fromkeys(captions)), padding=True, truncation=True, return_tensors="pt"
        ).to(self.model.device)
        rows = F.normalize(_embedding(self.model.get_text_features(**texts)).float().cpu(), dim=-1)
        place = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
        told = rows[[place[caption] for caption in captions]]
        cosine = (F.normalize(self(images), dim=-1) * told).sum(1)
        return float(100 * cosine.clamp(min=0).mean())

    def _look(self, images: Tensor) -> Tensor:
        pixels = self.processor.image_processor(list(_bytes(images)), return_tensors="pt")
        return _embedding(self.model.get_image_features(**pixels.to(self.model.device))).float().cpu()


def _embedding(answer: Any) -> Tensor:
    """transformers 5 wraps the projected embedding in an output object."""
    return answer if isinstance(answer, Tensor) else answer.pooler_output


def _bytes(images: Tensor) -> Tensor:
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
