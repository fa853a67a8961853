"""The best of the models that a training has evaluated: model_best.pth, and best.json, which tells its AP.

A training evaluates every TEST.EVAL_PERIOD iterations. The best model is the one with the highest
TEST.BEST_METRIC, such as "bbox/AP".
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from fvcore.common.config import CfgNode

from rsa_detectron2.common.files import save_tensors, write_atomically
from rsa_detectron2.transfer.data.average_precision import AP_KEYS, finite
from rsa_detectron2.transfer.report.run_folder import BEST, FINAL, iterations_of

ABOUT_BEST = "best.json"


def metric(cfg: CfgNode, ap: dict) -> float:
    """TEST.BEST_METRIC among {"bbox": {"AP": percent, ...}, ...}; -1 where it is absent or not a number."""
    task, key = cfg.TEST.BEST_METRIC.split("/")
    value = finite(ap.get(task, {}).get(key))
    return -1.0 if value is None else value


def read_best(cfg: CfgNode) -> dict | None:
    """{"iterations": n, "metric": name, "ap": {...}} of the best model in OUTPUT_DIR, or None."""
    path = Path(cfg.OUTPUT_DIR, ABOUT_BEST)
    return json.loads(path.read_text()) if path.is_file() else None


def forget_best(cfg: CfgNode) -> None:
    """Remove what an earlier run has left in OUTPUT_DIR."""
    for name in (BEST, ABOUT_BEST):
        Path(cfg.OUTPUT_DIR, name).unlink(missing_ok=True)


def keep_if_best(cfg: CfgNode, ap: dict, iterations: int, content: Callable[[], dict]) -> None:
    """Keep the model of ``content()`` as the best one if no model before had a higher metric.

    Where the disk is full, a line says so and training goes on.
    """
    _keep(cfg, ap, iterations, lambda path: save_tensors(path, content()))


def keep_final_if_best(cfg: CfgNode, ap: dict, iterations: int) -> dict | None:
    """The same for model_final.pth, at the end of a training that has evaluated on its way; returns
    :func:`read_best`."""
    if cfg.TEST.EVAL_PERIOD <= 0:
        return None
    final = Path(cfg.OUTPUT_DIR, FINAL)

    def copy(path: Path) -> None:
        with open(final, "rb") as file:
            write_atomically(path, lambda target: shutil.copyfileobj(file, target))

    _keep(cfg, ap, iterations, copy)
    return read_best(cfg)


def _keep(cfg: CfgNode, ap: dict, iterations: int, write: Callable[[Path], None]) -> None:
    best = read_best(cfg)
    if best and metric(cfg, best["ap"]) >= metric(cfg, ap):
        return
    ap = {task: {key: finite(values.get(key)) for key in AP_KEYS} for task, values in ap.items()}
    path = Path(cfg.OUTPUT_DIR, BEST)
    about = {"iterations": iterations, "metric": cfg.TEST.BEST_METRIC, "ap": ap}
    try:
        write(path)
        text = json.dumps(about).encode()
        write_atomically(path.with_name(ABOUT_BEST), lambda file: file.write(text))
    except OSError as error:
        print(f"warning: cannot write {path} ({error.strerror or error})", file=sys.stderr, flush=True)


def is_complete(cfg: CfgNode, start: Path | None) -> bool:
    """Whether the checkpoint ``start`` is the end of the training that ``cfg`` describes."""
    if start is None or start.name != FINAL:
        return False
    done = iterations_of(start)
    return done >= cfg.SOLVER.MAX_ITER or out_of_patience(cfg, done)


def out_of_patience(cfg: CfgNode, iterations: int) -> bool:
    """Whether TEST.PATIENCE evaluations in a row have brought no better model: training should end."""
    best = read_best(cfg)
    if cfg.TEST.PATIENCE <= 0 or best is None:
        return False
    return iterations - best["iterations"] >= cfg.TEST.PATIENCE * cfg.TEST.EVAL_PERIOD
