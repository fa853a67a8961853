"""What the output folder of a run holds of it, and the images that it goes on with."""

from dataclasses import dataclass
from pathlib import Path

from fvcore.common.config import CfgNode

from rsa_detectron2.common import distributed
from rsa_detectron2.pretrain.data import identity
from rsa_detectron2.pretrain.data.bad_images import BadImages
from rsa_detectron2.pretrain.data.datasets import images_of
from rsa_detectron2.pretrain.engine import checkpoint
from rsa_detectron2.pretrain.engine.initial import Initial, Reader, find_initial


@dataclass
class Past:
    """What the output folder holds of the run so far, and the weights that the run started from."""

    saved: dict | None  # the newest checkpoint
    known: dict | None  # the newest checkpoint or, without one, model_final.pth
    complete: bool  # whether model_final.pth is there
    micro_batch_size: int  # 0 if none was chosen
    same_path: bool  # whether DATA.PATH is the same
    initial: Initial


def find_past(cfg: CfgNode, reader: Reader | None) -> Past:
    """What ``cfg.OUTPUT_DIR`` holds. Raises InputError for a run of another configuration, or a damaged
    one."""
    folder = Path(cfg.OUTPUT_DIR)
    path = distributed.from_first(checkpoint.newest(folder) if distributed.rank() == 0 else None)
    saved = checkpoint.load(path) if path else None
    complete = distributed.from_first((folder / checkpoint.FINAL).is_file())
    known = saved or checkpoint.finished(folder)
    newest = folder / checkpoint.FINAL if complete else path
    micro_batch_size, same_path = checkpoint.compare_run(cfg, known, newest)
    return Past(saved, known, complete, micro_batch_size, same_path, find_initial(cfg, known, reader))


def open_data(cfg: CfgNode, past: Past) -> BadImages:
    """The images to train on, and the list of those that cannot be decoded. Raises InputError."""
    folder = Path(cfg.OUTPUT_DIR)
    images = images_of(cfg.DATA)
    identity.check_same_everywhere(images)
    bad_images = BadImages(folder / "bad_images.txt", images, cfg.DATA.MAX_BAD)
    if past.known:
        bad_images.removed = identity.recognize(images, past.known, bad_images.listed(), folder)
    return bad_images
