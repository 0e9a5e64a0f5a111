"""Graphs between files: a test's own tensors go into a graph, and the host's come back exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hosts.comfyui import ComfyUI, Graph, Node, Run
from hosts.models import Model
from torch import Tensor

from toolkit.runtime.files import load_tensors, save_tensors

Link = list[Any]


class Bench:
    """A graph under construction; :meth:`run` adds what saves its results, and runs it."""

    def __init__(self, comfyui: ComfyUI, folder: Path) -> None:
        self.comfyui, self.folder, self.graph, self.files = comfyui, folder, Graph(), 0
        self.last: Run | None = None

    def __call__(self, class_type: str, /, **inputs: Any) -> Node:
        return self.graph(class_type, **inputs)

    def load(self, model: Model) -> Node:
        """The stock loader: outputs MODEL, CLIP, VAE."""
        return self("CheckpointLoaderSimple", ckpt_name=model.name)

    def conditioning(self, cond: Tensor, **more: Tensor) -> Link:
        return self("ProbeLoadConditioning", path=self._file({"cond": cond, **more}))[0]

    def latent(self, samples: Tensor, **more: Tensor) -> Link:
        return self("ProbeLoadLatent", path=self._file({"samples": samples, **more}))[0]

    def picture(self, image: Tensor, mask: Tensor) -> Node:
        """Outputs IMAGE (B, H, W, 3) and MASK (B, H, W)."""
        return self("ProbeLoadPicture", path=self._file({"image": image, "mask": mask}))

    def run(self, **links: Link) -> dict[str, Tensor]:
        """The tensors of a latent, image, sigmas or conditioning; the run itself is :attr:`last`.

        Afterwards the graph can be extended and run again.
        """
        self.files += 1
        path = self.folder / f"result-{self.files}.safetensors"
        self("ProbeSave", path=str(path), **links)
        self.last = self.comfyui.run(self.graph)
        return load_tensors(path)

    def sampled(self, link: Link) -> Tensor:
        return self.run(latent=link)["samples"]

    def _file(self, tensors: dict[str, Tensor]) -> str:
        self.files += 1
        path = self.folder / f"input-{self.files}.safetensors"
        save_tensors(tensors, {}, path)
        return str(path)


def random_conditioning(seed: int) -> Tensor:
    """(1, 77, 768), of unit variance as CLIP's output nearly is."""
    return torch.randn((1, 77, 768), generator=torch.Generator().manual_seed(seed))


def random_latent(seed: int, *, batch: int = 1, size: tuple[int, int] = (8, 8)) -> Tensor:
    """A picture's latent, unscaled, as a host's LATENT is."""
    return 5 * torch.randn((batch, 4, *size), generator=torch.Generator().manual_seed(seed))


def random_picture(seed: int) -> tuple[Tensor, Tensor]:
    """A picture of 64 x 64 pixels, smooth enough for a VAE, and a mask: hard edges, and a soft ramp."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((1, 3, 8, 8), generator=generator)
    image = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear").movedim(1, -1)
    mask = torch.zeros(1, 64, 64)
    mask[:, 8:40, 16:56] = 1
    mask[:, 40:] = torch.linspace(0, 1, 64)
    return image.contiguous(), mask
