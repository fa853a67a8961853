"""Files of features: those of the images, in their order; whatever interrupts, they come out the same."""

import csv
import importlib.util
import json
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from rsa_detectron2.common.errors import InputError, Interrupted
from rsa_detectron2.pretrain.config import get_cfg
from rsa_detectron2.pretrain.data.datasets import open_images
from rsa_detectron2.pretrain.data.images import UnreadableImage
from rsa_detectron2.pretrain.evaluate import chunks, embed
from rsa_detectron2.pretrain.evaluate.features import Features
from rsa_detectron2.pretrain.evaluate.writers import check_format

PROVENANCE = {"sha256": "0" * 64, "branch": "online", "source": "a.pth"}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Batches of 4 images, and 8 in a chunk."""
    monkeypatch.setattr(embed, "BATCH", 4)
    monkeypatch.setattr(embed, "CHUNK", 8)
    monkeypatch.setattr(chunks, "CHUNK", 8)


@pytest.fixture
def root(tmp_path):
    """22 images: two classes, and two images that lie beside them."""
    rng = np.random.default_rng(0)
    for i in range(22):
        path = tmp_path / "images" / ("" if i < 2 else "ab"[i % 2]) / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


class Backbone(torch.nn.Conv2d):
    """5 features. ``at`` calls a function before the n-th batch."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(3, 5, 8)
        self.calls, self.at = 0, {}

    def forward(self, images):
        self.calls += 1
        self.at.get(self.calls, lambda: None)()
        return super().forward(images).flatten(1)


def make_features(workers=0, **at):
    cfg = get_cfg()
    cfg.merge_from_list(["DATA.IMAGE_SIZE", 8, "DATA.EVAL_RESIZE", 8, "DATA.NUM_WORKERS", workers])
    features = Features(Backbone(), cfg.DATA, None)
    features.backbone.at = {int(name[1:]): call for name, call in at.items()}
    return features


def read(output):
    """(names, labels, float32 [N, D]) of a file."""
    if output.suffix == ".npy":
        with open(f"{output}.csv", newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        assert header == ["file", "label"]
        return [row[0] for row in rows], [row[1] or None for row in rows], np.load(output)
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    columns = parquet.read_table(output).to_pydict()
    return columns["file"], columns["label"], np.array(columns["feature"], dtype=np.float32)


def files_of(output):
    """The bytes of all files beside ``output``."""
    assert not os.path.exists(f"{output}.chunks")
    return {path.name.replace(output.stem, ""): path.read_bytes() for path in output.parent.iterdir()}


@pytest.mark.parametrize("name", ("a.npy", "a.parquet"))
@pytest.mark.parametrize("workers", (0, 2))
def test_a_file_holds_the_features_of_the_images(root, tmp_path, name, workers):
    output, images = tmp_path / "out" / name, open_images(root)
    about = embed.embed(make_features(workers), images, PROVENANCE, output)
    names, labels, values = read(output)
    assert names == [images.name(i) for i in range(22)]
    assert labels == [None, None] + ["a"] * 10 + ["b"] * 10
    assert np.array_equal(values, make_features().of(images, "").features)
    assert list(about["shape"]) == [22, 5] and about["left_out"] == [] and about["source"] == "a.pth"
    assert json.loads((tmp_path / "out" / f"{name}.json").read_text())["images"]["images"] == 22


@pytest.mark.parametrize("name", ("a.npy", "a.parquet"))
def test_names_are_as_they_are(root, tmp_path, name):
    """What a message would escape, macOS's narrow space for one, opens the file; other bytes cannot."""
    odd = root / "a" / "1.02\u202fPM\u3000車.png"
    (root / "a" / "02.png").rename(odd)
    (root / "a" / "04.png").rename(os.fsdecode(bytes(root / "a") + b"/\xe9.png"))
    embed.embed(make_features(), open_images(root), PROVENANCE, tmp_path / "out" / name)
    names = read(tmp_path / "out" / name)[0]
    assert str(odd) in names and str(root / "a" / "\\xe9.png") in names


def test_an_error_in_the_first_batch_of_a_chunk_is_told(root, tmp_path):
    def full():
        raise MemoryError("full")

    for batch in (1, 3):
        with pytest.raises(MemoryError, match="full"):
            embed.embed(
                make_features(**{f"n{batch}": full}), open_images(root), PROVENANCE, tmp_path / "a.npy"
            )


@pytest.mark.parametrize("name", ("a.npy", "a.parquet"))
def test_unreadable_images_are_named_and_left_out(root, tmp_path, name, capsys):
    images = open_images(root)
    for index in (1, 8, 9, 10, 11, 21):  # among them a whole batch but for one image, and the last image
        path = images.name(index)
        with open(path, "r+b") as file:
            file.truncate(40)
    Image.new("RGB", (8, 8)).save(images.name(11))
    about = embed.embed(make_features(), images, PROVENANCE, tmp_path / "out" / name)
    assert about["left_out"] == [images.name(index) for index in (1, 8, 9, 10, 21)]
    said = capsys.readouterr().err
    assert said.count("left out: ") == 5 and f"left out: {images.name(8)} cannot be decoded" in said
    names, labels, values = read(tmp_path / "out" / name)
    kept = [0, *range(2, 8), *range(11, 21)]
    assert names == [images.name(index) for index in kept] and labels[1:3] == ["a", "a"]
    for index in (1, 8, 9, 10, 21):
        Image.new("RGB", (8, 8)).save(images.name(index))
    assert np.array_equal(values, make_features().of(open_images(root), "").features[kept])


@pytest.mark.parametrize("name", ("a.npy", "a.parquet"))
@pytest.mark.parametrize("workers", (0, 1))
def test_a_signal_loses_nothing(root, tmp_path, name, workers):
    images = open_images(root)
    embed.embed(make_features(), images, PROVENANCE, tmp_path / "whole" / name)
    output, computed = tmp_path / "out" / name, 0
    for batch in (1, 2, 1):  # after the first batch, the third, the fourth
        features = make_features(workers, **{f"n{batch}": lambda: signal.raise_signal(signal.SIGTERM)})
        with pytest.raises(Interrupted, match="stopped by SIGTERM; what was computed is saved, and the same"):
            embed.embed(features, images, PROVENANCE, output)
        computed += features.backbone.calls
        assert not output.exists()
    last = make_features(workers)
    embed.embed(last, images, PROVENANCE, output)
    assert computed == 4 and last.backbone.calls == 2
    assert files_of(output) == files_of(tmp_path / "whole" / name)


@pytest.mark.parametrize("name", ("a.npy", "a.parquet"))
@pytest.mark.parametrize("batch", (1, 2, 4, 6))
def test_a_killed_call_goes_on_to_the_same_bytes(root, tmp_path, name, batch):
    images = open_images(root)
    embed.embed(make_features(), images, PROVENANCE, tmp_path / "whole" / name)
    kill = make_features(**{f"n{batch}": lambda: os.kill(os.getpid(), signal.SIGKILL)})
    output = tmp_path / "out" / name
    arguments = (kill, images, PROVENANCE, output)
    process = multiprocessing.get_context("fork").Process(target=embed.embed, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not output.exists()
    again = make_features()
    embed.embed(again, images, PROVENANCE, output)
    assert again.backbone.calls == 6 - (batch - 1) // 2 * 2  # whole chunks are kept
    assert files_of(output) == files_of(tmp_path / "whole" / name)


def test_a_signal_while_the_file_is_written(root, tmp_path, monkeypatch):
    images, output = open_images(root), tmp_path / "out" / "a.npy"
    embed.embed(make_features(), images, PROVENANCE, tmp_path / "whole" / "a.npy")
    index = chunks.Chunk.index
    with monkeypatch.context() as patch:
        patch.setattr(chunks.Chunk, "index", lambda c: signal.raise_signal(signal.SIGINT) or index(c))
        with pytest.raises(Interrupted, match="SIGINT"):
            embed.embed(make_features(), images, PROVENANCE, output)
    assert not output.exists()
    again = make_features()
    embed.embed(again, images, PROVENANCE, output)
    assert again.backbone.calls == 0 and files_of(output) == files_of(tmp_path / "whole" / "a.npy")


def interrupted(images, output):
    """Embed, and be stopped after three batches."""
    features = make_features(n3=lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted):
        embed.embed(features, images, PROVENANCE, output)


@pytest.mark.parametrize("damage", ("flip", "cut", "empty"))
def test_a_damaged_chunk_is_computed_anew_and_said(root, tmp_path, capsys, damage):
    images, output = open_images(root), tmp_path / "out" / "a.npy"
    embed.embed(make_features(), images, PROVENANCE, tmp_path / "whole" / "a.npy")
    interrupted(images, output)
    path = tmp_path / "out" / "a.npy.chunks" / "000000000.npz"
    content = bytearray(path.read_bytes())
    values = make_features().of(images, "").features[:8].numpy().tobytes()
    if damage == "flip":
        content[content.index(values) + 100] ^= 1  # one bit of a feature
    path.write_bytes({"flip": content, "cut": content[:200], "empty": b""}[damage])
    again = make_features()
    embed.embed(again, images, PROVENANCE, output)
    assert again.backbone.calls == 5 and capsys.readouterr().err.count(f"{path} is damaged") == 1
    assert files_of(output) == files_of(tmp_path / "whole" / "a.npy")


def away(images, indices):
    """The same images, of which some cannot be read now, as on a disk that is gone."""
    encoded = images.encoded

    def read(index):
        if index in indices:
            raise UnreadableImage(f"{images.name(index)} cannot be read (Stale file handle)")
        return encoded(index)

    images.encoded = read
    return images


def test_an_image_that_can_be_read_again_is_taken_in(root, tmp_path, capsys):
    output = tmp_path / "out" / "a.npy"
    embed.embed(make_features(), open_images(root), PROVENANCE, tmp_path / "whole" / "a.npy")
    interrupted(away(open_images(root), [2]), output)
    assert f"left out: {root / 'a' / '02.png'} cannot be read" in capsys.readouterr().err
    embed.embed(make_features(), open_images(root), PROVENANCE, output)
    assert files_of(output) == files_of(tmp_path / "whole" / "a.npy")


def test_a_disk_that_goes_away_stops_it(root, tmp_path):
    output = tmp_path / "out" / "a.npy"
    embed.embed(make_features(), open_images(root), PROVENANCE, tmp_path / "whole" / "a.npy")
    with pytest.raises(InputError, match="^4 images in a row cannot be decoded; .*/03.png cannot be read"):
        embed.embed(make_features(), away(open_images(root), range(11, 22)), PROVENANCE, output)
    again = make_features()
    embed.embed(again, open_images(root), PROVENANCE, output)
    assert again.backbone.calls == 4  # all but the first chunk, because image 11 had been left out
    assert files_of(output) == files_of(tmp_path / "whole" / "a.npy")


def test_a_full_disk_is_one_line(root, tmp_path, monkeypatch):
    def savez(file, **arrays):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(InputError, match="000000000.npz cannot be written .No space left.*: make room, then"):
        embed.embed(make_features(), open_images(root), PROVENANCE, tmp_path / "a.npy")


def test_a_folder_without_a_sound_image(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match="no image of .*images can be decoded: give a folder of images"):
        embed.embed(make_features(), open_images(tmp_path / "images"), PROVENANCE, tmp_path / "a.npy")


def test_formats(tmp_path, monkeypatch):
    check_format(tmp_path / "a.npy")
    with pytest.raises(InputError, match="a.csv: the name must end in .parquet or .npy$"):
        check_format(tmp_path / "a.csv")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="a.parquet needs one more library: .*hf.*, or give a name"):
        check_format(tmp_path / "a.parquet")
    check_format(tmp_path / "a.npy")


def test_what_is_refused(root, tmp_path, monkeypatch):
    images, output = open_images(root), tmp_path / "out" / "a.npy"
    interrupted(images, output)
    for other, provenance, data in (
        ("checkpoint", PROVENANCE | {"sha256": "1" * 64}, {}),
        ("branch", PROVENANCE | {"branch": "target"}, {}),
        ("resize", PROVENANCE, {"EVAL_RESIZE": 9}),
    ):
        features = make_features()
        features.data.merge_from_list([word for item in data.items() for word in item])
        with pytest.raises(InputError, match=f"a.npy.chunks was begun earlier, and differs in {other}: give"):
            embed.embed(features, images, provenance, output)
    os.utime(images.name(0), (0, 0))
    with pytest.raises(InputError, match="and differs in images: "):
        embed.embed(make_features(), images, PROVENANCE, output)
    output = tmp_path / "b.npy"
    embed.embed(make_features(), images, PROVENANCE, output)
    again = make_features()
    assert embed.embed(again, images, PROVENANCE, output)["shape"] == [22, 5] and not again.backbone.calls
    with pytest.raises(InputError, match="b.npy is there already, and differs in branch: give"):
        embed.embed(make_features(), images, PROVENANCE | {"branch": "target"}, output)
    (tmp_path / "c.npy").write_bytes(b"mine")
    with pytest.raises(InputError, match="c.npy is there already, and is not a file of this tool: give"):
        embed.embed(make_features(), images, PROVENANCE, tmp_path / "c.npy")
    assert (tmp_path / "c.npy").read_bytes() == b"mine"
