"""A tiny decoder in ComfyUI's own hands: its previewer and its VAE loader decode as the toolkit does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hosts.comfyui import Host
from safetensors.torch import load_file, save_file

from toolkit.training.networks import decode_latents
from toolkit.training.tiny import new_tiny, taesd_tensors

SCALE = 0.18215
WORKER = """
import sys
folder = sys.argv[1]
sys.argv = [sys.argv[0], "--cpu"]
import torch

sys.path.insert(0, "")
import comfy.options

comfy.options.enable_args_parsing()
import folder_paths
import nodes
from comfy.taesd.taesd import TAESD
from safetensors.torch import load_file, save_file

folder_paths.add_model_folder_path("vae_approx", folder + "/vae_approx")
x0, picture = (load_file(folder + "/asked.safetensors")[name] for name in ("x0", "picture"))
with torch.inference_mode():
    previewer = TAESD(None, folder + "/vae_approx/taesd_decoder.safetensors", latent_channels=4)
    shown = previewer.decode(x0[:1])
    assert "taesd" in nodes.VAELoader.vae_list(nodes.VAELoader)
    vae = nodes.VAELoader().load_vae("taesd")[0]
    answers = {"shown": shown, "decoded": vae.decode(x0 / 0.18215), "encoded": vae.encode(picture)}
answers = {name: value.float().contiguous() for name, value in answers.items()}
save_file(answers, folder + "/answers.safetensors")
"""


def test_previews_and_load_vae_take_its_files(comfyui_host: Host, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny: Any = new_tiny({"block_out_channels": (128, 256, 512, 512), "latent_channels": 4})
    (tmp_path / "vae_approx").mkdir()
    for side in ("encoder", "decoder"):
        save_file(taesd_tensors(tiny, side), tmp_path / "vae_approx" / f"taesd_{side}.safetensors")
    x0, picture = torch.randn(1, 4, 6, 4), torch.rand(1, 3, 48, 32)
    save_file({"x0": x0, "picture": picture.movedim(1, -1).contiguous()}, tmp_path / "asked.safetensors")
    comfyui_host.run_script(WORKER, tmp_path)
    answers = load_file(tmp_path / "answers.safetensors")
    expected = decode_latents(x0, tiny)
    torch.testing.assert_close((answers["shown"] / 2 + 0.5).clamp(0, 1), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(answers["decoded"].movedim(-1, 1), expected, rtol=0, atol=1e-4)
    with torch.no_grad():
        encoded = tiny.encode(picture * 2 - 1, return_dict=False)[0]
    torch.testing.assert_close(answers["encoded"] * SCALE, encoded, rtol=0, atol=1e-4)
