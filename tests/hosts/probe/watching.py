"""Nodes that look over the host's shoulder: what is evaluated, what stays behind, and too little memory."""

import json
from pathlib import Path

from comfy.patcher_extension import WrappersMP


class Watch:
    """The model, writing a line of JSON for each evaluation of its network: rows and noise level."""

    CATEGORY = "probe"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "watch"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "path": ("STRING", {})}}

    def watch(self, model, path):
        def apply_model(executor, x, t, *args, **kwargs):
            with open(path, "a", encoding="utf-8") as file:
                print(json.dumps({"rows": len(x), "sigma": float(t[0])}), file=file)
            return executor(x, t, *args, **kwargs)

        watched = model.clone()
        watched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "probe", apply_model)
        return (watched,)


class Leftovers:
    """What a run must not leave in a model that others share, as JSON in a file."""

    CATEGORY = "probe"
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "look"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "after": ("LATENT",), "path": ("STRING", {})}}

    def look(self, model, after, path):
        modules = list(model.model.modules())
        found = {
            "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules),
            "guidance": getattr(model.model.diffusion_model.time_embed, "w", None) is not None,
            "wrappers": sorted(model.model_options["transformer_options"].get("wrappers", {})),
        }
        Path(path).write_text(json.dumps(found), encoding="utf-8")
        return {}


class LittleMemory:
    """The model, loaded as on a graphics card without room for it: its weights are cast at each use."""

    CATEGORY = "probe"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "limit"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def limit(self, model):
        limited = model.clone()
        load = limited.load

        def load_little(device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
            return load(device_to, 1, force_patch_weights, False)

        limited.load = load_little
        return (limited,)


NODE_CLASS_MAPPINGS = {
    "ProbeWatch": Watch,
    "ProbeLeftovers": Leftovers,
    "ProbeLittleMemory": LittleMemory,
}
