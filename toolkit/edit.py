"""Change what a picture shows by changing words: ``python -m toolkit.edit --help``."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from .command import print_json, run
from .diffusion.errors import BadInput
from .evaluation.editing import Editor
from .evaluation.painter import Painter
from .evaluation.pictures import require_png, save_png, to_image
from .opening import (
    add_parts,
    add_prompting,
    choose_device,
    choose_dtype,
    open_for_people,
    parts_of,
    prompted,
)
from .training.checkpoint import Checkpoint
from .training.images import load_picture, size_in_cells
from .training.networks import DTYPES

log = logging.getLogger("fewstep")

EXAMPLES = """examples:
  python -m toolkit.distill --ckpt model.safetensors --method inversion --steps 4 --out runs/encoder
  python -m toolkit.edit --ckpt student.safetensors --encoder runs/encoder/student.safetensors \\
    --image a.png --from "a red circle" --to "a blue circle" --guidance 4 -o b.png
  python -m toolkit.edit --ckpt model.safetensors --encoder model.safetensors \\
    --image a.png --from "a red circle" --to "a blue circle" -o b.png

The encoder reads the picture with the text --from, without guidance; the decoder paints it anew from that
noise with the text --to. What both texts say stays, and what neither says is meant to.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    asked = _parser().parse_args(arguments)
    require_png(asked.out)
    device = choose_device(asked.device)
    dtype = choose_dtype(asked.precision, device)
    decoder, encoder = (
        prompted(open_for_people(path, **parts_of(asked)), asked) for path in (asked.ckpt, asked.encoder)
    )
    _check_pair(decoder, encoder)
    painters = [Painter.open(model, device=device, dtype=dtype) for model in (encoder, decoder)]
    editor = Editor(encoder=painters[0], decoder=painters[1])
    plan = editor.decoder.plan(guidance=asked.guidance)
    image = load_picture(asked.image, *size_in_cells(asked.image, decoder.downscale))
    edited = editor.edit(image[None], [asked.before], [asked.after], guidance=plan.guidance, seed=asked.seed)
    save_png(to_image(edited[0]), asked.out)
    evaluations = {"encoder": len(editor.encoder.encoding().timesteps), "decoder": plan.evaluations}
    log.info(
        "%s: %d evaluations to encode and %d to decode, guidance %g",
        asked.out.name,
        *evaluations.values(),
        plan.guidance,
    )
    if asked.json:
        print_json({"file": str(asked.out), "guidance": plan.guidance, "evaluations": evaluations})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.edit",
        description="Change what a picture shows: encode it with one text, decode it with another.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--ckpt", type=Path, required=True, metavar="DECODER", help="a student, or its teacher")
    add(
        "--encoder",
        type=Path,
        required=True,
        metavar="ENCODER",
        help="a student of method inversion, or its teacher (50 steps)",
    )
    add("--image", type=Path, required=True, metavar="PNG", help="what is to be changed")
    add("--from", dest="before", required=True, metavar="TEXT", help="what the picture shows")
    add("--to", dest="after", required=True, metavar="TEXT", help="what it is to show")
    add("--guidance", type=float, metavar="G", help="of the decoder; default: its own")
    add("--seed", type=int, default=0, metavar="S", help="of decoders that add noise (default 0)")
    add_prompting(parser)
    add_parts(parser)
    add("--device", help="cpu, cuda, cuda:1, mps ...; default: the best one there is")
    add("--precision", choices=sorted(DTYPES), help="default: fp16 on a GPU, fp32 elsewhere")
    add("--json", action="store_true", help="say on stdout, as JSON, what was made")
    add("-o", "--out", type=Path, required=True, metavar="OUT.png")
    return parser


def _check_pair(decoder: Checkpoint, encoder: Checkpoint) -> None:
    """BadInput for an encoder in the decoder's place; a warning where the two have different teachers."""
    if decoder.spec is not None and decoder.spec.direction == "encode":
        raise BadInput(f"{decoder.path.name}: this is an encoder; give it as --encoder, and --ckpt a decoder")
    teachers = [
        model.spec.teacher_sha256 if model.spec is not None else model.sha256 for model in (decoder, encoder)
    ]
    if teachers[0] != teachers[1]:
        log.warning("%s and %s are of different teachers", decoder.path.name, encoder.path.name)


if __name__ == "__main__":
    run(main)
