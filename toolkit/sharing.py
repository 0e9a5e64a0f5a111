"""A folder to upload: a student for hosts that know nothing of FewStep, with a card that says how to run it.

Files, card and metadata are made from the student and its spec alone, so that they say what the file does
and nothing of the machine it was made on: a test looks for paths in every byte.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from .demo.drawings import prompts as demo_prompts
from .diffusion.errors import BadInput
from .diffusion.spec import StudentSpec
from .evaluation.painter import Painter
from .evaluation.pictures import fitted, save_png, to_image
from .opening import is_demo
from .runtime.files import atomic_path, sha256_of
from .runtime.privacy import without_paths
from .runtime.sentences import negative_ignored
from .runtime.stock import StockSettings, stock_settings
from .training.checkpoint import Checkpoint
from .training.export import (
    Exported,
    export_baked,
    export_checkpoint,
    export_lora,
    sampling_node,
    spec_of,
)
from .training.prompts import built_in_prompts, style_of

Form = Literal["checkpoint", "baked", "lora"]

SEED = 0
CARD = "README.md"
_MARK = "<!-- Written by FewStep -->"

DIAL_ALONE = (
    "the guidance of this file is set by FewStep's nodes; a host without them ignores the dial, so that the "
    "student runs unguided there, and others get pale pictures: share a baked file with it (--to checkpoint "
    "--to baked)"
)
_NO_LICENCE = (
    "not stated here; a student falls under the terms of its teacher and of the LoRAs merged into it"
)
_WHAT = {
    "checkpoint": "with FewStep's guidance dial; hosts without FewStep run it unguided",
    "baked": "for every host",
    "lora": "LoRA, to be loaded at strength 1 on the teacher",
}


@dataclass(frozen=True)
class Thumbnail:
    """``prompt``: what the student was asked for with the seed; None for somebody's own picture."""

    image: Image.Image
    prompt: str | None
    size: tuple[int, int]


@dataclass(frozen=True)
class Shared:
    """``hashes``: SHA-256 by file name; ``notes``: what the one who shares should know."""

    files: tuple[Path, ...]
    hashes: dict[str, str]
    difference: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Card:
    """What the card and the metadata are written from. ``guidance``: what is folded in."""

    student: Checkpoint
    spec: StudentSpec
    guidance: float
    licence: str | None

    def has_dial(self, form: Form) -> bool:
        return form == "checkpoint" and self.spec.has_dial

    @property
    def stock(self) -> StockSettings | None:
        return stock_settings(self.spec)

    @property
    def steps(self) -> str:
        return f"{self.spec.steps} step{'' if self.spec.steps == 1 else 's'}"

    @property
    def stem(self) -> str:
        """Of the files' names: what any system and any host takes."""
        teacher = re.sub(r"[^\w.-]+", "-", without_paths(self.spec.teacher_name)).strip("-.") or "student"
        return f"{teacher}-{self.steps.replace(' ', '')}"

    @property
    def origin(self) -> str:
        told = f"{_one_line(self.spec.teacher_name)} (SHA-256 {self.spec.teacher_sha256})"
        for lora in self.spec.loras:
            told += f", with the LoRA {_one_line(lora.name)} at {lora.strength:g} (SHA-256 {lora.sha256})"
        return told

    def name(self, form: Form) -> str:
        baked = "" if form == "checkpoint" else f"-cfg{self.guidance:g}"
        return f"{self.stem}{baked}{'-lora' if form == 'lora' else ''}.safetensors"

    def hint(self, form: Form) -> str:
        """The settings in a line: modelspec.usage_hint."""
        if self.has_dial(form):
            low, high = self.spec.guidance_min, self.spec.guidance_max
            return f"FewStep's nodes: {self.steps}, guidance {low:g} to {high:g}"
        if self.stock is None:
            return f"FewStep's sampler and scheduler fewstep, {self.steps}, cfg 1"
        node = sampling_node(self.student)
        names = f"sampler {self.stock.sampler[0]}, scheduler {self.stock.scheduler[0]}"
        return f"{names}, {self.steps}, cfg {self.stock.cfg:g}" + (f", ComfyUI: {node}" if node else "")

    def metadata(self, form: Form, thumbnail: Thumbnail) -> dict[str, str]:
        told = {
            "description": f"Distilled by FewStep from {self.origin}.",
            "usage_hint": self.hint(form),
            "thumbnail": _data_uri(thumbnail.image),
            **({} if self.licence is None else {"license": self.licence}),
        }
        return {f"modelspec.{name}": value for name, value in told.items()}

    def infotext(self, thumbnail: Thumbnail, sha256: str, form: Form) -> dict[str, str]:
        """The thumbnail's text, as A1111 writes and reads it; nothing for a picture from elsewhere."""
        if thumbnail.prompt is None:
            return {}
        stock = None if self.has_dial(form) else self.stock
        settings = {
            "Steps": self.spec.steps,
            "Sampler": "FewStep" if stock is None else stock.sampler[1],
            **({} if stock is None else {"Schedule type": stock.scheduler[1]}),
            "CFG scale": f"{self.guidance if self.has_dial(form) else 1:g}",
            "Seed": SEED,
            "Size": f"{thumbnail.size[0]}x{thumbnail.size[1]}",
            "Model hash": sha256[:10],
            "Model": self.name(form).removesuffix(".safetensors"),
        }
        line = ", ".join(f"{name}: {value}" for name, value in settings.items())
        return {"parameters": f"{thumbnail.prompt}\n{line}"}

    def text(self, hashes: dict[Form, str], picture: str, notes: Sequence[str]) -> str:
        low, high = self.spec.guidance_min, self.spec.guidance_max
        is_free = all(self.has_dial(form) for form in hashes)
        guidance = f"guidance {low:g} to {high:g}" if is_free else f"guidance {self.guidance:g}"
        teacher = _one_line(self.spec.teacher_name)
        parts = [
            f"# {teacher}, {self.steps}, {guidance}",
            f"![A picture]({picture})",
            f"{teacher}, distilled by FewStep: {self.steps}, one evaluation of the network each, {guidance}.",
            "## Settings",
            *([self._settings()] if any(not self.has_dial(form) for form in hashes) else []),
            *([self._dial()] if any(self.has_dial(form) for form in hashes) else []),
            *([_bullets(notes)] if notes else []),
            "## Files",
            self._files(hashes),
            "AutoV2 is the first ten digits of the SHA-256.",
            "## Origin",
            f"* Teacher: {self.origin}",
            f"* Licence: {_one_line(self.licence) if self.licence else _NO_LICENCE}",
            _MARK,
        ]
        return "\n\n".join(parts) + "\n"

    def _settings(self) -> str:
        width, height = self.student.resolution
        if self.stock is None:
            return (
                "No stock sampler walks this student's grid: install FewStep, and choose the sampler and the "
                f"scheduler `fewstep`, {self.steps}, cfg 1, {width} x {height}."
            )
        rows = [
            ("", "ComfyUI", "A1111, Forge"),
            ("---", "---", "---"),
            ("sampler", *self.stock.sampler),
            ("scheduler", *self.stock.scheduler),
            ("steps", *[str(self.stock.steps)] * 2),
            ("cfg", *[f"{self.stock.cfg:g}"] * 2),
            ("size", *[f"{width} x {height}"] * 2),
        ]
        if self.spec.clip_skip != 1:
            skip = self.spec.clip_skip
            rows.append(("CLIP layers", f"CLIP Set Last Layer: -{skip}", f"Clip skip: {skip}"))
        if self.spec.prediction_type == "v_prediction":
            node = sampling_node(self.student)
            beside = "nothing to set" if self.student.of.sizes else "the .yaml beside the file"
            rows.append(("prediction", f"{node}, after the loader" if node else "nothing to set", beside))
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def _dial(self) -> str:
        spec = self.spec
        return (
            f"`{self.name('checkpoint')}` needs FewStep's nodes or extension: sampler and scheduler "
            f"`fewstep`, {self.steps}, cfg (the guidance) {spec.guidance_min:g} to {spec.guidance_max:g}, "
            f"usually {spec.guidance_default:g}."
        )

    def _files(self, hashes: dict[Form, str]) -> str:
        lines = ["| file | | AutoV2 | SHA-256 |", "| --- | --- | --- | --- |"]
        for form, sha256 in hashes.items():
            what = _WHAT["baked" if form == "checkpoint" and not self.spec.has_dial else form]
            lines.append(f"| `{self.name(form)}` | {what} | `{sha256[:10].upper()}` | `{sha256}` |")
        return "\n".join(lines)


def share(
    student: Checkpoint,
    folder: Path,
    *,
    forms: Sequence[Form] = (),
    guidance: float | None = None,
    licence: str | None = None,
    thumbnail: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Shared:
    """Write the folder, its files in fp16; ``forms``: default a baked checkpoint, and the LoRA of a student
    that was trained as one. ``device`` and ``dtype`` paint the thumbnail. BadInput for what cannot be shared.
    """
    spec = spec_of(student)
    if spec.direction != "decode":
        raise BadInput(f"{student.path}: this encoder makes noise of pictures, which no stock host does")
    if spec.baked_guidance is not None:
        raise BadInput(
            f"{student.path}: guidance {spec.baked_guidance:g} is baked into this file; share the student "
            "that it was exported from"
        )
    chosen: tuple[Form, ...] = tuple(forms) or _usual(spec)
    card = Card(student, spec, _guidance(spec, guidance), None if licence is None else without_paths(licence))
    _check_folder(folder, [card.name(form) for form in chosen])
    picture = _given(thumbnail) if thumbnail else _painted(student, card.guidance, device, dtype)
    exported: dict[Form, Exported] = {
        form: _export(student, folder / card.name(form), form, card, card.metadata(form, picture))
        for form in chosen
    }
    if moved := [one.files[0] for form, one in exported.items() if one.files[0].name != card.name(form)]:
        for path in moved:
            path.unlink()
        raise BadInput(f"{folder}: a file in it is open in another program; close it, or name another folder")
    hashes: dict[Form, str] = {form: sha256_of(one.files[0]) for form, one in exported.items()}
    first = chosen[0]
    files = [file for one in exported.values() for file in one.files]
    for form in chosen:
        preview = (folder / card.name(form)).with_suffix(".png")
        save_png(picture.image, preview, card.infotext(picture, hashes[form], form))
        files.append(preview)
    notes = _notes(card, chosen, exported)
    shown = (folder / card.name(first)).with_suffix(".png").name
    with atomic_path(folder / CARD) as partial:
        partial.write_text(card.text(hashes, shown, notes), encoding="utf-8", newline="\n")
    if licence is None:
        notes = (
            *notes,
            f"no licence is stated: look up the terms of {spec.teacher_name}, and give --licence",
        )
    return Shared(
        files=(*files, folder / CARD),
        hashes={card.name(form): sha256 for form, sha256 in hashes.items()},
        difference=max(one.difference for one in exported.values()),
        notes=notes,
    )


def _usual(spec: StudentSpec) -> tuple[Form, ...]:
    if not spec.has_dial:
        return ("checkpoint",)
    return ("baked",) if spec.lora_rank is None else ("baked", "lora")


def _guidance(spec: StudentSpec, asked: float | None) -> float:
    """What is folded in; a student without a dial has one guidance for good."""
    if asked is not None:
        spec.check_guidance(asked)
    return (spec.guidance_default if asked is None else asked) if spec.has_dial else spec.guidance_default


def _export(student: Checkpoint, path: Path, form: Form, card: Card, more: dict[str, str]) -> Exported:
    half = torch.float16
    if form == "baked":
        return export_baked(student, path, guidance=card.guidance, dtype=half, more=more)
    if form == "lora":
        return export_lora(student, path, guidance=card.guidance, dtype=half, more=more)
    return export_checkpoint(student, path, dtype=half, more=more)


def _notes(card: Card, forms: Sequence[Form], exported: dict[Form, Exported]) -> tuple[str, ...]:
    """The exports' own, once each, and what a stock host cannot do."""
    notes = [note for one in exported.values() for note in one.notes]
    if all(card.has_dial(form) for form in forms):
        notes.insert(0, DIAL_ALONE)
    if card.stock is not None and not card.stock.exact:
        notes.append(
            "the scheduler simple lies one timestep beside some of these; FewStep's own, fewstep, does not"
        )
    if card.stock is not None and card.spec.sampler == "consistency":
        notes.append("each host draws the noise between the steps in its own way")
    notes.append(negative_ignored(card.spec))
    notes.append("img2img leaves the trained timesteps in stock hosts; with FewStep's nodes it does not")
    return tuple(dict.fromkeys(without_paths(note) for note in notes))


def _check_folder(folder: Path, models: Sequence[str]) -> None:
    """BadInput for a folder that holds anything but an earlier export of the same files."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise BadInput(f"{folder}: this is a file, and --share writes a folder; name a new one")
    stems = {Path(name).stem for name in models}
    for path in sorted(folder.iterdir()):
        is_card = path.name == CARD and _MARK in path.read_text(encoding="utf-8", errors="replace")
        if not is_card and not (path.stem in stems and path.suffix in (".safetensors", ".png", ".yaml")):
            raise BadInput(f"{folder}: this folder holds other things ({path.name}); name a new or empty one")


def _painted(
    student: Checkpoint, guidance: float, device: torch.device | str, dtype: torch.dtype
) -> Thumbnail:
    """The student's own picture, the same each time."""
    style = style_of(spec_of(student).teacher_name)
    made = demo_prompts(1, seed=SEED) if is_demo(student) else built_in_prompts(1, seed=SEED, style=style)
    painter = Painter.open(student, device=device, dtype=dtype)
    picture = painter.paint(made, seeds=[SEED], guidance=guidance)[0]
    return Thumbnail(fitted(to_image(picture)), made[0], (picture.shape[2], picture.shape[1]))


def _given(path: Path) -> Thumbnail:
    """Somebody's own picture, without the texts and the camera's notes that its file may hold."""
    try:
        with Image.open(path) as opened:
            pixels = opened.convert("RGB")
    except OSError:
        raise BadInput(f"{path}: this cannot be read as a picture; give a PNG or JPEG") from None
    bare = Image.frombytes("RGB", pixels.size, pixels.tobytes())
    return Thumbnail(fitted(bare), None, bare.size)


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _one_line(text: str) -> str:
    return re.sub(r"[\s|]+", " ", without_paths(text)).strip()


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"* {line}" for line in lines)
