"""The adapter for A1111, Forge and reForge on stand-ins with their modules' names and signatures."""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import sys
from collections import namedtuple
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from make_checkpoint import make_spec, make_student, make_teacher
from torch import Tensor, nn

from toolkit.diffusion.errors import BadInput
from toolkit.diffusion.grid import trailing_timesteps
from toolkit.diffusion.schedule import NoiseSchedule
from toolkit.runtime.files import load_tensors, sha256_of
from toolkit.runtime.library import Library, pick
from toolkit.runtime.student import COND_PROJ, time_shift

ROOT = Path(__file__).parents[1]
DOOR = ROOT / "scripts" / "fewstep_a1111.py"
SCHEDULE = NoiseSchedule.scaled_linear()
SEED = 11


class Info:
    """A host's entry for a checkpoint file."""

    def __init__(self, path: Path) -> None:
        self.filename, self.name, self.name_for_extra = str(path), path.name, path.stem
        self.title = f"{path.name} [{path.stem}]"
        self.sha256: str | None = None
        self.metadata: dict[str, Any] = {}

    def calculate_shorthash(self) -> str:
        self.sha256 = sha256_of(Path(self.filename))
        return self.sha256[:10]


class Unet(nn.Module):
    """Answers with eps = a part of x and of what reached its time embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embed = nn.Sequential(nn.Identity())
        self.timesteps: list[int] = []
        self.embedded: list[Tensor] = []
        self.fails = False

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        if self.fails:
            raise RuntimeError("the network failed")
        self.timesteps.append(int(timesteps[0]))
        self.embedded.append(self.time_embed(torch.zeros(len(x), 32)))
        return 0.1 * x + self.embedded[-1].mean()


class Wrap(nn.Module):
    """The host's denoiser of a network; of the names that the adapter looks for in its module."""

    def __init__(self, model: Any, quantize: bool = False) -> None:
        super().__init__()
        self.inner_model, self.quantize = model, quantize
        self.register_buffer("sigmas", torch.ones(1000))
        self.register_buffer("log_sigmas", torch.zeros(1000))

    def forward(self, x: Tensor, sigma: Tensor, cond: dict[str, Any]) -> Tensor:
        t = (sigma.log() - self.log_sigmas[:, None]).abs().argmin(0)
        scale = (1 + sigma[0] ** 2) ** 0.5
        entered = torch.cat([x / scale, *cond["c_concat"]], 1)
        return x - sigma[0] * self.inner_model.model.diffusion_model(entered, t)[:, :4]


CompVisDenoiser = CompVisVDenoiser = Wrap


class Sampler:
    """What a host's sampler does around the function that it is given."""

    def __init__(self, function: Any, model: Any, options: Any = None) -> None:
        self.func = function
        self.model_wrap_cfg = CFGDenoiser(self)
        self.model_wrap = self.model_wrap_cfg.inner_model
        self.steps: list[int] = []

    def sample(self, p: Any, x: Tensor, conditioning: Any, uncond: Any, steps: Any = None, **kwargs: Any):
        sigmas = self.get_sigmas(p, steps or p.steps)
        return self._run(p, x * sigmas[0], sigmas, conditioning, uncond)

    def sample_img2img(
        self,
        p: Any,
        x: Tensor,
        noise: Tensor,
        conditioning: Any,
        unconditional_conditioning: Any,
        steps: Any = None,
        image_conditioning: Any = None,
    ) -> Tensor:
        count, last = setup_img2img_steps(p, steps)
        sigmas = self.get_sigmas(p, count)[count - last - 1 :]
        return self._run(p, x + noise * sigmas[0], sigmas, conditioning, unconditional_conditioning)

    def launch_sampling(self, steps: int, func: Any) -> Tensor:
        self.steps.append(steps)
        self.model_wrap_cfg.step, self.model_wrap_cfg.total = 0, steps
        return func()

    def _run(self, p: Any, x: Tensor, sigmas: Tensor, cond: Any, uncond: Any) -> Tensor:
        args = {"cond": cond, "uncond": uncond, "image_cond": torch.zeros(len(x), 0, 8, 8)}
        args |= {"cond_scale": p.cfg_scale, "s_min_uncond": 0.0}
        return self.launch_sampling(
            p.steps, lambda: self.func(self.model_wrap_cfg, x, sigmas=sigmas, extra_args=args, callback=None)
        )


class CFGDenoiser(nn.Module):
    """Two rows a step, or one early on as skip_early_cond says; an inpainting picture is never cut."""

    def __init__(self, sampler: Any) -> None:
        super().__init__()
        self.sampler, self.model_wrap = sampler, None
        self.step, self.total = 0, 1

    @property
    def inner_model(self) -> Any:
        if self.model_wrap is None:
            self.model_wrap = Wrap(sys.modules["modules.shared"].sd_model)
        return self.model_wrap

    def forward(
        self, x: Tensor, sigma: Tensor, uncond: Any, cond: Any, cond_scale: float, s_min_uncond: float,
        image_cond: Tensor,
    ) -> Tensor:  # fmt: skip
        alone = self.step / self.total <= sys.modules["modules.shared"].opts.data["skip_early_cond"]
        self.step += 1
        if alone:
            self.run.p.extra_generation_params["Skip Early CFG"] = 2.0
        rows = 1 if alone else 2
        concat = [torch.cat([image_cond] * 2)]
        out = self.inner_model(torch.cat([x] * rows), torch.cat([sigma] * rows), cond={"c_concat": concat})
        return out[: len(x)]


def setup_img2img_steps(p: Any, steps: int | None = None) -> tuple[int, int]:
    if steps is None:
        return p.steps, int(min(p.denoising_strength, 0.999) * p.steps)
    return int(steps / min(p.denoising_strength, 0.999)), steps - 1


class Host:
    """Fake modules of a host, and the adapter loaded by its door."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.patch, self.folder, self.callbacks = monkeypatch, folder, []
        self.options: dict[str, Any] = {}
        self.written: list[dict[str, Any]] = []
        made = {name: ModuleType(f"modules.{name}") for name in (
            "extras", "script_callbacks", "scripts", "sd_models", "sd_samplers", "sd_samplers_common",
            "sd_samplers_kdiffusion", "shared",
        )}  # fmt: skip
        package = ModuleType("modules")
        package.__path__ = []
        gradio = ModuleType("gradio")
        gradio.Textbox = gradio.Radio = object
        for name, module in {"modules": package, "gradio": gradio}.items():
            monkeypatch.setitem(sys.modules, name, module)
        for name, module in made.items():
            monkeypatch.setitem(sys.modules, f"modules.{name}", module)
            setattr(package, name, module)
        self.__dict__.update(made)
        self._fill()
        self.model = SimpleNamespace(model=SimpleNamespace(diffusion_model=Unet()), sd_checkpoint_info=None)
        self.shared.sd_model = self.model
        self.load()

    def _fill(self) -> None:
        data = namedtuple("SamplerData", ["name", "constructor", "aliases", "options"])
        stock = data("Euler", object, [], {})
        self.sd_samplers.all_samplers = [stock]
        self.sd_samplers.all_samplers_map = {"Euler": stock}
        self.sd_samplers.set_samplers = lambda: None
        self.sd_samplers.get_sampler_and_scheduler = functools.cache(
            lambda name, scheduler: self.sd_samplers.all_samplers_map.get(name, stock).name
        )
        self.sd_samplers_common.SamplerData = data
        self.sd_samplers_common.setup_img2img_steps = setup_img2img_steps
        self.sd_samplers_kdiffusion.KDiffusionSampler = Sampler
        self.sd_samplers_kdiffusion.CFGDenoiserKDiffusion = CFGDenoiser
        self.scripts.Script, self.scripts.AlwaysVisible = object, object()
        self.script_callbacks.on_ui_settings = self.callbacks.append
        self.sd_models.checkpoints_list = {}
        self.sd_models.get_closet_checkpoint_match = lambda name: next(
            (i for i in self.sd_models.checkpoints_list.values() if name and name in i.title), None
        )
        self.sd_models.select_checkpoint = lambda: self.model.sd_checkpoint_info
        self.shared.opts = SimpleNamespace(
            data={"skip_early_cond": 0.25}, add_option=self.options.__setitem__,
            refiner_switch_by_sample_steps=False, hires_fix_refiner_pass="second pass",
        )  # fmt: skip
        self.shared.OptionInfo = lambda default, label, *args, **kwargs: (default, label)
        self.shared.state = SimpleNamespace(interrupted=False, skipped=False)
        self.shared.prompt_styles = SimpleNamespace(apply_styles_to_prompt=lambda prompt, styles: prompt)

        def run_modelmerger(
            id_task: Any, primary_model_name: Any, secondary_model_name: Any, tertiary_model_name: Any,
            interp_method: Any, multiplier: Any, metadata_json: str = "{}",
        ) -> list[Any]:  # fmt: skip
            metadata: dict[str, Any] = {}
            for name in (primary_model_name, secondary_model_name):
                metadata |= self.sd_models.get_closet_checkpoint_match(name).metadata
            self.written.append(metadata | json.loads(metadata_json))
            return [None, "Checkpoint saved to x.safetensors"]

        self.extras.run_modelmerger = run_modelmerger

    def load(self) -> ModuleType:
        """Run the door's file, as the host does at start and at "Reload UI"."""
        spec = importlib.util.spec_from_file_location("fewstep_a1111.py", DOOR)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for name in [name for name in sys.modules if name.startswith("fewstep_pack")]:
            self.patch.setitem(sys.modules, name, sys.modules[name])  # gone after the test
        return module

    def part(self, name: str) -> Any:
        return sys.modules[f"fewstep_pack.a1111.{name}"]

    def student(self, name: str = "student", **changes: Any) -> Info:
        path = make_student(self.folder / f"{name}.safetensors", spec=make_spec(**changes))
        return self.select(path)

    def select(self, path: Path) -> Info:
        info = Info(path)
        self.sd_models.checkpoints_list[info.title] = info
        self.model.sd_checkpoint_info = info
        return info

    def processing(self, **changes: Any) -> Any:
        comments: dict[str, int] = {}
        values: dict[str, Any] = {
            "sampler_name": "FewStep", "steps": 4, "cfg_scale": 7.0, "seeds": [SEED],
            "negative_prompts": [""],
            "denoising_strength": None, "hr_extra_network_data": {}, "override_settings": {},
            "prompt": "a fox", "styles": [],
            "extra_generation_params": {}, "extra_network_data": {}, "comments": comments,
            "comment": lambda text: comments.__setitem__(text, 1), "is_hr_pass": False, "enable_hr": False,
        }  # fmt: skip
        return SimpleNamespace(**{**values, **changes})

    def sampler(self) -> Any:
        return self.sd_samplers.all_samplers_map["FewStep"].constructor(self.model)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Host:
    return Host(monkeypatch, tmp_path)


def noise() -> Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(SEED))


# -- The host's lists ------------------------------------------------------------------------------------


def test_the_sampler_is_registered_once_in_place_however_often_the_ui_is_reloaded(host: Host) -> None:
    samplers, merger = host.sd_samplers.all_samplers, host.extras.run_modelmerger
    assert host.sd_samplers.get_sampler_and_scheduler("FewStep", None) == "FewStep"
    first = host.sd_samplers.all_samplers_map["FewStep"]
    host.load()
    assert host.sd_samplers.all_samplers is samplers
    assert [each.name for each in samplers] == ["Euler", "FewStep"]
    assert samplers[1] is host.sd_samplers.all_samplers_map["FewStep"] is not first
    assert samplers[1].constructor is host.part("sampling").FewStepSampler is not first.constructor
    assert host.extras.run_modelmerger.__wrapped__ is merger.__wrapped__


def test_a_name_that_was_looked_up_too_early_is_found_after_registration(host: Host) -> None:
    del host.sd_samplers.all_samplers_map["FewStep"]
    host.sd_samplers.get_sampler_and_scheduler.cache_clear()
    assert host.sd_samplers.get_sampler_and_scheduler("FewStep", None) == "Euler"
    host.load()
    assert host.sd_samplers.get_sampler_and_scheduler("FewStep", None) == "FewStep"


def test_the_settings_have_a_page(host: Host) -> None:
    for callback in host.callbacks:
        callback()
    assert set(host.options) == {"fewstep_folder", "fewstep_defaults", "fewstep_without"}


def test_sd_next_is_recognised_and_told_in_one_line(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    other = ModuleType("modules.sd_samplers_diffusers")
    other.__spec__ = ModuleSpec(other.__name__, None)
    host.patch.setitem(sys.modules, other.__name__, other)
    with caplog.at_level(logging.INFO):
        module = host.load()
    assert [record.name for record in caplog.records] == ["fewstep"]
    assert "--to diffusers" in caplog.text and not hasattr(module, "FewStep")


# -- A run -----------------------------------------------------------------------------------------------


def test_a_picture_takes_one_row_at_each_trained_timestep_from_full_noise(host: Host) -> None:
    host.student()
    p, sampler, unet = host.processing(), host.sampler(), host.model.model.diffusion_model
    seen: list[Tensor] = []
    unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    sampler.sample(p, noise(), None, None)
    assert unet.timesteps == [999, 749, 499, 249] and sampler.steps == [4]
    assert [len(x) for x in seen] == [1] * 4
    assert torch.allclose(seen[0], noise(), atol=1e-6)  # of unit variance, as the network wants it
    assert p.extra_generation_params == {} and p.comments == {}


@pytest.mark.parametrize(("used", "is_told"), [(1, True), (2, False)])
def test_another_clip_skip_than_the_students_is_told(host: Host, used: int, is_told: bool) -> None:
    host.student(clip_skip=2)
    host.shared.opts.CLIP_stop_at_last_layers = used
    p = host.processing()
    host.sampler().sample(p, noise(), None, None)
    assert ("trained with clip skip 2" in "".join(p.comments)) == is_told


@pytest.mark.parametrize("steps", [None, 4, 7])
@pytest.mark.parametrize(("strength", "timesteps"), [(0.2, [199]), (0.5, [499, 249]), (0.6, [599, 499, 249])])
def test_a_strength_starts_at_its_timestep_however_the_host_cuts(
    host: Host, strength: float, timesteps: list[int], steps: int | None
) -> None:
    host.student()
    p, unet = host.processing(denoising_strength=strength), host.model.model.diffusion_model
    seen: list[Tensor] = []
    unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = torch.ones(1, 4, 8, 8)
    host.sampler().sample_img2img(p, image, noise(), None, None, steps=steps)
    assert unet.timesteps == timesteps
    sigma = float(SCHEDULE.sigma(torch.tensor(timesteps[0])))
    assert torch.allclose(seen[0], (image + sigma * noise()) / (1 + sigma**2) ** 0.5, atol=1e-5)


def test_a_student_without_any_start_snaps_and_says_so(host: Host) -> None:
    host.student(any_start=False)
    p = host.processing(denoising_strength=0.6)
    host.sampler().sample_img2img(p, torch.zeros(1, 4, 8, 8), noise(), None, None)
    assert host.model.model.diffusion_model.timesteps == [499, 249]
    assert list(p.comments) == [
        "FewStep: timestep 599 was asked for, and the nearest trained one, 499, was taken"
    ]


@pytest.mark.parametrize(
    ("changes", "guidance"),
    [
        ({"cfg_scale": 3.0}, 3.0),
        ({"cfg_scale": 40.0}, 15.0),
        ({"is_hr_pass": True, "hr_cfg": 2.0}, 2.0),
        ({"is_hr_pass": True}, 7.0),
    ],
)
def test_the_guidance_of_the_pass_reaches_the_time_embedding_and_no_more(
    host: Host, changes: dict[str, Any], guidance: float
) -> None:
    info = host.student()
    unet = host.model.model.diffusion_model
    host.sampler().sample(host.processing(**changes), noise(), None, None)
    [cond_proj] = [v for k, v in load_tensors(Path(info.filename)).items() if k.endswith(COND_PROJ)]
    assert torch.allclose(unet.embedded[0][0], time_shift(make_spec(), cond_proj, guidance))
    assert not unet.time_embed._forward_pre_hooks
    assert not unet.time_embed(torch.zeros(1, 32)).any()


def test_a_run_that_fails_leaves_nothing_behind(host: Host) -> None:
    host.student()
    p, unet = host.processing(), host.model.model.diffusion_model
    p.extra_generation_params["Skip Early CFG"] = 0.25
    before = dict(host.shared.opts.data)
    unet.fails = True
    with pytest.raises(RuntimeError, match="the network failed"):
        host.sampler().sample(p, noise(), None, None)
    assert not unet.time_embed._forward_pre_hooks and host.shared.opts.data == before
    assert p.extra_generation_params == {"Skip Early CFG": 0.25}


def test_forges_prediction_is_the_students_for_the_call_alone(host: Host) -> None:
    class Predictor:
        prediction_type, sigmas = "epsilon", torch.ones(3)

        def set_sigmas(self, sigmas: Tensor) -> None:
            self.sigmas = sigmas

    predictor = Predictor()
    inner = SimpleNamespace(predictor=predictor)
    model = SimpleNamespace(forge_objects=SimpleNamespace(unet=SimpleNamespace(model=inner)))
    network, spec = host.part("network"), make_spec(prediction_type="v_prediction", ztsnr=True)
    with pytest.raises(ZeroDivisionError), network.as_trained(model, spec):
        assert inner.predictor.prediction_type == "v_prediction" and inner.predictor.sigmas[-1] > 4000
        raise ZeroDivisionError
    assert inner.predictor is predictor and predictor.prediction_type == "epsilon"
    assert len(predictor.sigmas) == 3


def test_a_network_that_the_guidance_did_not_reach_is_told(host: Host) -> None:
    host.student()
    unet = host.model.model.diffusion_model
    host.patch.setattr(Unet, "forward", lambda self, x, timesteps: x)
    p = host.processing()
    host.sampler().sample(p, noise(), None, None)
    assert "the guidance did not reach the network" in "".join(p.comments) and not unet.embedded


def test_weights_of_prompts_joined_by_and_sum_to_one_in_a_copy(host: Host) -> None:
    parts = [SimpleNamespace(weight=1.0), SimpleNamespace(weight=3.0)]
    conditioning = SimpleNamespace(batch=[parts])
    made = host.part("sampling")._averaged(conditioning)
    assert [part.weight for part in made.batch[0]] == [0.25, 0.75] and parts[1].weight == 3.0
    alone = SimpleNamespace(batch=[[SimpleNamespace(weight=1.0)]])
    assert host.part("sampling")._averaged(alone) is alone


# -- Which student ---------------------------------------------------------------------------------------


def test_a_base_checkpoint_gets_its_student_by_hash_in_a_new_dictionary(host: Host) -> None:
    teacher = make_teacher(host.folder / "base.safetensors")
    host.student("another", teacher_sha256="f" * 64)
    mine = host.student("mine", teacher_sha256=sha256_of(teacher))
    two = host.student("two", teacher_sha256=sha256_of(teacher), timesteps=trailing_timesteps(2))
    base = host.select(teacher)
    settings: dict[str, Any] = {}
    p = host.processing(override_settings=settings, steps=20)
    host.part("script").FewStep().before_process(p)
    assert p.override_settings == {"sd_model_checkpoint": mine.title} and settings == {}
    assert p.steps == 4 and "20 steps were asked for" in "".join(p.comments)
    p = host.processing(steps=2, enable_hr=True, hr_sampler_name="Euler", hr_checkpoint_name=None)
    host.part("script").FewStep().before_process(p)
    assert p.override_settings == {"sd_model_checkpoint": two.title} and p.hr_checkpoint_name == base.title
    p = host.processing(sampler_name="Euler", enable_hr=True, hr_sampler_name="FewStep")
    p.hr_checkpoint_name = "Use same checkpoint"
    host.part("script").FewStep().before_process(p)
    assert p.override_settings == {} and p.hr_checkpoint_name == mine.title and p.sampler_name == "Euler"


def test_without_a_student_the_sampler_says_why(host: Host) -> None:
    host.select(make_teacher(host.folder / "base.safetensors"))
    p = host.processing()
    host.part("script").FewStep().before_process(p)
    assert p.override_settings == {} and p.sampler_name == "FewStep"
    with pytest.raises(BadInput.__mro__[1], match=r"base\.safetensors is none, nor was one among"):
        host.sampler().sample(p, noise(), None, None)
    host.shared.opts.fewstep_without = host.part("script").GO_ON
    host.part("script").FewStep().before_process(p)
    assert p.sampler_name == "DPM++ 2M" and "DPM++ 2M was taken" in "".join(p.comments)


def test_an_ordinary_sampler_on_a_student_is_warned_of_and_gets_the_usual_guidance(host: Host) -> None:
    host.student(guidance_default=5.0)
    unet = host.model.model.diffusion_model
    sampler = SimpleNamespace(config=SimpleNamespace(name="Euler"))
    sampler.launch_sampling = lambda steps, func: func()
    p = host.processing(sampler=sampler)
    host.part("script").FewStep().process_before_every_sampling(p)
    shifted = sampler.launch_sampling(4, lambda: unet.time_embed(torch.zeros(1, 32)))
    assert shifted.any() and not unet.time_embed._forward_pre_hooks
    assert "Euler with these steps" in "".join(p.comments) and "guidance 5" in "".join(p.comments)


def test_of_a_teachers_students_the_one_of_these_steps_is_picked() -> None:
    four, eight = make_spec(), make_spec(timesteps=trailing_timesteps(8))
    students = {Path("a"): four, Path("b"): eight, Path("c"): replace(eight, baked_guidance=4.0)}
    assert pick(students, steps=4, preferred=Path("b")) == (Path("a"), "")
    assert pick(students, steps=8, preferred=None) == (Path("b"), "")
    found, note = pick(students, steps=20, preferred=None)
    assert found == Path("b") and "students have 4, 8: b with 8 was taken" in note
    assert pick(students, steps=20, preferred=Path("a"))[0] == Path("a")


def test_a_library_reads_a_file_again_when_it_has_changed(tmp_path: Path) -> None:
    library, path = Library(), tmp_path / "x.safetensors"
    assert library.look(path) is None
    make_teacher(path)
    found = library.look(path)
    assert found is not None and found.kind == "other"
    make_student(path)
    found = library.look(path)
    assert found is not None and found.kind == "student"
    (tmp_path / "x.ckpt").write_bytes(b"x")
    (tmp_path / "y.safetensors").write_bytes(b"x")
    assert library.look(tmp_path / "x.ckpt") is None and library.look(tmp_path / "y.safetensors") is None


# -- Refiner and merger ----------------------------------------------------------------------------------


def test_a_refiner_takes_over_only_where_it_was_trained_to_go_on(host: Host) -> None:
    sampling, spec, grid = host.part("sampling"), make_spec(), trailing_timesteps(4)
    refuse = functools.partial(sampling.refuse_refiner, spec, name="r", timesteps=grid)
    refuse(spec, switch=2)
    refuse(make_spec(timesteps=(999, 499, 249)), switch=2)
    for refiner, what in (
        (None, "is no student"),
        (make_spec(timesteps=(999, 499)), "it was trained for 999, 499"),
        (make_spec(family="sdxl"), "another family"),
    ):
        with pytest.raises(Exception, match=what):
            refuse(refiner, switch=2)
    assert sampling.switch_position(grid, 0.5, by_steps=True) == 2
    assert sampling.switch_position(grid, 0.5, by_steps=False) == 2
    assert sampling.switch_position(grid, 0.3, by_steps=False) == 2
    assert sampling.switch_position(grid, 0.8, by_steps=False) is None


def test_the_merger_says_what_became_of_the_dial_and_can_write_the_spec(host: Host) -> None:
    student = host.student()
    parsed = {"fewstep.spec": {"family": "sd1"}, "other": "x"}  # as the host reads it
    student.metadata = parsed
    host.select(make_teacher(host.folder / "base.safetensors"))
    merge = functools.partial(host.extras.run_modelmerger, "id", multiplier=0.3)
    kept = merge("student", "base", "", "Weighted sum", metadata_json=json.dumps(parsed))
    assert [host.written[-1].get(key) for key in ("fewstep.spec", "other")] == [make_spec().to_json(), "x"]
    assert "it has model A's guidance dial, whole" in kept[-1]
    assert student.metadata is parsed and parsed["fewstep.spec"] == {"family": "sd1"}
    gone = host.extras.run_modelmerger("id", "base", "student", "", "Weighted sum", 0.3)
    assert "the guidance dial is gone" in gone[-1] and "fewstep.spec" not in host.written[-1]
    both = host.extras.run_modelmerger("id", "student", "student", "", "Weighted sum", 0.3)
    assert "the mean of the two" in both[-1]
    plain = host.extras.run_modelmerger("id", "base", "base", "", "Weighted sum", 0.3)
    assert plain[-1] == "Checkpoint saved to x.safetensors"
