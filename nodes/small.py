"""Text encoders and VAEs of Stable Diffusion 1's design in widths that ComfyUI does not know.

ComfyUI builds CLIP-L and the 128-channel VAE from fixed sizes. A student of the built-in demo is smaller, and
so may be others: here the sizes come from the tensors' shapes, and what shapes cannot say follows Stable
Diffusion 1, as in the toolkit (64 numbers an attention head, quick GELU, 32 normalisation groups). Both parts
are ComfyUI's own objects, so memory management, clip skip, tiling and saving go on working. They stay in
float32: networks of this size gain nothing from less, and the pictures are the toolkit's.

Errors do not name the file; who opened it does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import comfy.clip_model
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import torch
from torch import Tensor

from ..toolkit.diffusion.errors import BadInput

TEXT_PREFIX = "cond_stage_model."
VAE_PREFIX = "first_stage_model."

_TEXT = TEXT_PREFIX + "transformer.text_model."
_DEMO_TOKENIZER = Path(__file__).resolve().parents[1] / "toolkit" / "demo" / "tokenizer"
_COMFY_TOKENIZER = Path(comfy.sd1_clip.__file__).with_name("sd1_tokenizer")

_CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "max_position_embeddings": 77,
}
_STOCK_VAE = {"ch": 128, "num_res_blocks": 2, "in_channels": 3, "out_ch": 3}
_STOCK_LEVELS = ([1, 2, 4, 4], [1, 2, 4])


def knows_clip(tensors: Mapping[str, Tensor]) -> bool:
    """Whether stock ComfyUI builds this file's text encoder: CLIP-L, or what is none of ours to judge."""
    if _TEXT + "embeddings.token_embedding.weight" not in tensors:
        return True
    config = _text_config(tensors)
    return all(config[name] == size for name, size in _CLIP_L.items())


def knows_vae(tensors: Mapping[str, Tensor]) -> bool:
    """Whether stock ComfyUI builds this file's VAE: the 128-channel one, or what is none of ours to judge."""
    if VAE_PREFIX + "encoder.down.0.block.0.conv1.weight" not in tensors:
        return True
    config = _vae_config(tensors)
    return config["ch_mult"] in _STOCK_LEVELS and all(
        config[name] == size for name, size in _STOCK_VAE.items()
    )


def small_clip(
    tensors: Mapping[str, Tensor], *, checkpoint: Path, embedding_directory: str | list[str] | None
) -> comfy.sd.CLIP:
    """The text encoder of a single file's state; BadInput if it lacks a vocabulary or its keys do not fit.

    The tokenizer is the folder ``tokenizer`` beside the checkpoint, the demo's, or ComfyUI's: the first with
    as many tokens as the text encoder.
    """
    config = _text_config(tensors)
    vocabulary, length = config["vocab_size"], config["max_position_embeddings"]
    model = partial(
        comfy.sd1_clip.SDClipModel,
        max_length=length,
        textmodel_json_config=config,
        model_class=_TextModel,
        special_tokens={"start": vocabulary - 2, "end": vocabulary - 1, "pad": vocabulary - 1},
        return_projected_pooled=False,
    )
    tokenizer = partial(
        comfy.sd1_clip.SDTokenizer,
        tokenizer_path=str(_tokenizer_folder(checkpoint, vocabulary)),
        max_length=length,
        embedding_size=config["hidden_size"],
        # ComfyUI cuts a long prompt into pieces itself; told the length, transformers would warn of each.
        tokenizer_args={"model_max_length": 8192},
    )
    target = comfy.supported_models_base.ClipTarget(
        partial(comfy.sd1_clip.SD1Tokenizer, tokenizer=tokenizer),
        partial(comfy.sd1_clip.SD1ClipModel, clip_model=model),
    )
    state = _under(tensors, TEXT_PREFIX)
    clip = comfy.sd.CLIP(
        target,
        embedding_directory=embedding_directory,
        parameters=sum(value.numel() for value in state.values()),
        model_options={"dtype": torch.float32},
    )
    with _shapes_that_fit("text encoder"):
        missing, _ = clip.load_sd({f"clip_l.{key}": value for key, value in state.items()}, full_model=True)
    # Checkpoints carry neither: both belong to CLIP's contrastive training, and ComfyUI does not save them.
    unused = ("logit_scale", "text_projection.weight")
    _check_complete(key.replace("clip_l.", TEXT_PREFIX, 1) for key in missing if not key.endswith(unused))
    return clip


def small_vae(tensors: Mapping[str, Tensor]) -> comfy.sd.VAE:
    """The VAE of a single file's state; BadInput if its keys do not fit."""
    config = _vae_config(tensors)
    state = _under(tensors, VAE_PREFIX)
    params = {"ddconfig": config, "embed_dim": config["z_channels"]}
    with _shapes_that_fit("VAE"):
        vae = comfy.sd.VAE(sd=state, config={"params": params}, dtype=torch.float32)
    _check_complete(VAE_PREFIX + key for key in vae.get_sd() if key not in state)
    vae.latent_channels = config["z_channels"]
    vae.downscale_ratio = vae.upscale_ratio = 2 ** (len(config["ch_mult"]) - 1)
    return vae


class _TextModel(comfy.clip_model.CLIPTextModel):
    """ComfyUI's, whose vocabulary has always 49,408 tokens, with as many as the configuration says."""

    def __init__(self, config_dict: dict[str, Any], dtype: Any, device: Any, operations: Any) -> None:
        super().__init__(config_dict, dtype, device, operations)
        size = config_dict["vocab_size"], config_dict["hidden_size"]
        self.set_input_embeddings(operations.Embedding(*size, dtype=dtype, device=device))


def _text_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    vocabulary, hidden = _shape(tensors, _TEXT + "embeddings.token_embedding.weight", 2)
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": _shape(tensors, _TEXT + "encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": _count(tensors, _TEXT + "encoder.layers."),
        "num_attention_heads": max(1, hidden // 64),
        "max_position_embeddings": _shape(tensors, _TEXT + "embeddings.position_embedding.weight", 2)[0],
        "hidden_act": "quick_gelu",
        "eos_token_id": vocabulary - 1,
    }


def _vae_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of ComfyUI's encoder and decoder, which share them."""
    width, in_channels = _shape(tensors, VAE_PREFIX + "encoder.conv_in.weight", 4)[:2]
    widths = [
        _shape(tensors, f"{VAE_PREFIX}encoder.down.{level}.block.0.conv1.weight", 4)[0]
        for level in range(_count(tensors, VAE_PREFIX + "encoder.down."))
    ]
    if any(level % width for level in widths):
        raise BadInput(
            f"the VAE is {', '.join(map(str, widths))} channels wide, and ComfyUI can only run multiples of "
            f"the first width, {width}; load another VAE"
        )
    channels = _shape(tensors, VAE_PREFIX + "decoder.conv_in.weight", 4)[1]
    return {
        "ch": width,
        "ch_mult": [level // width for level in widths],
        "num_res_blocks": _count(tensors, VAE_PREFIX + "encoder.down.0.block."),
        "in_channels": in_channels,
        "out_ch": _shape(tensors, VAE_PREFIX + "decoder.conv_out.weight", 4)[0],
        "z_channels": channels,
        "double_z": True,
        "attn_resolutions": [],
        "resolution": 256,
    }


def _tokenizer_folder(checkpoint: Path, vocabulary: int) -> Path:
    beside = checkpoint.parent / "tokenizer"
    for folder in (beside, _DEMO_TOKENIZER, _COMFY_TOKENIZER):
        if _vocabulary_size(folder) == vocabulary:
            return folder
    raise BadInput(
        f"the text encoder knows {vocabulary} tokens, and no tokenizer of that size was found; put the one "
        f"that belongs to it (vocab.json and merges.txt) into {beside}"
    )


def _vocabulary_size(folder: Path) -> int | None:
    """How many tokens a tokenizer folder has; None if it is none."""
    if not (folder / "merges.txt").is_file() or not (folder / "vocab.json").is_file():
        return None
    try:
        return len(json.loads((folder / "vocab.json").read_text(encoding="utf-8-sig")))
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{folder / 'vocab.json'}: the vocabulary cannot be read ({error})") from None


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _shape(tensors: Mapping[str, Tensor], key: str, dimensions: int) -> tuple[int, ...]:
    if key not in tensors or tensors[key].ndim != dimensions:
        raise BadInput(f"the key {key} is missing or misshapen, so this is no complete Stable Diffusion file")
    return tuple(tensors[key].shape)


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered children a module has."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return max((int(match[1]) for key in tensors if (match := pattern.match(key))), default=-1) + 1


def _check_complete(missing: Iterable[str]) -> None:
    for first in sorted(missing)[:1]:
        raise BadInput(f"the key {first} is missing, so this is no complete Stable Diffusion file")


@contextmanager
def _shapes_that_fit(part: str) -> Generator[None, None, None]:
    """The first of torch's lines on weights that do not fit, as BadInput."""
    try:
        yield
    except RuntimeError as error:
        if (mismatch := re.search(r"size mismatch for .*", str(error))) is None:
            raise
        raise BadInput(
            f"this {part} is none that Stable Diffusion 1 has ({mismatch[0].rstrip('.')})"
        ) from None
