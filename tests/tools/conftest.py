"""A model that each engine has fine-tuned for a moment."""

import json
import os
import subprocess
from types import SimpleNamespace

import pytest
from PIL import Image

from rsa_detectron2.common.config import CONFIGS, merge_config
from rsa_detectron2.tools import _steps
from rsa_detectron2.tools.train_net import import_detectron2
from rsa_detectron2.transfer.config import torchvision_defaults
from rsa_detectron2.transfer.data.annotations import dataset_name
from rsa_detectron2.transfer.data.drawn import write_coco
from tests.conftest import processes, run_program

CONFIG = str(CONFIGS / "transfer" / "quickstart_mask_rcnn_R18_FPN.yaml")
# A step of one image, after which every proposal is a detection.
SETTINGS = (
    "MODEL.DEVICE cpu SOLVER.MAX_ITER 1 SOLVER.IMS_PER_BATCH 2 SOLVER.AMP.ENABLED False TEST.EVAL_PERIOD 0 "
    "TEST.PRECISE_BN.ENABLED False DATALOADER.NUM_WORKERS 0 MODEL.ROI_HEADS.SCORE_THRESH_TEST 0 "
    "INPUT.MIN_SIZE_TRAIN (96,) INPUT.MIN_SIZE_TEST 96"
).split()


class Forked:
    """Stands for subprocess.Popen: the server of tests/conftest.py starts the tool, which is faster."""

    def __init__(self, command, env, stdout=None, **_):
        streams = [stdout.name if stdout else os.devnull] * 2
        self.process = processes.Process(target=run_program, args=(command[1:], os.getcwd(), env, streams))
        self.process.start()

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def wait(self):
        self.process.join()

    def send_signal(self, number):
        os.kill(self.process.pid, number)


@pytest.fixture
def forked_steps(monkeypatch):
    """The runner of steps starts tools as :class:`Forked`."""
    known = SimpleNamespace(Popen=Forked, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr(_steps, "subprocess", known)


@pytest.fixture(scope="session")
def coco(tmp_path_factory):
    """A folder with val.json and images/, where one image is not square and is turned by its EXIF."""
    root = tmp_path_factory.mktemp("coco")
    path = write_coco(root, "val", 4, 64, 0)
    content = json.loads(path.read_text())
    turned = content["images"][1]
    turned["height"] = 48
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != turned["id"]]
    path.write_text(json.dumps(content))
    file = root / "images" / turned["file_name"]
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    upright = Image.open(file).crop((0, 0, 64, 48))
    upright.transpose(Image.Transpose.ROTATE_90).save(file, exif=exif, quality=95)
    return root


@pytest.fixture(scope="session", params=("torchvision", "detectron2"))
def trained(request, coco, tmp_path_factory):
    """The folder of a run of each engine on ``coco``, evaluated again by --eval-only --resume."""
    if request.param == "detectron2":
        pytest.importorskip("detectron2", reason="Detectron2 is not installed")
        engine, get_cfg = import_detectron2()
        cfg = get_cfg()
    else:
        from rsa_detectron2.transfer.tv import engine

        cfg = torchvision_defaults()
    folder = tmp_path_factory.mktemp(request.param) / "run"
    data = (dataset_name(coco / "val.json", coco / "images"),)
    settings = ["MODEL.WEIGHTS", "", "OUTPUT_DIR", str(folder), "DATASETS.TRAIN", data, "DATASETS.TEST", data]
    merge_config(cfg, CONFIG, [*SETTINGS, *settings])
    engine.train(cfg.clone())
    engine.train(cfg.clone(), resume=True, eval_only=True)
    return folder
