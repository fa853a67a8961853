"""tools/convert_to_d2.py takes the backbone out of a detector that either engine has fine-tuned."""

import safetensors.torch
import timm
import torch
import torchvision

from rsa_detectron2.tools.predict import load
from rsa_detectron2.transfer.convert.writers import convert
from rsa_detectron2.transfer.report.trained import find_trained


def test_features_are_those_of_the_detector(trained, tmp_path):
    model = find_trained(trained)
    backbone = load(model)[0].model.backbone
    body = getattr(backbone, "bottom_up", None) or backbone.body
    path, provenance = convert(model.path, tmp_path / "a.pth", "torchvision")
    resnet = torchvision.models.resnet18()
    resnet.load_state_dict(torch.load(path)["state_dict"], strict=False)
    resnet = torch.nn.Sequential(*list(resnet.children())[:-2]).eval()
    path, _ = convert(model.path, tmp_path / "a.safetensors", "timm")
    network = timm.create_model("resnet18", num_classes=0).eval()
    network.load_state_dict(safetensors.torch.load_file(path))
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = list(body(images).values())[-1]
        assert torch.equal(resnet(images), expected)
        torch.testing.assert_close(network.forward_features(images), expected, rtol=1e-5, atol=1e-5)
    assert provenance["pixel_mean"] == [123.675, 116.28, 103.53] and provenance["pixel_source"] == "file"
