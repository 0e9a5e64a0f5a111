"""Write a student in the form that another program opens: ``python -m toolkit.export --help``."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from .command import print_json, run
from .diffusion.errors import BadInput
from .opening import add_parts, open_for_people, parts_of
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

examples:
  python -m toolkit.export runs/demo/student.safetensors --to baked --guidance 5 -o baked.safetensors
  python -m toolkit.export student.safetensors --to checkpoint --dtype fp16 -o small.safetensors
  python -m toolkit.export student.safetensors --to diffusers -o student-diffusers
"""


def main(arguments: Sequence[str] | None = None) -> None:
    asked = _parser().parse_args(arguments)
    if asked.guidance is not None and asked.to in ("checkpoint", "diffusers"):
        raise BadInput(f"--guidance is folded in by --to baked and --to lora; {asked.to} keeps the dial")
    student = open_for_people(asked.student, **parts_of(asked))
    exported = _export(student, asked)
    for file in exported.files:
        log.info("%s: written, loaded back and compared", file)
    log.info("largest difference from the student on a random input: %.2g", exported.difference)
    for note in exported.notes:
        log.info("note: %s", note)
    if asked.json:
        print_json(
            {
                "to": asked.to,
                "files": [str(file) for file in exported.files],
                "max_difference": exported.difference,
                "notes": list(exported.notes),
            }
        )


def _export(student: Checkpoint, asked: argparse.Namespace) -> Exported:
    dtype = None if asked.dtype is None else DTYPES[asked.dtype]
    default = student.spec.guidance_default if student.spec is not None else 1.0
    guidance = default if asked.guidance is None else asked.guidance
    if asked.to == "checkpoint":
        return export_checkpoint(student, asked.output, dtype=dtype)
    if asked.to == "baked":
        return export_baked(student, asked.output, guidance=guidance, dtype=dtype)
    if asked.to == "lora":
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
    add("--to", required=True, choices=["checkpoint", "baked", "lora", "diffusers"], help="see below")
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
