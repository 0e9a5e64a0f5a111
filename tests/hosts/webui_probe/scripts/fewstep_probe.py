"""An extension for the tests: what the host's UNet was asked, what came out, and what the host's state is."""

import hashlib
import json
import time

import torch
from modules import extras, script_callbacks, scripts, sd_models, sd_samplers, shared

SEEN = {"calls": [], "samples": [], "comments": [], "context": None, "loaded": time.time()}


def unet():
    model = shared.sd_model
    inner = model.forge_objects.unet.model if hasattr(model, "forge_objects") else model.model
    return inner.diffusion_model


def watch(module, inputs, named):
    """Each forward of the UNet: rows, timesteps, and what else entered with the first row."""
    timesteps = inputs[1] if len(inputs) > 1 else named["timesteps"]
    context = inputs[2] if len(inputs) > 2 else named["context"]
    SEEN["calls"].append({"rows": len(inputs[0]), "timesteps": timesteps.flatten().tolist()})
    SEEN["context"] = context[:1].float().tolist()
    if SEEN["interrupt"] and len(SEEN["calls"]) == 2:
        shared.state.interrupt()


def watch_unet(_):
    """At each step: a refiner may have brought another UNet."""
    network = unet()
    if not getattr(network, "fewstep_probe", False):
        network.fewstep_probe = True
        network.register_forward_pre_hook(watch, with_kwargs=True)


class Probe(scripts.Script):
    def title(self):
        return "FewStep probe"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        return []

    def before_process(self, p, *args):
        SEEN.update(calls=[], samples=[], comments=[], context=None, interrupt="interrupt" in str(p.prompt))

    def process_before_every_sampling(self, p, *args, **kwargs):
        SEEN["start"] = kwargs["x"].float().tolist()
        for name, tensor in (
            ("mask", getattr(p, "nmask", None)),
            ("concat", getattr(p, "image_conditioning", None)),
        ):
            SEEN[name] = None if tensor is None else torch.as_tensor(tensor).float().tolist()

    def post_sample(self, p, ps, *args):
        if isinstance(ps.samples, torch.Tensor):  # hires fix has pictures instead
            SEEN["samples"].append(ps.samples.float().tolist())

    def postprocess(self, p, processed, *args):
        SEEN["comments"] = list(p.comments)


def state():
    """All of the host's that a picture could change and must not."""
    model = shared.sd_model
    network = unet()
    inner = model.forge_objects.unet.model if hasattr(model, "forge_objects") else model
    kind = getattr(inner, "predictor", None) or getattr(inner, "model_sampling", None)
    weights = hashlib.sha256()
    for key, value in sorted(network.time_embed.state_dict().items()):
        weights.update(key.encode() + value.float().cpu().numpy().tobytes())
    with open(shared.config_filename, "rb") as file:
        config = hashlib.sha256(file.read()).hexdigest()
    return {
        "options": json.loads(json.dumps(shared.opts.data, default=str)),
        "config": config,
        "samplers": [sampler.name for sampler in sd_samplers.all_samplers],
        "hooks": {name: len(module._forward_pre_hooks) for name, module in network.named_modules()},
        "forward": "forward" in vars(network.time_embed),
        "time_embed": weights.hexdigest(),
        "prediction": [str(id(kind)), getattr(kind, "prediction_type", ""), type(kind).__mro__[1].__name__],
        "parameterization": getattr(model, "parameterization", ""),
        "checkpoint": model.sd_checkpoint_info.name,
    }


def merge(a: str, b: str, name: str):
    """The checkpoint merger with its usual settings; what it says."""
    title = {info.name: title for title, info in sd_models.checkpoints_list.items()}
    names = (title[a], title[b], "")
    metadata = extras.read_metadata(*names)
    choices = ("Weighted sum", 0.3, True, name, "safetensors", 0, "None", "", True, True, True, metadata)
    return extras.run_modelmerger("", *names, *choices)[-1]


def routes(_, app):
    app.add_api_route("/probe/seen", lambda: SEEN, methods=["GET"])
    app.add_api_route("/probe/state", state, methods=["GET"])
    app.add_api_route("/probe/merge", merge, methods=["GET"])
    app.add_api_route("/probe/reload", shared.state.request_restart, methods=["GET"])


script_callbacks.on_app_started(routes)
script_callbacks.on_cfg_denoiser(watch_unet)
