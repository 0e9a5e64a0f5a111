"""What sampling a student costs in ComfyUI; run by the host's Python in its folder.

``python measure_sampling.py REPOSITORY STUDENT ROUNDS`` prints JSON: seconds of processor time for 4 bare
UNet forwards, for the host's own Euler without a wrapper (4 steps, cfg 1, on the same weights as an ordinary
model) and for the sampler fewstep on the student (cfg 7), one after the other in each round.
"""

import importlib
import json
import sys
import time
import types
from pathlib import Path

repository, student, rounds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, "")

import comfy.options  # noqa: E402
import torch  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402

STEPS, SIZE = 4, 16


class Server:
    instance = None


sys.modules["server"] = types.ModuleType("server")
sys.modules["server"].PromptServer = Server
for name, path in (("pack", repository), ("pack.nodes", repository / "nodes")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(path)]

mode = torch.inference_mode()
mode.__enter__()
plain = comfy.sd.load_checkpoint_guess_config(student, output_vae=False, output_clip=False)[0]
host = importlib.import_module("pack.nodes.host")
host.register()
ours = comfy.sd.load_checkpoint_guess_config(student, output_vae=False, output_clip=False)[0]
assert host.student_of(plain) is None and host.student_of(ours) is not None

context = torch.randn(1, 77, 768)
latent = torch.zeros(1, 4, SIZE, SIZE)
noise = torch.randn(1, 4, SIZE, SIZE)


def sampled(model, cfg, sampler, scheduler):
    positive = negative = [[context, {}]]
    return comfy.sample.sample(
        model, noise, STEPS, cfg, sampler, scheduler, positive, negative, latent, disable_pbar=True, seed=0
    )


def bare():
    unet = ours.model.diffusion_model
    for timestep in (999.0, 749.0, 499.0, 249.0):
        unet(noise, torch.tensor([timestep]), context=context)


def stock():
    sampled(plain, 1.0, "euler", "simple")


def student_run():
    sampled(ours, 7.0, "fewstep", "fewstep")


def seconds(run):
    start = time.process_time()
    run()
    return time.process_time() - start


for run in (bare, stock, student_run):  # once to load and warm up
    run()
table = [[seconds(run) for run in (bare, stock, student_run)] for _ in range(rounds)]
print(json.dumps(dict(zip(("bare", "stock", "student"), zip(*table, strict=True), strict=True))))
