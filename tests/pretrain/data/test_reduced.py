"""Large JPEGs are decoded at 1/2, 1/4 or 1/8 for the same crops; all other images as ever, bit for bit."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from rsa_detectron2.pretrain.data import reduced
from rsa_detectron2.pretrain.data.datasets import ImageFolder, open_images
from rsa_detectron2.pretrain.data.loader import SAMPLE_STREAM, MultiStageViews
from rsa_detectron2.pretrain.engine import trainer
from rsa_detectron2.pretrain.method.augment import Crop, draw_crop, draw_params
from rsa_detectron2.tools.benchmarks.photographs import draw_photograph
from tests.conftest import tiny_cfg

SIZE = 24
ORIENTATION = 0x0112


@pytest.fixture
def small(monkeypatch):
    """Images of test size count as large."""
    monkeypatch.setattr(reduced, "LEAST_PIXELS", 10_000)


def jpeg(pixels, **options):
    """A JPEG of uint8 pixels [H, W] or [3, H, W]."""
    buffer = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0) if pixels.ndim == 3 else pixels))
    image.save(buffer, "JPEG", **{"quality": 95, **options})
    return buffer.getvalue()


def photograph(height, width, seed=0):
    return draw_photograph(seed, height, width).numpy()


def ramps(height, width):
    """Red rises from left to right, green from top to bottom, blue is their mean."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 255 * x / width, 255 * y / height
    return np.stack([red, green, (red + green) / 2]).round().astype(np.uint8)


def folder_of(root, *files):
    root.mkdir(exist_ok=True)
    for i, data in enumerate(files):
        (root / f"{i}.jpg").write_bytes(data)
    return ImageFolder(root)


def sample(images, index, reduced_decode, size=SIZE, seed=0):
    images.reduced_decode = reduced_decode
    return MultiStageViews(images, size, seed)[0, index]


# ---- the rule ----


@pytest.mark.parametrize(
    "sides, scale",
    [
        ([(3000, 4000), (1792, 1792)], 8),
        ([(3000, 4000), (1791, 4000)], 4),
        ([(896, 3000), (3000, 4000)], 4),
        ([(3000, 4000), (2000, 895)], 2),
        ([(448, 448), (448, 448)], 2),
        ([(447, 4000), (3000, 4000)], 1),
        ([(100, 100), (3000, 4000)], 1),
    ],
)
def test_each_side_of_each_crop_keeps_the_pixels_of_a_view(sides, scale):
    assert reduced.choose_scale([(5, 7, *side) for side in sides], 224) == scale


def test_a_photograph_of_four_megapixels_is_large():
    whole = [Crop(np.zeros((10, 4)), False, (1.0, 1.0))]
    for (height, width), views in (((1999, 2000), 0), ((2000, 2000), 1), ((1600, 2500), 1)):
        data = jpeg(np.zeros((height, width), np.uint8))
        assert reduced.num_pixels(data) == height * width
        assert len(reduced.reduced_views(data, whole, SIZE) or ()) == views


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "CMYK", "progressive", "grayscale", "baseline"])
def test_only_plain_jpegs_are_reduced(small, kind):
    image, buffer = Image.fromarray(photograph(300, 400).transpose(1, 2, 0)), io.BytesIO()
    image = image.convert({"CMYK": "CMYK", "grayscale": "L"}.get(kind, "RGB"))
    image.save(buffer, kind if kind in ("PNG", "WEBP") else "JPEG", progressive=kind == "progressive")
    views = reduced.reduced_views(buffer.getvalue(), [draw_crop(np.random.default_rng(0))], SIZE)
    assert (views is not None) == (kind in ("progressive", "grayscale", "baseline"))


def test_other_images_are_the_same_to_the_bit(image_folder, tmp_path):
    """The reference draws box and flip of each view, then ``params``, from one generator."""
    for images in (ImageFolder(image_folder), folder_of(tmp_path / "large", jpeg(photograph(300, 400)))):
        for index in range(len(images)):
            on, off = (sample(images, index, switch) for switch in (True, False))
            rng, image = np.random.default_rng((0, SAMPLE_STREAM, 0, index)), images.read(index)
            for view in on["views"]:
                tries = rng.random((10, 4))
                top, left, h, w = Crop(tries, False, (0.2, 1.0)).box(*image.shape[-2:])
                crop = TF.resize(image[:, top : top + h, left : left + w], [SIZE, SIZE], antialias=True)
                crop = crop.flip(-1) if rng.random() < 0.5 else crop
                assert (view.int() - crop.int()).abs().max() <= 1  # torch 2.6 rounds by the memory's order
            params = torch.stack([draw_params(rng) for _ in range(2)])
            assert torch.equal(on["params"], params) and torch.equal(off["params"], params)
            assert torch.equal(on["views"], off["views"])
            assert on["views"].movedim(1, -1).is_contiguous()


# ---- the pixels ----


def triangle(box, side, size):
    """Weights [size, side] that resample an interval of ``side`` pixels by a triangle filter."""
    start, length = box
    step = length / size
    centers = start + (np.arange(size) + 0.5) * step
    weights = np.maximum(0, 1 - np.abs(np.arange(side) + 0.5 - centers[:, None]) / max(step, 1))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("height, width", [(300, 400), (403, 301), (333, 777), (100, 1001)])
@pytest.mark.parametrize("gray", [False, True])
def test_views_are_crops_of_libjpegs_smaller_image(small, tmp_path, height, width, gray):
    """The crops of the whole image, cut from the draft and resized in float64: within 1 of 255 levels."""
    pixels = photograph(height, width)
    data, scales = jpeg(pixels[0] if gray else pixels), set()
    images = folder_of(tmp_path / "images", data)
    for seed in range(6):
        rng = np.random.default_rng((seed, SAMPLE_STREAM, 0, 0))
        crops = [draw_crop(rng) for _ in range(2)]
        boxes = [crop.box(height, width) for crop in crops]
        scale = next((s for s in (8, 4, 2) if min(min(box[2:]) for box in boxes) / s >= SIZE), 1)
        scales.add(scale)
        draft = Image.open(io.BytesIO(data))
        draft.draft(draft.mode, (width // scale, height // scale))
        draft = np.asarray(draft.convert("RGB"), float)
        assert draft.shape[:2] == (-(-height // scale), -(-width // scale))
        for crop, (y, x, h, w), view in zip(crops, boxes, sample(images, 0, True, seed=seed)["views"]):
            down, across = (
                triangle((start / scale, length / scale), side, SIZE)
                for start, length, side in ((y, h, draft.shape[0]), (x, w, draft.shape[1]))
            )
            expected = np.einsum("ih,hwc,jw->cij", down, draft, across)
            expected = expected[..., ::-1] if crop.flip else expected
            assert scale == 1 or np.abs(view.numpy() - expected).max() <= 1
    assert scales - {1}


@pytest.mark.parametrize("orientation", range(10))
def test_views_lie_where_those_of_the_whole_image_do(small, tmp_path, orientation):
    """On ramps a view's pixel tells its place. Sides are one more than multiples of 8: the smaller image's
    last row and column stand for one pixel each, not eight. 2 levels are 4 pixels at most."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    images = folder_of(tmp_path / "images", jpeg(ramps(401, 505), exif=exif.tobytes()))
    for seed in range(6):
        on, off = (sample(images, 0, switch, seed=seed)["views"] for switch in (True, False))
        assert not torch.equal(on, off)
        inner = (on.int() - off.int())[..., 2:-2, 2:-2].abs()  # the filter sees beyond a crop's border
        assert inner.max() <= 2 and inner.float().mean() < 0.7


def test_views_of_photographs_differ_little_from_those_of_the_whole_image(small, tmp_path):
    """By 2.5 levels of 255 on average; two crops of an image differ by more than ten times as much."""
    images = folder_of(tmp_path / "images", *(jpeg(photograph(450, 600, seed)) for seed in range(4)))
    on, off = (
        torch.stack([sample(images, i, switch)["views"] for i in range(4)]).float()
        for switch in (True, False)
    )
    assert 0 < (on - off).abs().mean() < 2.5
    assert (off[:, 0] - off[:, 1]).abs().mean() > 25


def test_a_rotation_in_xmp_alone_is_ignored_as_ever(small, tmp_path):
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    plain, tagged = (
        folder_of(tmp_path / name, jpeg(ramps(401, 505), **options))
        for name, options in (("plain", {}), ("tagged", {"xmp": xmp}))
    )
    for switch in (True, False):
        assert torch.equal(sample(plain, 0, switch)["views"], sample(tagged, 0, switch)["views"])


# ---- damaged files, sources, the switch ----


def test_damaged_files_are_replaced_as_ever(small, tmp_path):
    """Cut, without its tables, and with a part overwritten: the last can be decoded, with a wrong part."""
    good = jpeg(photograph(300, 400))
    start = good.rindex(b"\xff\xda")
    cut, headless = good[: len(good) // 2], good.replace(b"\xff\xdb", b"\xff\xfe")
    overwritten = good[: start + 2000] + bytes(500) + good[start + 2500 :]
    for name, data, skipped in (("cut", cut, 1), ("headless", headless, 1), ("over", overwritten, 0)):
        found = [sample(folder_of(tmp_path / name, data, good), 0, switch) for switch in (True, False)]
        assert [one["skipped"] for one in found] == [skipped] * 2
        assert torch.equal(found[0]["params"], found[1]["params"])
        assert (found[0]["views"].float() - found[1]["views"].float()).abs().mean() < 5
    images = folder_of(tmp_path / "cut", cut, good)
    sample(images, 0, True)
    assert images.known_bad() == [0]


def test_a_damaged_exif_leaves_the_image_upright(small, tmp_path):
    exif = b"Exif\0\0MM\0*\xff\xff\xff\xff broken"
    plain, broken = (
        folder_of(tmp_path / name, jpeg(ramps(401, 505), **options))
        for name, options in (("plain", {}), ("broken", {"exif": exif}))
    )
    difference = sample(plain, 0, True)["views"].int() - sample(broken, 0, True)["views"].int()
    assert difference[..., 2:-2, 2:-2].abs().max() <= 2


def test_parquet_and_parts_of_a_folder_are_reduced_too(small, tmp_path):
    pytest.importorskip("datasets")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    files = [jpeg(photograph(300, 400, seed)) for seed in range(3)]
    images = folder_of(tmp_path / "images", *files)
    rows = pyarrow.array([{"bytes": data, "path": None} for data in files])
    (tmp_path / "table").mkdir()
    parquet.write_table(pyarrow.table({"image": rows}), tmp_path / "table/train.parquet")
    whole, expected = (sample(images, 0, switch)["views"] for switch in (False, True))
    assert not torch.equal(whole, expected)
    for source in (open_images(tmp_path / "table"), open_images(tmp_path / "images", limit=2)):
        assert torch.equal(sample(source, 0, True)["views"], expected)


@pytest.mark.parametrize("switch", [True, False])
def test_a_run_reduces_as_its_configuration_says(image_folder, tmp_path, monkeypatch, switch):
    class Views(Exception):
        def __init__(self, images, *_):
            self.reduced_decode = images.reduced_decode

    def stop(*given):
        raise Views(*given)

    monkeypatch.setattr(trainer, "MultiStageViews", stop)
    with pytest.raises(Views) as views:
        trainer.train(tiny_cfg(image_folder, tmp_path, "DATA.REDUCED_DECODE", switch))
    assert views.value.reduced_decode == switch
