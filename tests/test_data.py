"""Pictures and captions as people keep them: folders, lists, tar shards; their sizes, damage, the cache."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from toolkit.diffusion.denoiser import NetworkDenoiser
from toolkit.diffusion.errors import BadInput
from toolkit.diffusion.schedule import NoiseSchedule
from toolkit.training.data import Scan, entries, scan
from toolkit.training.families import SD1, SDXL
from toolkit.training.image_samples import ImageSampleRequest, make_image_samples
from toolkit.training.images import decoded, load_picture, seen_size, told_ids
from toolkit.training.prompts import built_in_prompts, style_of
from toolkit.training.samples import GuidanceRange, Order, Samples, draw_batch
from toolkit.training.sizes import bucket_sizes, nearest_size, usual_sizes
from toolkit.training.teacher_samples import TeacherSampleRequest, make_teacher_samples


def png(width: int = 8, height: int = 8, colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def write_shard(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def captions(source: Path) -> dict[str, str | None]:
    return {entry.name: entry.caption for entry in entries(source)}


def test_captions_stand_beside_a_picture_or_in_metadata_jsonl(tmp_path):
    rows = [{"file_name": "b.png", "text": "from  the\nlist"}, {"file_name": "./a.png", "text": "too"}]
    lines = "\n".join(map(json.dumps, [*rows, {"file_name": "deep/c.JPG", "text": "below"}]))
    names = ("a.png", "b.png", "sub/a.png", "sub/b.png", "sub/deep/c.JPG", ".hidden/d.png")
    texts = {"a.txt": "\ufeffbeside it", "sub/metadata.jsonl": lines + "\n\n", "notes.md": "x"}
    write(tmp_path, {**dict.fromkeys(names, png()), **texts})
    assert captions(tmp_path) == {
        "a.png": "beside it",
        "b.png": None,
        "sub/a.png": "too",
        "sub/b.png": "from the list",
        "sub/deep/c.JPG": "below",
    }


def test_a_caption_beside_the_picture_goes_before_the_list_and_absent_pictures_are_said(tmp_path, caplog):
    rows = [{"file_name": "a.png", "text": "list"}, {"file_name": "gone.png", "text": "x"}]
    lines = "\n".join(map(json.dumps, rows))
    write(tmp_path, {"a.png": png(), "a.txt": "beside", "metadata.jsonl": lines})
    assert captions(tmp_path) == {"a.png": "beside"}
    assert "1 pictures of metadata.jsonl are not there, gone.png first" in caplog.text


@pytest.mark.parametrize("line", ['{"text": "no name"}', "file_name,text", '["a.png"]'])
def test_a_line_that_names_no_picture_is_an_error_with_its_number(tmp_path, line):
    write(tmp_path, {"a.png": png(), "metadata.jsonl": '{"file_name": "a.png", "text": "x"}\n' + line})
    with pytest.raises(BadInput, match=r"metadata.jsonl: line 2 is not"):
        scan(tmp_path)


SHARD = {
    "0001.jpg": png(8, 4), "0001.txt": b"first", "0001.json": b"{}",
    "sub/0002.PNG": png(4, 8), "sub/0002.txt": b"second",
    "0003.seg.png": png(), "0003.txt": b"no picture", "__meta__": b"",
}  # fmt: skip


def test_tar_shards_are_read_in_a_folder_and_alone(tmp_path):
    write(tmp_path, {"z.png": png(), "z.txt": "z"})
    shard = write_shard(tmp_path / "00000.tar", SHARD)
    inside = {"00000.tar/0001.jpg": "first", "00000.tar/sub/0002.png": "second"}
    assert captions(tmp_path) == {**inside, "z.png": "z"} and captions(shard) == inside
    found = scan(shard)
    assert [picture.size for picture in found.pictures] == [(8, 4), (4, 8)]
    assert found.pictures[0].sha256 == hashlib.sha256(SHARD["0001.jpg"]).hexdigest()


def test_of_a_torn_shard_what_stands_before_the_damage_is_used_and_the_next_one_too(tmp_path, caplog):
    whole = write_shard(tmp_path / "a.tar", SHARD)
    whole.write_bytes(whole.read_bytes()[:3000])
    write_shard(tmp_path / "b.tar", SHARD)
    (tmp_path / "c.tar").write_bytes(b"no tar")
    assert [picture.name for picture in scan(tmp_path).pictures] == [
        "a.tar/0001.jpg",
        "b.tar/0001.jpg",
        "b.tar/sub/0002.png",
    ]
    assert "a.tar: damaged (" in caplog.text and "c.tar: damaged (" in caplog.text


def test_without_the_library_shards_are_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    monkeypatch.setitem(sys.modules, "webdataset.tariterators", None)
    write_shard(tmp_path / "a.tar", SHARD)
    with pytest.raises(BadInput, match=r"a.tar: tar shards are read with the package webdataset; install it"):
        scan(tmp_path)


def test_data_without_a_usable_picture_is_an_error_that_says_why(tmp_path):
    with pytest.raises(BadInput, match=r"no picture that can be used \(0 are damaged, 0 have no caption\)"):
        scan(tmp_path)
    write(tmp_path, {"a.png": "no picture", "a.txt": "a", "b.png": png(), "c.png": png(), "c.txt": " \n"})
    with pytest.raises(BadInput, match=r"no picture that can be used \(1 are damaged, 2 have no caption\)"):
        scan(tmp_path)


def ramp(width: int, height: int) -> Image.Image:
    """Red grows from left to right, green from top to bottom."""
    red = Image.linear_gradient("L").rotate(90).resize((width, height))
    green = Image.linear_gradient("L").resize((width, height))
    return Image.merge("RGB", (red, green, Image.new("L", (width, height))))


@pytest.mark.parametrize(
    ("size", "across", "down"),
    [((256, 128), (0, 1), (0, 1)), ((32, 16), (0, 1), (0, 1)), ((128, 128), (0, 1), (0.25, 0.75)),
     ((256, 64), (0.25, 0.75), (0, 1))],
)  # fmt: skip
def test_a_picture_is_scaled_to_cover_and_cropped_at_the_centre(tmp_path, size, across, down):
    ramp(*size).save(tmp_path / "a.png")
    picture = load_picture(tmp_path / "a.png", 64, 32)
    assert picture.shape == (3, 32, 64)
    red, green = picture[0].mean(0), picture[1].mean(1)
    torch.testing.assert_close(red, torch.linspace(*across, 64), atol=0.03, rtol=0)
    torch.testing.assert_close(green, torch.linspace(*down, 32), atol=0.03, rtol=0)
    own = (32 * size[0] // size[1], 32) if across != (0, 1) else (64, 64 * size[1] // size[0])
    assert told_ids(size, (64, 32)) == (size[1], size[0], (own[1] - 32) // 2, (own[0] - 64) // 2, 32, 64)


def test_a_turned_photograph_stands_upright_and_transparency_is_white():
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    ramp(64, 32).save(file, "PNG", exif=exif)
    upright = decoded(file.getvalue(), "a.png")
    assert upright.size == seen_size(file.getvalue(), "a.png") == (32, 64)
    assert upright.getpixel((31, 0))[0] < 20 < 230 < upright.getpixel((31, 63))[0]
    for image in (Image.new("RGBA", (4, 4), (9, 9, 9, 0)), Image.new("LA", (4, 4), (9, 0))):
        image.save(file := io.BytesIO(), "PNG")
        assert decoded(file.getvalue(), "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_sizes_are_multiples_of_64_of_about_the_asked_area():
    sizes = bucket_sizes(1024)
    assert len(sizes) == 17 and {(1024, 1024), (832, 1216), (1216, 832), (512, 2048)} <= set(sizes)
    assert all(w % 64 == h % 64 == 0 and 0.9 * 1024**2 < w * h <= 1024**2 for w, h in sizes)
    assert bucket_sizes(32) == ((32, 32),) and (128, 256) in bucket_sizes(200, cell=128)
    assert nearest_size((3000, 2000), sizes) == (1216, 832) and nearest_size((99, 100), sizes) == (1024, 1024)
    assert usual_sizes(SDXL, 1024) == ((1024, 1024), (832, 1216), (1216, 832))
    assert usual_sizes(SD1, 768) == ((768, 768), (768, 1152), (1152, 768))
    assert usual_sizes(SD1, 32) == ((32, 32),)


def encode_images(images: Tensor) -> Tensor:
    """Stands in for a VAE that halves both sides."""
    return torch.nn.functional.avg_pool2d(images, 2)


def encode(texts: list[str]) -> dict[str, Tensor]:
    return {"text": torch.tensor([[[float(len(text))]] for text in texts])}


def image_request(source: Path, **changes: Any) -> ImageSampleRequest:
    made = ImageSampleRequest(
        teacher="t", scan=scan(source), negative="", sizes=((32, 32), (16, 64), (64, 16)), channels=3,
        downscale=2,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def make(request: ImageSampleRequest, source: Path, folder: Path, **changes: Any) -> Samples:
    values = dict(source=source, encode_images=encode_images, encode=encode, progress=lambda count: count)
    return make_image_samples(request, folder, **{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Eleven pictures of three shapes in two kinds of places, one of them torn and one no picture at all."""
    source = tmp_path / "pictures"
    source.mkdir()
    shard: dict[str, bytes] = {}
    for number in range(10):
        image = ramp(*[(64, 64), (20, 100), (300, 70)][number % 3])
        image.save(file := io.BytesIO(), "PNG")
        data = file.getvalue()[:-100] if number == 4 else file.getvalue()
        if number < 5:
            write(source, {f"{number}.png": data, f"{number}.txt": "x" * (number + 1)})
        else:
            shard |= {f"{number}.png": data, f"{number}.txt": b"x" * (number + 1)}
    write_shard(source / "shard.tar", shard)
    return write(source, {"bad.png": "bad", "bad.txt": "bad"})


@pytest.mark.parametrize("shard", [1, 128])
def test_pictures_get_the_nearest_size_and_damaged_ones_are_counted(
    pictures, tmp_path, caplog, monkeypatch, shard
):
    monkeypatch.setattr("toolkit.training.image_samples.SHARD", shard)
    request = image_request(pictures, told=True)
    assert request.summary() == "pictures: 4 of 32x32, 3 of 16x64, 3 of 64x16"
    assert request.bytes == 2 * 3 * (4 * 256 + 6 * 256)
    samples = make(request, pictures, tmp_path / "cache")
    assert "bad.png" in caplog.text and "4.png: not a picture that can be read" in caplog.text
    assert request.outcome(samples) == "9 pictures; 2 damaged ones were skipped"
    assert sorted(len(bucket) for bucket in samples.buckets) == [2, 3, 4]
    for bucket in samples.buckets:
        rows = samples.rows(bucket)
        for x0, ids, text in zip(rows["x0"], rows["time_ids"], samples.cond(rows)["text"], strict=True):
            number = int(text) - 1
            own = [(64, 64), (20, 100), (300, 70)][number % 3]
            assert ids.tolist() == list(told_ids(own, (2 * x0.shape[2], 2 * x0.shape[1])))
            expected = load_picture_of(number, pictures, 2 * x0.shape[2], 2 * x0.shape[1])
            torch.testing.assert_close(x0, encode_images(expected[None])[0].half())


def load_picture_of(number: int, pictures: Path, width: int, height: int) -> Tensor:
    entry = next(entry for entry in entries(pictures) if entry.name.endswith(f"{number}.png"))
    path = pictures.parent / "one.png"
    path.write_bytes(entry.data())
    return load_picture(path, width, height)


def test_when_every_picture_is_damaged_the_run_stops(tmp_path):
    source = write(tmp_path / "pictures", {"a.png": png(64, 64)[:-40], "a.txt": "a"})
    with pytest.raises(BadInput, match="all of its 1 pictures are damaged"):
        make(image_request(source), source, tmp_path / "cache")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*")}


@pytest.mark.parametrize("changes", [{}, {"flip": True, "masks": 2}], ids=["plain", "flip-masks"])
def test_making_that_was_killed_anywhere_goes_on_to_the_same_bytes(pictures, tmp_path, changes, monkeypatch):
    monkeypatch.setattr("toolkit.training.image_samples.SHARD", 2)
    request = image_request(pictures, told=True, **changes)
    make(request, pictures, tmp_path / "whole")
    whole, calls = content(tmp_path / "whole"), 0
    assert len(whole) == 1 + len(request.shards) and len(request.shards) > 4

    def dying(images: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls in (3, 11):
            raise KeyboardInterrupt
        return encode_images(images)

    for _ in range(3):
        with contextlib.suppress(KeyboardInterrupt):
            make(request, pictures, tmp_path / "killed", encode_images=dying)
    assert calls > 11 and content(tmp_path / "killed") == whole
    make(request, pictures, tmp_path / "killed", encode_images=None)


def test_a_mirror_image_is_a_sample_of_its_own_beside_each_picture(pictures, tmp_path):
    plain = make(image_request(pictures), pictures, tmp_path / "a")
    samples = make(image_request(pictures, flip=True), pictures, tmp_path / "b")
    assert len(samples) == 2 * len(plain)
    for bucket in samples.buckets:
        x0, text = (samples.rows(bucket)[name] for name in ("x0", "text"))
        assert torch.equal(x0[::2].flip(-1), x0[1::2]) and torch.equal(text[::2], text[1::2])
    masked = make(image_request(pictures, flip=True, masks=3), pictures, tmp_path / "c")
    assert len(masked) == 6 * len(plain)
    rows = masked.rows(masked.buckets[0][:6])
    assert torch.equal(rows["x0"][0], rows["x0"][1]) and torch.equal(rows["x0"][0], rows["x0"][2])
    assert torch.equal(rows["x0"][0].flip(-1), rows["x0"][5])
    assert len({mask.numpy().tobytes() for mask in rows["inpaint"][:, 0]}) > 3


TEACHER = TeacherSampleRequest(
    teacher="t", prompts=("a", "bb"), negative="", guidance=(1, 4), sizes=((8, 8), (4, 12)), channels=4,
    downscale=2, count=5, seed=1, precision="fp32", steps=2,
)  # fmt: skip
OTHERS: dict[str, Any] = dict(
    teacher="u", prompts=("a", "c"), negative="x", guidance=(1, 5), sizes=((8, 8), (12, 4)), channels=5,
    downscale=4, count=6, seed=2, precision="bf16", steps=3, told=True, masked=True, masks=1, flip=True,
    version=0, timesteps=(999, 3), cfg_rescale=0.7,
)  # fmt: skip


def test_the_caches_name_depends_on_all_that_changes_samples(pictures):
    requests: list[Any] = [TEACHER, image_request(pictures)]
    for request in list(requests):
        names = {field.name for field in dataclasses.fields(request)} - {"scan"}
        requests += [dataclasses.replace(request, **{name: OTHERS[name]}) for name in names]
    before = requests[1].scan
    for change in ({"caption": "y"}, {"sha256": "0"}, {"name": "other.png"}, {"size": (1, 1)}):
        first = dataclasses.replace(before.pictures[0], **change)
        requests.append(image_request(pictures, scan=Scan((first, *before.pictures[1:]), before.damaged)))
    folders = [request.folder(Path()) for request in requests]
    assert len(set(folders)) == len(folders) > 20
    assert image_request(pictures).folder(Path()) == folders[1]


def test_the_teachers_own_pictures_come_in_every_size_and_it_is_told_which(tmp_path):
    told: set[tuple[int, ...]] = set()

    def network(z: Tensor, timestep: Tensor, cond: dict[str, Tensor], w: Tensor | None) -> Tensor:
        told.update((*z.shape[2:], *map(int, row)) for row in cond["time_ids"].tolist())
        return 0.1 * z

    schedule = NoiseSchedule.scaled_linear()
    request = dataclasses.replace(TEACHER, told=True, count=11)
    assert request.summary() == "pictures: the teacher's own, 6 of 8x8, 5 of 4x12"
    samples = make_teacher_samples(
        request, tmp_path, teacher=NetworkDenoiser(network, schedule, "epsilon"), encode=encode,
        schedule=schedule, device=torch.device("cpu"), batch=4, progress=lambda shards: shards,
    )  # fmt: skip
    assert [len(bucket) for bucket in samples.buckets] == [6, 5] and len(samples.shards) == 2
    assert told == {(4, 4, 8, 8, 0, 0, 8, 8), (6, 2, 12, 4, 0, 0, 12, 4)}
    rows = samples.rows(samples.buckets[1])
    assert rows["states"].shape == (5, 2, 4, 6, 2)
    assert rows["time_ids"].tolist() == [[12, 4, 0, 0, 12, 4]] * 5
    assert request.bytes == sum(shard[name].nbytes for shard in samples.shards for name in ("x0", "states"))
    texts = [samples.rows(bucket)["text"].tolist() for bucket in samples.buckets]
    assert texts == [[1, 2, 1, 2, 1, 2], [1, 2, 1, 2, 1]]


def test_every_micro_batch_is_of_one_bucket_and_every_bucket_is_gone_through_again_and_again():
    buckets = [torch.arange(0, 30), torch.arange(30, 37), torch.arange(37, 40)]
    order = Order(buckets, batch=5, micro_batch=2, updates=600, seed=3)
    parts = [part for update in range(600) for part in order(update)]
    assert [len(part) for part in parts[:3]] == [2, 2, 1]
    seen: list[list[int]] = [[], [], []]
    for part in parts:
        (bucket,) = {next(i for i, b in enumerate(buckets) if int(n) in b.tolist()) for n in part}
        seen[bucket] += part.tolist()
    for bucket, numbers in zip(buckets, seen, strict=True):
        assert len(numbers) == pytest.approx(3000 * len(bucket) / 40, rel=0.15)
        for start in range(0, len(numbers) - len(bucket), len(bucket)):
            assert sorted(numbers[start : start + len(bucket)]) == bucket.tolist()
    again = Order(buckets, batch=5, micro_batch=2, updates=600, seed=3)
    assert torch.equal(torch.cat(again(417)), torch.cat(order(417)))
    one, other = (Order(buckets[:1], batch=5, micro_batch=2, updates=1, seed=seed) for seed in (3, 4))
    assert not torch.equal(torch.cat(one(0)), torch.cat(other(0)))


def test_a_share_of_the_batch_loses_its_caption_and_with_it_its_trajectory():
    count = 400
    shard = {
        "x0": torch.zeros(count, 1, 2, 2), "text": 1 + torch.arange(count) % 2, "guidance": torch.ones(count),
        "states": torch.zeros(count, 1, 1, 2, 2), "time_ids": torch.arange(count)[:, None].expand(-1, 6),
    }  # fmt: skip
    samples = Samples([shard], {"text": torch.arange(3.0), "pooled": torch.arange(3.0)}, (999,))

    def draw(share: float):
        return draw_batch(
            samples, torch.arange(count), guidance=GuidanceRange(2, 4), trajectory_share=1.0,
            caption_dropout=share, generator=torch.Generator().manual_seed(0), device=torch.device("cpu"),
        )  # fmt: skip

    batch, kept = draw(0.25), draw(0.0)
    gone = batch.cond["text"] == 0
    assert 70 < int(gone.sum()) < 130 and torch.equal(batch.cond["pooled"] == 0, gone)
    assert torch.equal(batch.on_trajectory, ~gone) and bool(((batch.w == 0) == ~gone).all())
    assert torch.equal(batch.cond["time_ids"], kept.cond["time_ids"]) and bool((kept.cond["text"] > 0).all())


def test_built_in_prompts_come_in_the_checkpoints_style():
    anime = ("NoobAI-XL-v1.1", "waiIllustriousSDXL_v150", "ponyDiffusionV6XL", "anything-v5", "waiANI")
    others = ("v1-5-pruned", "juggernautXL", "kawaiiPhoto", "sd_xl_base_1.0")
    assert [style_of(name) for name in anime + others] == ["tags"] * 5 + ["sentences"] * 4
    tags, sentences = (built_in_prompts(200, seed=0, style=style) for style in ("tags", "sentences"))
    assert len(set(tags)) > 190 and tags == built_in_prompts(200, seed=0, style="tags")
    assert all(tag.count(", ") >= 2 for tag in tags) and not any(s.count(", ") for s in sentences)
    assert any("no humans" in tag for tag in tags) and not any("1girl" in s for s in sentences)


def test_missing_captions_are_said_once_with_their_number(tmp_path, caplog):
    write(tmp_path, {"a.png": png(), "a.txt": "a", "b.png": png(), "c.png": png()})
    with caplog.at_level(logging.WARNING):
        assert len(scan(tmp_path).pictures) == 1
    assert caplog.messages == ["2 pictures without a caption are left out, b.png first"]
