"""Small text encoders and VAEs in the real ComfyUI, beside diffusers and transformers on the same file.

ComfyUI's modules run without its server, in one process that answers all the tests.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts.comfyui import Host
from make_checkpoint import SHAPES, make_teacher, make_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

from toolkit.demo import TEACHER, TOKENIZER
from toolkit.training.checkpoint import Checkpoint, open_checkpoint
from toolkit.training.networks import decode_latents, encode_images, encode_texts
from toolkit.training.recognise import build, expected_keys

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = {
    "empty": "",
    "padded": "a red circle",
    "foreign": "Déjà vu!",
    "full": "a small red circle, a large green star, a blue square on white",
    "long": "a large green triangle on a yellow background, " * 4,
}
NAMES = ("demo", "tiny")

WORKER = """
import importlib, json, sys, types
from pathlib import Path

root, folder = Path(sys.argv[1]), Path(sys.argv[2])
sys.argv = [sys.argv[0], "--cpu"]
import torch

sys.path.insert(0, "")
import comfy.options

comfy.options.enable_args_parsing()
import comfy.model_management
import comfy.sd
import comfy.supported_models
from safetensors.torch import load_file, save_file

for name, path in (("pack", root), ("pack.nodes", root / "nodes")):  # without the nodes of nodes/__init__.py
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(path)]
small = importlib.import_module("pack.nodes.small")
BadInput = importlib.import_module("pack.toolkit.diffusion.errors").BadInput

mode = torch.inference_mode()  # in which ComfyUI runs nodes
mode.__enter__()
asked = json.loads((folder / "asked.json").read_text())
tensors, said = {}, {}

def clip_of(weights, checkpoint):
    return small.small_clip(weights, checkpoint=checkpoint, embedding_directory=[str(folder / "embeddings")])

for name, entry in asked["checkpoints"].items():
    checkpoint = Path(entry["path"])
    weights, inputs = load_file(checkpoint), load_file(folder / f"{name}.inputs.safetensors")
    clip, vae = clip_of(weights, checkpoint), small.small_vae(weights)
    said[name] = {
        "knows": [small.knows_clip(weights), small.knows_vae(weights)],
        "dtypes": [
            str(weight.dtype)
            for network in (clip.cond_stage_model, vae.first_stage_model)
            for weight in network.parameters()
        ],
        "ratios": [vae.downscale_ratio, vae.upscale_ratio, vae.latent_channels],
    }
    ours = {}
    for label, prompt in asked["prompts"].items():
        cond, pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
        ours[f"text.{label}"], ours[f"pooled.{label}"] = cond, pooled
    prompt = asked["prompts"]["padded"]
    skipping = clip.clone()
    skipping.clip_layer(-2)
    ours["text.skip"] = skipping.encode(prompt)
    lora = {key: value for key, value in inputs.items() if key.startswith("lora_te")}
    patched = comfy.sd.load_lora_for_models(None, clip, lora, 1.0, 1.0)[1]
    ours["text.lora"] = patched.encode(prompt)
    ours["text.emphasis"] = clip.encode(f"({prompt}:1.3)")
    managed = comfy.model_management.current_loaded_models
    said[name]["managed"] = any(loaded.model.model is clip.cond_stage_model for loaded in managed)
    comfy.model_management.unload_all_models()
    ours["text.again"] = clip.encode(prompt)
    ours["text.embedding"] = clip.encode(f"embedding:{name} circle")

    ours["latents"] = vae.encode(inputs["images"])
    ours["latents.odd"] = vae.encode(inputs["odd"])
    ours["images"] = vae.decode(inputs["latents"])
    ours["images.odd"] = vae.decode(inputs["latents.odd"])
    ours["images.tiled"] = vae.decode_tiled(inputs["latents.large"], tile_x=24, tile_y=24, overlap=8)
    ours["images.large"] = vae.decode(inputs["latents.large"])
    ours["latents.tiled"] = vae.encode_tiled(ours["images.large"], tile_x=96, tile_y=96, overlap=32)
    ours["latents.large"] = vae.encode(ours["images.large"])

    family = comfy.supported_models.SD15({})
    saved = family.process_clip_state_dict_for_saving(clip.get_sd())
    saved |= family.process_vae_state_dict_for_saving(vae.get_sd())
    ours |= {f"saved.{key}": value for key, value in saved.items()}
    ours["text.saved"] = clip_of(saved, checkpoint).encode(prompt)
    ours["images.saved"] = small.small_vae(saved).decode(inputs["latents"])
    tensors |= {f"{name}/{key}": value.float().contiguous() for key, value in ours.items()}

    refusals = said[name]["refusals"] = {}
    for label, change in entry["broken"].items():
        broken = {key: value for key, value in weights.items() if key not in change.get("without", ())}
        broken |= {key: torch.zeros(shape) for key, shape in change.get("reshaped", {}).items()}
        try:
            clip_of(broken, checkpoint)
            small.small_vae(broken)
        except BadInput as error:
            refusals[label] = str(error)

said["knows"] = {
    name: [small.knows_clip(weights), small.knows_vae(weights)]
    for name, shapes in asked["shapes"].items()
    for weights in [{key: torch.empty(shape, device="meta") for key, shape in shapes.items()}]
}
save_file(tensors, folder / "answers.safetensors")
(folder / "said.json").write_text(json.dumps(said))
"""


@dataclass(frozen=True)
class Answers:
    """``ours``: what ComfyUI computed, ``inputs``: from what, ``file``: the weights; ``said``: words."""

    checkpoint: Checkpoint
    file: dict[str, Tensor]
    inputs: dict[str, Tensor]
    ours: dict[str, Tensor]
    said: dict[str, Any]

    def texts(self, *prompts: str) -> Tensor:
        """The toolkit's states of these prompts."""
        encoder = self.checkpoint.text_encoder().requires_grad_(False)
        return encode_texts(prompts, tokenizer=self.checkpoint.tokenizer(), text_encoder=encoder)


@pytest.fixture(scope="module")
def everything(
    comfyui_host: Host, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Answers], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("comfyui")
    tiny = make_teacher(folder / "models" / "tiny.safetensors")
    make_tokenizer(folder / "models" / "tokenizer")
    opened = {
        "demo": open_checkpoint(TEACHER, tokenizer=TOKENIZER),
        "tiny": open_checkpoint(tiny),
    }
    inputs = {name: _inputs(checkpoint) for name, checkpoint in opened.items()}
    for name, values in inputs.items():
        save_file(values, folder / f"{name}.inputs.safetensors")
    (folder / "embeddings").mkdir()
    for name, checkpoint in opened.items():
        tokens = checkpoint.tokenizer()("red", add_special_tokens=False, return_tensors="pt").input_ids[0]
        words = checkpoint.text_encoder().get_input_embeddings()(tokens).detach()
        save_file({"emb_params": words}, folder / "embeddings" / f"{name}.safetensors")
    asked = {
        "prompts": PROMPTS,
        "checkpoints": {
            name: {"path": str(checkpoint.path), "broken": _broken()} for name, checkpoint in opened.items()
        },
        "shapes": _shapes(),
    }
    (folder / "asked.json").write_text(json.dumps(asked))
    comfyui_host.run_script(WORKER, ROOT, folder)
    said = json.loads((folder / "said.json").read_text())
    answers = load_file(folder / "answers.safetensors")
    return {
        name: Answers(
            checkpoint=checkpoint,
            file=load_file(checkpoint.path),
            inputs=inputs[name],
            ours={
                key.partition("/")[2]: value for key, value in answers.items() if key.startswith(f"{name}/")
            },
            said=said[name],
        )
        for name, checkpoint in opened.items()
    }, said["knows"]


@pytest.fixture(params=NAMES)
def answers(everything: tuple[dict[str, Answers], dict[str, Any]], request: pytest.FixtureRequest) -> Answers:
    return everything[0][request.param]


def _inputs(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Pictures as ComfyUI holds them (N, H, W, 3), unscaled latents, and a LoRA of the text encoder."""
    generator = torch.Generator().manual_seed(1)
    channels, factor = checkpoint.latent_channels, checkpoint.downscale
    width = checkpoint.config("text_encoder")["hidden_size"]
    layer = "lora_te_text_model_encoder_layers_0_mlp_fc2"
    hidden = checkpoint.config("text_encoder")["intermediate_size"]
    return {
        "images": torch.rand(2, 32, 48, 3, generator=generator),
        "odd": torch.rand(1, 9 * factor + 1, 7 * factor + factor - 1, 3, generator=generator),
        "latents": torch.randn(2, channels, 8, 12, generator=generator),
        "latents.odd": torch.randn(1, channels, 7, 5, generator=generator),
        "latents.large": torch.randn(1, channels, 40, 56, generator=generator),
        f"{layer}.lora_down.weight": torch.randn(2, hidden, generator=generator) / 8,
        f"{layer}.lora_up.weight": torch.randn(width, 2, generator=generator) / 8,
        f"{layer}.alpha": torch.tensor(2.0),
    }


def _broken() -> dict[str, Any]:
    text = "cond_stage_model.transformer.text_model."
    return {
        "no tokenizer": {"reshaped": {f"{text}embeddings.token_embedding.weight": (700, 64)}},
        "missing text": {"without": [f"{text}encoder.layers.1.mlp.fc2.bias"]},
        "missing text size": {"without": [f"{text}encoder.layers.0.mlp.fc1.weight"]},
        "misshapen text": {"reshaped": {f"{text}encoder.layers.1.mlp.fc1.weight": (11, 64)}},
        "missing vae": {"without": ["first_stage_model.decoder.mid.attn_1.q.weight"]},
        "misshapen vae": {"reshaped": {"first_stage_model.decoder.conv_out.weight": (3, 16, 3, 3)}},
        "uneven vae": {"reshaped": {"first_stage_model.encoder.down.1.block.0.conv1.weight": (80, 64, 3, 3)}},
    }


def _shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    """Keys and shapes of checkpoints and of what else may stand in one."""

    def of(text: Mapping[str, Any], vae: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        keys = expected_keys("text_encoder", build("text_encoder", text))
        keys |= expected_keys("vae", build("vae", {"latent_channels": 4, **vae}))
        return {key: tuple(value.shape) for key, value in keys.items()}

    sd15 = SHAPES["sd15"]
    taesd = {"first_stage_model.taesd_decoder.1.weight": (64, 4, 3, 3)}
    return {
        "sd15": of(sd15.text, sd15.vae),
        "long": of({**sd15.text, "max_position_embeddings": 248}, sd15.vae),
        "shallow": of({**sd15.text, "num_hidden_layers": 6}, {**sd15.vae, "layers_per_block": 1}),
        "taesd": taesd | {"cond_stage_model.model.ln_final.weight": (1024,)},
        "narrow": of(sd15.text, {**sd15.vae, "block_out_channels": (128, 128, 256, 256)}),
        "nothing": {"model.diffusion_model.out.2.bias": (4,)},
    }


def _error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).norm() / theirs.norm())


def test_stock_comfyui_knows_clip_l_the_wide_vae_and_what_is_not_ours(everything: Any) -> None:
    assert everything[1] == {
        "sd15": [True, True],
        "long": [False, True],
        "shallow": [False, False],
        "taesd": [True, True],
        "narrow": [True, False],
        "nothing": [True, True],
    }


def test_stock_comfyui_does_not_know_small_networks(answers: Answers) -> None:
    assert answers.said["knows"] == [False, False]


def test_small_networks_stay_in_float32(answers: Answers) -> None:
    assert set(answers.said["dtypes"]) == {"torch.float32"}


@pytest.mark.parametrize("label", PROMPTS)
def test_text_states_are_the_toolkits(answers: Answers, label: str) -> None:
    assert _error(answers.ours[f"text.{label}"], answers.texts(PROMPTS[label])) < 1e-5


def test_the_pooled_state_is_the_toolkits(answers: Answers) -> None:
    encoder = answers.checkpoint.text_encoder().requires_grad_(False)
    tokens = answers.checkpoint.tokenizer()(PROMPTS["padded"], padding="max_length", return_tensors="pt")
    assert _error(answers.ours["pooled.padded"], encoder(tokens.input_ids).pooler_output) < 1e-5


def test_clip_skip_takes_the_layer_before_the_last(answers: Answers) -> None:
    encoder = answers.checkpoint.text_encoder().requires_grad_(False)
    tokens = answers.checkpoint.tokenizer()(PROMPTS["padded"], padding="max_length", return_tensors="pt")
    states = encoder(tokens.input_ids, output_hidden_states=True).hidden_states
    inner = getattr(encoder, "text_model", encoder)
    assert _error(answers.ours["text.skip"], inner.final_layer_norm(states[-2])) < 1e-5
    assert _error(answers.ours["text.skip"], answers.ours["text.padded"]) > 1e-3


def test_a_lora_of_the_text_encoder_is_applied(answers: Answers) -> None:
    encoder = answers.checkpoint.text_encoder().requires_grad_(False)
    down, up = (
        next(value for key, value in answers.inputs.items() if key.endswith(name))
        for name in ("lora_down.weight", "lora_up.weight")
    )
    getattr(encoder, "text_model", encoder).encoder.layers[0].mlp.fc2.weight += up @ down
    theirs = encode_texts([PROMPTS["padded"]], tokenizer=answers.checkpoint.tokenizer(), text_encoder=encoder)
    assert _error(answers.ours["text.lora"], theirs) < 1e-5
    assert _error(answers.ours["text.padded"], theirs) > 1e-3


def test_emphasis_moves_the_states(answers: Answers) -> None:
    plain, empty = answers.texts(PROMPTS["padded"]), answers.texts("")
    moved = empty + 1.3 * (plain - empty)
    length = answers.checkpoint.tokenizer()(PROMPTS["padded"], return_length=True)["length"]
    words = slice(1, (length[0] if isinstance(length, list) else length) - 1)
    assert _error(answers.ours["text.emphasis"][:, words], moved[:, words]) < 1e-5


def test_an_embedding_of_the_same_width_stands_for_words(answers: Answers) -> None:
    assert _error(answers.ours["text.embedding"], answers.texts("red circle")) < 1e-5


def test_the_text_encoder_comes_and_goes_with_comfyuis_memory_management(answers: Answers) -> None:
    assert answers.said["managed"]
    assert torch.equal(answers.ours["text.again"], answers.ours["text.padded"])


def test_encoding_is_the_toolkits(answers: Answers) -> None:
    vae = answers.checkpoint.vae().requires_grad_(False)
    theirs = encode_images(answers.inputs["images"].movedim(-1, 1), vae) / vae.config["scaling_factor"]
    assert _error(answers.ours["latents"], theirs) < 1e-5


def test_odd_pictures_are_cropped_to_whole_latents(answers: Answers) -> None:
    vae, factor = answers.checkpoint.vae().requires_grad_(False), answers.checkpoint.downscale
    height, width = (size // factor * factor for size in answers.inputs["odd"].shape[1:3])
    top, left = (size % factor // 2 for size in answers.inputs["odd"].shape[1:3])
    cropped = answers.inputs["odd"][:, top : top + height, left : left + width]
    theirs = encode_images(cropped.movedim(-1, 1), vae) / vae.config["scaling_factor"]
    assert _error(answers.ours["latents.odd"], theirs) < 1e-5


@pytest.mark.parametrize("label", ["", ".odd"])
def test_decoding_is_the_toolkits(answers: Answers, label: str) -> None:
    vae = answers.checkpoint.vae().requires_grad_(False)
    theirs = decode_latents(answers.inputs[f"latents{label}"] * vae.config["scaling_factor"], vae)
    assert _error(answers.ours[f"images{label}"].movedim(-1, 1), theirs) < 1e-5


def test_the_ratio_is_the_vaes(answers: Answers) -> None:
    factor = answers.checkpoint.downscale
    assert answers.said["ratios"] == [factor, factor, answers.checkpoint.latent_channels]


def test_tiles_give_the_size_and_nearly_the_picture(answers: Answers) -> None:
    # Normalisation sees a tile instead of the picture: equal only in size and to the eye.
    assert _error(answers.ours["images.tiled"], answers.ours["images.large"]) < 0.2
    assert _error(answers.ours["latents.tiled"], answers.ours["latents.large"]) < 0.2


def test_saving_gives_the_files_keys_and_weights(answers: Answers) -> None:
    saved = {
        key.removeprefix("saved."): value for key, value in answers.ours.items() if key.startswith("saved.")
    }
    parts = {
        key: value.float()
        for key, value in answers.file.items()
        if key.startswith(("cond_stage_model.", "first_stage_model."))
    }
    assert set(saved) == set(parts)
    assert all(torch.equal(saved[key], value) for key, value in parts.items())


def test_what_was_saved_loads_again(answers: Answers) -> None:
    assert torch.equal(answers.ours["text.saved"], answers.ours["text.padded"])
    assert torch.equal(answers.ours["images.saved"], answers.ours["images"])


REFUSALS: dict[str, Callable[[str], bool]] = {
    "no tokenizer": lambda said: "700 tokens" in said and said.endswith("tokenizer"),
    "missing text": lambda said: "text_model.encoder.layers.1.mlp.fc2.bias is missing" in said,
    "missing text size": lambda said: "text_model.encoder.layers.0.mlp.fc1.weight is missing" in said,
    "misshapen text": lambda said: "text encoder" in said and "layers.1.mlp.fc1.weight" in said,
    "missing vae": lambda said: "first_stage_model.decoder.mid.attn_1.q.weight is missing" in said,
    "misshapen vae": lambda said: "VAE" in said and "decoder.conv_out.weight" in said,
    "uneven vae": lambda said: "multiples of the first width" in said,
}


@pytest.mark.parametrize("label", REFUSALS)
def test_what_does_not_fit_is_one_sentence(answers: Answers, label: str) -> None:
    said = answers.said["refusals"][label]
    assert REFUSALS[label](said) and "\n" not in said, said
