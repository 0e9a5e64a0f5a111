"""StudentSpec: all that a host must know of a student, as JSON in its file's metadata (key
``fewstep.spec``).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from .errors import BadInput
from .prediction import PredictionType

FORMAT = 1
SPEC_KEY = "fewstep.spec"

Sampler = Literal["deterministic", "stochastic", "consistency"]


@dataclass(frozen=True)
class WEmbedding:
    dim: int = 256
    scale: float = 1000.0


@dataclass(frozen=True)
class AppliedLora:
    name: str
    sha256: str
    strength: float


@dataclass(frozen=True)
class AppliedEmbedding:
    """A textual inversion that prompts could name while the student was trained."""

    name: str
    sha256: str


@dataclass(frozen=True)
class StudentSpec:
    """Guidance is in guidance_scale (1 = none); timesteps are training indices, descending for a decoder."""

    family: Literal["sd1", "sd2", "sdxl", "pixel"]
    prediction_type: PredictionType
    method: str
    timesteps: tuple[int, ...]
    teacher_sha256: str
    teacher_name: str
    format: int = FORMAT
    inpaint: bool = False
    ztsnr: bool = False
    sampler: Sampler = "deterministic"
    direction: Literal["decode", "encode"] = "decode"
    any_start: bool = True
    container: Literal["checkpoint", "lora"] = "checkpoint"
    baked_guidance: float | None = None
    guidance_min: float = 1.0
    guidance_max: float = 15.0
    guidance_default: float = 7.5
    w_embedding: WEmbedding | None = field(default_factory=WEmbedding)
    negative: str = ""
    clip_skip: int = 1
    cfg_rescale: float = 0.0
    loras: tuple[AppliedLora, ...] = ()
    embeddings: tuple[AppliedEmbedding, ...] = ()
    lora_rank: int | None = None
    toolkit: str = "0.1.0"

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @property
    def has_dial(self) -> bool:
        """Whether a host can choose the guidance. A LoRA is baked only for stock loaders; ours take it
        off."""
        return self.w_embedding is not None and (self.baked_guidance is None or self.container == "lora")

    @property
    def unusual_clip_skip(self) -> int | None:
        """The layer of the text encoders, from the end, where it is not the one that hosts read unasked."""
        usual = 2 if self.family in ("sd2", "sdxl") else 1
        return self.clip_skip if self.clip_skip > usual else None

    def check_guidance(self, guidance: float) -> None:
        """BadInput unless this student can run at the guidance_scale."""
        if self.baked_guidance is not None and guidance != self.baked_guidance:
            raise BadInput(
                f"guidance {guidance:g} was asked for, but this file has guidance {self.baked_guidance:g} "
                "baked in; use the student that it was exported from for another"
            )
        if not self.guidance_min <= guidance <= self.guidance_max:
            raise BadInput(
                f"guidance {guidance:g} was asked for, but this student was trained for guidance "
                f"{self.guidance_min:g} to {self.guidance_max:g}; choose one in that range"
            )

    def to_json(self) -> str:
        values = asdict(self)
        if not self.embeddings:  # files without any stay what they were before there was the field
            del values["embeddings"]
        return json.dumps(values, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> StudentSpec:
        """Raises BadInput for a newer format, unknown or missing fields, or text that is no JSON object."""
        try:
            found: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise BadInput(
                f"{SPEC_KEY} in the file's metadata is not JSON ({error}); export the student anew"
            ) from None
        if not isinstance(found, dict):
            raise BadInput(f"{SPEC_KEY} in the file's metadata is not a JSON object; export the student anew")
        values: dict[str, Any] = dict(found)  # type: ignore[reportUnknownArgumentType]
        if not isinstance(values.get("format"), int) or values["format"] > FORMAT:
            raise BadInput(
                f"this student's file has format {values.get('format')}, and this FewStep reads formats "
                f"up to {FORMAT}; update FewStep"
            )
        names = {f.name for f in fields(cls)}
        required = {"family", "prediction_type", "method", "timesteps", "teacher_sha256", "teacher_name"}
        if wrong := sorted((set(values) - names) | (required - set(values))):
            raise BadInput(
                f"{SPEC_KEY} has unknown or missing fields: {', '.join(wrong)}; export the student anew"
            )
        values["timesteps"] = tuple(int(t) for t in values["timesteps"])
        values["loras"] = tuple(AppliedLora(**lora) for lora in values.get("loras", ()))
        values["embeddings"] = tuple(AppliedEmbedding(**each) for each in values.get("embeddings", ()))
        if values.get("w_embedding") is not None:
            values["w_embedding"] = WEmbedding(**values["w_embedding"])
        return cls(**values)
