"""An exported folder in an unmodified StableDiffusionPipeline gives our picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from make_checkpoint import make_spec, make_student, make_tokenizer

from toolkit.diffusion.grid import trailing_timesteps
from toolkit.evaluation.painter import Painter
from toolkit.training.checkpoint import Checkpoint, open_checkpoint
from toolkit.training.export import export_diffusers

PROMPT, SEED, GUIDANCE = "a cat", 5, 4.0


def exported(folder: Path, *, steps: int, prediction_type: str) -> tuple[Checkpoint, Any]:
    """A random student of a trailing grid, and stock diffusers' pipeline of its export."""
    from diffusers import StableDiffusionPipeline

    spec = make_spec(timesteps=trailing_timesteps(steps), prediction_type=prediction_type)
    path = make_student(folder / "student.safetensors", spec=spec, seed=steps)
    student = open_checkpoint(path, tokenizer=make_tokenizer(folder / "words"))
    export_diffusers(student, folder / "exported")
    pipeline = StableDiffusionPipeline.from_pretrained(str(folder / "exported"), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return student, pipeline


def theirs(pipeline: Any, *, steps: int, guidance: float) -> torch.Tensor:
    picture = pipeline(
        PROMPT,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(SEED),
        output_type="pt",
    )
    return picture.images


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 7])
def test_the_stock_pipeline_paints_our_picture(tmp_path: Path, steps: int, prediction_type: str) -> None:
    student, pipeline = exported(tmp_path, steps=steps, prediction_type=prediction_type)
    ours = Painter.open(student).paint([PROMPT], seeds=[SEED], guidance=GUIDANCE)
    picture = theirs(pipeline, steps=steps, guidance=GUIDANCE)
    assert picture.shape == ours.shape == (1, 3, 32, 32)
    assert float((picture - ours).abs().max()) <= 2 / 255
    assert float(ours.std()) > 0.05
    if steps == 4:
        other = theirs(pipeline, steps=steps, guidance=1.0)
        assert float((other - ours).abs().max()) > 4 / 255, "guidance_scale is the dial"
