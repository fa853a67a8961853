"""The embedded engine's detector as an ONNX file, which needs neither this package nor PyTorch.

Input ``image``: uint8 [H, W, 3], RGB, of any size; it is normalized and resized inside. Outputs: ``boxes``,
float32 [N, 4], x0, y0, x1, y1 in pixels of that image; ``labels``, int64 [N], the index of the class from 0;
``scores``, float32 [N]; of a model with masks ``masks``, float32 [N, 28, 28], the probability that a point of
the box belongs to the object. They are not pasted into the image: for a hundred objects in a large photograph
that would take gigabytes. docs/commands.md has a paste. The metadata ``names`` is a JSON list of the classes.
"""

import importlib.util
import io
import json
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.files import write_atomically
from rsa_detectron2.transfer.tv.detector import Detector
from rsa_detectron2.transfer.tv.evaluation import detect_one

OUTPUTS = ("boxes", "labels", "scores", "masks")
OPSET = 17  # from 16 on, ONNX has torchvision's RoIAlign


def export_onnx(cfg: CfgNode, model: str | Path, names: list[str], output: str | Path) -> None:
    """Write the model file ``model``, built as ``cfg`` says, and its class ``names`` to ``output``.

    The file is written whole or not at all. It computes in float32, also where training did not. Raises
    InputError where onnx is not installed, or the model does not fit.
    """
    if importlib.util.find_spec("onnx") is None:
        raise InputError("onnx is not installed: pip install onnx onnxruntime")  # the extra of setup.py
    import onnx

    cfg = cfg.clone()
    cfg.MODEL.DEVICE, cfg.SOLVER.AMP.ENABLED = "cpu", False
    detector, buffer = Exported(Detector(cfg, model).model), io.BytesIO()
    outputs = OUTPUTS if cfg.MODEL.MASK_ON else OUTPUTS[:3]
    example = torch.randint(256, (150, 200, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), warnings.catch_warnings():
        # Of tracing and of this exporter, which is deprecated. The new one cannot follow these models: their
        # sizes depend on the data.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            detector,
            (example,),
            buffer,
            dynamo=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=list(outputs),
            dynamic_axes={"image": {0: "height", 1: "width"}, **{name: {0: "objects"} for name in outputs}},
        )
    content = onnx.load_model_from_string(buffer.getvalue())
    onnx.helper.set_model_props(content, {"names": json.dumps(names)})
    onnx.checker.check_model(content)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, lambda file: file.write(content.SerializeToString()))


class Exported(nn.Module):
    """A detector with the input and the outputs of the file."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        # A tensor of one dimension, because the exporter takes numbers for float32.
        sides = [model.transform.min_size[0], model.transform.max_size]
        self.register_buffer("sides", torch.tensor(sides, dtype=torch.float64))
        model.transform.resize = self.resize

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        found = detect_one(self.model, image.permute(2, 0, 1).float() / 255)
        outputs = found["boxes"], found["labels"] - 1, found["scores"]
        return (*outputs, found["masks"][:, 0]) if "masks" in found else outputs

    def resize(self, image: Tensor, target: None) -> tuple[Tensor, None]:
        """torchvision's resize, in double precision as in training: when traced, its own is in single
        precision, and rounds some sides to another pixel."""
        shape = torch._shape_as_tensor(image)[1:].double()
        scale = (self.sides / torch.stack([shape.min(), shape.max()])).min()
        height, width = torch.floor(shape * scale).long()
        return F.interpolate(image[None], (height, width), mode="bilinear", align_corners=False)[0], target
