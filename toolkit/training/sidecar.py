"""The .yaml beside a checkpoint, in which A1111 and Forge read what they would otherwise guess: here,
v-prediction."""

from __future__ import annotations

from pathlib import Path

from ..diffusion.errors import BadInput
from .checkpoint import Checkpoint

_FIRST_LINE = "# Written by FewStep: tells A1111 and Forge that the checkpoint of this name predicts v.\n"


def sidecar_path(checkpoint: Path) -> Path:
    return checkpoint.with_suffix(".yaml")


def is_ours(path: Path) -> bool:
    """Whether a .yaml was written here."""
    return path.is_file() and path.read_text(encoding="utf-8", errors="replace").startswith(_FIRST_LINE)


def check_sidecar(checkpoint: Path) -> None:
    """BadInput if a .yaml stands beside the checkpoint that somebody else wrote."""
    if (path := sidecar_path(checkpoint)).exists() and not is_ours(path):
        raise BadInput(
            f"{path}: this exists already and would describe the export; remove it or write elsewhere"
        )


def sidecar(checkpoint: Checkpoint) -> str:
    """The text for a v-prediction checkpoint: classes and parameters of the original code, sizes from its
    shapes."""
    unet, vae, text = (checkpoint.config(part) for part in ("unet", "vae", "text_encoder"))
    widths, layers = unet["block_out_channels"], unet["layers_per_block"]
    heads = f"num_heads: {unet['attention_head_dim']}"
    if checkpoint.of.heads is None:
        heads = "num_head_channels: 64\n        use_linear_in_transformer: true"
    encoder = "FrozenCLIPEmbedder" if checkpoint.family == "sd1" else "FrozenOpenCLIPEmbedder"
    layer = "" if checkpoint.family == "sd1" else "\n        freeze: true\n        layer: penultimate"
    attention = [2**i for i, kind in enumerate(unet["down_block_types"]) if kind.startswith("CrossAttn")]
    resolution = max(checkpoint.resolution)
    return f"""{_FIRST_LINE}model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    parameterization: "v"
    linear_start: 0.00085
    linear_end: 0.012
    timesteps: 1000
    first_stage_key: image
    cond_stage_key: caption
    conditioning_key: {"hybrid" if checkpoint.inpaint else "crossattn"}
    image_size: {resolution // checkpoint.downscale}
    channels: {checkpoint.latent_channels}
    scale_factor: {checkpoint.scaling_factor}
    use_ema: false
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        image_size: {resolution // checkpoint.downscale}
        in_channels: {unet["in_channels"]}
        out_channels: {unet["out_channels"]}
        model_channels: {widths[0]}
        attention_resolutions: {attention}
        num_res_blocks: {list(layers) if isinstance(layers, tuple) else layers}
        channel_mult: {[width // widths[0] for width in widths]}
        {heads}
        use_spatial_transformer: true
        transformer_depth: {unet["transformer_layers_per_block"]}
        context_dim: {unet["cross_attention_dim"]}
        use_checkpoint: false
        legacy: false
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: {vae["latent_channels"]}
        ddconfig:
          double_z: true
          z_channels: {vae["latent_channels"]}
          resolution: {resolution}
          in_channels: {vae["in_channels"]}
          out_ch: {vae["out_channels"]}
          ch: {vae["block_out_channels"][0]}
          ch_mult: {[width // vae["block_out_channels"][0] for width in vae["block_out_channels"]]}
          num_res_blocks: {vae["layers_per_block"]}
          attn_resolutions: []
          dropout: 0.0
        lossconfig:
          target: torch.nn.Identity
    cond_stage_config:
      target: ldm.modules.encoders.modules.{encoder}
      params:
        max_length: {text["max_position_embeddings"]}{layer}
"""
