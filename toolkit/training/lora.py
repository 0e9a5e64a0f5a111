"""LoRA files in the namings of kohya, diffusers, peft and ComfyUI: read, matched with a teacher's layers, and
merged into its weights.

A file is first taken apart into layers, whatever their names; then each layer's name is looked up among the
teacher's, in diffusers' and in single-file naming, with dots and underscores alike. Everything in a file must
find its place: a LoRA that fits in part is a LoRA for something else.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ..diffusion.errors import BadInput
from ..diffusion.spec import SPEC_KEY, AppliedLora
from ..runtime.files import sha256_of
from .checkpoint import Checkpoint, is_finite
from .families import NAMES, Part
from .layout import text_from_ldm, text_to_ldm, unet_from_ldm, unet_to_ldm
from .recognise import expected_keys, recognise
from .weights import Weights, read_weights

Role = Literal["down", "up", "mid", "alpha", "dora", "magnitude", "diff", "bias"]

_ROLES: dict[Role, str] = {
    "down": r"\.lora_down\.weight|[._]lora\.down\.weight|\.lora_linear_layer\.down\.weight"
    r"|\.lora_A(?:\.\w+)?\.weight|\.lora_A",
    "up": r"\.lora_up\.weight|[._]lora\.up\.weight|\.lora_linear_layer\.up\.weight"
    r"|\.lora_B(?:\.\w+)?\.weight|\.lora_B",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"(?:[._]lora)?\.alpha",
    "dora": r"\.dora_scale",
    "magnitude": r"\.lora_magnitude_vector(?:\.\w+)*",
    "diff": r"\.diff|\.w_norm",
    "bias": r"\.diff_b|\.b_norm",
}
_ROLE = re.compile(
    "(?P<stem>.+?)(?:" + "|".join(f"(?P<{role}>{text})" for role, text in _ROLES.items()) + ")$"
)
_UNSUPPORTED = {
    "LoHa": r"\.hada_(w[12]_[ab]|t[12])$",
    "LoKr": r"\.lokr_(w[12](_[ab])?|t2)$",
    "GLoRA": r"\.[ab][12]\.weight$",
    "OFT": r"\.(oft_(blocks|diag|R\b.*)|rescale)$",
    "(IA)3": r"\.on_input$",
    "VeRA": r"\.vera_lambda_[bd]\b|^base_model\.vera_",
    "LoRA with biases": r"\.lora_[AB](\.\w+)?\.bias$",
    "LoRA of embeddings": r"\.lora_embedding_[AB]\b",
    "replaced weights": r"\.(set_weight|reshape_weight)$",
    "bundled embeddings": r"^bundle_emb\.",
    "Control-LoRA": r"^lora_controlnet$",
}
_PARTS = (
    (r"lora_unet_|lycoris_|unet\.|diffusion_model\.|model\.diffusion_model\.", "unet"),
    (r"lora_te1?_|text_encoder\.|text_encoders\.clip_[lh]\.(transformer\.)?", "text_encoder"),
    (r"lora_te2_|text_encoder_2\.|text_encoders\.clip_g\.(transformer\.)?", "text_encoder_2"),
    (r"(?=(text_model\.)?encoder\.layers\.)", "text_encoder"),
    (r"", "unet"),
)
_FOREIGN = {
    "flux": r"(single_transformer_blocks|double_blocks|single_blocks)[._]\d",
    "sd3": r"joint_blocks[._]\d"
    r"|^(lora_)?transformer[._](single_)?transformer_blocks[._]\d+[._]attn[._]add_",
    "transformer": r"^(lora_)?transformer[._]"
    r"|^lora_unet_+(blocks|layers)_\d|^diffusion_model\.(blocks|layers)\.\d",
}
_CONTEXTS = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "sdxl-refiner"}
"""Width of the text states that a family's UNet attends to."""

_SHOWN = 3
"""Keys that an error lists."""


@dataclass(frozen=True, eq=False)
class Update:
    """One layer's change at strength 1: ``up @ down`` times ``scale``, or a whole difference.

    ``mid`` (LyCORIS' Tucker form) stands between the two; ``magnitude``, broadcast against the weight, makes
    it a DoRA.
    """

    down: Tensor | None = None
    up: Tensor | None = None
    mid: Tensor | None = None
    scale: float = 1.0
    magnitude: Tensor | None = None
    diff: Tensor | None = None
    bias: Tensor | None = None

    @property
    def rank(self) -> int | None:
        return None if self.down is None else self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of what is added to the weight; None if nothing is."""
        if self.diff is not None:
            return tuple(self.diff.shape)
        if self.up is None or self.down is None:
            return None
        kernel = (self.down if self.mid is None else self.mid).shape[2:]
        return (self.up.shape[0], self.down.shape[1], *kernel)

    def delta(self, weight: Tensor) -> Tensor:
        """What is added to ``weight`` (float32) at strength 1, float32.

        A DoRA's magnitude divides by the norm of the updated weight, as its trainers define it.
        """
        if self.diff is not None:
            return self.diff.to(weight).reshape(weight.shape)
        if self.up is None or self.down is None:
            return torch.zeros_like(weight)
        up, down = self.up.to(weight), self.down.to(weight)
        if self.mid is not None:
            inner = torch.einsum("rs...,si->ri...", self.mid.to(weight), down.flatten(1))
        else:
            inner = down
        low_rank = self.scale * (up.flatten(1) @ inner.flatten(1)).reshape(weight.shape)
        if self.magnitude is None:
            return low_rank
        updated = weight + low_rank
        magnitude = self.magnitude.to(weight)
        others = [axis for axis in range(weight.ndim) if magnitude.shape[axis] == 1]
        norm = updated.square().sum(others, keepdim=True).sqrt() + torch.finfo(weight.dtype).eps
        return updated * (magnitude / norm) - weight


@dataclass(frozen=True, eq=False)
class LoraFile:
    """``updates`` by the layer names that the file itself uses; ``family``: what it seems to be for."""

    path: Path
    updates: Mapping[str, Update]
    unsupported: tuple[str, ...]
    unknown: tuple[str, ...]
    family: str | None
    triggers: tuple[str, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        updates = self.updates.values()
        found = {
            "LoRA": any(u.down is not None and u.magnitude is None for u in updates),
            "LoCon": any(_is_spatial(u) for u in updates),
            "DoRA": any(u.magnitude is not None for u in updates),
            "differences": any(u.diff is not None or u.bias is not None for u in updates),
        }
        if found["LoCon"]:
            found["LoRA"] = False
        return (*(kind for kind, is_there in found.items() if is_there), *self.unsupported)

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({u.rank for u in self.updates.values() if u.rank is not None}))

    def summary(self) -> str:
        """Kinds, ranks and layers, for people."""
        ranks = "/".join(map(str, self.ranks))
        return (
            " and ".join(self.kinds)
            + (f" of rank {ranks}" if ranks else "")
            + f", {len(self.updates)} layers"
        )

    def describe(self) -> dict[str, Any]:
        return {
            "kinds": list(self.kinds),
            "ranks": list(self.ranks),
            "layers": len(self.updates),
            "trigger_words": list(self.triggers),
            "unsupported": list(self.unsupported),
            "unknown": list(self.unknown),
        }


def parse_lora(text: str) -> tuple[Path, float]:
    """``FILE[:STRENGTH]``: split at the last colon, and only if a number follows; strength 1 by default."""
    name, colon, number = text.rpartition(":")
    try:
        strength = float(number)
    except ValueError:
        return Path(text), 1.0
    if not colon or not name or Path(text).exists():
        return Path(text), 1.0
    if not math.isfinite(strength):
        raise BadInput(f"--lora {text}: the strength {number} is no finite number, such as 0.8")
    return Path(name), strength


def read_lora(path: Path) -> LoraFile:
    """A LoRA whose every key is understood; BadInput for other files, damaged ones and unsupported kinds."""
    weights = read_weights(path)
    container = recognise(weights.tensors).container
    if SPEC_KEY in weights.metadata or "fewstep.cond_proj.weight" in weights.tensors:
        raise BadInput(f"{path}: this is a student of FewStep, and a LoRA for the teacher was expected")
    if container not in ("lora", "unknown"):
        hint = {"checkpoint": "; give it as --ckpt", "embedding": "; give it as --embedding"}.get(
            container, ""
        )
        article = "an" if container[0] in "aeiou" else "a"
        raise BadInput(f"{path}: this is {article} {container}, and a LoRA was expected{hint}")
    lora = describe_lora(weights)
    if not lora.updates and not lora.unsupported:
        raise BadInput(
            f"{path}: this file holds no LoRA (its keys are like {next(iter(weights.tensors), '-')})"
        )
    if lora.unsupported:
        kinds = " and ".join(lora.unsupported)
        raise BadInput(
            f"{path}: this file holds {kinds}, which cannot be merged here; LoRA, LoCon, DoRA and whole "
            "differences can (bake others into the checkpoint with the program that made them)"
        )
    if lora.unknown:
        raise BadInput(
            f"{path}: {len(lora.unknown)} of {len(weights.tensors)} keys are no LoRA's ({_few(lora.unknown)})"
        )
    for key, value in weights.tensors.items():
        if not is_finite(value):
            raise BadInput(f"{path}: the weights are damaged ({key} holds NaN or infinity)")
    return lora


def describe_lora(weights: Weights) -> LoraFile:
    """What is in a LoRA file, whether it can be used or not; BadInput for a layer whose factors are not
    whole.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    unsupported: dict[str, None] = {}
    unknown: list[str] = []
    for key, value in weights.tensors.items():
        kind = next((name for name, pattern in _UNSUPPORTED.items() if re.search(pattern, key)), None)
        if kind is not None:
            unsupported[kind] = None
        elif match := _ROLE.match(key):
            layers.setdefault(match["stem"], {})[match.lastgroup or ""] = value
        elif not key.startswith("fewstep."):
            unknown.append(key)
    adapters = _adapter_configs(weights)
    updates = {stem: _update(weights.path, stem, found, adapters) for stem, found in layers.items()}
    return LoraFile(
        path=weights.path,
        updates={stem: update for stem, update in updates.items() if update is not None},
        unsupported=tuple(unsupported),
        unknown=tuple(unknown),
        family=_family(weights),
        triggers=trigger_words(weights.metadata),
    )


def match_lora(lora: LoraFile, checkpoint: Checkpoint) -> dict[tuple[Part, str], Update]:
    """The updates by part and diffusers' module name; BadInput that lists those without a place."""
    networks: dict[Part, Any] = {
        part: net for part, net in checkpoint.empty_networks().items() if part != "vae"
    }
    places = {part: _module_names(part, network) for part, network in networks.items()}
    parameters = {part: network.state_dict() for part, network in networks.items()}
    found: dict[tuple[Part, str], Update] = {}
    homeless: list[str] = []
    for stem, update in lora.updates.items():
        part, name = _place_of(stem)
        module = places.get(part, {}).get(name)
        if module is None:
            homeless.append(stem)
            continue
        if wrong := _misfit(update, parameters[part], module):
            homeless.append(f"{stem}: {wrong}")
            continue
        found[part, module] = update
    if homeless:
        seems = ""
        if lora.family not in (None, checkpoint.family):
            seems = f"; it seems to be for {NAMES[lora.family or '']}"
        raise BadInput(
            f"{lora.path}: {len(homeless)} of {len(lora.updates)} layers fit nothing in "
            f"{checkpoint.path.name}, which is {NAMES[checkpoint.family]} ({_few(homeless)}){seems}; "
            "choose a LoRA made for this teacher"
        )
    return found


def merge_loras(checkpoint: Checkpoint, loras: Sequence[tuple[LoraFile, float]]) -> Checkpoint:
    """The checkpoint with LoRAs merged in, one after the other, in float32; weights keep their dtype.

    Weights in fp8 become fp16: a small update would be lost in them.
    """
    changes: dict[Part, dict[str, list[tuple[Update, float]]]] = {}
    for lora, strength in loras:
        for (part, module), update in match_lora(lora, checkpoint).items():
            changes.setdefault(part, {}).setdefault(module, []).append((update, strength))
    tensors = dict(checkpoint.tensors)
    for part, modules in changes.items():
        tensors |= _merged(checkpoint, part, modules)
    applied = tuple(AppliedLora(lora.path.stem, sha256_of(lora.path), strength) for lora, strength in loras)
    return replace(checkpoint, tensors=tensors, loras=applied)


def with_loras(checkpoint: Checkpoint, texts: Sequence[str]) -> Checkpoint:
    """The checkpoint with the LoRAs ``FILE[:STRENGTH]`` merged in."""
    asked = [parse_lora(text) for text in texts]
    return merge_loras(checkpoint, [(read_lora(file), strength) for file, strength in asked])


def trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """What a LoRA's maker says that it answers to; else what nearly every caption of its training has."""
    said = [
        metadata.get(name, "") for name in ("modelspec.trigger_phrase", "trigger_phrase", "trigger_words")
    ]
    words = [word.strip() for text in said for word in _listed(text)]
    for dataset in _json(metadata.get("ss_datasets"), list):
        for subset in dataset.get("subsets") or ():
            words.append(str(subset.get("class_tokens") or "").strip())
    if not any(words):
        folders = _json(metadata.get("ss_tag_frequency"), dict)
        pictures = _json(metadata.get("ss_dataset_dirs"), dict)
        for folder, tags in cast("dict[str, dict[str, int]]", folders).items():
            count = int((pictures.get(folder) or {}).get("img_count") or max(tags.values(), default=0))
            words += [tag.strip() for tag, times in tags.items() if count > 1 and times >= 0.9 * count][
                :_SHOWN
            ]
    return tuple(dict.fromkeys(word for word in words if word))


def _merged(
    checkpoint: Checkpoint, part: Part, modules: Mapping[str, Sequence[tuple[Update, float]]]
) -> dict[str, Tensor]:
    """The single-file tensors of a part, those of ``modules`` updated."""
    state = _state(checkpoint, part)
    for module, updates in modules.items():
        keys = {"weight": f"{module}.weight", "bias": f"{module}.bias"}
        for which, key in keys.items():
            if which == "bias" and not any(update.bias is not None for update, _ in updates):
                continue
            stored = state[key]
            value = stored.float()
            for update, strength in updates:
                if which == "weight":
                    value = value + strength * update.delta(value)
                elif update.bias is not None:
                    value = value + strength * update.bias.float()
            dtype = torch.float16 if stored.element_size() == 1 else stored.dtype
            if not is_finite(value := value.to(dtype)):
                raise BadInput(
                    f"{checkpoint.path}: with the LoRAs merged, {key} is too large for {dtype}; "
                    "give them a lower strength"
                )
            state[key] = value
    return unet_to_ldm(state) if part == "unet" else text_to_ldm(state, checkpoint.of.encoder(part))


def _state(checkpoint: Checkpoint, part: Part) -> dict[str, Tensor]:
    """A part's weights by diffusers' names, without ``text_model.``; memory-mapped where they can be."""
    network = checkpoint.empty_networks()[part]
    if part == "unet":
        return unet_from_ldm({key: checkpoint.tensors[key] for key in expected_keys(part, network)})
    found = text_from_ldm(checkpoint.tensors, checkpoint.of.encoder(part))
    keys = (key.removeprefix("text_model.") for key in network.state_dict() if "position_ids" not in key)
    # A text encoder that fuses layers in its file needs them in one dtype.
    return {key: found[key].half() if found[key].element_size() == 1 else found[key] for key in keys}


def _update(path: Path, stem: str, found: Mapping[str, Tensor], adapters: Mapping[str, Any]) -> Update | None:
    """None for an alpha that belongs to nothing."""
    down, up = found.get("down"), found.get("up")
    if set(found) == {"alpha"}:
        return None
    if (down is None) != (up is None) or (down is None and not {"diff", "bias"} & set(found)):
        missing = "lora_down" if down is None else "lora_up"
        raise BadInput(f"{path}: the layer {stem} has no {missing}, so this LoRA is damaged")
    mid, scale, magnitude = found.get("mid"), 1.0, None
    if down is not None and up is not None:
        rank = down.shape[0]
        fits = (
            down.ndim in (2, 4)
            and up.ndim in (2, 4)
            and up.shape[1] == (rank if mid is None else mid.shape[0])
        )
        if not fits or (mid is not None and mid.shape[1] != rank):
            raise BadInput(
                f"{path}: the factors of {stem} do not fit each other ({tuple(up.shape)} and "
                f"{tuple(down.shape)}), so this LoRA is damaged"
            )
        scale = _scale(stem, rank, found.get("alpha"), adapters)
        magnitude = found.get("dora")
        if (whole := found.get("magnitude")) is not None:  # peft's is always that of the outputs
            magnitude = whole.reshape(-1, *[1] * (up.ndim - 1))
        elif magnitude is not None and magnitude.ndim == 1:
            magnitude = magnitude.reshape(-1, *[1] * (up.ndim - 1))
    return Update(down, up, mid, scale, magnitude, found.get("diff"), found.get("bias"))


def _scale(stem: str, rank: int, alpha: Tensor | None, adapters: Mapping[str, Any]) -> float:
    """alpha / rank; without an alpha what peft's configuration says, else 1."""
    adapter = adapters.get(_place_of(stem)[0], {})
    divisor = math.sqrt(rank) if adapter.get("use_rslora") else rank
    if alpha is not None:
        return float(alpha.float()) / divisor
    patterns: dict[str, float] = adapter.get("alpha_pattern") or {}
    own = next((value for name, value in patterns.items() if stem.endswith(name)), adapter.get("lora_alpha"))
    return 1.0 if own is None else float(own) / divisor


def _adapter_configs(weights: Weights) -> Mapping[str, dict[str, Any]]:
    """peft's configurations by part: in diffusers' metadata, or beside an adapter_model file."""
    parts = ("unet", "text_encoder", "text_encoder_2")
    if said := _json(weights.metadata.get("lora_adapter_metadata"), dict):
        return {
            part: {
                key.removeprefix(f"{part}."): value
                for key, value in said.items()
                if key.startswith(f"{part}.")
            }
            for part in parts
        }
    beside = weights.path.parent / "adapter_config.json"
    if weights.path.stem == "adapter_model" and beside.is_file():
        return dict.fromkeys(parts, _json(beside.read_text(encoding="utf-8-sig"), dict))
    return {}


def _place_of(stem: str) -> tuple[Part, str]:
    """The part and the module's name, with underscores, that a layer's name in a file means."""
    stem = re.sub(r"^(unet\.|text_encoder(_2)?\.)?base_model\.model\.", r"\1", stem)
    for pattern, part in _PARTS:
        if match := re.match(pattern, stem):
            name = stem[match.end() :]
            if part == "unet":
                name = re.sub(r"\.processor\.to_out$", ".to_out.0", name).replace(".processor.", ".")
            else:
                name = re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", name)
            return cast(Part, part), name.replace(".", "_").removeprefix("text_model_")
    raise AssertionError("the last pattern matches everything")


def _module_names(part: Part, network: torch.nn.Module) -> dict[str, str]:
    """Every name, with underscores, that files call the network's modules by -> diffusers' name."""
    keys = [key for key in network.state_dict() if key.endswith(".weight")]
    names = {key.removeprefix("text_model."): key.removeprefix("text_model.") for key in keys}
    if part == "unet":
        theirs = unet_to_ldm({key: torch.empty(0) for key in network.state_dict()})
        both = zip(network.state_dict(), theirs, strict=True)
        prefix = "model.diffusion_model."
        names |= {ldm.removeprefix(prefix): key for key, ldm in both if key.endswith(".weight")}
    return {
        theirs.removesuffix(".weight").replace(".", "_"): ours.removesuffix(".weight")
        for theirs, ours in names.items()
    }


def _misfit(update: Update, parameters: Mapping[str, Tensor], module: str) -> str | None:
    """How the update's shape differs from the layer's, if it does."""
    state = (
        parameters
        if f"{module}.weight" in parameters
        else {key.removeprefix("text_model."): value for key, value in parameters.items()}
    )
    weight, bias = state[f"{module}.weight"], state.get(f"{module}.bias")
    if update.shape is not None and _plain(update.shape) != _plain(weight.shape):
        return f"{_sizes(update.shape)} for a layer of {_sizes(weight.shape)}"
    if update.magnitude is not None:
        sizes = tuple(update.magnitude.shape)
        if len(sizes) != weight.ndim or sizes not in (_only(weight, 0), _only(weight, 1)):
            return f"a magnitude of {_sizes(sizes)} for a layer of {_sizes(weight.shape)}"
    if update.bias is not None and (bias is None or update.bias.shape != bias.shape):
        return "a bias that the layer has not"
    return None


def _plain(shape: Sequence[int]) -> tuple[int, ...]:
    """A 1x1 convolution's shape as a matrix's."""
    return tuple(shape[:2]) if len(shape) == 4 and tuple(shape[2:]) == (1, 1) else tuple(shape)


def _only(weight: Tensor, axis: int) -> tuple[int, ...]:
    return tuple(size if number == axis else 1 for number, size in enumerate(weight.shape))


def _is_spatial(update: Update) -> bool:
    """Whether it updates a convolution that looks at neighbours."""
    return update.mid is not None or (update.down is not None and math.prod(update.down.shape[2:]) > 1)


def _family(weights: Weights) -> str | None:
    """What the LoRA seems to be made for, by its keys and shapes, else by its metadata."""
    for family, pattern in _FOREIGN.items():
        if any(re.search(pattern, key) for key in weights.tensors):
            return family
    for key, value in weights.tensors.items():
        is_input = re.search(r"attn2[._](processor[._])?to_k.*(lora_down|lora\.down|lora_A|hada_w1_b)", key)
        if is_input and value.ndim >= 2 and value.shape[1] in _CONTEXTS:
            return _CONTEXTS[value.shape[1]]
    if any(re.match(r"lora_te2_|text_encoder_2\.", key) for key in weights.tensors):
        return "sdxl"
    said = " ".join(
        weights.metadata.get(name, "") for name in ("modelspec.architecture", "ss_base_model_version")
    ).lower()
    known = (("xl", "sdxl"), ("flux", "flux"), ("diffusion-v1", "sd1"), ("sd_v1", "sd1"), ("v2", "sd2"))
    return next((family for word, family in known if word in said), None)


def _listed(text: str) -> list[str]:
    """Words in a JSON list, or the text itself."""
    found = _json(text, list)
    return [str(word) for word in found] if found else [text]


def _json(text: str | None, kind: type[Any]) -> Any:
    """JSON of the kind, empty for anything else: metadata is anyone's."""
    try:
        found: Any = json.loads(text or "")
    except ValueError:
        return kind()
    return found if isinstance(found, kind) else kind()


def _few(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _sizes(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
