"""COCO-format data sets as training targets. Needs only pycocotools, not Detectron2."""

from pathlib import Path

import torch
from pycocotools import mask as rle

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.transfer.data.dataset import Dataset
from rsa_detectron2.transfer.data.images import read_image
from rsa_detectron2.transfer.data.masks import to_rle


class CocoInstances:
    """A data set to train on; ``self[index, flip]`` is (image uint8 [3, H, W], target), mirrored if ``flip``.

    target: boxes float32 [N, 4] (x0, y0, x1, y1 in pixels), labels int64 [N] from 1 in the order of the
    categories and, with ``masks``, masks uint8 [N, H, W]; N may be 0. training: leave out images without
    objects, if ``filter_empty``. Raises InputError.
    """

    def __init__(self, dataset: Dataset, training: bool, masks: bool = True, filter_empty: bool = True):
        self.dataset, self.masks = dataset, masks
        self.categories = [category["id"] for category in dataset.categories]
        self.images = {image["id"]: image for image in dataset.images}
        kept = [
            image
            for image in dataset.images
            if not (training and filter_empty) or dataset.objects(image, masks)
        ]
        self.ids = [image["id"] for image in kept]
        if not self.ids:
            raise InputError(f"{dataset.path} has no image" + training * " with a usable annotation")

    def image(self, image_id: int) -> torch.Tensor:
        """Image id -> uint8 [3, H, W], RGB, upright."""
        info = self.images[image_id]
        path = Path(self.dataset.folder, info["file_name"])
        image = read_image(path)
        size = image.shape[1], image.shape[0]
        if size != (info["width"], info["height"]):
            raise InputError(
                f"{path} is {size}, but {self.dataset.path} says {info['width'], info['height']}:"
                " correct its width and height there"
            )
        return torch.from_numpy(image).permute(2, 0, 1)

    def __getitem__(self, key: tuple[int, bool]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        index, flip = key
        image, objects = (
            self.image(self.ids[index]),
            self.dataset.objects(self.images[self.ids[index]], self.masks),
        )
        target = {
            "boxes": torch.tensor([box for box, _ in objects], dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(
                [self.categories.index(annotation["category_id"]) + 1 for _, annotation in objects],
                dtype=torch.int64,
            ),
        }
        if self.masks:
            target["masks"] = torch.zeros(len(objects), *image.shape[1:], dtype=torch.uint8)
            for mask, (_, annotation) in zip(target["masks"], objects):
                mask.copy_(torch.from_numpy(rle.decode(to_rle(annotation["segmentation"], *mask.shape))))
        if flip:
            image = image.flip(-1)
            target["boxes"][:, [0, 2]] = image.shape[-1] - target["boxes"][:, [2, 0]]
            if self.masks:
                target["masks"] = target["masks"].flip(-1)
        return image, target
