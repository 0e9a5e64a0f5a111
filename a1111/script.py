"""What the host calls around each picture, its settings page, and its checkpoint merger."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio
from modules import extras, script_callbacks, scripts, sd_models, shared

from ..toolkit.diffusion.errors import BadInput
from ..toolkit.diffusion.spec import SPEC_KEY, StudentSpec
from ..toolkit.runtime.sentences import not_the_students_sampler
from . import network, sampling
from .messages import tell, tell_once
from .sampling import NAME
from .students import Student, find_for, names_a_student, stated_spec, student_for, student_of

STOP = "Stop with a message"
INSTEAD = "DPM++ 2M"
GO_ON = f"Sample the checkpoint itself with {INSTEAD}"


class FewStep(scripts.Script):
    def title(self) -> str:
        return NAME

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        return []

    def before_process(self, p: Any, *args: Any) -> None:
        """Each pass whose sampler is FewStep gets a student, the other pass what the person selected."""
        first = p.sampler_name == NAME
        has_second = bool(getattr(p, "enable_hr", False))
        second = has_second and (p.hr_sampler_name or p.sampler_name) == NAME
        if not (first or second) or _prompts_name_a_student(p):
            return
        base = _named(p.override_settings.get("sd_model_checkpoint")) or sd_models.select_checkpoint()
        other = _named(getattr(p, "hr_checkpoint_name", None)) if has_second else None
        if first and (student := self._student(p, base)) is not None:
            p.override_settings = {**p.override_settings, "sd_model_checkpoint": student.title}
            spec = stated_spec(student.filename)
            if spec is not None and spec.sampler != "consistency" and p.steps != spec.steps:
                tell_once(p, f"{student.name} has {spec.steps} steps, whatever the slider says")
                p.steps = spec.steps
        if second and not first and (student := self._student(p, other or base)) is not None:
            p.hr_checkpoint_name = student.title
        elif second and other is not None and (student := self._student(p, other)) is not None:
            p.hr_checkpoint_name = student.title
        elif first and has_second and not second and other is None and student_of(base) is None:
            p.hr_checkpoint_name = base.title

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
        """An ordinary sampler on a student: warned of, and the network gets the guidance it knows best."""
        if isinstance(p.sampler, sampling.FewStepSampler) or (student := student_for(p)) is None:
            return
        if student.spec.baked_guidance is not None and student.spec.container != "lora":
            return  # such a file is for ordinary samplers
        used = p.sampler.config.name
        given = f"; it gets guidance {student.spec.guidance_default:g}" if student.spec.has_dial else ""
        tell(p, not_the_students_sampler(student.spec, used, NAME) + given)
        p.sampler.launch_sampling = _fed(p.sampler.launch_sampling, student)

    def _student(self, p: Any, base: Any) -> Any:
        """The host's checkpoint of the student for ``base``, or None, and then the sampler says why."""
        if student_of(base) is not None:
            return base
        try:
            found, note = find_for(base, steps=p.steps)
        except BadInput as error:
            if getattr(shared.opts, "fewstep_without", STOP) == GO_ON:
                tell(p, f"{error}: {INSTEAD} was taken")
                p.sampler_name = INSTEAD if p.sampler_name == NAME else p.sampler_name
                if getattr(p, "hr_sampler_name", None) == NAME:
                    p.hr_sampler_name = INSTEAD
            return None
        if note:
            tell(p, note)
        return found


def settings() -> None:
    """The page FewStep of the host's settings."""
    section = ("fewstep", NAME)
    lines = {"lines": 3, "placeholder": "checkpoint = student"}
    pages = {
        "fewstep_folder": shared.OptionInfo(
            "", "Another folder of students, beside the checkpoints'", gradio.Textbox, section=section
        ),
        "fewstep_defaults": shared.OptionInfo(
            "",
            "The student for a checkpoint, where it has several or was not distilled itself; one a line",
            gradio.Textbox,
            lines,
            section=section,
        ),
        "fewstep_without": shared.OptionInfo(
            STOP,
            "If the selected checkpoint has no student",
            gradio.Radio,
            {"choices": [STOP, GO_ON]},
            section=section,
        ),
    }
    for key, option in pages.items():
        shared.opts.add_option(key, option)


def after_merge(a: Any, b: Any, c: Any, method: str) -> str:
    """What the host's merger made of the dial: it keeps the weights that A has, and of those the mean of
    what both have. ``a``, ``b``, ``c``: StudentSpecs, or None."""
    if a is None and b is None and c is None:
        return ""
    if a is None:
        return (
            "the guidance dial is gone: the merger keeps the weights that model A has, and A is no student; "
            "make the student model A"
        )
    if b is None or method == "No interpolation":
        return "the result is a student: it has model A's guidance dial, whole"
    if method == "Weighted sum":
        return (
            "the result is a student: its guidance dial is the mean of the two; let both be of one method, "
            "one number of steps and one teacher"
        )
    return "the result is a student: its guidance dial is model A's, and what B and C differ by"


def _merger(run: Any) -> Any:
    """The host's merger, which writes model A's spec (its own reading of metadata it could not write), and
    says what became of the dial."""

    @functools.wraps(run)
    def merge(*arguments: Any, **named: Any) -> Any:
        bound = inspect.signature(run).bind(*arguments, **named)
        given = bound.arguments
        names = [given[f"{rank}_model_name"] for rank in ("primary", "secondary", "tertiary")]
        infos = [sd_models.get_closet_checkpoint_match(name) for name in names]
        specs = [None if info is None else stated_spec(info.filename) for info in infos]
        if "metadata_json" in given:
            given["metadata_json"] = _edited(given["metadata_json"], specs[0])
        with _metadata_of_a(infos, specs[0]):
            *updates, text = run(*bound.args, **bound.kwargs)
        done = text.startswith("Checkpoint saved")
        sentence = after_merge(*specs, given["interp_method"]) if done else ""
        return [*updates, f"{text}<br>FewStep: {sentence}" if sentence else text]

    return merge


@contextmanager
def _metadata_of_a(infos: list[Any], spec: StudentSpec | None) -> Iterator[None]:
    """Within, the checkpoints to be merged have model A's spec in their metadata, as text, or none."""
    before = {info: info.metadata for info in infos if info is not None}
    for info, metadata in before.items():
        info.metadata = _with_spec(metadata, spec)
    try:
        yield
    finally:
        for info, metadata in before.items():
            info.metadata = metadata


def _with_spec(metadata: dict[str, Any], spec: StudentSpec | None) -> dict[str, Any]:
    kept = {key: value for key, value in metadata.items() if key != SPEC_KEY}
    return kept if spec is None else {**kept, SPEC_KEY: spec.to_json()}


def _edited(metadata_json: str, spec: StudentSpec | None) -> str:
    """What the person has in the merger's field for metadata, with model A's spec or none."""
    try:
        metadata = json.loads(metadata_json)
    except (TypeError, ValueError):
        return metadata_json
    return json.dumps(_with_spec(metadata, None if metadata.get(SPEC_KEY) is None else spec))


def _fed(launch: Any, student: Student) -> Any:
    def launch_sampling(steps: int, func: Any) -> Any:
        shift = student.shift(student.spec.guidance_default)
        with network.feeding(network.unet_of(shared.sd_model), shift):
            return launch(steps, func)

    return launch_sampling


def _named(name: str | None) -> Any:
    return None if name == "Use same checkpoint" else sd_models.get_closet_checkpoint_match(name)


def _prompts_name_a_student(p: Any) -> bool:
    prompts = p.prompt if isinstance(p.prompt, list) else [p.prompt]
    return any(
        names_a_student(shared.prompt_styles.apply_styles_to_prompt(text, p.styles)) for text in prompts
    )


def register() -> None:
    """Sampler, settings and merger; again at each "Reload UI"."""
    sampling.register()
    script_callbacks.on_ui_settings(settings)
    extras.run_modelmerger = _merger(getattr(extras.run_modelmerger, "__wrapped__", extras.run_modelmerger))
