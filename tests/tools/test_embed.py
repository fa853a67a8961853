"""tools/embed.py: the features of rsa.extract_features, and what the README finds with them."""

import json
import re
import sys

import numpy as np
import pytest
import torch

import rsa_detectron2 as rsa
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.tools import embed
from tests.conftest import ROOT


@pytest.fixture
def call(monkeypatch, capsys):
    """``call(checkpoint, images, ...)`` runs the tool and returns what it prints."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["embed", *map(str, arguments)])
        embed.main()
        return capsys.readouterr().out

    return run


def test_the_file_is_read_back_equal(call, tmp_path, image_folder, resnet50_checkpoint):
    """Of a checkpoint of this project, and of the same network in another project's layout."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    names, features = rsa.extract_features(resnet50_checkpoint, image_folder, limit=6)
    output = tmp_path / "a.parquet"
    said = call(resnet50_checkpoint, image_folder, "--output", output, "--limit", 6, "--workers", 0)
    assert said == f"{output}: features of 6 images, 2048 numbers each\n"
    table = parquet.read_table(output).to_pandas()
    assert table.file.tolist() == names and table.label.tolist() == ["a"] * 3 + ["b"] * 3
    assert np.array_equal(np.stack(table.feature), features)

    model = torch.load(resnet50_checkpoint, weights_only=True)["model"]
    prefix = "online.backbone."
    theirs = {f"encoder_q.{k.removeprefix(prefix)}": v for k, v in model.items() if k.startswith(prefix)}
    torch.save({"state_dict": theirs}, tmp_path / "theirs.pth")
    call(tmp_path / "theirs.pth", image_folder, "--output", tmp_path / "a.npy", "--limit", 3, "--workers", 0)
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), features[::2], rtol=1e-6)
    about = json.loads((tmp_path / "a.npy.json").read_text())
    assert about["source"] == "theirs.pth" and about["shape"] == [3, 2048] and about["pretrain"] is None


def test_mistakes_are_found_before_the_work(call, tmp_path, resnet50_checkpoint):
    with pytest.raises(InputError, match="--output a.txt: the name must end in .parquet or .npy"):
        call("absent.pth", "--output", "a.txt")
    with pytest.raises(InputError, match="--limit is -1: it must be at least 0"):
        call("absent.pth", "--limit", -1)
    with pytest.raises(InputError, match="no checkpoint absent.pth"):
        call("absent.pth", "--output", "a.npy")
    with pytest.raises(InputError, match="no image folder .*absent"):
        call(resnet50_checkpoint, tmp_path / "absent", "--output", tmp_path / "a.npy")
    assert not list(tmp_path.iterdir())


def test_duplicates_and_outliers_of_the_readme(tmp_path, monkeypatch):
    """Among 40 images in four groups, one is the copy of another, and one is like none."""
    rng = np.random.default_rng(0)
    features = np.eye(8)[np.arange(40) % 4] + 0.1 * rng.normal(size=(40, 8))
    features[7] = 3 * features[19]  # the cosine does not see the length
    features[30] = np.eye(8)[6]
    (tmp_path / "output").mkdir()
    files = [f"{i}.jpg" for i in range(40)]
    np.save(tmp_path / "output" / "features.npy", features.astype(np.float32))
    lines = ["file,label", *(f"{file}," for file in files)]
    (tmp_path / "output" / "features.npy.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    [example] = [text for text in examples if "features.npy" in text]
    assert len(example.split("\n\n")[1].strip().splitlines()) == 5
    exec(example, namespace := {})
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosine = np.sort(unit @ unit.T, axis=1)[:, ::-1][:, 1:11]  # without itself
    pairs = namespace["duplicates"]
    assert [pair for pair in pairs if "7.jpg" in pair] == [("7.jpg", "19.jpg"), ("19.jpg", "7.jpg")]
    assert len(pairs) == (cosine[:, 0] > 0.99).sum() < 20
    assert namespace["outliers"].tolist() == [files[i] for i in np.argsort(cosine.mean(1))[:20]]
    assert namespace["outliers"][0] == "30.jpg"
