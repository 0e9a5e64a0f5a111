"""A student of the demo's inpainting teacher: one prompt, picture and mask in ComfyUI and in the toolkit."""

from __future__ import annotations

import torch
from hosts.bench import Bench
from hosts.models import Models
from make_checkpoint import make_spec

from toolkit.demo import INPAINT_TEACHER
from toolkit.demo.drawings import drawings_to_fill
from toolkit.evaluation.painter import Fill, Painter
from toolkit.opening import open_for_people
from toolkit.training.checkpoint import save_student


def test_the_demos_inpainting_student_fills_in_what_the_toolkit_does(bench: Bench, models: Models) -> None:
    teacher = open_for_people(INPAINT_TEACHER)
    state = teacher.unet(conditioned=True).state_dict()
    dial = state["time_embedding.cond_proj.weight"]
    dial.copy_(0.05 * torch.randn(dial.shape, generator=torch.Generator().manual_seed(0)))
    path = models.folder / "checkpoints" / "demo-inpainting.safetensors"
    spec = make_spec(inpaint=True, teacher_sha256=teacher.sha256)
    save_student(path, unet_state=state, spec=spec, source=teacher, dtype=torch.float32)

    prompt = "a large red star on a white background"
    images, masks = drawings_to_fill([prompt], seed=1)
    choices = {"cfg_is_guidance": True, "guidance": 0.0, "live_negative": False}
    student = bench("FewStepLoadStudent", ckpt_name=path.name, **choices)
    picture = bench.picture(images.movedim(1, -1).contiguous(), masks[:, 0])
    said = bench("CLIPTextEncode", clip=student[1], text=prompt)[0]
    prepared = bench(
        "InpaintModelConditioning",
        positive=said,
        negative=said,
        vae=student[2],
        pixels=picture[0],
        mask=picture[1],
        noise_mask=False,
    )
    sampled = bench(
        "FewStepKSampler",
        model=student[0],
        positive=prepared[0],
        # ComfyUI adds a latent to the noise at full strength too; the toolkit, as diffusers does, starts from
        # noise alone.
        latent=bench.latent(torch.zeros(1, 4, 8, 8)),
        seed=7,
        guidance=4.0,
        denoise=1.0,
    )
    found = bench.run(image=bench("VAEDecode", samples=sampled[0], vae=student[2])[0])["image"]
    made = Painter.open(open_for_people(path))
    painted = made.latents([prompt], seeds=[7], guidance=4, fill=Fill(images, masks)).x0
    torch.testing.assert_close(found.movedim(-1, 1), made.decode(painted), atol=1e-3, rtol=0)
    unseen = made.latents([prompt], seeds=[7], guidance=4).x0
    assert float((made.decode(unseen) - made.decode(painted)).abs().mean()) > 0.01
