"""tools/show_features.py: which features it draws, and with which weights a run has started."""

import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.data.datasets import open_images
from rsa_detectron2.pretrain.engine import trainer
from rsa_detectron2.pretrain.evaluate import feature_pictures
from rsa_detectron2.tools import show_features
from rsa_detectron2.tools._weights import before_and_after, features_before, load_features, read_initial
from tests.conftest import tiny_cfg


@pytest.fixture
def call(tmp_path, monkeypatch):
    """``call(checkpoint, images, ...)`` runs the tool, and returns what it gives to draw_neighbors."""
    given = []

    def draw(images, features, queries, path):
        given[:] = images, features, queries
        # Of the first row alone, which is quicker.
        return feature_pictures.draw_neighbors(images, features, queries[:1], path)

    def run(*arguments):
        words = ["show_features", *arguments, "--output-dir", tmp_path / "out", "--workers", 0]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        show_features.main()
        return given

    monkeypatch.setattr(show_features, "draw_neighbors", draw)
    return run


@pytest.fixture
def unlabeled(tmp_path):
    """20 images in a folder without classes. One cannot be decoded."""
    root = tmp_path / "photographs"
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(root / f"{i:02d}.png")
    (root / "05.png").write_bytes(b"")
    return root


@pytest.mark.parametrize("method", ("rsa", "simclr"))
def test_before_is_where_a_run_starts(tmp_path, image_folder, monkeypatch, method):
    cfg = tiny_cfg(image_folder, tmp_path, "METHOD", method, "SEED", 3)
    monkeypatch.setattr(trainer.Trainer, "fit", lambda self: self.networks)
    wanted = trainer.train(cfg).online.backbone.state_dict()
    found = features_before(cfg).backbone.state_dict()
    assert wanted.keys() == found.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_run_on_images_without_labels(tmp_path, unlabeled, call, capsys):
    cfg = tiny_cfg(unlabeled, tmp_path, "SEED", 3)
    final = trainer.train(cfg)
    capsys.readouterr()
    images, features, queries = call(final)  # of the images that it was pre-trained on
    said = capsys.readouterr()
    assert said.out.split() == [str(tmp_path / "out" / name) for name in ("neighbors.png", "map.png")]
    assert "1 of the 20 images" in said.err and "the next ones stand in for them" in said.err
    assert all(Image.open(path).width > 500 for path in said.out.split())
    before, after = features.items()
    assert before[0] == "nearest before pre-training" and after[0] == "nearest after pre-training"
    crops = open_images(unlabeled)
    assert torch.equal(before[1], features_before(cfg).of(crops, "", replace=True).features)
    assert torch.equal(after[1], load_features(final)[0].of(crops, "", replace=True).features)
    assert not torch.equal(before[1], after[1])
    assert len(queries) == 12 and queries == sorted({*queries}) and feature_pictures.NEIGHBORS == 8
    features, cfg, provenance = load_features(final)
    features.projector = None  # another project's checkpoint, or a converted one, has none
    assert list(before_and_after(features, cfg, provenance, crops)) == ["nearest after pre-training"]
    images, features, queries = call(final, unlabeled, "--limit", 5)
    assert len(images) == len(queries) == 5 and features["nearest after pre-training"].shape[0] == 5


def test_before_is_what_a_run_was_started_from(tmp_path, image_folder, capsys):
    """Its features are those of the first run; without that file, or with another, there are none."""
    first = trainer.train(tiny_cfg(image_folder, tmp_path))
    cfg = tiny_cfg(image_folder, tmp_path, "MODEL.INIT", str(first), "OUTPUT_DIR", str(tmp_path / "second"))
    second = load_features(trainer.train(cfg, reader=read_initial))
    images = open_images(image_folder)
    found = before_and_after(*second, images)
    wanted = load_features(first)[0].of(images, "").features
    torch.testing.assert_close(found["nearest before pre-training"].features, wanted, rtol=1e-5, atol=1e-6)
    capsys.readouterr()
    for damage, message in (
        (lambda: torch.save(torch.load(first, weights_only=True) | {"step": 8}, first), "no longer the file"),
        (lambda: os.remove(first), "no checkpoint"),
    ):
        damage()
        assert list(before_and_after(*second, images)) == ["nearest after pre-training"]
        said = capsys.readouterr().err
        assert "features before pre-training are left out: " in said and message in said


def test_mistakes_are_one_line(tmp_path, image_folder, resnet50_checkpoint, call):
    with pytest.raises(InputError, match="--limit is 1: it must be at least 2"):
        call("absent.pth", "--limit", 1)
    with pytest.raises(InputError, match="no checkpoint absent.pth"):
        call("absent.pth")
    Image.new("RGB", (9, 9)).save(tmp_path / "alone.png")
    (tmp_path / "one").mkdir()
    (tmp_path / "alone.png").rename(tmp_path / "one" / "alone.png")
    with pytest.raises(InputError, match="one holds one image: neighbors need two or more"):
        call(resnet50_checkpoint, tmp_path / "one")
