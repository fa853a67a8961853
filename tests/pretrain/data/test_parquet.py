"""Parquet files as pandas, pyarrow and the Hugging Face hub write them.

Files that the datasets library writes are in test_datasets.py.
"""

import errno
import io

import numpy as np
import pytest
from PIL import Image

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.config import get_cfg
from rsa_detectron2.pretrain.data import parquet
from rsa_detectron2.pretrain.data.datasets import open_images
from rsa_detectron2.pretrain.data.images import UnreadableImage
from rsa_detectron2.pretrain.data.source import say
from rsa_detectron2.pretrain.evaluate.knn import NoValidation, find_labeled

pa = pytest.importorskip("pyarrow")
pytest.importorskip("datasets")
pq = pytest.importorskip("pyarrow.parquet")


def encoded(value):
    buffer = io.BytesIO()
    Image.fromarray(np.full((9, 12, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


ROWS = [encoded(value) for value in range(6)]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    say.cache_clear()
    return tmp_path / "cache"


def write(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=2)


def structs(kind=STRUCT):
    return pa.array([{"bytes": row, "path": f"{i}.png"} for i, row in enumerate(ROWS)], kind)


def shown(images):
    """What is painted on each image."""
    return [images.read(index).unique().item() for index in range(len(images))]


@pytest.mark.parametrize(
    "image, column",
    [
        ("image", structs()),
        ("img", structs()),
        ("jpg", pa.array(ROWS, pa.binary())),
        ("PNG", pa.array(ROWS, pa.binary())),
        ("bytes", pa.array(ROWS, pa.large_binary())),
        ("whatever", pa.array(ROWS, pa.binary())),
        ("picture", pa.array(ROWS, pa.binary_view())),
        ("photo", structs(pa.struct([("bytes", pa.large_binary())]))),
    ],
)
@pytest.mark.parametrize(
    "label, values, classes, labels",
    [
        ("label", [1, 0, 5, 1, 1, 0], ["0", "1", "5"], [1, 0, 2, 1, 1, 0]),
        ("cls", pa.array(list("banban")).dictionary_encode(), ["a", "b", "n"], [1, 0, 2, 1, 0, 2]),
    ],
)
def test_columns(tmp_path, image, column, label, values, classes, labels):
    write(tmp_path / "set/train.parquet", id=pa.array(range(6)), **{label: values, image: column})
    images = open_images(tmp_path / "set")
    assert shown(images) == [*range(6)] and images.classes == classes and images.labels.tolist() == labels
    assert images.name(3) == "train.parquet:3"


@pytest.mark.parametrize(
    "label, values, labeled",
    [
        ("Labels", list("abcabc"), True),
        ("class", [1, 2, None, -1, 1, 2], True),
        ("fine_label", [0] * 6, True),
        ("score", [0.5] * 6, False),
        ("caption", list("abcabc"), False),
        ("label", [0.5] * 6, False),
    ],
)
def test_labels(tmp_path, label, values, labeled):
    write(tmp_path / "set/train.parquet", image=structs(), **{label: values})
    images = open_images(tmp_path / "set")
    assert bool(images.classes) == labeled and ((images.labels >= 0).any() == labeled)
    if label == "class":
        assert images.classes == ["1", "2"] and images.labels.tolist() == [0, 1, -1, -1, 0, 1]


def test_which_of_several_columns(tmp_path):
    write(tmp_path / "set/train.parquet", mask=ROWS[::-1], image=ROWS, label=[0] * 6, category=[1] * 6)
    images = open_images(tmp_path / "set")
    assert shown(images) == [*range(6)] and images.classes == ["0"]
    write(tmp_path / "other/train.parquet", left=ROWS, right=ROWS)
    with pytest.raises(
        InputError, match="has no column of images, only left, right: .* or name the column image"
    ):
        open_images(tmp_path / "other")


@pytest.mark.parametrize(
    "train, val",
    [
        ("train.parquet", "test.parquet"),
        ("Train.parquet", "Validation.parquet"),
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001-b42a.parquet"),
        ("plain_text/train-00000-of-00001.parquet", "plain_text/test-00000-of-00001.parquet"),
        ("default/train/0000.parquet", "default/validation/0000.parquet"),
        ("default/partial-train/0000.parquet", "default/partial-test/0000.parquet"),
        ("train/part-0.parquet", "test/part-0.parquet"),
        ("data/x/train-00000-of-00001.parquet", "data/x/val.parquet"),
    ],
)
def test_layouts(tmp_path, train, val):
    write(tmp_path / "set" / train, image=structs(), label=[0, 1] * 3)
    write(tmp_path / "set" / val, image=structs().slice(2, 4), label=[0, 1] * 2)
    write(tmp_path / "set/.cache/huggingface/train.parquet", image=structs(), label=[0, 1] * 3)
    images = open_images(tmp_path / "set")
    assert shown(images) == [*range(6)]
    cfg = get_cfg()
    cfg.DATA.PATH = str(tmp_path / "set")
    bank, found = find_labeled(cfg, images)
    assert bank is images and shown(found) == [2, 3, 4, 5]


def test_folders_without_named_parts(tmp_path):
    for shard in range(2):
        write(tmp_path / f"set/{shard:04d}.parquet", image=structs().slice(3 * shard, 3), label=[0, 1, 0])
    images = open_images(tmp_path / "set")
    assert shown(images) == [*range(6)] and images.name(4) == "0001.parquet:1"
    with pytest.raises(NoValidation, match="no validation images"):
        cfg = get_cfg()
        cfg.DATA.PATH = str(tmp_path / "set")
        find_labeled(cfg, images)


@pytest.mark.parametrize(
    "files", [["train-00000-of-00001.parquet"], ["train/0000.parquet", "test/0000.parquet"]]
)
def test_several_configurations_are_listed(tmp_path, files):
    for file in files:
        write(tmp_path / "set/large" / file, image=structs())
        write(tmp_path / "set/small" / file, image=structs())
    with pytest.raises(
        InputError,
        match="set holds several configurations, large, small: give the folder of one, such as .*set/small",
    ):
        open_images(tmp_path / "set")
    assert len(open_images(tmp_path / "set/small")) == 6


def test_what_is_left_out_is_named(tmp_path, capsys):
    for name in ("train", "unlabeled"):
        write(tmp_path / f"set/{name}.parquet", image=structs())
    assert len(open_images(tmp_path / "set")) == 6
    assert "left out the Parquet files of unlabeled" in capsys.readouterr().err


def test_paths_are_those_beside_the_table(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/x.png").write_bytes(ROWS[4])
    write(
        tmp_path / "set/train.parquet",
        image=pa.array([{"bytes": None, "path": "x.png"}, {"bytes": None, "path": "y.png"}, None], STRUCT),
    )
    images = open_images(tmp_path / "set")
    assert images.read(0).unique().tolist() == [4]
    for index, name in ((1, "set/y.png"), (2, "train.parquet:2")):
        with pytest.raises(UnreadableImage, match=name):
            images.read(index)


def refuse_disk_space(monkeypatch):
    monkeypatch.setattr("datasets.builder.has_sufficient_disk_space", lambda *_, **__: False)


def fill_disk(monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("datasets.arrow_writer.ArrowWriter.write_table", full)


def close_cache(monkeypatch):
    import datasets

    def closed(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(datasets.config.HF_DATASETS_CACHE / "x"))

    monkeypatch.setattr("datasets.builder.os.makedirs", closed)


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (refuse_disk_space, "Not enough disk space"),
        (fill_disk, "No space left"),
        (close_cache, "Permission denied"),
    ],
)
def test_a_cache_that_takes_nothing(tmp_path, monkeypatch, cache, spoil, reason):
    write(tmp_path / "set/train.parquet", image=structs())
    spoil(monkeypatch)
    with pytest.raises(
        InputError,
        match=f"cache of Hugging Face data sets, {cache}, cannot take {tmp_path}/set .*{reason}.*: "
        "make room, or set HF_HOME to a folder on another disk",
    ) as error:
        open_images(tmp_path / "set")
    assert "\n" not in str(error.value)


def test_a_damaged_file_is_named(tmp_path):
    write(tmp_path / "set/train.parquet", image=structs())
    file = tmp_path / "set/train.parquet"
    file.write_bytes(file.read_bytes()[:-200] + bytes(100) + file.read_bytes()[-100:])
    with pytest.raises(InputError, match="set cannot be read as a Hugging Face data set .*: restore it"):
        open_images(tmp_path / "set")
    assert parquet.of_how_many(file) == 0
