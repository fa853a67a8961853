"""What a fine-tuning run of either engine leaves in its folder besides Detectron2's own files.

``training.json`` is the run's record (common/record.py), written when the run begins. ``results.json`` is the
record with the results, written when the run ends.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from fvcore.common.config import CfgNode

from rsa_detectron2.common import record
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.loggers import Rows
from rsa_detectron2.transfer.config import protocol_of
from rsa_detectron2.transfer.convert.provenance import sha256
from rsa_detectron2.transfer.data.annotations import locate_dataset
from rsa_detectron2.transfer.data.average_precision import AP_KEYS, finite
from rsa_detectron2.transfer.report.best import forget_best
from rsa_detectron2.transfer.report.run_folder import RESULTS, TRAINING


@dataclass(frozen=True)
class Setup:
    """What defines a run besides its configuration."""

    engine: str  # "detectron2" or "torchvision"
    weights: dict | None = None  # provenance of the converted file; None: random initialization
    processes: int = 1  # GPUs, or processes on the CPU
    accumulate: int = 1  # passes of each process in an iteration
    origin: record.Origin = record.Origin()  # where the configuration came from


@dataclass(frozen=True)
class Outcome:
    """The results of a run."""

    # {"bbox": {"AP": percent, ...}, "segm": {...}}, and "keypoints" of a model that has them.
    ap: dict
    iterations: int  # of the training that led to the evaluated model
    seconds: float  # wall time of the command that ended the run
    eval_only: bool = False  # the model may have been trained with another configuration
    quality: dict = field(default_factory=dict)  # what report/quality.py says of the detections
    best: dict | None = None  # of a training that evaluated on its way: see report/best.py


def describe(cfg: CfgNode, setup: Setup) -> dict:
    """The record of a run."""
    import torch  # here, because reports read results without it

    on_gpu = torch.cuda.is_available() and cfg.MODEL.DEVICE != "cpu"
    return record.describe(
        "finetune",
        cfg,
        setup.origin,
        engine=setup.engine,
        seed=cfg.SEED,
        weights=setup.weights,
        method=(setup.weights or {}).get("method"),
        steps=cfg.SOLVER.MAX_ITER,
        processes=setup.processes,
        accumulate=setup.accumulate,
        device=torch.cuda.get_device_name() if on_gpu else "CPU",
        config=cfg.dump(),
        bn_batch_size=bn_batch_size(yaml.safe_load(cfg.dump()), setup.processes, setup.accumulate),
    )


def write_results(cfg: CfgNode, setup: Setup, outcome: Outcome, rows: Rows | None = None) -> dict:
    """Write ``cfg.OUTPUT_DIR/results.json``, whole or not at all, and return its content.

    A missing or non-finite AP becomes null. The APs of a training also end its ``rows``.
    """
    tasks = ("bbox", "segm", *outcome.ap.keys() & {"keypoints"})
    results = {
        **describe(cfg, setup),
        "ap": {task: {key: finite(outcome.ap.get(task, {}).get(key)) for key in AP_KEYS} for task in tasks},
        "iterations": outcome.iterations,
        "eval_only": outcome.eval_only,
        "best": outcome.best,
        "seconds": float(outcome.seconds),
        "data": (read_training(cfg.OUTPUT_DIR) or {}).get("data"),
        **outcome.quality,
    }
    record.write(cfg.OUTPUT_DIR, results, RESULTS)
    if rows:
        last = {
            f"{task}/{key}": value for task, values in results["ap"].items() for key, value in values.items()
        }
        rows.write(outcome.iterations - 1, last)
    return results


def open_rows(cfg: CfgNode, done: int) -> Rows:
    """The rows of a training that has made ``done`` iterations. Raises InputError."""
    return Rows(cfg, "metrics.json", "iteration", done - 1 if done else None)


NUMBER, NOTHING = (int, float), type(None)
# Key of results.json: type of its value.
CONTENT = {
    "engine": str,
    "ap": dict,
    "iterations": int,
    "eval_only": bool,
    "seed": int,
    "weights": (dict, NOTHING),
    "config": str,
    "seconds": NUMBER,
    "kind": str,
    "recipe": str,
    "settings": dict,
    "changed": dict,
    "processes": int,
    "accumulate": int,
    "bn_batch_size": int,
    "steps": int,
}


def load_results(folder: str | Path) -> dict:
    """What :func:`write_results` wrote into a run's folder. Raises InputError."""
    path = Path(folder, RESULTS)
    try:
        results = json.loads(path.read_text())
        wrong = [key for key, kind in CONTENT.items() if not isinstance(results[key], kind)]
        wrong += [
            f"{task} AP"
            for task in ("bbox", "segm")
            for value in results["ap"][task].values()
            if not isinstance(value, (*NUMBER, NOTHING))
        ]
        # Versions before 0.3 did not write these.
        for part in results.get("per_class", {}).values():
            part["objects"], part["bbox"]["AP"], part["segm"]["AP"]
        for error in (e for task in results.get("errors", {}).values() for e in task.values()):
            error["count"], error["dAP50"]
        weights = results["weights"] or {}
        wrong += [
            f"weights' {key}"
            for key, kind in (("method", str), ("step", int))
            if not isinstance(weights.get(key, kind()), kind)
        ]
        if wrong:
            raise ValueError(f"{wrong[0]} is of another kind")
        config = yaml.safe_load(results["config"])
        protocol_of(config)
        config["DATASETS"]["TEST"], config["SOLVER"]["IMS_PER_BATCH"], results["settings"]["DATASETS.TEST"]
        return results
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
        yaml.YAMLError,
    ) as error:
        if isinstance(error, FileNotFoundError):
            reason = "no such file"
        elif isinstance(error, KeyError):
            reason = f"lacks {error}"
        else:
            reason = " ".join(str(error).split())
        raise InputError(
            f"{path} does not hold a run's results ({reason}): tools/train_net.py writes it when a run ends"
        ) from None


# Settings that may change when a run is resumed, or when its model is evaluated again.
EVALUATION = re.compile(
    r"OUTPUT_DIR|LOGGERS|MODEL\.WEIGHTS|VIS_PERIOD|MODEL\.DEVICE|SOLVER\.CHECKPOINT_PERIOD|"
    r"DATALOADER\.NUM_WORKERS|DATASETS\.TEST|TEST\.(?!PRECISE_BN).*|.*_TEST"
)
# Settings that define the network and its input. They must stay as in training.
NETWORK = re.compile(r"INPUT\.FORMAT|MODEL\.(PIXEL_.*|BACKBONE\.NAME|RESNETS\..*|.*\.NORM)")


def begin_training(
    cfg: CfgNode, setup: Setup, categories: Sequence[dict] = (), num_images: int | None = None
) -> dict:
    """Write the record of a run that begins, and return it.

    categories: COCO's [{"id": int, "name": str}], in the order of the model's classes. num_images: the
    number of training images.
    """
    folder = Path(cfg.OUTPUT_DIR)
    forget_best(cfg)
    about = describe(cfg, setup)
    about["categories"] = list(categories)
    about["annotations"] = annotation_digests(cfg)
    about["data"] = {
        "name": ", ".join(set_names(cfg.DATASETS.TRAIN)),
        "images": num_images,
        "sha256": about["annotations"],
    }
    record.write(folder, about, TRAINING)
    return about


def annotation_digests(cfg: CfgNode) -> list[str]:
    """The sha256 of each annotation file of the training set."""
    return [sha256(locate_dataset(name)[0]) for name in cfg.DATASETS.TRAIN]


def read_training(folder: str | Path) -> dict | None:
    """What :func:`begin_training` left in ``folder``, or None. Raises InputError."""
    path = Path(folder, TRAINING)
    if not path.is_file():
        return None
    try:
        training = json.loads(path.read_text())
        settings(training["config"])
        training.setdefault("annotations", None)  # early versions did not write it
        return {
            key: training[key] for key in ("weights", "config", "processes", "accumulate", "annotations")
        } | {key: training.get(key) for key in ("data", "categories")}
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
        raise InputError(
            f"{path} is not what tools/train_net.py writes when a run begins: restore it, or give another "
            "OUTPUT_DIR"
        ) from None


def differences(cfg: CfgNode, training: dict, of: re.Pattern | None = None) -> list[str]:
    """A text for each setting in which ``cfg`` and a ``training`` differ.

    ``of``: a pattern of the settings that count, by default all but those of evaluation. Of the training
    set only the names of files count, because it may lie elsewhere on another machine.
    """
    before, now = settings(training["config"]), settings(cfg.dump())
    counts = of.fullmatch if of else lambda key: not EVALUATION.fullmatch(key)
    return [
        f"{key} {before[key]} and not {value}"
        for key, value in now.items()
        if key in before and counts(key) and _comparable(key, before[key]) != _comparable(key, value)
    ]


def _comparable(key, value):
    """A setting without what may differ between machines."""
    if key.endswith(".NORM"):  # bn_batch_size compares over how many images
        return value.replace("SyncBN", "BN")
    return set_names(value) if key == "DATASETS.TRAIN" else value


def set_names(names: Iterable[str]) -> list[str]:
    """The names of data sets without folders: for a COCO-format set, the name of its annotation file."""
    return [name.split("::")[0].split("/")[-1] for name in names]


def check_unchanged(cfg: CfgNode, processes: int = 1, accumulate: int = 1, done: int = 0) -> None:
    """Raises InputError where the training in ``cfg.OUTPUT_DIR`` began with other settings.

    Resuming restores some settings from the checkpoint, such as the learning rate, so a change would take
    effect in part only. After ``done`` iterations, a training may still be extended: :func:`can_extend`.
    """
    training = read_training(cfg.OUTPUT_DIR)
    if training is None:
        raise InputError(
            f"{Path(cfg.OUTPUT_DIR, TRAINING)} is missing, which holds the settings of the run: restore it, "
            "or give another OUTPUT_DIR"
        )
    found = differences(cfg, training)
    if found and can_extend(cfg, training, done):
        print(f"the run in {cfg.OUTPUT_DIR} is extended: {'; '.join(found)}", flush=True)
        extend(cfg)
    elif found:
        raise InputError(
            f"the run in {cfg.OUTPUT_DIR} began with {'; '.join(found)}: give another "
            f"OUTPUT_DIR, with MODEL.WEIGHTS its model to start from that, or leave "
            f"{'it' if len(found) == 1 else 'them'} unchanged"
        )
    before = bn_batch_size(yaml.safe_load(training["config"]), training["processes"], training["accumulate"])
    now = bn_batch_size(yaml.safe_load(cfg.dump()), processes, accumulate)
    if before != now:
        raise InputError(
            f"the run in {cfg.OUTPUT_DIR} began with "
            f"{training['processes']} x {training['accumulate']} passes "
            f"(processes, --accumulate), BatchNorm over {before} images at once, and not {now}: give as many "
            "again, or another OUTPUT_DIR"
        )
    if training["annotations"] not in (None, annotation_digests(cfg)):
        print(
            f"warning: {', '.join(set_names(cfg.DATASETS.TRAIN))} has changed since the run in "
            f"{cfg.OUTPUT_DIR} began; it goes on with the changed annotations",
            flush=True,
        )


def can_extend(cfg: CfgNode, training: dict, done: int) -> bool:
    """Whether ``cfg`` only asks for more iterations than the ``training`` planned, or for later steps.

    Then its first ``done`` iterations are also those of the longer training: its learning rate does not
    depend on the end, unless it follows a cosine, or is still in the warm-up.
    """
    before = settings(training["config"])
    scheduler = before.get("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR")  # the embedded engine has no key
    changed = {text.split()[0] for text in differences(cfg, training)}
    steps = [[step for step in given if step < done] for given in (before["SOLVER.STEPS"], cfg.SOLVER.STEPS)]
    return (
        changed <= {"SOLVER.MAX_ITER", "SOLVER.STEPS"}
        and scheduler == "WarmupMultiStepLR"
        and cfg.SOLVER.MAX_ITER >= before["SOLVER.MAX_ITER"] >= cfg.SOLVER.WARMUP_ITERS
        and cfg.SOLVER.MAX_ITER > done > 0
        and steps[0] == steps[1]
    )


def extend(cfg: CfgNode) -> None:
    """Write the settings of a longer training into its record."""
    path = Path(cfg.OUTPUT_DIR, TRAINING)
    about = json.loads(path.read_text())
    about |= {"config": cfg.dump(), "steps": cfg.SOLVER.MAX_ITER}
    record.write(cfg.OUTPUT_DIR, about, TRAINING)


def bn_batch_size(config: dict, processes: int, accumulate: int) -> int:
    """Images that BatchNorm sees at once in a run with ``config``, a dict: those of a pass; with SyncBN, of
    all GPUs."""
    synchronized = config["MODEL"]["DEVICE"] != "cpu" and config["MODEL"]["RESNETS"]["NORM"] == "SyncBN"
    return config["SOLVER"]["IMS_PER_BATCH"] // (accumulate * (1 if synchronized else processes))


def check_network(cfg: CfgNode, folder: str | Path) -> None:
    """Raises InputError where the training in ``folder`` had another input or other layers than ``cfg``.

    The tensors of its model may have the same names and shapes all the same.
    """
    training = read_training(folder)
    if training and (found := differences(cfg, training, NETWORK)):
        raise InputError(
            f"the model in {folder} was trained with {'; '.join(found)}: evaluate it with "
            "the config of its training"
        )


def own_training(cfg: CfgNode) -> dict | None:
    """The training in ``cfg.OUTPUT_DIR`` (:func:`read_training`) if it had the settings of ``cfg``, else
    None."""
    training = read_training(cfg.OUTPUT_DIR)
    return training if training and not differences(cfg, training) else None


def settings(config: str) -> dict:
    """A dumped config -> {"SOLVER.BASE_LR": 0.02, ...}."""
    return record.flatten(yaml.safe_load(config))
