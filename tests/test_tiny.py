"""The tiny decoder: hosts' file layout, exact resuming, and the command that distils it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from make_checkpoint import make_spec, make_student, make_tokenizer, taesd_to_single_file
from PIL import Image
from torch import Tensor

from toolkit import sample, tiny
from toolkit.diffusion.errors import BadInput
from toolkit.runtime.files import load_tensors, save_tensors
from toolkit.training import tiny as distillation
from toolkit.training.loop import save_state
from toolkit.training.samples import Samples
from toolkit.training.tiny import (
    TinySettings,
    TinyTrainer,
    held_out,
    make_pairs,
    new_tiny,
    open_tiny,
    save_diffusers,
    taesd_tensors,
    tiny_loss,
)

SMALL = {"block_out_channels": (16, 32), "latent_channels": 4}
"""Of a VAE with cells of two pixels."""


def test_of_stable_diffusion_s_vae_it_is_the_network_that_hosts_know_under_their_keys() -> None:
    with torch.device("meta"):
        made = new_tiny({"block_out_channels": (128, 256, 512, 512), "latent_channels": 4})
        known = taesd_to_single_file(AutoencoderTiny().state_dict())
    for side in ("encoder", "decoder"):
        begins = f"first_stage_model.taesd_{side}."
        expected = {k.removeprefix(begins): v.shape for k, v in known.items() if k.startswith(begins)}
        assert {key: value.shape for key, value in taesd_tensors(made, side).items()} == expected


def test_a_file_and_a_diffusers_folder_hold_the_same_decoder(tmp_path: Path) -> None:
    made, z = new_tiny(SMALL), torch.randn(1, 4, 3, 5)
    expected: Any = made.decode(z, return_dict=False)[0]
    assert expected.shape == (1, 3, 6, 10)
    save_tensors(taesd_tensors(made, "decoder"), {}, tmp_path / "t.safetensors")
    save_diffusers(made, tmp_path / "folder", encoder=False)
    theirs: Any = AutoencoderTiny.from_pretrained(tmp_path / "folder")
    for found in (open_tiny(tmp_path / "t.safetensors"), open_tiny(tmp_path / "folder"), theirs):
        answer: Any = found.decode(z, return_dict=False)[0]
        assert torch.equal(answer, expected)
    assert theirs.encode(torch.zeros(1, 3, 4, 4)).latents.isnan().all(), "an untrained encoder must show"
    save_tensors({"1.weight": torch.zeros(8, 4, 3, 3)}, {}, tmp_path / "other.safetensors")
    with pytest.raises(BadInput, match="no tiny decoder was found in it"):
        open_tiny(tmp_path / "other.safetensors")


def pairs_of(folder: Path, count: int = 20) -> Samples:
    """Of a "VAE" that enlarges three channels."""

    def latents(numbers: Tensor) -> Tensor:
        draws = [torch.rand(4, 4, 4, generator=torch.Generator().manual_seed(int(n))) for n in numbers]
        return torch.stack(draws)

    def decode(x0: Tensor) -> Tensor:
        return x0[:, :3].repeat_interleave(2, -1).repeat_interleave(2, -2)

    groups = list(torch.arange(count).split(8))
    return make_pairs(folder, groups, latents, decode, batch=4, progress=lambda shards: shards)


def trainer(pairs: Samples, key: str = "here", **changes: Any) -> TinyTrainer:
    values: dict[str, Any] = {"updates": 60, "batch_size": 4, "lr": 3e-3, "seed": 1, **changes}
    settings = TinySettings(**values)
    torch.manual_seed(0)
    learned, _ = held_out(pairs, 4)
    return TinyTrainer(new_tiny(SMALL), pairs, learned, settings, key=key, device=torch.device("cpu"))


def test_it_learns_what_the_vae_does_and_goes_on_exactly(tmp_path: Path) -> None:
    pairs = pairs_of(tmp_path)
    whole, begun, later = (trainer(pairs, encoder=True) for _ in range(3))
    losses = [float(whole.step()) for _ in range(60)]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    for _ in range(25):
        begun.step()
    save_state(tmp_path / "t.state", begun.state())
    later.run(tmp_path / "t.state")
    assert later.update == 60
    for name, value in whole.tiny.state_dict().items():
        assert torch.equal(later.tiny.state_dict()[name], value), name
    for other in (trainer(pairs, key="elsewhere", encoder=True), trainer(pairs)):
        with pytest.raises(BadInput, match="with other settings or other pictures"):
            other.run(tmp_path / "t.state")
    again = pairs_of(tmp_path)
    assert torch.equal(again.rows(torch.tensor([3]))["picture"], pairs.rows(torch.tensor([3]))["picture"])
    learned, judged = held_out(pairs, 4)
    assert not set(torch.cat(learned).tolist()) & set(torch.cat(judged).tolist())


def test_what_lies_beside_a_cut_is_left_out_of_the_loss_and_the_border_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distillation, "WINDOW", 8)
    monkeypatch.setattr(distillation, "MARGIN", 2)
    made, x0, picture = new_tiny(SMALL), torch.randn(1, 4, 4, 16), torch.rand(1, 3, 8, 32)

    def loss(column: int, corner: float) -> float:
        changed = picture.clone()
        changed[..., column] += 1
        where = torch.tensor([0.0, corner])
        return float(tiny_loss(made, x0, changed, corner=where, encoder=False).detach())

    def counts(corner: float) -> list[int]:
        plain = float(
            tiny_loss(made, x0, picture, corner=torch.tensor([0.0, corner]), encoder=False).detach()
        )
        return [column for column in range(32) if loss(column, corner) != plain]

    assert counts(0.0) == list(range(12)), "cells 0 to 5 of 0 to 7: the left is the picture's own border"
    assert counts(0.5) == list(range(12, 20)), "cells 6 to 9 of 4 to 11"
    assert counts(0.99) == list(range(20, 32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_student(folder / "student.safetensors", spec=make_spec(), dial=0.1)
    make_tokenizer(folder / "tokenizer")
    return folder


def told(folder: Path, out: Path, capsys: pytest.CaptureFixture[str], *more: str) -> Any:
    files = ["--ckpt", str(folder / "student.safetensors"), "--tokenizer", str(folder / "tokenizer")]
    short = ["--updates", "3", "--batch-size", "2", "--cache-dir", str(out.parent / "cache"), "--json"]
    tiny.main([*files, "--out", str(out), *short, "--device", "cpu", *more])
    return json.loads(capsys.readouterr().out)


def test_the_command_writes_a_decoder_that_samples_use(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fewstep")
    out = tmp_path / "taesd_decoder.safetensors"
    plan = told(folder, out, capsys, "--pictures", "16", "--dry-run")
    assert plan["evaluations"] == 16 * 4 and not out.exists() and "all about" in caplog.text
    answer = told(folder, out, capsys, "--pictures", "16", "--encoder")
    assert answer["files"] == [str(out), str(tmp_path / "taesd_encoder.safetensors")]
    assert answer["psnr"]["pictures"] == 2 and out.with_suffix(".png").exists()
    assert not out.with_suffix(".state").exists()
    assert set(load_tensors(tmp_path / "taesd_encoder.safetensors")) >= {"0.weight", "1.conv.0.weight"}
    for name, more in {"own": [], "tiny": ["--decoder", str(out)]}.items():
        sample.main(
            [
                *("--ckpt", str(folder / "student.safetensors"), "--tokenizer", str(folder / "tokenizer")),
                *("--prompt", "a fox", "--device", "cpu", "-o", str(tmp_path / f"{name}.png"), *more),
            ]
        )
    own, made = (Image.open(tmp_path / f"{name}.png") for name in ("own", "tiny"))
    assert own.size == made.size and own.tobytes() != made.tobytes()
    foreign = tmp_path / "foreign.safetensors"
    wide = new_tiny({"block_out_channels": (16, 16, 16), "latent_channels": 4})
    save_tensors(taesd_tensors(wide, "decoder"), {}, foreign)
    with pytest.raises(
        BadInput, match=r"4 channels and cells of 4 pixels, and student\.safetensors has 4 and 2"
    ):
        sample.main(
            [
                *("--ckpt", str(folder / "student.safetensors"), "--tokenizer", str(folder / "tokenizer")),
                *(
                    "--prompt",
                    "a",
                    "--device",
                    "cpu",
                    "-o",
                    str(tmp_path / "x.png"),
                    "--decoder",
                    str(foreign),
                ),
            ]
        )


def test_it_learns_from_pictures_without_captions_and_from_latents_that_a_run_has_kept(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number in range(16):
        Image.new("RGB", (20, 16 + number), (9 * number, 90, 30)).save(data / f"{number}.png")
    given = ["--data", str(data), "--resolution", "16"]
    seen = told(folder, tmp_path / "a.safetensors", capsys, *given)
    (kept,) = (tmp_path / "cache").glob("images-*")
    again = told(folder, tmp_path / "b.safetensors", capsys, "--latents", str(kept))
    assert seen["psnr"] == again["psnr"]
    with pytest.raises(BadInput, match="no latents were found"):
        told(folder, tmp_path / "c.safetensors", capsys, "--latents", str(data))
    with pytest.raises(BadInput, match="give one of them"):
        told(folder, tmp_path / "c.safetensors", capsys, *given, "--latents", str(kept))
    with pytest.raises(BadInput, match="nothing to go on with"):
        told(folder, tmp_path / "c.safetensors", capsys, *given, "--resume")
    (tmp_path / "c.state").touch()
    with pytest.raises(BadInput, match="go on by --resume"):
        told(folder, tmp_path / "c.safetensors", capsys, *given)
