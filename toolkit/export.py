"""Write a student in the form that another program opens: ``python -m toolkit.export --help``."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from .command import print_json, run
from .diffusion.errors import BadInput
from .opening import add_parts, choose_device, choose_dtype, open_for_people, parts_of
from .sharing import DIAL_ALONE, share
from .training.checkpoint import Checkpoint
from .training.export import Exported, export_baked, export_checkpoint, export_diffusers, export_lora
from .training.networks import DTYPES

log = logging.getLogger("fewstep")

EXAMPLES = """forms:
  checkpoint  one file with the guidance dial, the VAE and the text encoder
  baked       a plain checkpoint with one guidance folded in, for any program; use cfg 1 there
  lora        of a student that was trained as a LoRA: that LoRA, for its teacher, with one guidance baked in
              for stock loaders (student-lora.safetensors must stand beside the student). Of any other: that
              guidance alone, as a patch for this student's own checkpoint (at strength 1) in hosts that
              ignore the dial; it is of no use on other checkpoints
  diffusers   a folder for StableDiffusionPipeline (or the XL one), whose guidance_scale is the dial

--share writes a folder to upload: the student baked (and as a LoRA, if it was trained as one) in fp16, a
thumbnail, and README.md with the settings for hosts that know nothing of FewStep. --to chooses other forms
for it, several if given several times.

examples:
  python -m toolkit.export runs/demo/student.safetensors --to baked --guidance 5 -o baked.safetensors
  python -m toolkit.export student.safetensors --to checkpoint --dtype fp16 -o small.safetensors
  python -m toolkit.export student.safetensors --to diffusers -o student-diffusers
  python -m toolkit.export student.safetensors --share --guidance 5 --licence CC0-1.0 -o upload
"""


def main(arguments: Sequence[str] | None = None) -> None:
    asked = _parser().parse_args(arguments)
    if asked.share:
        _share(asked)
        return
    if len(asked.to) != 1:
        raise BadInput("one form is exported at a time: give --to once, or --share for a folder to upload")
    if (asked.licence, asked.thumbnail, asked.device) != (None, None, None):
        raise BadInput("--licence, --thumbnail and --device belong to --share")
    (form,) = asked.to
    if asked.guidance is not None and form in ("checkpoint", "diffusers"):
        raise BadInput(f"--guidance is folded in by --to baked and --to lora; {form} keeps the dial")
    student = open_for_people(asked.student, **parts_of(asked))
    exported = _export(student, form, asked)
    for file in exported.files:
        log.info("%s: written, loaded back and compared", file)
    log.info("largest difference from the student on a random input: %.2g", exported.difference)
    for note in exported.notes:
        log.info("note: %s", note)
    if asked.json:
        print_json(
            {
                "to": form,
                "files": [str(file) for file in exported.files],
                "max_difference": exported.difference,
                "notes": list(exported.notes),
            }
        )


def _share(asked: argparse.Namespace) -> None:
    if "diffusers" in asked.to:
        raise BadInput("--share is for hosts that open one file; a diffusers folder is exported without it")
    if asked.dtype not in (None, "fp16"):
        raise BadInput(f"--share writes fp16, and --dtype {asked.dtype} was asked for; leave one of them out")
    device = choose_device(asked.device)
    shared = share(
        open_for_people(asked.student, **parts_of(asked)),
        asked.output,
        forms=tuple(dict.fromkeys(asked.to)),
        guidance=asked.guidance,
        licence=asked.licence,
        thumbnail=asked.thumbnail,
        device=device,
        dtype=choose_dtype(None, device),
    )
    for file in shared.files:
        compared = ", loaded back and compared" if file.suffix == ".safetensors" else ""
        log.info("%s: written%s", file, compared)
    for note in shared.notes:
        log.log(logging.WARNING if note == DIAL_ALONE else logging.INFO, "note: %s", note)
    if asked.json:
        print_json(
            {
                "files": [str(file) for file in shared.files],
                "sha256": shared.hashes,
                "max_difference": shared.difference,
                "notes": list(shared.notes),
            }
        )


def _export(student: Checkpoint, form: str, asked: argparse.Namespace) -> Exported:
    dtype = None if asked.dtype is None else DTYPES[asked.dtype]
    default = student.spec.guidance_default if student.spec is not None else 1.0
    guidance = default if asked.guidance is None else asked.guidance
    if form == "checkpoint":
        return export_checkpoint(student, asked.output, dtype=dtype)
    if form == "baked":
        return export_baked(student, asked.output, guidance=guidance, dtype=dtype)
    if form == "lora":
        return export_lora(student, asked.output, guidance=guidance, dtype=dtype)
    return export_diffusers(student, asked.output, dtype=dtype)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.export",
        description="Write a student in the form that another program opens, loaded back and compared.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("student", type=Path, metavar="STUDENT", help="student.safetensors, or a student's diffusers folder")
    forms = ["checkpoint", "baked", "lora", "diffusers"]
    add("--to", action="append", default=[], choices=forms, help="the form, see below")
    add("--share", action="store_true", help="write a folder to upload, see below")
    add("--licence", "--license", metavar="TEXT", help="with --share: its name, an address or the whole text")
    add("--thumbnail", type=Path, metavar="PNG", help="with --share: instead of one that the student makes")
    add("--device", help="with --share, to make the thumbnail; default: the best one there is")
    add("--guidance", type=float, metavar="G", help="to fold in (baked, lora); default: the student's own")
    add("--dtype", choices=sorted(DTYPES), help="of the weights; default: the student's (lora: fp32)")
    add_parts(parser)
    add("--json", action="store_true", help="say on stdout, as JSON, what was written")
    add(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="PATH",
        help="file (.safetensors) or folder to write",
    )
    return parser


if __name__ == "__main__":
    run(main)
