"""Measure students against their teacher: ``python -m toolkit.evaluate --help``."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .command import print_json, run
from .demo.drawings import altered, draw, drawings_to_fill, labels
from .demo.drawings import prompts as demo_prompts
from .demo.judge import load_judge
from .diffusion.errors import BadInput
from .evaluation.editing import Edits, edit_rows
from .evaluation.evaluate import (
    LARGER,
    SELDOM,
    Evaluation,
    FolderStore,
    Request,
    Row,
    Size,
    Yardstick,
    check_pair,
    table,
)
from .evaluation.eyes import Clip, Eyes, InceptionEyes, TeacherEyes
from .evaluation.metrics import adherence, features
from .evaluation.painter import TEACHER_SAMPLERS, Fill, Painter
from .evaluation.pictures import save_png
from .evaluation.report import command_line, write_report
from .evaluation.showcase import Picture, own_setting, side_by_side, verdict
from .evaluation.standing import standings
from .opening import (
    add_parts,
    add_prompting,
    choose_device,
    choose_dtype,
    is_demo,
    open_for_people,
    parts_of,
)
from .runtime.files import atomic_path
from .training.checkpoint import Checkpoint
from .training.embeddings import content_of_prompts, with_prompting
from .training.images import SUFFIXES, load_picture
from .training.lora import with_loras
from .training.networks import DTYPES
from .training.prompts import built_in_prompts, read_prompts
from .training.settings import OWN

log = logging.getLogger("fewstep")

EXAMPLES = """examples:
  python -m toolkit.evaluate --teacher model.safetensors --student student.safetensors -o measured
  python -m toolkit.evaluate --teacher model.safetensors --student runs/a/students --guidance 2 8 -o measured
  python -m toolkit.evaluate --teacher toolkit/demo/teacher.safetensors --student runs/demo/students \\
    --steps 8 4 2 1 --guidance 1 2 4 8 --strength 0.2 0.35 0.5 0.7 --samples 2048 -o measured

Distances between sets of pictures are measured in features of the demo's judge or of the teacher's own
UNet, or of networks that you have on disk (--inception, --clip); a row's "ratio" is to the distance of two
sets that differ in nothing but the noise. Adherence needs the demo's judge. A stopped evaluation goes on
where it was when the same command is given again.
"""
REAL_DRAWINGS = 4096


def main(arguments: Sequence[str] | None = None) -> None:
    asked = _parser().parse_args(arguments)
    _check(asked)
    device = choose_device(asked.device)
    dtype = choose_dtype(asked.precision, device)
    parts = parts_of(asked)
    teacher = with_loras(open_for_people(asked.teacher, **parts), asked.lora)
    if teacher.kind != "teacher":
        raise BadInput(f"{teacher.path}: this is a {teacher.kind}; give the teacher as --teacher")
    parts.pop("override")
    students = {name: open_for_people(path, **parts) for name, path in _student_files(asked.student).items()}
    teacher, students = _used_alike(teacher, students, asked)
    _say_other_loras(teacher, students)
    demo = is_demo(teacher)
    painters = {name: Painter.open(student, device=device, dtype=dtype) for name, student in students.items()}
    request = _request(asked, painters, demo=demo)
    painter = Painter.open(teacher, device=device, dtype=dtype)
    evaluation = Evaluation(
        teacher=painter,
        students=painters,
        request=request,
        yardstick=_yardstick(asked, painter, demo=demo, device=device),
        store=FolderStore(asked.cache_dir or asked.out / "cache"),
        teacher_name=teacher.name,
        identities=_identities(teacher, students, asked, [request.negative, *request.prompts]),
        batch=asked.batch_size,
        fill=_drawings_to_fill(request.prompts, asked.seed) if demo and teacher.inpaint else None,
    )
    check_pair(evaluation.teacher, painters, teacher.sha256)
    rows: list[Row] = []
    for row in evaluation.rows():
        rows.append(row)
        _write_results(asked, evaluation, rows)
    log.info("%s", table(rows))
    edited = list(_edited(asked, evaluation, device=device, dtype=dtype, demo=demo))
    if edited:
        _write_results(asked, evaluation, rows, edited)
    guidance = sorted(evaluation.request.guidances)[len(evaluation.request.guidances) // 2]
    pictures = _write_pictures(asked, evaluation, guidance)
    said = verdict([row for row in rows if row["guidance"] == guidance])
    standing = standings(rows)
    for sentence in dict.fromkeys([*([said] if said else []), *(each.sentence for each in standing)]):
        log.info("%s", sentence)
    _write_report(asked, arguments, evaluation, rows, pictures, said)
    if asked.json:
        print_json({"rows": rows, "edits": edited, "verdicts": [each.told() for each in standing]})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.evaluate",
        description="Measure students against their teacher from the same noise: numbers and pictures.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--teacher", type=Path, required=True, metavar="PATH", help="a file or a diffusers folder")
    add(
        "--student",
        type=Path,
        nargs="+",
        action="extend",
        required=True,
        metavar="PATH",
        help="student files, or folders of them",
    )
    add("--encoder", type=Path, metavar="PATH", help="of method inversion: round trips and edits as well")
    add("--prompts", type=Path, metavar="FILE", help="one a line (default: the demo's, or built-in ones)")
    add(
        "--steps", type=int, nargs="*", metavar="N", help="of the teacher's samplers (default: the students')"
    )
    add("--guidance", type=float, nargs="+", metavar="G", help="default: the first student's own")
    add("--strength", type=float, nargs="*", default=[], metavar="F", help="image to image as well")
    add("--size", nargs="*", default=[], metavar="WxH", help="at other sizes as well, such as 512x768")
    add(
        "--second-pass",
        type=float,
        nargs="*",
        default=[],
        metavar="F",
        help=f"a hires fix as well: the picture {LARGER:g} times as large, painted again at this strength",
    )
    add(
        "--own",
        default=OWN,
        metavar="SAMPLER:STEPS",
        help=f"what you use today, of {', '.join(TEACHER_SAMPLERS)} or none (default %(default)s)",
    )
    add("--samples", type=int, default=256, metavar="N", help="pictures a row (default 256)")
    add("--seed", type=int, default=0, help="of the first picture, the others follow (default 0)")
    add(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="a LoRA merged into the teacher first, as it was for the student; repeatable",
    )
    add("--negative", default="", metavar="TEXT", help="the teacher's negative prompt")
    add("--reference-steps", type=int, default=50, metavar="N", help="of the teacher's DDIM (default 50)")
    add("--batch-size", type=int, metavar="N", help="pictures at once (default: by their size)")
    add("--real", type=Path, metavar="DIR", help="real pictures, to measure distances to them as well")
    add("--inception", type=Path, metavar="FILE", help="inception-2015-12-05.pt, for FID as in papers")
    add("--clip", type=Path, metavar="DIR", help="a CLIP model's folder, for CLIP scores")
    add_prompting(parser)
    add_parts(parser)
    add("--device", help="cpu, cuda, cuda:1, mps ...; default: the best one there is")
    add("--precision", choices=sorted(DTYPES), help="default: fp16 on a GPU, fp32 elsewhere")
    add("--cache-dir", type=Path, metavar="DIR", help="where painted pictures are kept (default: OUT/cache)")
    add("--json", action="store_true", help="the rows on stdout, as JSON")
    add(
        "-o",
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="report.html, results.json, pictures, cache",
    )
    return parser


def _check(asked: argparse.Namespace) -> None:
    if asked.samples < 1 or (asked.batch_size or 1) < 1:
        raise BadInput(f"--samples {asked.samples} and --batch-size: both must be at least 1")
    if not 0 <= asked.seed < 10**9:
        raise BadInput(f"--seed {asked.seed}: expected 0 to 999999999")
    for guidance in asked.guidance or ():
        if not 1 <= guidance < math.inf:
            raise BadInput(f"--guidance {guidance:g}: expected 1 (unguided) or more")
    for option in ("strength", "second_pass"):
        for strength in getattr(asked, option):
            if not 0 < strength < 1:
                raise BadInput(
                    f"--{option.replace('_', '-')} {strength:g}: expected a number above 0 and below 1"
                )
    asked.own, asked.size = own_setting(asked.own), [_size(said) for said in asked.size]
    for steps in [*(asked.steps or ()), asked.reference_steps]:
        if not 1 <= steps <= 1000:
            raise BadInput(f"{steps} steps were asked for; a teacher runs 1 to 1000")


def _size(said: str) -> Size:
    """Height and width of ``--size``."""
    width, _, height = said.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise BadInput(f"--size {said}: expected width and height in pixels, such as 512x768")
    return int(height), int(width)


def _student_files(paths: Sequence[Path]) -> dict[str, Path]:
    """Student files by a name that tells them apart; a folder stands for all of them, less their LoRAs."""
    files: list[Path] = []
    for path in paths:
        inside = [file for file in path.glob("*.safetensors") if not file.stem.endswith("-lora")]
        files += sorted(inside, key=lambda file: (len(file.name), file.name), reverse=True) or [path]
    named: dict[str, Path] = {}
    for file in files:
        tails = itertools.accumulate(reversed(file.resolve().parts), lambda tail, part: f"{part}/{tail}")
        name = next((tail for tail in tails if tail not in named), None)
        if name is None:
            raise BadInput(f"{file}: this student was given twice")
        named[name] = file
    return named


def _request(asked: argparse.Namespace, students: Mapping[str, Painter], *, demo: bool) -> Request:
    specs = [student.spec for student in students.values() if student.spec is not None]
    if asked.prompts is not None:
        given = read_prompts(asked.prompts)
    else:
        given = (demo_prompts if demo else built_in_prompts)(asked.samples, seed=asked.seed + 1)
    guidances = asked.guidance or [spec.baked_guidance or spec.guidance_default for spec in specs[:1]]
    for guidance in guidances:
        for name, student in students.items():
            if not student.runs_at(guidance):
                log.warning("%s does not run at guidance %g; it has no row there", name, guidance)
    return Request(
        prompts=tuple(given[number % len(given)] for number in range(asked.samples)),
        guidances=tuple(dict.fromkeys(guidances)),
        steps=tuple(dict.fromkeys([spec.steps for spec in specs] if asked.steps is None else asked.steps)),
        own=asked.own,
        strengths=tuple(dict.fromkeys(asked.strength)),
        sizes=tuple(dict.fromkeys(asked.size)),
        second_passes=tuple(dict.fromkeys(asked.second_pass)),
        seed=asked.seed,
        negative=asked.negative,
        reference_steps=asked.reference_steps,
    )


def _drawings_to_fill(prompts: Sequence[str], seed: int) -> Fill:
    return Fill(*drawings_to_fill(prompts, seed=seed))


def _yardstick(asked: argparse.Namespace, teacher: Painter, *, demo: bool, device: torch.device) -> Yardstick:
    """The first of: Inception, the demo's judge, CLIP, the teacher's own UNet; each if there is one."""
    clip = None if asked.clip is None else Clip.open(asked.clip, device)
    eyes: Eyes | None = None if asked.inception is None else InceptionEyes.open(asked.inception, device)
    if demo and eyes is None and asked.real is None:
        return replace(_demo_yardstick(asked.seed), clip=clip)
    eyes = eyes or (None if demo else clip or TeacherEyes(teacher))
    bare = Yardstick(judge=load_judge() if demo else None, eyes=eyes, clip=clip)
    if asked.real is None:
        return bare
    return replace(bare, real=bare.see(_real_pictures(asked.real, teacher.size)))


def _demo_yardstick(seed: int) -> Yardstick:
    """The demo's judge, and its features of real drawings."""
    judge = load_judge()
    drawings, captions = draw(REAL_DRAWINGS, seed=seed)
    log.info(
        "judge: %.1f %% right on %d real drawings", 100 * adherence(judge, drawings, captions), REAL_DRAWINGS
    )
    return Yardstick(judge, features(judge, drawings))


def _real_pictures(folder: Path, size: tuple[int, int]) -> Tensor:
    """(M, 3, H, W): a folder's pictures at the teacher's size; BadInput for too few."""
    if not folder.is_dir():
        raise BadInput(f"--real {folder}: there is no such folder; give one that holds pictures")
    height, width = size
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(paths) < SELDOM:
        raise BadInput(
            f"--real {folder}: {len(paths)} pictures were found; a distance needs {SELDOM} at least, and "
            "means something from some thousand"
        )
    return torch.stack([load_picture(path, width, height) for path in paths])


def _say_other_loras(teacher: Checkpoint, students: Mapping[str, Checkpoint]) -> None:
    given = [(lora.sha256, lora.strength) for lora in teacher.loras]
    for name, student in students.items():
        if student.spec and [(lora.sha256, lora.strength) for lora in student.spec.loras] != given:
            theirs = ", ".join(f"{lora.name}:{lora.strength:g}" for lora in student.spec.loras) or "none"
            log.warning("%s: its teacher had these LoRAs merged: %s; give the same by --lora", name, theirs)


def _used_alike(
    teacher: Checkpoint, students: Mapping[str, Checkpoint], asked: argparse.Namespace
) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    """The teacher with the clip skip and rescaled guidance that its first student was trained with, where
    nothing else was said; all with the same textual inversions, and at the size of the students.
    """
    sizes = sorted({student.resolution for student in students.values()})
    if len(sizes) > 1:
        told = " and ".join(f"{width} x {height}" for width, height in sizes)
        raise BadInput(f"the students were trained for pictures of {told} pixels; evaluate them apart")
    spec = next((student.spec for student in students.values() if student.spec is not None), None)
    used = with_prompting(
        teacher,
        embeddings=asked.embedding,
        clip_skip=spec.clip_skip if spec and asked.clip_skip is None else asked.clip_skip,
        cfg_rescale=spec.cfg_rescale if spec and asked.cfg_rescale is None else asked.cfg_rescale,
    )
    return replace(used, resolution=sizes[0]), {
        name: with_prompting(student, embeddings=asked.embedding) for name, student in students.items()
    }


def _identities(
    teacher: Checkpoint,
    students: Mapping[str, Checkpoint],
    asked: argparse.Namespace,
    prompts: Sequence[str],
) -> dict[str, str]:
    """What tells each model's pictures from another's: its file, other parts, precision, device and size."""
    parts = (*parts_of(asked).values(), asked.precision, asked.device, teacher.resolution)
    how = " ".join(map(str, parts))
    every = {teacher.name: teacher, **students}
    loras = {name: "".join(f" {lora}" for lora in checkpoint.loras) for name, checkpoint in every.items()}
    uses = {name: content_of_prompts(checkpoint, prompts) for name, checkpoint in every.items()}
    if teacher.cfg_rescale:
        uses[teacher.name]["cfg_rescale"] = teacher.cfg_rescale
    return {
        name: f"{checkpoint.sha256} {how}{loras[name]}" + (f" {uses[name]}" if uses[name] else "")
        for name, checkpoint in every.items()
    }


def _edited(
    asked: argparse.Namespace, evaluation: Evaluation, *, device: torch.device, dtype: torch.dtype, demo: bool
) -> Iterator[Row]:
    """Rows of edits, of drawings or of the teacher's own pictures, by the teacher and the encoder."""
    if asked.encoder is None:
        return
    parts = parts_of(asked) | {"override": None}
    opened = with_prompting(open_for_people(asked.encoder, **parts), embeddings=asked.embedding)
    encoder = Painter.open(opened, device=device, dtype=dtype)
    encoder.encoding()
    judge = load_judge() if demo else None
    if demo:
        images, before = draw(asked.samples, seed=asked.seed)
        after, changed = altered(before, seed=asked.seed)
        wanted = [labels(text)[name] for text, name in zip(after, changed, strict=True)]
        edits = Edits(images, before, after, changed, wanted)
    else:
        reference = evaluation.reference(evaluation.request.guidances[0])
        before = evaluation.request.prompts
        images = evaluation.teacher.decode(evaluation.latents(reference)[0])
        edits = Edits(images, before, [*before[1:], before[0]])
    yield from edit_rows(
        {"teacher": evaluation.teacher, asked.encoder.name: encoder},
        {"teacher": evaluation.teacher, **evaluation.students},
        edits,
        guidances=evaluation.request.guidances,
        judge=judge,
    )


def _write_results(
    asked: argparse.Namespace, evaluation: Evaluation, rows: Sequence[Row], edited: Sequence[Row] = ()
) -> None:
    results: dict[str, Any] = {
        "teacher": evaluation.teacher_name,
        "students": list(evaluation.students),
        "samples": asked.samples,
        "seed": asked.seed,
        "rows": list(rows),
        "verdicts": [each.told() for each in standings(rows)],
        "edits": list(edited),
    }
    with atomic_path(asked.out / "results.json") as partial:
        partial.write_text(json.dumps(results, indent=2), encoding="utf-8")


def _write_report(
    asked: argparse.Namespace,
    arguments: Sequence[str] | None,
    evaluation: Evaluation,
    rows: Sequence[Row],
    pictures: Sequence[Picture],
    said: str | None,
) -> None:
    write_report(
        asked.out / "report.html",
        title=f"Students of {evaluation.teacher_name}",
        facts={"teacher": evaluation.teacher_name, "students": ", ".join(evaluation.students)},
        pictures=pictures,
        rows=rows,
        curves=(),
        command=command_line("toolkit.evaluate", sys.argv[1:] if arguments is None else arguments),
        verdict=said,
        sentences=[each.sentence for each in standings(rows)],
    )


def _write_pictures(
    asked: argparse.Namespace, evaluation: Evaluation, guidance: float
) -> tuple[Picture, ...]:
    """Side by side, at one guidance where it does not vary, from what was painted for the rows."""
    pictures = side_by_side(
        evaluation,
        guidance=guidance,
        guidances=[
            g
            for g in sorted(evaluation.request.guidances)
            if all(s.runs_at(g) for s in evaluation.students.values())
        ],
        strengths=evaluation.request.strengths,
    )
    names = ["guidance", "steps", *(["strength"] if evaluation.request.strengths else []), "filling-in"]
    for name, (_, image) in zip(names, pictures, strict=False):
        save_png(image, asked.out / f"{name}.png")
    return pictures


if __name__ == "__main__":
    run(main)
