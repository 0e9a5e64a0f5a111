"""FSDP2: what is trained divided among a run's processes (``accelerate launch --use_fsdp --fsdp_version 2``).

Each process keeps its rows of every weight, average, gradient and moment. The weights of a unit come together
while it computes, forward and backward, and its gradients are added up as soon as they are there, so every
evaluation of the student is the work of all processes, in the same order. What is written is whole, as of a
run that divides nothing: any number of processes can go on with it.
"""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..diffusion.denoiser import Cond, Network, NetworkDenoiser
from ..diffusion.errors import BadInput
from .ranks import Ranks, is_divided, launched
from .samples import Samples


def require_dividable(*, precision: str, optimizer: str, memory_format: str, compiled: bool) -> None:
    """BadInput for FSDP of another version, and for settings that a divided student does not go with."""
    _fsdp2()
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise BadInput(f"--fsdp_version {version} (accelerate's default is 1): give --fsdp_version 2")
    found = {
        f"--precision {precision}": precision == "fp16",
        f"--optimizer {optimizer}": optimizer != "adamw",
        f"--memory-format {memory_format}": memory_format != "contiguous",
        "--compile": compiled,
    }
    if wrong := ", ".join(name for name, is_wrong in found.items() if is_wrong):
        raise BadInput(
            f"{wrong}: not with weights that FSDP divides; leave it out (bf16 and fp32 work), launch with "
            "--multi_gpu instead of --use_fsdp, or train a LoRA (--student lora)"
        )


def units(unet: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """What comes together at once: the blocks whose activations are recomputed. All else of a network is its
    root, which is there as long as the network computes."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    return (module for module in unet.modules() if isinstance(module, (BasicTransformerBlock, ResnetBlock2D)))


def divide(unet: torch.nn.Module, device: torch.device) -> None:
    """Leave this process its part of the network's weights, on the device.

    Gradients become the sum of all processes', whose losses are shares of one.
    """
    fsdp, init_device_mesh = _fsdp2()
    gc.collect()  # an earlier student, whose divided modules refer to each other
    mesh = init_device_mesh(device.type, (launched(),))
    for module in (*units(unet), unet):
        # The root too: it would keep whole weights of before the next update.
        fsdp.fully_shard(module, mesh=mesh, reshard_after_forward=True)
        fsdp.FSDPModule.set_gradient_divide_factor(module, 1.0)
        fsdp.FSDPModule.set_force_sum_reduction_for_comms(module, True)


def _fsdp2() -> tuple[Any, Callable[..., Any]]:
    """Of torch; BadInput for one that is too old, or was built without it."""
    try:
        fsdp: Any = import_module("torch.distributed.fsdp")
        _ = fsdp.FSDPModule.set_force_sum_reduction_for_comms
        return fsdp, import_module("torch.distributed.device_mesh").init_device_mesh
    except (ImportError, AttributeError):
        raise BadInput(
            f"torch {torch.__version__} cannot divide weights as this needs it (2.13 can); take a newer one, "
            "or launch with --multi_gpu instead of --use_fsdp"
        ) from None


def own(value: Tensor) -> Tensor:
    """This process's part of it, in the same memory."""
    plain: Any = value.detach()
    return plain.to_local() if is_divided(value) else plain


def cut(value: Any, like: Tensor) -> Any:
    """This process's part of what is whole and of the shape of ``like``, where that is divided."""
    if not is_divided(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    of: Any = like
    # Every process has the whole of it: nothing is sent.
    return distribute_tensor(value.to(of.device), of.device_mesh, of.placements, src_data_rank=None)


def wholes(parts: Mapping[str, Tensor], like: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """All processes' parts put together, one tensor after the other, on the CPU of those that ``keep`` them;
    the parts themselves where nothing is divided.
    """
    found: dict[str, Tensor] = {}
    for name, part in parts.items():
        whole = _whole(part, like[name]) if is_divided(like[name]) else part
        if keep:
            found[name] = whole.cpu() if is_divided(like[name]) else whole
    return found


def _whole(part: Tensor, like: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    of: Any = like
    together = DTensor.from_local(
        part.to(of.device), of.device_mesh, of.placements, run_check=False, shape=of.shape, stride=of.stride()
    )
    return together.full_tensor()


def taking_part(network: Network) -> Network:
    """A divided network that is asked by a process without rows as well: all must take part."""

    def call(z: Tensor, timestep: Tensor, cond: Cond, w: Tensor | None) -> Tensor:
        if len(z):
            return network(z, timestep, cond, w)
        row = {name: value.new_ones((1, *value.shape[1:])) for name, value in cond.items()}
        one = None if w is None else w.new_ones(1)
        return network(z.new_ones((1, *z.shape[1:])), timestep.new_ones(1), row, one)[:0]

    return call


def shown_by_the_first(
    student: NetworkDenoiser,
    show: Callable[[NetworkDenoiser], None],
    *,
    samples: Samples,
    ranks: Ranks,
    device: torch.device,
) -> None:
    """The first process shows a divided student; the others take part in each evaluation of it."""
    if not ranks.writes:
        rows = samples.rows(samples.buckets[0][:1])
        cond = {name: value.to(device) for name, value in samples.cond(rows).items()}
        x = rows["x0"].float().to(device)
        while ranks.any(False):
            student(x, x.new_ones(1), cond=cond)
        return

    def asked(z: Tensor, timestep: Tensor, cond: Cond, w: Tensor | None) -> Tensor:
        ranks.any(True)
        return student.network(z, timestep, cond, w)

    try:
        show(dataclasses.replace(student, network=asked))
    finally:
        ranks.any(False)
