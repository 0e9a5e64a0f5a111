"""On the host's PYTHONPATH: lets torchvision be imported beside a torch that its binary was not built for.

Its import describes two operators that only that binary declares, so where it cannot be loaded they are
declared here.
"""

import importlib.util
from pathlib import Path

import torch

if (found := importlib.util.find_spec("torchvision")) and found.origin:
    try:
        for binary in Path(found.origin).parent.glob("_C.*"):
            torch.ops.load_library(binary)
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
