"""kNN and linear evaluation on features whose answer is known, and the features that are kept beside a
checkpoint.
"""

import json
import math

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from rsa_detectron2.pretrain.config import get_cfg
from rsa_detectron2.pretrain.data.datasets import ImageFolder, Source
from rsa_detectron2.pretrain.evaluate import knn
from rsa_detectron2.pretrain.evaluate.cache import FeatureCache
from rsa_detectron2.pretrain.evaluate.features import LONGEST, CenterCrops, Features, Labeled, center_crop
from rsa_detectron2.pretrain.evaluate.knn import knn_top1
from rsa_detectron2.pretrain.evaluate.linear import (
    LINEAR,
    LinearClassifier,
    RandomCrops,
    Trial,
    evaluate_linear,
    evaluate_linear_on,
    shorten,
    standardize,
)
from rsa_detectron2.pretrain.method.networks import build_backbone
from tests.conftest import rsa_networks


def test_knn_equals_a_loop():
    """numpy sums the weighted votes of the k nearest, one query at a time."""
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(60, 8)), rng.normal(size=(25, 8))
    bank_labels, labels = rng.integers(0, 4, 60), rng.integers(0, 4, 25)
    correct = 0
    for query, label in zip(queries, labels):
        cosine = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        votes = np.zeros(4)
        for i in np.argsort(-cosine)[:7]:
            votes[bank_labels[i]] += math.exp(cosine[i] / 0.1)
        correct += votes.argmax() == label
    tensors = (torch.tensor(x) for x in (bank, bank_labels, queries, labels))
    bank, bank_labels, queries, labels = tensors
    found = knn_top1(Labeled(bank.float(), bank_labels), Labeled(queries.float(), labels), k=7)
    assert found == pytest.approx(100 * correct / 25)


@pytest.mark.parametrize(
    "images, classes, k", [(50_000, 10, 200), (10_000, 10, 200), (1600, 8, 50), (6, 3, 1)]
)
def test_k_follows_the_bank(images, classes, k):
    assert knn.neighbors(torch.arange(images) % classes) == k


def test_a_small_class_is_not_outvoted():
    """Three tight clusters of 12, 12 and 300 images: all of the bank would vote for the last one."""
    labels = torch.tensor([0] * 12 + [1] * 12 + [2] * 300)
    bank = Labeled(torch.eye(3)[labels] + 0.01, labels)
    queries = Labeled(torch.eye(3), torch.arange(3))
    assert knn_top1(bank, queries) == 100
    assert knn_top1(bank, queries, k=324, temperature=10.0) < 40


def test_knn_in_small_parts(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(count, 8, generator=generator) for count in (300, 50)]
    labels = [torch.randint(4, (count,), generator=generator) for count in (300, 50)]
    bank, queries = map(Labeled, features, labels)
    before = bank.features.clone()
    whole = knn_top1(bank, queries, k=20)
    monkeypatch.setattr(knn, "SIMILARITIES", 700)  # two queries at a time
    assert knn_top1(bank, queries, k=20) == whole
    assert torch.equal(bank.features, before)


@pytest.mark.parametrize("k, temperature", [(1, 0.1), (20, 0.1), (200, 0.1), (200, 1.0)])
def test_knn_equals_scikit_learns(k, temperature):
    """KNeighborsClassifier by cosine distance d = 1 - cos, with the weights exp((1 - d) / T);
    classes that overlap.
    """
    neighbors = pytest.importorskip("sklearn.neighbors", reason="scikit-learn is not installed")
    rng = np.random.default_rng(k)
    centers = rng.normal(size=(10, 16))
    bank_labels, labels = rng.integers(0, 10, 1500), rng.integers(0, 10, 400)
    bank = (centers[bank_labels] + 1.5 * rng.normal(size=(1500, 16))).astype(np.float32)
    queries = (centers[labels] + 1.5 * rng.normal(size=(400, 16))).astype(np.float32)
    reference = (
        neighbors.KNeighborsClassifier(
            k, weights=lambda d: np.exp((1 - d) / temperature), metric="cosine", algorithm="brute"
        )
        .fit(bank, bank_labels)
        .score(queries, labels)
    )
    assert 0.3 < reference < 0.95  # otherwise agreement would prove little
    pairs = (bank, bank_labels), (queries, labels)
    found = knn_top1(*(Labeled(*map(torch.from_numpy, pair)) for pair in pairs), k, temperature)
    assert found == pytest.approx(100 * reference, abs=0.01)


class Images(Source):
    """Two classes of plain images, bright red or bright blue; labels may be shuffled."""

    classes = ["red", "blue"]

    def __init__(self, count, root, shuffle=None):
        self.root = root
        self.labels = np.arange(count) % 2
        self.colors = self.labels.copy()
        if shuffle is not None:
            np.random.default_rng(shuffle).shuffle(self.labels)

    def name(self, index):
        return f"{index}"

    def read(self, index):
        image = torch.full((3, 12, 12), 20, dtype=torch.uint8)
        image[0 if self.colors[index] == 0 else 2] = 200 + index % 50
        return image


def make_features(cache=None):
    cfg = get_cfg()
    cfg.merge_from_list(["DATA.IMAGE_SIZE", 8, "DATA.EVAL_RESIZE", 8, "DATA.NUM_WORKERS", 0])
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3),
        torch.nn.BatchNorm2d(6),
        torch.nn.Tanh(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.BatchNorm1d(6),
    )
    return Features(backbone, cfg.DATA, None, cache)


@pytest.mark.parametrize("name", LINEAR)
def test_linear_separates_what_is_separable(name, tmp_path):
    features = make_features()
    features.backbone.train()  # as the training loop leaves it
    before = {name: tensor.clone() for name, tensor in features.backbone.state_dict().items()}
    train, val = Images(64, tmp_path), Images(32, tmp_path)
    top1 = evaluate_linear(features, train, val, shorten(LINEAR[name], 8), Trial(batch_size=16))
    assert len(top1) == 8 and top1[-1] == 100
    assert all(torch.equal(tensor, before[name]) for name, tensor in features.backbone.state_dict().items())
    assert not any(module.training for module in features.backbone.modules())
    assert all(parameter.grad is None for parameter in features.backbone.parameters())


def test_linear_with_batchnorm_in_train_mode_is_a_plain_loop(tmp_path):
    """The loop, written out: the backbone runs each batch in train mode, with its weights untouched. After
    each epoch it classifies the validation images in eval mode, with its running statistics at that time. The
    features' own backbone does not change.
    """
    train, val, protocol = (
        Images(48, tmp_path, shuffle=1),
        Images(32, tmp_path, shuffle=0),
        shorten(LINEAR["small"], 3),
    )
    features = make_features(FeatureCache(tmp_path / "a.pth", "0" * 64))
    before = {name: tensor.clone() for name, tensor in features.backbone.state_dict().items()}
    found = evaluate_linear(features, train, val, protocol, Trial(5, 16, train_bn=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in features.backbone.state_dict().items())

    backbone, crops = make_features().backbone, RandomCrops(train, 8, 5)
    mean, std = (torch.tensor(values)[:, None, None] for values in (features.data.MEAN, features.data.STD))
    torch.manual_seed(5)
    layer = torch.nn.Linear(6, 2)
    torch.nn.init.normal_(layer.weight, std=0.01)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), 30.0, momentum=0.9, nesterov=True)
    queries = torch.stack([val.read(i)[:, :8, :8] for i in range(32)])  # of one color each
    top1 = []
    for epoch in range(3):
        optimizer.param_groups[0]["lr"] = 30.0 if epoch < 2 else 0.3
        order = np.random.default_rng((5, 0, epoch)).permutation(48)
        for first in (0, 16, 32):
            images, labels = zip(*(crops[epoch, int(i)] for i in order[first : first + 16]))
            backbone.train()
            with torch.no_grad():
                batch = backbone((torch.stack(images) / 255 - mean) / std)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(batch), torch.tensor(labels)).backward()
            optimizer.step()
        backbone.eval()
        with torch.no_grad():
            chosen = layer(backbone((queries / 255 - mean) / std)).argmax(1)
        top1.append(100 * (chosen.numpy() == val.labels).mean())
    assert found == pytest.approx(top1) and 0 < min(top1) and max(top1) < 100
    [state] = [
        state for path in (tmp_path / "a.pth.features").iterdir() if "top1" in (state := np.load(path))
    ]
    np.testing.assert_allclose(state["weight"], layer.weight.detach(), rtol=1e-4, atol=1e-4)
    for name, buffer in backbone.named_buffers():
        np.testing.assert_allclose(state[f"backbone {name}"], buffer, rtol=1e-4, atol=1e-5)
    moved = backbone[1].running_mean - before["1.running_mean"]
    assert moved.abs().max() > 0.01


@pytest.mark.parametrize("name", LINEAR)
def test_linear_on_features(name):
    """If a hyperplane separates the classes, every validation image is classified correctly. With shuffled
    labels a tenth is, within four standard deviations of 2000 draws.
    """
    rng = np.random.default_rng(0)
    normals = torch.from_numpy(rng.normal(size=(10, 32))).float()
    labels = torch.from_numpy(rng.integers(0, 10, 3000))
    features = normals[labels] * 3 + torch.from_numpy(rng.uniform(-0.5, 0.5, (3000, 32))).float()
    bank, queries = slice(0, 1000), slice(1000, 3000)
    parts = (Labeled(features[part], labels[part]) for part in (bank, queries))
    top1 = evaluate_linear_on(*parts, LINEAR[name])
    assert len(top1) == LINEAR[name].epochs and top1[-1] == 100
    noise = torch.from_numpy(rng.permutation(3000))
    labels = labels[noise]
    parts = (Labeled(features[part], labels[part]) for part in (bank, queries))
    top1 = evaluate_linear_on(*parts, LINEAR[name])
    assert abs(top1[-1] - 10) < 4 * 100 * math.sqrt(0.1 * 0.9 / 2000)


@pytest.mark.parametrize(
    "name, rates",
    [
        ("small", {0: 30, 59: 30, 60: 3, 79: 3, 80: 0.3, 99: 0.3}),
        ("large", {0: 0.01, 14: 0.01, 15: 0.001, 29: 0.001, 30: 0.0001, 39: 0.0001}),
    ],
)
def test_rates_of_the_protocols(name, rates, monkeypatch):
    """The learning rate that SGD got in each epoch, counted from 0, and all its other arguments."""
    told = []
    step = torch.optim.SGD.step

    def spy(optimizer, *args):
        told.append(optimizer.param_groups[0].copy())
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    images = Labeled(torch.randn(256, 4, generator=torch.manual_seed(0)), torch.arange(256) % 2)
    evaluate_linear_on(images, images, LINEAR[name])
    assert len(told) == {"small": 100, "large": 40}[name]  # one batch of 256 each
    assert {epoch: told[epoch]["lr"] for epoch in rates} == pytest.approx(rates)
    assert {group["weight_decay"] for group in told} == {{"small": 0, "large": 1e-4}[name]}
    assert {group["momentum"] for group in told} == {0.9}
    assert (
        shorten(LINEAR["small"], 10).milestones == (6, 8)
        and shorten(LINEAR["large"], None) is LINEAR["large"]
    )


def test_standardization_against_numpy(tmp_path):
    features, train = make_features(), Images(50, tmp_path)
    found = features.of(train, "all")[0].numpy().astype(np.float64)
    unit = found / np.linalg.norm(found, axis=1, keepdims=True)
    mean, var = features.statistics(train)
    np.testing.assert_allclose(mean, unit.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(var, unit.var(0, ddof=1), rtol=1e-4, atol=1e-9)
    expected = (unit - unit.mean(0)) / np.sqrt(unit.var(0, ddof=1) + 1e-5)
    np.testing.assert_allclose(standardize(torch.from_numpy(found).float(), mean, var), expected, atol=1e-3)
    assert LINEAR["large"].standardize and not LINEAR["small"].standardize
    # The classifier sees these: its first logits are the layer's on the expected features.
    classifier = LinearClassifier(6, 3, LINEAR["large"], 0, (mean, var))
    logits = expected @ classifier.layer.weight.detach().numpy().T
    np.testing.assert_allclose(classifier(torch.from_numpy(found).float()).detach(), logits, atol=1e-3)


# ---- the center crop ----


@pytest.mark.parametrize(
    "height, width", [(300, 400), (256, 256), (57, 100), (9, 36), (480, 120), (1500, 700)]
)
@pytest.mark.parametrize("resize, size", [(256, 224), (64, 64)])
def test_center_crops_are_torchvisions(height, width, resize, size):
    image = torch.randint(256, (3, height, width), dtype=torch.uint8, generator=torch.manual_seed(0))
    expected = TF.center_crop(TF.resize(image, [resize], antialias=True), [size, size])
    assert torch.equal(center_crop(image, resize, size), expected)


@pytest.mark.parametrize("height, width", [(40, 700), (701, 40), (10, 3001), (3, 1000), (300, 4000)])
def test_center_crops_of_long_images(height, width, monkeypatch):
    """The crops are the same, except that the long side is rounded, by up to half a pixel of the output; no
    large image is made on the way.
    """
    # Smooth, so that half a pixel is less than two gray levels, apart from what the crop itself makes.
    rng = np.random.default_rng(0)
    waves = sum(
        np.sin(2 * np.pi * (np.arange(max(height, width)) / min(height, width) * f + rng.random()))
        for f in (0.3, 0.7, 1.1)
    )
    line = torch.from_numpy((127 + 40 * waves).astype(np.uint8))
    image = (line[:, None] if height > width else line).expand(3, height, width).contiguous()
    expected = TF.center_crop(TF.resize(image, [64], antialias=True), [56, 56])
    sizes = []
    resized = TF.resize
    monkeypatch.setattr(
        TF,
        "resize",
        lambda *args, **options: sizes.append((out := resized(*args, **options)).shape) or out,
    )
    found = center_crop(image, 64, 56)
    assert (found.int() - expected.int()).abs().max() <= 4
    assert found.shape == (3, 56, 56) and max(sizes[0][1:]) <= 64 * (LONGEST + 1)


def test_center_crop_of_one_line_of_pixels():
    image = torch.randint(256, (3, 1, 20000), dtype=torch.uint8, generator=torch.manual_seed(0))
    crop = center_crop(image, 256, 224)
    assert crop.shape == (3, 224, 224) and torch.equal(crop, center_crop(image.mT, 256, 224).mT)
    middle = image[:, 0, 9999:10001].float()  # the center lies between these two pixels
    assert (crop[:, 0, 111:113].float() - middle.mean(1, keepdim=True)).abs().max() < 2
    odd = torch.cat([image, image[..., :1]], -1)
    symmetric = torch.maximum(odd, odd.flip(-1))  # its crop is symmetric only if the center has stayed
    assert torch.equal(center_crop(symmetric, 256, 224), center_crop(symmetric, 256, 224).flip(-1))


# ---- what is kept beside a checkpoint ----


@pytest.fixture
def counted(monkeypatch):
    """Counts the images that were read, by the transform that read them."""
    reads = {"center": 0, "random": 0}
    for name, kind in (("center", CenterCrops), ("random", RandomCrops)):

        def get(self, key, name=name, original=kind.__getitem__):
            reads[name] += 1
            return original(self, key)

        monkeypatch.setattr(kind, "__getitem__", get)
    return reads


def test_features_are_extracted_once(tmp_path, counted):
    images = Images(20, tmp_path)
    first = make_features(FeatureCache(tmp_path / "a.pth", "0" * 64)).of(images, "a")
    again = make_features(FeatureCache(tmp_path / "a.pth", "0" * 64)).of(images, "a")
    assert counted["center"] == 20 and all(map(torch.equal, first, again))
    statistics = make_features(FeatureCache(tmp_path / "a.pth", "0" * 64)).statistics(images)
    again = make_features(FeatureCache(tmp_path / "a.pth", "0" * 64)).statistics(images)
    assert counted["center"] == 40 and all(map(torch.equal, statistics, again))


def test_features_of_something_else_are_not_used(tmp_path, counted):
    def reads(images, sha256="0" * 64, **data):
        before = counted["center"]
        features = make_features(FeatureCache(tmp_path / "a.pth", sha256))
        features.data.merge_from_list([item for key, value in data.items() for item in (key, value)])
        features.of(images, "a")
        return counted["center"] - before

    images = Images(20, tmp_path)
    assert reads(images) == 20 and reads(images) == 0
    assert reads(images, EVAL_RESIZE=10) == 20 and reads(images, MEAN=(0.1, 0.2, 0.3)) == 20
    assert reads(Images(20, tmp_path / "elsewhere")) == 20 and reads(Images(20, tmp_path, shuffle=1)) == 20
    assert reads(images) == 0 and len(list((tmp_path / "a.pth.features").iterdir())) == 5
    assert reads(images, "1" * 64) == 20  # another checkpoint under the same name: the kept features are gone
    assert len(list((tmp_path / "a.pth.features").iterdir())) == 1


def test_an_image_file_that_changed_is_read_again(tmp_path, counted, image_folder):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, path in enumerate(sorted(image_folder.rglob("*.png"))[:3]):
        (folder / f"{i}.png").write_bytes(path.read_bytes())

    def features():
        return make_features(FeatureCache(tmp_path / "a.pth", "0" * 64)).of(ImageFolder(folder), "a")[0]

    before = features()
    assert torch.equal(features(), before) and counted["center"] == 3
    (folder / "0.png").write_bytes((folder / "1.png").read_bytes())
    after = features()
    assert counted["center"] == 6 and torch.equal(after[0], before[1]) and torch.equal(after[1:], before[1:])


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "foreign"])
def test_a_damaged_file_is_computed_anew_and_said(tmp_path, counted, capsys, damage):
    images = Images(20, tmp_path)
    first = make_features(FeatureCache(tmp_path / "a.pth", "0" * 64)).of(images, "a")
    [path] = (tmp_path / "a.pth.features").iterdir()
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[content.index(first[0].numpy().tobytes()) + 100] ^= 1  # one bit of a feature
    path.write_bytes({"flip": content, "cut": content[:200], "empty": b"", "foreign": b"hello"}[damage])
    assert not capsys.readouterr().err
    again = make_features(FeatureCache(tmp_path / "a.pth", "0" * 64)).of(images, "a")
    assert counted["center"] == 40 and all(map(torch.equal, first, again))
    assert f"{path} is damaged" in capsys.readouterr().err
    make_features(FeatureCache(tmp_path / "a.pth", "0" * 64)).of(images, "a")
    assert counted["center"] == 40 and not capsys.readouterr().err


def test_a_folder_that_takes_nothing_costs_a_line(tmp_path, capsys):
    (tmp_path / "a.pth.features").write_text("in the way")
    features = make_features(FeatureCache(tmp_path / "a.pth", "0" * 64)).of(Images(20, tmp_path), "a")[0]
    assert features.shape == (20, 6) and "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize("name, train_bn", [("small", False), ("small", True), ("large", False)])
def test_linear_evaluation_goes_on_bit_for_bit(name, train_bn, tmp_path, counted, monkeypatch):
    train, val, protocol = Images(48, tmp_path), Images(32, tmp_path, shuffle=0), shorten(LINEAR[name], 6)
    trial = Trial(batch_size=16, train_bn=train_bn)
    features = make_features(FeatureCache(tmp_path / "a.pth", "0" * 64))
    whole = evaluate_linear(features, train, val, protocol, trial)
    stopped = FeatureCache(tmp_path / "b.pth", "1" * 64)
    put = stopped.put

    def stop(what, **arrays):
        put(what, **arrays)
        if "linear" in what and len(arrays["top1"]) == 4:
            raise KeyboardInterrupt

    stopped.put = stop
    with pytest.raises(KeyboardInterrupt):
        evaluate_linear(make_features(stopped), train, val, protocol, trial)
    counted["random"] = 0
    again = FeatureCache(tmp_path / "b.pth", "1" * 64)
    assert evaluate_linear(make_features(again), train, val, protocol, trial) == whole
    assert counted["random"] == 2 * 48
    assert evaluate_linear(make_features(again), train, val, protocol, trial) == whole
    assert counted["random"] == 2 * 48

    def last(name):
        [state] = [
            state for path in (tmp_path / f"{name}.features").iterdir() if "top1" in (state := np.load(path))
        ]
        return {key: state[key] for key in state if key != "identity"}

    assert last("a.pth").keys() == last("b.pth").keys()
    assert all((last("a.pth")[key] == last("b.pth")[key]).all() for key in last("a.pth"))


# ---- the tool ----


def test_tool_takes_another_projects_checkpoint(tool, image_folder, tmp_path):
    """The same ResNet-18 has the same kNN top-1 in this project's layout and in that of the authors' code."""
    torch.manual_seed(0)
    saved = {"format": "rsa-pretraining", "method": "rsa", "step": 7}
    saved["config"] = json.dumps({"MODEL": {"BACKBONE": "resnet18"}})
    saved["model"] = rsa_networks(build_backbone("resnet18"), 64, 16).state_dict()
    foreign = {
        f"encoder_q.{name.removeprefix('online.backbone.')}": tensor
        for name, tensor in saved["model"].items()
        if name.startswith("online.backbone.")
    }
    torch.save({"state_dict": foreign}, tmp_path / "theirs.pth")
    torch.save(saved, tmp_path / "ours.pth")
    results = []
    for name in ("ours", "theirs"):
        done = tool("evaluate", "knn", tmp_path / f"{name}.pth", "--train", image_folder)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
    assert results[0]["knn_top1"] == results[1]["knn_top1"] and results[0]["method"] == "rsa"
    assert results[0]["sha256"] != results[1]["sha256"] and results[1]["branch"] == "online"
    features = [next(iter((tmp_path / f"{name}.pth.features").glob("*.npz"))) for name in ("ours", "theirs")]
    assert np.load(features[0])["features"].shape == np.load(features[1])["features"].shape == (24, 512)
    for name, text in (("absent.pth", "no checkpoint"), ("broken.pth", "cannot be read")):
        if "broken" in name:
            (tmp_path / name).write_bytes(b"not a checkpoint")
        done = tool("evaluate", "knn", tmp_path / name)
        assert done.returncode == 2 and text in done.stderr and done.stderr.count("\n") == 1
