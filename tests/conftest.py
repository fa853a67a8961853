"""Fixtures that tests share: command lines of the tools, small images, a ResNet-50 checkpoint."""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: tests expect the results of a CPU

import numpy as np
import pytest
import torch
from PIL import Image

from rsa_detectron2.pretrain.config import get_cfg

ROOT = Path(__file__).resolve().parents[1]
# A run of a second: timm's smallest ResNet, and three epochs of the 24 images of ``image_folder``.
TINY = (
    "DATA.IMAGE_SIZE 32 DATA.EVAL_RESIZE 32 DATA.NUM_WORKERS 0 "
    "MODEL.BACKBONE test_resnet MODEL.HIDDEN_DIM 32 MODEL.OUT_DIM 8 "
    "SOLVER.OPTIMIZER sgd SOLVER.BASE_LR 1.0 SOLVER.BATCH_SIZE 8 SOLVER.EPOCHS 3 SOLVER.WARMUP_EPOCHS 1 "
    "SOLVER.AMP off LOG_PERIOD 1 CHECKPOINT.KEEP_PERIOD 1 KNN.PERIOD 0 HEALTH.IMAGES 0"
).split()

# Programs under test are forked from a server that has already imported torch, which is faster.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.preload"])

# One thread: with small tensors, threads only wait for each other, and runs must be equal to the bit.
os.environ["OMP_NUM_THREADS"] = "1"  # for the programs under test
# Keep activations in huge pages (glibc >= 2.35): on some virtual machines page faults take half of a step.
os.environ["GLIBC_TUNABLES"] = ":".join(
    f"glibc.malloc.{option}"
    for option in ("hugetlb=1", f"mmap_threshold={1 << 32}", f"trim_threshold={1 << 33}")
)
torch.set_num_threads(1)


def tiny_cfg(image_folder, folder, *overrides):
    """The configuration :data:`TINY` on ``image_folder``, with its output in ``folder``/run."""
    cfg = get_cfg()
    cfg.merge_from_list(
        ["DATA.PATH", str(image_folder), "OUTPUT_DIR", str(folder / "run"), *TINY, *overrides]
    )
    return cfg


def rsa_networks(backbone, hidden_dim, out_dim):
    """RSA's networks around a backbone."""
    from rsa_detectron2.pretrain.method.networks import Networks
    from rsa_detectron2.pretrain.method.objectives import METHODS

    model = get_cfg().MODEL
    model.HIDDEN_DIM, model.OUT_DIM = hidden_dim, out_dim
    return Networks(backbone, METHODS["rsa"], model)


def final_weights(path):
    return torch.load(path, weights_only=True)["model"]


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:
        reasons = sorted({report.longrepr[2] for report in skipped if isinstance(report.longrepr, tuple)})
        terminalreporter.write_line(f"{len(skipped)} skipped: {'; '.join(reasons)}")


class Program:
    """``python3 tools/<name>.py arguments...``, started at once in a new session.

    stdout and stderr go to new files in ``folder``. ``environment`` adds to the server's.
    """

    def __init__(self, folder, name, *arguments, cwd=ROOT, environment=None):
        self.command = [str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
        self.streams = [Path(tempfile.mkstemp(dir=folder)[1]) for _ in range(2)]
        self.process = processes.Process(
            target=run_program, args=(self.command, cwd, environment or {}, self.streams)
        )
        self.process.start()

    def wait_for(self, path, text=""):
        """Wait until the file contains the text or the program has ended."""
        until = time.monotonic() + 900
        while (
            self.process.is_alive()
            and time.monotonic() < until
            and not (path.is_file() and text.encode() in path.read_bytes())
        ):
            time.sleep(0.01)

    def finish(self):
        """Wait for the end; returns a CompletedProcess."""
        self.process.join(900)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(" ".join(self.command))
        return subprocess.CompletedProcess(
            self.command, self.process.exitcode, *(stream.read_text() for stream in self.streams)
        )


def run_program(command, cwd, environment, streams):
    os.setsid()
    os.chdir(cwd)
    os.environ.update(environment)
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_APPEND), number)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


@pytest.fixture(scope="session", autouse=True)
def torch_starts_processes_from_the_server():
    """Those that torch, its launcher and Detectron2 would spawn each import torch anew. In a :class:`Program`
    they still do."""
    module = sys.modules["torch.multiprocessing.spawn"]  # the package has a function of this name
    start = module.start_processes

    def from_the_server(fn, args=(), nprocs=1, join=True, daemon=False, start_method="spawn"):
        return start(fn, args, nprocs, join, daemon, start_method="forkserver")

    with pytest.MonkeyPatch.context() as patch:
        for place in (module, torch.multiprocessing):
            patch.setattr(place, "start_processes", from_the_server)
        yield


@pytest.fixture(scope="session")
def tool(tmp_path_factory):
    """``tool("pretrain", "--data", ...)`` runs a tool as a user does, in the folder ``cwd``."""
    folder = tmp_path_factory.mktemp("tools")
    return lambda name, *arguments, cwd=ROOT: Program(folder, name, *arguments, cwd=cwd).finish()


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """24 random images of several sizes in two classes, some of them grayscale, with val/ beside train/."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(24):
            height, width = rng.integers(40, 90, 2)
            pixels = rng.integers(
                0, 256, (height, width) if i % 5 == 0 else (height, width, 3), dtype=np.uint8
            )
            path = root / split / ("a" if i % 2 else "b") / f"{i:02d}.{'png' if i % 3 else 'jpg'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return root / "train"


@pytest.fixture(scope="session")
def resnet50_checkpoint(tmp_path_factory):
    """model_final.pth of an untrained ResNet-50 whose BatchNorm statistics are not the initial ones."""
    from rsa_detectron2.pretrain.method.networks import build_backbone

    torch.manual_seed(0)
    networks = rsa_networks(build_backbone("resnet50"), 64, 16)
    with torch.no_grad():
        for name, tensor in networks.state_dict().items():
            if "running_mean" in name or name.endswith("bias"):
                tensor.normal_(0, 0.1)
            elif "running_var" in name or name.endswith(
                ("bn1.weight", "bn2.weight", "bn3.weight", "downsample.1.weight")
            ):
                tensor.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("checkpoint") / "model_final.pth"
    torch.save(
        {
            "format": "rsa-pretraining",
            "method": "rsa",
            "step": 7,
            "config": "",
            "model": networks.state_dict(),
        },
        path,
    )
    return path


@pytest.fixture
def tiny_coco(tmp_path):
    """Three images: one with a polygon and an RLE mask, one with a crowd, one with nothing. Category ids have
    gaps."""
    square = [1, 1, 5, 1, 5, 5, 1, 5]
    annotations = [
        {
            "id": 1,
            "image_id": 4,
            "category_id": 3,
            "bbox": [1, 1, 4, 4],
            "area": 16,
            "iscrowd": 0,
            "segmentation": [square],
        },
        {
            "id": 2,
            "image_id": 4,
            "category_id": 90,
            "bbox": [0, 0, 8, 6],
            "area": 48,
            "iscrowd": 0,
            "segmentation": {"size": [6, 8], "counts": [0, 48]},
        },
        {
            "id": 3,
            "image_id": 9,
            "category_id": 3,
            "bbox": [0, 0, 8, 6],
            "area": 48,
            "iscrowd": 1,
            "segmentation": {"size": [6, 8], "counts": [0, 48]},
        },
    ]
    images = [{"id": i, "file_name": f"{i}.png", "height": 6, "width": 8} for i in (4, 9, 11)]
    for image in images:
        Image.new("RGB", (8, 6)).save(tmp_path / image["file_name"])
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 90, "name": "b"}, {"id": 3, "name": "a"}],
    }


def write_json(content, folder, name="a.json"):
    (folder / name).write_text(json.dumps(content))
    return folder / name
