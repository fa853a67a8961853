"""Each aggressive operation against torchvision's functional, the weak stage against its transform."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from rsa_detectron2.pretrain.method.augment import (
    FACTORS,
    GRAY,
    NUM_PARAMS,
    ORDER,
    SIGMA,
    Output,
    aggressive,
    draw_crop,
    draw_params,
    normalize,
    to_float,
    weak,
    weak_view,
)

ADJUST = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]


@pytest.fixture(scope="module")
def views():
    """Smooth, saturated, gray and black images: hue is undefined on the last two."""
    rng = np.random.default_rng(0)
    smooth = TF.resize(
        torch.from_numpy(rng.integers(0, 256, (12, 2, 3, 5, 5), dtype=np.uint8)).flatten(0, 1), [32, 32]
    )
    images = smooth.view(12, 2, 3, 32, 32).contiguous()
    images[1] = torch.from_numpy(rng.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8))
    images[2] = images[2, :, :1]
    images[3] = 0
    return images


def off():
    params = torch.zeros(NUM_PARAMS)
    params[ORDER] = -1
    return params


def reference(image, params):
    """A uint8 image [3, H, W], through torchvision's functionals in the drawn order, in float."""
    image = image.float() / 255
    for operation in params[ORDER].int().tolist():
        if operation >= 0:
            image = ADJUST[operation](image, params[operation].item())
    if params[GRAY]:
        image = TF.rgb_to_grayscale(image, 3)
    return TF.gaussian_blur(image, 13, params[SIGMA].item()) if params[SIGMA] else image


def test_off_is_the_weak_view_exactly(views):
    assert torch.equal(aggressive(views, off().expand(12, 2, -1)), to_float(views))


def test_every_sample_equals_torchvision(views):
    params = torch.stack([draw_params(np.random.default_rng(i)) for i in range(24)]).view(12, 2, -1)
    result = aggressive(views, params)
    assert result.dtype == torch.float32 and result.shape == views.shape
    for i in range(12):
        for v in range(2):
            error = (result[i, v] - reference(views[i, v], params[i, v])).abs().max()
            assert error < 1e-4, (i, v, params[i, v])


def apply_one(views, **settings):
    """The views, float32 [24, 3, H, W], after one operation with its strength, or grayscale, or blur."""
    params = off()
    for name, value in settings.items():
        if name in ("gray", "sigma"):
            params[{"gray": GRAY, "sigma": SIGMA}[name]] = value
        else:
            operation = [f"adjust_{name}" == adjust.__name__ for adjust in ADJUST].index(True)
            params[operation], params[ORDER.start] = value, operation
    return aggressive(views, params.expand(12, 2, -1)).flatten(0, 1)


@pytest.mark.parametrize(
    "name, operation, factors",
    [
        ("brightness", TF.adjust_brightness, (0.6, 1.0, 1.4)),
        ("contrast", TF.adjust_contrast, (0.6, 1.0, 1.4)),
        ("saturation", TF.adjust_saturation, (0.6, 1.0, 1.4)),
        ("hue", TF.adjust_hue, (-0.3, -0.1, 0.0, 0.1, 0.2, 0.5)),
    ],
)
def test_operation_equals_torchvision(views, name, operation, factors):
    """Float images are equal; on uint8 torchvision truncates the luma and then the result, by at most
    1.4/255.
    """
    images = views.flatten(0, 1)
    for factor in factors:
        result = apply_one(views, **{name: factor})
        assert (result - operation(to_float(images), factor)).abs().max() <= 1e-5
        assert (result - operation(images, factor).float() / 255).abs().max() <= 1.4 / 255 + 1e-6


@pytest.mark.parametrize("orders", [list(permutations(range(4)))[i::4] for i in range(4)])
def test_every_order_equals_torchvision_at_the_strongest(views, orders):
    """Strong factors, so that each operation clamps; all views take the same order."""
    for order in orders:
        for factors in ((1.4, 1.4, 1.4, 0.1), (0.6, 1.4, 0.6, -0.1), (1.4, 0.6, 1.4, -0.1)):
            params = off()
            params[FACTORS], params[ORDER] = torch.tensor(factors), torch.tensor(order).float()
            result = aggressive(views, params.expand(12, 2, -1))
            for image, view in zip(views.flatten(0, 1), result.flatten(0, 1)):
                assert (view - reference(image, params)).abs().max() < 1e-5, (order, factors)


def test_grayscale_equals_torchvision_on_uint8(views):
    images = views.flatten(0, 1)
    result = apply_one(views, gray=1)
    assert (result - TF.rgb_to_grayscale(images, 3).float() / 255).abs().max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.3, 2.0])
def test_blur_is_a_gaussian(views, sigma):
    """Compared with a kernel that is wide enough for all of the Gaussian; what lies beyond three sigma may
    make a difference of 2/255. Images need not be square.
    """
    for part in (views, views[..., :20, :]):
        images = to_float(part.flatten(0, 1))
        result = apply_one(part, sigma=sigma)
        assert (result - TF.gaussian_blur(images, 31 if part is views else 13, sigma)).abs().max() <= 2 / 255


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_is_normalized_rounded_and_channels_last(views, dtype):
    """What is handed over is the plain result, normalized and rounded once; each [:, i] is in the layout of
    the convolutions.
    """
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    params = torch.stack([draw_params(np.random.default_rng(i)) for i in range(24)]).view(12, 2, -1)
    output = Output(mean, std, dtype)
    for result, images in (
        (weak(views, output), to_float(views)),
        (aggressive(views, params, output), aggressive(views, params)),
    ):
        assert result.dtype == dtype and result.shape == views.shape
        assert all(result[:, i].is_contiguous(memory_format=torch.channels_last) for i in (0, 1))
        expected = normalize(images, mean, std)
        assert (result.float() - expected).abs().max() <= 2 * torch.finfo(dtype).eps * 3


def test_a_view_does_not_depend_on_the_others(views):
    params = torch.stack([draw_params(np.random.default_rng(i)) for i in range(24)]).view(12, 2, -1)
    together = aggressive(views, params)
    for i in range(12):
        alone = aggressive(views[i : i + 1], params[i : i + 1])[0]
        assert (alone - together[i]).abs().max() < 1e-6


def test_normalize_equals_torchvision(views):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    torch.testing.assert_close(
        normalize(to_float(views), torch.tensor(mean), torch.tensor(std)),
        TF.normalize(to_float(views), mean, std),
    )


def test_draws_follow_the_recipe():
    """Frequencies and ranges of 20,000 draws; tolerances are over four standard errors."""
    rng = np.random.default_rng(0)
    params = torch.stack([draw_params(rng) for _ in range(20_000)])
    jittered = params[:, ORDER][:, 0] >= 0
    assert jittered.float().mean() == pytest.approx(0.8, abs=0.015)
    assert params[:, GRAY].mean() == pytest.approx(0.2, abs=0.015)
    assert (params[:, SIGMA] > 0).float().mean() == pytest.approx(0.5, abs=0.015)
    sigmas = params[:, SIGMA][params[:, SIGMA] > 0]
    assert 0.1 <= sigmas.min() < 0.11 and 1.99 < sigmas.max() <= 2.0
    factors = params[:, FACTORS]
    for column, (low, high) in enumerate([(0.6, 1.4)] * 3 + [(-0.1, 0.1)]):
        assert low <= factors[:, column].min() and factors[:, column].max() <= high
        assert factors[:, column].mean() == pytest.approx((low + high) / 2, abs=0.01)
    orders = params[jittered][:, ORDER]
    assert len(torch.unique(orders, dim=0)) == 24 and (orders.sort(1).values == torch.arange(4)).all()


@pytest.mark.parametrize("height, width", [(375, 500), (60, 300), (32, 32)])
def test_crop_boxes_are_distributed_as_torchvisions(height, width):
    """Means of position, area and aspect of 4,000 boxes, within five standard errors of
    RandomResizedCrop's.
    """
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    theirs = v2.RandomResizedCrop(8, scale=(0.2, 1.0))
    image = torch.empty(3, height, width)

    def statistics(boxes):
        top, left, h, w = np.array(boxes, float).T
        assert (
            (top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
        )
        return np.stack([top, left, h * w, np.log(w / h)])

    ours = statistics([draw_crop(rng).box(height, width) for _ in range(4000)])
    drawn = [theirs.make_params([image]) for _ in range(4000)]
    expected = statistics([(p["top"], p["left"], p["height"], p["width"]) for p in drawn])
    error = 5 * (ours.std(1) + expected.std(1)) / math.sqrt(4000) + 1e-9
    assert (np.abs(ours.mean(1) - expected.mean(1)) < error).all()


def test_weak_view_is_crop_resize_flip():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 50, 70), dtype=np.uint8))
    flips = 0

    def same(a, b):  # torch 2.6 rounds by the order of the channels in memory
        return (a.int() - b.int()).abs().max() <= 1

    for seed in range(40):
        drawn = draw_crop(np.random.default_rng(seed))
        view = weak_view(image, drawn, 24)
        top, left, h, w = drawn.box(50, 70)
        crop = TF.resize(image[:, top : top + h, left : left + w], [24, 24], antialias=True)
        flipped = same(view, TF.horizontal_flip(crop))
        assert view.dtype == torch.uint8 and flipped == drawn.flip and (flipped or same(view, crop))
        flips += flipped
    assert 10 <= flips <= 30
