"""Text-guided editing: a picture encoded into noise with one text, and decoded from it with another.

Encoding is unguided; the decoder brings its own guidance. What the texts have in common stays, because the
noise holds it (Meng et al. 2023, section on encoders).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..diffusion.errors import BadInput
from .metrics import Attributes, psnr
from .painter import DEFAULT_STEPS, Painter
from .pictures import grid
from .showcase import Showcase


@dataclass(frozen=True, eq=False)
class Editor:
    """``encoder``: a student of method inversion, or a teacher; ``decoder``: any other student, or a teacher.
    Steps are those of a teacher.
    """

    encoder: Painter
    decoder: Painter
    encoder_steps: int | None = None
    decoder_steps: int | None = None

    def __post_init__(self) -> None:
        if self.encoder.latent_shape() != self.decoder.latent_shape():
            raise BadInput(
                f"the encoder's latents are {self.encoder.latent_shape()}, the decoder's are "
                f"{self.decoder.latent_shape()}; give two that were distilled from one teacher"
            )

    def edit(
        self,
        images: Tensor,
        before: Sequence[str],
        after: Sequence[str],
        *,
        guidance: float | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Pictures (N, 3, H, W) in [0, 1] that show ``after`` where the given ones show ``before``; the seed
        is for decoders that add noise.
        """
        noise = self.encoder.invert(self.decoder.encode(images), before, steps=self.encoder_steps)
        seeds = range(seed, seed + len(images))
        x0 = self.decoder.latents(
            after, seeds=seeds, noise=noise, guidance=guidance, steps=self.decoder_steps
        ).x0
        return self.decoder.decode(x0)

    def round_trip(self, images: Tensor, prompts: Sequence[str]) -> float:
        """Mean PSNR, in dB, of pictures encoded and decoded unguided with their own texts, to what the
        autoencoder alone makes of them.
        """
        kept = self.decoder.decode(self.decoder.encode(images))
        return float(psnr(self.edit(images, prompts, prompts, guidance=1.0), kept).mean())


@dataclass(frozen=True)
class EditScore:
    """Shares: of edits whose named attribute became what was asked for; of the other attributes that stayed;
    of edits in which all of those stayed.
    """

    changed: float
    kept: float
    all_kept: float


def score_edits(
    judge: Attributes, images: Tensor, edited: Tensor, *, changed: Sequence[str], wanted: Sequence[int]
) -> EditScore:
    """``changed`` names the attribute that each edit asks for, ``wanted`` its new word's index."""
    before, found = judge.attributes(images), judge.attributes(edited)
    became = torch.tensor(
        [int(found[c][row]) == w for row, (c, w) in enumerate(zip(changed, wanted, strict=True))]
    )
    same = torch.stack([found[name] == before[name] for name in found], dim=1)
    named = torch.tensor([[name == c for name in found] for c in changed])
    kept = same[~named].float().mean()
    return EditScore(float(became.float().mean()), float(kept), float((same | named).all(1).float().mean()))


@dataclass(frozen=True, eq=False)
class Edits:
    """What edits are measured on: pictures (N, 3, H, W), their texts, those to be edited to, and for the
    judge which attribute that changes and the index of its new word.
    """

    images: Tensor
    before: Sequence[str]
    after: Sequence[str]
    changed: Sequence[str] = ()
    wanted: Sequence[int] = ()


def edit_rows(
    encoders: Mapping[str, Painter],
    decoders: Mapping[str, Painter],
    edits: Edits,
    *,
    guidances: Sequence[float],
    judge: Attributes | None = None,
) -> Iterator[dict[str, Any]]:
    """One row for each encoder, decoder and guidance: ``psnr`` at guidance 1, with the pictures' own texts,
    to what the autoencoder makes of them; at the others the scores of the edits. What does not apply is None.
    """
    for encoder_name, encoder in encoders.items():
        x0 = encoder.encode(edits.images)
        noise = encoder.invert(x0, edits.before)
        for name, decoder in decoders.items():
            for guidance in (g for g in dict.fromkeys((1.0, *guidances)) if decoder.runs_at(g)):
                texts = edits.before if guidance == 1 else edits.after
                painted = decoder.latents(texts, seeds=range(len(texts)), noise=noise, guidance=guidance)
                images = decoder.decode(painted.x0)
                score = None
                if judge is not None and guidance != 1:
                    score = score_edits(
                        judge, edits.images, images, changed=edits.changed, wanted=edits.wanted
                    )
                yield {
                    "encoder": encoder_name,
                    "encoder_evaluations": len(encoder.encoding().timesteps),
                    "decoder": name,
                    "decoder_evaluations": painted.plan.evaluations,
                    "guidance": guidance,
                    "samples": len(texts),
                    "psnr": float(psnr(images, decoder.decode(x0)).mean()) if guidance == 1 else None,
                    **dict.fromkeys(("changed", "kept", "all_kept")),
                    **({} if score is None else asdict(score)),
                }


def encoder_showcase(
    encoder: Painter,
    teacher: Painter,
    images: Tensor,
    before: Sequence[str],
    after: Sequence[str],
    *,
    guidance: float,
) -> Showcase:
    """What an encoder does, by its teacher's decoding: round trips and edits, beside the teacher's own."""
    editors = {"teacher": Editor(teacher, teacher), "encoder": Editor(encoder, teacher)}
    columns, labels = [images], ["picture"]
    for name, editor in editors.items():
        columns.append(editor.edit(images, before, before, guidance=1.0))
        columns.append(editor.edit(images, before, after, guidance=guidance))
        labels += [f"{name}, and back", f"{name}, edited"]
    cells = [[column[row] for column in columns] for row in range(len(images))]
    names = [f"{old} -> {new}" for old, new in zip(before, after, strict=True)]
    trips = {name: editor.round_trip(images, before) for name, editor in editors.items()}
    steps = len(encoder.encoding().timesteps)
    caption = (
        f"Encoded by the teacher in {DEFAULT_STEPS} steps and by the {steps}-step encoder, decoded by the "
        f"teacher in {DEFAULT_STEPS}: back at guidance 1, and with another text at guidance {guidance:g}."
    )
    verdict = (
        f"Encoded in {steps} step{'s' if steps > 1 else ''} and decoded by the teacher in {DEFAULT_STEPS}, "
        f"{len(images)} pictures come back at {trips['encoder']:.1f} dB PSNR; encoded by the teacher in "
        f"{DEFAULT_STEPS} steps, at {trips['teacher']:.1f} dB."
    )
    return Showcase(((caption, grid(cells, rows=names, columns=labels)),), (), verdict)
