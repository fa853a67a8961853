"""What a fine-tuning run leaves in its folder besides Detectron2's own files, from either engine.

``training.json`` says from the first iteration on with which weights and config the run began, ``results.json`` at its
end what came out.
"""

import json
import math
import os
import platform
import re
from importlib import metadata
from pathlib import Path

import yaml

from transfer.config import InputError, protocol_of

AP_KEYS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def write_results(cfg, engine, ap, weights, iterations, seconds, eval_only=False, processes=1, accumulate=1):
    """Write ``cfg.OUTPUT_DIR/results.json``, whole or not at all, and return its content.

    engine: "detectron2" or "torchvision"; ap: ``{"bbox": {"AP": percent, ...}, "segm": {...}}``, where a missing
    or non-finite number becomes null; weights: provenance of the converted file, None for random initialisation;
    iterations: that the model which was judged has been trained for; eval_only: it may have been trained with another
    config; seconds: wall time of the command that ended the run; processes, accumulate: GPUs (or CPU processes), and passes
    that each split its images of an iteration into.
    """
    def percent(task, key):
        value = ap.get(task, {}).get(key)
        return float(value) if value is not None and math.isfinite(value) else None

    def version(package):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    results = {
        "engine": engine,
        "ap": {task: {key: percent(task, key) for key in AP_KEYS} for task in ("bbox", "segm")},
        "iterations": iterations,
        "eval_only": eval_only,
        "seed": cfg.SEED,
        "weights": weights,
        "config": cfg.dump(),
        "processes": processes,
        "accumulate": accumulate,
        "versions": {"python": platform.python_version(),
                     **{package: version(package) for package in ("torch", "torchvision", "detectron2")}},
        "seconds": float(seconds),
    }
    _write_json(Path(cfg.OUTPUT_DIR, "results.json"), results)
    return results


def _write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    os.replace(temporary, path)


def load_results(folder):
    """Run folder -> what :func:`write_results` wrote there. Raises InputError."""
    path = Path(folder, "results.json")
    try:
        results = json.loads(path.read_text())
        missing = {"engine", "ap", "iterations", "eval_only", "seed", "weights", "config", "seconds"} - set(results)
        if missing or not {"bbox", "segm"} <= set(results["ap"]):
            raise ValueError(f"lacks {', '.join(sorted(missing)) or 'bbox or segm APs'}")
        protocol_of(yaml.safe_load(results["config"]))
        return results
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
        raise InputError(f"{path} does not hold a run's results ({reason}): tools/train_net.py writes it "
                         "when a run ends") from None


TRAINING = "training.json"  # in OUTPUT_DIR, from the first iteration on: the weights' provenance, and the config
# Settings that may change when a run goes on, or when what it has trained is evaluated again.
EVALUATION = re.compile(r"OUTPUT_DIR|MODEL\.WEIGHTS|VIS_PERIOD|MODEL\.DEVICE|SOLVER\.CHECKPOINT_PERIOD|DATALOADER\..*|"
                        r"DATASETS\.TEST|TEST\.(?!PRECISE_BN).*|.*_TEST")


def begin_training(cfg, weights):
    """Leave the provenance of a run's ``weights`` (None: random) and its config beside the checkpoints to come; those of
    a run before it are no longer what it could go on from. Its results stay until this run has its own."""
    Path(cfg.OUTPUT_DIR, "last_checkpoint").unlink(missing_ok=True)
    _write_json(Path(cfg.OUTPUT_DIR, TRAINING), {"weights": weights, "config": cfg.dump()})


def read_training(folder):
    """What :func:`begin_training` left in ``folder``, or None. Raises InputError."""
    path = Path(folder, TRAINING)
    if not path.is_file():
        return None
    try:
        training = json.loads(path.read_text())
        settings(training["config"], EVALUATION)
        return {"weights": training["weights"], "config": training["config"]}
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
        raise InputError(f"{path} is not what tools/train_net.py writes when a run begins: restore it, or give another "
                         "OUTPUT_DIR") from None


def difference(cfg):
    """Words for the first setting on which ``cfg`` and the training in ``cfg.OUTPUT_DIR`` disagree, None where there is
    none. The training set is known by its files' names, for it may lie elsewhere on another machine."""
    def plain(key, value):
        return [name.split("::")[0].split("/")[-1] for name in value] if key == "DATASETS.TRAIN" else value

    training = read_training(cfg.OUTPUT_DIR)
    before = settings(training["config"], EVALUATION) if training else {}
    return next((f"{key} {before[key]} and not {value}" for key, value in settings(cfg.dump(), EVALUATION).items()
                 if key in before and plain(key, before[key]) != plain(key, value)), None)


def check_unchanged(cfg):
    """Raises InputError where the training in ``cfg.OUTPUT_DIR`` began with other settings: what goes on from its
    checkpoints keeps some of them, such as the learning rate, and would be given others that it never had."""
    if found := difference(cfg):
        raise InputError(f"the run in {cfg.OUTPUT_DIR} began with {found}: give another OUTPUT_DIR, or leave the key as "
                         "it was")


def trained_with(cfg):
    """Whether the training in ``cfg.OUTPUT_DIR`` is known to have had the settings of ``cfg``."""
    return read_training(cfg.OUTPUT_DIR) is not None and difference(cfg) is None


def settings(config, without):
    """A dumped config -> {"SOLVER.BASE_LR": 0.02, ...} but for keys that match ``without``."""
    def leaves(node, prefix=""):
        for key, value in node.items():
            yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else ((prefix + key, value),)

    return {key: value for key, value in leaves(yaml.safe_load(config)) if not without.fullmatch(key)}
