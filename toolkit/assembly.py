"""How a run is put together: the teacher opened, settings settled, the cost planned, data made, the report
written.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import __version__
from .demo import TEACHER, TOKENIZER
from .demo.drawings import altered, draw, drawings_to_fill
from .demo.drawings import prompts as demo_prompts
from .demo.judge import load_judge
from .diffusion.denoiser import Cond, Network, NetworkDenoiser
from .diffusion.errors import BadInput
from .diffusion.grid import Grid
from .diffusion.method import Phase, Setting
from .diffusion.spec import StudentSpec, WEmbedding
from .evaluation.editing import encoder_showcase
from .evaluation.evaluate import Yardstick
from .evaluation.guests import answers_to
from .evaluation.painter import Fill, Painter, cached_texts
from .evaluation.pictures import grid, save_png
from .evaluation.report import command_line, write_report
from .evaluation.showcase import Showcase, own_setting, showcase
from .methods import find_methods, options_of
from .neighbours import keep_to_free
from .opening import is_demo, open_for_people, say_unused_card
from .runtime.files import atomic_path, free_path
from .training.adapters import CHECKPOINT_GRADIENTS_ABOVE, LoraShape, OneNetwork, State, recomputing
from .training.checkpoint import Checkpoint, save_student
from .training.data import scan
from .training.earlier import Earlier
from .training.embeddings import content_of_prompts, with_prompting
from .training.families import Override
from .training.guests import Guest, Guests, parse_range
from .training.image_samples import MASKS_EACH, ImageSampleRequest, make_image_samples
from .training.loop import Job, LoopSettings, Start, keep_verdict, train
from .training.lora import LoraFile, merge_loras, parse_lora, read_lora
from .training.masks import SHARES, Pictures
from .training.memory import PLACES, Needs, Route, choose_route, free_memory
from .training.networks import (
    DTYPES,
    Turns,
    UNetNetwork,
    decode_latents,
    encode_images,
    encode_prompts,
    lazily,
    load_encoders,
    place,
    random_cond,
)
from .training.optimizers import require_optimizer
from .training.plan import Costs, Plan, make_plan, measure
from .training.presets import HERE, Room, fitting_micro_batch, preset_defaults
from .training.prompts import STYLES, built_in_prompts, read_prompts, style_of, with_long_ones, with_triggers
from .training.ranks import ALONE, Ranks, exchange_bytes
from .training.samples import GuidanceRange, Samples, content_key, kept_texts
from .training.settings import (
    LARGE,
    LORA_LARGE,
    LORA_SMALL,
    SMALL,
    SMALL_PARAMETERS,
    Defaults,
    Settings,
    parse_resolution,
    phase_updates,
    resolve,
)
from .training.sizes import CELL, Size, bucket_sizes, usual_sizes
from .training.so_far import best_so_far
from .training.student_lora import lora_path, save_lora_student
from .training.teacher_samples import TeacherSampleRequest, make_teacher_samples, trajectory_steps
from .training.tuning import MEMORY_FORMATS, tuned

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

log = logging.getLogger("fewstep")

DEMO_SAMPLES = 192
"""Pictures of each model that the demo's report measures."""
UNSEEN = (
    "No pictures were compared (--report-prompts 0), so nothing is said about quality here; python -m "
    "toolkit.evaluate compares them."
)


@dataclass(frozen=True, eq=False)
class Teacher:
    """The opened teacher, the LoRAs that are merged into it, the student of it that the run starts from, and
    the sizes that planning needs.
    """

    demo: bool
    checkpoint: Checkpoint
    loras: tuple[LoraFile, ...] = ()
    guests: Guests = dataclasses.field(default_factory=Guests)
    earlier: Earlier | None = None

    @classmethod
    def open(cls, values: Mapping[str, Any]) -> Teacher:
        if values.get("demo"):
            path, tokenizer = Path(values.get("ckpt") or TEACHER), TOKENIZER
        elif values.get("ckpt"):
            path, tokenizer = Path(values["ckpt"]), _path(values.get("tokenizer"))
        else:
            raise BadInput("no teacher named; give --ckpt model.safetensors, or --demo for the embedded one")
        checkpoint = open_for_people(
            path,
            tokenizer=tokenizer,
            text_encoder=_path(values.get("text_encoder")),
            text_encoder_2=_path(values.get("text_encoder_2")),
            vae=_path(values.get("vae")),
            override=Override.parse(values.get("override")),
        )
        if checkpoint.kind != "teacher":
            raise BadInput(
                f"{path}: this is a {checkpoint.kind}; give the checkpoint that it was distilled from"
            )
        if values.get("demo") and not is_demo(checkpoint):
            raise BadInput(f"{path}: no teacher of the demo's; leave out --demo")
        asked = [parse_lora(text) for text in values.get("lora") or ()]
        loras = [(read_lora(file), strength) for file, strength in asked]
        if loras:
            checkpoint = merge_loras(checkpoint, loras)
        checkpoint = with_prompting(
            checkpoint,
            embeddings=values.get("embedding") or (),
            clip_skip=values.get("clip_skip"),
            cfg_rescale=values.get("cfg_rescale"),
        )
        ranges = [parse_range(text) for text in values.get("with_lora") or ()]
        guests = [Guest.of(read_lora(file), low, high, checkpoint=checkpoint) for file, low, high in ranges]
        return cls(
            demo=bool(values.get("demo")),
            checkpoint=checkpoint,
            loras=tuple(lora for lora, _ in loras),
            guests=Guests(guests),
            earlier=Earlier.open(Path(init), checkpoint, values) if (init := values.get("init")) else None,
        )

    @property
    def triggers(self) -> tuple[str, ...]:
        """The words that the run's LoRAs answer to."""
        files = [*self.loras, *(guest.file for guest in self.guests.all)]
        return tuple(dict.fromkeys(word for lora in files for word in lora.triggers))

    def lora_lines(self) -> list[str]:
        """What is merged, and what its prompts may name, for people."""
        lines = [
            f"{applied.name} at {applied.strength:g}: {lora.summary()}, merged into the teacher"
            for lora, applied in zip(self.loras, self.checkpoint.loras, strict=True)
        ]
        lines += [
            f"{guest.file.path.stem} at {guest.low:g} to {guest.high:g}: {guest.file.summary()}, applied to "
            f"{len(guest.updates)} layers of both UNets in {self.guests.share:.0%} of the batches"
            for guest in self.guests.all
        ]
        lines += [f"textual inversion {line}" for line in _embedding_lines(self.checkpoint)]
        if self.triggers:
            words = ", ".join(self.triggers)
            lines.append(f"trigger words, in every second prompt that is made here: {words}")
        return lines

    @property
    def resolution(self) -> str:
        """Its own, as ``--resolution`` says it."""
        width, height = self.checkpoint.resolution
        return str(width) if width == height else f"{width}x{height}"

    def sizes(self, resolution: str, *, data: bool) -> tuple[Size, ...]:
        """Of the pictures that it is distilled with, from ``--data`` or its own."""
        size = parse_resolution(resolution)
        if "x" in resolution.lower():
            return (size,)
        cell = math.lcm(CELL, self.cell)
        if data:
            return bucket_sizes(size[0], cell=cell)
        return usual_sizes(self.checkpoint.of, size[0], cell=cell)

    @property
    def cell(self) -> int:
        """Pixels that a picture's sides must be multiples of."""
        levels = len(self.checkpoint.config("unet")["block_out_channels"])
        return self.checkpoint.downscale * 2 ** (levels - 1)


def settle(
    given: Mapping[str, Any],
    config: Mapping[str, Any],
    teacher: Teacher,
    room: Room = HERE,
) -> tuple[Settings, dict[str, str]]:
    """All settings with their reasons, checked."""
    small = teacher.checkpoint.unet_parameters < SMALL_PARAMETERS
    demo = teacher.demo
    device = _device({**config, **given})
    earlier = teacher.earlier.defaults if teacher.earlier else {}
    of_preset: Defaults | None = None
    asked = {**earlier, **config, **given}
    require_optimizer(asked.get("optimizer") or "adamw")
    if room.preset is not None:
        has_bf16 = not device.startswith("cuda") or _has_bf16()
        half = "bf16" if has_bf16 else "fp16"
        of_preset = preset_defaults(room.preset, small=small, precision=half, divided=room.divided > 1)
        asked = {**of_preset.values, **asked}
    chosen = _choose_route(asked, teacher, device=device, room=room)
    if of_preset is not None and room.free is not None and not small and "micro_batch" not in asked:
        count = _fitting(asked, teacher, chosen, device=device, free=room.free, divided=room.divided)
        of_preset = dataclasses.replace(of_preset, values={**of_preset.values, "micro_batch": count})
    resolved = resolve(
        given,
        config,
        parameters=teacher.checkpoint.unet_parameters,
        demo=demo,
        student=chosen.student,
        earlier=earlier,
        preset=of_preset,
    )
    values, reasons = dict(resolved.values), dict(resolved.reasons)

    def default(name: str, value: Any, reason: str) -> None:
        if values.get(name) is None:
            values[name], reasons[name] = value, reason

    default("device", device, "what this machine has")
    default(
        "precision", chosen.precision, chosen.reasons.get("precision", "the device and the network's size")
    )
    default("student", chosen.student, chosen.reasons["student"])
    where = "there is no other memory" if device.startswith("cpu") else "the memory allows it"
    default("averages", chosen.averages, chosen.reasons.get("averages", where))
    if "rank" in chosen.reasons:
        values["rank"], reasons["rank"] = chosen.rank, chosen.reasons["rank"]
    slow = not small and device.startswith("cpu")
    default("report_prompts", 0 if slow else 6, "the device and the network's size")
    default("resolution", teacher.resolution, "the teacher's own")
    default("guidance_default", teacher.checkpoint.of.guidance, "the family")
    if not (demo or values.get("prompts")):
        default("prompt_style", *_style(teacher.checkpoint))
    name = "demo" if demo and not values.get("ckpt") else teacher.checkpoint.name
    default(
        "out",
        str(Path("runs") / f"{name}-{values['method']}-{values['steps']}"),
        "checkpoint, method and steps",
    )
    for optional in (
        "rank",
        "ckpt",
        "init",
        "data",
        "prompts",
        "prompt_style",
        "caption_dropout",
        "clip_skip",
        "cache_gb",
        "tokenizer",
        "text_encoder",
        "text_encoder_2",
        "vae",
        "override",
    ):
        values.setdefault(optional, None)
    if tuple(values["guidance"]) == (1, 1) and reasons["guidance_default"] not in ("you", "the config file"):
        values["guidance_default"], reasons["guidance_default"] = 1.0, "--guidance 1 1 is unguided"
    values.update(demo=demo, guidance=tuple(values["guidance"]), lora=tuple(values["lora"]))
    values.update(with_lora=tuple(values["with_lora"]), embedding=tuple(values["embedding"]))
    options: dict[str, Any] = {
        o.name: values.pop(o.name, o.default) for o in options_of(find_methods()[values["method"]])
    }
    if chosen.student == "lora" and "velocity_at" in options and "velocity_at" not in reasons:
        options["velocity_at"] = 0
        reasons["velocity_at"] = "a LoRA keeps its teacher's prediction: stock hosts cannot be told another"
    names = {f.name for f in dataclasses.fields(Settings)}
    if foreign := sorted((set(given) | set(config)) - names - set(options)):
        raise BadInput(f"{', '.join(foreign)}: not an option of method {values['method']}; leave it out")
    draft = {name: value for name, value in values.items() if name in names}
    draft.update(updates=(), method_config=options)
    settings = Settings(**draft)
    _check(settings, teacher)
    if teacher.earlier and "origin" in options and "origin" not in reasons:
        if teacher.earlier.place(_method_phases(settings, teacher.checkpoint)) is None:
            options["origin"] = "pair"
            reasons["origin"] = "the student of --init is none of the chain's, so one fold does it"
    phases = phases_of(settings, teacher)
    updates = phase_updates(values.get("updates"), [phase.name for phase in phases], small=small)
    reasons.setdefault("updates", "the phases and the network's size")
    return dataclasses.replace(settings, updates=updates), reasons


def _device(asked: Mapping[str, Any]) -> str:
    if asked.get("device"):
        return asked["device"]
    if torch.cuda.is_available():
        return "cuda"
    say_unused_card()
    return "cpu"


def _precision(asked: Mapping[str, Any], *, small: bool) -> str:
    """On a GPU bf16, or fp16 where it has none (before Ampere), whose gradients need scaling."""
    if asked.get("precision"):
        return asked["precision"]
    device = _device(asked)
    if small or device.startswith("cpu"):
        return "fp32"
    return "bf16" if not device.startswith("cuda") or _has_bf16() else "fp16"


def _has_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def _choose_route(asked: Mapping[str, Any], teacher: Teacher, *, device: str, room: Room = HERE) -> Route:
    """How the student is trained, by what was asked for and the memory that is free."""
    small = teacher.checkpoint.unet_parameters < SMALL_PARAMETERS
    usual: dict[str, Any] = {**(SMALL if small else LARGE).values, **asked}
    needs = _needs(usual, teacher, device=device, divided=room.divided)
    precision = _precision(asked, small=small)
    highest = int((LORA_SMALL if small else LORA_LARGE).values["rank"])
    return choose_route(
        needs,
        free=free_memory(usable(device)) if room.free is None else room.free,
        student=asked.get("student"),
        rank=asked.get("rank"),
        ranks=[rank for rank in (64, 32, 16, 8) if rank <= highest],
        precisions=[precision, "bf16"] if precision == "fp32" and not asked.get("precision") else [precision],
        ema=usual["ema"],
        optimizer=usual.get("optimizer") or "adamw",
        places=[kept] if (kept := usual.get("averages")) else PLACES[: 1 if device.startswith("cpu") else 2],
    )


def _needs(usual: Mapping[str, Any], teacher: Teacher, *, device: str, divided: int) -> Needs:
    """The memory of a run at the largest of its sizes."""
    small = teacher.checkpoint.unet_parameters < SMALL_PARAMETERS
    sizes = teacher.sizes(usual.get("resolution") or teacher.resolution, data=bool(usual.get("data")))
    width, height = max(sizes, key=math.prod)
    return Needs(
        teacher.checkpoint,
        width,
        height,
        batch=max(1, min(usual["micro_batch"], usual["batch_size"])),
        looks=usual.get("report_prompts", 0 if device.startswith("cpu") and not small else 6) > 0,
        divided=divided,
    )


def _fitting(
    asked: Mapping[str, Any], teacher: Teacher, route: Route, *, device: str, free: int, divided: int
) -> int:
    """The most pictures at once that a large network's route has the memory for."""
    usual: dict[str, Any] = {**LARGE.values, **asked}

    def takes(count: int) -> int:
        stages = _needs({**usual, "micro_batch": count}, teacher, device=device, divided=divided).stages(
            rank=route.rank,
            precision=route.precision,
            ema=usual["ema"] if route.averages == "device" else 0,
            optimizer=usual.get("optimizer") or "adamw",
        )
        return max(stages.values())

    return fitting_micro_batch(takes, free=free, batch=usual["batch_size"])


def _style(checkpoint: Checkpoint) -> tuple[str, str]:
    """Which built-in prompts the teacher understands best, and why it is thought so."""
    if checkpoint.family == "sdxl" and checkpoint.prediction_type == "v_prediction":
        return "tags", "SDXL that predicts v is of NoobAI's kind"
    style = style_of(checkpoint.name)
    return style, "the checkpoint's name" if style == "tags" else "the house"


def usable(device: str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError):
        raise BadInput(f"--device {device}: this machine's torch cannot use it; try --device cpu") from None


def _check(settings: Settings, teacher: Teacher) -> None:
    """BadInput for settings that cannot be run."""
    low, high = settings.guidance
    if settings.student not in ("full", "lora"):
        raise BadInput(f"--student {settings.student}: expected full or lora")
    if settings.sampler not in ("deterministic", "stochastic"):
        raise BadInput(f"--sampler {settings.sampler}: expected deterministic or stochastic")
    if settings.rank is not None and settings.student == "full":
        raise BadInput(f"--rank {settings.rank} is of a LoRA; leave it out, or add --student lora")
    if settings.averages not in PLACES:
        raise BadInput(f"--averages {settings.averages}: expected {' or '.join(PLACES)}")
    if settings.memory_format not in MEMORY_FORMATS:
        raise BadInput(f"--memory-format {settings.memory_format}: expected {' or '.join(MEMORY_FORMATS)}")
    if settings.rank is not None and not 1 <= settings.rank <= 1024:
        raise BadInput(f"--rank {settings.rank}: expected 1 to 1024")
    if not 1 <= low <= high < float("inf"):
        raise BadInput(
            f"--guidance {low:g} {high:g}: expected 1 <= LO <= HI (1 is unguided), such as --guidance 1 15"
        )
    if not low <= settings.guidance_default <= high:
        raise BadInput(
            f"--guidance-default {settings.guidance_default:g} lies outside --guidance {low:g} {high:g}; "
            "choose one inside"
        )
    if not 1 <= settings.steps <= 128:
        raise BadInput(f"--steps {settings.steps}: expected 1 to 128")
    if any(side % teacher.cell for side in settings.size):
        raise BadInput(f"--resolution {settings.resolution}: this teacher needs multiples of {teacher.cell}")
    own_setting(settings.own)
    if settings.flip and not settings.data:
        raise BadInput("--flip mirrors the pictures of --data; give a folder too, or leave it out")
    if settings.prompt_style is not None and settings.prompts:
        raise BadInput(
            "--prompt-style is of the built-in prompts, and --prompts brings others; leave one out"
        )
    if settings.prompt_style not in (None, *STYLES):
        raise BadInput(f"--prompt-style {settings.prompt_style}: expected {' or '.join(STYLES)}")
    for name in ("pictures", "batch_size", "micro_batch"):
        if getattr(settings, name) < 1:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(settings, name)}: expected at least 1")
    for name in ("lr", "clip"):
        if not getattr(settings, name) > 0:
            raise BadInput(f"--{name} {getattr(settings, name)}: expected a number above 0")
    if settings.cache_gb is not None and not settings.cache_gb > 0:
        raise BadInput(f"--cache-gb {settings.cache_gb:g}: expected a number above 0")
    if settings.long_prompts and (settings.data or settings.prompts or settings.demo):
        raise BadInput(
            "--long-prompts is of the built-in prompts; leave it out beside --data, --prompts and --demo"
        )
    if settings.cache_gb is not None and not settings.cache_gb > 0:
        raise BadInput(f"--cache-gb {settings.cache_gb:g}: expected a number above 0")
    for name in ("ema", "trajectory_share", "caption_dropout", "long_prompts"):
        if not 0 <= (getattr(settings, name) or 0) <= 1:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(settings, name)}: expected 0 to 1")
    usable(settings.device)


def phases_of(settings: Settings, teacher: Teacher) -> tuple[Phase, ...]:
    """Of the method, or those that an earlier student leaves to do."""
    phases = _method_phases(settings, teacher.checkpoint)
    if teacher.earlier is None:
        return phases
    return teacher.earlier.remaining(phases, guidance=settings.guidance, negative=settings.negative)


def _method_phases(settings: Settings, checkpoint: Checkpoint) -> tuple[Phase, ...]:
    method = find_methods()[settings.method]
    setting = Setting(
        checkpoint.schedule,
        checkpoint.prediction_type,
        settings.steps,
        sampler="stochastic" if settings.sampler == "stochastic" else "deterministic",
        guided=not GuidanceRange(*settings.guidance).unguided,
    )
    return method.phases(method.Config(**settings.method_config), setting)


def _at_once(settings: Settings, processes: int) -> int:
    """Pictures in the memory of each process."""
    return min(settings.micro_batch, max(1, settings.batch_size // processes))


def _loop_settings(settings: Settings, checkpoint: Checkpoint, processes: int = 1) -> LoopSettings:
    loras = LORA_SMALL if checkpoint.unet_parameters < SMALL_PARAMETERS else LORA_LARGE
    return LoopSettings(
        updates=settings.updates,
        batch_size=settings.batch_size,
        micro_batch=_at_once(settings, processes),
        lr=settings.lr,
        warmup=settings.warmup,
        clip=settings.clip,
        ema=settings.ema,
        seed=settings.seed,
        precision=settings.precision,
        guidance=GuidanceRange(*settings.guidance),
        trajectory_share=settings.trajectory_share,
        lora=None if settings.rank is None else LoraShape(settings.rank),
        critic_lr=loras.values["lr"],
        caption_dropout=settings.caption_dropout,
        cfg_rescale=settings.cfg_rescale,
        optimizer=settings.optimizer,
        averages=settings.averages,
    )


def _seen_shape(size: Size, checkpoint: Checkpoint) -> tuple[int, int, int]:
    """Of the network's input: an inpainting one's has a mask and a masked latent too."""
    channels, (width, height) = checkpoint.latent_channels, size
    seen = 2 * channels + 1 if checkpoint.inpaint else channels
    return seen, height // checkpoint.downscale, width // checkpoint.downscale


DataRequest = TeacherSampleRequest | ImageSampleRequest


def data_request(settings: Settings, phases: Sequence[Phase], teacher: Teacher) -> DataRequest:
    """What data this run needs, by content; ``--data`` is read for it."""
    checkpoint = teacher.checkpoint
    sizes = teacher.sizes(settings.resolution, data=settings.data is not None)
    if settings.data:
        found = scan(Path(settings.data))
        captions = [picture.caption for picture in found.pictures]
        return ImageSampleRequest(
            teacher=_content(settings, checkpoint, captions),
            scan=found,
            negative=settings.negative,
            sizes=sizes,
            channels=checkpoint.latent_channels,
            downscale=checkpoint.downscale,
            flip=settings.flip,
            told=checkpoint.of.sizes,
            masks=MASKS_EACH if checkpoint.inpaint else 0,
        )
    finest = max((phase.grid for phase in phases), key=len)
    kept = finest.refined(trajectory_steps(len(finest)) // len(finest), len(checkpoint.schedule))
    prompts = _prompts(settings, teacher, settings.pictures, seed=settings.seed)
    if settings.long_prompts:
        tokenizer, room = checkpoint.tokenizer(), checkpoint.room
        prompts = with_long_ones(
            prompts,
            settings.long_prompts,
            tokens=lambda text: len(tokenizer(text, verbose=False).input_ids) - 2,
            room=room,
            seed=settings.seed,
        )
    return TeacherSampleRequest(
        teacher=_content(settings, checkpoint, prompts),
        prompts=tuple(prompts),
        negative=settings.negative,
        guidance=settings.guidance,
        sizes=sizes,
        channels=checkpoint.latent_channels,
        downscale=checkpoint.downscale,
        count=settings.pictures,
        seed=settings.seed,
        precision=settings.precision,
        steps=len(kept),
        timesteps=() if kept == Grid.trailing(len(kept), len(checkpoint.schedule)) else kept.timesteps,
        told=checkpoint.of.sizes,
        masked=checkpoint.inpaint,
        cfg_rescale=settings.cfg_rescale,
    )


def _content(settings: Settings, checkpoint: Checkpoint, prompts: Sequence[str]) -> str:
    """A hash of all of a teacher that its samples with these prompts depend on."""
    parts: dict[str, Any] = {
        "sha256": checkpoint.sha256,
        "family": checkpoint.family,
        "prediction_type": checkpoint.prediction_type,
        "ztsnr": checkpoint.ztsnr,
        "loras": [(lora.sha256, lora.strength) for lora in checkpoint.loras],
        "words": [checkpoint.tokenizer(of.part).get_vocab() for of in checkpoint.of.text_encoders],
        **content_of_prompts(checkpoint, [settings.negative, *prompts]),
    }
    # A folder's hash is of its UNet alone.
    if settings.text_encoder or settings.text_encoder_2 or settings.vae or checkpoint.path.is_dir():
        parts["carried"] = checkpoint.carried_sha256()
    return content_key(parts)


def measure_costs(
    settings: Settings,
    phases: Sequence[Phase],
    teacher: Teacher,
    request: DataRequest,
    room: Room = HERE,
) -> Costs:
    """The network briefly timed, at the largest of the sizes."""
    _require_parts(teacher.checkpoint)
    device = torch.device(settings.device)
    student, trained = _measurable(settings, phases, teacher.checkpoint, device)
    batch = _at_once(settings, room.processes)
    return measure(
        student,
        trained=trained,
        latent=_seen_shape(max(request.sizes, key=math.prod), teacher.checkpoint),
        cond=random_cond(teacher.checkpoint, batch, generator=torch.Generator().manual_seed(0)),
        w=torch.zeros(batch) if phases[0].dial else None,
        batch=batch,
        device=device,
        precision=settings.precision,
        optimizer=settings.optimizer,
    )


def plan_run(
    settings: Settings,
    phases: Sequence[Phase],
    teacher: Teacher,
    request: DataRequest,
    costs: Costs,
    room: Room = HERE,
) -> Plan:
    """Add up what the run will cost, from what was measured."""
    free = free_memory(torch.device(settings.device)) if room.free is None else room.free
    folder = request.folder(Path(settings.cache_dir))
    loop = _loop_settings(settings, teacher.checkpoint, room.processes)
    divided = room.divided if settings.rank is None else 1
    needs = Needs(
        teacher.checkpoint,
        *settings.size,
        batch=loop.micro_batch,
        looks=settings.report_prompts > 0,
        divided=divided,
    )
    memory = needs.stages(
        rank=settings.rank,
        precision=settings.precision,
        ema=settings.ema if settings.averages == "device" else 0,
        optimizer=settings.optimizer,
    )
    if divided == 1:
        memory["training"] += exchange_bytes(costs.trained, room.processes)
    return make_plan(
        phases,
        dataclasses.replace(loop, trajectory_share=loop.trajectory_share * (1 - teacher.guests.share)),
        costs,
        on_trajectory=isinstance(request, TeacherSampleRequest),
        sample_evaluations=request.evaluations if not folder.exists() else 0,
        sample_bytes=request.bytes,
        student_bytes=(teacher.checkpoint.unet_parameters + (costs.trained if settings.rank else 0))
        * DTYPES[settings.dtype].itemsize
        + sum(t.nbytes for t in teacher.checkpoint.carried().values()),
        memory=memory,
        free_bytes=free,
        route=_route_text(settings, teacher.checkpoint, room.processes, divided),
        processes=room.processes,
        files=[
            *_both("student", settings),
            *(name for phase in phases for name in _both(f"students/{len(phase.grid)}", settings)),
            "report.html",
            "samples/*.png",
            "run.jsonl",
            "config.toml",
            "state/",
        ],
    )


def _measurable(
    settings: Settings, phases: Sequence[Phase], checkpoint: Checkpoint, device: torch.device
) -> tuple[Network, list[Tensor]]:
    """A student as the run will train it, and what of it is trained."""
    if settings.rank is None:
        unet = recomputing(place(checkpoint.unet(conditioned=phases[0].dial), device).train())
        return UNetNetwork(unet), list(unet.parameters())
    holder = OneNetwork(
        _new_unet(settings, phases, checkpoint),
        LoraShape(settings.rank),
        seed=0,
        device=device,
        dtype=DTYPES[settings.precision],
        autocast=lambda network: network,
    )
    pair = holder.pair(None, teacher="pair")
    return pair.student, list(pair.trained.values())


def _route_text(settings: Settings, checkpoint: Checkpoint, processes: int, divided: int) -> str:
    """How the run gets by with the memory, for people."""
    ways = [
        "every weight is trained"
        if settings.rank is None
        else f"a LoRA of rank {settings.rank} is trained on the teacher's weights, held once in "
        f"{settings.precision}"
    ]
    if checkpoint.unet_parameters > CHECKPOINT_GRADIENTS_ABOVE:
        ways.append("activations are recomputed")
    pictures = _at_once(settings, processes)
    ways.append(f"{pictures} picture{'s' if pictures > 1 else ''} at once")
    if processes > 1:
        each = settings.batch_size // processes
        ways.append(f"{processes} processes with {each} of an update's {settings.batch_size} pictures each")
    if divided > 1:
        ways.append("which divide weights, averages, gradients and moments among them")
    if settings.averages == "cpu":
        ways.append("the averaged weights are kept off the device")
    ways.append("text encoders and VAE are on the device only while they are needed")
    return "route: " + ", ".join(ways)


def _new_unet(
    settings: Settings, phases: Sequence[Phase], checkpoint: Checkpoint
) -> Callable[[], UNet2DConditionModel]:
    """In float32; under a LoRA only what it trains whole is, so that nothing larger is ever loaded."""
    if settings.rank is None:
        return lambda: checkpoint.unet(conditioned=phases[0].dial)
    dtype = DTYPES[settings.precision]
    return lambda: checkpoint.unet(dtype=dtype, conditioned=phases[0].dial, exact="time_embedding.")


def _both(name: str, settings: Settings) -> list[str]:
    """A student's file, and its LoRA's where it is one."""
    merged = Path(f"{name}.safetensors")
    return [merged.as_posix()] + ([lora_path(merged).as_posix()] if settings.student == "lora" else [])


def _require_parts(checkpoint: Checkpoint) -> None:
    """BadInput now, before anything is written, for a damaged part or a missing vocabulary."""
    load_encoders(checkpoint)
    checkpoint.vae()


def _make_samples(
    settings: Settings, teacher: Teacher, request: DataRequest, ranks: Ranks = ALONE
) -> Samples:
    """The run's data, from the cache where it is there already; text encoders and UNet are not loaded at
    once, and only if they are needed. Processes share the teacher's pictures shard by shard; people's are
    encoded by the first of them, for most of that is reading.
    """
    checkpoint, device = teacher.checkpoint, torch.device(settings.device)
    folder = request.folder(Path(settings.cache_dir))
    if ranks.writes:
        _require_same(Path(settings.out), folder.name)

    def encode(texts: Sequence[str]) -> Cond:
        return encode_prompts(texts, load_encoders(checkpoint, device=device))

    if isinstance(request, ImageSampleRequest):
        vae = place(checkpoint.vae(), device).eval()
        with ranks.first():
            return make_image_samples(
                request,
                folder,
                source=Path(settings.data or ""),
                encode_images=lambda images: encode_images(images, vae),
                encode=encode,
                progress=lambda pictures: tqdm(
                    pictures, desc="pictures", unit="", dynamic_ncols=True, disable=not ranks.writes
                ),
            )

    def load() -> Network:
        unet = checkpoint.unet(dtype=DTYPES[settings.precision])
        return UNetNetwork(place(unet, device).eval().requires_grad_(False))

    pictures: Pictures | None = None
    if request.masked:
        vae = place(checkpoint.vae(), device).eval()
        pictures = Pictures(
            lambda images: encode_images(images, vae),
            lambda x0: decode_latents(x0, vae),
            checkpoint.downscale,
        )

    def shared(shards: Iterable[int]) -> Generator[int]:
        ranks.wait()  # all have seen which are missing
        mine = ranks.mine(list(shards))
        quiet = not (mine and ranks.writes)
        yield from tqdm(mine, desc="pictures", unit="shard", dynamic_ncols=True, disable=quiet)
        ranks.wait()

    if ranks.count > 1:
        with ranks.first():
            kept_texts(folder, request.prompts, request.negative, encode)
    return make_teacher_samples(
        request,
        folder,
        teacher=NetworkDenoiser(lazily(load), checkpoint.schedule, checkpoint.prediction_type),
        encode=encode,
        schedule=checkpoint.schedule,
        device=device,
        batch=settings.micro_batch,
        progress=shared,
        pictures=pictures,
    )


def _require_same(out: Path, name: str) -> None:
    """BadInput if a run that was begun would go on with other samples."""
    path = out / "state" / "samples.txt"
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_text(name, encoding="utf-8")
    if path.read_text(encoding="utf-8") != name:
        raise BadInput(
            f"{out}: the data or the prompts have changed since this run began, so it cannot go on exactly; "
            "put them back as they were, or start a new run in another --out"
        )


def _spec(settings: Settings, checkpoint: Checkpoint, phase: Phase) -> StudentSpec:
    low, high = settings.guidance if phase.dial else (1.0, 1.0)
    return StudentSpec(
        family=checkpoint.family,
        prediction_type=phase.prediction_type,
        inpaint=checkpoint.inpaint,
        ztsnr=checkpoint.ztsnr,
        method=settings.method,
        timesteps=phase.grid.timesteps,
        sampler=phase.sampler,
        direction="encode" if phase.grid.ascending else "decode",
        any_start=phase.any_start,
        teacher_sha256=checkpoint.sha256,
        teacher_name=checkpoint.name,
        guidance_min=low,
        guidance_max=high,
        guidance_default=settings.guidance_default if phase.dial else 1.0,
        w_embedding=WEmbedding() if phase.dial else None,
        negative=settings.negative,
        clip_skip=checkpoint.clip_skip,
        cfg_rescale=checkpoint.cfg_rescale,
        embeddings=tuple(each.applied for each in checkpoint.embeddings),
        lora_rank=settings.rank,
        loras=checkpoint.loras,
        toolkit=__version__,
    )


def run_all(
    settings: Settings,
    phases: Sequence[Phase],
    teacher: Teacher,
    request: DataRequest,
    told: Callable[[dict[str, Any]], None] | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Data, training, students, report; each goes on where it was left. ``told`` hears each line of
    run.jsonl. Of several processes (``ranks``) the first reports.
    """
    out, checkpoint = Path(settings.out), teacher.checkpoint
    keep_to_free(torch.device(settings.device))
    samples = _make_samples(settings, teacher, request, ranks)
    data = request.outcome(samples)
    written = [out / "student.safetensors"]

    def finished(phase: Phase, state: dict[str, Tensor]) -> None:
        path = out / "students" / f"{len(phase.grid)}.safetensors"
        path = _write_student(path, settings, checkpoint, phase, state)
        if phase is phases[-1]:
            student = _copy(path, written[-1])
            written.append(student)
            if settings.student == "lora":
                _copy(lora_path(path), lora_path(student))

    job = Job(
        phases=phases,
        teacher_prediction=checkpoint.prediction_type,
        schedule=checkpoint.schedule,
        samples=samples,
        new_unet=lambda: tuned(
            teacher.guests.welcome(_new_unet(settings, phases, checkpoint)()),
            memory_format=settings.memory_format,
            compiled=settings.compile,
        ),
        finished=finished,
        look=_looker(settings if ranks.writes else dataclasses.replace(settings, report_prompts=0), teacher),
        out=out,
        guests=teacher.guests,
        start=Start(earlier.spec.prediction_type, earlier.state) if (earlier := teacher.earlier) else None,
        told=told or (lambda line: None),
        pilot_pictures=min(4, settings.report_prompts),
    )
    loop = _loop_settings(settings, checkpoint, ranks.count)
    train(job, loop, device=torch.device(settings.device), ranks=ranks)
    if not ranks.writes:
        return {}
    student = written[-1]
    verdict = _report(settings, phases, teacher, data, student)
    keep_verdict(out, verdict or "finished")
    log.info("data: %s\nstudent: %s\nreport: %s\n%s", data, student, out / "report.html", verdict or "")
    return {"out": str(out), "student": str(student), "verdict": verdict, "data": data}


def _write_student(
    path: Path, settings: Settings, checkpoint: Checkpoint, phase: Phase, state: State
) -> Path:
    """The student of a phase with these weights; in LoRA mode its LoRA beside it. Answers where it is."""
    spec, dtype = _spec(settings, checkpoint, phase), DTYPES[settings.dtype]
    source = dataclasses.replace(checkpoint, resolution=settings.size)
    if settings.student == "lora":
        return save_lora_student(path, state, spec=spec, source=source, dtype=dtype)
    return save_student(path, unet_state=state, spec=spec, source=source, dtype=dtype)


def finish(
    settings: Settings, phases: Sequence[Phase], teacher: Teacher, request: DataRequest
) -> dict[str, Any]:
    """Write the best student so far and its report; the run can still go on."""
    out = Path(settings.out)
    found = best_so_far(
        out / "state",
        [phase.name for phase in phases],
        settings.updates,
        earlier=teacher.earlier is not None,
    )
    phase = phases[found.index]
    student = _write_student(out / "student.safetensors", settings, teacher.checkpoint, phase, found.state)
    here = dataclasses.replace(settings, steps=len(phase.grid))
    verdict = _report(here, [phase], teacher, request.summary(), student, so_far=found.says)
    log.info("student: %s\nit is %s\nreport: %s\n%s", student, found.says, out / "report.html", verdict or "")
    return {"out": str(out), "student": str(student), "verdict": verdict, "is": found.says}


def _looker(settings: Settings, teacher: Teacher) -> Callable[[str, NetworkDenoiser, Phase], None]:
    """Writes a grid of the student's pictures, the same prompts and seeds each time, at two guidances."""
    checkpoint = teacher.checkpoint
    if not settings.report_prompts:
        return lambda name, student, phase: None
    prompts = _prompts(settings, teacher, settings.report_prompts, seed=settings.seed + 1)
    texts, dtype = encode_prompts(prompts, load_encoders(checkpoint)), DTYPES[settings.precision]
    scales = sorted({settings.guidance_default, max(settings.guidance[0], min(2.0, settings.guidance[1]))})

    def look(name: str, student: NetworkDenoiser, phase: Phase) -> None:
        if phase.grid.ascending:
            return
        painter = Painter(
            denoiser=student,
            vae=place(checkpoint.vae(checkpoint.vae_dtype(dtype)), settings.device).eval(),
            texts=cached_texts(prompts, texts),
            schedule=checkpoint.schedule,
            size=(settings.size[1], settings.size[0]),
            spec=_spec(settings, checkpoint, phase),
            device=settings.device,
            inpaint=checkpoint.inpaint,
        )
        rows = [list(painter.paint(prompts, seeds=range(len(prompts)), guidance=scale)) for scale in scales]
        steps = "1 step" if len(phase.grid) == 1 else f"{len(phase.grid)} steps"
        labels = [f"{steps}, guidance {scale:g}" for scale in scales]
        save_png(grid(rows, rows=labels, columns=prompts), Path(settings.out) / "samples" / f"{name}.png")

    return look


def _prompts(settings: Settings, teacher: Teacher, count: int, *, seed: int) -> list[str]:
    if settings.prompts:
        return read_prompts(Path(settings.prompts))[:count]
    if settings.demo:
        made = demo_prompts(count, seed=seed)
    else:
        made = built_in_prompts(
            count, seed=seed, style="tags" if settings.prompt_style == "tags" else "sentences"
        )
    return with_triggers(made, teacher.triggers)


def _report(
    settings: Settings,
    phases: Sequence[Phase],
    teacher: Teacher,
    data: str,
    student: Path,
    *,
    so_far: str | None = None,
) -> str | None:
    """Write report.html and answer with its verdict; without pictures where each would take too long.
    ``data``: what was learned from; ``student``: its file; ``so_far``: what this student is, where the run is
    not over.
    """
    out = Path(settings.out)
    sized = dataclasses.replace(teacher.checkpoint, resolution=settings.size)
    teacher = dataclasses.replace(teacher, checkpoint=sized)
    shown = Showcase((), (), UNSEEN)
    if settings.report_prompts:
        encoder = phases[-1].grid.ascending
        shown = (
            _encoder_showcase(settings, teacher, student)
            if encoder
            else _showcase(settings, phases, teacher, student)
        )
    curves = [json.loads(line) for line in (out / "run.jsonl").read_text(encoding="utf-8").splitlines()]
    low, high = settings.guidance
    plural = "s" if settings.steps > 1 else ""
    options = [f"{name} {_told(value)}" for name, value in settings.method_config.items()]
    facts = {
        "teacher": f"{teacher.checkpoint.name}, SHA-256 {teacher.checkpoint.sha256[:12]}",
        "student": f"{settings.steps} evaluation{plural} a picture, predicts {phases[-1].prediction_type}",
        "guidance": f"{low:g} to {high:g}, {settings.guidance_default:g} by default",
        "method": f"{settings.method}: {', '.join(options)}",
        "trained": "every weight"
        if settings.rank is None
        else f"a LoRA of rank {settings.rank}, and the guidance input",
        **({"so far": so_far} if so_far else {}),
        **({"started from": _earlier_told(teacher.earlier.spec)} if teacher.earlier else {}),
        "data": data,
        **({"masks": SHARES} if teacher.checkpoint.inpaint else {}),
        "training": f"batch {settings.batch_size}, lr {settings.lr:g}, updates {_told(settings.updates)}",
        "seed": str(settings.seed),
        **_use(teacher.checkpoint),
        **{f"LoRA {lora.name}": f"merged at strength {lora.strength:g}" for lora in teacher.checkpoint.loras},
        **_answers(settings, teacher, student),
        "computed in": f"{settings.precision} on {settings.device}",
    }
    write_report(
        out / "report.html",
        title=f"{teacher.checkpoint.name} in {settings.steps} step{plural}",
        facts=facts,
        pictures=shown.pictures,
        rows=shown.rows,
        curves=curves,
        command=command_line("toolkit.distill", sys.argv[1:]),
        verdict=shown.verdict,
        sentences=shown.sentences,
    )
    for number, (_, image) in enumerate(shown.pictures, 1):
        save_png(image, out / "samples" / f"report-{number}.png")
    return shown.verdict


def _told(value: Any) -> str:
    """A setting for people."""
    return " ".join(map(str, value)) or "none" if isinstance(value, (list, tuple)) else str(value)


def _earlier_told(spec: StudentSpec) -> str:
    return f"a student of {spec.steps} step{'s' if spec.steps > 1 else ''}, method {spec.method}"


def _use(checkpoint: Checkpoint) -> dict[str, str]:
    """How the teacher is used, where it is not as usual, in the report's words."""
    said = {
        "clip skip": str(checkpoint.clip_skip) if checkpoint.clip_skip > 1 else "",
        "rescaled guidance": f"{checkpoint.cfg_rescale:g}" if checkpoint.cfg_rescale else "",
        "textual inversions": "; ".join(_embedding_lines(checkpoint)),
    }
    return {name: value for name, value in said.items() if value}


def _embedding_lines(checkpoint: Checkpoint) -> list[str]:
    counts = [(each.name, len(each.vectors["text_encoder"])) for each in checkpoint.embeddings]
    return [f"{name}, {count} vector{'s' if count > 1 else ''}" for name, count in counts]


def _answers(settings: Settings, teacher: Teacher, file: Path) -> dict[str, str]:
    """How the student in this file answers to each LoRA that it was trained beside, in the report's words."""
    if not (settings.report_prompts and teacher.guests.all):
        return {}
    dtype = DTYPES[settings.precision]
    seed = settings.seed + 2
    prompts = _prompts(settings, teacher, settings.report_prompts, seed=seed)

    def latents(checkpoint: Checkpoint) -> Tensor:
        painter = Painter.open(checkpoint, device=settings.device, dtype=dtype)
        seeds = range(seed, seed + len(prompts))
        return painter.latents(prompts, seeds=seeds, guidance=settings.guidance_default).x0

    student = open_for_people(file, tokenizer=_path(settings.tokenizer))
    student = dataclasses.replace(student, embeddings=teacher.checkpoint.embeddings)
    said: dict[str, str] = {}
    for guest in teacher.guests.all:
        answers = answers_to(guest.file, teacher=teacher.checkpoint, student=student, latents=latents)
        said[f"with LoRA {guest.file.path.stem}"] = "; ".join(
            f"at {answer.strength:g} it acts as in the teacher at {answer.equivalent:.2f}, error "
            f"{answer.error:.0%} of its effect ({answer.plain_error:.0%} without it)"
            for answer in answers
        )
        log.info("with %s: %s", guest.file.path.stem, said[f"with LoRA {guest.file.path.stem}"])
    return said


def _showcase(settings: Settings, phases: Sequence[Phase], teacher: Teacher, student: Path) -> Showcase:
    """Teacher and students side by side; the demo's are measured by its judge too."""
    counts = {len(phase.grid) for phase in phases}
    if teacher.checkpoint.unet_parameters >= SMALL_PARAMETERS:
        counts = {settings.steps}
    dtype, turns = DTYPES[settings.precision], Turns(settings.device)

    def painter(path: Path) -> Painter:
        words = _path(settings.tokenizer) or (TOKENIZER if settings.demo else None)
        opened = open_for_people(path, tokenizer=words)
        opened = dataclasses.replace(opened, embeddings=teacher.checkpoint.embeddings)
        return Painter.open(opened, device=settings.device, dtype=dtype, turns=turns)

    out, last = Path(settings.out), len(phases[-1].grid)
    seed = settings.seed + 2
    return showcase(
        Painter.open(teacher.checkpoint, device=settings.device, dtype=dtype, turns=turns),
        {
            count: painter(student if count == last else out / "students" / f"{count}.safetensors")
            for count in counts
        },
        prompts=_prompts(settings, teacher, settings.report_prompts, seed=seed),
        sample_prompts=demo_prompts(DEMO_SAMPLES, seed=seed) if settings.demo else (),
        yardstick=_yardstick(seed) if settings.demo else None,
        guidance=settings.guidance_default,
        negative=settings.negative,
        own=own_setting(settings.own),
        seed=seed,
        fill=(lambda prompts: Fill(*drawings_to_fill(prompts, seed=seed))) if settings.demo else None,
    )


def _encoder_showcase(settings: Settings, teacher: Teacher, student: Path) -> Showcase:
    """Round trips and edits: of drawings in the demo, elsewhere of the teacher's own pictures."""
    dtype = DTYPES[settings.precision]
    opened = open_for_people(student, tokenizer=_path(settings.tokenizer))
    opened = dataclasses.replace(opened, embeddings=teacher.checkpoint.embeddings)
    encoder, decoder = (
        Painter.open(checkpoint, device=settings.device, dtype=dtype)
        for checkpoint in (opened, teacher.checkpoint)
    )
    seed, guidance = settings.seed + 2, settings.guidance_default
    if settings.demo:
        images, before = draw(settings.report_prompts, seed=seed)
        after, _ = altered(before, seed=seed)
    else:
        before = _prompts(settings, teacher, settings.report_prompts, seed=seed)
        images = decoder.paint(before, seeds=range(seed, seed + len(before)), guidance=guidance)
        after = [*before[1:], before[0]]
    return encoder_showcase(encoder, decoder, images, before, after, guidance=guidance)


def _yardstick(seed: int) -> Yardstick:
    """The demo's judge, and its features of real drawings."""
    judge = load_judge()
    pictures, _ = draw(4 * DEMO_SAMPLES, seed=seed)
    with torch.no_grad():
        return Yardstick(judge, judge.features(pictures))


def _copy(source: Path, target: Path) -> Path:
    with free_path(target) as place:
        shutil.copyfile(source, place.partial)
    return place.path


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
