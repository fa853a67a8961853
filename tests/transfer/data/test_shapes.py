"""The procedural data set: exact masks, valid COCO and ImageFolder layouts, the same bytes every time."""

import colorsys
import contextlib
import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from torchvision.datasets import ImageFolder

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.method.augment import SIGMA, aggressive, draw_params
from rsa_detectron2.transfer.data.shapes import (
    CLASSES,
    COLOR_CLASSES,
    COLOR_FORMS,
    HUES,
    MIN_VISIBLE_PIXELS,
    draw_scene,
    equal_luma,
    signed_distance,
    write_coco,
    write_image_folder,
)

# Areas in closed form, at radius 1, of the outlines that shapes.py describes.
AREAS = {
    "circle": math.pi * 0.85**2,
    "square": 1.5**2,
    "triangle": 3 * math.sqrt(3) / 4,  # equilateral, circumradius 1
    "star": 10 * 0.5 * 0.45 * math.sin(math.pi / 5),  # ten triangles: middle, tip, notch
    "ring": math.pi * (0.88**2 - 0.48**2),
    "cross": 2 * 1.9 * 0.6 - 0.6**2,
    "heart": 1 + math.pi / 4,  # a unit square and two half discs of diameter 1
}


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def times(root):
    return {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def load(path):
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    return root, load(write_coco(root, "train", 12, 96, seed=3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("folder") / "train", 3, 64, seed=5)


@pytest.mark.parametrize("form", AREAS)
@pytest.mark.parametrize("angle", [0.0, 0.7])
def test_area_is_the_analytic_one(form, angle):
    inside = signed_distance(form, 256, x=127.3, y=128.9, radius=100.0, angle=angle) < 0
    assert inside.sum() == pytest.approx(AREAS[form] * 100**2, rel=0.01)


@pytest.mark.parametrize("form", CLASSES)
def test_forms_lie_within_their_radius_and_have_soft_edges_in_pixels(form):
    distance = signed_distance(form, 128, x=64.0, y=64.0, radius=50.0, angle=0.3)
    row, column = np.nonzero(distance < 0)
    assert np.hypot(row + 0.5 - 64, column + 0.5 - 64).max() <= 1.1 * 50
    # About a distance: neighboring pixels differ by at most one pixel's diagonal, so outlines are
    # one pixel soft.
    assert max(np.abs(np.diff(distance, axis=axis)).max() for axis in (0, 1)) < 1.01


def test_masks_are_disjoint_and_later_shapes_are_on_top():
    for seed in range(20):
        classes = [seed % len(CLASSES), 1, 2, 3, CLASSES.index("circle")]
        image, masks, labels = draw_scene(np.random.default_rng(seed), 96, classes)
        assert image.shape == (96, 96, 3) and image.dtype == np.uint8
        assert masks.shape == (len(labels), 96, 96) and masks.dtype == bool and labels.dtype == np.int64
        assert masks.sum(0).max() == 1 and masks.sum((1, 2)).min() >= MIN_VISIBLE_PIXELS
        # The last shape hides others and is not hidden: it is a whole disc, cut only by the border.
        assert labels[-1] == classes[-1]
        rows, columns = np.nonzero(masks[-1])
        if min(rows.min(), columns.min()) > 0 and max(rows.max(), columns.max()) < 95:
            width = columns.max() - columns.min() + 1
            assert masks[-1].sum() == pytest.approx(math.pi / 4 * width**2, rel=0.1)


def test_masks_lie_where_the_picture_changes():
    for seed in range(10):
        image, masks, _ = draw_scene(np.random.default_rng(seed), 128, [0, 1, 2])
        ids = (masks * np.arange(1, len(masks) + 1)[:, None, None]).sum(0)
        for axis in (0, 1):
            step = np.abs(np.diff(image.astype(float), axis=axis)).sum(-1)
            edge = np.diff(ids, axis=axis) != 0
            assert step[edge].mean() > 3 * step[~edge].mean()


def test_an_almost_hidden_shape_has_no_mask():
    # Twenty shapes on a small picture: some must be covered.
    _, masks, labels = draw_scene(np.random.default_rng(0), 48, [0] * 20)
    assert len(masks) == len(labels) < 20


def test_main_shape_is_the_last_class_large_and_central():
    for label in range(len(CLASSES)):
        _, masks, labels = draw_scene(np.random.default_rng(label), 64, [0, 4, label], main=True)
        assert labels[-1] == label and masks.sum((1, 2)).argmax() == len(masks) - 1
        rows, columns = np.nonzero(masks[-1])
        assert 16 < rows.mean() < 48 and 16 < columns.mean() < 48


def test_coco_annotations_describe_the_visible_pixels(coco):
    root, data = coco
    assert [c["name"] for c in data.loadCats(data.getCatIds())] == list(CLASSES)
    assert data.getCatIds() == list(range(1, len(CLASSES) + 1)) and len(data.imgs) == 12
    for n, image in enumerate(data.loadImgs(sorted(data.imgs))):
        picture = np.asarray(Image.open(root / "images" / image["file_name"]), dtype=float)
        assert picture.shape == (image["height"], image["width"], 3) == (96, 96, 3)
        annotations = data.loadAnns(data.getAnnIds(image["id"]))
        masks = np.stack([data.annToMask(a) for a in annotations])
        assert masks.sum(0).max() == 1
        for annotation, mask in zip(annotations, masks):
            rows, columns = np.nonzero(mask)
            x, y = columns.min(), rows.min()
            assert annotation["bbox"] == [x, y, columns.max() + 1 - x, rows.max() + 1 - y]
            assert annotation["area"] == mask.sum() and annotation["iscrowd"] == 0
        # Image n is a pure function of (seed, n), whatever came before it.
        rng = np.random.default_rng((3, n))
        drawn, expected, labels = draw_scene(rng, 96, rng.integers(len(CLASSES), size=rng.integers(2, 6)))
        assert (masks == expected).all() and [a["category_id"] - 1 for a in annotations] == labels.tolist()
        assert np.abs(picture - drawn).mean() < 8  # JPEG


def test_image_folder_loads_with_every_class(folder):
    data = ImageFolder(str(folder))
    assert data.classes == sorted(CLASSES) and len(data) == 3 * len(CLASSES)
    assert all(image.size == (64, 64) for image, _ in data)


def test_writing_twice_gives_the_same_bytes(coco, folder, tmp_path):
    write_coco(tmp_path / "coco", "train", 12, 96, seed=3)
    assert contents(tmp_path / "coco") == contents(coco[0])
    assert contents(write_image_folder(tmp_path / "folder", 3, 64, seed=5)) == contents(folder)


def test_another_seed_gives_other_pictures(folder, tmp_path):
    other = write_image_folder(tmp_path, 1, 64, seed=6)
    assert (other / "ring" / "0000.jpg").read_bytes() != (folder / "ring" / "0000.jpg").read_bytes()


def test_a_complete_set_is_left_alone(coco, folder):
    before = times(coco[0]) | times(folder)
    write_coco(coco[0], "train", 12, 96, seed=3)
    write_image_folder(folder, 3, 64, seed=5)
    assert times(coco[0]) | times(folder) == before


def test_other_parameters_are_refused(coco, folder):
    with pytest.raises(InputError, match="remove that folder or choose another"):
        write_image_folder(folder, 3, 64, seed=6)
    with pytest.raises(InputError, match="remove that folder or choose another"):
        write_coco(coco[0], "train", 12, 64, seed=3)


def test_a_foreign_json_is_not_overwritten(tmp_path):
    for text in ("[]", "{}", "not json"):
        (tmp_path / "train.json").write_text(text)
        with pytest.raises(InputError, match="train.json"):
            write_coco(tmp_path, "train", 1, 32, seed=0)
        assert (tmp_path / "train.json").read_text() == text


# ---- the set whose classes are pairs of a form and a color ----


def test_colors_have_one_luma_and_their_own_hue():
    """Compared with the standard library's HSV and PIL's conversion to gray."""
    colors = {name: equal_luma(hue) for name, hue in HUES.items()}
    for name, hue in HUES.items():
        assert colorsys.rgb_to_hsv(*colors[name])[0] * 360 == pytest.approx(hue, abs=1e-6)
        assert np.ptp(colors[name]) == pytest.approx(70)
        swatch = Image.fromarray(np.tile(colors[name].round().astype(np.uint8), (2, 2, 1)))
        assert abs(np.asarray(swatch.convert("L")).astype(int) - 125).max() <= 1


@pytest.mark.parametrize("form", COLOR_FORMS)
def test_grayscale_leaves_nothing_of_the_color(form):
    """Pictures that differ only in the color of their subject differ in color. Where nothing is clipped they
    are the same in gray, to 2 levels, which is the rounding of three channels."""
    for seed in range(5):
        drawn = [
            draw_scene(np.random.default_rng(seed), 64, [1, CLASSES.index(form)], True, equal_luma(hue))
            for hue in HUES.values()
        ]
        images, subject = np.stack([image for image, _, _ in drawn]), drawn[0][1][-1]
        assert all((masks[-1] == subject).all() for _, masks, _ in drawn)
        gray = images @ np.array([0.2989, 0.587, 0.114])
        inside = ~((images <= 0) | (images >= 255)).any((0, 3))
        assert (inside & subject).sum() > 0.8 * subject.sum()
        assert np.ptp(gray, axis=0)[inside].max() <= 2
        assert np.ptp(images.astype(float), axis=0).max(-1)[subject].mean() > 40


def test_share_of_aggressive_views_without_their_color():
    """The aggressive stage runs on swatches, and the hue of the result is compared: color is lost as often as
    shapes.py says. The standard error of 2000 draws around 0.307 is 0.01."""
    hues = np.array(list(HUES.values())) / 360
    rng = np.random.default_rng(0)
    params = torch.stack([draw_params(rng) for _ in range(2000)])
    params[:, SIGMA] = 0
    labels = np.arange(2000) % len(hues)
    swatches = torch.from_numpy(np.stack([equal_luma(360 * hue) for hue in hues])).round().byte()
    views = swatches[labels][:, None, :, None, None].expand(-1, 1, -1, 8, 8)
    colors = aggressive(views, params[:, None])[:, 0, :, 0, 0].numpy()
    found = np.array([colorsys.rgb_to_hsv(*color)[0] for color in colors])
    gaps = abs((found[:, None] - hues + 0.5) % 1 - 0.5)
    lost = (np.ptp(colors, axis=1) < 1e-3) | (gaps.argmin(1) != labels)
    assert lost.mean() == pytest.approx(0.2 + 0.8 * 0.8 / 6, abs=0.04)


def test_folder_of_forms_and_colors(tmp_path):
    data = ImageFolder(str(write_image_folder(tmp_path / "a", 2, 32, seed=0, colors=True)))
    assert data.classes == sorted(COLOR_CLASSES) and len(data) == 2 * 24
    pairs = {name: name.split("-") for name in data.classes}
    assert all(form in COLOR_FORMS and color in HUES for form, color in pairs.values())
    with pytest.raises(InputError, match="remove that folder or choose another"):
        write_image_folder(tmp_path / "a", 2, 32, seed=0)
    for (
        image,
        label,
    ) in data:  # the middle shows the subject: its color's largest channel is large in the mean
        color = equal_luma(HUES[pairs[data.classes[label]][1]])
        middle = np.asarray(image, dtype=float)[11:21, 11:21].mean((0, 1))
        assert np.corrcoef(middle, color)[0, 1] > 0.8


def test_an_interrupted_write_is_redone(tmp_path, monkeypatch):
    whole = write_image_folder(tmp_path / "whole", 2, 32, seed=1)
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return draw_scene(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("rsa_detectron2.transfer.data.shapes.draw_scene", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_image_folder(tmp_path / "cut", 2, 32, seed=1)
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            write_coco(tmp_path / "coco", "val", 8, 32, seed=1)
    with pytest.raises(InputError):  # leftovers must not mix with another set
        write_image_folder(tmp_path / "cut", 1, 32, seed=1)
    assert contents(write_image_folder(tmp_path / "cut", 2, 32, seed=1)) == contents(whole)
    assert not (tmp_path / "coco" / "val.json").exists()
    assert len(json.loads(write_coco(tmp_path / "coco", "val", 8, 32, seed=1).read_text())["images"]) == 8
