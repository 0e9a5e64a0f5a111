"""What hosts ask of a student's file: what it is, its dial, its grid, another negative prompt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from closed_form import SCHEDULE
from make_checkpoint import make_spec, make_student, make_teacher

from toolkit.diffusion.errors import BadInput
from toolkit.diffusion.guidance import w_embedding
from toolkit.runtime.files import SAVED_SPEC, load_tensors, read_metadata, save_tensors, spec_tensor
from toolkit.runtime.student import (
    describe,
    embedded,
    guessed_spec,
    live_negative,
    plan_walk,
    read_student,
    schedule_of,
    time_shift,
    trained_sigmas,
)


def test_a_file_says_what_it_is(tmp_path):
    student = make_student(tmp_path / "student.safetensors")
    found = read_student(student)
    assert (found.kind, found.spec, found.stated) == ("student", make_spec(), True)
    baked = make_spec(baked_guidance=4.0)
    tensors, metadata = load_tensors(student), read_metadata(student)
    save_tensors(tensors, {**metadata, "fewstep.spec": baked.to_json()}, tmp_path / "baked.safetensors")
    assert read_student(tmp_path / "baked.safetensors").kind == "baked"
    lora = make_spec(baked_guidance=4.0, container="lora")
    save_tensors({"x": torch.zeros(1)}, {"fewstep.spec": lora.to_json()}, tmp_path / "lora.safetensors")
    assert read_student(tmp_path / "lora.safetensors").kind == "lora"
    assert read_student(make_teacher(tmp_path / "teacher.safetensors")).kind == "other"


def test_a_student_without_metadata_is_taken_for_its_familys_default(tmp_path):
    student = make_student(tmp_path / "student.safetensors")
    save_tensors(load_tensors(student), {}, tmp_path / "nameless.safetensors")
    found = read_student(tmp_path / "nameless.safetensors")
    assert found.kind == "student" and not found.stated and found.spec is not None
    assert (found.spec.family, found.spec.timesteps, found.spec.prediction_type) == (
        "sd1", (999, 749, 499, 249), "epsilon",
    )  # fmt: skip
    marked = {**load_tensors(student), "v_pred": torch.zeros(0)}
    assert guessed_spec(marked).prediction_type == "v_prediction"
    kept = {**load_tensors(student), SAVED_SPEC: spec_tensor(make_spec(timesteps=(999, 499)))}
    save_tensors(kept, {}, tmp_path / "saved.safetensors")
    saved = read_student(tmp_path / "saved.safetensors")
    assert saved.stated and saved.spec == make_spec(timesteps=(999, 499))


def test_guidance_is_embedded_as_w_and_refused_out_of_range():
    spec = make_spec(guidance_min=2.0, guidance_max=8.0)
    assert torch.equal(embedded(spec, [2.0, 7.5]), w_embedding(torch.tensor([1.0, 6.5])))
    with pytest.raises(BadInput, match="trained for guidance 2 to 8"):
        embedded(spec, [3.0, 9.0])
    with pytest.raises(BadInput, match="no guidance dial"):
        embedded(replace(spec, w_embedding=None), [3.0])


def test_the_dial_of_a_lora_is_alive_and_of_a_baked_checkpoint_not():
    assert make_spec().has_dial and not make_spec(baked_guidance=4.0).has_dial
    assert make_spec(baked_guidance=4.0, container="lora").has_dial
    assert "guidance 1 to 15" in describe(make_spec(baked_guidance=4.0, container="lora"))
    assert "guidance 4 baked in" in describe(make_spec(baked_guidance=4.0))
    assert "1 step," in describe(make_spec(timesteps=(999,)))


@pytest.mark.parametrize(("low", "guidance"), [(1.0, 4.0), (1.0, 1.5), (1.0, 15.0), (3.0, 5.0)])
def test_two_evaluations_with_a_live_negative_are_exactly_guidance_against_it(low, guidance):
    spec = make_spec(guidance_min=low)
    unconditional, positive, negative = 0.3, -1.7, 2.9

    def student(cond: float, at: float) -> float:
        spec.check_guidance(at)
        return unconditional + at * (cond - unconditional)

    live = live_negative(spec, guidance)
    n = student(negative, live.negative)
    answer = n + live.cfg * (student(positive, live.positive) - n)
    assert answer == pytest.approx(negative + guidance * (positive - negative))


def test_a_live_negative_at_guidance_one_is_none_and_beyond_the_range_is_refused():
    assert live_negative(make_spec(), 1.0).cfg == 1
    with pytest.raises(BadInput, match="live negative prompt"):
        live_negative(make_spec(guidance_min=5.0, guidance_max=8.0), 5.5)


def test_a_walk_in_the_hosts_own_table_runs_trained_entries_from_any_start():
    schedule = schedule_of(SCHEDULE.sigmas.float())
    spec = make_spec()
    tail = torch.tensor([5.0, 3.0, 1.0, 0.0])
    plan = plan_walk(spec, schedule, tail, seeds=[0])
    assert float(plan.sigmas[0]) == 5 and plan.timesteps[1:] == (749, 499, 249) and plan.note == ""
    snapped = plan_walk(replace(spec, any_start=False), schedule, tail, seeds=[0])
    assert snapped.timesteps == (749, 499, 249) and "nearest trained one, 749" in snapped.note
    consistency = plan_walk(replace(spec, sampler="consistency"), schedule, tail, seeds=[0])
    assert consistency.sigmas.tolist() == tail.tolist()


def test_one_file_has_one_grid_unless_it_is_a_consistency_students():
    schedule = schedule_of(SCHEDULE.sigmas)
    assert len(trained_sigmas(make_spec(), schedule)) == len(trained_sigmas(make_spec(), schedule, 4)) == 5
    with pytest.raises(BadInput, match="8 steps were asked for, but this student was trained for 4"):
        trained_sigmas(make_spec(), schedule, 8)
    assert len(trained_sigmas(make_spec(sampler="consistency"), schedule, 8)) == 9


def test_what_joins_the_time_embedding_is_the_dials_output_less_what_a_loras_loader_baked():
    cond_proj = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    live, lora = make_spec(), make_spec(container="lora", baked_guidance=4.0)
    assert torch.allclose(time_shift(live, cond_proj, 3.0), cond_proj @ embedded(live, [3.0])[0])
    assert not time_shift(lora, cond_proj, 4.0).any()
    difference = time_shift(live, cond_proj, 3.0) - time_shift(live, cond_proj, 4.0)
    assert torch.allclose(time_shift(lora, cond_proj, 3.0, strength=0.5), 0.5 * difference, atol=1e-5)
