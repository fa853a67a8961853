"""COCO's metrics of a model, by Detectron2."""

import os
import statistics
from collections.abc import Iterator

import detectron2.utils.comm as comm
import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import COCOEvaluator, inference_on_dataset, print_csv_format
from detectron2.utils.events import EventStorage
from torch import nn

from rsa_detectron2.common import workers
from rsa_detectron2.common.signals import StopSignals
from rsa_detectron2.transfer.d2.data import NUM_WORKERS, Mapper, validation_dicts
from rsa_detectron2.transfer.d2.weights import unwrap
from rsa_detectron2.transfer.precise_bn import norm_layers


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


class Watched:
    """A loader, during which ``stop`` may end a single process."""

    def __init__(self, loader: workers.Loader, stop: StopSignals):
        self.loader, self.stop = loader, stop

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[dict]]:
        return self.stop.watch(self.loader)


def evaluate(cfg: CfgNode, model: nn.Module, stop: StopSignals) -> dict:
    """{"bbox": {"AP": percent, ...}, ...} on DATASETS.TEST; empty on all but the main process."""
    (name,) = cfg.DATASETS.TEST
    loader = Watched(build_test_loader(cfg, name), stop)
    ap = inference_on_dataset(model, loader, build_evaluator(cfg, name)) or {}
    if comm.is_main_process():
        print_csv_format(ap)
    return ap


@torch.no_grad()
def validation_losses(cfg: CfgNode, model: nn.Module, stop: StopSignals) -> dict[str, float]:
    """The mean losses of the images of DATASETS.TEST, one by one, over all processes.

    The images are as in the evaluation, and BatchNorm normalizes by its running statistics.
    """
    as_evaluated = cfg.clone()
    as_evaluated.defrost()
    given = as_evaluated.INPUT
    given.MIN_SIZE_TRAIN, given.MAX_SIZE_TRAIN = (given.MIN_SIZE_TEST,), given.MAX_SIZE_TEST
    given.MIN_SIZE_TRAIN_SAMPLING, given.RANDOM_FLIP, given.CROP.ENABLED = "choice", "none", False
    mapper = workers.Reader(Mapper(as_evaluated, True), NUM_WORKERS)
    loader = build_detection_test_loader(
        validation_dicts(cfg), mapper=mapper, num_workers=cfg.DATALOADER.NUM_WORKERS
    )
    model.train()
    for layer in norm_layers(model):
        layer.eval()
    rows = []
    with EventStorage():  # the heads log here, not into the training's storage
        for n, images in enumerate(stop.watch(workers.Loader(loader, NUM_WORKERS))):
            torch.manual_seed(n)  # of the samples among the proposals
            losses = unwrap(model)(images)
            losses = {"total_loss": sum(losses.values()), **losses}
            rows.append({name: loss.item() for name, loss in losses.items()})
    model.train()
    rows = [row for part in comm.all_gather(rows) for row in part]  # a process may have no image
    return {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
