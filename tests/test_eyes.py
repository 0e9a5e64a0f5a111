"""What looks at pictures for the distances between sets: the teacher's own UNet, Inception, CLIP."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from make_checkpoint import make_teacher, make_tokenizer
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from toolkit.diffusion.errors import BadInput
from toolkit.evaluation.evaluate import Yardstick
from toolkit.evaluation.eyes import Clip, InceptionEyes, TeacherEyes
from toolkit.evaluation.painter import Painter
from toolkit.training.checkpoint import open_checkpoint

IMAGES = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eyes")
    make_tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module", params=["tiny", "tiny-sdxl", "inpaint"])
def painter(folder, request):
    path = folder / f"{request.param}.safetensors"
    make_teacher(path, **({"in_channels": 9} if request.param == "inpaint" else {"shape": request.param}))
    return Painter.open(open_checkpoint(path, tokenizer=folder / "tokenizer"))


def test_the_teachers_eyes_see_each_picture_by_itself_and_leave_nothing_behind(painter):
    eyes = TeacherEyes(painter, batch=2)
    seen = eyes(IMAGES)
    assert seen.ndim == 2 and len(seen) == 5 and seen.std(0).mean() > 0
    assert torch.allclose(TeacherEyes(painter, batch=5)(IMAGES.flip(0)).flip(0), seen, atol=1e-4)
    assert not any(module._forward_hooks for module in painter.denoiser.network.unet.modules())


def test_the_teacher_finds_a_prompt_by_its_errors_with_and_without_it(painter):
    eyes, prompts = TeacherEyes(painter, batch=2), [f"prompt {number}" for number in range(len(IMAGES))]
    found = eyes.found(IMAGES, prompts)
    together = TeacherEyes(painter, batch=5)
    assert found.shape == (5,) and torch.allclose(together.found(IMAGES, prompts), found, atol=1e-4)
    x0, said = painter.encode(IMAGES), [[""]]

    def texts(prompts: list[str]) -> dict[str, Tensor]:
        said[0] = prompts
        return painter.texts(prompts)

    def knowing(x: Tensor, sigma: Tensor, *, cond: dict[str, Tensor]) -> Tensor:
        return x0 + (torch.arange(5.0)[:, None, None, None] if said[0] == [""] else 0)

    eyes = TeacherEyes(replace(painter, denoiser=knowing, texts=texts), batch=5)
    assert torch.allclose(eyes.found(IMAGES, prompts), torch.arange(5.0).square())


class Small(torch.nn.Module):
    """Called as the TorchScript Inception is: bytes in."""

    def forward(self, images: Tensor, return_features: bool) -> Tensor:
        assert images.dtype == torch.uint8 and return_features
        return images.float().mean((2, 3))


def test_inception_is_read_from_a_torchscript_file(tmp_path):
    path = tmp_path / "inception-2015-12-05.pt"
    torch.jit.script(Small()).save(path)
    assert torch.allclose(InceptionEyes.open(path)(IMAGES) / 255, IMAGES.mean((2, 3)), atol=1e-2)


@pytest.mark.parametrize("content", [b"", b"not a TorchScript file", None])
def test_an_inception_file_that_is_none_is_bad_input(tmp_path, content):
    path = tmp_path / "network.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match="inception-2015-12-05"):
        InceptionEyes.open(path)


@pytest.fixture(scope="module")
def clip(folder) -> Clip:
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    part = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = CLIPConfig(
        text_config={**part, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id},
        vision_config={**part, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder / "clip")
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(processor, tokenizer).save_pretrained(folder / "clip")
    return Clip.open(folder / "clip")


def test_a_clip_score_is_a_hundred_times_the_mean_positive_cosine(clip):
    captions = ["a b", "c", "a b", "d", "c"]
    tokens = clip.processor.tokenizer(captions, padding=True, return_tensors="pt")
    with torch.no_grad():
        texts = clip.model.get_text_features(**tokens).pooler_output
    cosine = torch.cosine_similarity(clip(IMAGES), texts)
    assert clip(IMAGES).shape == (5, 8)
    assert clip.score(IMAGES, captions) == pytest.approx(100 * float(cosine.clamp(min=0).mean()), abs=1e-3)


def test_a_folder_without_a_clip_model_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match="no CLIP model"):
        Clip.open(tmp_path)


def test_eyes_that_are_given_take_the_place_of_the_judges(clip):
    yardstick = Yardstick(eyes=clip, clip=clip)
    assert yardstick.sees and torch.equal(yardstick.see(IMAGES), clip(IMAGES))
    said = yardstick.agreement(IMAGES, ["a"] * 5)
    assert said["adherence"] is None and said["clip_score"] == clip.score(IMAGES, ["a"] * 5)
