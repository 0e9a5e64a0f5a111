"""diffusers' modules wrapped as the house speaks of them: denoiser, text conditioning, pictures and
latents.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..diffusion.denoiser import Cond, Network, NetworkDenoiser
from ..diffusion.guidance import w_embedding
from ..diffusion.hidden import show
from ..diffusion.prediction import PredictionType
from ..diffusion.schedule import NoiseSchedule
from .checkpoint import Checkpoint
from .families import CLIP_L, TextEncoder, size_ids
from .prompting import Chunk, chunks_of

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


@dataclass(frozen=True, eq=False)
class UNetNetwork:
    """A UNet2DConditionModel (or a wrapper of one) as a network; w None runs without the guidance input's
    shift. It shows what its last convolution sees.
    """

    unet: torch.nn.Module

    def __post_init__(self) -> None:
        def look(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            show(inputs[0])

        self.unet.get_submodule("conv_out").register_forward_pre_hook(look)

    def __call__(self, z: Tensor, timestep: Tensor, cond: Cond, w: Tensor | None) -> Tensor:
        if len(z) == 0:  # attention is not made for that everywhere
            return z[:, : self.unet.get_parameter("conv_out.weight").shape[0]]
        dtype = next(self.unet.parameters()).dtype
        return self.unet(
            z.to(dtype),
            timestep,
            cond["text"].to(dtype),
            timestep_cond=None if w is None else w_embedding(w).to(dtype),
            added_cond_kwargs=added_conditions(cond, dtype),
            encoder_attention_mask=seen_tokens(cond),
            return_dict=False,
        )[0]


def seen_tokens(cond: Cond) -> Tensor | None:
    """(B, T) bool, where texts are of unequal length.

    ComfyUI repeats the shorter texts instead: attention's answer is the same.
    """
    if "length" not in cond:
        return None
    length = cond["length"]
    return torch.arange(cond["text"].shape[1], device=length.device) < length[:, None]


def added_conditions(cond: Cond, dtype: torch.dtype) -> dict[str, Tensor] | None:
    """What an SDXL UNet is told beside the text; the sizes stay in float32, for their sinusoids."""
    if "pooled" not in cond:
        return None
    return {"text_embeds": cond["pooled"].to(dtype), "time_ids": cond["time_ids"].float()}


def denoiser(
    unet: torch.nn.Module, *, schedule: NoiseSchedule, prediction_type: PredictionType
) -> NetworkDenoiser:
    return NetworkDenoiser(UNetNetwork(unet), schedule, prediction_type)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions by the names that people give them."""

Module = TypeVar("Module", bound=torch.nn.Module)


def place(module: Module, device: torch.device | str, dtype: torch.dtype | None = None) -> Module:
    """The module moved to a device, and cast where a dtype is given."""
    torch.nn.Module.to(module, device=device, dtype=dtype)
    return module


def lazily(load: Callable[[], Network]) -> Network:
    """A network that is loaded when it is first asked."""
    loaded = cache(load)

    def call(z: Tensor, timestep: Tensor, cond: Cond, w: Tensor | None) -> Tensor:
        return loaded()(z, timestep, cond, w)

    return call


class Turns:
    """Large networks that take turns on a device: only the one that was asked last is there."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = device
        self._present: torch.nn.Module | None = None

    def admit(self, module: Module) -> Module:
        module.register_forward_pre_hook(self._come)
        return module

    def _come(self, module: torch.nn.Module, inputs: object) -> None:
        if module is self._present:
            return
        if self._present is not None:
            place(self._present, "cpu")
        self._present = place(module, self._device)


@dataclass(frozen=True, eq=False)
class LoadedEncoder:
    """One text encoder, ready to run; ``clip_skip`` as in Checkpoint, ``vectors`` (n, C) of the textual
    inversions by name.
    """

    of: TextEncoder
    tokenizer: CLIPTokenizer
    model: CLIPTextModel | CLIPTextModelWithProjection
    clip_skip: int = 1
    vectors: Mapping[str, Tensor] = field(default_factory=dict)


def load_encoders(
    checkpoint: Checkpoint, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> list[LoadedEncoder]:
    """All text encoders of a checkpoint with their tokenizers, in the family's order."""
    return [
        LoadedEncoder(
            encoder,
            checkpoint.tokenizer(encoder.part),
            place(checkpoint.text_encoder(dtype, part=encoder.part), device).eval(),
            checkpoint.clip_skip,
            {each.name: each.vectors[encoder.part] for each in checkpoint.embeddings},
        )
        for encoder in checkpoint.of.text_encoders
    ]


@torch.no_grad()
def encode_prompts(prompts: Sequence[str], encoders: Sequence[LoadedEncoder], *, batch: int = 64) -> Cond:
    """ "text" (N, T, C) float32 on the CPU, the encoders' states side by side, T (77 in CLIP) for each chunk
    of a prompt; "pooled" (N, P) where an encoder gives it, of the first chunk. "length" (N,) only where
    prompts have unequally many chunks.
    """
    texts: list[Tensor] = []
    pooled: list[Tensor] = []
    for first in range(0, len(prompts), batch):
        part = list(prompts[first : first + batch])
        sides: list[list[Tensor]] = []
        for encoder in encoders:
            states, ends = _states(part, encoder)
            sides.append(states)
            if ends is not None:
                pooled.append(ends)
        for side_by_side in zip(*sides, strict=True):
            shortest = min(map(len, side_by_side))
            texts.append(torch.cat([states[:shortest] for states in side_by_side], dim=-1))
    found = {"text": pad_sequence(texts, batch_first=True)}
    if len({len(text) for text in texts}) > 1:
        found["length"] = torch.tensor([len(text) for text in texts])
    if pooled:
        found["pooled"] = torch.cat(pooled)
    return found


def _states(prompts: list[str], encoder: LoadedEncoder) -> tuple[list[Tensor], Tensor | None]:
    """Of each prompt its chunks' states in a row (T, C), weighted; and what is pooled of all first chunks.

    A weight moves a token's state along the line from that of the empty prompt, as in ComfyUI. First chunks
    run by themselves, so that other prompts never change a plain one's bits.
    """
    room = encoder.model.config.max_position_embeddings - 2
    chunks = [chunks_of(prompt, encoder.tokenizer, room=room, vectors=encoder.vectors) for prompt in prompts]
    states, pooled = _run([each[0] for each in chunks], encoder)
    rows = list(states)
    later = [chunk for each in chunks for chunk in each[1:]]
    if any(weight != 1 for each in chunks for chunk in each for _, weight in chunk):
        later.append([])
    for first in range(0, len(later), len(prompts)):
        rows += _run(later[first : first + len(prompts)], encoder)[0]
    empty, place = rows[-1], len(prompts)
    texts: list[Tensor] = []
    for number, each in enumerate(chunks):
        own = [rows[number], *rows[place : place + len(each) - 1]]
        place += len(each) - 1
        texts.append(torch.cat([_weigh(*pair, empty) for pair in zip(own, each, strict=True)]))
    return texts, pooled


def _weigh(states: Tensor, chunk: Chunk, empty: Tensor) -> Tensor:
    weights = torch.ones(len(states), 1)
    weights[1 : 1 + len(chunk), 0] = torch.tensor([weight for _, weight in chunk])
    return torch.where(weights == 1, states, (states - empty) * weights + empty)


def _run(chunks: Sequence[Chunk], encoder: LoadedEncoder) -> tuple[Tensor, Tensor | None]:
    """States (N, T, C) and what is pooled (N, P), float32 on the CPU."""
    model = encoder.model
    back = max(encoder.clip_skip, encoder.of.usual_clip_skip) - encoder.of.unused_layers
    with _standing_in(chunks, model):
        answer: Any = model(_tokens(chunks, encoder).to(model.device), output_hidden_states=back > 1)
    state = answer.last_hidden_state if back == 1 else answer.hidden_states[-back]
    if back > 1 and not encoder.of.penultimate:
        names = [name for name, _ in model.named_modules() if name.endswith("final_layer_norm")]
        state = model.get_submodule(names[0])(state)
    return state.float().cpu(), answer.text_embeds.float().cpu() if encoder.of.pooled else None


@contextmanager
def _standing_in(
    chunks: Sequence[Chunk], model: CLIPTextModel | CLIPTextModelWithProjection
) -> Generator[None, None, None]:
    """Textual inversions' vectors in the places of word pieces."""
    vectors = [
        (row, column, token)
        for row, chunk in enumerate(chunks)
        for column, (token, _) in enumerate(chunk, 1)
        if isinstance(token, Tensor)
    ]

    def put(module: torch.nn.Module, inputs: object, words: Tensor) -> Tensor:
        words = words.clone()
        for row, column, vector in vectors:
            words[row, column] = vector.to(words)
        return words

    hook = model.get_input_embeddings().register_forward_hook(put) if vectors else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def encode_texts(
    prompts: Sequence[str], *, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, batch: int = 64
) -> Tensor:
    """(N, T, C) float32: :func:`encode_prompts` with Stable Diffusion 1's one encoder."""
    return encode_prompts(prompts, [LoadedEncoder(CLIP_L, tokenizer, text_encoder)], batch=batch)["text"]


def _tokens(chunks: Sequence[Chunk], encoder: LoadedEncoder) -> Tensor:
    """(N, T) int64, filled up after the end mark as the family does; 0 where a vector stands in.

    Padding here, not in the tokenizer: made its pad token, "!" would be split off the words that it ends.
    """
    tokenizer, length = encoder.tokenizer, encoder.model.config.max_position_embeddings
    pad: Any = encoder.of.pad or tokenizer.pad_token
    filler = tokenizer.convert_tokens_to_ids(pad)
    start, end = tokenizer("").input_ids
    rows = [[0 if isinstance(token, Tensor) else token for token, _ in chunk] for chunk in chunks]
    return torch.tensor([[start, *row, end] + [filler] * (length - 2 - len(row)) for row in rows])


def with_sizes(cond: Cond, *, width: int, height: int) -> Cond:
    """The conditioning of pictures of a size in pixels, as hosts send it: SDXL's is told the size."""
    if "pooled" not in cond:
        return cond
    sizes = torch.tensor(size_ids(width, height), dtype=torch.float32, device=cond["pooled"].device)
    return {**cond, "time_ids": sizes.expand(len(cond["pooled"]), -1)}


def random_cond(checkpoint: Checkpoint, batch: int, *, generator: torch.Generator) -> Cond:
    """A conditioning of random numbers in the shapes that the UNet takes, for the model's own size."""
    config = checkpoint.config("unet")
    length = checkpoint.config("text_encoder")["max_position_embeddings"]
    cond = {"text": torch.randn(batch, length, config["cross_attention_dim"], generator=generator)}
    if checkpoint.of.sizes:
        width = checkpoint.config("text_encoder_2")["projection_dim"]
        cond["pooled"] = torch.randn(batch, width, generator=generator)
    return with_sizes(cond, width=checkpoint.resolution[0], height=checkpoint.resolution[1])


@torch.no_grad()
def encode_images(images: Tensor, vae: AutoencoderKL) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] -> scaled latents x0 (N, C, h, w) float32 on the CPU (the posterior's
    mean).
    """
    parts = [
        vae.encode((part * 2 - 1).to(vae.device, vae.dtype), return_dict=False)[0].mean.float().cpu()
        for part in images.split(_at_once(images.shape[-2] * images.shape[-1]))
    ]
    return torch.cat(parts) * float(vae.config["scaling_factor"])


@torch.no_grad()
def decode_latents(x0: Tensor, vae: AutoencoderKL | AutoencoderTiny) -> Tensor:
    """Scaled latents (N, C, h, w) -> images (N, 3, H, W) float32 in [0, 1] on the CPU."""
    scale = float(vae.config["scaling_factor"])
    decode: Callable[..., Any] = vae.decode
    pixels = x0.shape[-2] * x0.shape[-1] * 4 ** (len(vae.config["block_out_channels"]) - 1)
    parts = [
        decode((part / scale).to(vae.device, vae.dtype), return_dict=False)[0].float().cpu()
        for part in x0.split(_at_once(pixels))
    ]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


def _at_once(pixels: int) -> int:
    """How many pictures a VAE gets at once; its layers take a hundred times the memory of the latent."""
    return max(1, min(16, 512 * 512 // pixels))
