"""Distil a Stable Diffusion checkpoint into a student of a few steps whose guidance stays adjustable.

examples:
  python -m toolkit.distill --demo
  python -m toolkit.distill --ckpt model.safetensors --dry-run
  python -m toolkit.distill --ckpt model.safetensors --steps 4 --guidance 1 12
  python -m toolkit.distill --ckpt model.safetensors --hours 8 --watch
  python -m toolkit.distill --ckpt model.safetensors --resume
  python -m toolkit.distill --finish --out runs/model-progressive-4
  python -m toolkit.distill --ckpt model.safetensors --init students/4.safetensors --steps 2
  accelerate launch -m toolkit.distill --ckpt model.safetensors    (a process for each GPU)
  accelerate launch --use_fsdp --fsdp_version 2 -m toolkit.distill --ckpt model.safetensors --student full
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from .assembly import (
    DataRequest,
    Teacher,
    data_request,
    finish,
    measure_costs,
    phases_of,
    plan_run,
    run_all,
    settle,
)
from .budget import fit_run
from .command import BAD_INPUT, INTERRUPTED, print_json, run
from .diffusion.errors import BadInput
from .evaluation.watch import watched
from .methods import find_methods, options_of
from .opening import OVERRIDE_HELP
from .runtime.files import atomic_path
from .training.board import tensorboard
from .training.caches import require_room
from .training.loop import Interrupted, raise_on_stops
from .training.memory import GIB, PLACES, free_memory
from .training.networks import DTYPES
from .training.optimizers import OPTIMIZERS
from .training.plan import Plan, require_disk
from .training.presets import PRESETS, Room
from .training.prompts import STYLES
from .training.ranks import (
    ALONE,
    Ranks,
    SaidByTheFirst,
    gathered,
    launched,
    launched_to_divide,
    require_shares,
)
from .training.settings import OWN, Settings, read_config, to_toml
from .training.sharding import require_dividable
from .training.tuning import MEMORY_FORMATS

log = logging.getLogger("fewstep")

NOT_SETTINGS = (
    *("resume", "finish", "hours", "watch", "tensorboard", "dry_run", "json", "config", "vram"),
    "preset",
)


def main() -> None:
    raise_on_stops()
    options = _parse()
    begun = options.resume or options.finish
    config = _stored(options) if begun else _config_file(options)
    ranks = ALONE
    if launched() > 1:
        if (options.dry_run or options.finish) and os.environ.get("RANK") != "0":
            return
        cpu = _on_cpu(options.device or config.get("device"))
        if not (options.dry_run or options.finish):
            ranks = gathered(cpu=cpu)
    if ranks.writes:
        _lead(options, config, ranks)
    else:
        _follow(ranks)
    ranks.leave()


def _follow(ranks: Ranks) -> None:
    """The run that the first process has settled, in silence; what befalls this process alone is said."""
    logging.disable(logging.WARNING)
    try:
        out = Path(ranks.told())
        config = {**read_config(out / "config.toml", _known()), "out": str(out)}
        teacher = Teacher.open(config)
        settings, _ = settle({}, config, teacher)
        phases = phases_of(settings, teacher)
        run_all(settings, phases, teacher, data_request(settings, phases, teacher), ranks=ranks)
    except (SaidByTheFirst, Interrupted) as error:
        ranks.linger()
        raise SystemExit(BAD_INPUT if isinstance(error, BadInput) else INTERRUPTED) from None
    except BadInput as error:
        raise BadInput(f"process {ranks.number + 1} of {ranks.count}: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


def _on_cpu(device: str | None) -> bool:
    """Whether the processes compute on the CPU; BadInput where one card is named for all of them."""
    if device and ":" in device:
        raise BadInput(f"--device {device}: each process has a card of its own; leave out the number")
    return device == "cpu" if device else not torch.cuda.is_available()


def _lead(options: argparse.Namespace, config: dict[str, Any], ranks: Ranks) -> None:
    given = {name: v for name, v in vars(options).items() if v is not None and name not in NOT_SETTINGS}
    teacher = Teacher.open({**config, **given})
    room = _room(options, config)
    hours = config.pop("hours", None) if options.hours is None else options.hours
    flags, costs = dict[str, Any](), None
    if hours is not None:
        if options.resume or options.finish:
            raise BadInput("--hours is for a new run; leave it out to go on with this one")
        flags, says, costs = fit_run(hours, given, config, teacher, room)
        log.info("%s", says)
    settings, reasons = settle({**given, **flags}, config, teacher, room)
    reasons |= {name: f"--hours {hours:g}" for name in flags}
    phases = phases_of(settings, teacher)
    request = data_request(settings, phases, teacher)
    out = Path(settings.out)
    if options.finish:
        _answer(options, finish(settings, phases, teacher, request))
        return
    require_shares(settings.batch_size, room.processes)
    if room.divided > 1:
        _require_dividable(settings)
    if options.resume and not options.dry_run:
        log.info("going on with %s", out)
    else:
        if not options.dry_run and (out / "config.toml").exists():
            raise BadInput(f"{out} holds a run already; go on with it by --resume, or choose another --out")
        costs = costs or measure_costs(settings, phases, teacher, request, room)
        plan = plan_run(settings, phases, teacher, request, costs, room)
        _say_plan(plan, settings, reasons, teacher, request)
        if options.dry_run:
            _answer(options, _told(plan, settings, reasons, teacher, request))
            return
        _make_cache(Path(settings.cache_dir))
        with atomic_path(out / "config.toml") as temporary:
            temporary.write_text(to_toml(settings), encoding="utf-8")
    ranks.told(str(out.resolve()))
    with ExitStack() as helpers:
        told = helpers.enter_context(tensorboard(out)) if options.tensorboard else None
        if options.watch:
            log.info("watch the run at %s", helpers.enter_context(watched(out)))
        answer = run_all(settings, phases, teacher, request, told, ranks)
    _answer(options, answer)


def _answer(options: argparse.Namespace, answer: Mapping[str, Any]) -> None:
    if options.json:
        print_json(answer)


def _say_plan(
    plan: Plan, settings: Settings, reasons: Mapping[str, str], teacher: Teacher, request: DataRequest
) -> None:
    """What the run will cost, and every setting with its reason; BadInput where the disk or --cache-gb does
    not allow it.
    """
    log.info("%s", plan.text())
    for name, value in {**dataclasses.asdict(settings), **settings.method_config}.items():
        if name not in ("method_config", "demo") and value is not None:
            log.info("  %-18s %-24s %s", name, _plain(value), reasons.get(name, "the method"))
    for line in (request.summary(), *teacher.lora_lines()):
        log.info("%s", line)
    cache = Path(settings.cache_dir)
    require_disk(plan, out=Path(settings.out), cache=cache)
    if settings.cache_gb is not None:
        needed = plan.disk["samples"]
        require_room(cache, request.folder(cache), needed=needed, limit_gb=settings.cache_gb)


def _told(
    plan: Plan, settings: Settings, reasons: Mapping[str, str], teacher: Teacher, request: DataRequest
) -> dict[str, Any]:
    """The same for programs."""
    return {
        "plan": plan.to_json(),
        "settings": dataclasses.asdict(settings),
        "reasons": reasons,
        "data": request.summary(),
        "loras": [
            {**dataclasses.asdict(applied), **lora.describe()}
            for lora, applied in zip(teacher.loras, teacher.checkpoint.loras, strict=True)
        ],
    }


def _require_dividable(settings: Settings) -> None:
    """BadInput for a student that processes cannot divide among them; a LoRA they need not."""
    if settings.student == "lora":
        log.info("a LoRA is small: every process holds all of it, and FSDP divides nothing")
        return
    require_dividable(
        precision=settings.precision,
        optimizer=settings.optimizer,
        memory_format=settings.memory_format,
        compiled=settings.compile,
    )


def _room(options: argparse.Namespace, config: Mapping[str, Any]) -> Room:
    """What the run is planned for."""
    if options.vram is not None and options.preset is not None:
        raise BadInput("--vram and --preset both say how much memory to plan for; leave one out")
    processes, free = launched(), None
    gib = options.vram if options.preset is None else PRESETS[options.preset]
    if gib is not None:
        free = round(gib * GIB)
    elif processes > 1 and _on_cpu(options.device or config.get("device")):
        free = free_memory(torch.device("cpu")) // processes
    return Room(free, options.preset, processes, processes if launched_to_divide() else 1)


def _make_cache(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder}: cannot be made ({error.strerror}); choose another --cache-dir") from None


def _parse() -> argparse.Namespace:
    """The command line; the options of the chosen method's Config join the fixed ones."""
    methods = find_methods()
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--method", default="progressive")
    method = first.parse_known_args()[0].method
    if method not in methods:
        raise BadInput(f"--method {method}: no such method; there are {', '.join(methods)}")
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.distill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--ckpt",
        metavar="PATH",
        help="teacher: a checkpoint file (.safetensors, .ckpt) or a diffusers folder",
    )
    add(
        "--demo",
        action="store_true",
        default=None,
        help="the embedded teacher (or its inpainting one, by --ckpt), with settings for minutes on 2 cores",
    )
    add(
        "--out", metavar="DIR", help="everything the run writes (default: runs/<checkpoint>-<method>-<steps>)"
    )
    add(
        "--init",
        metavar="STUDENT",
        help="start from a finished student of this teacher: more updates, or a further halving",
    )
    add("--method", help=f"{', '.join(methods)} (default: progressive)")
    add("--steps", type=int, metavar="N", help="evaluations of the finished student (default: 4)")
    add(
        "--sampler",
        choices=["deterministic", "stochastic"],
        help="which of Meng et al.'s two samplers the student is for (default: deterministic)",
    )
    add(
        "--student",
        choices=["full", "lora"],
        help="train every weight, or a LoRA on the teacher (default: what fits the free memory)",
    )
    add("--rank", type=int, metavar="R", help="of the LoRA, at most; a rank alone means --student lora")
    add(
        "--guidance",
        type=float,
        nargs=2,
        metavar=("LO", "HI"),
        help="range that stays adjustable (default: 1 15)",
    )
    add("--guidance-default", type=float, metavar="G", help="what hosts start with (default: the family's)")
    add(
        "--lora",
        action="append",
        metavar="FILE[:STRENGTH]",
        help="a LoRA merged into the teacher first, at this strength (default: 1); repeatable",
    )
    add(
        "--with-lora",
        action="append",
        metavar="FILE[:LO-HI]",
        help="a LoRA that goes on working with the student: applied to teacher and student alike in every "
        "second batch, at a random strength (default: 0.4-1.2); repeatable",
    )
    add("--negative", metavar="TEXT", help="negative prompt distilled into the student (default: none)")
    add(
        "--embedding",
        action="append",
        metavar="FILE",
        help="a textual inversion that prompts and --negative name as embedding:FILE's name, or by the bare "
        "name; repeatable",
    )
    add("--clip-skip", type=int, metavar="K", help="CLIP layer from the end (default: the family's usual)")
    add(
        "--cfg-rescale",
        type=float,
        metavar="PHI",
        help="rescaled guidance of the teacher, for v-prediction models, 0 to 1 (default: 0, off)",
    )
    add(
        "--data",
        metavar="DIR",
        help="pictures with captions (.txt of the same name, or metadata.jsonl), or .tar shards of them "
        "(default: the teacher's own pictures)",
    )
    add("--flip", action="store_true", default=None, help="learn from the mirror images of --data too")
    add(
        "--prompts",
        metavar="FILE",
        help="one prompt a line, for the teacher's own pictures (default: built in)",
    )
    add(
        "--prompt-style",
        choices=STYLES,
        help="of the built-in prompts (default: tags if the checkpoint's name tells that it is an anime one)",
    )
    add(
        "--long-prompts",
        type=float,
        metavar="F",
        help="share of the built-in prompts that get two or three chunks of 75 tokens (default: 0)",
    )
    add("--pictures", type=int, metavar="N", help="how many pictures the teacher makes")
    add(
        "--resolution",
        metavar="N|WxH",
        help="pixels: N for several sizes of about N x N, WxH for this one alone (default: the teacher's)",
    )
    add("--batch-size", type=int, metavar="N", help="pictures an update")
    add("--micro-batch", type=int, metavar="N", help="pictures at once in memory")
    add(
        "--updates",
        type=int,
        nargs="+",
        metavar="N",
        help="updates: one number for all phases, or one a phase",
    )
    add(
        "--hours",
        type=float,
        metavar="H",
        help="instead of updates: fit method, updates and pictures to this time on this machine",
    )
    add("--lr", type=float, help="learning rate")
    add("--warmup", type=int, metavar="N", help="updates to reach it in each phase (default: 100)")
    add(
        "--optimizer",
        choices=OPTIMIZERS,
        help="adamw, or adamw8bit, whose moments take a quarter of the memory (needs bitsandbytes)",
    )
    add("--clip", type=float, help="gradient norm at most (default: 1)")
    add("--ema", type=float, help="memory of the averaged weights that are written; 0: no average")
    add(
        "--averages",
        choices=PLACES,
        help="where the averaged weights are kept (default: on the device, unless its memory is short)",
    )
    add(
        "--memory-format",
        choices=list(MEMORY_FORMATS),
        help="of the UNet's weights and pictures (default: contiguous; python -m toolkit.benchmark --only "
        "layout compares them here)",
    )
    add(
        "--compile",
        action="store_true",
        default=None,
        help="run the UNet through torch.compile; where that fails, without",
    )
    add(
        "--trajectory-share",
        type=float,
        metavar="F",
        help="share that starts from the teacher's own trajectories",
    )
    add(
        "--caption-dropout",
        type=float,
        metavar="F",
        help="share that is shown without its caption (default: as the method wants it)",
    )
    add("--seed", type=int)
    add(
        "--precision",
        choices=list(DTYPES),
        help="compute in (default: on a GPU for large networks bf16, where it has none fp16; else fp32)",
    )
    add("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    add("--dtype", choices=list(DTYPES), help="weights of the student's file")
    add(
        "--report-prompts",
        type=int,
        metavar="N",
        help="prompts in the sample pictures and the report; 0: none",
    )
    add(
        "--own",
        metavar="SAMPLER:STEPS",
        help=f"what you use today, beside the student in the report (default {OWN}; none leaves it out)",
    )
    add(
        "--cache-dir",
        metavar="DIR",
        help="where latents, texts and trajectories are kept (default: runs/cache)",
    )
    add(
        "--cache-gb",
        type=float,
        metavar="G",
        help="do not let --cache-dir grow beyond so many GiB (python -m toolkit.clean makes room)",
    )
    add("--tokenizer", metavar="PATH", help='folder or file of the CLIP vocabulary, or "hub" to download it')
    add("--text-encoder", metavar="FILE", help="for a UNet-only file")
    add("--text-encoder-2", metavar="FILE", help="SDXL's second, for a UNet-only file")
    add("--vae", metavar="FILE", help="for a UNet-only file, or instead of the checkpoint's own")
    add("--override", metavar="NAME=VALUE,...", help=OVERRIDE_HELP)
    add(
        "--vram",
        type=float,
        metavar="GB",
        help="plan for so much memory on the device, in GiB (default: what is free)",
    )
    add(
        "--preset",
        choices=list(PRESETS),
        help="plan for a card of that size: route, precision, micro-batch, and 8-bit moments if bitsandbytes "
        "is installed",
    )
    add("--config", metavar="FILE.toml", help="any of these; flags win")
    add("--dry-run", action="store_true", help="print the plan and stop")
    begun = parser.add_mutually_exclusive_group()
    begun.add_argument("--resume", action="store_true", help="go on exactly where the run in --out stands")
    begun.add_argument(
        "--finish",
        action="store_true",
        help="write the best student so far of the run in --out, with its report; it can still go on",
    )
    add(
        "--watch",
        action="store_true",
        help="a page on this machine alone, with pictures, loss, time left and verdict so far",
    )
    add("--tensorboard", action="store_true", help="logs for TensorBoard in the run's folder")
    add("--json", action="store_true", help="machine-readable answer on stdout")
    group = parser.add_argument_group(f"method {method}", (methods[method].__doc__ or "").splitlines()[0])
    for option in options_of(methods[method]):
        group.add_argument(
            "--" + option.name.replace("_", "-"),
            help=option.help + (f" (default: {option.default})" if option.default != () else ""),
            **_accepts(option.kind),
        )
    return parser.parse_args()


def _accepts(kind: Any) -> dict[str, Any]:
    """argparse's words for what an option of this type takes."""
    if get_origin(kind) is Literal:
        return {"choices": list(get_args(kind))}
    if get_origin(kind) is tuple:
        return {"type": get_args(kind)[0], "nargs": "+", "metavar": "N"}
    return {"type": kind}


def _config_file(options: argparse.Namespace) -> dict[str, Any]:
    if options.config is None:
        return {}
    return read_config(Path(options.config), _known())


def _known() -> dict[str, Any]:
    """Every key that a config file may hold, and its type."""
    kinds = {name: kind for name, kind in get_type_hints(Settings).items() if name != "method_config"}
    methods = find_methods().values()
    kinds["hours"] = float
    return kinds | {option.name: option.kind for method in methods for option in options_of(method)}


def _stored(options: argparse.Namespace) -> dict[str, Any]:
    """The resolved settings of the run that --resume means; other flags must agree with it."""
    out = Path(options.out) if options.out else _default_out(options)
    path = out / "config.toml"
    if not path.exists():
        raise BadInput(
            f"{out} holds no run to go on with (no config.toml in it); name the run's folder by --out"
        )
    values = read_config(path, _known())
    for name, value in vars(options).items():
        if value is None or name in NOT_SETTINGS or name == "out":
            continue
        if name == "updates" and len(value) == 1:
            value = value * len(values[name])
        if name in values and _plain(values[name]) != _plain(value):
            raise BadInput(
                f"--{name.replace('_', '-')} {value} was asked for, but the run in {out} has {values[name]}; "
                "leave it out to go on, or start a new run in another --out"
            )
    return {**values, "out": str(out)}


def _plain(value: Any) -> Any:
    """The value as a file holds it: tuples are lists."""
    return json.loads(json.dumps(value))


def _default_out(options: argparse.Namespace) -> Path:
    name = Path(options.ckpt).stem if options.ckpt else "demo" if options.demo else None
    if name is None:
        raise BadInput(
            "--resume and --finish need --out, or the --ckpt or --demo that the run was started with"
        )
    steps = options.steps or (2 if options.demo else 4)
    return Path("runs") / f"{name}-{options.method or 'progressive'}-{steps}"


if __name__ == "__main__":
    run(main)
