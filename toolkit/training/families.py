"""What a family of checkpoints implies that no shape of its weights tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..diffusion.errors import BadInput
from ..diffusion.prediction import PREDICTION_TYPES, PredictionType

FamilyName = Literal["sd1", "sd2", "sdxl"]
Part = Literal["unet", "vae", "text_encoder", "text_encoder_2"]
TextPart = Literal["text_encoder", "text_encoder_2"]

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."


@dataclass(frozen=True)
class TextEncoder:
    """One text encoder: ``prefix`` of its keys in the single file, in whose ``naming`` they go on.

    ``unused_layers``: so many last ones stand in the file and nobody runs them. ``penultimate``: the UNet
    sees the states before the last layer, not normalised. ``pooled``: it sees the projected end mark too.
    ``pad``: the token that fills up a prompt, None for the end mark.
    """

    part: TextPart
    prefix: str
    naming: Literal["transformers", "open_clip"]
    activation: Literal["quick_gelu", "gelu"]
    unused_layers: int = 0
    penultimate: bool = False
    pooled: bool = False
    pad: str | None = None

    @property
    def usual_clip_skip(self) -> int:
        """The layer that the UNet was trained on, counted from the end: 1 is the last one."""
        return 2 if self.penultimate else 1 + self.unused_layers

    @property
    def tokenizer(self) -> str:
        """Its folder's name beside the encoder's in a diffusers folder."""
        return self.part.replace("text_encoder", "tokenizer")


@dataclass(frozen=True)
class Family:
    """``heads`` of every attention, None for heads of 64 numbers each; sizes are (width, height) in pixels,
    ``portrait`` the one that people ask for beside ``resolution``.

    ``guidance``: the guidance_scale of its stock pipeline.
    ``sizes``: the UNet is told the pooled text and the picture's sizes. ``vae_overflows`` in float16.
    """

    key: FamilyName
    name: str
    text_encoders: tuple[TextEncoder, ...]
    heads: int | None
    scaling_factor: float
    resolution: tuple[int, int]
    portrait: tuple[int, int]
    architecture: str
    guidance: float = 7.5
    sizes: bool = False
    vae_overflows: bool = False

    @property
    def prefixes(self) -> dict[Part, str]:
        """Where each part stands in the single file."""
        parts: dict[Part, str] = {"unet": UNET_PREFIX, "vae": VAE_PREFIX}
        for encoder in self.text_encoders:
            parts[encoder.part] = encoder.prefix
        return parts

    def encoder(self, part: Part) -> TextEncoder:
        return next(encoder for encoder in self.text_encoders if encoder.part == part)


CLIP_L = TextEncoder("text_encoder", "cond_stage_model.transformer.text_model.", "transformers", "quick_gelu")
_SDXL_CLIP_L = TextEncoder(
    "text_encoder",
    "conditioner.embedders.0.transformer.text_model.",
    "transformers",
    "quick_gelu",
    penultimate=True,
)
_VIT_H = TextEncoder("text_encoder", "cond_stage_model.model.", "open_clip", "gelu", unused_layers=1, pad="!")
_BIG_G = TextEncoder(
    "text_encoder_2",
    "conditioner.embedders.1.model.",
    "open_clip",
    "gelu",
    penultimate=True,
    pooled=True,
    pad="!",
)

SD1 = Family(
    "sd1", "Stable Diffusion 1", (CLIP_L,), 8, 0.18215, (512, 512), (512, 768), "stable-diffusion-v1"
)
SD2 = Family(
    "sd2", "Stable Diffusion 2", (_VIT_H,), None, 0.18215, (512, 512), (512, 768), "stable-diffusion-v2"
)
SDXL = Family(
    "sdxl",
    "SDXL",
    (_SDXL_CLIP_L, _BIG_G),
    None,
    0.13025,
    (1024, 1024),
    (832, 1216),
    "stable-diffusion-xl-v1-base",
    guidance=5.0,
    sizes=True,
    vae_overflows=True,
)
FAMILIES: Mapping[str, Family] = {family.key: family for family in (SD1, SD2, SDXL)}
"""Those that can be opened."""

NAMES: Mapping[str, str] = {key: family.name for key, family in FAMILIES.items()} | {
    "sdxl-refiner": "SDXL refiner",
    "playground": "Playground 2.5",
    "unclip": "Stable Diffusion 2 unCLIP",
    "svd": "Stable Video Diffusion",
    "cascade": "Stable Cascade",
    "sd3": "Stable Diffusion 3",
    "flux": "Flux",
    "video": "video",
    "transformer": "diffusion transformer",
}
"""All that are told apart."""

REFUSED: Mapping[str, str] = {
    "sdxl-refiner": "it only finishes what the base began, from the last fifth of the noise on, so it has no "
    "grid of its own to shorten; distil the base",
    "playground": "it was trained with EDM's noise levels, which have no discrete timesteps",
    "svd": "it makes videos from a picture",
    "video": "it makes videos",
    "unclip": "it makes variations of a picture",
}
"""Why some of them cannot be opened."""


def resolution_for(family: Family, prediction_type: PredictionType) -> tuple[int, int]:
    """(width, height) that a family's checkpoints are usually trained for; SD2's v-predicting ones are
    larger."""
    return (768, 768) if family is SD2 and prediction_type == "v_prediction" else family.resolution


def size_ids(width: int, height: int) -> tuple[int, ...]:
    """What a host tells an SDXL UNet of a picture: original size, crop, target size, each (height, width)."""
    return (height, width, 0, 0, height, width)


@dataclass(frozen=True)
class Override:
    """What a person says of a checkpoint, against what was found; None: as found."""

    family: FamilyName | None = None
    prediction_type: PredictionType | None = None
    ztsnr: bool | None = None

    @classmethod
    def parse(cls, text: str | None) -> Override:
        """``family=sd2,prediction_type=v_prediction,ztsnr=true``; BadInput for anything else."""
        said: dict[str, str] = {}
        for entry in filter(None, (text or "").replace(" ", "").split(",")):
            name, _, value = entry.partition("=")
            said[name] = value
        choices = {"family": [*FAMILIES], "prediction_type": [*PREDICTION_TYPES], "ztsnr": ["true", "false"]}
        for name, value in said.items():
            if value not in choices.get(name, ()):
                known = "; ".join(f"{key}={'|'.join(values)}" for key, values in choices.items())
                raise BadInput(f"--override {text}: {name}={value} is unknown; expected {known}")
        ztsnr = said.get("ztsnr")
        return cls(
            family=next((key for key in ("sd1", "sd2", "sdxl") if key == said.get("family")), None),
            prediction_type=next(
                (kind for kind in PREDICTION_TYPES if kind == said.get("prediction_type")), None
            ),
            ztsnr=None if ztsnr is None else ztsnr == "true",
        )
