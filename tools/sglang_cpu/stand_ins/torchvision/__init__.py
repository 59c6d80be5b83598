"""Loads the real torchvision without its compiled operators, whose library does not match a CPU build of torch.

`import torchvision` declares fake versions of `nms` and `qnms`, which fails where no library declared them first.
"""

from pathlib import Path

import torch

_operators = torch.library.Library("torchvision", "DEF")
_operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

_real = Path(__file__).parents[1] / "torchvision_without_operators" / "torchvision"
__path__ = [str(_real)]
__file__ = str(_real / "__init__.py")
exec(compile(Path(__file__).read_text(), __file__, "exec"))
