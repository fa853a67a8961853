"""A trained model of Detectron2, on one image at a time."""

from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import build_augmentation, convert_PIL_to_numpy
from detectron2.data.transforms import AugInput, AugmentationList
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from PIL import Image

from rsa_detectron2.transfer.convert.writers import load_model
from rsa_detectron2.transfer.d2.engine import choose_device
from rsa_detectron2.transfer.d2.model import build_model


class Detector:
    """The model ``path``, built as ``cfg`` says, which is changed to run here. Raises InputError where it
    does not fit."""

    def __init__(self, cfg: CfgNode, path: str | Path):
        choose_device(cfg, 1)
        self.model = build_model(cfg).eval()
        state = load_model(path, self.model.state_dict())[0]
        self.model.load_state_dict(state, strict=False)  # a frozen layer has no num_batches_tracked there
        self.format, self.resize = cfg.INPUT.FORMAT, AugmentationList(build_augmentation(cfg, False))

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> list[dict]:
        """The detections in an image, uint8 [H, W, 3] RGB, in COCO's format; category_id is the index of the
        class, from 0."""
        resized = AugInput(convert_PIL_to_numpy(Image.fromarray(image), self.format))
        self.resize(resized)
        pixels = torch.from_numpy(np.ascontiguousarray(resized.image.transpose(2, 0, 1)))
        height, width = image.shape[:2]
        (output,) = self.model([{"image": pixels, "height": height, "width": width}])
        return instances_to_coco_json(output["instances"].to("cpu"), 0)
