"""The configuration of a fine-tuning run, in Detectron2's keys.

Detectron2 reads the YAML files under ``configs/transfer`` into its own defaults. Where it
is not installed, the embedded engine (transfer/tv) reads the same files into
:func:`torchvision_defaults`: the keys that it supports, with Detectron2's default values.
Any other key is refused.
"""

import functools
from typing import Any

import yaml
from fvcore.common.config import CfgNode as CN

from rsa_detectron2.common.errors import InputError

# Written by tools/convert_to_d2.py; the transfer configs look for weights here.
DEFAULT_WEIGHTS = "output/weights/rsa_r50.pkl"
# The input (0-255) and stride of converted weights whose provenance does not say otherwise.
RGB_IMAGENET = {
    "input_format": "RGB",
    "pixel_mean": [123.675, 116.28, 103.53],
    "pixel_std": [58.395, 57.12, 57.375],
    "stride_in_1x1": False,
}
# The parts of MODEL that have a NORM.
NORM_PARTS = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")


def known_expression(loader: yaml.SafeLoader, node: yaml.Node) -> list[list[float]]:
    """The value of the one expression in Detectron2's own config files.

    It gives the anchors of Base-RetinaNet.yaml. Raises ConstructorError for any other expression.
    """
    [text] = loader.construct_sequence(node)
    if "".join(text.split()) != "[[x,x*2**(1.0/3),x*2**(2.0/3)]forxin[32,64,128,256,512]]":
        raise yaml.constructor.ConstructorError(
            None, None, f"{text!r} is code, which is not run: write its value"
        )
    return [[x, x * 2 ** (1 / 3), x * 2 ** (2 / 3)] for x in (32, 64, 128, 256, 512)]


yaml.SafeLoader.add_constructor("tag:yaml.org,2002:python/object/apply:eval", known_expression)


# The architectures that can be trained, and the key that holds each one's number of classes.
CLASSES_KEYS = {"GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES", "RetinaNet": "MODEL.RETINANET.NUM_CLASSES"}


def classes_key(cfg: CN) -> str:
    """The key that holds the number of classes of the architecture of ``cfg``."""
    return CLASSES_KEYS.get(cfg.MODEL.META_ARCHITECTURE, CLASSES_KEYS["GeneralizedRCNN"])


def value_of(cfg: CN, key: str) -> Any:
    """The value of ``key``, such as "MODEL.ROI_HEADS.NUM_CLASSES"."""
    return functools.reduce(getattr, key.split("."), cfg)


def check_possible(cfg: CN, possible: dict, engine: str) -> None:
    """Raise InputError for the first key of ``cfg`` whose value ``engine`` does not support.

    possible: {key: [values]}, or {key: (test of a value, which values pass it)}.
    """
    for key, rule in possible.items():
        value = value_of(cfg, key)
        fits, words = rule if isinstance(rule, tuple) else (rule.__contains__, " or ".join(map(repr, rule)))
        if not fits(value):
            raise InputError(f"{key} is {value!r}, but {engine} supports only {words}")


def protocol_of(config: dict) -> str:
    """The protocol of a run's config: "infomin", "moco" or "other".

    Each of the two is a Mask R-CNN with FPN; they differ in the parts that train their
    BatchNorm and in the layers of the box head.
    """
    model = config["MODEL"]
    if (
        model["META_ARCHITECTURE"],
        model["ROI_HEADS"]["NAME"],
        model["BACKBONE"]["NAME"],
        model["MASK_ON"],
    ) != ("GeneralizedRCNN", "StandardROIHeads", "build_resnet_fpn_backbone", True):
        return "other"
    trained = [model[part]["NORM"] in ("BN", "SyncBN") for part in NORM_PARTS]
    box = (model["ROI_BOX_HEAD"]["NUM_CONV"], model["ROI_BOX_HEAD"]["NUM_FC"])
    return {(True, True, True, True, 4, 1): "infomin", (True, True, False, False, 0, 2): "moco"}.get(
        (*trained, *box), "other"
    )


COCO_IMAGES = 117266  # those of train2017 with annotations, for which the recipes' schedules were made
RECIPE_BATCH = 16  # images an iteration
REFERENCE_GPUS = 8  # the recipes' GPUs, two images on each
# GPU memory of a training image: half of what Detectron2's model zoo states (7.2 GB for two)
# for scratch_mask_rcnn_R_50_FPN_9x_syncbn, the same network in float32 with nothing frozen.
BYTES_PER_IMAGE = 3.6e9
RECIPE_LENGTHS = (90000, 180000)  # iterations: 1x and 2x


def scale_schedule(solver: CN, images: int) -> str:
    """Give a data set of ``images`` annotated images as many epochs as COCO gets.

    Changes MAX_ITER and STEPS in place. A data set under a thirtieth of COCO gets a
    thirtieth of the schedule: 3,000 iterations of 16 images at 1x. Warm-up takes at most
    a tenth of the run. Returns a line that says what changed. Raises InputError for a
    batch of no images.
    """
    if solver.IMS_PER_BATCH < 1:
        raise InputError(f"SOLVER.IMS_PER_BATCH is {solver.IMS_PER_BATCH}: it must be at least 1")
    before, factor = solver.MAX_ITER, max(images / COCO_IMAGES, 1 / 30) * RECIPE_BATCH / solver.IMS_PER_BATCH
    solver.MAX_ITER = max(1, round(before * factor))
    solver.STEPS = tuple(round(step * factor) for step in solver.STEPS)
    solver.WARMUP_ITERS = min(solver.WARMUP_ITERS, solver.MAX_ITER // 10)
    return (
        f"schedule: {solver.MAX_ITER} iterations instead of {before}, steps {solver.STEPS}, warm-up "
        f"{solver.WARMUP_ITERS}: "
        f"{solver.MAX_ITER * solver.IMS_PER_BATCH / images:.1f} epochs of {images} images; "
        "SOLVER.MAX_ITER and SOLVER.STEPS override it"
    )


def fitting_rate(solver: CN, images: int, schedule: bool = True) -> str:
    """A line that names the learning rate for ``solver.IMS_PER_BATCH`` images an iteration.

    ``images``: how many the rate of ``solver`` is for. With ``schedule`` the line also
    names the iterations. Both follow the linear scaling rule (Goyal et al. 2017).
    """
    factor = solver.IMS_PER_BATCH / images
    keys = {"SOLVER.BASE_LR": f"{solver.BASE_LR * factor:g}"}
    if schedule:
        keys["SOLVER.MAX_ITER"] = round(solver.MAX_ITER / factor)
        keys["SOLVER.STEPS"] = f'"{tuple(round(step / factor) for step in solver.STEPS)}"'
    return (
        f"SOLVER.BASE_LR {solver.BASE_LR:g} is for {images} images an iteration; "
        f"for {solver.IMS_PER_BATCH} give " + " ".join(f"{key} {value}" for key, value in keys.items())
    )


def torchvision_defaults() -> CN:
    """Detectron2's defaults for the keys that the embedded engine supports."""
    cfg = CN()
    cfg.VERSION = 2
    cfg.SEED = -1
    cfg.OUTPUT_DIR = "./output"
    cfg.MODEL = CN(
        dict(
            META_ARCHITECTURE="GeneralizedRCNN",
            WEIGHTS="",
            DEVICE="cuda",
            MASK_ON=False,
            PIXEL_MEAN=[103.530, 116.280, 123.675],
            PIXEL_STD=[1.0, 1.0, 1.0],
            BACKBONE=dict(NAME="build_resnet_backbone", FREEZE_AT=2),
            RESNETS=dict(
                DEPTH=50,
                NUM_GROUPS=1,
                WIDTH_PER_GROUP=64,
                RES2_OUT_CHANNELS=256,
                NORM="FrozenBN",
                STRIDE_IN_1X1=True,
                OUT_FEATURES=["res4"],
            ),
            FPN=dict(IN_FEATURES=[], OUT_CHANNELS=256, NORM=""),
            ANCHOR_GENERATOR=dict(SIZES=[[32, 64, 128, 256, 512]], ASPECT_RATIOS=[[0.5, 1.0, 2.0]]),
            RPN=dict(
                IN_FEATURES=["res4"],
                BATCH_SIZE_PER_IMAGE=256,
                POSITIVE_FRACTION=0.5,
                IOU_THRESHOLDS=[0.3, 0.7],
                PRE_NMS_TOPK_TRAIN=12000,
                PRE_NMS_TOPK_TEST=6000,
                POST_NMS_TOPK_TRAIN=2000,
                POST_NMS_TOPK_TEST=1000,
                NMS_THRESH=0.7,
            ),
            ROI_HEADS=dict(
                NAME="Res5ROIHeads",
                NUM_CLASSES=80,
                IN_FEATURES=["res4"],
                BATCH_SIZE_PER_IMAGE=512,
                POSITIVE_FRACTION=0.25,
                IOU_THRESHOLDS=[0.5],
                SCORE_THRESH_TEST=0.05,
                NMS_THRESH_TEST=0.5,
            ),
            ROI_BOX_HEAD=dict(
                NAME="", NUM_CONV=0, CONV_DIM=256, NUM_FC=0, FC_DIM=1024, NORM="", POOLER_RESOLUTION=14
            ),
            ROI_MASK_HEAD=dict(
                NAME="MaskRCNNConvUpsampleHead", NUM_CONV=0, CONV_DIM=256, NORM="", POOLER_RESOLUTION=14
            ),
        )
    )
    cfg.INPUT = CN(
        dict(
            FORMAT="BGR",
            MASK_FORMAT="polygon",
            RANDOM_FLIP="horizontal",
            MIN_SIZE_TRAIN=(800,),
            MAX_SIZE_TRAIN=1333,
            MIN_SIZE_TEST=800,
            MAX_SIZE_TEST=1333,
        )
    )
    cfg.DATASETS = CN(dict(TRAIN=(), TEST=()))
    cfg.DATALOADER = CN(dict(NUM_WORKERS=4, FILTER_EMPTY_ANNOTATIONS=True))
    cfg.SOLVER = CN(
        dict(
            IMS_PER_BATCH=16,
            BASE_LR=0.001,
            MOMENTUM=0.9,
            WEIGHT_DECAY=0.0001,
            WEIGHT_DECAY_NORM=0.0,
            STEPS=(30000,),
            GAMMA=0.1,
            MAX_ITER=40000,
            WARMUP_ITERS=1000,
            WARMUP_FACTOR=1.0 / 1000,
            CHECKPOINT_PERIOD=5000,
            AMP=dict(ENABLED=False),
        )
    )
    cfg.TEST = CN(dict(DETECTIONS_PER_IMAGE=100, EVAL_PERIOD=0, PRECISE_BN=dict(ENABLED=False, NUM_ITER=200)))
    add_own_keys(cfg)
    return cfg


def add_own_keys(cfg: CN) -> None:
    """Add the keys that Detectron2 does not have."""
    cfg.LOGGERS = ("tensorboard",)  # where the rows of metrics.json go as well: "tensorboard", "wandb"
    cfg.TEST.BEST_METRIC = "bbox/AP"  # what makes a model the best among those that EVAL_PERIOD evaluates
    cfg.TEST.PATIENCE = 0  # end after that many evaluations in a row without a better model; 0: never
