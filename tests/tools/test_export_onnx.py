"""tools/export_onnx.py: onnxruntime gives what PyTorch gives, and runs the file without this package."""

import json
import re
import subprocess
import sys

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.tools import export_onnx
from rsa_detectron2.transfer.config import torchvision_defaults
from rsa_detectron2.transfer.data.drawn import TOYS, draw_toys
from rsa_detectron2.transfer.data.images import read_image
from rsa_detectron2.transfer.report.trained import find_trained
from rsa_detectron2.transfer.tv.detector import Detector
from rsa_detectron2.transfer.tv.evaluation import detect_one
from rsa_detectron2.transfer.tv.export import Exported
from rsa_detectron2.transfer.tv.paste import paste_rles
from tests.conftest import ROOT

pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
embedded = pytest.mark.parametrize("trained", ["torchvision"], indirect=True)


@pytest.fixture
def export(monkeypatch):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["export_onnx", *map(str, words)])
        export_onnx.main()

    return run


def examples():
    text = (ROOT / "docs" / "commands.md").read_text().split("## tools/export_onnx.py")[1]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)[:2]


def drawn(seed, height, width):
    """An image of toys, uint8 [height, width, 3]."""
    image = Image.fromarray(draw_toys(np.random.default_rng(seed), 128, TOYS.classes[seed : seed + 3])[0])
    return np.array(image.resize((width, height)))


@embedded
def test_onnxruntime_equals_pytorch(trained, export, tmp_path):
    """Within 1e-3 pixels, probabilities and scores; sizes are such that single precision would round the
    resized side to another pixel, and one image is blank."""
    export(trained, tmp_path / "new" / "a.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "new" / "a.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["names"]) == TOYS.classes
    model = find_trained(trained)
    model = Detector(model.merge_into(torchvision_defaults()), model.path).model
    sizes = [(128, 128), (375, 500), (500, 333), (41, 300), (626, 630), (90, 60)]
    images = [drawn(seed, *size) for seed, size in enumerate(sizes)] + [np.zeros((64, 64, 3), np.uint8)]
    for image in images:
        found = session.run(None, {"image": image})
        with torch.no_grad():
            expected = detect_one(model, torch.tensor(image).permute(2, 0, 1).float() / 255)
        expected = expected["boxes"], expected["labels"] - 1, expected["scores"], expected["masks"][:, 0]
        assert [array.shape for array in found] == [tuple(tensor.shape) for tensor in expected]
        for array, tensor in zip(found, expected):
            np.testing.assert_allclose(array, tensor.numpy(), rtol=0, atol=1e-3)
    assert len(found[0]) > 10


@pytest.mark.parametrize("sides", ((800, 1333), (128, 1333), (64, 100)))
def test_images_are_resized_as_in_training(sides):
    cfg = torchvision_defaults()
    cfg.merge_from_list(["INPUT.MIN_SIZE_TRAIN", (sides[0],), "INPUT.MAX_SIZE_TRAIN", sides[1]])
    model, reference = torch.nn.Module(), GeneralizedRCNNTransform(*sides, [0.5] * 3, [0.2] * 3)
    model.transform = GeneralizedRCNNTransform(*sides, [0.5] * 3, [0.2] * 3)
    exported = Exported(model)
    generator = np.random.default_rng(0)
    for height, width in generator.integers(20, 1500, (60, 2)):
        image = torch.zeros(1, height, width)
        assert exported.resize(image, None)[0].shape == reference.resize(image, None)[0].shape


@embedded
def test_the_example_of_the_docs_runs_without_this_package(trained, export, tmp_path):
    """With onnxruntime, NumPy and Pillow alone."""
    export(trained / "model_final.pth", tmp_path / "detector.onnx")
    image = drawn(3, 300, 400)
    Image.fromarray(image).save(tmp_path / "photo.jpg", quality=95)
    first, second = examples()
    absent = "import sys; sys.modules |= dict.fromkeys(('rsa_detectron2', 'torch', 'detectron2'))\n"
    end = "numpy.savez('out.npz', boxes=boxes, labels=labels, scores=scores, mask=mask, names=names)"
    command = [sys.executable, "-c", absent + first + second + end]
    subprocess.run(command, cwd=tmp_path, check=True)
    found = np.load(tmp_path / "out.npz")
    model = find_trained(trained)
    detect = Detector(model.merge_into(torchvision_defaults()), model.path)
    expected = detect(read_image(tmp_path / "photo.jpg"))
    assert found["names"].tolist() == TOYS.classes and len(first.split("\n")) <= 7
    assert found["labels"].tolist() == [d["category_id"] for d in expected]
    np.testing.assert_allclose(found["scores"], [d["score"] for d in expected], atol=1e-3)
    assert found["mask"].shape == (300, 400)


def test_the_paste_of_the_docs_is_that_of_predict():
    """Of a disk, but for 3 % of its pixels, those at the outline. The second box ends at the corner."""
    second = examples()[1]
    y, x = np.mgrid[:28, :28]
    masks = (1 / (1 + np.exp(np.hypot(x - 13.5, y - 13.5) - 11)))[None].astype(np.float32)
    for box in ([20.3, 31.8, 151.2, 122.6], [270.4, 210.7, 400.0, 300.0]):
        boxes = np.array([box], np.float32)
        names = {"boxes": boxes, "masks": masks, "image": np.zeros((300, 400, 3)), "numpy": np, "PIL": PIL}
        exec(second, names)
        (code,) = paste_rles(torch.tensor(masks)[None], torch.tensor(boxes), (300, 400))
        expected = rle.decode(code).astype(bool)
        assert expected.sum() > 5000 and (expected ^ names["mask"]).sum() < 0.03 * expected.sum()


def test_what_is_refused(export, tmp_path):
    (tmp_path / "there.onnx").write_text("")
    with pytest.raises(InputError, match="there.onnx is there already: give another FILE, or --overwrite"):
        export(tmp_path, tmp_path / "there.onnx")
    torch.save({"run": {"engine": "detectron2", "config": ""}}, tmp_path / "model_final.pth")
    with pytest.raises(InputError, match="a model of Detectron2, which is exported by Detectron2's tools"):
        export(tmp_path, tmp_path / "new.onnx")
