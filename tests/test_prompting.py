"""Prompts as hosts read them: weights, chunks, textual inversions, CLIP layers, rescaled guidance.

Against ComfyUI's own encoder: tests/hosts/test_comfyui_prompts.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from make_checkpoint import TINY, make_spec, make_teacher, make_tokenizer
from safetensors.torch import save_file
from torch import Tensor

from toolkit.diffusion.denoiser import Cond, Guided, concat_cond
from toolkit.diffusion.errors import BadInput
from toolkit.diffusion.spec import AppliedEmbedding, StudentSpec
from toolkit.runtime.sentences import trained_with
from toolkit.training.checkpoint import Checkpoint, open_checkpoint
from toolkit.training.earlier import _problem
from toolkit.training.embeddings import content_of_prompts, with_prompting
from toolkit.training.export import _sampling_notes
from toolkit.training.networks import UNetNetwork, encode_prompts, load_encoders, with_sizes
from toolkit.training.prompting import chunks_of, weighted
from toolkit.training.prompts import built_in_prompts, with_long_ones
from toolkit.training.samples import kept_texts, taken
from toolkit.training.teacher_samples import TeacherSampleRequest

ROOM = 22
PLAIN = ["a red fox", "a hat (", "smile :)"]
LONG = "one prompt that is longer than one chunk"
LONGEST = LONG + " and yet another one of those"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random teacher of each family with the tokens of bytes, 22 of which make a chunk."""
    folder = tmp_path_factory.mktemp("prompting")
    make_tokenizer(folder / "tokenizer")
    for family, shape in TINY.items():
        make_teacher(folder / f"{family}.safetensors", shape=shape)
    generator = torch.Generator().manual_seed(1)
    small, large = (torch.randn(2, width, generator=generator) for width in (64, 128))
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": small}}, folder / "a1111.pt")
    save_file({"emb_params": small}, folder / "flat.safetensors")
    save_file({"clip_g": large, "clip_l": small}, folder / "both.safetensors")
    save_file({"emb_params": torch.zeros(2, 768)}, folder / "wide.safetensors")
    return folder


def opened(folder: Path, family: str = "sd1", *files: str, **choices: Any) -> Checkpoint:
    checkpoint = open_checkpoint(folder / f"{family}.safetensors")
    return with_prompting(checkpoint, embeddings=[folder / file for file in files], **choices)


def texts(checkpoint: Checkpoint, *prompts: str) -> Cond:
    return encode_prompts(prompts, load_encoders(checkpoint))


def said(call: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    with pytest.raises(BadInput) as caught:
        call(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Letters:
    """A tokenizer with a token for every letter."""

    def __call__(self, text: str, *, verbose: bool) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[0, *(ord(letter) for letter in text if not letter.isspace()), 1])


# -- Reading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("", []),
        ("a fox", [("a fox", 1.0)]),
        ("a (red) fox", [("a ", 1.0), ("red", 1.1), (" fox", 1.0)]),
        ("(red:1.3)", [("red", 1.3)]),
        ("((red))", [("red", 1.1 * 1.1)]),
        ("(a (red:1.5) fox:0.5)", [("a ", 0.5), ("red", 1.5), (" fox", 0.5)]),
        ("((a) b:2)", [("a", 2 * 1.1), (" b", 2.0)]),
        (r"a \(red\) (fox\):1.2)", [("a (red) ", 1.0), ("fox)", 1.2)]),
        ("(ratio 3:4:0.9)", [("ratio 3:4", 0.9)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(:1.2)", [(":1.2", 1.1)]),
        ("smile :) (b)", [("smile :) (b)", 1.0)]),
        ("a (b", [("a ", 1.0), ("(b", 1.0)]),
    ],
)
def test_a_prompt_is_read_as_comfyui_reads_it(prompt: str, parts: list[tuple[str, float]]) -> None:
    assert weighted(prompt) == parts


def test_a_weight_must_be_finite() -> None:
    assert "(fox:inf)" in said(weighted, "a (fox:inf)")


def lengths(prompt: str) -> list[int]:
    return [len(chunk) for chunk in chunks_of(prompt, Letters(), room=10, vectors={})]


def test_long_parts_are_cut_and_short_ones_begin_a_new_chunk() -> None:
    assert lengths("") == [0]
    assert lengths("abcdefghij") == [10] and lengths("abcdefghijk") == [10, 1]
    assert lengths("abcdef(ghijklm)") == [6, 7], "seven tokens stay together"
    assert lengths("abcdef(ghijklmn)") == [10, 4], "eight are cut"


def test_a_textual_inversion_is_found_by_either_name() -> None:
    vectors = {"Bad-Hand": torch.ones(3, 2)}

    def kinds(prompt: str) -> str:
        (chunk,) = chunks_of(prompt, Letters(), room=40, vectors=vectors)
        return "".join("*" if isinstance(token, Tensor) else chr(token) for token, _ in chunk)

    assert kinds("embedding:Bad-Hand, a fox") == "***,afox"
    assert kinds("fox embedding:bad-hand.pt\nb") == "fox***b"
    assert kinds("a bad-hand.") == "a***."
    assert kinds("a bad-hands") == "abad-hands"
    (chunk,) = chunks_of("(embedding:Bad-Hand:1.4)", Letters(), room=40, vectors=vectors)
    assert [weight for _, weight in chunk] == [1.4] * 3
    text = said(chunks_of, "a embedding:other", Letters(), room=40, vectors=vectors)
    assert "other" in text and "Bad-Hand" in text and "--embedding" in text


# -- Encoding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TINY)
def test_plain_prompts_keep_every_bit_whatever_stands_beside_them(folder: Path, family: str) -> None:
    checkpoint = opened(folder, family)
    of, answers = checkpoint.of, []
    for encoder in of.text_encoders:  # as they were encoded before there were weights and chunks
        tokenizer, model = checkpoint.tokenizer(encoder.part), checkpoint.text_encoder(part=encoder.part)
        filler = tokenizer.convert_tokens_to_ids(encoder.pad or tokenizer.pad_token)
        rows = tokenizer(PLAIN, truncation=True, max_length=24).input_ids
        tokens = torch.tensor([row + [filler] * (24 - len(row)) for row in rows])
        with torch.no_grad():
            answer = model(tokens, output_hidden_states=encoder.penultimate)
        answers.append(answer.hidden_states[-2] if encoder.penultimate else answer.last_hidden_state)
    found = texts(checkpoint, *PLAIN)
    assert set(found) == ({"text", "pooled"} if of.sizes else {"text"})
    # "a hat (" is read in two parts, as ComfyUI does, and gives the same tokens.
    assert torch.equal(found["text"], torch.cat(answers, dim=-1))
    assert content_of_prompts(checkpoint, ["a red fox", ""]) == {}
    mixed = texts(checkpoint, PLAIN[0], PLAIN[1], LONG)
    assert torch.equal(mixed["text"][0, :24], texts(checkpoint, PLAIN[0], PLAIN[1], PLAIN[2])["text"][0])


def test_a_weight_moves_a_token_from_the_empty_prompt(folder: Path) -> None:
    found = texts(opened(folder), "a (red:1.5) fox", "a red fox", "")["text"]
    weights = torch.tensor([1.0, 1, 1.5, 1.5, 1.5, *[1.0] * 19])[:, None]
    torch.testing.assert_close(found[0], found[2] + weights * (found[1] - found[2]), rtol=1e-5, atol=1e-6)
    assert float((found[0] - found[1]).abs().max()) > 0.1


def test_chunks_stand_side_by_side_and_are_kept_as_long_as_they_are(folder: Path, tmp_path: Path) -> None:
    checkpoint = opened(folder)
    found = texts(checkpoint, "a", LONG, LONGEST)
    assert found["length"].tolist() == [24, 48, 72] and found["text"].shape[1] == 72
    parts = chunks_of(LONG, checkpoint.tokenizer(), room=ROOM, vectors={})
    assert [len(part) for part in parts] == [ROOM, len(LONG.replace(" ", "")) - ROOM]
    kept, rows = kept_texts(tmp_path, [LONG, "a"], "", lambda prompts: texts(checkpoint, *prompts))
    assert taken(kept, rows[1:])["text"].shape == (1, 24, 64) and "length" not in taken(kept, rows[1:])
    pair = taken(kept, rows)
    assert pair["length"].tolist() == [48, 24]
    torch.testing.assert_close(pair["text"][0], found["text"][1, :48], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_network_sees_texts_of_unequal_length_as_in_comfyui(folder: Path, family: str) -> None:
    checkpoint = opened(folder, family)
    found = texts(checkpoint, "a", LONG, LONGEST)
    network = UNetNetwork(checkpoint.unet())
    z = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.full((3,), 400)

    with torch.no_grad():
        together = network(z, t, with_sizes(found, width=32, height=32), None)
    for row, length in enumerate((24, 48, 72)):
        own = {name: value[[row]] for name, value in found.items() if name != "length"}
        repeated = {**own, "text": own["text"][:, :length].repeat(1, 144 // length, 1)}  # as ComfyUI does
        with torch.no_grad():
            alone = network(z[[row]], t[[row]], with_sizes(repeated, width=32, height=32), None)
        torch.testing.assert_close(together[[row]], alone, rtol=1e-4, atol=1e-5)
    unmasked = {name: value for name, value in found.items() if name != "length"}
    with torch.no_grad():
        wrong = network(z, t, with_sizes(unmasked, width=32, height=32), None)
    assert float((wrong - together)[0].abs().max()) > 1e-3, "padding that is seen changes the answer"


def test_guidance_joins_texts_of_unequal_length() -> None:
    short, long = {"text": torch.ones(1, 2, 3)}, {"text": torch.ones(2, 4, 3)}
    both = concat_cond([long, short])
    assert both["length"].tolist() == [4, 4, 2] and both["text"].shape == (3, 4, 3)
    assert set(concat_cond([short, short])) == {"text"}
    seen: list[Cond] = []

    class Network:
        def velocity(self, x: Tensor, sigma: Tensor, *, cond: Cond, w: Tensor | None = None) -> Tensor:
            seen.append(cond)
            return x

    mixed = {**long, "length": torch.tensor([2, 4])}
    Guided(Network(), short).velocity(torch.ones(2, 1, 1, 1), torch.ones(2), cond=mixed, w=torch.ones(2))  # type: ignore[arg-type]
    assert seen[0]["length"].tolist() == [2, 4, 2, 2]


def test_clip_skip_reads_an_earlier_layer_normalised_where_the_family_is(folder: Path) -> None:
    for family, back, normalised in (("sd1", 2, True), ("sd2", 2, True), ("sdxl", 3, False)):
        skip = {"sd1": 2, "sd2": 3, "sdxl": 3}[family]
        checkpoint = opened(folder, family, clip_skip=skip)
        found = texts(checkpoint, "a red fox")["text"]
        sides: list[Tensor] = []
        for encoder in load_encoders(opened(folder, family)):
            row = encoder.tokenizer("a red fox").input_ids
            filler = encoder.tokenizer.convert_tokens_to_ids(encoder.of.pad or encoder.tokenizer.pad_token)
            with torch.no_grad():
                answer = encoder.model(
                    torch.tensor([row + [filler] * (24 - len(row))]), output_hidden_states=True
                )
                state = answer.hidden_states[-back]
                if normalised:
                    norm = [m for n, m in encoder.model.named_modules() if n.endswith("final_layer_norm")]
                    state = norm[0](state)
            sides.append(state)
        torch.testing.assert_close(found, torch.cat(sides, dim=-1), rtol=1e-5, atol=1e-6)
        usual = texts(opened(folder, family), "a red fox")["text"]
        assert float((found - usual).abs().max()) > 0.1
        assert content_of_prompts(checkpoint, ["a"]) == {"clip_skip": skip}
    as_usual = opened(folder, "sdxl", clip_skip=2)
    assert torch.equal(texts(as_usual, "a")["text"], texts(opened(folder, "sdxl"), "a")["text"])
    assert content_of_prompts(as_usual, ["a"]) == {}
    assert "2 layers" in said(opened, folder, "sd1", clip_skip=3)
    assert "expected 1" in said(opened, folder, "sd1", clip_skip=0)


# -- Textual inversions ----------------------------------------------------------------------------------


def test_vectors_stand_in_the_words_places_in_every_kind_of_file(folder: Path) -> None:
    answers = [
        texts(opened(folder, "sd1", f"{name}{suffix}"), f"a embedding:{name} hat", f"a {name} hat", "a hat")
        for name, suffix in (("a1111", ".pt"), ("flat", ".safetensors"))
    ]
    for found in answers:
        same = torch.testing.assert_close
        same(found["text"][0], answers[0]["text"][0], msg="the same vectors")
        same(found["text"][0], found["text"][1], msg="the same by its bare name")
        same(found["text"][0, :2], found["text"][2, :2], msg="what stands before is as before")
        assert float((found["text"][0, 2] - found["text"][2, 2]).abs().max()) > 0.1
    both = opened(folder, "sdxl", "both.safetensors")
    found = texts(both, "a embedding:both", "a ", "a embedding:both b")
    assert found["pooled"].shape == (3, 48)
    assert float((found["pooled"][0] - found["pooled"][1]).abs().max()) > 1e-2, "the end mark moved on"
    for side in (slice(0, 64), slice(64, None)):
        assert float((found["text"][0, 2, side] - found["text"][1, 2, side]).abs().max()) > 0.1
    plain, named = content_of_prompts(both, ["a"]), content_of_prompts(both, ["a both"])
    assert plain == {} and named["embeddings"][0][0] == "both"


def test_what_is_no_textual_inversion_of_this_model_is_one_sentence(folder: Path) -> None:
    text = said(opened, folder, "sd1", "wide.safetensors")
    assert "768" in text and "64" in text
    assert "64 and 128" in said(opened, folder, "sdxl", "flat.safetensors")
    assert "no such file" in said(opened, folder, "sd1", "absent.pt")
    (folder / "evil.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert "refused" in said(opened, folder, "sd1", "evil.pt")
    (folder / "notes.txt").write_text("none")
    assert ".safetensors" in said(opened, folder, "sd1", "notes.txt")
    assert "flat" in said(opened, folder, "sd1", "flat.safetensors", "flat.safetensors")


def test_a_share_of_the_built_in_prompts_gets_two_or_three_chunks() -> None:
    prompts = built_in_prompts(200, seed=0)
    assert with_long_ones(prompts, 0.0, tokens=len, room=150, seed=1) == prompts
    made = with_long_ones(prompts, 0.3, tokens=len, room=150, seed=1)
    counts = [-(-len(prompt) // 150) for prompt in made]
    assert {2, 3} == {count for count, old, new in zip(counts, prompts, made, strict=True) if new != old}
    assert 40 <= sum(count > 1 for count in counts) <= 80
    assert all(new.startswith(old) for new, old in zip(made, prompts, strict=True))


def test_what_an_unusual_layer_takes_is_said_where_a_student_goes() -> None:
    skipping, usual = make_spec(clip_skip=2), make_spec(family="sdxl", clip_skip=2)
    assert (skipping.unusual_clip_skip, usual.unusual_clip_skip) == (2, None)
    assert trained_with(skipping) == ["clip skip 2"] and trained_with(usual) == []
    assert "clip skip 2" in _sampling_notes(skipping)[-1] and len(_sampling_notes(usual)) == 1


def test_a_student_is_trained_on_only_with_its_own_prompting(folder: Path) -> None:
    teacher = opened(folder, "sd1", "flat.safetensors", clip_skip=2, cfg_rescale=0.5)
    inversions = tuple(each.applied for each in teacher.embeddings)
    own = {"teacher_sha256": teacher.sha256, "clip_skip": 2, "cfg_rescale": 0.5, "embeddings": inversions}
    assert _problem(make_spec(**own), teacher) is None
    for name, value, word in (
        ("clip_skip", 1, "--clip-skip 1"),
        ("cfg_rescale", 0.0, "--cfg-rescale 0,"),
        ("embeddings", (), "--embedding"),
    ):
        assert word in str(_problem(make_spec(**own | {name: value}), teacher))


# -- Guidance and the spec -------------------------------------------------------------------------------


class Halves:
    """Answers with the texts of the conditioning."""

    def velocity(self, x: Tensor, sigma: Tensor, *, cond: Cond, w: Tensor | None = None) -> Tensor:
        return cond["text"].reshape(x.shape)


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescaled_guidance_is_lins_formula_in_v(phi: float) -> None:
    generator = torch.Generator().manual_seed(0)
    c, u = torch.randn(2, 3, 16, 1, generator=generator)
    x, w = torch.zeros(3, 1, 4, 4), torch.tensor([0.0, 3.0, 7.0])
    guided = Guided(Halves(), {"text": u}, phi)  # type: ignore[arg-type]
    found = guided.velocity(x, torch.ones(3), cond={"text": c}, w=w)
    for row in range(3):
        plain = u[row] + (w[row] + 1) * (c[row] - u[row])
        expected = phi * plain * (c[row].std() / plain.std()) + (1 - phi) * plain
        torch.testing.assert_close(found[row].reshape(16, 1), expected, rtol=1e-5, atol=1e-6)
    if phi == 1.0:
        assert found[2].std() == pytest.approx(float(c[2].std()), rel=1e-5)


def test_the_spec_says_how_the_teacher_was_used_and_old_ones_keep_their_bytes() -> None:
    plain = make_spec(timesteps=(999, 499), teacher_name="t").to_json()
    assert hashlib.sha256(plain.encode()).hexdigest()[:16] == "4f18cf1ca84bdd42"
    spec = make_spec(clip_skip=2, cfg_rescale=0.7, embeddings=(AppliedEmbedding("bad-hand", "0" * 64),))
    assert StudentSpec.from_json(spec.to_json()) == spec
    assert StudentSpec.from_json(plain).embeddings == ()


def test_caches_made_before_are_found_unless_the_guidance_is_rescaled() -> None:
    values: dict[str, Any] = dict(
        teacher="t", prompts=("a red fox",), negative="", guidance=(1.0, 8.0), sizes=((64, 64),), channels=4,
        downscale=8, count=2, seed=0, precision="fp32", steps=16,
    )  # fmt: skip
    assert TeacherSampleRequest(**values).folder(Path("c")).name == "teacher-3536cdcdc06aaea0"
    assert (
        TeacherSampleRequest(**values, cfg_rescale=0.7).folder(Path("c")).name != "teacher-3536cdcdc06aaea0"
    )


def test_a_rescale_out_of_range_is_one_sentence(folder: Path) -> None:
    assert "0 (off) to 1" in said(opened, folder, "sd1", cfg_rescale=1.5)
