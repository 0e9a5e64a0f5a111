"""Which student a picture is made with: the selected checkpoint, a LoRA in the prompt, or one that was
distilled from the selected checkpoint."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modules import sd_models, shared
from torch import Tensor

from ..toolkit.diffusion.errors import BadInput
from ..toolkit.diffusion.spec import StudentSpec
from ..toolkit.runtime.files import load_tensors
from ..toolkit.runtime.library import Library, pick
from ..toolkit.runtime.sentences import DIAL_MISSING, metadata_gone
from ..toolkit.runtime.student import COND_PROJ, LORA_COND_PROJ, StudentFile, time_shift

_LIBRARY = Library()
_LORA = re.compile(r"<lora:([^:>]+)")


@dataclass(frozen=True, eq=False)
class Student:
    """``strength``: of a LoRA; ``warnings``: what its file lacks."""

    name: str
    spec: StudentSpec
    cond_proj: Tensor | None
    strength: float = 1.0
    warnings: tuple[str, ...] = ()

    def shift(self, guidance: float) -> Tensor | None:
        """What joins the time embedding's input at a guidance; None for a student without a dial."""
        if self.cond_proj is None or not self.spec.has_dial:
            return None
        return time_shift(self.spec, self.cond_proj, guidance, strength=self.strength)


def student_of(info: Any) -> Student | None:
    """The student that a checkpoint of the host is, or None."""
    path = Path(info.filename)
    file = _LIBRARY.look(path)
    if file is None or file.spec is None or file.kind == "lora":
        return None
    spec, warnings = file.spec, () if file.stated else (metadata_gone(file.spec),)
    key = next((key for key in file.header.tensors if key.endswith(COND_PROJ)), None)
    if spec.has_dial and key is None:
        spec, warnings = replace(spec, w_embedding=None), (*warnings, DIAL_MISSING)
    return Student(path.name, spec, load_tensors(path, keys=[key])[key] if key else None, 1.0, warnings)


def student_for(p: Any) -> Student | None:
    """The student that is loaded for a picture: the checkpoint, or a student LoRA in the prompt.

    Raises BadInput where there are two.
    """
    found = [] if (student := student_of(shared.sd_model.sd_checkpoint_info)) is None else [student]
    found += _loras(p)
    if len(found) > 1:
        raise BadInput(
            f"{found[0].name} and {found[1].name} are two students at once; choose the checkpoint that "
            f"{found[1].name} was made for, or take it out of the prompt"
        )
    return found[0] if found else None


def expect_student(p: Any) -> Student:
    """:func:`student_for`; BadInput says why there is none, and what to do."""
    if (found := student_for(p)) is not None:
        return found
    base = shared.sd_model.sd_checkpoint_info
    info, _ = find_for(base, steps=p.steps)
    raise BadInput(
        f"{base.name} is no student, and whatever asked for this picture left no way to load {info.name} in "
        "its place; select that checkpoint"
    )


def find_for(base: Any, *, steps: int) -> tuple[Any, str]:
    """The host's checkpoint of a student of ``base``, and a sentence if it is not quite what was asked for.

    BadInput if there is none.
    """
    infos = {Path(info.filename): info for info in _checkpoints()}
    sha256 = base.sha256 or (base.calculate_shorthash() and base.sha256) or ""
    students = _LIBRARY.students_of(sha256, infos)
    preferred = _preferred(base, infos)
    if preferred is not None and preferred not in students:
        file = _LIBRARY.look(preferred)
        if file is None or file.spec is None or file.kind == "lora":
            raise BadInput(
                f"{preferred.name} is named in the settings as the student of {base.name}, and it is none"
            )
        students[preferred] = file.spec
    if not students:
        raise BadInput(_why_none(base, sha256))
    path, note = pick(students, steps=steps, preferred=preferred)
    return infos[path], note


def names_a_student(prompt: str) -> bool:
    """Whether a prompt names a student LoRA."""
    return any(_lora_file(name) is not None for name in _LORA.findall(prompt))


def stated_spec(path: str) -> StudentSpec | None:
    """The spec that a checkpoint file states, or None."""
    file = _LIBRARY.look(Path(path))
    return None if file is None or file.kind == "lora" or not file.stated else file.spec


def _checkpoints() -> Iterator[Any]:
    """The host's checkpoints, and those of the folder in the settings, which the host gets to know."""
    folder = getattr(shared.opts, "fewstep_folder", "")
    there = {Path(info.filename) for info in sd_models.checkpoints_list.values()}
    if folder:
        for path in sorted(Path(folder).rglob("*.safetensors")):
            if path not in there:
                sd_models.CheckpointInfo(str(path)).register()
    yield from list(sd_models.checkpoints_list.values())


def _preferred(base: Any, infos: dict[Path, Any]) -> Path | None:
    """The student that the settings name for a checkpoint: lines of ``checkpoint = student``."""
    for line in getattr(shared.opts, "fewstep_defaults", "").splitlines():
        name, _, student = (part.strip() for part in line.partition("="))
        if student and name in (base.name, base.name_for_extra):
            for path, info in infos.items():
                if student in (info.name, info.name_for_extra):
                    return path
            raise BadInput(
                f"{student} is named in the settings as the student of {name}, and there is none of that name"
            )
    return None


def _why_none(base: Any, sha256: str) -> str:
    what = f"the sampler FewStep needs a student, and {base.name} is none"
    if not sha256:
        return f"{what}; its own could not be looked for, as the host computes no hashes (--no-hashing)"
    return (
        f"{what}, nor was one among the checkpoints distilled from it (SHA-256 {sha256[:10]}); distil it "
        "with `python -m toolkit.distill`, select a student, or choose another sampler"
    )


def _loras(p: Any) -> Iterator[Student]:
    data = p.hr_extra_network_data if getattr(p, "is_hr_pass", False) else p.extra_network_data
    for params in (data or {}).get("lora", []):
        found = _lora_file(params.positional[0]) if params.positional else None
        if found is not None:
            path, file = found
            assert file.spec is not None
            has_dial = LORA_COND_PROJ in file.header.tensors
            cond_proj = load_tensors(path, keys=[LORA_COND_PROJ])[LORA_COND_PROJ] if has_dial else None
            yield Student(path.name, file.spec, cond_proj, _strength(params))


def _lora_file(name: str) -> tuple[Path, StudentFile] | None:
    """The file of a student LoRA that the host's LoRA extension knows by a name."""
    networks = sys.modules.get("networks")
    entry = None
    for known in ("available_network_aliases", "available_networks"):
        entry = entry or getattr(networks, known, {}).get(name)
    file = None if entry is None else _LIBRARY.look(Path(entry.filename))
    return (Path(entry.filename), file) if entry is not None and file and file.kind == "lora" else None


def _strength(params: Any) -> float:
    """On the UNet, as the host reads ``<lora:name:te:unet>``."""
    given = [float(each) for each in params.positional[1:3]] or [1.0]
    text = float(params.named.get("te", given[0]))
    return float(params.named.get("unet", given[1] if len(given) > 1 else text))
