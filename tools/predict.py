#!/usr/bin/env python3
"""Detect objects in images with a fine-tuned model, of either engine.

    tools/predict.py output/mask_rcnn_R50_FPN_1x photographs
    tools/predict.py model_final.pth a.jpg b.png --threshold 0.7 --output found

Writes a copy of each image with its detections drawn on it, and detections.json, a COCO-format data set
whose annotations have a score. Folders are searched with all folders in them. A file that cannot be read is
named and left out. The same command, run again, goes on where it stopped.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rsa_detectron2.common.cli import run
from rsa_detectron2.common.errors import InputError, Interrupted
from rsa_detectron2.common.files import locked, write_atomically
from rsa_detectron2.common.progress import say
from rsa_detectron2.common.signals import StopSignals
from rsa_detectron2.pretrain.data.folders import find_images, listing
from rsa_detectron2.tools.train_net import import_detectron2
from rsa_detectron2.transfer.config import torchvision_defaults
from rsa_detectron2.transfer.convert.provenance import sha256
from rsa_detectron2.transfer.data.images import read_image
from rsa_detectron2.transfer.data.masks import mask_area
from rsa_detectron2.transfer.report.detection_pictures import draw_on_copy
from rsa_detectron2.transfer.report.trained import Trained, find_trained

FILE = "detections.json"
Detect = Callable[[np.ndarray], list[dict]]  # see transfer/tv/detector.py


def main() -> None:
    args = parse()
    if not 0 <= args.threshold <= 1:
        raise InputError(f"--threshold {args.threshold}: it must lie between 0 and 1")
    output = Path(args.output)
    root, names = find_files(args.images, output)
    trained = find_trained(args.model)
    detect, categories = load(trained)
    about = {"model": sha256(trained.path), "threshold": args.threshold, "folder": str(root)}
    with locked(output, "--output"):
        found = Detections(about, categories, *read_earlier(output / FILE, about))
        try:
            unreadable = predict(detect, root, names, found, output)
        finally:
            found.save(output / FILE)
    left_out = f"; {unreadable} files left out, named above" if unreadable else ""
    print(f"{output / FILE}: {len(found.annotations)} detections in {len(found.images)} images{left_out}")
    if not found.images:
        raise InputError("no image can be read: give images, or folders of images")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="OUTPUT_DIR of a fine-tuning, or a model in it")
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        help="lowest score of a detection (default %(default)s); the config's SCORE_THRESH_TEST holds, too",
    )
    parser.add_argument(
        "--output",
        default="output/predictions",
        metavar="DIR",
        help="where to write (default %(default)s)",
    )
    return parser.parse_args()


def find_files(arguments: list[str], output: Path) -> tuple[Path, list[str]]:
    """(a folder above all images, the path of each image below it), sorted. Raises InputError."""
    paths, folders, left_out = [], [], Counter()
    for argument in map(os.path.abspath, arguments):
        folders.append(argument if os.path.isdir(argument) else os.path.dirname(argument))
        if os.path.isdir(argument):
            if output.absolute().is_relative_to(argument):
                raise InputError(f"--output {output} lies in {argument}: give a folder outside")
            files = find_images(argument)
            paths += [os.path.join(argument, name) for name in files.names]
            left_out += files.left_out
        elif os.path.isfile(argument):
            paths.append(argument)
        else:
            raise InputError(f"no image or folder {argument}: correct the path")
    if left_out:
        say(f"files left out: {listing(left_out)}")
    if not paths:
        raise InputError(f"no images in {', '.join(arguments)}: give images, or folders of images")
    root = os.path.commonpath(folders)
    return Path(root), sorted({os.path.relpath(path, root) for path in paths})


def load(trained: Trained) -> tuple[Detect, list[dict]]:
    """The model, and the categories of its classes. Raises InputError."""
    if trained.engine == "detectron2":
        _, get_cfg = import_detectron2()
        from rsa_detectron2.transfer.d2.detector import Detector

        cfg = get_cfg()
    else:
        from rsa_detectron2.transfer.tv.detector import Detector

        cfg = torchvision_defaults()
    trained.merge_into(cfg)
    return Detector(cfg, trained.path), trained.categories(cfg)


def read_earlier(path: Path, about: dict) -> tuple[list[dict], list[dict]]:
    """(images, annotations) that an earlier call wrote to ``path``, both empty where there is no such file.

    Raises InputError where they are not ``about`` the same model, threshold and folder.
    """
    if not path.exists():
        return [], []
    try:
        earlier = json.loads(path.read_text())
        if earlier["info"] == about:
            return earlier["images"], earlier["annotations"]
    except (ValueError, TypeError, KeyError):
        pass
    raise InputError(f"{path} is there already, of another model, threshold or folder: give another --output")


@dataclass
class Detections:
    """A COCO-format data set that grows by an image at a time. ``about``: the model's sha256, the threshold,
    and the folder that file names are relative to."""

    about: dict
    categories: list[dict]
    images: list[dict]
    annotations: list[dict]

    def entries(self, name: str, size: tuple[int, int], detections: list[dict]) -> tuple[dict, list[dict]]:
        """The entries of the next image, of ``size`` (H, W), and of what a model detects in it."""
        image = {"id": len(self.images) + 1, "file_name": name, "height": size[0], "width": size[1]}
        annotations = []
        for n, detection in enumerate(detections, start=len(self.annotations) + 1):
            _, _, w, h = detection["bbox"]
            mask = detection.get("segmentation")
            annotations.append(
                {
                    **detection,
                    "id": n,
                    "image_id": image["id"],
                    "category_id": self.categories[detection["category_id"]]["id"],
                    "area": mask_area(mask, *size) if mask else w * h,
                    "iscrowd": 0,
                }
            )
        return image, annotations

    def save(self, path: Path) -> None:
        """Write the data set, whole or not at all."""
        content = {
            "info": self.about,
            "images": self.images,
            "categories": self.categories,
            "annotations": self.annotations,
        }
        write_atomically(path, lambda file: file.write(json.dumps(content).encode()))


def predict(detect: Detect, root: Path, names: list[str], found: Detections, output: Path) -> int:
    """Add the detections in each image to ``found``, and draw them on a copy below ``output``.

    Images that ``found`` has already are passed over. Returns the number of files that cannot be read. Raises
    Interrupted after the image during which a signal came.
    """
    done, unreadable = {image["file_name"] for image in found.images}, 0
    names = [name for name in names if name not in done]
    interval = 0.1 if sys.stderr.isatty() else 10
    with StopSignals() as stop:
        stop.stepping = True  # what was found is saved
        for name in tqdm(names, "detecting", unit="image", dynamic_ncols=True, mininterval=interval):
            if stop.asked:
                count = f"{len(found.images)} images"
                raise Interrupted(f"stopped by {stop.name} after {count}; {stop.again} goes on")
            try:
                image = read_image(root / name)
            except InputError as error:
                say(f"left out: {error}")
                unreadable += 1
                continue
            detections = [d for d in detect(image) if d["score"] >= found.about["threshold"]]
            entry, annotations = found.entries(name, image.shape[:2], detections)
            picture = output / (name if name.lower().endswith((".jpg", ".jpeg")) else f"{name}.jpg")
            picture.parent.mkdir(parents=True, exist_ok=True)
            draw_on_copy(image, annotations, found.categories, picture)
            found.images.append(entry)
            found.annotations += annotations
    return unreadable


if __name__ == "__main__":
    run(main)
