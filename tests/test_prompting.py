"""Prompts as hosts read them: weights, chunks, textual inversions, CLIP layers, rescaled guidance.

Against ComfyUI's own encoder: tests/hosts/test_comfyui_prompts.py.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from closed_form import GaussianTeacher
from make_checkpoint import TINY, make_spec, make_teacher, make_tokenizer
from safetensors.torch import save_file
from torch import Tensor

from toolkit.diffusion.denoiser import Cond, Guided, NetworkDenoiser, concat_cond
from toolkit.diffusion.errors import BadInput
from toolkit.diffusion.schedule import NoiseSchedule
from toolkit.diffusion.spec import AppliedEmbedding, StudentSpec
from toolkit.training.checkpoint import Checkpoint, open_checkpoint
from toolkit.training.embeddings import content_of_prompts, with_prompting
from toolkit.training.networks import UNetNetwork, encode_prompts, load_encoders, with_sizes
from toolkit.training.prompting import chunks_of, weighted
from toolkit.training.samples import taken
from toolkit.training.teacher_samples import TeacherSampleRequest

ROOM = 22
LONG = "one prompt that is longer than one chunk"
