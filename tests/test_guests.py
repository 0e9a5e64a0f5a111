"""LoRAs beside a training run: their effect on a network is that of merging them, and goes away with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from make_checkpoint import make_teacher, make_tokenizer
from make_lora import CONVOLUTION, LINEAR, named, random_factors, save_lora, weights_of
from torch import Tensor

from toolkit.diffusion.errors import BadInput
from toolkit.evaluation.guests import answers_to
from toolkit.training.adapters import LoraShape, OneNetwork
from toolkit.training.checkpoint import Checkpoint, open_checkpoint
from toolkit.training.guests import Guest, Guests, parse_range
from toolkit.training.lora import merge_loras, read_lora

STRENGTH = 0.7


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("models")
    make_teacher(folder / "tiny.safetensors")
    make_tokenizer(folder / "tokenizer")
    return open_checkpoint(folder / "tiny.safetensors")


def file_of(teacher: Checkpoint, path: Path, kind: str) -> Path:
    weights = weights_of(teacher, (*LINEAR, *CONVOLUTION, "time_emb_proj"))
    tensors = named("kohya", teacher, random_factors(weights, kind=kind), alpha=3.0)
    if kind == "plain":
        generator = torch.Generator().manual_seed(5)
        tensors["lora_unet_conv_in.diff"] = 0.1 * torch.randn((32, 4, 3, 3), generator=generator)
        tensors["lora_unet_conv_in.diff_b"] = torch.randn(32, generator=generator)
        tensors["lora_unet_mid_block_resnets_0_conv1.diff_b"] = torch.randn(64, generator=generator)
        tensors["lora_unet_time_embedding_linear_1.diff"] = 0.1 * torch.randn((128, 32), generator=generator)
    return save_lora(path, tensors)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    z, text = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 24, 64)))
    return z, torch.tensor([900, 100]), text


@pytest.mark.parametrize("kind", ["plain", "tucker", "dora-in", "dora-out"])
def test_a_guest_does_what_merging_does_and_leaves_nothing(
    teacher: Checkpoint, tmp_path: Path, kind: str
) -> None:
    lora = read_lora(file_of(teacher, tmp_path / "style.safetensors", kind))
    guest = Guest.of(lora, 0.4, 1.2, checkpoint=teacher)
    guests = Guests([guest])
    unet: Any = guests.welcome(teacher.unet())
    with torch.no_grad():
        plain = teacher.unet()(*inputs()).sample
        merged = merge_loras(teacher, [(lora, STRENGTH)]).unet()(*inputs()).sample
        with guests.present(guest, STRENGTH):
            visited = unet(*inputs()).sample
        assert torch.equal(unet(*inputs()).sample, plain)
    assert torch.allclose(visited, merged, rtol=1e-3, atol=1e-3 * float(merged.abs().max()))
    assert float((visited - plain).norm() / plain.norm()) > 0.05
    with guests.present(guest, STRENGTH):
        unet(*inputs()).sample.square().mean().backward()
    gradients = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.grad
    assert gradients is not None and float(gradients.abs().max()) > 0
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), teacher.unet().parameters(), strict=True))


def test_guests_come_to_a_student_that_is_a_lora_too(teacher: Checkpoint, tmp_path: Path) -> None:
    lora = read_lora(file_of(teacher, tmp_path / "style.safetensors", "plain"))
    guest = Guest.of(lora, 0.4, 1.2, checkpoint=teacher)
    guests = Guests([guest])
    holder = OneNetwork(
        lambda: guests.welcome(teacher.unet(conditioned=True)),
        LoraShape(2),
        seed=0,
        device=torch.device("cpu"),
        dtype=torch.float32,
        autocast=lambda network: network,
    )
    pair = holder.pair(None, teacher="pair")
    z, t, text = inputs()
    with torch.no_grad():
        merged = merge_loras(teacher, [(lora, STRENGTH)]).unet()(z, t, text).sample
        for network, w in ((pair.teacher, None), (pair.student, torch.zeros(2))):
            with guests.present(guest, STRENGTH):
                visited = network(z, t, {"text": text}, w)
            assert torch.allclose(visited, merged, rtol=1e-3, atol=1e-3 * float(merged.abs().max()))


def test_every_second_batch_has_a_guest_at_a_strength_of_its_range(
    teacher: Checkpoint, tmp_path: Path
) -> None:
    lora = read_lora(file_of(teacher, tmp_path / "style.safetensors", "tucker"))
    guests = Guests([Guest.of(lora, 0.5, 0.8, checkpoint=teacher)])
    generator = torch.Generator().manual_seed(0)
    strengths: list[float] = []
    for _ in range(400):
        with guests.visit(generator) as visited:
            assert visited == (guests._present is not None)
            if guests._present is not None:
                strengths.append(guests._present[1])
        assert guests._present is None
    assert 160 < len(strengths) < 240
    assert 0.5 <= min(strengths) < 0.52 and 0.78 < max(strengths) <= 0.8
    state = generator.get_state()
    with Guests().visit(generator) as visited:
        assert not visited
    assert torch.equal(generator.get_state(), state), "runs without guests draw as they always did"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("style.safetensors", ("style.safetensors", 0.4, 1.2)),
        ("style.safetensors:0.5-1", ("style.safetensors", 0.5, 1.0)),
        ("style.safetensors:.8", ("style.safetensors", 0.8, 0.8)),
        (r"C:\style-1.safetensors", (r"C:\style-1.safetensors", 0.4, 1.2)),
        (r"C:\style.safetensors:0-2", (r"C:\style.safetensors", 0.0, 2.0)),
    ],
)
def test_a_range_stands_after_the_last_colon(text: str, expected: tuple[str, float, float]) -> None:
    assert parse_range(text) == (Path(expected[0]), *expected[1:])


def test_what_cannot_be_a_guest_is_said(teacher: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="LO <= HI"):
        parse_range("style.safetensors:1.2-0.4")
    cases = {
        "a difference of the normalisation conv_norm_out": {"lora_unet_conv_norm_out.w_norm": torch.ones(32)},
        "changes nothing in the UNet": {
            "lora_te_text_model_encoder_layers_0_mlp_fc1.diff": torch.zeros(128, 64)
        },
        "fit nothing": {"lora_unet_nowhere.diff": torch.zeros(1, 1)},
    }
    for number, (sentence, tensors) in enumerate(cases.items()):
        lora = read_lora(save_lora(tmp_path / f"{number}.safetensors", tensors))
        with pytest.raises(BadInput, match=sentence):
            Guest.of(lora, 0.4, 1.2, checkpoint=teacher)


def test_a_student_that_is_the_teacher_answers_at_the_same_strength(
    teacher: Checkpoint, tmp_path: Path
) -> None:
    lora = read_lora(file_of(teacher, tmp_path / "style.safetensors", "plain"))

    def latents(checkpoint: Checkpoint) -> Tensor:
        with torch.no_grad():
            return checkpoint.unet()(*inputs()).sample

    same = answers_to(lora, teacher=teacher, student=teacher, latents=latents)
    assert [answer.strength for answer in same] == [0.4, 0.7, 1.0, 1.2]
    for answer in same:
        assert (answer.error, answer.plain_error) == (0, 0)
        assert answer.equivalent == pytest.approx(answer.strength, abs=1e-5)

    def deaf(checkpoint: Checkpoint) -> Tensor:
        """As above, but a checkpoint whose name is "deaf" hears half of every LoRA."""
        if checkpoint.name != "deaf":
            return latents(checkpoint)
        return (
            (latents(teacher) + latents(merge_loras(teacher, [(lora, checkpoint.loras[0].strength)]))) / 2
            if checkpoint.loras
            else latents(teacher)
        )

    from dataclasses import replace

    half = answers_to(lora, teacher=teacher, student=replace(teacher, name="deaf"), latents=deaf)
    for answer in half:
        assert answer.equivalent == pytest.approx(answer.strength / 2, abs=1e-5)
        assert answer.error == pytest.approx(0.5, abs=1e-5) and answer.plain_error == 0
