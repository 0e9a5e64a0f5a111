"""Makes checkpoints of every family with random weights: fixtures for tests, and true-size files.

``python tests/make_checkpoint.py --shape sd15 --dtype fp16 -o model.safetensors`` writes one.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from toolkit.diffusion.grid import trailing_timesteps
from toolkit.diffusion.spec import StudentSpec
from toolkit.runtime.files import save_tensors
from toolkit.training.checkpoint import Checkpoint, write_checkpoint
from toolkit.training.families import SD1, SD2, SDXL, Family, Part, TextPart
from toolkit.training.layout import COND_PROJ, text_to_ldm, with_unused_layers
from toolkit.training.recognise import build, expected_keys
from toolkit.training.shapes import SDXL_UNET
from toolkit.training.vocabulary import byte_symbols

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TINY_VOCABULARY = 2 * 256 + 2


@dataclass(frozen=True)
class Shape:
    """Constructor arguments of the networks that differ from Stable Diffusion 1.5's.

    ``vae`` None: a TAESD in its place, as ComfyUI reads it. ``text_dtype``: in the file, if not the others'.
    """

    unet: Mapping[str, Any]
    vae: Mapping[str, Any] | None
    text: Mapping[str, Any]
    text_dtype: torch.dtype | None = None
    family: Family = SD1
    text_2: Mapping[str, Any] | None = None
    size: int = 32

    def encoder(self, part: TextPart) -> Mapping[str, Any]:
        return (self.text_2 or {}) if part == "text_encoder_2" else self.text


_VAE_LEVELS = {
    n: {"down_block_types": ("DownEncoderBlock2D",) * n, "up_block_types": ("UpDecoderBlock2D",) * n}
    for n in (2, 4)
}
_SD15_UNET = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "layers_per_block": 2}
_SD15_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, **_VAE_LEVELS[4]}
_CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
_TWO_LEVELS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
}
_SMALL_UNET = {"block_out_channels": (320, 320), "cross_attention_dim": 768, **_TWO_LEVELS}
_VIT_H = {
    **_CLIP_L,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
_BIG_G = {
    **_VIT_H,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
_SD21_UNET = {
    **_SD15_UNET,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
_TINY_VAE = {"block_out_channels": (32, 64), "layers_per_block": 1, **_VAE_LEVELS[2]}
_TINY_TEXT = {
    "vocab_size": TINY_VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "max_position_embeddings": 24,
    "hidden_act": "quick_gelu",
    "bos_token_id": TINY_VOCABULARY - 2,
    "eos_token_id": TINY_VOCABULARY - 1,
    "pad_token_id": TINY_VOCABULARY - 1,
}
_TINY_BIG_G = {
    **_TINY_TEXT,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "hidden_act": "gelu",
    "projection_dim": 48,
}
_TINY_SDXL_UNET = {
    **SDXL_UNET,
    "block_out_channels": (64, 128),
    "cross_attention_dim": 64 + 128,
    "layers_per_block": 1,
    "attention_head_dim": (1, 2),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "projection_class_embeddings_input_dim": 48 + 6 * 256,
}
_TINY_SD2_UNET = {
    "block_out_channels": (64, 128),
    "cross_attention_dim": 64,
    "attention_head_dim": (1, 2),
    "use_linear_projection": True,
    **_TWO_LEVELS,
}
SHAPES = {
    # The narrowest UNets that ComfyUI's classes of the families take for students; the rest is tiny.
    "comfy-sd2": Shape(
        {
            **_TINY_SD2_UNET,
            "block_out_channels": (320, 320),
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 5),
        },
        _TINY_VAE,
        {**_TINY_TEXT, "hidden_size": 1024, "num_attention_heads": 16, "hidden_act": "gelu"},
        family=SD2,
    ),
    "comfy-sdxl": Shape(
        {**SDXL_UNET, "block_out_channels": (320, 64, 64), "attention_head_dim": (5, 1, 1)},
        _TINY_VAE,
        {**_TINY_TEXT, "num_hidden_layers": 3, "hidden_size": 768, "num_attention_heads": 12},
        family=SDXL,
        text_2={**_TINY_BIG_G, "hidden_size": 1280, "num_attention_heads": 20, "projection_dim": 1280},
    ),
    # The narrowest SDXL of a stock ComfyUI, which knows it by its 70 transformer blocks: 250 M parameters.
    "stock-sdxl": Shape(
        {**SDXL_UNET, "block_out_channels": (320, 320, 320), "attention_head_dim": (5, 5, 5)},
        _TINY_VAE,
        {**_TINY_TEXT, "num_hidden_layers": 3, "hidden_size": 768, "num_attention_heads": 12},
        family=SDXL,
        text_2={**_TINY_BIG_G, "hidden_size": 1280, "num_attention_heads": 20, "projection_dim": 1280},
    ),
    "sd21": Shape(_SD21_UNET, _SD15_VAE, _VIT_H, family=SD2, size=768),
    "sdxl": Shape(SDXL_UNET, _SD15_VAE, _CLIP_L, family=SDXL, text_2=_BIG_G, size=1024),
    "tiny-sd2": Shape(_TINY_SD2_UNET, _TINY_VAE, {**_TINY_TEXT, "hidden_act": "gelu"}, family=SD2),
    "tiny-sdxl": Shape(
        _TINY_SDXL_UNET, _TINY_VAE, {**_TINY_TEXT, "num_hidden_layers": 3}, family=SDXL, text_2=_TINY_BIG_G
    ),
    "sd15": Shape(_SD15_UNET, _SD15_VAE, _CLIP_L, size=512),
    # The smallest UNet that a stock ComfyUI takes for SD1.5 (36.7 M parameters); the rest is true to size.
    "small": Shape(_SMALL_UNET, _SD15_VAE, _CLIP_L),
    # The same with the smallest VAE and the smallest file of the text encoder that it takes: 274 MB in fp32.
    "comfy": Shape(_SMALL_UNET, None, _CLIP_L, torch.float8_e4m3fn),
    "tiny": Shape(
        {"block_out_channels": (32, 64), "cross_attention_dim": 64, **_TWO_LEVELS},
        _TINY_VAE,
        _TINY_TEXT,
    ),
}
TINY = {"sd1": "tiny", "sd2": "tiny-sd2", "sdxl": "tiny-sdxl"}
"""The smallest shape of each family."""


def make_tensors(
    shape: str = "tiny",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    in_channels: int = 4,
    dial: float | None = None,
    parts: Iterable[Part] | None = None,
) -> dict[str, Tensor]:
    """A checkpoint's tensors under single-file keys; ``dial``: scale of a random guidance input, if any."""
    of = SHAPES[shape]
    keys: dict[str, Tensor] = {}
    for part in parts or of.family.prefixes:
        keys |= _keys_of(part, of, in_channels)
    if dial is not None:
        keys[COND_PROJ] = torch.empty(of.unet["block_out_channels"][0], 256, device="meta")
    generator = torch.Generator().manual_seed(seed)
    made = {key: random_values(key, tuple(value.shape), generator).to(dtype) for key, value in keys.items()}
    if of.text_dtype is not None:
        text = tuple(encoder.prefix for encoder in of.family.text_encoders)
        made |= {key: value.to(of.text_dtype) for key, value in made.items() if key.startswith(text)}
    if dial is not None:
        made[COND_PROJ] = made[COND_PROJ] * dial
    return made


def make_spec(**changes: Any) -> StudentSpec:
    """The spec of an imagined 4-step student."""
    values: dict[str, Any] = {
        "family": "sd1",
        "prediction_type": "epsilon",
        "method": "progressive",
        "timesteps": trailing_timesteps(4),
        "teacher_sha256": "0" * 64,
        "teacher_name": "random",
    }
    return StudentSpec(**values | changes)


def make_teacher(path: Path, **choices: Any) -> Path:
    """Write a random teacher; choices as in :func:`make_tensors`."""
    size = SHAPES[choices.get("shape", "tiny")].size
    save_tensors(make_tensors(**choices), {"modelspec.resolution": f"{size}x{size}"}, path)
    return path


def make_student(path: Path, *, spec: StudentSpec | None = None, dial: float = 1.0, **choices: Any) -> Path:
    """Write a random student whose dial does something; choices as in :func:`make_tensors`."""
    tensors = make_tensors(dial=dial, **choices)
    shape = SHAPES[choices.get("shape", "tiny")]
    spec = spec or make_spec(family=shape.family.key)
    write_checkpoint(path, tensors=tensors, spec=spec, resolution=(shape.size, shape.size))
    return path


def make_tokenizer(folder: Path) -> Path:
    """Write the tiny shape's tokenizer: every byte is a token."""
    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return folder


def keys_of_shape(shape: str) -> dict[str, Tensor]:
    """All single-file keys of a shape, on the meta device."""
    of = SHAPES[shape]
    return {key: value for part in of.family.prefixes for key, value in _keys_of(part, of, 4).items()}


def weightless(shape: str) -> Checkpoint:
    """A teacher of a shape on the meta device."""
    of = SHAPES[shape]
    return Checkpoint(
        path=Path("model.safetensors"),
        name="model",
        kind="teacher",
        family=of.family.key,
        inpaint=False,
        prediction_type="epsilon",
        ztsnr=False,
        spec=None,
        resolution=(of.size, of.size),
        tensors=keys_of_shape(shape),
        configs={},
        tokenizer_from=None,
    )


def _keys_of(part: Part, shape: Shape, in_channels: int) -> dict[str, Tensor]:
    if part == "unet":
        config = {"in_channels": in_channels, "attention_head_dim": 8, **shape.unet}
        return expected_keys(part, build(part, config))
    if part in ("text_encoder", "text_encoder_2"):
        encoder = shape.family.encoder(part)
        network = build(part, shape.encoder(part), shape.family)
        bare = {key.removeprefix("text_model."): value for key, value in network.state_dict().items()}
        bare = {key: value for key, value in bare.items() if "position_ids" not in key}
        return text_to_ldm(with_unused_layers(bare, encoder), encoder)
    if shape.vae is not None:
        return expected_keys(part, build(part, {"latent_channels": 4, **shape.vae}))
    with torch.device("meta"):
        return taesd_to_single_file(AutoencoderTiny().state_dict())


def taesd_to_single_file(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A TAESD's state with the keys under which ComfyUI finds it in a checkpoint.

    Its own decoder counts the clamp at its start as a layer, diffusers' does not.
    """
    made: dict[str, Tensor] = {}
    for key, value in state.items():
        side, _, index, rest = key.split(".", 3)
        number = int(index) + (side == "decoder")
        made[f"first_stage_model.taesd_{side}.{number}.{rest}"] = value
    return made


def random_values(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Scales under which activations stay of order 1, and a VAE whose posterior is almost a point."""
    noise = torch.randn(shape, generator=generator)
    if "quant_conv" in key and "post_" not in key:
        half = shape[0] // 2
        if key.endswith("bias"):
            return torch.cat([0.1 * noise[:half], torch.full((half,), -25.0)])
        return torch.cat([noise[:half] / math.sqrt(shape[1]), torch.zeros_like(noise[half:])])
    if "embedding.weight" in key:
        return 0.5 * noise
    if len(shape) == 1:
        return 0.1 * noise + (1.0 if key.endswith("weight") else 0.0)
    return noise / math.sqrt(noise[0].numel())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="sd15")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--in-channels", type=int, default=4, help="9 for an inpainting model")
    parser.add_argument("--student", action="store_true", help="with a random guidance input and a spec")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    choices = {
        "shape": args.shape,
        "seed": args.seed,
        "in_channels": args.in_channels,
        "dtype": DTYPES[args.dtype],
    }
    if args.student:
        make_student(args.output, spec=make_spec(inpaint=args.in_channels == 9), **choices)
    else:
        make_teacher(args.output, **choices)
    print(f"{args.output}: {args.output.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
