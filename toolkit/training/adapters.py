"""Student and teacher side by side, in one of two ways: two networks, or two adapters on one.

``TwoNetworks`` trains every weight of a copy. ``OneNetwork`` holds the teacher's weights once, frozen, and a
student as a low-rank update of them (Hu et al. 2021, by peft): the teacher is the network with its adapters
off, an earlier student a second adapter. Low-rank updates carry no bias and so cannot carry the dial: the
guidance input and the layer behind it are trained whole beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from ..diffusion.denoiser import Cond, Network
from .networks import UNetNetwork, place
from .sharding import divide, taking_part

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

State: TypeAlias = Mapping[str, Tensor]

COND_PROJ = "time_embedding.cond_proj.weight"
CHECKPOINT_GRADIENTS_ABOVE = 200_000_000
"""Networks of more parameters recompute activations in the backward pass."""

LINEAR_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("time_emb_proj",),
)
CONV_TARGETS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
WHOLE = ("time_embedding.cond_proj", "time_embedding.linear_1")
"""Trained in full: a host's LoRA file carries ``linear_1`` as a difference, where the baked guidance goes."""

_STUDENT, _PREVIOUS, _CRITIC = "student", "previous", "critic"
CRITIC_RANK = 32
"""Of the critic that is trained beside a student with all its weights."""


@dataclass(frozen=True)
class LoraShape:
    """Which layers are updated, and by how much at most; ``alpha`` is the rank, so that the update is B A."""

    rank: int
    targets: tuple[str, ...] = LINEAR_TARGETS + CONV_TARGETS

    def matches(self, module: str) -> bool:
        return any(module == target or module.endswith("." + target) for target in self.targets)


@dataclass(frozen=True, eq=False)
class Trained:
    """A network that learns, and its parameters by the names that its states have; between its forward and
    its backward pass it must stay ``active``, for layers may be computed anew."""

    network: Network
    parameters: dict[str, Parameter]
    active: Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, eq=False)
class Pair:
    """One phase's networks; ``trained``: the student's parameters by the names that its states have. The
    critic, where a phase wants one, is a LoRA on the teacher.
    """

    student: Network
    teacher: Network
    trained: dict[str, Parameter]
    critic: Trained | None = None


class Holder(Protocol):
    """Where a run's networks live."""

    def untrained(self) -> Network:
        """The student before any training: it answers as the teacher does."""
        ...

    def pair(
        self, previous: State | None, *, teacher: Literal["pair", "previous"], critic: bool = False
    ) -> Pair:
        """A student that starts from ``previous``, or from the teacher, and whom it imitates.

        The pair of an earlier call must not be used any more.
        """
        ...


@dataclass(frozen=True, eq=False)
class TwoNetworks:
    """``dtype``: the teacher's; the student is in float32 and computes in what ``autocast`` says; ``seed``:
    of the critic's first weights; ``divided``: whether processes divide the student among them."""

    new_unet: Callable[[], UNet2DConditionModel]
    device: torch.device
    dtype: torch.dtype
    autocast: Callable[[Network], Network]
    seed: int = 0
    divided: bool = False

    def untrained(self) -> Network:
        return self._network(self.new_unet().eval())

    def _network(self, unet: UNet2DConditionModel) -> Network:
        """The student's, where it computes."""
        if self.divided:
            divide(unet, self.device)
            return taking_part(UNetNetwork(unet))
        return UNetNetwork(place(unet, self.device))

    def pair(
        self, previous: State | None, *, teacher: Literal["pair", "previous"], critic: bool = False
    ) -> Pair:
        student = self.new_unet()
        if previous is not None:
            student.load_state_dict(previous)
        learning = self.autocast(self._network(recomputing(student.train())))
        trained = dict(student.named_parameters())
        if critic:
            watched = OneNetwork(
                self.new_unet,
                LoraShape(CRITIC_RANK),
                seed=self.seed,
                device=self.device,
                dtype=self.dtype,
                autocast=self.autocast,
            ).pair(None, teacher="pair")
            beside = Trained(watched.student, watched.trained, nullcontext)
            return Pair(learning, watched.teacher, trained, beside)
        frozen = self.new_unet()
        if previous is not None and teacher == "previous":
            frozen.load_state_dict(previous)
        frozen = place(frozen, self.device, self.dtype).eval().requires_grad_(False)
        return Pair(learning, UNetNetwork(frozen), trained)


class OneNetwork:
    """The teacher's weights in ``dtype``, and low-rank students on them in float32."""

    def __init__(
        self,
        new_unet: Callable[[], UNet2DConditionModel],
        shape: LoraShape,
        *,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        autocast: Callable[[Network], Network],
    ) -> None:
        from peft import LoraConfig, PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import ModulesToSaveWrapper

        unet = new_unet().requires_grad_(False)
        for name, part in unet.named_children():
            place(part, device, torch.float32 if name == "time_embedding" else dtype)
        self._config = LoraConfig(
            r=shape.rank,
            lora_alpha=shape.rank,
            target_modules=list(shape.targets),
            modules_to_save=list(WHOLE),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._model: Any = PeftModel(unet, self._config, adapter_name=_STUDENT)
        recomputing(unet.train())
        self._layers: list[Any] = []
        self._kinds = (BaseTunerLayer, ModulesToSaveWrapper)
        self._active: str | None = _STUDENT
        self._network = autocast(UNetNetwork(unet))
        self._settle()
        self._first = {
            name: value.detach().to("cpu", copy=True) for name, value in self._parameters(_STUDENT).items()
        }

    def untrained(self) -> Network:
        return self._with(None)

    def pair(
        self, previous: State | None, *, teacher: Literal["pair", "previous"], critic: bool = False
    ) -> Pair:
        self._load(_STUDENT, self._first if previous is None else previous)
        imitated = beside = None
        if teacher == "previous" and previous is not None:
            imitated = _PREVIOUS
            self._add(_PREVIOUS, previous)
        if critic:
            self._add(_CRITIC, self._first)
            beside = Trained(self._with(_CRITIC), self._parameters(_CRITIC), lambda: self._switched(_CRITIC))
        return Pair(self._network, self._with(imitated), self._parameters(_STUDENT), beside)

    def _add(self, adapter: str, state: State) -> None:
        if adapter not in self._model.peft_config:
            self._model.add_adapter(adapter, self._config)
            self._settle()
        self._load(adapter, state)

    def frozen(self) -> Iterator[Parameter]:
        """The teacher's weights."""
        return (p for name, p in self._model.named_parameters() if f".{_STUDENT}." not in name)

    def _settle(self) -> None:
        """After an adapter was added: its weights in float32 where the network is, the student's the active
        one.
        """
        self._layers = [module for module in self._model.modules() if isinstance(module, self._kinds)]
        for name, parameter in self._model.named_parameters():
            if any(f".{adapter}." in name for adapter in (_STUDENT, _PREVIOUS, _CRITIC)):
                parameter.data = parameter.data.float()
        for layer in self._layers:
            layer.set_adapter(_STUDENT)

    def _parameters(self, adapter: str) -> dict[str, Parameter]:
        """An adapter's parameters, as ``MODULE.lora_A.weight`` or as the network itself calls them."""
        prefix = "base_model.model."
        return {
            name.removeprefix(prefix).replace(".modules_to_save", "").replace(f".{adapter}.", "."): parameter
            for name, parameter in self._model.named_parameters()
            if f".{adapter}." in name
        }

    @torch.no_grad()
    def _load(self, adapter: str, state: State) -> None:
        parameters = self._parameters(adapter)
        if parameters.keys() != state.keys():
            raise ValueError("this state is of another rank or of other layers")
        for name, parameter in parameters.items():
            parameter.copy_(state[name])

    def _with(self, adapter: str | None) -> Network:
        """The network with another adapter than the student's, or with none."""

        def call(z: Tensor, timestep: Tensor, cond: Cond, w: Tensor | None) -> Tensor:
            with self._switched(adapter):
                return self._network(z, timestep, cond, w)

        return call

    @contextmanager
    def _switched(self, adapter: str | None) -> Generator[None]:
        before = self._active
        self._activate(adapter)
        try:
            yield
        finally:
            self._activate(before)

    def _activate(self, adapter: str | None) -> None:
        for layer in self._layers:
            if adapter is None or self._active is None:
                layer.enable_adapters(adapter is not None)
            if adapter is not None:
                layer.set_adapter(adapter)
        self._active = adapter


def recomputing(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The network, told to recompute activations in the backward pass if it is a large one."""
    if sum(p.numel() for p in unet.parameters()) > CHECKPOINT_GRADIENTS_ABOVE:
        unet.enable_gradient_checkpointing()
    return unet
