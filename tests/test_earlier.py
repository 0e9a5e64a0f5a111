"""Students that are not the end of it: one that a further run starts from, one that a run has so far."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from make_checkpoint import make_teacher

from toolkit.diffusion.errors import BadInput
from toolkit.diffusion.grid import Grid
from toolkit.diffusion.method import Phase, Setting
from toolkit.diffusion.spec import AppliedLora, StudentSpec
from toolkit.methods import consistency, progressive, sfddm
from toolkit.training.adapters import LoraShape, OneNetwork
from toolkit.training.checkpoint import Checkpoint, open_checkpoint, save_student
from toolkit.training.earlier import Earlier
from toolkit.training.loop import save_state
from toolkit.training.so_far import best_so_far
from toolkit.training.student_lora import lora_path, save_lora_student, unet_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("models")
    return open_checkpoint(make_teacher(folder / "tiny.safetensors", shape="tiny"))


def spec_of(teacher: Checkpoint, steps: int = 4, **changes) -> StudentSpec:
    values = dict(
        family=teacher.family,
        prediction_type="epsilon",
        method="progressive",
        timesteps=Grid.trailing(steps, 1000).timesteps,
        teacher_sha256=teacher.sha256,
        teacher_name=teacher.name,
        guidance_max=8.0,
        guidance_default=4.0,
    )
    return StudentSpec(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def student(teacher, tmp_path):
    """Writes a student whose spec differs from the usual one as told."""

    def write(**changes) -> Path:
        path = tmp_path / "student.safetensors"
        save_student(path, unet_state=unet_of(teacher), spec=spec_of(teacher, **changes), source=teacher)
        return path

    return write


def phases(method, setting: Setting, **options) -> tuple[Phase, ...]:
    return method.phases(method.Config(**options), setting)


@pytest.mark.parametrize(
    ("changes", "asked", "sentence"),
    [
        ({"direction": "encode", "timesteps": (0, 499)}, {}, "this is an encoder"),
        ({"teacher_sha256": "0" * 64}, {}, "give its own as --ckpt"),
        ({"baked_guidance": 4.0}, {}, "one guidance is baked"),
        ({"loras": (AppliedLora("style", "1" * 64, 0.8),)}, {}, "style:0.8; in this run: none"),
        ({}, {"student": "lora"}, "every weight of this student was trained"),
        ({}, {"rank": 4}, "every weight of this student was trained"),
        ({"lora_rank": 4}, {"student": "lora"}, "is not beside it"),
    ],
)
def test_what_a_run_cannot_start_from_is_refused_in_one_sentence(student, teacher, changes, asked, sentence):
    with pytest.raises(BadInput) as caught:
        Earlier.open(student(**changes), teacher, asked)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_teacher_is_no_student_to_start_from(teacher):
    with pytest.raises(BadInput, match="this is no student"):
        Earlier.open(teacher.path, teacher, {})


def test_a_student_takes_the_place_of_the_phase_that_would_have_made_it(teacher):
    setting = Setting(teacher.schedule, "epsilon", 1)
    earlier = Earlier(Path("4.safetensors"), spec_of(teacher, 4), teacher)
    chain = phases(progressive, setting)
    left = earlier.remaining(chain, guidance=(1, 8), negative="")
    assert [phase.name for phase in left] == ["fold-2", "fold-1"] and left[0].teacher == "previous"
    stage_1 = dataclasses.replace(earlier, spec=spec_of(teacher, 16, method="guided"))
    assert stage_1.remaining(chain, guidance=(1, 8), negative="")[0].name == "fold-8"
    other = dataclasses.replace(earlier, spec=spec_of(teacher, 3))
    assert other.remaining(chain, guidance=(1, 15), negative="x") == chain
    stochastic = dataclasses.replace(earlier, spec=spec_of(teacher, 4, sampler="stochastic"))
    assert stochastic.remaining(chain, guidance=(1, 8), negative="") == chain
    with pytest.raises(BadInput, match=r"trained for guidance 1 to 8 and is to be imitated from 1 to 15"):
        earlier.remaining(chain, guidance=(1, 15), negative="")
    with pytest.raises(BadInput, match=r"leave out --negative"):
        earlier.remaining(chain, guidance=(1, 8), negative="blurry")
    with pytest.raises(BadInput, match=r"has a guidance dial and the run asks for none"):
        unguided = dataclasses.replace(setting, guided=False)
        earlier.remaining(phases(sfddm, unguided), guidance=(1, 1), negative="")


def test_what_the_earlier_student_predicts_is_kept_unless_there_are_fewer_steps_now(teacher):
    def predicted(steps: int, method, before: StudentSpec) -> list[str]:
        earlier = Earlier(Path("s"), before, teacher)
        found = phases(method, Setting(teacher.schedule, "epsilon", steps))
        return [p.prediction_type for p in earlier.remaining(found, guidance=(1, 8), negative="")]

    velocity = spec_of(teacher, 2, prediction_type="v_prediction")
    assert predicted(4, sfddm, velocity) == ["v_prediction"]
    assert predicted(1, sfddm, spec_of(teacher, 4, prediction_type="v_prediction")) == ["v_prediction"]
    assert predicted(3, sfddm, spec_of(teacher, 4, prediction_type="v_prediction")) == ["v_prediction"]
    assert predicted(3, sfddm, spec_of(teacher, 4)) == ["epsilon"]
    assert predicted(2, consistency, spec_of(teacher, 2)) == ["epsilon"]
    assert predicted(2, progressive, spec_of(teacher, 4)) == ["v_prediction"]


def test_a_student_lora_is_read_back_as_it_was_trained(teacher, tmp_path):
    def new_unet():
        return teacher.unet(conditioned=True)

    def holder() -> OneNetwork:
        return OneNetwork(
            new_unet, LoraShape(2), seed=1, device=CPU, dtype=torch.float32, autocast=lambda network: network
        )

    torch.manual_seed(0)
    pair = holder().pair(None, teacher="pair")
    trained = {n: p.detach() + 0.1 * torch.randn(p.shape) for n, p in pair.trained.items()}
    path = tmp_path / "student.safetensors"
    spec = spec_of(teacher, lora_rank=2)
    save_lora_student(path, trained, spec=spec, source=teacher, dtype=torch.float32)
    for file in (path, lora_path(path)):
        earlier = Earlier.open(file, teacher, {})
        assert earlier.path == lora_path(path)
        assert earlier.defaults["student"] == "lora" and earlier.defaults["rank"] == 2
        found = earlier.state()
        assert found.keys() == trained.keys()
        assert max(float((found[n] - trained[n]).abs().max()) for n in trained) < 1e-5
    holder().pair(found, teacher="pair")
    assert Earlier.open(path, teacher, {"student": "full"}).path == path
    with pytest.raises(BadInput, match="this LoRA has rank 2, and --rank 4 was asked for"):
        Earlier.open(path, teacher, {"rank": 4})
    with pytest.raises(BadInput, match="give the merged student beside it"):
        Earlier.open(lora_path(path), teacher, {"student": "full"})


NAMES, UPDATES = ["guided", "fold-2"], [10, 10]


def state(phase: int, update: int, value: float = 2.0) -> dict:
    return {
        "phase": phase,
        "update": update,
        "student": {"a": torch.ones(2)},
        "average": {"a": torch.full((2,), value)},
    }


def test_the_best_student_so_far_is_the_one_under_way_from_half_of_its_updates_on(tmp_path):
    save_state(tmp_path / "phase-0.pt", {"a": torch.zeros(2)})
    for update, index, says in (
        (4, 0, "the finished student of phase guided (4 of 10 updates of phase fold-2, less than half"),
        (5, 1, "the student of phase fold-2 as it was after 5 of 10 updates"),
    ):
        save_state(tmp_path / "latest.pt", state(1, update))
        found = best_so_far(tmp_path, NAMES, UPDATES, earlier=False)
        assert found.index == index and says in found.says
        assert found.state["a"].tolist() == [2.0 * index] * 2
    save_state(tmp_path / "latest.pt", state(1, 9, float("nan")))
    found = best_so_far(tmp_path, NAMES, UPDATES, earlier=False)
    assert found.index == 0 and "not finite" in found.says
    save_state(tmp_path / "latest.pt", {"phase": 1, "update": 0})
    assert "fold-2 has not begun" in best_so_far(tmp_path, NAMES, UPDATES, earlier=False).says
    save_state(tmp_path / "phase-1.pt", {"a": torch.ones(2)})
    save_state(tmp_path / "latest.pt", {"phase": 2, "update": 0})
    found = best_so_far(tmp_path, NAMES, UPDATES, earlier=False)
    assert found.index == 1 and "this run is complete" in found.says


def test_a_first_phase_hardly_begun_is_a_student_only_where_there_is_no_better_one(tmp_path):
    with pytest.raises(BadInput, match="no student yet"):
        best_so_far(tmp_path, NAMES, UPDATES, earlier=False)
    save_state(tmp_path / "latest.pt", state(0, 2))
    assert "expect little" in best_so_far(tmp_path, NAMES, UPDATES, earlier=False).says
    with pytest.raises(BadInput, match=r"keep the student of --init"):
        best_so_far(tmp_path, NAMES, UPDATES, earlier=True)
