"""Weight files: reproducible bytes, atomic writing, and one sentence for everything that cannot be read."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from toolkit.diffusion.errors import BadInput
from toolkit.diffusion.spec import SPEC_KEY, StudentSpec
from toolkit.runtime.files import (
    SAVED_SPEC,
    atomic_path,
    load_tensors,
    modelspec,
    read_header,
    read_metadata,
    read_spec,
    save_tensors,
    sha256_of,
    spec_tensor,
)

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a.half": torch.tensor([1.5, -2.0], dtype=torch.float16),
    "a.brain": torch.tensor([[1.5]], dtype=torch.bfloat16),
    "count": torch.tensor(7),
    "v_pred": torch.zeros(0),
    "columns": torch.arange(6.0).reshape(2, 3).T,
}
METADATA = {f"key{i}": f"ü{i}" for i in range(9)}
SPEC = StudentSpec(
    family="sd1",
    prediction_type="epsilon",
    method="progressive",
    timesteps=(999, 499),
    teacher_sha256="0" * 64,
    teacher_name="random",
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model (1) ü.safetensors"
    save_tensors(TENSORS, METADATA, path)
    return path


def without_folders(text: str) -> str:
    """The sentence without the test's own folder, whose name has words of the test's name."""
    return re.sub(r"\S*pytest-\S*/", "", text)


def sentence(call: object, *arguments: object) -> str:
    with pytest.raises(BadInput) as caught:
        call(*arguments)  # type: ignore[operator]
    assert "\n" not in str(caught.value)
    return without_folders(str(caught.value))


def test_what_is_written_is_read_back_exactly_by_us_and_by_safetensors(file: Path) -> None:
    assert read_metadata(file) == METADATA
    theirs = safetensors.torch.load_file(file)
    for ours in (load_tensors(file), theirs):
        assert set(ours) == set(TENSORS)
        for key, value in TENSORS.items():
            assert ours[key].dtype == value.dtype and torch.equal(ours[key], value)


def test_header_gives_shapes_and_dtypes_without_reading_weights(file: Path) -> None:
    found = read_header(file).tensors
    assert {key: (value.shape, value.dtype) for key, value in found.items()} == {
        key: (value.shape, value.dtype) for key, value in TENSORS.items()
    }
    assert all(value.is_meta for value in found.values())


def test_tensors_are_chosen_by_prefix_or_by_key(file: Path) -> None:
    assert set(load_tensors(file, prefix="a.")) == {"a.half", "a.brain"}
    assert set(load_tensors(file, keys=["count"])) == {"count"}
    assert "absent" in sentence(lambda: load_tensors(file, keys=["absent"]))


def test_the_same_content_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    script = (
        "import sys, torch; from pathlib import Path; from toolkit.runtime.files import save_tensors\n"
        "names = sys.argv[2].split(','); tensors = {n: torch.full((3,), float(len(n))) for n in names}\n"
        "save_tensors(tensors, {n: n for n in names}, Path(sys.argv[1]))"
    )
    digests = set[str]()
    for number, names in enumerate(["a,bb,ccc,dddd,eeeee", "eeeee,dddd,ccc,bb,a"]):
        path = tmp_path / f"{number}.safetensors"
        environment = os.environ | {"PYTHONHASHSEED": str(number)}
        root = Path(__file__).parents[1]
        subprocess.run([sys.executable, "-c", script, path, names], check=True, cwd=root, env=environment)
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_every_tensor_is_aligned_to_its_element(file: Path) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    for key, value in TENSORS.items():
        assert header[key]["data_offsets"][0] % value.element_size() == 0


def test_the_date_comes_from_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"title": "t", "architecture": "a", "prediction_type": "v_prediction", "resolution": (512, 768)}
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    assert "modelspec.date" not in modelspec(**fields)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    found = modelspec(**fields)
    assert found["modelspec.date"] == "1970-01-02T00:00:00Z"
    assert found["modelspec.prediction_type"] == "v" and found["modelspec.resolution"] == "512x768"


def test_a_spec_survives_the_file_and_its_absence_is_none(tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    save_tensors({"x": torch.zeros(1)}, {SPEC_KEY: SPEC.to_json()}, path)
    assert read_spec(path) == SPEC
    save_tensors({"x": torch.zeros(1)}, {}, path)
    assert read_spec(path) is None
    save_tensors({"x": torch.zeros(1)}, {SPEC_KEY: '{"format": 99}'}, path)
    text = sentence(read_spec, path)
    assert "student.safetensors" in text and "99" in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"a shopping list\nmilk\n", "text file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\x01\x02", "safetensors"),
        (b"\xff" * 64, "safetensors"),
        (b"\x10\0\0\0\0\0\0\0{'not': 'json'} ", "header"),
        (b"\x10\0\0\0\0\0\0\0[1, 2, 3, 4, 5 ]", "header"),
        (b"\x1a\0\0\0\0\0\0\0" + b'{"a":{"shape":[1]}}'.ljust(26), "header"),
    ],
)
def test_what_is_no_safetensors_file_is_one_sentence(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    text = sentence(load_tensors, path)
    assert "model.safetensors" in text and said in text


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_a_truncated_file_is_said_to_be(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    assert "truncated" in sentence(load_tensors, file) or keep == 4


def test_missing_files_and_folders_are_one_sentence(tmp_path: Path) -> None:
    assert "no such file" in sentence(load_tensors, tmp_path / "absent.safetensors")
    assert "folder" in sentence(load_tensors, tmp_path)


def test_a_full_disk_leaves_nothing_behind_and_the_old_file_whole(tmp_path: Path) -> None:
    """The process's own limit on file size stands for the disk."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "model.safetensors"
    save_tensors({"old": torch.zeros(1)}, {}, path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        text = sentence(save_tensors, {"new": torch.zeros(10_000)}, {}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert "disk is full" in text
    assert os.listdir(tmp_path) == ["model.safetensors"] and path.read_bytes() == before


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_path(tmp_path / "big", size=10**18):
            raise AssertionError("must not be reached")

    assert "disk is full" in sentence(write)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    assert "written" in sentence(save_tensors, TENSORS, {}, tmp_path / "file" / "model.safetensors")

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    assert "Permission denied" in sentence(save_tensors, TENSORS, {}, tmp_path / "model.safetensors")
    assert os.listdir(tmp_path) == ["file"]


def test_an_error_within_the_block_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyError), atomic_path(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "file").write_text("half")
        raise KeyError
    assert os.listdir(tmp_path) == []


def test_an_atomic_folder_replaces_the_old_one(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with atomic_path(tmp_path / "folder") as partial:
            partial.mkdir()
            (partial / text).write_text(text)
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(tmp_path / "folder") == ["new"]


def test_hash_of_a_file_is_of_the_whole_and_of_a_folder_of_its_unet_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "b.safetensors").write_bytes(b"b")
    (tmp_path / "unet" / "a.json").write_bytes(b"a")
    assert sha256_of(tmp_path / "unet" / "b.safetensors") == hashlib.sha256(b"b").hexdigest()
    assert sha256_of(tmp_path) == hashlib.sha256(b"ab").hexdigest()


def test_a_spec_that_a_host_saved_among_the_weights_is_read(tmp_path):
    path = tmp_path / "saved by a host.safetensors"
    save_tensors({"x": torch.zeros(1), SAVED_SPEC: spec_tensor(SPEC)}, {}, path)
    assert read_spec(path) == SPEC
    save_tensors({"x": torch.zeros(1), SAVED_SPEC: spec_tensor(SPEC).half()}, {}, path)
    assert read_spec(path) == SPEC
