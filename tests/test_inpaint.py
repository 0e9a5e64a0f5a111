"""Inpainting: what the network sees, what stays as it was, and students distilled from 9-channel teachers."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from make_checkpoint import make_spec, make_student, make_teacher, make_tokenizer
from PIL import Image, ImageDraw
from torch import Tensor

from toolkit import distill, sample
from toolkit.demo.drawings import drawings_to_fill, erased_objects, prompts, render, scenes
from toolkit.demo.inpainting import with_mask_input
from toolkit.demo.judge import load_judge
from toolkit.diffusion.blending import Blended
from toolkit.diffusion.denoiser import Cond, Guided, NetworkDenoiser
from toolkit.diffusion.errors import BadInput
from toolkit.diffusion.grid import Grid, trailing_timesteps
from toolkit.diffusion.schedule import NoiseSchedule
from toolkit.evaluation.evaluate import Evaluation, Request, Yardstick, check_pair, table
from toolkit.evaluation.painter import Fill, Painter, unit_noise
from toolkit.evaluation.pictures import to_image
from toolkit.evaluation.showcase import side_by_side, verdict
from toolkit.runtime.files import load_tensors, read_spec
from toolkit.runtime.samplers import sample_dpmpp_2m
from toolkit.training import loop
from toolkit.training.checkpoint import Checkpoint, open_checkpoint
from toolkit.training.export import export_baked, export_checkpoint, export_diffusers
from toolkit.training.masks import FULL, Pictures, at_latent_size, draw_masks, inpaint_cond
from toolkit.training.networks import decode_latents, denoiser, encode_images, random_cond
from toolkit.training.teacher_samples import TeacherSampleRequest, make_teacher_samples

SCHEDULE = NoiseSchedule.scaled_linear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_teacher(folder / "nine.safetensors", in_channels=9)
    make_teacher(folder / "four.safetensors")
    make_student(
        folder / "nine-student.safetensors", spec=make_spec(inpaint=True), dial=0.1, in_channels=9, seed=4
    )
    make_student(folder / "four-student.safetensors", dial=0.1)
    make_tokenizer(folder / "tokenizer")
    noise = torch.randint(0, 256, (37, 41, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(folder / "picture.png")
    mask = Image.new("L", (41, 37))
    ImageDraw.Draw(mask).rectangle((10, 8, 30, 20), fill=255)
    mask.save(folder / "mask.png")
    Image.new("L", (41, 37)).save(folder / "black.png")
    Image.new("L", (40, 37), 255).save(folder / "narrow.png")
    dot = Image.new("L", (41, 37))
    dot.putpixel((11, 9), 255)
    dot.save(folder / "dot.png")
    mask.point(lambda value: value // 3).save(folder / "dark.png")
    Image.new("RGBA", (41, 37), (255, 255, 255, 0)).save(folder / "transparent.png")
    return folder


def opened(folder: Path, name: str) -> Checkpoint:
    return open_checkpoint(folder / f"{name}.safetensors", tokenizer=folder / "tokenizer")


def test_masks_are_boxes_strokes_and_the_whole_picture_in_their_shares():
    masks = draw_masks(range(400), 48, 64)
    assert masks.shape == (400, 1, 48, 64) and set(masks.unique().tolist()) == {0.0, 1.0}
    area = masks.mean((1, 2, 3))
    assert abs(float((area == 1).float().mean()) - FULL) < 0.07
    assert float(area.min()) > 0.01 and 0.15 < float(area[area < 1].median()) < 0.5
    assert torch.equal(masks[3], draw_masks([3], 48, 64)[0])


def test_the_network_sees_latent_mask_and_masked_latent_in_this_order():
    seen: list[Tensor] = []

    def network(z: Tensor, timestep: Tensor, cond: Cond, w: Tensor | None) -> Tensor:
        seen.append(z)
        return z[:, :4]

    inpaint = torch.cat([torch.ones(2, 1, 3, 3), torch.full((2, 4, 3, 3), 5.0)], dim=1)
    wrapped = NetworkDenoiser(network, SCHEDULE, "epsilon")
    cond = {"text": torch.zeros(2, 1, 1), "inpaint": inpaint}
    x, sigma = torch.randn(2, 4, 3, 3), torch.tensor([1.0, 2.0])
    uncond = {"text": torch.ones(1, 1, 1)}
    Guided(wrapped, uncond)(x, sigma, cond=cond, w=torch.ones(2))
    (z,) = seen
    torch.testing.assert_close(z[:2, :4], x / (1 + sigma.view(-1, 1, 1, 1) ** 2).sqrt())
    assert torch.equal(z[:2, 4:], inpaint) and torch.equal(z[2:, 4:], inpaint)


def test_what_is_masked_is_grey_and_the_mask_is_whole_at_the_latents_size():
    images, masks = torch.rand(2, 3, 8, 8), torch.zeros(2, 1, 8, 8)
    masks[:, :, :, 3:] = 1
    asked: list[Tensor] = []

    def encode(pictures: Tensor) -> Tensor:
        asked.append(pictures)
        return pictures[:, :1, ::2, ::2].repeat(1, 4, 1, 1)

    cond = inpaint_cond(images, masks, encode)
    assert torch.equal(asked[0][..., :3], images[..., :3]) and bool((asked[0][..., 3:] == 0.5).all())
    assert cond.shape == (2, 5, 4, 4) and cond[0, 0, 0].tolist() == [0, 0, 1, 1]
    assert at_latent_size(masks, cond)[0, 0, 0].tolist() == [0, 0.5, 1, 1]


@pytest.mark.parametrize("shape", ["tiny", "tiny-sd2", "tiny-sdxl"])
def test_an_untrained_student_equals_its_inpainting_teacher_exactly(tmp_path, shape):
    path = make_teacher(tmp_path / "nine.safetensors", shape=shape, in_channels=9)
    checkpoint = open_checkpoint(path)
    generator = torch.Generator().manual_seed(0)
    cond = random_cond(checkpoint, 2, generator=generator)
    cond["inpaint"] = torch.randn(2, 5, 8, 8, generator=generator)
    x, sigma = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([14.6, 0.5])
    teacher, student = (
        denoiser(checkpoint.unet(conditioned=dial).eval(), schedule=SCHEDULE, prediction_type="epsilon")
        for dial in (False, True)
    )
    with torch.no_grad():
        expected = teacher(x, sigma, cond=cond)
        assert torch.equal(student(x, sigma, cond=cond, w=torch.tensor([3.0, 9.0])), expected)
        other = teacher(x, sigma, cond=cond | {"inpaint": torch.zeros(2, 5, 8, 8)})
    assert not torch.equal(other, expected)


@dataclass(eq=False)
class Recorder:
    """A denoiser that answers with a half of x and remembers what it was asked."""

    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, x: Tensor, sigma: Tensor, *, cond: Cond, w: Tensor | None = None) -> Tensor:
        self.calls.append((x, sigma))
        return x / 2

    velocity = __call__


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_without_an_inpainting_network_what_is_kept_is_its_noised_self_at_each_step(folder, strength):
    recorder = Recorder()
    made = replace(Painter.open(opened(folder, "four-student")), denoiser=recorder)
    images, masks = torch.rand(1, 3, 16, 16), torch.zeros(1, 1, 16, 16)
    masks[..., :8] = 1
    painted = made.latents(["a"] * 3, seeds=[1, 2, 3], fill=Fill(images, masks), strength=strength, batch=2)
    x0, noise = made.encode(images), unit_noise((3, 4, 8, 8), seeds=[1, 2, 3])
    first = [call for call in recorder.calls if len(call[0]) == 2]
    assert len(first) == len(painted.plan.timesteps)
    for x, sigma in first:
        known = x0 + sigma.view(-1, 1, 1, 1) * noise[:2]
        torch.testing.assert_close(x[..., 4:], known[..., 4:])
        assert not torch.allclose(x[..., :4], known[..., :4]) or strength < 1
    assert torch.equal(painted.x0[..., 4:], x0.expand(3, -1, -1, -1)[..., 4:])
    assert not torch.allclose(painted.x0[..., :4], x0[..., :4])


def test_blending_mixes_where_the_mask_is_between():
    x, x0 = torch.ones(1, 4, 2, 2), torch.full((1, 4, 2, 2), 3.0)
    blended = Blended(Recorder(), x0, torch.full((1, 4, 2, 2), 2.0), torch.full((1, 1, 2, 2), 0.25))
    found = blended(x, torch.tensor([10.0]), cond={})
    torch.testing.assert_close(found, torch.full_like(x, 0.25 * (0.25 + 0.75 * 23) / 2 + 0.75 * 3))


def fill(folder: Path, out: Path, name: str, *more: str, mask: str = "mask.png") -> Image.Image:
    sample.main(
        [
            *("--ckpt", str(folder / f"{name}.safetensors"), "--tokenizer", str(folder / "tokenizer")),
            *("--device", "cpu", "--prompt", "a hat", "--init-image", str(folder / "picture.png")),
            *("--mask", str(folder / mask), "-o", str(out), *more),
        ]
    )
    return Image.open(out)


@pytest.mark.parametrize("name", ["four", "nine", "four-student", "nine-student"])
@pytest.mark.parametrize("strength", [(), ("--strength", "0.5")])
def test_pixels_outside_the_mask_are_the_pictures_own_bit_for_bit(folder, tmp_path, name, strength, caplog):
    caplog.set_level("INFO", "fewstep")
    steps = () if "student" in name else ("--steps", "2")
    found = fill(folder, tmp_path / "a.png", name, *strength, *steps)
    before = Image.open(folder / "picture.png")
    assert found.size == before.size == (41, 37)
    changed = [
        (x, y) for x in range(41) for y in range(37) if found.getpixel((x, y)) != before.getpixel((x, y))
    ]
    inside = [(x, y) for x, y in changed if 10 <= x <= 30 and 8 <= y <= 20]
    assert changed == inside and len(inside) > 200
    assert ("by blending" in caplog.text) == name.startswith("four")
    start = 999 if not strength else 499
    assert f"FewStep timesteps: {start}" in found.text["parameters"]


def test_what_is_kept_decides_what_an_inpainting_student_fills_in(folder):
    made = Painter.open(opened(folder, "nine-student"))
    masks = torch.zeros(1, 1, 32, 32)
    masks[..., 8:24, 8:24] = 1
    dark, light = (
        made.paint(["a"], seeds=[1], fill=Fill(torch.full((1, 3, 32, 32), grey), masks))
        for grey in (0.1, 0.9)
    )
    middle = (..., slice(8, 24), slice(8, 24))
    assert float((dark[middle] - light[middle]).abs().mean()) > 0.01
    everything = Fill(torch.rand(1, 3, 32, 32), torch.ones(1, 1, 32, 32))
    nothing_known = made.paint(["a"], seeds=[1])
    torch.testing.assert_close(made.paint(["a"], seeds=[1], fill=everything), nothing_known)


@pytest.mark.parametrize(
    ("mask", "more", "said"),
    [
        ("narrow.png", (), "40 x 37 pixels and the picture 41 x 37"),
        ("black.png", (), "all black"),
        ("dot.png", (), "too thin or too dark"),
        ("dark.png", (), "too thin or too dark"),
        ("transparent.png", (), r"transparent\.png: parts of it are transparent"),
        ("none.png", (), r"none\.png: not a picture"),
        ("mask.png", ("--width", "32"), "leave out --width"),
        ("mask.png", ("--strength", "0"), "above 0"),
    ],
)
def test_masks_that_cannot_be_used_are_one_sentence(folder, tmp_path, mask, more, said):
    with pytest.raises(BadInput, match=said) as caught:
        fill(folder, tmp_path / "a.png", "nine-student", *more, mask=mask)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["four", "nine-student"])
def test_a_mask_needs_a_picture(folder, tmp_path, name):
    ckpt = str(folder / f"{name}.safetensors")
    with pytest.raises(BadInput, match="--init-image"):
        sample.main(["--ckpt", ckpt, "--prompt", "x", "--mask", "m.png", "-o", str(tmp_path / "a.png")])


def test_an_inpainting_student_without_a_mask_paints_the_whole_picture(folder, tmp_path, caplog):
    caplog.set_level("INFO", "fewstep")
    sample.main(
        [
            *("--ckpt", str(folder / "nine-student.safetensors"), "--tokenizer", str(folder / "tokenizer")),
            *("--device", "cpu", "--prompt", "a hat", "-o", str(tmp_path / "a.png")),
        ]
    )
    assert "without a mask paints the whole picture" in caplog.text
    everything = Fill(torch.rand(1, 3, 32, 32), torch.ones(1, 1, 32, 32))
    expected = Painter.open(opened(folder, "nine-student")).paint(["a hat"], seeds=[0], fill=everything)
    found = Image.open(tmp_path / "a.png")
    assert found.tobytes() == to_image(expected[0]).tobytes()


def test_the_demos_settings_are_for_its_own_teachers(arguments, monkeypatch):
    with pytest.raises(BadInput, match=r"nine\.safetensors: no teacher of the demo's"):
        run(monkeypatch, [*arguments, "--demo"])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_stock_inpainting_pipeline_fills_in_what_we_do(tmp_path, prediction_type):
    from diffusers import StableDiffusionInpaintPipeline

    spec = make_spec(timesteps=trailing_timesteps(3), prediction_type=prediction_type, inpaint=True)
    path = make_student(tmp_path / "student.safetensors", spec=spec, in_channels=9, seed=2)
    student = open_checkpoint(path, tokenizer=make_tokenizer(tmp_path / "words"))
    export_diffusers(student, tmp_path / "exported")
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(
        str(tmp_path / "exported"), local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    masks = torch.zeros(1, 1, 32, 32)
    masks[..., 8:24, 4:20] = 1
    theirs = pipeline(
        "a cat",
        image=images,
        mask_image=masks,
        height=32,
        width=32,
        strength=1.0,
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).images
    made = Painter.open(student)
    ours = made.decode(made.latents(["a cat"], seeds=[5], guidance=4, fill=Fill(images, masks)).x0)
    assert float((theirs - ours).abs().max()) <= 2 / 255 and float(ours.std()) > 0.05


def test_exports_of_an_inpainting_student_stay_inpainting_students(folder, tmp_path):
    student = opened(folder, "nine-student")
    export_checkpoint(student, tmp_path / "a.safetensors")
    export_baked(student, tmp_path / "b.safetensors", guidance=4)
    for name in ("a", "b"):
        found = open_checkpoint(tmp_path / f"{name}.safetensors")
        assert found.inpaint and found.spec is not None and found.spec.inpaint


def request(checkpoint: Checkpoint, **changes) -> TeacherSampleRequest:
    made = TeacherSampleRequest(
        teacher=checkpoint.sha256, prompts=("a", "b", "c"), negative="", guidance=(1, 6),
        sizes=((16, 16),), channels=4, downscale=2, count=12, seed=1, precision="fp32", steps=4, masked=True,
    )  # fmt: skip
    return replace(made, **changes)


def test_a_teachers_own_pictures_under_masks_carry_the_trajectories_that_led_there(folder, tmp_path):
    checkpoint = opened(folder, "nine")
    teacher = denoiser(checkpoint.unet().eval(), schedule=SCHEDULE, prediction_type="epsilon")
    vae, texts = checkpoint.vae(), torch.randn(4, 5, 64, generator=torch.Generator().manual_seed(0))
    pictures = Pictures(lambda i: encode_images(i, vae), lambda x0: decode_latents(x0, vae), 2)
    made = make_teacher_samples(
        request(checkpoint), tmp_path, teacher=teacher, encode=lambda words: {"text": texts[: len(words)]},
        schedule=SCHEDULE, device=torch.device("cpu"), batch=6, progress=lambda shards: shards,
        pictures=pictures,
    )  # fmt: skip
    rows = made.rows(torch.arange(12))
    masks = rows["inpaint"][:, 0].float()
    full = masks.flatten(1).min(1).values == 1
    assert set(masks.unique().tolist()) == {0.0, 1.0} and 0 < int(full.sum()) < 12
    nothing = pictures.nothing(1, 16, 16)[0]
    torch.testing.assert_close(rows["inpaint"][full][0].float(), nothing, atol=2e-3, rtol=2e-3)
    sigmas = SCHEDULE.sigma(torch.tensor([*Grid.trailing(4).timesteps, -1]))
    guided = Guided(teacher, made.uncond)
    with torch.no_grad():
        again = sample_dpmpp_2m(
            guided,
            rows["states"][:, 0].float(),
            sigmas,
            extra_args={"cond": made.cond(rows), "w": rows["guidance"] - 1},
        )
    torch.testing.assert_close(again, rows["x0"].float(), atol=0.05, rtol=0.02)


@pytest.fixture
def arguments(folder, tmp_path) -> list[str]:
    return [
        *("--ckpt", str(folder / "nine.safetensors"), "--tokenizer", str(folder / "tokenizer")),
        *("--out", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache"), "--steps", "2"),
        *("--updates", "3", "--batch-size", "2", "--guidance", "1", "8", "--guidance-default", "4"),
        *("--report-prompts", "0", "--device", "cpu"),
    ]


def run(monkeypatch, arguments: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["distill", *arguments])
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        distill.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_an_inpainting_teacher_is_distilled_and_a_stopped_run_goes_on_exactly(
    arguments, tmp_path, monkeypatch
):
    arguments += ["--origin", "pair", "--pictures", "6"]
    run(monkeypatch, arguments)
    spec = read_spec(tmp_path / "run" / "student.safetensors")
    assert spec is not None and spec.inpaint and spec.timesteps == (999, 499)
    assert open_checkpoint(tmp_path / "run" / "student.safetensors").inpaint
    arguments[arguments.index("--out") + 1] = str(tmp_path / "again")
    step = loop.PhaseTrainer.step

    def stopping(trainer: loop.PhaseTrainer) -> tuple[float, float]:
        if trainer.update == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(trainer)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(loop.PhaseTrainer, "step", stopping)
        run(patched, arguments)
    run(monkeypatch, [*arguments, "--resume"])
    whole, resumed = ((tmp_path / name / "student.safetensors").read_bytes() for name in ("run", "again"))
    assert whole == resumed


def test_a_folder_of_pictures_is_masked_several_times_each(arguments, folder, tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(2):
        (data / f"{number}.png").write_bytes((folder / "picture.png").read_bytes())
        (data / f"{number}.txt").write_text(f"picture {number}")
    run(monkeypatch, [*arguments, "--method", "guided", "--data", str(data)])
    spec = read_spec(tmp_path / "run" / "student.safetensors")
    assert spec is not None and spec.inpaint and spec.method == "guided"
    (cache,) = (tmp_path / "cache").glob("images-*")
    shard = load_tensors(cache / "00000.safetensors")
    assert shard["inpaint"].shape == (8, 5, 16, 16) and shard["x0"].shape == (8, 4, 16, 16)
    assert len({tuple(mask.flatten().tolist()) for mask in shard["inpaint"][:, 0]}) >= 5


@dataclass
class Brightness:
    """A judge that sees only how bright a picture is."""

    def features(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))

    def adherence(self, images: Tensor, captions: list[str]) -> Tensor:
        return images.mean((1, 2, 3)) > 0.5


def evaluation(folder: Path, **changes) -> Evaluation:
    made = Evaluation(
        teacher=Painter.open(opened(folder, "nine")),
        students={"four": Painter.open(opened(folder, "nine-student"))},
        request=Request(prompts=("a", "b"), guidances=(4.0,), steps=(4,), reference_steps=5),
        yardstick=Yardstick(Brightness()),
    )
    return replace(made, **changes)


def test_inpainting_students_are_measured_at_filling_in_too(folder):
    measured = evaluation(folder)
    rows = list(measured.rows())
    tasks = [row["task"] for row in rows]
    assert tasks == ["paint"] * (len(rows) // 2) + ["fill"] * (len(rows) // 2)
    reference = measured.latents(measured.reference(4.0))[0]
    images = measured.teacher.decode(reference.roll(1, 0))
    masks = measured.to_fill(4.0).masks
    assert 0.4 < float(masks.mean()) < 0.6 and torch.equal(measured.to_fill(4.0).images, images)
    student = replace(measured.cells(4.0, 1.0, "fill")[-1])
    fill = Fill(images, masks)
    painted = measured.students["four"].latents(("a", "b"), seeds=[0, 1], guidance=4, fill=fill)
    assert torch.equal(measured.latents(student, None, fill)[0], painted.x0)
    assert "filling in" in table(rows) and "Filling in a picture:" in (verdict(rows) or "")
    given = Fill(torch.rand(2, 3, 32, 32), masks)
    assert evaluation(folder, fill=given).to_fill(4.0) is given
    pictures = side_by_side(measured, guidance=4, guidances=[4], strengths=[])
    assert pictures[-1][0].startswith("Filling in")


def test_students_are_compared_with_a_teacher_that_sees_what_they_see(folder):
    measured = evaluation(folder, teacher=Painter.open(opened(folder, "four")))
    with pytest.raises(BadInput, match="an inpainting model and the teacher an ordinary one"):
        check_pair(measured.teacher, measured.students, "")


def test_drawings_to_fill_have_the_prompts_background_and_another_object_under_the_mask():
    said = prompts(40, seed=5)
    images, masks = drawings_to_fill(said, seed=5)
    assert float(load_judge().adherence(images, said).float().mean()) < 0.05
    backgrounds = [line.split(" on ")[-1] for line in said]
    assert float(load_judge().adherence(images, backgrounds).float().mean()) > 0.9
    images, masks = drawings_to_fill(["a small red star on a black background"] * 20, seed=5)
    outside = torch.where(masks > 0, 0, images)
    assert float(outside.max()) < 0.25 and float((images * masks).amax((1, 2, 3)).min()) > 0.3


def test_the_demos_wider_network_does_not_mind_what_it_was_not_taught_yet(folder):
    unet = opened(folder, "four").unet().eval()
    wider = with_mask_input(unet).eval()
    x, more = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 8, 8)
    rest = (torch.tensor([500]), torch.randn(1, 5, 64))
    with torch.no_grad():
        assert torch.equal(wider(torch.cat([x, more], 1), *rest).sample, unet(x, *rest).sample)


def test_an_erased_object_leaves_nothing_but_background():
    what = scenes(64, seed=3)
    images, masks = render(what, seed=3), erased_objects(what)
    saturation = images.amax(1) - images.amin(1)
    assert float(saturation.amax((1, 2)).min()) > 0.3
    assert float((saturation * (1 - masks[:, 0])).max()) < 0.2
    assert float(masks.mean((1, 2, 3)).max()) < 0.8
