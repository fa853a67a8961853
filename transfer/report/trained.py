"""A fine-tuned model, and what is known of it: its engine, its configuration and its classes."""

import json
from dataclasses import dataclass
from pathlib import Path

from fvcore.common.config import CfgNode

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.transfer.config import classes_key, value_of
from rsa_detectron2.transfer.convert.files import local_file, open_checkpoint
from rsa_detectron2.transfer.data.annotations import locate_categories
from rsa_detectron2.transfer.report.run_folder import TRAINING, checkpoints


@dataclass(frozen=True)
class Trained:
    """A model and the record of its run (common/record.py)."""

    path: Path
    record: dict

    @property
    def engine(self) -> str:
        """ "detectron2" or "torchvision"."""
        return self.record["engine"]

    def merge_into(self, cfg: CfgNode) -> CfgNode:
        """``cfg``, the engine's default configuration, with the settings of the run. Raises InputError."""
        try:
            cfg.merge_from_other_cfg(cfg.load_cfg(self.record["config"]))
        except Exception as error:  # yacs and PyYAML raise many kinds
            reason = " ".join(str(error).split())
            raise InputError(
                f"{self.path} was trained with settings that do not fit this version ({reason}): use the "
                "versions of its training"
            ) from None
        return cfg

    def categories(self, cfg: CfgNode) -> list[dict]:
        """[{"id": int, "name": str}] in the order of the classes of ``cfg``'s model.

        They are those of the record, else of the training set, if that is on this machine, else "class 1",
        "class 2", ...
        """
        count = value_of(cfg, classes_key(cfg))
        found = self.record.get("categories") or []
        if not found and cfg.DATASETS.TRAIN:
            try:
                found = locate_categories(cfg.DATASETS.TRAIN[0])[1]
            except InputError:
                pass
        if len(found) == count:
            return found
        return [{"id": n, "name": f"class {n}"} for n in range(1, count + 1)]


def find_trained(path: str | Path) -> Trained:
    """The fine-tuned model ``path``: a file, or the OUTPUT_DIR of a run, whose last model is taken.

    Its record is in the file itself, else in the training.json beside it. A model of stock Detectron2 has
    only a config.yaml beside it. Raises InputError. Never runs code of the file.
    """
    path = Path(path)
    if path.is_dir():
        if not (models := checkpoints(path)):
            raise InputError(f"{path} holds no model (model_*.pth): give the OUTPUT_DIR of a fine-tuning")
        path = models[0]
    local_file(path, f"no model {path}: give one that tools/train_net.py has fine-tuned, or its OUTPUT_DIR")
    with open_checkpoint(path) as contents:
        record = contents.get("run") if type(contents) is dict else None
    if record is None:
        record = _beside(path.parent)
    if not (
        isinstance(record, dict)
        and record.get("engine") in ("detectron2", "torchvision")
        and isinstance(record.get("config"), str)
    ):
        raise InputError(
            f"{path} does not say how it was trained, and no {TRAINING} or config.yaml beside it does: give "
            "a model of tools/train_net.py, in the folder of its run"
        )
    return Trained(path, record)


def _beside(folder: Path) -> object:
    """The record of the run in ``folder``, or None."""
    try:
        if (folder / TRAINING).is_file():
            return json.loads((folder / TRAINING).read_text())
        return {"engine": "detectron2", "config": (folder / "config.yaml").read_text()}
    except (OSError, ValueError):
        return None
