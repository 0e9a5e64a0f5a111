"""Paths in what is shared, as people's machines have them."""

import pytest

from toolkit.runtime.privacy import file_name, without_paths


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("teacher /home/bob/models/m.safetensors, fp16", "teacher m.safetensors, fp16"),
        ("/home/bob smith/My Models/m.safetensors", "m.safetensors"),
        (r"C:\Users\Bob Smith\m.safetensors: 3 of 4", "m.safetensors: 3 of 4"),
        (r"D:/models/bob/m.safetensors", "m.safetensors"),
        (r"\\server\bob\m.safetensors", "m.safetensors"),
        (r"..\..\Users\bob\m.safetensors", "m.safetensors"),
        ("../bob/m.safetensors and ~bob/x/n.png", "n.png"),
        ("~/bob/m.safetensors", "m.safetensors"),
        ("(/home/bob/m.safetensors)", "(m.safetensors)"),
        ("file:///home/bob/m.safetensors", "m.safetensors"),
        ("data from /home/bob", "data from ~"),
        ("data from /Users/bob/, 3 pictures", "data from ~, 3 pictures"),
        ("a photo / a drawing, 3/4, and/or, 16 x 9", "a photo / a drawing, 3/4, and/or, 16 x 9"),
        ("https://example.org/bob/licence.txt", "https://example.org/bob/licence.txt"),
        ("CreativeML Open RAIL-M", "CreativeML Open RAIL-M"),
    ],
)
def test_running_text_keeps_the_last_names_of_paths(text: str, bare: str) -> None:
    assert without_paths(text) == bare


@pytest.mark.parametrize(
    ("word", "bare"),
    [
        ("/home/bob/My Models/a b.safetensors", "a b.safetensors"),
        ("/home/bob /a.safetensors", "a.safetensors"),
        ("--out=C:\\Users\\bob\\runs\\x", "--out=x"),
        ("bob/style.safetensors:0.8", "style.safetensors:0.8"),
        (r"C:\loras\style.safetensors:0.4-1.2", "style.safetensors:0.4-1.2"),
        ("bob/pics/", "pics"),
        ("/home/bob", "~"),
        ("C:\\Users\\Bob\\", "~"),
        ("a fox / a dog", "a fox / a dog"),
        ("--steps", "--steps"),
    ],
)
def test_a_word_of_a_command_keeps_the_last_name(word: str, bare: str) -> None:
    assert file_name(word) == bare
