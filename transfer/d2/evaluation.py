"""COCO's metrics of a model, by Detectron2."""

import os

import detectron2.utils.comm as comm
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import COCOEvaluator, inference_on_dataset, print_csv_format
from torch import nn

from rsa_detectron2.common import workers
from rsa_detectron2.transfer.d2.data import NUM_WORKERS, Mapper


def build_test_loader(cfg: CfgNode, dataset_name: str) -> workers.Loader:
    mapper = workers.Reader(Mapper(cfg, False), NUM_WORKERS)
    return workers.Loader(build_detection_test_loader(cfg, dataset_name, mapper=mapper), NUM_WORKERS)


def build_evaluator(cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
    """COCO's metrics; the detections are written to OUTPUT_DIR/inference."""
    return COCOEvaluator(
        dataset_name,
        output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"),
        kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
    )


def evaluate(cfg: CfgNode, model: nn.Module) -> dict:
    """{"bbox": {"AP": percent, ...}, ...} on DATASETS.TEST; empty on all but the main process."""
    (name,) = cfg.DATASETS.TEST
    ap = inference_on_dataset(model, build_test_loader(cfg, name), build_evaluator(cfg, name)) or {}
    if comm.is_main_process():
        print_csv_format(ap)
    return ap
