"""Painting: seeds, guidance, grids and strengths reach the network as the contract says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from make_checkpoint import make_spec, make_student, make_teacher, make_tokenizer
from torch import Tensor

from toolkit.diffusion.denoiser import Cond
from toolkit.diffusion.errors import BadInput
from toolkit.diffusion.grid import trailing_timesteps
from toolkit.diffusion.schedule import NoiseSchedule
from toolkit.evaluation.painter import Painter, cached_texts
from toolkit.runtime.samplers import initial_latent
from toolkit.training.checkpoint import open_checkpoint

SCHEDULE = NoiseSchedule.scaled_linear()
PROMPTS = ["a red circle", "a blue star", "a red circle"]


@dataclass(eq=False)
class Recorder:
    """A denoiser that answers with a half of x and remembers what it was asked."""

    calls: list[dict[str, Tensor | None]] = field(default_factory=list)

    def velocity(self, x: Tensor, sigma: Tensor, *, cond: Cond, w: Tensor | None = None) -> Tensor:
        self.calls.append({"x": x, "sigma": sigma, "w": w, "text": cond["text"]})
        return x / 2

    def __call__(self, x: Tensor, sigma: Tensor, *, cond: Cond, w: Tensor | None = None) -> Tensor:
        self.calls.append({"x": x, "sigma": sigma, "w": w, "text": cond["text"]})
        return x / 2

    @property
    def timesteps(self) -> list[int]:
        return [int(SCHEDULE.timestep(call["sigma"][0])) for call in self.calls]


@dataclass
class FlatVae:
    """As much of an autoencoder as shapes need: four channels, two pixels a cell."""

    config: dict[str, object] = field(
        default_factory=lambda: {"latent_channels": 4, "block_out_channels": (32, 64)}
    )


def lengths(prompts: Sequence[str]) -> Cond:
    """The 'text' of a prompt is its length."""
    return {"text": torch.tensor([[[float(len(prompt))]] for prompt in prompts])}


def painter(**changes) -> tuple[Painter, Recorder]:
    recorder = Recorder()
    made = Painter(denoiser=recorder, vae=FlatVae(), texts=lengths, schedule=SCHEDULE, size=(16, 8))
    return replace(made, **changes), recorder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_teacher(folder / "teacher.safetensors")
    make_student(folder / "student.safetensors", spec=make_spec(teacher_name="teacher"), dial=0.1)
    make_tokenizer(folder / "tokenizer")
    return {
        name: open_checkpoint(folder / f"{name}.safetensors", tokenizer=folder / "tokenizer")
        for name in ("teacher", "student")
    }


def test_a_student_is_told_w_and_asked_once_a_step_at_its_trained_timesteps():
    made, recorder = painter(spec=make_spec(guidance_min=1, guidance_max=8))
    painted = made.latents(PROMPTS, seeds=[5, 6, 7], guidance=4)
    assert recorder.timesteps == [999, 749, 499, 249] == list(painted.plan.timesteps)
    assert all(call["w"].tolist() == [3.0] * 3 for call in recorder.calls)
    assert painted.plan.evaluations == 4 and painted.x0.shape == (3, 4, 8, 4)
    assert recorder.calls[0]["text"].flatten().tolist() == [len(prompt) for prompt in PROMPTS]


def test_a_students_guidance_one_is_w_zero_and_its_default_comes_from_the_spec():
    made, recorder = painter(spec=make_spec(guidance_default=6.0))
    made.latents(["x"], seeds=[0], guidance=1)
    made.latents(["x"], seeds=[0])
    assert [float(call["w"]) for call in recorder.calls] == [0.0] * 4 + [5.0] * 4


@pytest.mark.parametrize("spec", [make_spec(baked_guidance=3.0), make_spec(w_embedding=None)])
def test_a_network_without_a_dial_is_not_told_w(spec):
    made, recorder = painter(spec=spec)
    made.latents(["x"], seeds=[0])
    assert [call["w"] for call in recorder.calls] == [None] * 4


def test_a_guided_teacher_is_asked_for_both_branches_in_one_batch_with_its_negative_prompt():
    made, recorder = painter()
    painted = made.latents(["four", "two"], seeds=[0, 1], guidance=4, steps=5, negative="negative")
    assert recorder.timesteps == [999, 799, 599, 399, 199]
    assert recorder.calls[0]["text"].flatten().tolist() == [4.0, 3.0, 8.0, 8.0]
    assert painted.plan.evaluations == 10


def test_an_unguided_teacher_is_asked_for_the_prompt_alone():
    made, recorder = painter()
    painted = made.latents(["four"], seeds=[0], guidance=1, steps=5)
    assert [call["text"].flatten().tolist() for call in recorder.calls] == [[4.0]] * 5
    assert painted.plan.evaluations == 5


def test_noise_comes_from_each_pictures_own_seed_on_the_cpu():
    made, recorder = painter(spec=make_spec())
    made.latents(["x", "y"], seeds=[3, 11])
    sigma = float(SCHEDULE.sigmas[-1])
    noise = torch.randn(1, 4, 8, 4, generator=torch.Generator().manual_seed(11))
    expected = noise * (1 + sigma**2) ** 0.5
    torch.testing.assert_close(recorder.calls[0]["x"][1:], expected)


def test_a_picture_is_the_same_alone_and_in_any_batch(models):
    made = Painter.open(models["student"])
    together = made.paint(PROMPTS, seeds=[1, 2, 3], guidance=5)
    for batch in (1, 2):
        torch.testing.assert_close(
            made.paint(PROMPTS, seeds=[1, 2, 3], guidance=5, batch=batch), together, atol=2e-5, rtol=0
        )
    alone = made.paint(PROMPTS[1:2], seeds=[2], guidance=5)
    torch.testing.assert_close(alone, together[1:2], atol=2e-5, rtol=0)
    assert together.shape == (3, 3, 32, 32) and 0 <= together.min() and together.max() <= 1


@pytest.mark.parametrize(
    ("strength", "any_start", "expected"),
    [
        (1.0, True, [999, 749, 499, 249]),
        (0.75, True, [749, 499, 249]),
        (0.6, True, [599, 499, 249]),
        (0.2, True, [199]),
        (0.6, False, [499, 249]),
        (0.05, False, [249]),
    ],
)
def test_a_start_in_between_walks_from_the_strength_through_the_trained_entries_below(
    strength, any_start, expected
):
    made, recorder = painter(spec=make_spec(any_start=any_start))
    x0 = torch.ones(1, 4, 8, 4)
    painted = made.latents(["x"], seeds=[9], x0=x0, strength=strength)
    assert recorder.timesteps == expected == list(painted.plan.timesteps)
    start = float(SCHEDULE.sigma(torch.tensor(expected[0])))
    torch.testing.assert_close(
        recorder.calls[0]["x"], initial_latent((1, 4, 8, 4), seed=9, sigma=start, x0=x0)
    )


def test_one_picture_to_start_from_serves_all_seeds_and_many_serve_each_its_own():
    made, recorder = painter(spec=make_spec())
    x0 = torch.arange(2.0).reshape(2, 1, 1, 1).expand(2, 4, 8, 4)
    made.latents(["x", "y"], seeds=[4, 4], x0=x0, strength=0.2)
    made.latents(["x", "y"], seeds=[4, 4], x0=x0[1:], strength=0.2)
    each, shared = (call["x"] for call in recorder.calls)
    torch.testing.assert_close(each[1] - each[0], torch.ones(4, 8, 4))
    torch.testing.assert_close(shared, each[1:].expand(2, -1, -1, -1))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"steps": 8}, r"8 steps were asked for.*trained for 4 \(timesteps 999, 749, 499, 249\)"),
        ({"guidance": 20}, "20 was asked for.*1 to 15"),
        ({"guidance": 0.5}, "0.5 was asked for"),
        ({"guidance": float("nan")}, "nan was asked for"),
        ({"sampler": "ddim"}, "brings its own"),
        ({"negative": "ugly"}, "'ugly' was asked for.*this one's is empty"),
        ({"size": (16, 7)}, "multiples of 2"),
        ({"size": (0, 8)}, "multiples of 2"),
        ({"x0": torch.ones(1, 4, 8, 4), "strength": 1.5}, "strength 1.5"),
        ({"x0": torch.ones(1, 4, 8, 4), "strength": 0.0}, "strength 0"),
    ],
)
def test_what_a_student_cannot_do_is_one_sentence(asked, said):
    made, _ = painter(spec=make_spec())
    with pytest.raises(BadInput, match=said):
        made.latents(["x"], seeds=[0], **asked)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"steps": 0}, "0 steps"),
        ({"steps": 1001}, "1001 steps"),
        ({"guidance": 0.5}, "at least 1"),
        ({"guidance": float("inf")}, "at least 1"),
        ({"sampler": "euler_a"}, "ddim, dpmpp_2m"),
    ],
)
def test_what_a_teacher_cannot_do_is_one_sentence(asked, said):
    made, _ = painter()
    with pytest.raises(BadInput, match=said):
        made.latents(["x"], seeds=[0], **asked)


def test_a_students_own_negative_prompt_may_be_named():
    made, recorder = painter(spec=make_spec(negative="blurry"))
    made.latents(["x"], seeds=[0], negative="blurry")
    assert len(recorder.calls) == 4


def test_progress_counts_steps_over_all_batches():
    made, _ = painter(spec=make_spec())
    told: list[tuple[int, int]] = []
    made.latents(PROMPTS, seeds=[0, 1, 2], batch=2, progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 8) for done in range(1, 9)]


def test_texts_that_were_encoded_before_are_found_by_their_prompt():
    texts = cached_texts(["a", "b"], {"text": torch.arange(2.0).reshape(2, 1, 1)})
    assert texts(["b", "a", "b"])["text"].flatten().tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_teacher_paints_what_the_stock_pipeline_paints(models, guidance):
    checkpoint = models["teacher"]
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        timestep_spacing="trailing",
    )
    pipeline = StableDiffusionPipeline(
        unet=checkpoint.unet(),
        vae=checkpoint.vae(),
        text_encoder=checkpoint.text_encoder(),
        tokenizer=checkpoint.tokenizer(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        "a red circle",
        negative_prompt="grey",
        num_inference_steps=5,
        guidance_scale=guidance,
        height=32,
        width=32,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
    ).images
    found = Painter.open(checkpoint).paint(
        ["a red circle"], seeds=[7], guidance=guidance, steps=5, negative="grey"
    )
    torch.testing.assert_close(found, expected, atol=1 / 255, rtol=0)


def test_a_student_whose_dial_is_zero_paints_as_its_unguided_teacher(tmp_path, models):
    folder = models["teacher"].path.parent
    path = make_student(
        tmp_path / "zero.safetensors", spec=make_spec(timesteps=trailing_timesteps(3)), dial=0.0
    )
    student = Painter.open(open_checkpoint(path, tokenizer=folder / "tokenizer"))
    teacher = Painter.open(models["teacher"])
    asked = {"prompts": PROMPTS, "seeds": [1, 2, 3]}
    assert torch.equal(student.paint(**asked, guidance=9), teacher.paint(**asked, guidance=1, steps=3))


def test_files_that_cannot_paint_by_themselves_are_refused(tmp_path, models):
    folder = models["teacher"].path.parent
    nameless = make_teacher(tmp_path / "nameless.safetensors", dial=0.1)
    with pytest.raises(BadInput, match="attach-spec"):
        Painter.open(open_checkpoint(nameless, tokenizer=folder / "tokenizer"))
