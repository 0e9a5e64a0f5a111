"""LoRA files merged into a teacher: beside diffusers' and peft's own merge, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from make_checkpoint import make_spec, make_student, make_teacher, make_tokenizer
from make_lora import (
    ATTENTION,
    CONVOLUTION,
    LINEAR,
    STYLES,
    TEXT,
    named,
    random_factors,
    save_lora,
    weights_of,
)
from torch import Tensor

from toolkit import inspect
from toolkit.diffusion.errors import BadInput
from toolkit.runtime.files import sha256_of
from toolkit.training.checkpoint import Checkpoint, open_checkpoint
from toolkit.training.lora import describe_lora, merge_loras, parse_lora, read_lora, trigger_words
from toolkit.training.weights import read_weights

STRENGTH = 0.7


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("models")
    make_teacher(folder / "tiny.safetensors")
    make_tokenizer(folder / "tokenizer")
    return open_checkpoint(folder / "tiny.safetensors")


def states(checkpoint: Checkpoint) -> dict[str, Tensor]:
    both = {"unet": checkpoint.unet(), "text_encoder": checkpoint.text_encoder()}
    return {
        f"{part}.{key.removeprefix('text_model.')}": value.detach()
        for part, network in both.items()
        for key, value in network.state_dict().items()
    }


def merged(teacher: Checkpoint, path: Path, strength: float = STRENGTH) -> dict[str, Tensor]:
    return states(merge_loras(teacher, [(read_lora(path), strength)]))


def by_diffusers(teacher: Checkpoint, path: Path, strength: float = STRENGTH) -> dict[str, Tensor]:
    """What stock diffusers makes of the networks: load_lora_weights, fuse, unload."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline: Any = StableDiffusionPipeline(
        vae=teacher.vae(),
        text_encoder=teacher.text_encoder(),
        tokenizer=teacher.tokenizer(),
        unet=teacher.unet(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    pipeline.fuse_lora(lora_scale=strength)
    pipeline.unload_lora_weights()
    both = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    return {
        f"{part}.{key.removeprefix('text_model.')}": value.detach()
        for part, network in both.items()
        for key, value in network.state_dict().items()
    }


def error(ours: dict[str, Tensor], theirs: dict[str, Tensor], base: dict[str, Tensor]) -> tuple[float, float]:
    """The largest relative error of a tensor, and the largest relative change that the LoRA made."""
    assert ours.keys() == theirs.keys()

    def largest(other: dict[str, Tensor]) -> float:
        return max(float((ours[key] - other[key]).norm() / (ours[key].norm() + 1e-12)) for key in ours)

    return largest(theirs), largest(base)


def both_parts(
    style: str, teacher: Checkpoint, targets: tuple[str, ...], **choices: Any
) -> dict[str, Tensor]:
    unet = random_factors(weights_of(teacher, targets), **choices)
    text = random_factors(weights_of(teacher, TEXT, "text_encoder"), **choices, seed=1)
    alpha = 3.0 if style in ("kohya", "single file", "comfyui") else None
    return named(style, teacher, unet, alpha=alpha) | named(
        style, teacher, text, part="text_encoder", alpha=alpha
    )


@pytest.mark.parametrize(
    ("style", "targets"),
    [
        ("kohya", LINEAR),
        ("kohya", LINEAR + CONVOLUTION),
        ("diffusers", LINEAR + CONVOLUTION),
        ("diffusers 0.20", ATTENTION),
        ("processor", ATTENTION),
    ],
)
def test_a_merge_is_diffusers(
    teacher: Checkpoint, tmp_path: Path, style: str, targets: tuple[str, ...]
) -> None:
    if style == "processor":  # today's diffusers reads the UNet's alone in this naming
        tensors = named(style, teacher, random_factors(weights_of(teacher, targets)))
    else:
        tensors = both_parts(style, teacher, targets)
    path = save_lora(tmp_path / "style.safetensors", tensors)
    wrong, change = error(merged(teacher, path), by_diffusers(teacher, path), states(teacher))
    assert wrong < 1e-6 and change > 0.1


def test_every_naming_of_the_same_factors_gives_the_same_teacher(teacher: Checkpoint, tmp_path: Path) -> None:
    unet = random_factors(weights_of(teacher, ATTENTION))
    text = random_factors(weights_of(teacher, TEXT, "text_encoder"))
    made: dict[str, dict[str, Tensor]] = {}
    for style in STYLES:
        tensors = named(style, teacher, unet) | named(style, teacher, text, part="text_encoder")
        made[style] = merged(teacher, save_lora(tmp_path / f"{style}.safetensors", tensors))
    base = states(teacher)
    for style, ours in made.items():
        assert all(torch.equal(ours[key], made["kohya"][key]) for key in ours), style
    changed = [key for key in base if not torch.equal(base[key], made["kohya"][key])]
    assert len(changed) == len(unet) + len(text)


def test_a_dora_is_pefts(teacher: Checkpoint, tmp_path: Path) -> None:
    """At strength 1: peft scales what stands inside the norm, and ComfyUI and we the whole change."""
    factors = random_factors(weights_of(teacher, (*LINEAR[:-2], *CONVOLUTION)), kind="dora-out")
    for values in factors.values():
        magnitude = values.pop("dora")
        values["lora_magnitude_vector"] = (
            magnitude.transpose(0, 1) if magnitude.ndim == 4 else magnitude[:, 0]
        )
    path = save_lora(tmp_path / "dora.safetensors", named("diffusers", teacher, factors))
    theirs = by_diffusers(teacher, path, 1.0)
    wrong, change = error(merged(teacher, path, 1.0), theirs, states(teacher))
    assert wrong < 1e-6 and change > 0.1
    base, half = states(teacher), merged(teacher, path, 0.5)
    assert all(torch.allclose(half[key], (base[key] + theirs[key]) / 2, atol=1e-6) for key in base)


def test_an_alpha_in_diffusers_metadata_counts(teacher: Checkpoint, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils.save_and_load import get_peft_model_state_dict

    unet: Any = teacher.unet()
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "conv1"], alpha_pattern={"mid_block.resnets.0.conv1": 1}
    )
    unet.add_adapter(config)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    metadata = {key: list(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=metadata,
    )
    path = tmp_path / "pytorch_lora_weights.safetensors"
    wrong, change = error(merged(teacher, path), by_diffusers(teacher, path), states(teacher))
    assert wrong < 1e-6 and change > 0.1


def test_pefts_own_folder_with_its_configuration_is_pefts_merge(teacher: Checkpoint, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    unet: Any = teacher.unet()
    model: Any = get_peft_model(
        unet, LoraConfig(r=4, lora_alpha=7, use_rslora=True, target_modules=["to_k", "conv2"])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    model.save_pretrained(tmp_path)
    theirs = {f"unet.{key}": value.detach() for key, value in model.merge_and_unload().state_dict().items()}
    base = states(teacher)
    ours = merged(teacher, tmp_path / "adapter_model.safetensors", 1.0)
    wrong, change = error(ours, base | theirs, base)
    assert wrong < 1e-6 and change > 0.1


def test_a_tucker_update_is_its_three_convolutions_in_a_row(teacher: Checkpoint, tmp_path: Path) -> None:
    weights = weights_of(teacher, ("conv1",))
    factors = random_factors(weights, kind="tucker")
    path = save_lora(tmp_path / "lora.safetensors", named("kohya", teacher, factors, alpha=2.0))
    ours = merged(teacher, path, 1.0)
    for module, weight in weights.items():
        x = torch.randn(1, weight.shape[1], 8, 8, generator=torch.Generator().manual_seed(0))
        values = factors[module]
        low = F.conv2d(F.conv2d(F.conv2d(x, values["down"]), values["mid"]), values["up"]) * (2 / 4)
        whole = F.conv2d(x, ours[f"unet.{module}.weight"])
        assert torch.allclose(whole, F.conv2d(x, weight) + low, atol=1e-4)


def test_whole_differences_and_biases_are_added(teacher: Checkpoint, tmp_path: Path) -> None:
    tensors = {
        "lora_unet_conv_in.diff": torch.full((32, 4, 3, 3), 0.5),
        "lora_unet_conv_in.diff_b": torch.full((32,), 0.25),
        "lora_unet_conv_norm_out.w_norm": torch.full((32,), 2.0),
        "lora_unet_mid_block_attentions_0_proj_in.diff": torch.full((64, 64), 0.1),
    }
    base, ours = states(teacher), merged(teacher, save_lora(tmp_path / "full.safetensors", tensors), 2.0)
    changes = {key: ours[key] - base[key] for key in base if not torch.equal(ours[key], base[key])}
    expected = {
        "unet.conv_in.weight": 1.0,
        "unet.conv_in.bias": 0.5,
        "unet.conv_norm_out.weight": 4.0,
        "unet.mid_block.attentions.0.proj_in.weight": 0.2,
    }
    assert changes.keys() == expected.keys()
    assert all(
        torch.allclose(changes[key], torch.tensor(value), atol=1e-5) for key, value in expected.items()
    )


def test_several_are_merged_and_named_in_the_checkpoint(teacher: Checkpoint, tmp_path: Path) -> None:
    weights = weights_of(teacher, ATTENTION)
    paths = [
        save_lora(tmp_path / f"{n}.safetensors", named("kohya", teacher, random_factors(weights, seed=n)))
        for n in (1, 2)
    ]
    one, two = (read_lora(path) for path in paths)
    both = merge_loras(teacher, [(one, 0.5), (two, -1.0)])
    base, first, second = states(teacher), merged(teacher, paths[0], 0.5), merged(teacher, paths[1], -1.0)
    ours = states(both)
    assert all(torch.allclose(ours[key], first[key] + second[key] - base[key], atol=1e-6) for key in base)
    assert [(lora.name, lora.sha256, lora.strength) for lora in both.loras] == [
        ("1", sha256_of(paths[0]), 0.5),
        ("2", sha256_of(paths[1]), -1.0),
    ]
    assert both.sha256 == teacher.sha256 and both.carried() == teacher.carried() | both.carried()


def test_weights_keep_their_dtype_and_eight_bits_become_sixteen(tmp_path: Path, teacher: Checkpoint) -> None:
    path = save_lora(
        tmp_path / "lora.safetensors", named("kohya", teacher, random_factors(weights_of(teacher, ATTENTION)))
    )
    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    for dtype, expected in ((torch.float16, torch.float16), (torch.float8_e4m3fn, torch.float16)):
        file = make_teacher(tmp_path / "teacher.safetensors", dtype=dtype)
        small = merge_loras(open_checkpoint(file), [(read_lora(path), 1.0)])
        assert small.tensors[key].dtype == expected
        assert small.tensors["first_stage_model.decoder.conv_in.weight"].dtype == dtype
        small.unet()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("style.safetensors", ("style.safetensors", 1.0)),
        ("style.safetensors:0.8", ("style.safetensors", 0.8)),
        (r"C:\models\style.safetensors", (r"C:\models\style.safetensors", 1.0)),
        (r"C:\models\style.safetensors:-.5", (r"C:\models\style.safetensors", -0.5)),
        ("C:7", ("C", 7.0)),
        ("a:b:1e-1", ("a:b", 0.1)),
        ("a:b", ("a:b", 1.0)),
    ],
)
def test_the_strength_stands_after_the_last_colon_if_it_is_a_number(
    text: str, expected: tuple[str, float]
) -> None:
    assert parse_lora(text) == (Path(expected[0]), expected[1])


def wide(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same LoRA for a UNet that attends to 2048 numbers."""
    return {
        key: torch.zeros(len(value), 2048) if "attn2_to_k.lora_down" in key else value
        for key, value in tensors.items()
    }


def refusals(teacher: Checkpoint) -> dict[str, tuple[dict[str, Tensor], str]]:
    good = named("kohya", teacher, random_factors(weights_of(teacher, ATTENTION)))
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    spoiled = {key: value.clone() for key, value in good.items()}
    spoiled[f"{stem}.lora_up.weight"][0, 0] = float("nan")
    foreign = {
        f"lora_unet_nowhere_{n}.lora_{x}.weight": torch.ones(4, 4) for n in range(5) for x in ("up", "down")
    }
    missing = {key: value for key, value in good.items() if key != f"{stem}.lora_up.weight"}
    second = {
        f"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_{x}.weight": torch.ones(4, 4)
        for x in ("up", "down")
    }
    unfit = "layers fit nothing in tiny.safetensors"
    return {
        "five layers of another model": (good | foreign, f"5 of 37 {unfit}"),
        "the first few are listed": (
            good | foreign,
            "lora_unet_nowhere_0, lora_unet_nowhere_1, .* and 2 more",
        ),
        "SDXL": (wide(good), "it seems to be for SDXL"),
        "a second text encoder": (good | second, f"1 of 33 {unfit}.* SDXL"),
        "another shape": (
            good | {"lora_unet_conv_in.diff": torch.zeros(32, 9, 3, 3)},
            "lora_unet_conv_in: 32x9x3x3 for a layer of 32x4x3x3",
        ),
        "NaN": (spoiled, "damaged .*holds NaN"),
        "half a layer": (missing, f"{stem} has no lora_up"),
        "unknown keys": (good | {"what.is.this": torch.ones(1)}, "1 of 65 keys are no LoRA's .what.is.this"),
        "an embedding": ({"emb_params": torch.ones(1, 64)}, "this is an embedding.*--embedding"),
        "nothing": ({"what.is.this": torch.ones(1)}, "holds no LoRA .*what.is.this"),
    }


UNSUPPORTED = {
    "LoHa": "hada_w1_a",
    "LoKr": "lokr_w1",
    "GLoRA": "a1.weight",
    "OFT": "oft_blocks",
    "(IA)3": "on_input",
    "VeRA": "vera_lambda_b",
    "LoRA of embeddings": "lora_embedding_A",
    "LoRA with biases": "lora_B.bias",
    "replaced weights": "set_weight",
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_kinds_that_cannot_be_merged_are_named(teacher: Checkpoint, tmp_path: Path, kind: str) -> None:
    good = named("kohya", teacher, random_factors(weights_of(teacher, ATTENTION)))
    tensors = good | {f"lora_unet_conv_in.{UNSUPPORTED[kind]}": torch.ones(4, 4)}
    path = save_lora(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(BadInput, match=rf"this file holds {re.escape(kind)}, which cannot be merged"):
        read_lora(path)


@pytest.mark.parametrize(
    "label",
    [
        *("five layers of another model", "the first few are listed", "SDXL", "a second text encoder"),
        *("another shape", "NaN", "half a layer", "unknown keys", "an embedding", "nothing"),
    ],
)
def test_what_does_not_fit_is_one_sentence(teacher: Checkpoint, tmp_path: Path, label: str) -> None:
    tensors, sentence = refusals(teacher)[label]
    path = save_lora(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(BadInput, match=sentence) as caught:
        merged(teacher, path)
    assert "\n" not in str(caught.value) and "bad.safetensors" in str(caught.value)


def test_other_files_are_told_by_name(teacher: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="this is a checkpoint, and a LoRA was expected; give it as --ckpt"):
        read_lora(teacher.path)
    student = make_student(tmp_path / "student.safetensors", spec=make_spec())
    with pytest.raises(BadInput, match="this is a student of FewStep"):
        read_lora(student)
    good = named("kohya", teacher, random_factors(weights_of(teacher, ATTENTION)))
    whole = save_lora(tmp_path / "lora.safetensors", good).read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[:-100])
    with pytest.raises(BadInput, match="truncated"):
        read_lora(tmp_path / "short.safetensors")
    with pytest.raises(BadInput, match="no such file"):
        read_lora(tmp_path / "none.safetensors")


def test_too_high_a_strength_for_float16_is_said(tmp_path: Path, teacher: Checkpoint) -> None:
    path = save_lora(tmp_path / "lora.safetensors", {"lora_unet_conv_in.diff": torch.ones(32, 4, 3, 3)})
    half = open_checkpoint(make_teacher(tmp_path / "half.safetensors", dtype=torch.float16))
    with pytest.raises(BadInput, match=r"too large for torch\.float16; give them a lower strength"):
        merge_loras(half, [(read_lora(path), 1e6)])


def test_trigger_words_come_from_the_maker_or_from_what_the_captions_share() -> None:
    tags = {"10_sks style": {"sks style": 20, "1girl": 19, "hat": 3}, "1_reg": {"photo": 1, "dog": 1}}
    assert trigger_words({"ss_tag_frequency": json.dumps(tags)}) == ("sks style", "1girl")
    assert trigger_words(
        {"ss_tag_frequency": json.dumps(tags), "modelspec.trigger_phrase": "in sks style"}
    ) == ("in sks style",)
    shares = {
        "ss_tag_frequency": json.dumps({"a": {"x": 9, "y": 4}}),
        "ss_dataset_dirs": json.dumps({"a": {"img_count": 10}}),
    }
    assert trigger_words(shares) == ("x",)
    assert trigger_words({"ss_datasets": json.dumps([{"subsets": [{"class_tokens": "ohwx man"}]}])}) == (
        "ohwx man",
    )
    assert trigger_words({"ss_tag_frequency": "not json", "modelspec.trigger_phrase": ""}) == ()
    assert trigger_words({}) == ()


def test_inspect_says_kind_rank_family_and_trigger_words(
    teacher: Checkpoint, tmp_path: Path, capsys: Any
) -> None:
    factors = random_factors(weights_of(teacher, LINEAR + CONVOLUTION), rank=2)
    tensors = named("kohya", teacher, factors)
    tensors = {k: torch.zeros(2, 768) if "attn2_to_k.lora_down" in k else v for k, v in tensors.items()}
    path = save_lora(tmp_path / "style.safetensors", tensors, {"modelspec.trigger_phrase": "sks"})
    found = inspect.describe(path)
    assert (found["kind"], found["family"], found["lora"]["ranks"]) == ("lora", "sd1", [2])
    assert found["lora"]["kinds"] == ["LoCon"] and found["lora"]["trigger_words"] == ["sks"]
    inspect.main([str(path)])
    said = capsys.readouterr().out
    assert "style.safetensors: lora, Stable Diffusion 1" in said and "trigger words: sks" in said
    loha = save_lora(tmp_path / "loha.safetensors", {"lora_unet_conv_in.hada_w1_a": torch.ones(4, 4)})
    assert describe_lora(read_weights(loha)).kinds == ("LoHa",)
    inspect.main([str(loha)])
    assert "cannot be merged here: LoHa" in capsys.readouterr().out
