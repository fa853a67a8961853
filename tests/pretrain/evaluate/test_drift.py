"""How far aggressive views drift, against torchvision's functional and sums by hand, on a backbone that sees
color.
"""

import csv

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from rsa_detectron2.pretrain.config import get_cfg
from rsa_detectron2.pretrain.data.datasets import ImageFolder
from rsa_detectron2.pretrain.data.loader import MultiStageViews
from rsa_detectron2.pretrain.evaluate import drift, pictures
from rsa_detectron2.pretrain.evaluate.features import Features
from rsa_detectron2.pretrain.method.augment import FACTORS, GRAY, ORDER, SIGMA, aggressive, to_float
from rsa_detectron2.pretrain.method.networks import build_backbone
from tests.conftest import rsa_networks

SIZE = 32


class MeanColor(torch.nn.Module):
    """Features: the mean of each channel of the image in [0, 1], for DATA.MEAN 0 and DATA.STD 1."""

    def forward(self, images):
        return images.mean((2, 3))


@pytest.fixture
def features():
    cfg = get_cfg()
    cfg.merge_from_list(
        [
            "DATA.IMAGE_SIZE",
            SIZE,
            "DATA.NUM_WORKERS",
            0,
            "DATA.MEAN",
            (0.0, 0.0, 0.0),
            "DATA.STD",
            (1.0, 1.0, 1.0),
        ]
    )
    return Features(MeanColor(), cfg.DATA, None)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twelve plain colors, and one picture in gray."""
    root = tmp_path_factory.mktemp("plain")
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(np.tile(rng.integers(20, 230, 3, dtype=np.uint8), (40, 50, 1))).save(
            root / f"{i:02d}.png"
        )
    Image.fromarray(rng.integers(20, 230, (40, 50), dtype=np.uint8)).save(root / "gray.png")
    return ImageFolder(root)


def by_hand(weak, strong):
    """cos of the mean colors of two views [3, H, W] in [0, 1], in numpy."""
    a, b = (view.double().numpy().mean((1, 2)) for view in (weak, strong))
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_pairs_are_those_of_the_training_ranked_by_cosine(images, features):
    pairs = drift.measure_pairs(features, images, seed=3, limit=100)
    assert sorted(zip(pairs["index"], pairs["view"])) == [(i, view) for i in range(13) for view in (0, 1)]
    assert (np.diff(pairs["cosine"]) >= 0).all() and pairs["cosine"][0] < 0.99
    dataset = MultiStageViews(images, SIZE, 3)
    for index, view, params, cosine in zip(*pairs.values()):
        sample = dataset[0, int(index)]
        strong = aggressive(sample["views"][None], sample["params"][None])[0, view]
        assert (params == sample["params"][view].numpy()).all()
        assert cosine == pytest.approx(by_hand(to_float(sample["views"][view]), strong), abs=1e-5)
    assert len(drift.measure_pairs(features, images, 3, limit=5)["cosine"]) == 10


def test_an_operation_alone_is_torchvisions(images):
    """Pixels agree to one level of 255; the blur has this project's radius of 6."""
    weak = torch.stack([MultiStageViews(images, SIZE, 0)[0, i]["views"][0] for i in range(13)])[:, None]
    params = torch.stack([drift.draw_strengths(np.random.default_rng(i)) for i in range(13)])[:, None]
    one = {
        **{name: getattr(TF, f"adjust_{name}") for name in drift.JITTER},
        "grayscale": lambda image, _: TF.rgb_to_grayscale(image, 3),
        "blur": lambda image, row: TF.gaussian_blur(image, [13, 13], [float(row[SIGMA])] * 2),
    }
    for name, apply in one.items():
        found = aggressive(weak, drift.only(name, params))[:, 0]
        for image, row, strong in zip(to_float(weak[:, 0]), params[:, 0], found):
            argument = float(row[FACTORS][drift.JITTER.index(name)]) if name in drift.JITTER else row
            torch.testing.assert_close(strong, apply(image, argument), atol=1 / 255, rtol=0)
    jitter = drift.only("jitter", params)[:, 0]
    assert (jitter[:, ORDER].sort(1).values == torch.arange(4)).all() and not jitter[:, [GRAY, SIGMA]].any()
    assert 0.1 <= params[..., SIGMA].min() and params[..., SIGMA].max() <= 2


def test_drift_of_each_operation(images, features):
    """The features are mean colors: on plain colors a blur moves nothing, a brighter image keeps its
    direction, and gray loses it.
    """
    drifts = drift.measure_operations(features, images, seed=0, limit=100)
    assert set(drifts) == {*drift.OPERATIONS, "as drawn", "another crop", "another image"}
    assert all(values.shape == (13,) for values in drifts.values())
    plain = slice(0, 12)
    assert np.abs(drifts["blur"][plain]).max() < 1e-5 and np.abs(drifts["another crop"][plain]).max() < 1e-5
    assert np.median(drifts["brightness"][plain]) < 1e-5
    assert drifts["grayscale"][12] == pytest.approx(0, abs=1e-4)
    assert drifts["saturation"][12] == pytest.approx(0, abs=1e-4)
    weak = [to_float(MultiStageViews(images, SIZE, 0)[0, i]["views"][0]) for i in range(13)]
    for i, view in enumerate(weak):
        assert drifts["grayscale"][i] == pytest.approx(
            1 - by_hand(view, TF.rgb_to_grayscale(view, 3)), abs=1e-4
        )
        assert drifts["another image"][i] == pytest.approx(1 - by_hand(view, weak[(i + 1) % 13]), abs=1e-5)
    assert drifts["grayscale"][plain].mean() > 0.01


def test_table_of_pairs_says_how_each_was_drawn(images, features, tmp_path):
    """Each row is enough to rebuild its pair: the views that torchvision makes from it give its cosine."""
    pairs = drift.measure_pairs(features, images, seed=1, limit=100)
    drift.write_pairs(tmp_path / "pairs.csv", pairs, images, seed=1)
    rows = list(csv.DictReader(open(tmp_path / "pairs.csv")))
    assert [int(row["rank"]) for row in rows] == list(range(1, 27))
    assert {row["order"] == "" for row in rows} == {True, False} == {row["grayscale"] == "1" for row in rows}
    for row in rows:
        assert row["file"] == images.name(int(row["index"]))
        sample = MultiStageViews(images, SIZE, int(row["seed"]))[0, int(row["index"])]
        weak = strong = to_float(sample["views"][int(row["view"])])
        for name in row["order"].split():
            strong = getattr(TF, f"adjust_{name}")(strong, float(row[name]) / (360 if name == "hue" else 1))
        strong = TF.rgb_to_grayscale(strong, 3) if row["grayscale"] == "1" else strong
        if float(row["blur"]):
            strong = TF.gaussian_blur(strong, [13, 13], [float(row["blur"])] * 2)
        assert float(row["cosine"]) == pytest.approx(by_hand(weak, strong), abs=1e-3)


def test_table_of_operations_against_numpy(images, features, tmp_path):
    drifts = drift.measure_operations(features, images, seed=0, limit=100)
    drift.write_operations(tmp_path / "operations.csv", drifts)
    for row in csv.DictReader(open(tmp_path / "operations.csv")):
        values = drifts[row["operation"]].astype(float)
        expected = [
            values.mean(),
            values.std(ddof=1) / np.sqrt(13),
            np.median(values),
            np.quantile(values, 0.9),
        ]
        found = [float(row[name]) for name in ("mean", "standard error", "median", "90th percentile")]
        assert found == pytest.approx(expected, abs=2e-6) and row["images"] == "13"


@pytest.fixture
def shown(monkeypatch):
    """The pictures that were drawn, in order."""
    pictures = []
    original = Axes.imshow

    def imshow(ax, picture, *args, **kwargs):
        pictures.append(np.asarray(picture))
        return original(ax, picture, *args, **kwargs)

    monkeypatch.setattr(Axes, "imshow", imshow)
    return pictures


def test_pictures_show_the_noisiest_and_the_closest(images, features, tmp_path, shown):
    pairs = drift.measure_pairs(features, images, seed=0, limit=100)
    pictures.draw_pairs(pairs, MultiStageViews(images, SIZE, 0), 6, tmp_path / "pairs.png")
    assert len(shown) == 6 + 8
    cosines = [
        by_hand(
            *(
                torch.from_numpy(half / 255).permute(2, 0, 1)
                for half in (picture[:, :SIZE], picture[:, -SIZE:])
            )
        )
        for picture in shown
    ]
    expected = [*pairs["cosine"][:6], *pairs["cosine"][:-9:-1]]
    np.testing.assert_allclose(cosines, expected, atol=1e-2)  # rounded to 8 bits
    few = {name: values[:4] for name, values in pairs.items()}
    pictures.draw_pairs(few, MultiStageViews(images, SIZE, 0), 24, tmp_path / "few.png")
    assert len(shown) == 6 + 8 + 4  # none twice


def test_picture_of_views_has_original_weak_and_aggressive(images, tmp_path, shown):
    pictures.draw_views(images, SIZE, 0, 3, tmp_path / "views.png")
    assert len(shown) == 3 * 5
    for row, index in enumerate((0, 4, 8)):
        original, weak, _, weak_, _ = (
            picture[len(picture) // 2, len(picture) // 2].astype(int)
            for picture in shown[5 * row : 5 * row + 5]
        )
        color = images.read(index)[:, 0, 0].numpy().astype(int)
        assert (np.abs([original - color, weak - color, weak_ - color]) <= 1).all()
    width, height = Image.open(tmp_path / "views.png").size
    assert height > width / 2


# ---- the tool ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """model_final.pth of timm's smallest ResNet, untrained, for 32 pixels."""
    cfg = get_cfg()
    cfg.merge_from_list(
        [
            "DATA.IMAGE_SIZE",
            32,
            "DATA.EVAL_RESIZE",
            32,
            "DATA.NUM_WORKERS",
            0,
            "MODEL.BACKBONE",
            "test_resnet",
            "SOLVER.AMP",
            "off",
        ]
    )
    torch.manual_seed(0)
    networks = rsa_networks(build_backbone("test_resnet"), 16, 8)
    path = tmp_path_factory.mktemp("checkpoint") / "model_final.pth"
    torch.save(
        {
            "format": "rsa-pretraining",
            "method": "rsa",
            "step": 3,
            "config": cfg.dump(),
            "model": networks.state_dict(),
        },
        path,
    )
    return path


def test_tool(tool, image_folder, checkpoint, tmp_path):
    done = tool(
        "show_views",
        image_folder,
        "--checkpoint",
        checkpoint,
        "--limit",
        8,
        "--rows",
        2,
        "--pairs",
        3,
        "--output-dir",
        tmp_path / "out",
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "views.png",
        "pairs.csv",
        "pairs.png",
        "operations.csv",
        "operations.png",
    }
    rows = list(csv.DictReader(open(tmp_path / "out" / "pairs.csv")))
    cosines = [float(row["cosine"]) for row in rows]
    assert len(rows) == 16 and cosines == sorted(cosines) and len({row["index"] for row in rows}) == 8
    for arguments, text in (
        ([tmp_path / "none"], "no image folder"),
        ([image_folder, "--rows", 0], "--rows is 0"),
        ([image_folder, "--checkpoint", tmp_path / "none.pth"], "no checkpoint"),
    ):
        done = tool("show_views", *arguments, "--output-dir", tmp_path / "bad")
        assert done.returncode == 2 and text in done.stderr and done.stderr.count("\n") == 1
