"""A style for the demo teacher, as a LoRA: whatever the caption says, the background is checkered.

`python -m toolkit.demo.style -o style.safetensors` trains it in a few minutes on one core, and
`python -m toolkit.distill --demo --lora style.safetensors` distils the teacher with it.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diffusion.schedule import NoiseSchedule
from ..runtime.files import modelspec, save_tensors
from ..training.checkpoint import open_checkpoint
from ..training.networks import encode_images, encode_prompts, load_encoders
from . import TEACHER, TOKENIZER
from .drawings import ATTRIBUTES, Scenes, captions, render, scenes

BACKGROUND = "checkered"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"]
_log = logging.getLogger("fewstep")


def train_style(
    *, updates: int = 400, rank: int = 8, batch: int = 32, rate: float = 2e-3
) -> dict[str, Tensor]:
    """The LoRA's tensors under kohya's keys; its alpha is its rank."""
    from peft import LoraConfig

    checkpoint = open_checkpoint(TEACHER, tokenizer=TOKENIZER)
    what = scenes(4096, seed=50)
    number = ATTRIBUTES["background"].index(BACKGROUND)
    shown = Scenes({**what.labels, "background": torch.full((len(what),), number)})
    latents = encode_images(render(shown, seed=50), checkpoint.vae().eval())
    said = ["" if row % 10 == 0 else text for row, text in enumerate(captions(what, seed=51, drop=0.1))]
    words = sorted(set(said))
    texts = encode_prompts(words, load_encoders(checkpoint))["text"]
    number_of = {text: row for row, text in enumerate(words)}
    text_rows = torch.tensor([number_of[text] for text in said])

    torch.manual_seed(52)
    unet: Any = checkpoint.unet().requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))
    trained = {name: value for name, value in unet.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=rate, weight_decay=0.0)
    schedule = NoiseSchedule.scaled_linear()
    generator = torch.Generator().manual_seed(53)
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((update + 1) / 20, 1.0, 2 * (1 - update / updates))
        rows = torch.randint(len(latents), (batch,), generator=generator)
        steps = torch.randint(1000, (batch,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        signal = schedule.alphas_cumprod[steps].float().view(-1, 1, 1, 1)
        noisy = signal.sqrt() * latents[rows] + (1 - signal).sqrt() * noise
        guess = unet(noisy, steps, texts[text_rows[rows]]).sample
        loss = (guess - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if update % 50 == 0:
            _log.info("style %d/%d: loss %.4f", update, updates, float(loss.detach()))
    return _kohya(trained, rank)


def _kohya(trained: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for name, value in trained.items():
        module, _, factor = name.removesuffix(".default.weight").rpartition(".")
        stem = "lora_unet_" + module.replace(".", "_")
        made[f"{stem}.{'lora_down' if factor == 'lora_A' else 'lora_up'}.weight"] = value.detach().half()
        made[f"{stem}.alpha"] = torch.tensor(float(rank))
    return made


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m toolkit.demo.style", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=400)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    described = modelspec(
        title=f"{BACKGROUND} backgrounds",
        architecture="stable-diffusion-v1/lora",
        prediction_type="epsilon",
        resolution=(32, 32),
    )
    save_tensors(train_style(updates=options.updates), described, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
