"""Forms have the areas that geometry gives, and a canvas exact masks."""

import math

import numpy as np
import pytest

from rsa_detectron2.transfer.data.shapes import FORMS, MIN_VISIBLE_PIXELS, Canvas, signed_distance

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


def paint(seed, forms, size=96):
    """Forms at random places: image, masks, and which of them have one."""
    rng = np.random.default_rng(seed)
    canvas = Canvas(np.full((size, size, 3), 60, np.float32))
    for form in forms:
        place = (*rng.uniform(0.12, 0.88, 2), rng.uniform(0.11, 0.28), rng.uniform(0, 6))
        canvas.paint(form, place, np.full((size, size, 3), rng.uniform(90, 240, 3)))
    return canvas.finish(rng)


@pytest.mark.parametrize("form", AREAS)
@pytest.mark.parametrize("angle", [0.0, 0.7])
def test_area_is_the_analytic_one(form, angle):
    inside = signed_distance(form, 256, x=127.3, y=128.9, radius=100.0, angle=angle) < 0
    assert inside.sum() == pytest.approx(AREAS[form] * 100**2, rel=0.01)


@pytest.mark.parametrize("form", FORMS)
def test_forms_lie_within_their_radius_and_have_soft_edges_in_pixels(form):
    distance = signed_distance(form, 128, x=64.0, y=64.0, radius=50.0, angle=0.3)
    row, column = np.nonzero(distance < 0)
    assert np.hypot(row + 0.5 - 64, column + 0.5 - 64).max() <= 1.1 * 50
    # About a distance: neighboring pixels differ by at most one pixel's diagonal, so outlines are
    # one pixel soft.
    assert max(np.abs(np.diff(distance, axis=axis)).max() for axis in (0, 1)) < 1.01


def test_masks_are_disjoint_and_later_shapes_are_on_top():
    for seed in range(20):
        forms = [list(FORMS)[seed % len(FORMS)], "square", "triangle", "star", "circle"]
        image, masks, shown = paint(seed, forms)
        assert image.shape == (96, 96, 3) and image.dtype == np.uint8
        assert masks.shape == (len(shown), 96, 96) and masks.dtype == bool and shown.dtype == np.int64
        assert masks.sum(0).max() == 1 and masks.sum((1, 2)).min() >= MIN_VISIBLE_PIXELS
        # The last shape hides others and is not hidden: it is a whole disc, cut only by the border.
        assert shown[-1] == 4
        rows, columns = np.nonzero(masks[-1])
        if min(rows.min(), columns.min()) > 0 and max(rows.max(), columns.max()) < 95:
            width = columns.max() - columns.min() + 1
            assert masks[-1].sum() == pytest.approx(math.pi / 4 * width**2, rel=0.1)


def test_masks_lie_where_the_picture_changes():
    for seed in range(10):
        image, masks, _ = paint(seed, ["circle", "square", "triangle"], 128)
        ids = (masks * np.arange(1, len(masks) + 1)[:, None, None]).sum(0)
        for axis in (0, 1):
            step = np.abs(np.diff(image.astype(float), axis=axis)).sum(-1)
            edge = np.diff(ids, axis=axis) != 0
            assert step[edge].mean() > 3 * step[~edge].mean()


def test_an_almost_hidden_shape_has_no_mask():
    # Twenty shapes on a small picture: some must be covered.
    _, masks, shown = paint(0, ["circle"] * 20, 48)
    assert len(masks) == len(shown) < 20
