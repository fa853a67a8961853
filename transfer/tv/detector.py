"""A trained model of the embedded engine, on one image at a time."""

from pathlib import Path

import numpy as np
import torch
from fvcore.common.config import CfgNode

from rsa_detectron2.transfer.convert.writers import load_model
from rsa_detectron2.transfer.tv.engine import build_on_device
from rsa_detectron2.transfer.tv.evaluation import detect_one, detections_of, test_mode


class Detector:
    """The model ``path``, built as ``cfg`` says. Raises InputError where it does not fit."""

    def __init__(self, cfg: CfgNode, path: str | Path):
        self.model = build_on_device(cfg)
        self.model.load_state_dict(load_model(path, self.model.state_dict())[0])
        self.device = next(self.model.parameters()).device
        test_mode(cfg, self.model)

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> list[dict]:
        """The detections in an image, uint8 [H, W, 3] RGB, in COCO's format; category_id is the index of the
        class, from 0."""
        pixels = torch.from_numpy(image).permute(2, 0, 1).to(self.device).float() / 255
        return detections_of(detect_one(self.model, pixels), image.shape[:2])
