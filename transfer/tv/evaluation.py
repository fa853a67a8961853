"""Detections, AP and validation losses of a model of the embedded engine."""

import json
from pathlib import Path

import torch
from fvcore.common.config import CfgNode
from torch import nn
from torchvision.models.detection import transform
from tqdm import tqdm

from rsa_detectron2.common.signals import StopSignals
from rsa_detectron2.transfer.data.average_precision import coco_ap
from rsa_detectron2.transfer.data.coco import CocoInstances
from rsa_detectron2.transfer.precise_bn import norm_layers
from rsa_detectron2.transfer.report.run_folder import AGAIN_WITH_RESUME
from rsa_detectron2.transfer.tv.paste import paste_rles

# torchvision's name of a loss: Detectron2's.
LOSSES = {
    "loss_classifier": "loss_cls",
    "loss_box_reg": "loss_box_reg",
    "loss_mask": "loss_mask",
    "loss_objectness": "loss_rpn_cls",
    "loss_rpn_box_reg": "loss_rpn_loc",
}
BOX_FIELDS = ("boxes", "scores", "labels")
NO_SIGNALS = StopSignals(AGAIN_WITH_RESUME)  # of which none arrives


def evaluate(cfg: CfgNode, model: nn.Module, val_set: CocoInstances, stop: StopSignals = NO_SIGNALS) -> dict:
    """AP of the model's detections, which are written to OUTPUT_DIR/inference."""
    folder = Path(cfg.OUTPUT_DIR, "inference")
    detections = detect(cfg, model, val_set, stop)
    (folder / "coco_instances_results.json").write_text(json.dumps(detections))
    val_set.dataset.save(folder / "annotations.json")  # it has the ids that the detections refer to
    return coco_ap(val_set.dataset, detections, ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",))


@torch.no_grad()
def validation_losses(
    model: nn.Module, dataset: CocoInstances, stop: StopSignals = NO_SIGNALS
) -> dict[str, float]:
    """The mean losses of the images of ``dataset``, one by one, under Detectron2's names.

    BatchNorm normalizes by its running statistics, as in :func:`detect`, which has set the images' size.
    """
    model.train()
    for layer in norm_layers(model):
        layer.eval()
    device, rows = next(model.parameters()).device, []
    indices = tqdm(range(len(dataset.ids)), "validation loss", dynamic_ncols=True, disable=None)
    for index in stop.watch(indices):
        torch.manual_seed(index)  # of the samples among the proposals
        image, target = dataset[index, False]
        target = {key: value.to(device) for key, value in target.items()}
        losses = model([image.to(device).float() / 255], [target])
        rows.append(torch.stack([sum(losses.values()), *losses.values()]))
    names = "total_loss", *map(LOSSES.get, losses)
    return dict(zip(names, torch.stack(rows).mean(0).tolist()))


@torch.no_grad()
def detect(
    cfg: CfgNode, model: nn.Module, dataset: CocoInstances, stop: StopSignals = NO_SIGNALS
) -> list[dict]:
    """Detections in COCO's format, with the annotation file's own category ids.

    bbox is [x, y, w, h] in pixels; a model with masks adds segmentation as compressed RLE.
    """
    test_mode(cfg, model)
    device = next(model.parameters()).device
    detections = []
    for image_id in stop.watch(tqdm(dataset.ids, "evaluating", dynamic_ncols=True, disable=None)):
        image = dataset.image(image_id).to(device).float() / 255
        instances = detect_one(model, image)
        for detection in detections_of(instances, image.shape[1:]):
            category_id = dataset.categories[detection["category_id"]]
            detections.append({"image_id": image_id, **detection, "category_id": category_id})
    return detections


def test_mode(cfg: CfgNode, model: nn.Module) -> None:
    """Let ``model`` detect, in images of the size for tests."""
    model.eval()
    model.transform.min_size, model.transform.max_size = (cfg.INPUT.MIN_SIZE_TEST,), cfg.INPUT.MAX_SIZE_TEST


def detect_one(model: nn.Module, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Boxes in pixels of the image, scores, labels and 28 x 28 masks of float32 [3, H, W], on the CPU.

    It takes the steps of model.forward one by one, because forward itself pastes a hundred masks at once:
    gigabytes for a large photograph.
    """
    images, _ = model.transform([image])
    features = model.backbone(images.tensors)
    proposals, _ = model.rpn(images, features)
    (instances,), _ = model.roi_heads(features, proposals, images.image_sizes)
    size = images.image_sizes[0]
    instances["boxes"] = transform.resize_boxes(instances["boxes"], size, image.shape[1:])
    return {key: values.cpu() for key, values in instances.items()}


def detections_of(instances: dict[str, torch.Tensor], size: tuple[int, int]) -> list[dict]:
    """What :func:`detect_one` found in an image of ``size`` (H, W), in COCO's format.

    category_id is the index of the class, from 0; segmentation, where there are masks, is compressed RLE.
    """
    detections = [
        {"category_id": label - 1, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}
        for (x0, y0, x1, y1), score, label in zip(*(instances[key].tolist() for key in BOX_FIELDS))
    ]
    if "masks" in instances:
        for detection, code in zip(detections, paste_rles(instances["masks"], instances["boxes"], size)):
            detection["segmentation"] = code
    return detections
