"""Mask R-CNN R50-FPN from torchvision's parts: fine-tuning on one device, where Detectron2 is not installed.

The same YAML gives the same layers, initialisation, schedule, files and metric; what cannot be honoured is refused.
Tables 5 and 6 are Detectron2's all the same, because torchvision differs in the small print: box losses are smooth
L1 with beta 1/9 (Detectron2: L1); RoIAlign has no half-pixel shift; anchors are rounded to whole pixels; mask targets
are cut from the resized bitmap, not from polygons; images are resized without antialiasing; SyncBN is BatchNorm.

Randomness is derived, never stored: images, flips, sides and samples of iteration i are a pure function of (SEED, i).
So a resumed run equals an uninterrupted one: on a CPU bit for bit, on a GPU up to the order of its atomic sums.
Iterations count from 0, as in Detectron2: the checkpoint after 5000 of them is model_0004999.pth.
"""

import functools
import json
import logging
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from fvcore.nn.precise_bn import update_bn_stats
from fvcore.nn.weight_init import c2_xavier_fill
from pycocotools import mask as rle
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader
from torchvision.models import resnet50
from torchvision.models.detection import anchor_utils, backbone_utils, faster_rcnn, mask_rcnn, roi_heads, transform
from torchvision.ops import poolers
from tqdm import tqdm

from transfer.coco import CocoInstances, check_datasets, coco_ap
from transfer.config import InputError, check_weights
from transfer.convert import load_model, load_weights
from transfer.results import begin_training, check_network, check_unchanged, trained_with, write_results

log = logging.getLogger(__name__)

NORMS = {"": None, "BN": nn.BatchNorm2d, "SyncBN": nn.BatchNorm2d}
STAGES, LEVELS = ["res2", "res3", "res4", "res5"], ["p2", "p3", "p4", "p5"]
POSSIBLE = {  # key: the values that can be honoured, or a test of the value and what it asks for
    "MODEL.META_ARCHITECTURE": ["GeneralizedRCNN"], "MODEL.DEVICE": ["cuda", "cpu"], "MODEL.MASK_ON": [True],
    "MODEL.BACKBONE.NAME": ["build_resnet_fpn_backbone"], "MODEL.BACKBONE.FREEZE_AT": [0],
    "MODEL.RESNETS.DEPTH": [50], "MODEL.RESNETS.NORM": ["BN", "SyncBN"], "MODEL.RESNETS.STRIDE_IN_1X1": [False],
    "MODEL.RESNETS.OUT_FEATURES": [STAGES], "MODEL.FPN.IN_FEATURES": [STAGES], "MODEL.FPN.NORM": list(NORMS),
    "MODEL.RPN.IN_FEATURES": [[*LEVELS, "p6"]], "MODEL.ROI_HEADS.IN_FEATURES": [LEVELS],
    "MODEL.ROI_HEADS.NAME": ["StandardROIHeads"], "MODEL.ROI_BOX_HEAD.NAME": ["FastRCNNConvFCHead"],
    "MODEL.ROI_MASK_HEAD.NAME": ["MaskRCNNConvUpsampleHead"],
    "MODEL.ROI_BOX_HEAD.NORM": list(NORMS), "MODEL.ROI_MASK_HEAD.NORM": list(NORMS),
    "MODEL.ROI_BOX_HEAD.NUM_FC": (lambda v: v > 0, "positive"),
    "MODEL.ROI_MASK_HEAD.NUM_CONV": (lambda v: v > 0, "positive"),
    "MODEL.ANCHOR_GENERATOR.SIZES": (lambda v: [len(level) for level in v] == [1] * 5, "one size for each of p2 to p6"),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": (lambda v: len(v) == 1, "one list for all levels"),
    "INPUT.FORMAT": ["RGB"], "INPUT.RANDOM_FLIP": ["horizontal", "none"], "INPUT.MASK_FORMAT": ["polygon", "bitmask"],
    "INPUT.MIN_SIZE_TEST": (lambda v: v > 0, "positive"),
    "DATASETS.TRAIN": (lambda v: len(v) == 1, "one data set"), "DATASETS.TEST": (lambda v: len(v) == 1, "one data set"),
}
LOSSES = {"loss_classifier": "loss_cls", "loss_box_reg": "loss_box_reg", "loss_mask": "loss_mask",
          "loss_objectness": "loss_rpn_cls", "loss_rpn_box_reg": "loss_rpn_loc"}  # torchvision's name: Detectron2's


def check(cfg):
    """Raises InputError for the first key whose value this engine cannot honour."""
    for key, rule in POSSIBLE.items():
        value = functools.reduce(getattr, key.split("."), cfg)
        fits, possible = rule if isinstance(rule, tuple) else (rule.__contains__, " or ".join(map(repr, rule)))
        if not fits(value):
            raise InputError(f"{key} is {value!r}, but the torchvision engine can only do {possible}")


def build_model(cfg):
    """Config -> torchvision MaskRCNN, randomly initialised as Detectron2's is. Raises InputError.

    Class 0 is the background; it has box and mask outputs of its own, unused, which Detectron2 leaves out.
    """
    check(cfg)
    net, classes, channels = cfg.MODEL, cfg.MODEL.ROI_HEADS.NUM_CLASSES + 1, cfg.MODEL.FPN.OUT_CHANNELS
    anchors, rpn, roi, box, mask = net.ANCHOR_GENERATOR, net.RPN, net.ROI_HEADS, net.ROI_BOX_HEAD, net.ROI_MASK_HEAD

    def pooler(head):
        pool = poolers.MultiScaleRoIAlign(LEVELS, head.POOLER_RESOLUTION, sampling_ratio=0)
        # Left to itself it derives these from the first images that it sees, wrongly for sides under 80 pixels.
        pool.scales, pool.map_levels = [1 / 4, 1 / 8, 1 / 16, 1 / 32], poolers.LevelMapper(2, 5)
        return pool

    model = mask_rcnn.MaskRCNN(
        backbone_utils.BackboneWithFPN(resnet50(weights=None), {f"layer{i + 1}": LEVELS[i] for i in range(4)},
                                       [256, 512, 1024, 2048], channels, norm_layer=NORMS[net.FPN.NORM]),
        min_size=cfg.INPUT.MIN_SIZE_TRAIN, max_size=cfg.INPUT.MAX_SIZE_TRAIN,
        image_mean=[mean / 255 for mean in net.PIXEL_MEAN], image_std=[std / 255 for std in net.PIXEL_STD],
        rpn_anchor_generator=anchor_utils.AnchorGenerator(anchors.SIZES, anchors.ASPECT_RATIOS * len(anchors.SIZES)),
        rpn_bg_iou_thresh=rpn.IOU_THRESHOLDS[0], rpn_fg_iou_thresh=rpn.IOU_THRESHOLDS[1],
        rpn_batch_size_per_image=rpn.BATCH_SIZE_PER_IMAGE, rpn_positive_fraction=rpn.POSITIVE_FRACTION,
        rpn_pre_nms_top_n_train=rpn.PRE_NMS_TOPK_TRAIN, rpn_pre_nms_top_n_test=rpn.PRE_NMS_TOPK_TEST,
        rpn_post_nms_top_n_train=rpn.POST_NMS_TOPK_TRAIN, rpn_post_nms_top_n_test=rpn.POST_NMS_TOPK_TEST,
        rpn_nms_thresh=rpn.NMS_THRESH,
        box_roi_pool=pooler(box), box_predictor=faster_rcnn.FastRCNNPredictor(box.FC_DIM, classes),
        box_head=faster_rcnn.FastRCNNConvFCHead(
            (channels, box.POOLER_RESOLUTION, box.POOLER_RESOLUTION), [box.CONV_DIM] * box.NUM_CONV,
            [box.FC_DIM] * box.NUM_FC, NORMS[box.NORM]),
        box_bg_iou_thresh=roi.IOU_THRESHOLDS[0], box_fg_iou_thresh=roi.IOU_THRESHOLDS[0],
        box_batch_size_per_image=roi.BATCH_SIZE_PER_IMAGE, box_positive_fraction=roi.POSITIVE_FRACTION,
        box_score_thresh=roi.SCORE_THRESH_TEST, box_nms_thresh=roi.NMS_THRESH_TEST,
        box_detections_per_img=cfg.TEST.DETECTIONS_PER_IMAGE,
        mask_roi_pool=pooler(mask), mask_predictor=mask_rcnn.MaskRCNNPredictor(mask.CONV_DIM, mask.CONV_DIM, classes),
        mask_head=mask_rcnn.MaskRCNNHeads(channels, [mask.CONV_DIM] * mask.NUM_CONV, 1, NORMS[mask.NORM]))

    # Where torchvision would start otherwise than Detectron2.
    boxes, masks = model.roi_heads.box_predictor, model.roi_heads.mask_predictor
    for layer in model.roi_heads.box_head:
        if isinstance(layer, nn.Linear):
            c2_xavier_fill(layer)
    for layer, std in ((boxes.cls_score, 0.01), (boxes.bbox_pred, 0.001), (masks.mask_fcn_logits, 0.001)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    nn.init.zeros_(masks.conv5_mask.bias)
    return model


def bfloat16_inside(module, device):
    """Let ``module`` compute in bfloat16 but return float32, which boxes, RoIAlign and the losses need."""
    forward = module.forward

    def cast_forward(*inputs):
        with torch.autocast(device.type, torch.bfloat16):
            outputs = forward(*inputs)
        return tree_map(torch.Tensor.float, outputs)
    module.forward = cast_forward


def training_batches(cfg, dataset, start, stop, device):
    """Yield (images, targets) of iterations ``start`` to ``stop - 1``, with torch's random state set for each.

    images: list of float32 [3, H, W] from 0 to 1. Every epoch takes all images once, in an order of its own.
    """
    seed, size, probability = max(cfg.SEED, 0), cfg.SOLVER.IMS_PER_BATCH, 0.5 * (cfg.INPUT.RANDOM_FLIP == "horizontal")

    @functools.lru_cache(2)
    def order(epoch):
        return np.random.default_rng((seed, 0, epoch)).permutation(len(dataset.ids))

    def keys(i):
        places = (divmod(i * size + n, len(dataset.ids)) for n in range(size))
        flips = np.random.default_rng((seed, 1, i)).random(size) < probability
        return [(order(epoch)[place], flip) for (epoch, place), flip in zip(places, flips)]

    loader = DataLoader(dataset, batch_sampler=map(keys, range(start, stop)), collate_fn=list,
                        num_workers=cfg.DATALOADER.NUM_WORKERS)
    for i, batch in enumerate(loader, start):
        torch.manual_seed(int(np.random.default_rng((seed, 2, i)).integers(2**32)))
        yield ([image.to(device).float() / 255 for image, _ in batch],
               [{key: value.to(device) for key, value in target.items()} for _, target in batch])


def learning_rate(solver, i):
    """Detectron2's WarmupMultiStepLR: linear warm-up, then BASE_LR times GAMMA for each of STEPS that has passed."""
    progress = min(i / min(solver.WARMUP_ITERS, solver.MAX_ITER), 1) if solver.WARMUP_ITERS else 1
    warmup = solver.WARMUP_FACTOR * (1 - progress) + progress
    return solver.BASE_LR * warmup * solver.GAMMA ** sum(i >= step for step in solver.STEPS)


def load_checkpoint(path, model):
    """Load one of this run's own checkpoints into ``model`` and return all of its content. Raises InputError."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(saved["model"])
        return saved
    except Exception as error:  # a broken file can fail in any way
        raise InputError(f"{path} does not hold a model of the torchvision engine with this config's MODEL settings "
                         f"({type(error).__name__})") from None


def fit(cfg, model, dataset, resume):
    """Train to MAX_ITER and write model_final.pth; with ``resume``, from last_checkpoint on. Raises InputError."""
    solver, folder, device = cfg.SOLVER, Path(cfg.OUTPUT_DIR), next(model.parameters()).device
    norms = [p for layer in model.modules() if isinstance(layer, nn.BatchNorm2d) for p in layer.parameters()]
    others = [p for p in model.parameters() if all(p is not norm for norm in norms)]
    optimizer = torch.optim.SGD([{"params": others}, {"params": norms, "weight_decay": solver.WEIGHT_DECAY_NORM}],
                                solver.BASE_LR, solver.MOMENTUM, weight_decay=solver.WEIGHT_DECAY)

    def save(name, i):
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iteration": i,
                    "weights": provenance}, folder / "checkpoint.tmp")
        os.replace(folder / "checkpoint.tmp", folder / name)
        last.with_suffix(".tmp").write_text(name)
        os.replace(last.with_suffix(".tmp"), last)

    last, start, provenance = folder / "last_checkpoint", 0, None
    if resume and last.is_file():
        saved = load_checkpoint(folder / last.read_text(), model)
        optimizer.load_state_dict(saved["optimizer"])
        start, provenance = saved["iteration"] + 1, saved["weights"]
        log.info("%s: resuming at iteration %d of %d", last.read_text(), start, solver.MAX_ITER)
        if last.read_text() == "model_final.pth":
            return
    elif cfg.MODEL.WEIGHTS:
        state, provenance = load_weights(cfg.MODEL.WEIGHTS)
        check_weights(cfg, provenance)
        body = model.backbone.body.state_dict()
        if differ := sorted({name for name in body if not name.endswith("num_batches_tracked")} ^ set(state)):
            raise InputError(f"{cfg.MODEL.WEIGHTS} is not a whole ResNet-50, for it lacks or adds {differ[:4]}")
        model.backbone.body.load_state_dict(state, strict=False)
        log.info("%s: all %d backbone tensors loaded", cfg.MODEL.WEIGHTS, len(state))
    else:
        log.info("MODEL.WEIGHTS is empty: training starts from random weights")
    if not start:
        begin_training(cfg, provenance)

    model.train()
    recent = []
    with (open(folder / "metrics.json", "a" if start else "w", buffering=1) as metrics,
          tqdm(total=solver.MAX_ITER, initial=start, desc="fine-tuning", unit="it", dynamic_ncols=True,
               mininterval=0.1 if sys.stderr.isatty() else 10) as bar):
        for i, (images, targets) in enumerate(training_batches(cfg, dataset, start, solver.MAX_ITER, device), start):
            losses = model(images, targets)
            total = sum(losses.values())
            if not total.isfinite():
                raise InputError(f"the loss is {total:f} at iteration {i}: lower SOLVER.BASE_LR ({solver.BASE_LR})")
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(solver, i)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()

            recent.append([total.item(), *(losses[name].item() for name in LOSSES)])
            bar.set_postfix(loss=f"{recent[-1][0]:.3f}", refresh=False)
            bar.update()
            if (i + 1) % 20 == 0 or i + 1 == solver.MAX_ITER:
                means = dict(zip(("total_loss", *LOSSES.values()), np.mean(recent, 0)))
                metrics.write(json.dumps({"iteration": i, **means, "lr": learning_rate(solver, i)}) + "\n")
                recent.clear()
            if (i + 1) % solver.CHECKPOINT_PERIOD == 0:
                save(f"model_{i:07d}.pth", i)

    if cfg.TEST.PRECISE_BN.ENABLED:
        stop = solver.MAX_ITER + cfg.TEST.PRECISE_BN.NUM_ITER
        batches = training_batches(cfg, dataset, solver.MAX_ITER, stop, device)
        unpack = model.register_forward_pre_hook(lambda _, inputs: inputs[0])  # update_bn_stats calls model(batch)
        update_bn_stats(model, batches, cfg.TEST.PRECISE_BN.NUM_ITER, progress="tqdm")
        unpack.remove()
    save("model_final.pth", solver.MAX_ITER - 1)


@torch.no_grad()
def detect(cfg, model, dataset):
    """-> COCO-format detections: original category_id, bbox [x, y, w, h] in pixels, score, mask as compressed RLE."""
    model.eval()
    model.transform.min_size, model.transform.max_size = (cfg.INPUT.MIN_SIZE_TEST,), cfg.INPUT.MAX_SIZE_TEST
    detections = []
    for image_id in tqdm(dataset.ids, "evaluating", dynamic_ncols=True, disable=None):
        image = dataset.image(image_id).to(next(model.parameters()).device).float() / 255
        # The steps of model.forward, which would paste a hundred masks at once: gigabytes for a large photograph.
        images, _ = model.transform([image])
        features = model.backbone(images.tensors)
        proposals, _ = model.rpn(images, features)
        (found,), _ = model.roi_heads(features, proposals, images.image_sizes)
        found["boxes"] = transform.resize_boxes(found["boxes"], images.image_sizes[0], image.shape[1:])
        for box, score, label, mask in zip(*(found[key].cpu() for key in ("boxes", "scores", "labels", "masks"))):
            mask = roi_heads.paste_masks_in_image(mask[None], box[None], image.shape[1:])[0, 0] >= 0.5
            code = rle.encode(np.asfortranarray(mask.numpy(), dtype=np.uint8))
            x0, y0, x1, y1 = box.tolist()
            detections.append({"image_id": image_id, "category_id": dataset.categories[label - 1],
                               "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score.item(),
                               "segmentation": {"size": code["size"], "counts": code["counts"].decode("ascii")}})
    return detections


def train(cfg, resume=False, eval_only=False):
    """Fine-tune and evaluate; returns the content of OUTPUT_DIR/results.json. Raises InputError.

    resume: go on from OUTPUT_DIR/last_checkpoint if there is one. eval_only: evaluate OUTPUT_DIR/model_final.pth with
    ``resume``, else MODEL.WEIGHTS, then a whole model of this engine. The AP is that of the saved file, read back.
    """
    began, folder = time.time(), Path(cfg.OUTPUT_DIR)
    check(cfg)
    check_datasets(cfg, eval_only)
    if resume and not eval_only and (folder / "last_checkpoint").is_file():
        check_unchanged(cfg)
    if eval_only and not resume:
        check_network(cfg, cfg.MODEL.WEIGHTS)
    val_set = CocoInstances(cfg.DATASETS.TEST[0], training=False)
    if not eval_only:
        train_set = CocoInstances(cfg.DATASETS.TRAIN[0], training=True)
    torch.manual_seed(max(cfg.SEED, 0))
    device = torch.device("cuda" if cfg.MODEL.DEVICE == "cuda" and torch.cuda.is_available() else "cpu")
    model = build_model(cfg).to(device)
    if cfg.SOLVER.AMP.ENABLED:
        heads = model.roi_heads
        for part in (model.backbone, model.rpn.head, heads.box_head, heads.mask_head, heads.mask_predictor):
            bfloat16_inside(part, device)
    log.info("one %s device: SyncBN is BatchNorm over its batch", device.type)
    (folder / "inference").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(cfg.dump())
    if not eval_only:
        try:
            fit(cfg, model, train_set, resume)
        except torch.OutOfMemoryError:
            raise InputError(f"{cfg.SOLVER.IMS_PER_BATCH} images at once do not fit into the memory of {device}: lower "
                             "SOLVER.IMS_PER_BATCH and, in proportion, SOLVER.BASE_LR") from None
    final = cfg.MODEL.WEIGHTS if eval_only and not resume else folder / "model_final.pth"
    state, iterations, weights = load_model(final, model.state_dict())
    model.load_state_dict(state)
    detections = detect(cfg, model, val_set)
    (folder / "inference" / "coco_instances_results.json").write_text(json.dumps(detections))
    return write_results(cfg, engine="torchvision", ap=coco_ap(val_set.annotations, detections),
                         weights=weights, iterations=iterations, seconds=time.time() - began,
                         eval_only=eval_only and not (resume and trained_with(cfg)))
