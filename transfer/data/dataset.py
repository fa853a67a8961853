"""A COCO-format data set in memory, and the rule for which of its objects are trained on."""

import functools
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from rsa_detectron2.common.files import write_atomically
from rsa_detectron2.transfer.data.masks import has_mask, is_number, mask_area

MIN_SIDE = 0.01  # pixels: in float32 the two sides of such a box still differ, however large the image


def usable_objects(
    image: dict, annotations: list[dict], masks: bool = True
) -> list[tuple[list[float], dict]]:
    """The objects of an image that both engines train on, as [(box, annotation)].

    box: [x0, y0, x1, y1] in pixels, inside the image. An object counts if it is not a crowd, its box
    has sides of more than :data:`MIN_SIDE` inside the image and, with ``masks``, it has a polygon or a pixel
    of RLE.
    """
    found = []
    for annotation in annotations:
        if not annotation["iscrowd"] and (not masks or has_mask(annotation["segmentation"])):
            x, y, w, h = annotation["bbox"]
            box = [max(x, 0), max(y, 0), min(x + w, image["width"]), min(y + h, image["height"])]
            if min(box[2] - box[0], box[3] - box[1]) > MIN_SIDE:
                found.append((box, annotation))
    return found


@dataclass(frozen=True)
class Dataset:
    """A COCO-format data set, as :func:`transfer.data.coco_json.read_coco` makes it.

    images, annotations, categories: COCO's entries with the keys of the file, corrected. Ids are integers,
    those of annotations from 1; file_name is a path under ``folder``; iscrowd is 0 or 1; segmentation is a
    list of polygons of at least three points, RLE, or [] where there is no mask. Images and categories are
    sorted by id, and the order of the categories is that of the model's classes.

    path, folder: the annotation file, and the folder of the images.
    measurable: the file has annotations at all, unlike those of COCO's test sets.
    notes: what was corrected, in words.
    written: {id of an annotation: the id that the file has} where they differ.
    no_mask: {id of an annotation without a mask: why, a key of :data:`transfer.data.coco_json.NO_MASK`}.
    keypoints: {name of a category: the names of its keypoints, or None}.
    """

    path: str
    folder: str
    images: list[dict]
    annotations: list[dict]
    categories: list[dict]
    measurable: bool = True
    notes: tuple[str, ...] = ()
    written: dict = field(default_factory=dict)
    no_mask: dict[int, str] = field(default_factory=dict)
    keypoints: dict[str, list[str] | None] = field(default_factory=dict)

    @functools.cached_property
    def by_image(self) -> dict[int, list[dict]]:
        found = {image["id"]: [] for image in self.images}
        for annotation in self.annotations:
            found[annotation["image_id"]].append(annotation)
        return found

    def objects(self, image: dict, masks: bool = True) -> list[tuple[list[float], dict]]:
        """:func:`usable_objects` of an entry of ``images``."""
        return usable_objects(image, self.by_image[image["id"]], masks)

    def annotated(self, masks: bool = True) -> int:
        """How many images have an object to train on."""
        return sum(bool(self.objects(image, masks)) for image in self.images)

    def has_rle(self) -> bool:
        """Whether any object's mask is run-length encoded. Crowds do not count."""
        return any(isinstance(a["segmentation"], dict) and not a["iscrowd"] for a in self.annotations)

    def measured(self) -> "Dataset":
        """A copy with what COCO's metric needs.

        An annotation without an area above 0 gets that of its mask or box. A crowd without a mask gets its
        box as one.
        """
        sizes = {image["id"]: (image["height"], image["width"]) for image in self.images}
        annotations, first = [], None
        for annotation in self.annotations:
            x, y, w, h = annotation["bbox"]
            changed = {}
            if annotation["iscrowd"] and not annotation["segmentation"]:
                changed["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            area = annotation.get("area")
            if not (is_number(area) and area > 0):
                changed["area"] = (
                    mask_area(annotation["segmentation"], *sizes[annotation["image_id"]]) or w * h
                )
                first = first or annotation
            annotations.append({**annotation, **changed} if changed else annotation)
        if first is None:
            return replace(self, annotations=annotations)
        note = (
            "areas that are missing or not above 0 are taken from the masks or boxes (first:"
            f" {self.name(first)})"
        )
        return replace(self, annotations=annotations, notes=(*self.notes, note))

    def name(self, annotation: dict) -> str:
        """How messages name an annotation: by the id in its file."""
        return f"annotation {self.written.get(annotation['id'], annotation['id'])}"

    def coco(self) -> dict:
        """The content of a sound annotation file. pycocotools 2.0.9 and 2.0.10 need its ``info``."""
        categories = [
            {**each, "keypoints": names} if (names := self.keypoints.get(each["name"])) else each
            for each in self.categories
        ]
        content = {"info": {}, "images": self.images, "categories": categories}
        return {**content, "annotations": self.annotations} if self.measurable else content

    def save(self, path: str | Path) -> None:
        """Write :meth:`coco` to ``path``, whole or not at all."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(json.dumps(self.coco()).encode()))
