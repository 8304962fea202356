"""mosaicml-streaming, imported: ``from bench.mosaic import streaming``.

It imports torchvision, which fails to load where it was built for another torch. Then the operators it looks for are
declared here; nothing that is measured uses them.
"""

from __future__ import annotations

import sys

import torch

try:
    import torchvision  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
except RuntimeError:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    _DECLARED = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        _DECLARED.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import streaming

__all__ = ["streaming"]
