"""The data sets in Detectron2: how they are registered, read and sampled."""

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import detectron2.utils.comm as comm
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, get_detection_dataset_dicts
from detectron2.structures import BoxMode

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.transfer.data.annotations import load_datasets
from rsa_detectron2.transfer.data.keypoints import keypoint_metadata
from rsa_detectron2.transfer.data.masks import to_rle

NUM_WORKERS = "DATALOADER.NUM_WORKERS"  # the key, for messages


class Mapper(DatasetMapper):
    """DatasetMapper whose errors name the image's file.

    The augmentation of an image that :class:`Places` has given a place follows from SEED and the place alone.
    """

    def __init__(self, cfg: CfgNode, is_train: bool):
        super().__init__(cfg, is_train)
        self.seed = cfg.SEED

    def __call__(self, dataset_dict: dict) -> dict:
        place = dataset_dict.pop("place", None)
        if place is not None and self.seed >= 0:
            np.random.seed(seed_of(self.seed, place))  # which Detectron2's augmentations draw from
        try:
            return super().__call__(dataset_dict)
        except MemoryError:
            raise
        except Exception as error:  # PIL raises errors of almost any type for a damaged file
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(
                f"{dataset_dict['file_name']} cannot be used ({reason}): restore the image, or take it "
                "out of the annotation file"
            ) from error


def seed_of(*key: int) -> int:
    """A seed from 0 to 2**32 - 1 for random numbers that are a function of ``key``."""
    return int(np.random.default_rng(key).integers(2**32))


class Places(torch.utils.data.Dataset):
    """``images``, each with the place in training at which it is drawn.

    An index stands for both: place * len(images) + image.
    """

    def __init__(self, images: torch.utils.data.Dataset):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        place, image = divmod(index, len(self.images))
        return {**self.images[image], "place": place}


class Order(torch.utils.data.Sampler):
    """The indices of :class:`Places` in the order of training, from batch ``start`` on.

    ``sampler`` gives the images of this process. A batch has images of one of the ``kinds``, as Detectron2
    groups wide and high ones.
    """

    def __init__(self, sampler: Iterable[int], kinds: Sequence[int], batch_size: int, start: int):
        self.sampler, self.kinds, self.batch_size, self.start = sampler, kinds, batch_size, start
        self.rank, self.world_size = comm.get_rank(), comm.get_world_size()

    def __iter__(self) -> Iterator[int]:
        for n, batch in enumerate(self.batches()):
            if n >= self.start:
                for place, image in enumerate(batch, n * self.batch_size):
                    yield (place * self.world_size + self.rank) * len(self.kinds) + image

    def batches(self) -> Iterator[list[int]]:
        groups = {}
        for image in self.sampler:
            group = groups.setdefault(self.kinds[image], [])
            group.append(image)
            if len(group) == self.batch_size:
                yield groups.pop(self.kinds[image])


def register_datasets(cfg: CfgNode, eval_only: bool = False) -> None:
    """Register the data sets of ``cfg`` with Detectron2, which knows COCO's already.

    Training takes them from memory; COCO's metric reads the file :func:`sound_annotations`.
    """
    for name, dataset in load_datasets(cfg, eval_only, own_only=True).items():
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        if name in cfg.DATASETS.TRAIN and not eval_only:
            dicts = functools.partial(training_dicts, name, cfg)
        else:
            dicts = functools.partial(image_dicts, dataset.images, dataset.folder)
        DatasetCatalog.register(name, dicts)
        MetadataCatalog.get(name).set(
            json_file=str(sound_annotations(cfg)),
            image_root=dataset.folder,
            evaluator_type="coco",
            thing_classes=[category["name"] for category in dataset.categories],
            thing_dataset_id_to_contiguous_id={c["id"]: n for n, c in enumerate(dataset.categories)},
            **(keypoint_metadata(dataset) if cfg.MODEL.KEYPOINT_ON else {}),
        )


def categories_of(name: str) -> list[dict]:
    """COCO's [{"id": int, "name": str}] of a registered data set, in the order of the model's classes."""
    metadata = MetadataCatalog.get(name)
    places = metadata.thing_dataset_id_to_contiguous_id
    return [{"id": number, "name": metadata.thing_classes[place]} for number, place in places.items()]


def sound_annotations(cfg: CfgNode) -> Path:
    """Path of the annotations that a run is evaluated on: those of the test set, after the checks mended
    them."""
    return Path(cfg.OUTPUT_DIR, "inference", "annotations.json")


def image_dicts(images: list[dict], folder: str) -> list[dict]:
    """Detectron2's dicts of images, in new lists, without annotations."""
    return [
        {
            "file_name": os.path.join(folder, image["file_name"]),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
        }
        for image in images
    ]


def validation_dicts(cfg: CfgNode) -> list[dict]:
    """Detectron2's dicts of the test set, with the objects of its images."""
    (name,) = cfg.DATASETS.TEST
    if name in load_datasets(cfg, own_only=True):
        return training_dicts(name, cfg)
    return get_detection_dataset_dicts(name, filter_empty=False)


def training_dicts(name: str, cfg: CfgNode) -> list[dict]:
    """Detectron2's dicts of a data set, with the objects that are trained on."""
    dataset = load_datasets(cfg, own_only=True)[name]
    classes = {category["id"]: n for n, category in enumerate(dataset.categories)}
    found = image_dicts(dataset.images, dataset.folder)
    for image, entry in zip(dataset.images, found):
        entry["annotations"] = []
        for _, annotation in dataset.objects(image, cfg.MODEL.MASK_ON):
            target = {
                "iscrowd": 0,
                "bbox": annotation["bbox"],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": classes[annotation["category_id"]],
            }
            mask = annotation["segmentation"]
            if cfg.MODEL.MASK_ON and isinstance(mask, dict):
                mask = to_rle(mask, image["height"], image["width"])
            if cfg.MODEL.MASK_ON:
                target["segmentation"] = mask
            # COCO's keypoints are indices of pixels; Detectron2 wants the pixels' centers.
            if cfg.MODEL.KEYPOINT_ON and annotation.get("keypoints"):
                target["keypoints"] = [
                    value if n % 3 == 2 else value + 0.5 for n, value in enumerate(annotation["keypoints"])
                ]
            entry["annotations"].append(target)
    return found
