"""Fine-tuning with Detectron2: its own trainer, fail-closed weights, and one results.json at the end.

The only file that imports detectron2.
"""

import json
import os
import sys
import time
from pathlib import Path

import detectron2.utils.comm as comm
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg  # noqa: F401  (the tools merge the YAML into it)
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer, HookBase, SimpleTrainer, default_setup, hooks, launch
from detectron2.evaluation import COCOEvaluator
from tqdm import tqdm

from transfer.config import InputError, check_num_classes, locate_dataset
from transfer.convert import detectron2_name, load_weights
from transfer.report import load_results, write_results


PROVENANCE = "weights.json"  # in OUTPUT_DIR: where the backbone of this run came from; null: random


class Trainer(DefaultTrainer):
    """DefaultTrainer with COCO evaluation, a progress bar, and a backbone that is known to have arrived."""

    def __init__(self, cfg):
        super().__init__(cfg)
        if cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == "cpu":  # Detectron2's own AMP is for CUDA only
            self._trainer = SimpleTrainer(self.model, self.data_loader, self.optimizer)

    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        if cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == "cpu":
            model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
        return model

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return COCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"))

    def build_hooks(self):
        # The evaluation at the end is that of the saved file, read back (train below), not of the model in memory.
        result = [hook for hook in super().build_hooks() if not isinstance(hook, hooks.EvalHook)]
        if self.cfg.TEST.EVAL_PERIOD:
            evaluation = hooks.EvalHook(self.cfg.TEST.EVAL_PERIOD, lambda: self.test(self.cfg, self.model),
                                        eval_after_train=False)
            result.insert(-1 if comm.is_main_process() else len(result), evaluation)  # before the writers
        return result + [ProgressBar()] if comm.is_main_process() else result

    def resume_or_load(self, resume=True):
        super().resume_or_load(resume)
        if self.start_iter == 0 and self.cfg.MODEL.WEIGHTS:
            assert_backbone_arrived(self.model, self.cfg.MODEL.WEIGHTS)


class ProgressBar(HookBase):
    """Iterations done, loss and time left, beside Detectron2's own lines."""

    bar = None

    def before_train(self):
        self.bar = tqdm(total=self.trainer.max_iter, initial=self.trainer.start_iter, desc="fine-tuning", unit="it",
                        dynamic_ncols=True, mininterval=0.1 if sys.stderr.isatty() else 10)

    def after_step(self):
        losses = self.trainer.storage.histories().get("total_loss")
        if losses:
            self.bar.set_postfix(loss=f"{losses.median(20):.3f}", refresh=False)
        self.bar.update()

    def after_train(self):
        if self.bar is not None:  # None when another hook has failed before
            self.bar.close()


def assert_backbone_arrived(model, path):
    """Compare every one of the 265 tensors in the model with the file. Raises InputError naming what did not arrive.

    Detectron2's checkpointer only warns about what it could not place, and training then starts from random layers.
    """
    state, _ = load_weights(path)
    if hasattr(model, "module"):
        model = model.module
    found = model.backbone.bottom_up.state_dict()
    absent = [detectron2_name(name) for name, tensor in state.items()
              if not torch.equal(found.get(detectron2_name(name), torch.empty(0)).cpu(), tensor)]
    if absent:
        raise InputError(f"{len(absent)} of {len(state)} backbone tensors of {path} did not arrive in the model "
                         f"({', '.join(absent[:3])}, ...): is MODEL.RESNETS.DEPTH 50 and its NORM a BatchNorm?")


def train(cfg, num_gpus=1, resume=False, eval_only=False):
    """Fine-tune and evaluate on ``num_gpus`` GPUs of this machine (0 or 1: this process); writes results.json.

    Returns its content. Raises InputError.
    """
    register_datasets(cfg, eval_only)
    if cfg.SOLVER.IMS_PER_BATCH % max(num_gpus, 1):
        raise InputError(f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} does not divide among {num_gpus} GPUs")
    if num_gpus > torch.cuda.device_count() and num_gpus > 1:
        raise InputError(f"--num-gpus {num_gpus}, but this machine shows {torch.cuda.device_count()}")
    if not torch.cuda.is_available():
        cfg.merge_from_list(["MODEL.DEVICE", "cpu"])
    if eval_only and not resume and not Path(cfg.MODEL.WEIGHTS).is_file():
        raise InputError(f"--eval-only needs a fine-tuned model, and there is no MODEL.WEIGHTS {cfg.MODEL.WEIGHTS!r}")
    provenance = load_weights(cfg.MODEL.WEIGHTS)[1] if cfg.MODEL.WEIGHTS and not eval_only else None
    try:
        launch(_train, num_gpus, dist_url="auto", args=(cfg, resume, eval_only, provenance))
    except FloatingPointError as error:  # Detectron2's own check of the losses
        raise InputError(f"{error}: lower SOLVER.BASE_LR ({cfg.SOLVER.BASE_LR})") from None
    return load_results(cfg.OUTPUT_DIR)


def _train(cfg, resume, eval_only, provenance):
    start = time.perf_counter()
    register_datasets(cfg, eval_only)  # a process that launch has started knows of none
    cfg.freeze()
    default_setup(cfg, None)
    if not eval_only:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume)
        if comm.is_main_process() and trainer.start_iter == 0:
            Path(cfg.OUTPUT_DIR, PROVENANCE).write_text(json.dumps(provenance))
        if trainer.start_iter < trainer.max_iter:
            trainer.train()
        comm.synchronize()  # only the main process writes the file that all read now
    model = Trainer.build_model(cfg)
    checkpointer = DetectionCheckpointer(model, cfg.OUTPUT_DIR)
    final = cfg.MODEL.WEIGHTS if eval_only and not resume else checkpointer.get_checkpoint_file()
    load_whole_model(checkpointer, final)
    ap = Trainer.test(cfg, model)
    if comm.is_main_process():
        beside = Path(final).with_name(PROVENANCE)
        provenance = json.loads(beside.read_text()) if beside.is_file() else {"source": str(final)}
        write_results(cfg, "detectron2", ap, provenance, time.perf_counter() - start)


def load_whole_model(checkpointer, path):
    """Load a fine-tuned model, every tensor of it. Raises InputError, where Detectron2 would only warn."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)["model"]
    except Exception as error:  # a broken or foreign file can fail in any way
        raise InputError(f"{path} is not a model that Detectron2 has fine-tuned ({type(error).__name__})") from None
    needed = checkpointer.model.state_dict()
    wrong = [name for name, tensor in needed.items() if name not in saved or saved[name].shape != tensor.shape]
    if wrong:
        raise InputError(f"{path} lacks {len(wrong)} tensors of this config's model, or has them in another shape: "
                         f"{', '.join(wrong[:3])}")
    checkpointer.load(path)


def register_datasets(cfg, eval_only=False):
    """Make the data sets of ``cfg`` known to Detectron2, after checking that they exist and fit the model."""
    if len(cfg.DATASETS.TEST) != 1:
        raise InputError(f"DATASETS.TEST is {cfg.DATASETS.TEST}: results are of one data set")
    for name in (*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST):
        annotations, images = locate_dataset(name)
        check_num_classes(name, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
        if name not in DatasetCatalog.list():
            register_coco_instances(name, {}, annotations, images)
