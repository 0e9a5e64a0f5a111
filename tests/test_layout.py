"""Key names: diffusers' and the single file's, exact in both directions, for any width and depth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from make_checkpoint import SHAPES, make_tensors
from transformers import CLIPTextConfig, CLIPTextModel

from toolkit.diffusion.errors import BadInput
from toolkit.training.layout import (
    COND_PROJ,
    text_config_from,
    text_from_ldm,
    text_to_ldm,
    unet_config_from,
    unet_from_ldm,
    unet_to_ldm,
    vae_config_from,
    vae_from_ldm,
    vae_to_ldm,
)

CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768},
    "sd15 dial inpainting": {
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 768,
        "time_cond_proj_dim": 256,
        "in_channels": 9,
    },
    "one level": {
        "block_out_channels": (32,),
        "levels": "c",
        "layers_per_block": 1,
        "cross_attention_dim": 16,
    },
    "two": {"block_out_channels": (32, 64), "levels": "cp", "layers_per_block": 3, "cross_attention_dim": 48},
    "attention in the middle": {
        "block_out_channels": (32, 64, 96),
        "levels": "pcp",
        "cross_attention_dim": 8,
    },
    "uneven": {
        "block_out_channels": (32, 32, 64),
        "levels": "ccp",
        "layers_per_block": (1, 2, 3),
        "cross_attention_dim": 8,
    },
    "deep attention": {
        "block_out_channels": (32, 64),
        "levels": "cc",
        "transformer_layers_per_block": (1, 3),
        "cross_attention_dim": 8,
    },
    "no middle, as KOALA 700M": {
        "block_out_channels": (32, 64),
        "levels": "pc",
        "transformer_layers_per_block": (1, 5),
        "mid_block_type": None,
        "cross_attention_dim": 8,
    },
    "a middle without attention, as Vega": {
        "block_out_channels": (32, 64),
        "levels": "pc",
        "transformer_layers_per_block": (1, 2),
        "mid_block_type": "UNetMidBlock2D",
        "cross_attention_dim": 8,
    },
    "uneven depths, as SSD-1B": {
        "block_out_channels": (32, 64, 64),
        "levels": "pcc",
        "layers_per_block": 2,
        "transformer_layers_per_block": ((1, 1), (2, 2), (4, 4)),
        "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), (1, 1, 1)),
        "mid_block_type": "UNetMidBlock2D",
        "cross_attention_dim": 8,
    },
    "linear": {"block_out_channels": (32, 64), "levels": "cc", "use_linear_projection": True},
}
VAES = {"sd15": ((128, 256, 512, 512), 2), "one": ((32,), 1), "three": ((32, 64, 96), 3)}


def meta_unet(*, levels: str = "cccp", **config: Any) -> UNet2DConditionModel:
    kinds = {"c": CROSS, "p": PLAIN}
    blocks = {
        "down_block_types": tuple(kinds[level][0] for level in levels),
        "up_block_types": tuple(kinds[level][1] for level in reversed(levels)),
    }
    with torch.device("meta"):
        return UNet2DConditionModel(attention_head_dim=8, **blocks, **config)


def meta_vae(widths: tuple[int, ...], layers: int) -> AutoencoderKL:
    n = len(widths)
    with torch.device("meta"):
        return AutoencoderKL(
            block_out_channels=widths,
            layers_per_block=layers,
            down_block_types=("DownEncoderBlock2D",) * n,
            up_block_types=("UpDecoderBlock2D",) * n,
        )


def shapes(state: Any) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items()}


@pytest.mark.parametrize("name", UNETS)
def test_a_unets_keys_and_configuration_survive_the_round_trip(name: str) -> None:
    state = meta_unet(**UNETS[name]).state_dict()
    ldm = unet_to_ldm(state)
    back = unet_from_ldm(ldm)
    assert list(back) == list(state) and all(back[key] is state[key] for key in state)
    with torch.device("meta"):
        rebuilt = UNet2DConditionModel(**unet_config_from(ldm))
    assert shapes(rebuilt.state_dict()) == shapes(state)


@pytest.mark.parametrize("name", VAES)
def test_a_vaes_keys_and_configuration_survive_the_round_trip(name: str) -> None:
    state = meta_vae(*VAES[name]).state_dict()
    ldm = vae_to_ldm(state)
    back = vae_from_ldm(ldm)
    assert list(back) == list(state) and shapes(back) == shapes(state)
    width = VAES[name][0][-1]
    assert ldm["first_stage_model.decoder.mid.attn_1.q.weight"].shape == (width, width, 1, 1)
    with torch.device("meta"):
        rebuilt = AutoencoderKL(**vae_config_from(ldm))
    assert shapes(rebuilt.state_dict()) == shapes(state)


def test_values_survive_the_round_trip() -> None:
    tensors = make_tensors(dial=1.0)
    rebuilt = unet_to_ldm(unet_from_ldm(tensors)) | vae_to_ldm(vae_from_ldm(tensors))
    rebuilt |= text_to_ldm(text_from_ldm(tensors))
    assert set(rebuilt) == set(tensors)
    assert all(torch.equal(rebuilt[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_the_text_encoder_is_named_alike_whichever_transformers_wrote_it(prefix: str) -> None:
    config = SHAPES["tiny"].text
    with torch.device("meta"):
        model = CLIPTextModel(CLIPTextConfig(**config))
    bare = {key.removeprefix("text_model."): value for key, value in model.state_dict().items()}
    ldm = text_to_ldm({prefix + key: value for key, value in bare.items()})
    assert "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc2.bias" in ldm
    back = text_from_ldm(ldm)
    assert shapes(back) == {key: value.shape for key, value in bare.items() if "position_ids" not in key}
    found = text_config_from(ldm)
    assert {name: found[name] for name in config} == dict(config)


def test_early_text_encoders_without_the_text_model_level_are_read() -> None:
    early = {"cond_stage_model.transformer.final_layer_norm.bias": torch.zeros(3)}
    assert list(text_from_ldm(early)) == ["final_layer_norm.bias"]


def test_names_at_the_true_shape_are_those_that_diffusers_own_loader_reads() -> None:
    unet, vae = meta_unet(**UNETS["sd15"]), meta_vae(*VAES["sd15"])
    ldm = unet_to_ldm(unet.state_dict()) | vae_to_ldm(vae.state_dict())
    theirs = single_file_utils.convert_ldm_unet_checkpoint(dict(ldm), config=dict(unet.config))
    assert shapes(theirs) == shapes(unet.state_dict())
    theirs = single_file_utils.convert_ldm_vae_checkpoint(dict(ldm), config=dict(vae.config))
    assert shapes(theirs) == shapes(vae.state_dict())
    with torch.device("meta"):
        text = text_to_ldm(CLIPTextModel(CLIPTextConfig(**SHAPES["sd15"].text)).state_dict())
    assert single_file_utils.CHECKPOINT_KEY_NAMES["clip"] in text


def test_values_go_where_diffusers_own_loader_puts_them() -> None:
    tensors = make_tensors()
    config = unet_config_from(tensors)
    theirs = single_file_utils.convert_ldm_unet_checkpoint(dict(tensors), config=config)
    ours = unet_from_ldm(tensors)
    assert set(theirs) == set(ours) and all(torch.equal(theirs[key], ours[key]) for key in ours)
    theirs = single_file_utils.convert_ldm_vae_checkpoint(dict(tensors), config=vae_config_from(tensors))
    ours = vae_from_ldm(tensors)
    assert set(theirs) == set(ours) and all(torch.equal(theirs[key], ours[key]) for key in ours)


def test_sd15_has_the_keys_and_the_parameters_that_it_is_known_for() -> None:
    ldm = unet_to_ldm(meta_unet(**UNETS["sd15"]).state_dict())
    assert len(ldm) == 686 and sum(value.numel() for value in ldm.values()) == 859_520_964
    assert ldm["model.diffusion_model.output_blocks.5.2.conv.weight"].shape == (1280, 1280, 3, 3)
    assert ldm["model.diffusion_model.input_blocks.3.0.op.weight"].shape == (320, 320, 3, 3)
    dial = unet_to_ldm(meta_unet(**UNETS["sd15 dial inpainting"]).state_dict())
    assert dial[COND_PROJ].shape == (320, 256)
    assert unet_config_from(dial)["time_cond_proj_dim"] == 256 and unet_config_from(dial)["in_channels"] == 9


def test_a_key_that_belongs_nowhere_is_named() -> None:
    tensors = make_tensors()
    with pytest.raises(BadInput, match=r"middle_block\.7\.strange"):
        unet_from_ldm(tensors | {"model.diffusion_model.middle_block.7.strange": torch.zeros(1)})
    with pytest.raises(BadInput, match="no Stable Diffusion UNet"):
        unet_config_from({"model.diffusion_model.x": torch.zeros(1)})
