"""A rehearsal: the commands of tools/reproduce.py with a few steps on a few images, and the full runs' cost.

Recipe, readers, networks, evaluation and report are those of the full run. On a CPU, batch and images
are smaller, too.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from fvcore.common.config import CfgNode

from rsa_detectron2.common.config import CONFIGS
from rsa_detectron2.common.distributed import amp_dtype
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.tables import to_markdown
from rsa_detectron2.pretrain.config import get_cfg
from rsa_detectron2.pretrain.data import standins
from rsa_detectron2.pretrain.engine import memory as micro_batch
from rsa_detectron2.pretrain.method.networks import build_backbone, build_networks
from rsa_detectron2.pretrain.method.objectives import METHODS
from rsa_detectron2.transfer.config import BYTES_PER_IMAGE, REFERENCE_GPUS, RGB_IMAGENET
from rsa_detectron2.transfer.convert.writers import ENCODERS
from rsa_detectron2.transfer.data import drawn
from rsa_detectron2.transfer.data.annotations import COCO_2017, locate_dataset
from rsa_detectron2.transfer.report import paper
from rsa_detectron2.transfer.report.runs import load_results
from rsa_detectron2.transfer.report.tables import read_run

Arguments = list[str | int | Path]  # of a command

# Overrides of the full run, by the machine. Images of ImageNet stay above 64 pixels: up to that size
# tools/evaluate.py takes the protocol of the small data sets.
PRETRAIN = {"cpu": "SOLVER.BATCH_SIZE 8 SOLVER.MICRO_BATCH 8 DATA.NUM_WORKERS 1", "gpu": "DATA.NUM_WORKERS 4"}
LARGE = {"cpu": "DATA.IMAGE_SIZE 72 DATA.EVAL_RESIZE 72", "gpu": ""}
FINETUNE = {
    "cpu": "SOLVER.IMS_PER_BATCH 2 INPUT.MIN_SIZE_TRAIN (96,) INPUT.MIN_SIZE_TEST 96 "
    "TEST.PRECISE_BN.NUM_ITER 1 "
    "MODEL.RPN.POST_NMS_TOPK_TRAIN 100 MODEL.RPN.POST_NMS_TOPK_TEST 30 "
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 32 DATALOADER.NUM_WORKERS 0",
    "gpu": "TEST.PRECISE_BN.NUM_ITER 2",
}
STEPS = 2
COCO_IMAGES = {"train": 32, "val": 4}
# How a method's authors store their backbone: the key of the state dict in the file, the prefix of the
# backbone's tensors, and a tensor of the head beside them.
PYCONTRAST = ("model", "module.encoder.", "module.head.0.weight")
MOCO = ("state_dict", "module.encoder_q.", "module.encoder_q.fc.0.weight")
LAYOUTS = {"InstDis": PYCONTRAST, "PIRL": PYCONTRAST, "InfoMin": PYCONTRAST, "MoCo v1": MOCO, "MoCo v2": MOCO}


class Rehearsal:
    """What makes the commands of a plan small.

    Data sets and weights that are not there are drawn into its folder.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.machine = "gpu" if torch.cuda.is_available() else "cpu"
        self.folder = Path(args.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.drawn = []

    def data(self, name: str) -> Path:
        """The path of a data set: the user's, or that of a stand-in."""
        path = Path(paper.load()["datasets"][name]["path"])
        if path.is_dir():
            return path
        kind = "imagenet" if name == "imagenet100" else name
        folder = self.folder / "drawn" / kind
        place = folder / "train" if kind == "imagenet" else folder
        if not (folder / standins.STANDIN).is_file():
            standins.draw(kind, folder, 2 * STEPS * self.batch_size(name))
        self.drawn.append(paper.load()["datasets"][name]["title"])
        return place

    def batch_size(self, name: str) -> int:
        if self.machine == "cpu":
            return 8
        recipe = paper.load()["datasets"][name]["recipe"].format(method="rsa")
        return paper.recipe_settings(recipe).get("SOLVER.BATCH_SIZE", get_cfg().SOLVER.BATCH_SIZE)

    def pretrain(self, training: paper.Training) -> Arguments:
        limit = STEPS * self.batch_size(training.dataset)
        large = LARGE[self.machine] if training.dataset.startswith("imagenet") else ""
        return [
            "--data",
            self.data(training.dataset),
            *PRETRAIN[self.machine].split(),
            *large.split(),
            "DATA.LIMIT",
            limit,
            "SOLVER.EPOCHS",
            1,
            "SOLVER.WARMUP_EPOCHS",
            0,
            "KNN.PERIOD",
            0,
        ]

    def benchmark(self, name: str) -> Arguments:
        size = ["--size", 72] if name.startswith("imagenet") else []
        return ["--batch-size", 8, *size, "--steps", 1, "--repeats", 1] if self.machine == "cpu" else []

    def linear(self) -> Arguments:
        return ["--epochs", 1]

    def finetune(self, training: paper.Training) -> Arguments:
        """Data, overrides, and weights in place of those that Detectron2 would fetch."""
        coco = self.coco()
        words = [
            "--train",
            coco / "train.json",
            coco / "images",
            "--val",
            coco / "val.json",
            coco / "images",
            "SOLVER.MAX_ITER",
            STEPS,
            "SOLVER.STEPS",
            f"({STEPS - 1},)",
            "SOLVER.WARMUP_ITERS",
            1,
            *FINETUNE[self.machine].split(),
        ]
        return words + (["MODEL.WEIGHTS", self.fetched(training)] if training.weights == "config" else [])

    def coco(self) -> Path:
        """A small COCO-format data set, cut from the user's COCO or drawn: train.json, val.json, images/."""
        folder = self.folder / "drawn" / "coco"
        if (folder / "val.json").is_file():
            return folder
        try:
            for (part, count), name in zip(COCO_IMAGES.items(), COCO_2017):
                cut(*locate_dataset(name), folder, part, count)
        except InputError:
            self.drawn.append("COCO")
            for seed, (part, count) in enumerate(COCO_IMAGES.items()):
                drawn.write_coco(folder, part, count, 160, seed)
        return folder

    def fetched(self, training: paper.Training) -> Path:
        """A stand-in for weights that Detectron2 would fetch.

        A ResNet-50 of random weights, with the pixels and the stride of the real ones.
        """
        settings = training.settings
        path = self.folder / "drawn" / f"{training.name}.pkl"
        facts = {
            "source": settings["MODEL.WEIGHTS"],
            "sha256": "0" * 64,
            "format": "drawn",
            "branch": "online",
            "method": "supervised",
            "step": -1,
            **RGB_IMAGENET,
            "architecture": "resnet50",
            "pixel_mean": settings["MODEL.PIXEL_MEAN"],
            "pixel_std": settings["MODEL.PIXEL_STD"],
            "input_format": settings["INPUT.FORMAT"],
            "stride_in_1x1": settings["MODEL.RESNETS.STRIDE_IN_1X1"],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(ENCODERS["detectron2"](random_resnet50(), facts))
        return path

    def weights(self, method: str) -> Path:
        """A stand-in for the checkpoint of a method's authors, in their layout."""
        key, prefix, head = LAYOUTS.get(method, ("state_dict", "", "fc.weight"))
        path = self.folder / "drawn" / f"{paper.word(method)}.pth"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            state = {prefix + name: tensor for name, tensor in random_resnet50().items()}
            torch.save({key: {**state, head: torch.zeros(128, 2048)}}, path)
        return path

    def note(self) -> str:
        smaller = (
            "batch 8, images of ImageNet at 72 pixels, of COCO at 96"
            if self.machine == "cpu"
            else "full batches"
        )
        drawn = f"; drawn: {', '.join(dict.fromkeys(self.drawn))}" if self.drawn else ""
        return f"REHEARSAL: {STEPS} steps of each run, {smaller}{drawn}. No number here is a result."

    def estimates(self, folders: Iterable[Path]) -> str:
        """A Markdown table: the GPU memory and the hours on this machine that the full runs would take."""
        lines, known = [["full run", "GPU memory (GiB)", f"hours on this {self.machine.upper()}"]], {}
        for folder in map(Path, dict.fromkeys(folders)):
            if (folder / "linear.json").is_file() or not (folder / "results.json").is_file():
                run, training = read_run(folder), find(folder.name)
                hours, memory = (
                    of_pretraining(run, training),
                    known.get(training.recipe) or gigabytes(training),
                )
                known[training.recipe] = memory
                lines.append([folder.name, f"{memory:.1f}", duration(hours)])
            else:
                training = find(folder.name)
                hours = of_fine_tuning(load_results(folder), training)
                lines.append([folder.name, f"{memory_of_fine_tuning(training):.1f}", duration(hours)])
        return to_markdown(lines)


def duration(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.1f}"


def find(name: str) -> paper.Training:
    """The training of the paper that has this name."""
    return next(
        cell.training
        for table in paper.load()["tables"]
        if paper.shows(table) != "pictures"
        for cell in paper.cells(table)
        if cell.training and cell.training.name == name
    )


def full_config(training: paper.Training) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / training.recipe))
    cfg.merge_from_list([item for pair in training.overrides for item in pair])
    return cfg


def of_pretraining(run: dict, training: paper.Training) -> float:
    """Hours that the full run would take, from the rehearsal's time per pixel of a view."""
    cfg, seen = full_config(training), run["settings"]
    images = run["step"] * seen["SOLVER.BATCH_SIZE"]
    scale = (cfg.DATA.IMAGE_SIZE / seen["DATA.IMAGE_SIZE"]) ** 2
    total = paper.load()["datasets"][training.dataset]["images"][0] * cfg.SOLVER.EPOCHS
    return run["seconds"] / images * scale * total / 3600


def of_fine_tuning(run: dict, training: paper.Training) -> float:
    """The same of a fine-tuning. The time of its evaluation is counted as that of its iterations."""
    full, seen = training.settings, run["settings"]
    scale = (max(full["INPUT.MIN_SIZE_TRAIN"]) / max(seen["INPUT.MIN_SIZE_TRAIN"])) ** 2
    images = full["SOLVER.IMS_PER_BATCH"] * full["SOLVER.MAX_ITER"]
    return run["seconds"] / (run["iterations"] * seen["SOLVER.IMS_PER_BATCH"]) * scale * images / 3600


def memory_of_fine_tuning(training: paper.Training) -> float:
    """GiB that each of the recipe's GPUs needs, by what Detectron2's model zoo states of the network."""
    return training.settings["SOLVER.IMS_PER_BATCH"] / REFERENCE_GPUS * BYTES_PER_IMAGE / 2**30


def gigabytes(training: paper.Training) -> float:
    """GiB that each of the paper's GPUs needs free for the full run.

    Counted in the same way as tools/pretrain.py chooses a micro-batch.
    """
    cfg = full_config(training)
    gpus = paper.load()["datasets"][training.dataset]["gpus"]
    networks = build_networks(cfg, METHODS[cfg.METHOD])
    count = cfg.SOLVER.MICRO_BATCH or cfg.SOLVER.BATCH_SIZE // gpus
    return micro_batch.needed(networks, cfg.DATA.IMAGE_SIZE, amp_dtype(cfg.SOLVER.AMP), count) / 2**30


def random_resnet50() -> dict[str, torch.Tensor]:
    """{torchvision's name: tensor} of an untrained ResNet-50.

    BatchNorm's statistics are not the initial ones, as in a network that was trained.
    """
    state = {}
    for name, tensor in build_backbone("resnet50").state_dict().items():
        if not name.endswith("num_batches_tracked"):
            state[name] = tensor + 0.01 if "running" in name else tensor
    return state


def cut(annotations: str | Path, images: str | Path, folder: Path, part: str, count: int) -> None:
    """Write the first ``count`` annotated images of a COCO-format data set as one of their own.

    ``folder`` gets <part>.json, and links to the images.
    """
    content = json.loads(Path(annotations).read_text())
    annotated = {annotation["image_id"] for annotation in content["annotations"]}
    content["images"] = [image for image in content["images"] if image["id"] in annotated][:count]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] in kept]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for image in content["images"]:
        place = folder / "images" / image["file_name"]
        if not place.exists():
            place.symlink_to(Path(images, image["file_name"]).resolve())
    (folder / f"{part}.json").write_text(json.dumps(content))
