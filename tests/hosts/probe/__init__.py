"""Nodes for the tests alone: conditionings, latents and pictures from files, and results into files.

With them a test feeds a graph and a reference the same numbers, and reads back what the host computed.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from . import watching


class LoadConditioning:
    """``cond`` (B, T, C) of a safetensors file, and what else is in it, such as ``pooled_output``."""

    CATEGORY = "probe"
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"path": ("STRING", {})}}

    def load(self, path):
        found = load_file(path)
        return ([[found.pop("cond"), found]],)


class LoadLatent:
    """``samples``, and ``noise_mask`` or ``batch_index`` if they are there."""

    CATEGORY = "probe"
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"path": ("STRING", {})}}

    def load(self, path):
        latent = load_file(path)
        if "batch_index" in latent:
            latent["batch_index"] = latent["batch_index"].tolist()
        return (latent,)


class LoadPicture:
    """``image`` (B, H, W, 3) and ``mask`` (B, H, W), in 0..1."""

    CATEGORY = "probe"
    RETURN_TYPES = ("IMAGE", "MASK")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"path": ("STRING", {})}}

    def load(self, path):
        found = load_file(path)
        return (found["image"], found["mask"])


class Save:
    """Tensors of whatever is connected, exactly as they are."""

    CATEGORY = "probe"
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "save"

    @classmethod
    def INPUT_TYPES(cls):
        kinds = {"latent": "LATENT", "image": "IMAGE", "sigmas": "SIGMAS", "conditioning": "CONDITIONING"}
        return {
            "required": {"path": ("STRING", {})},
            "optional": {name: (kind, {}) for name, kind in kinds.items()},
        }

    def save(self, path, latent=None, image=None, sigmas=None, conditioning=None):
        found = {**(latent or {}), "image": image, "sigmas": sigmas}
        for i, (cond, extras) in enumerate(conditioning or []):
            found |= {f"{i}.cond": cond, **{f"{i}.{name}": value for name, value in extras.items()}}
        kept = {k: v.contiguous().clone() for k, v in found.items() if isinstance(v, torch.Tensor)}
        partial = Path(path).with_suffix(".partial")
        save_file(kept, partial)
        partial.rename(path)
        return {}


NODE_CLASS_MAPPINGS = {
    "ProbeLoadConditioning": LoadConditioning,
    "ProbeLoadLatent": LoadLatent,
    "ProbeLoadPicture": LoadPicture,
    "ProbeSave": Save,
    **watching.NODE_CLASS_MAPPINGS,
}
