"""The demo's drawings, judge, tokenizer and stored files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from toolkit.demo import INPAINT_TEACHER, JUDGE, TEACHER, TOKENIZER
from toolkit.demo.drawings import ATTRIBUTES, SPOKEN, altered, captions, draw, labels, prompts, render, scenes
from toolkit.demo.vocabulary import caption_words, merges, write_tokenizer

MEGABYTE = 1_000_000
SAID_WITH_SEED_1 = [
    "a large cyan star on a faded background",
    "a large red star on a faded background",
]
MEANS_WITH_SEED_1 = [0.5461, 0.5058]


def test_drawings_depend_on_the_seed_alone() -> None:
    images, said = draw(40, seed=5, caption_noise=0.2)
    again, said_again = draw(40, seed=5, caption_noise=0.2)
    other, _ = draw(40, seed=6)
    assert images.shape == (40, 3, 32, 32) and images.dtype == torch.float32
    assert float(images.min()) >= 0 and float(images.max()) <= 1
    assert torch.equal(images, again) and said == said_again
    assert not torch.equal(images, other)


def test_a_seed_draws_the_same_pictures_as_ever() -> None:
    """The stored judge and teacher were trained on these drawings."""
    images, said = draw(2, seed=1)
    assert said == SAID_WITH_SEED_1
    assert images.mean((1, 2, 3)).tolist() == pytest.approx(MEANS_WITH_SEED_1, abs=2e-4)


def test_one_caption_has_many_pictures() -> None:
    what = scenes(1, seed=3)
    one, other = render(what, seed=1), render(what, seed=2)
    assert float((one - other).abs().mean()) > 0.005


def test_correct_captions_name_every_spoken_attribute_of_their_scene() -> None:
    what = scenes(50, seed=4)
    for row, caption in enumerate(captions(what, seed=0)):
        assert labels(caption) == {name: int(what.labels[name][row]) for name in SPOKEN}
    assert prompts(3, seed=9) == prompts(3, seed=9) != prompts(3, seed=10)


def test_caption_noise_is_the_share_of_wrong_words() -> None:
    what = scenes(4000, seed=8)
    heard = [labels(caption) for caption in captions(what, seed=1, noise=0.1)]
    wrong = sum(row["colour"] != int(index) for row, index in zip(heard, what.labels["colour"], strict=True))
    assert wrong / 4000 == pytest.approx(0.1, abs=0.02)


def test_the_judge_is_right_on_fresh_drawings() -> None:
    from toolkit.demo.judge import load_judge

    judge = load_judge()
    images, said = draw(500, seed=123_456)
    assert float(judge.adherence(images, said).float().mean()) >= 0.97
    assert judge.features(images[:3]).shape == (3, 64)
    wrong = [caption.replace("large", "small") if "large" in caption else caption for caption in said]
    judged_wrong = judge.adherence(images, wrong)
    assert not any(
        bool(verdict) for verdict, caption in zip(judged_wrong, said, strict=True) if "large" in caption
    )


def test_the_judge_minds_only_what_a_caption_names() -> None:
    from toolkit.demo.judge import load_judge

    images, said = draw(60, seed=77)
    colours = [next(word for word in caption.split() if word in ATTRIBUTES["colour"]) for caption in said]
    assert float(load_judge().adherence(images, colours).float().mean()) >= 0.97


def test_every_caption_word_is_one_token_and_any_text_tokenises() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(TOKENIZER)
    for word in caption_words():
        assert len(tokenizer(word)["input_ids"]) == 3, word
    for caption in prompts(20, seed=2):
        ids = tokenizer(caption)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == caption
    strange = tokenizer("Ein Élan, 漢字 & 3 dogs")["input_ids"]
    assert tokenizer.eos_token_id not in strange[1:-1]


def test_the_stored_tokenizer_is_the_one_that_the_code_makes(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (TOKENIZER / name).read_bytes()


def test_merges_make_each_word_whole() -> None:
    assert merges(["ab", "abc"])[-1] in {("ab", "c</w>"), ("a", "b</w>"), ("a", "bc</w>")}


def test_the_demo_files_are_small() -> None:
    tokenizer = sum(path.stat().st_size for path in TOKENIZER.iterdir())
    assert JUDGE.stat().st_size < 2 * MEGABYTE
    teachers = [TEACHER.stat().st_size, INPAINT_TEACHER.stat().st_size]
    assert max(teachers) < 8 * MEGABYTE
    assert JUDGE.stat().st_size + sum(teachers) + tokenizer < 20 * MEGABYTE


def test_the_paths_need_the_standard_library_only() -> None:
    code = "import sys, toolkit.demo as d; assert d.JUDGE.name and not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-S", "-c", code], check=True, timeout=60)


def test_the_teacher_obeys_its_caption_when_guided() -> None:
    """Sixteen pictures, eight steps: the stored file through the code path of any checkpoint."""
    from toolkit.demo.judge import load_judge
    from toolkit.evaluation.painter import Painter
    from toolkit.opening import open_for_people

    texts = prompts(16, seed=2024)
    pictures = Painter.open(open_for_people(TEACHER)).paint(texts, seeds=range(16), guidance=4.0, steps=8)
    assert pictures.shape == (16, 3, 32, 32)
    assert float(load_judge().adherence(pictures, texts).float().mean()) >= 0.85


def test_the_inpainting_teacher_fills_in_what_its_caption_says_and_shares_the_rest_with_the_teacher() -> None:
    from toolkit.demo.drawings import drawings_to_fill
    from toolkit.demo.judge import load_judge
    from toolkit.evaluation.painter import Fill, Painter
    from toolkit.opening import open_for_people
    from toolkit.runtime.files import load_tensors

    texts = prompts(16, seed=2024)
    fill = Fill(*drawings_to_fill(texts, seed=2024))
    painter = Painter.open(open_for_people(INPAINT_TEACHER))
    pictures = painter.paint(texts, seeds=range(16), guidance=4.0, steps=8, fill=fill)
    assert float(load_judge().adherence(pictures, texts).float().mean()) >= 0.8
    outside = (fill.masks == 0).expand_as(pictures)
    assert torch.equal(pictures[outside], fill.images[outside])
    plain, nine = load_tensors(TEACHER), load_tensors(INPAINT_TEACHER)
    shared = [key for key in plain if not key.startswith("model.")]
    assert shared and all(torch.equal(plain[key], nine[key]) for key in shared)


def test_altered_captions_differ_in_the_one_word_that_is_named() -> None:
    before = prompts(300, seed=4)
    after, names = altered(before, seed=2)
    for old, new, name in zip(before, after, names, strict=True):
        was, now = labels(old), labels(new)
        assert was.keys() == now.keys() and [n for n in was if was[n] != now[n]] == [name]
    assert set(names) == set(SPOKEN) and altered(before, seed=2) == (after, names)
