"""Every source of images, in its real layout on disk, against what wrote it: PIL, torchvision's files,
datasets.
"""

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import sys
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, STL10

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.config import get_cfg
from rsa_detectron2.pretrain.data.bad_images import BadImages, read_or_next
from rsa_detectron2.pretrain.data.datasets import ImageFolder, images_of, open_images
from rsa_detectron2.pretrain.data.images import UnreadableImage, decode, read_image
from rsa_detectron2.pretrain.data.pixels import check_pixels
from rsa_detectron2.pretrain.evaluate.cache import fingerprint
from rsa_detectron2.pretrain.evaluate.features import CenterCrops, Features
from rsa_detectron2.pretrain.evaluate.knn import NoValidation, evaluate_knn, find_labeled
from rsa_detectron2.pretrain.evaluate.linear import RandomCrops

RNG = np.random.default_rng(0)


def noise(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def by_pil(path):
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


def cfg_of(path, **data):
    cfg = get_cfg()
    cfg.DATA.update(PATH=str(path), IMAGE_SIZE=8, EVAL_RESIZE=8, NUM_WORKERS=0, **data)
    return cfg


# ---- decoding ----


def test_images_of_a_configuration(image_folder):
    data = get_cfg().DATA
    data.PATH, data.LIMIT, data.RANGE, data.REDUCED_DECODE = str(image_folder), 5, (100, 900), False
    images = images_of(data)
    assert (len(images), images.value_range, images.reduced_decode) == (5, (100, 900), False)
    assert open_images(image_folder).reduced_decode  # the other source keeps its own


@pytest.mark.parametrize(
    "mode, suffix",
    [
        ("RGB", "jpg"),
        ("L", "jpg"),
        ("CMYK", "jpg"),
        ("P", "png"),
        ("RGBA", "png"),
        ("LA", "png"),
        ("1", "png"),
        ("L", "bmp"),
        ("1", "tif"),
        ("LA", "tif"),
        ("RGB", "webp"),
        ("RGB", "gif"),
    ],
)
def test_image_modes_are_read_as_rgb(tmp_path, mode, suffix):
    gradient = np.linspace(0, 255, 40 * 30, dtype=np.uint8).reshape(30, 40)
    Image.fromarray(np.stack([gradient, gradient[::-1], gradient // 2], 2)).convert(mode).save(
        tmp_path / f"x.{suffix}"
    )
    image = read_image(tmp_path / f"x.{suffix}")
    assert image.shape == (3, 30, 40) and image.dtype == torch.uint8
    assert (image.float() - by_pil(tmp_path / f"x.{suffix}").float()).abs().mean() < 3


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm", "i.tif"])
def test_16_bits_are_scaled(tmp_path, suffix):
    gradient = np.linspace(3000, 50000, 40 * 30).astype(np.uint16).reshape(30, 40)
    path = tmp_path / f"x.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 40 30 65535\n" + gradient.astype(">u2").tobytes())
    else:
        Image.fromarray(gradient.astype(np.int32) if suffix == "i.tif" else gradient).save(path)
    image = read_image(path)
    assert image.shape == (3, 30, 40) and image.dtype == torch.uint8
    assert all(np.array_equal(channel.numpy(), gradient // 257) for channel in image)


def test_other_ranges_are_stretched(tmp_path):
    values = np.linspace(-3, 5, 12).reshape(3, 4)
    for pixels in (values.astype(np.float32), (values * 1e6).astype(np.int32)):
        Image.fromarray(pixels).save(tmp_path / "x.tif")
        expected = (pixels - pixels.min()) / (pixels.max() - pixels.min()) * 255
        assert np.abs(read_image(tmp_path / "x.tif")[1].numpy() - expected).max() <= 1
    Image.fromarray(np.full((3, 4), 0.5, np.float32)).save(tmp_path / "x.tif")
    with np.errstate(all="raise"):
        assert read_image(tmp_path / "x.tif").unique().numel() == 1


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (2, 300)])
def test_tiny_images(tmp_path, size):
    for suffix in ("jpg", "png", "bmp"):
        save(tmp_path / f"x.{suffix}", noise(*size, 3))
    images = ImageFolder(tmp_path)
    images.labels[:] = 0
    for i in range(3):
        assert images.read(i).shape == (3, *size)
        assert (
            RandomCrops(images, 8, 0)[0, i][0].shape
            == CenterCrops(images, [i], 8, 8)[0][0].shape
            == (3, 8, 8)
        )


def damaged_files(folder):
    for suffix in ("jpg", "png", "webp", "bmp", "tif"):
        save(folder / f"cut.{suffix}", noise(40, 40, 3))
        whole = (folder / f"cut.{suffix}").read_bytes()
        (folder / f"cut.{suffix}").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_bytes(b"not an image")
    (folder / "bomb.ppm").write_bytes(b"P6 40000 40000 255\n")
    return sorted(folder.iterdir())


def test_damaged_files_are_named(tmp_path):
    files = damaged_files(tmp_path)
    assert len(files) == 8
    for path in (*files, tmp_path / "absent.jpg"):
        with pytest.raises(UnreadableImage, match=path.name):
            read_image(path)
    with pytest.raises(UnreadableImage, match="row 7 is empty"):
        decode(b"", "row 7")
    with pytest.raises(UnreadableImage, match=r"row 8 .*\(of no known format\)"):
        decode(b"<html>", "row 8")


# ---- folders ----


def test_labels_and_unlabeled_images(image_folder, tmp_path):
    images = ImageFolder(image_folder)
    assert images.classes == ["a", "b"] and len(images) == 24 and images.labels.dtype == np.int64
    for i in (0, 11, 12, 23):  # sorted: 12 images of a, then 12 of b
        assert images.name(i).startswith(str(image_folder / "ab"[i // 12])) and images.labels[i] == i // 12
        assert (images.read(i).float() - by_pil(images.name(i)).float()).abs().mean() < 3
    save(tmp_path / "x.png", noise(9, 9, 3))
    assert ImageFolder(tmp_path).labels.tolist() == [-1]
    with pytest.raises(NoValidation, match="has no labels"):
        find_labeled(cfg_of(tmp_path), ImageFolder(tmp_path))


def test_what_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(
        InputError, match="no image folder .*absent.*--data PATH.*, or try tools/quickstart.py"
    ):
        open_images(tmp_path / "absent")
    for name, kind in (("cifar10", "CIFAR10"), ("CIFAR-100", "CIFAR100"), ("stl10", "STL10")):
        with pytest.raises(InputError, match=rf"import {kind}; {kind}\('{tmp_path / name}', download=True\)"):
            open_images(tmp_path / name)
    with pytest.raises(InputError, match="no images below"):
        open_images(tmp_path)


def test_folder_with_train_and_val_inside(image_folder):
    for split, name in (("pretrain", "train"), ("train", "train"), ("val", "val")):
        images = open_images(image_folder.parent, split)
        assert images.root == image_folder.parent / name and images.classes == ["a", "b"]
        assert open_images(image_folder, split).root == image_folder  # the folder itself, whatever the split
    for path in (image_folder, image_folder.parent):
        images = open_images(path)
        bank, val = find_labeled(cfg_of(path), images)
        assert bank is images and val.root == image_folder.parent / "val" and len(val) == 24


def test_val_must_fit(image_folder, tmp_path):
    """The classes that differ are named, or the first of many."""
    for part, classes in (("train", "abcdefgh"), ("val", "axyzh")):
        for name in classes:
            save(tmp_path / part / name / "x.png", noise(9, 9, 3))
    images = open_images(tmp_path / "train")
    why = (
        (
            f"{tmp_path}/val has other classes than {tmp_path}/train: without 6 (b, c, d, ...), "
            r"with other 3 (x, y, z)"
        )
        .replace("(", r"\(")
        .replace(")", r"\)")
    )
    with pytest.raises(NoValidation, match=f"^{why}$"):
        find_labeled(cfg_of(tmp_path / "train"), images)
    with pytest.raises(InputError, match=f"need the same classes .*: {why}$") as error:
        find_labeled(cfg_of(tmp_path / "train", VAL=str(tmp_path / "val")), images)
    assert not isinstance(error.value, NoValidation)  # a folder that was asked for must fit
    images = open_images(tmp_path / "val")  # a set that is trained on does not validate itself
    with pytest.raises(NoValidation, match="there are no validation images .* beside"):
        find_labeled(cfg_of(tmp_path / "val"), images)
    for name in "bcdefgh":
        shutil.rmtree(tmp_path / "train" / name)
    with pytest.raises(NoValidation, match="train has one class only, a$"):
        find_labeled(cfg_of(tmp_path / "train"), open_images(tmp_path / "train"))
    images = open_images(image_folder)
    assert find_labeled(cfg_of(image_folder, VAL=str(image_folder)), images)[1].root == image_folder


def test_classes_file(tmp_path):
    for name in ("n01", "n02", "n03"):
        for split in ("train", "val"):
            save(tmp_path / split / name / "x.png", noise(9, 9, 3))
    file = tmp_path / "classes.txt"
    file.write_text("# two of three\n\nn03  tench, Tinca tinca\nn01 # goldfish\n")
    images = open_images(tmp_path, "pretrain", str(file))
    assert images.classes == ["n01", "n03"] and images.labels.tolist() == [0, 1]
    assert find_labeled(cfg_of(tmp_path, CLASSES=str(file)), images)[1].classes == ["n01", "n03"]
    for text, message in (("n01\nn09\n", "n09"), ("# none\n", "names no class")):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            open_images(tmp_path, "pretrain", str(file))
    with pytest.raises(InputError, match="DATA.CLASSES.*absent.txt"):
        open_images(tmp_path, "pretrain", "absent.txt")
    # Found under configs/, from any working directory; none of its 100 classes is here.
    with pytest.raises(InputError, match="100 of the classes"):
        open_images(tmp_path, "pretrain", "pretrain/imagenet100_classes.txt")


def test_tiny_imagenet(tmp_path):
    (tmp_path / "wnids.txt").write_text("n03\nn01\n")
    for name in ("n01", "n03"):
        for i in range(2):
            save(tmp_path / "train" / name / "images" / f"{name}_{i}.JPEG", noise(64, 64, 3))
    wnids = ["n03", "n01", "n03"]
    for i in range(3):
        save(tmp_path / "val/images" / f"val_{i}.JPEG", noise(64, 64, 3))
    table = tmp_path / "val/val_annotations.txt"
    table.write_text("".join(f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n" for i, wnid in enumerate(wnids)))
    for path in (tmp_path, tmp_path / "train"):
        images = open_images(path)
        assert images.classes == ["n01", "n03"] and images.labels.tolist() == [0, 0, 1, 1]
        bank, val = find_labeled(cfg_of(path), images)
        assert bank is images and val.classes == images.classes
        assert [(os.path.basename(val.name(i)), val.labels[i]) for i in range(3)] == [
            ("val_0.JPEG", 1),
            ("val_1.JPEG", 0),
            ("val_2.JPEG", 1),
        ]
    assert (val.read(2).float() - by_pil(tmp_path / "val/images/val_2.JPEG").float()).abs().mean() < 3
    (tmp_path / "classes.txt").write_text("n01")
    val = open_images(tmp_path, "val", str(tmp_path / "classes.txt"))
    assert len(val) == 1 and val.name(0).endswith("val_1.JPEG") and val.labels.tolist() == [0]
    table.write_text("val_0.JPEG\tn03\t0\t32\t44\t62\n")
    with pytest.raises(InputError, match="val_annotations.txt has no class for .*val_1.JPEG"):
        open_images(tmp_path, "val")


# ---- torchvision's data sets ----


def write_checked(monkeypatch, kind, folder, **files):
    """Write files and put their checksums in torchvision's lists: {list: [(name, bytes)]}."""
    folder.mkdir(parents=True)
    for attribute, entries in files.items():
        for name, data in entries:
            (folder / name).write_bytes(data)
        sums = [[name, hashlib.md5(data).hexdigest()] for name, data in entries]
        if attribute == "meta":
            monkeypatch.setattr(kind, "meta", {**kind.meta, "filename": sums[0][0], "md5": sums[0][1]})
        else:
            monkeypatch.setattr(kind, attribute, sums)


@pytest.mark.parametrize("kind", [CIFAR10, CIFAR100])
def test_cifar(tmp_path, monkeypatch, kind):
    fine = kind is CIFAR100
    names = [f"class {i}" for i in range(10)]
    batches = {
        name: {"data": noise(4, 3072), ("fine_labels" if fine else "labels"): [3, 1, 4, 1]}
        for name in (("train", "test") if fine else ("data_batch_1", "data_batch_2", "test_batch"))
    }
    pickled = [(name, pickle.dumps(batch, protocol=2)) for name, batch in batches.items()]
    folder = tmp_path / kind.base_folder
    write_checked(
        monkeypatch,
        kind,
        folder,
        train_list=pickled[:-1],
        test_list=pickled[-1:],
        meta=[("meta" if fine else "batches.meta", pickle.dumps({kind.meta["key"]: names}, protocol=2))],
    )
    for path in (tmp_path, folder):
        images = open_images(path)
        bank, val = find_labeled(cfg_of(path), images)
        assert bank is images and len(val) == 4
    assert images.classes == names and images.labels.tolist() == [3, 1, 4, 1] * (len(batches) - 1)
    assert images.name(1) == f"{kind.base_folder} train:1" and val.name(2) == f"{kind.base_folder} test:2"
    for source, batch in ((images, pickled[0][0]), (val, pickled[-1][0])):
        rows = batches[batch]["data"].reshape(4, 3, 32, 32)  # on disk 1024 red values, then green, then blue
        assert all(np.array_equal(source.read(i).numpy(), rows[i]) for i in range(4))
    assert check_pixels(images) == []
    assert len(ForkingPickler.dumps(images)) < 2000  # the pixels are shared with workers, not sent
    file = folder / pickled[0][0]
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(InputError, match=rf"{kind.base_folder} is incomplete.*import {kind.__name__};"):
        open_images(tmp_path)


def test_stl10(tmp_path, monkeypatch):
    train, unlabeled, test = noise(3, 3, 96, 96), noise(5, 3, 96, 96), noise(2, 3, 96, 96)
    write_checked(
        monkeypatch,
        STL10,
        tmp_path / "stl10_binary",
        train_list=[
            ("train_X.bin", train.tobytes()),
            ("train_y.bin", bytes([2, 1, 2])),
            ("unlabeled_X.bin", unlabeled.tobytes()),
        ],
        test_list=[("test_X.bin", test.tobytes()), ("test_y.bin", bytes([1, 2]))],
    )
    (tmp_path / "stl10_binary/class_names.txt").write_text("airplane\nbird\n")
    images = open_images(tmp_path)
    assert images.labels.tolist() == [1, 0, 1, -1, -1, -1, -1, -1] and images.labels.dtype == np.int64
    bank, val = find_labeled(cfg_of(tmp_path), images)
    assert bank.labels.tolist() == [1, 0, 1] and val.labels.tolist() == [0, 1]
    assert bank.classes == val.classes == ["airplane", "bird"]
    for source, i, column_major in ((images, 4, unlabeled[1]), (bank, 2, train[2]), (val, 1, test[1])):
        assert np.array_equal(source.read(i).numpy(), column_major.transpose(0, 2, 1))
    assert images.name(4) == "stl10_binary train+unlabeled:4"
    with pytest.raises(InputError, match="DATA.CLASSES"):
        open_images(tmp_path, "pretrain", "pretrain/imagenet100_classes.txt")


# ---- Hugging Face ----


def encoded(pixels, format):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """(folder, pixels, labels): as on the hub, two Parquet shards of 10 training images and one of 4 for
    validation; in saved/ the same by save_to_disk. Image 6 is damaged.
    """
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("hub")
    datasets.config.HF_DATASETS_CACHE = str(folder / "cache")
    pixels = [noise(12 + i, 20, 3) for i in range(14)]
    labels = RNG.integers(0, 3, 14).tolist()
    rows = [encoded(p, "PNG") for p in pixels]
    rows[6] = rows[6][:40]
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "img": datasets.Image(),
            "fine": datasets.ClassLabel(names=["x", "y", "z"]),
        }
    )

    def table(part):
        return datasets.Dataset.from_dict(
            {
                "id": [str(i) for i in part],
                "fine": [labels[i] for i in part],
                "img": [{"bytes": rows[i], "path": None} for i in part],
            },
            features=features,
        )

    (folder / "data").mkdir()
    for name, part in (
        ("train-00000-of-00002", range(6)),
        ("train-00001-of-00002", range(6, 10)),
        ("validation-00000-of-00001-b42abc0123456789", range(10, 14)),
    ):
        table(part).to_parquet(folder / "data" / f"{name}.parquet")
    datasets.DatasetDict(train=table(range(10)), validation=table(range(10, 14))).save_to_disk(
        folder / "saved"
    )
    return folder, pixels, labels


@pytest.mark.parametrize("path", ["", "data", "saved", "saved/train"])
def test_hugging_face(hub, path):
    folder, pixels, labels = hub[0] / path, *hub[1:]
    images = open_images(folder)
    bank, val = find_labeled(cfg_of(folder), images)
    assert (
        bank is images
        and len(images) == 10
        and len(val) == 4
        and images.classes == val.classes == ["x", "y", "z"]
    )
    assert images.labels.tolist() == labels[:10] and val.labels.tolist() == labels[10:]
    for i in (*range(6), *range(7, 10)):
        assert np.array_equal(images.read(np.int64(i)).permute(1, 2, 0).numpy(), pixels[i])
    assert np.array_equal(val.read(3).permute(1, 2, 0).numpy(), pixels[13])
    name = f"{hub[0] / 'saved/train'}:6" if "saved" in path else "train-00001-of-00002.parquet:0"
    assert images.name(6) == name and images.name(5).endswith(":5")
    with pytest.raises(UnreadableImage, match=name):
        images.read(6)


def test_hugging_face_columns(hub, tmp_path):
    datasets = pytest.importorskip("datasets")
    image = {"bytes": encoded(noise(9, 9, 3), "PNG"), "path": None}
    save(tmp_path / "x.png", noise(9, 9, 3))

    def write(**columns):
        features = datasets.Features(
            {
                name: datasets.Image()
                if name == "picture"
                else datasets.Value("string" if isinstance(values[0], str) else "int64")
                for name, values in columns.items()
            }
        )
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "train.parquet")
        return open_images(tmp_path)

    images = write(picture=[image, {"bytes": None, "path": str(tmp_path / "x.png")}, None, image])
    assert images.classes == [] and images.labels.tolist() == [-1] * 4
    with pytest.raises(NoValidation):
        find_labeled(cfg_of(tmp_path), images)
    assert torch.equal(images.read(1), by_pil(tmp_path / "x.png"))
    with pytest.raises(UnreadableImage, match="train.parquet:2"):
        images.read(2)
    images = write(picture=[image] * 4, label=["dog", "cat", None, "dog"])
    assert images.classes == ["cat", "dog"] and images.labels.tolist() == [1, 0, -1, 1]
    images = write(picture=[image] * 4, labels=[7, -1, 2, 7])
    assert images.classes == ["2", "7"] and images.labels.tolist() == [1, -1, 0, 1]
    with pytest.raises(InputError, match="no column of images, only a, b"):
        write(a=[1], b=["x"])


@pytest.mark.parametrize(
    "path, file", [("data", "train-00001-of-00002.parquet"), ("saved/train", "data-00000-of-00001.arrow")]
)
def test_hugging_face_tables_are_known_by_their_files(hub, tmp_path, path, file):
    folder = shutil.copytree(hub[0] / path, tmp_path / "copy")
    before = fingerprint(open_images(folder))
    assert fingerprint(open_images(folder)) == before
    os.utime(folder / file, ns=(1, 1))
    assert fingerprint(open_images(folder)) != before


def test_hugging_face_refusals(hub, tmp_path, monkeypatch):
    source = hub[0] / "data"
    with pytest.raises(InputError, match="DATA.CLASSES"):
        open_images(source, "train", "pretrain/imagenet100_classes.txt")
    file = tmp_path / "train-00001-of-00002.parquet"
    file.write_bytes((source / file.name).read_bytes())
    with pytest.raises(InputError, match="1 of the 2 shards of train"):
        open_images(tmp_path)
    with pytest.raises(InputError, match="has only train, no val or test"):
        open_images(tmp_path, "val")
    file.rename(tmp_path / "train.parquet").write_bytes(b"PAR1 not a table")
    with pytest.raises(InputError, match=str(tmp_path)):
        open_images(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install -c constraints.txt -e '\.\[hf\]'"):
        open_images(source)


# ---- workers ----


def first_images(sources, queue=None):
    found = [(images.name(1), images.read(0).sum().item(), images.read(1).sum().item()) for images in sources]
    return queue.put(found) if queue else found


def test_sources_travel_to_spawned_workers(hub, image_folder):
    sources = [open_images(image_folder), open_images(hub[0])]
    assert len(pickle.dumps(sources)) < 10_000
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=first_images, args=(sources, queue))
    worker.start()
    assert queue.get(timeout=600) == first_images(sources)
    worker.join()


# ---- images that cannot be decoded ----


@pytest.fixture
def with_damage(tmp_path):
    """Eight images in two classes; 2, 3 and 7 cannot be decoded."""
    for i in range(8):
        path = tmp_path / "train" / "ab"[i % 2] / f"{i}.png"
        save(path, np.full((9, 9, 3), i, np.uint8))
    images = ImageFolder(tmp_path / "train")  # a: 0 2 4 6, b: 1 3 5 7
    for i in (2, 3, 7):
        open(images.name(i), "w").close()
    return images


def test_the_next_image_stands_in(with_damage):
    images = with_damage
    shown = {0: 0, 1: 2, 4: 1, 5: 3, 6: 5}  # index -> what is painted on it
    for index, used, skipped in ((0, 0, 0), (2, 4, 2), (3, 4, 1), (7, 0, 1)):
        image, count = read_or_next(images, index)
        assert count == skipped and image.unique().tolist() == [shown[used]]
        image, label = RandomCrops(images, 8, 0)[0, index]
        assert image.unique().tolist() == [shown[used]] and label == images.labels[used]
        image, label = CenterCrops(images, [index], 8, 8, replace=True)[0]
        assert image.unique().tolist() == [shown[used]] and label == images.labels[used]
    with pytest.raises(UnreadableImage):
        CenterCrops(images, [2], 8, 8)[0]
    for i in range(8):
        open(images.name(i), "w").close()
    with pytest.raises(InputError, match="8 images in a row.*b.5.png to .*b.3.png: restore") as error:
        read_or_next(images, 2 + 4)
    assert not isinstance(error.value, UnreadableImage)


def test_knn_replaces_in_the_bank_and_where_told(with_damage, image_folder):
    features = Features(
        torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()),
        cfg_of(image_folder).DATA,
        None,
    )
    assert 0 <= evaluate_knn(features, with_damage, ImageFolder(image_folder), None) <= 100
    with pytest.raises(UnreadableImage):
        evaluate_knn(features, ImageFolder(image_folder), with_damage, None)
    assert 0 <= evaluate_knn(features, ImageFolder(image_folder), with_damage, None, replace=True) <= 100


class Numbered:
    """A source that has only the names of ``count`` images."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def id(self, index):
        return f"/images/{index}.jpg"

    name = id


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_list_of_bad_images(tmp_path):
    path = tmp_path / "bad_images.txt"
    one, other = (BadImages(path, Numbered(6000), 0.001) for _ in range(2))  # of two processes
    one.add([])
    assert not path.exists()
    one.add([7, 7])
    other.add(np.array([7, 5]))
    one.add([5])
    assert lines(path) == ["/images/7.jpg", "/images/5.jpg"]
    BadImages(path, Numbered(6000), 0.001).add([1, 2, 3, 4])  # six of 6000 are 0.1 %, which is allowed
    assert len(lines(path)) == len(one) == 6
    with pytest.raises(
        InputError,
        match=r"bad_images.txt lists 7 of 6000 images as unreadable, /images/0.jpg first, and "
        "DATA.MAX_BAD allows 6: replace or remove them, or raise it",
    ):
        one.add([0, 3])
    assert len(lines(path)) == 7


@pytest.mark.parametrize(
    "count, max_bad, allowed",
    [(24, 0.001, 5), (24, 0.5, 12), (4999, 0.001, 5), (6000, 0.001, 6), (24, 0.0, 0)],
)
def test_how_many_may_be_bad(tmp_path, count, max_bad, allowed):
    BadImages(tmp_path / "list", Numbered(count), max_bad).add(range(allowed))
    with pytest.raises(InputError, match=f"allows {allowed}:"):
        BadImages(tmp_path / "list", Numbered(count), max_bad).add(range(allowed, allowed + 1))


def test_lists_of_older_versions(tmp_path, with_damage):
    """Older lists have whole paths. They stay as they are, and a run that goes on does not list them
    again."""
    path, images = tmp_path / "bad_images.txt", with_damage
    path.write_text("".join(f"{images.name(index)}\n" for index in (7, 2)))
    bad_images = BadImages(path, images, 0.001)
    bad_images.start()
    assert lines(path) == ["a/4.png", "b/7.png"] and sum(images.bad[:]) == 2
    bad_images.add([2, 3])
    assert lines(path) == ["a/4.png", "b/7.png", "a/6.png"]
    path.write_text(path.read_text().rstrip("\n"))  # an editor's
    BadImages(path, images, 0.001).add([0])
    assert len(lines(path)) == 4


def test_what_was_replaced_or_removed_leaves_the_list(tmp_path, with_damage):
    path = tmp_path / "bad_images.txt"
    BadImages(path, with_damage, 0.001).add([2, 3, 7])
    save(tmp_path / "train/a/4.png", np.full((9, 9, 3), 4, np.uint8))
    (tmp_path / "train/b/7.png").unlink()
    images = ImageFolder(tmp_path / "train")
    BadImages(path, images, 0.001).start()
    assert lines(path) == ["a/6.png"] and [*images.bad[:]] == [0, 0, 0, 1, 0, 0, 0]
    assert read_or_next(images, 2)[0].unique().tolist() == [4]
    path.write_text('"a/6.png"\n"b/3.png"\n')
    open(images.name(5), "w").close()
    with pytest.raises(InputError, match="lists 2 of 7 .*MAX_BAD allows 0"):
        BadImages(path, images, 0.0).start()


def test_a_disk_that_takes_no_list_does_not_stop_the_run(tmp_path, capsys):
    bad_images = BadImages(tmp_path / "absent/list", Numbered(24), 0.001)
    bad_images.add([1])
    assert (
        "cannot write" in (said := capsys.readouterr().err)
        and "list (No such file" in said
        and "goes on" in said
    )
    with pytest.raises(InputError, match="lists 6 of 24"):
        bad_images.add(range(6))


def test_an_image_that_is_known_to_be_bad_is_not_decoded_again(with_damage, monkeypatch):
    """The same image stands in for it, whether it is known to be bad or not."""
    reads = []
    read = ImageFolder.read
    monkeypatch.setattr(
        ImageFolder, "read", lambda images, index: (reads.append(index), read(images, index))[1]
    )
    for known in ((), (2,), (3,), (2, 3, 7)):
        images = ImageFolder(with_damage.root)
        for index in known:
            images.bad[index] = 1
        found = [
            (read_or_next(images, index)[0].unique().item(), read_or_next(images, index)[1])
            for index in range(8)
        ]
        assert found == [(0, 0), (2, 0), (1, 2), (1, 1), (1, 0), (3, 0), (5, 0), (0, 1)]
        assert [reads.count(index) for index in (2, 3, 7)] == [int(index not in known) for index in (2, 3, 7)]
        reads.clear()


def test_workers_tell_each_other_what_is_bad(with_damage):
    images = CenterCrops(with_damage, range(8), 8, 8, replace=True).images
    worker = multiprocessing.get_context("fork").Process(target=read_or_next, args=(images, 2))
    worker.start()
    worker.join(60)
    assert [*images.bad[:]] == [0, 0, 1, 1, 0, 0, 0, 0]
    assert "bad" not in pickle.loads(pickle.dumps(images)).__dict__
