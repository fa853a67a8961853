"""A run that starts from a checkpoint begins with its backbone, and says whose it is."""

import json
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torchvision

from rsa_detectron2.common import launch
from rsa_detectron2.common.errors import InputError, Interrupted
from rsa_detectron2.pretrain.data.datasets import open_images
from rsa_detectron2.pretrain.engine import trainer as train_loop
from rsa_detectron2.pretrain.engine.checkpoint import FINAL, LAST
from rsa_detectron2.pretrain.engine.initial import in_words
from rsa_detectron2.pretrain.evaluate.features import CenterCrops
from rsa_detectron2.tools._weights import load_features, read_initial
from rsa_detectron2.transfer.convert.provenance import sha256
from rsa_detectron2.transfer.convert.writers import convert
from tests.conftest import TINY, assert_same, final_weights, tiny_cfg

train = partial(train_loop.train, reader=read_initial)
R18 = ("MODEL.BACKBONE", "resnet18", "SOLVER.EPOCHS", 1, "SOLVER.WARMUP_EPOCHS", 0)


def randomize(network):
    """BatchNorm as after a training, so that each of its tensors matters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_mean"):
                tensor.normal_(0, 0.1)
            elif name.endswith(("running_var", "bn1.weight", "bn2.weight")):
                tensor.uniform_(0.5, 1.5)
    return network.eval()


def torchvision_pth(path):
    network = randomize(torchvision.models.resnet18())
    torch.save(network.state_dict(), path)
    network.fc = torch.nn.Identity()
    return network


def timm_safetensors(path):
    network = randomize(timm.create_model("resnet18"))
    safetensors.torch.save_file(network.state_dict(), path)
    network.reset_classifier(0)
    return network


@pytest.mark.parametrize("write", [torchvision_pth, timm_safetensors])
def test_other_libraries_networks(image_folder, tmp_path, monkeypatch, write):
    """Before the first step, the features of the online network equal those of the library's own network,
    1e-5 of the largest; the target has the same backbone to the bit, and the heads are those of a run without
    the file."""
    monkeypatch.setattr(train_loop.Trainer, "fit", lambda self: self)
    path = tmp_path / "weights"
    network = write(path)
    trainer = train(tiny_cfg(image_folder, tmp_path, *R18, "MODEL.INIT", str(path)))
    images = open_images(str(image_folder))
    crops = torch.stack([CenterCrops(images, range(len(images)), 32, 32)[i][0] for i in range(4)])
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        wanted = network((crops / 255 - mean) / std)
    found = trainer.features.of(images, "features").features[:4]
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    online, target = trainer.networks.online, trainer.networks.target
    assert_same(online.backbone.state_dict(), target.backbone.state_dict())
    random = train(tiny_cfg(image_folder, tmp_path / "random", *R18)).networks
    assert_same(online.projector.state_dict(), random.online.projector.state_dict())
    assert_same(trainer.networks.predictor.state_dict(), random.predictor.state_dict())
    assert random.online.backbone.conv1.weight.ne(online.backbone.conv1.weight).any()


def test_what_is_known_of_the_weights_in_words():
    known = {"method": "rsa", "step": 500, "branch": "target"}
    assert in_words(known) == "rsa, step 500, target branch"
    unknown = {"method": "unknown", "format": "SimSiam", "step": -1, "branch": "online"}
    assert in_words(unknown) == "layout of SimSiam, online branch"


@pytest.fixture(scope="module")
def first(image_folder, tmp_path_factory):
    """The final file of a run that started from random weights."""
    return Path(train(tiny_cfg(image_folder, tmp_path_factory.mktemp("first"))))


@pytest.fixture(scope="module")
def second(image_folder, tmp_path_factory, first):
    """That of a run of another method that started from the first."""
    return Path(train(second_cfg(image_folder, tmp_path_factory.mktemp("second"), first)))


def second_cfg(image_folder, folder, init, *more):
    return tiny_cfg(image_folder, folder, "METHOD", "byol", "MODEL.INIT", str(init), *more)


def rows(final):
    return [json.loads(line) for line in final.with_name("metrics.jsonl").read_text().splitlines()]


def test_knn_goes_on_where_it_was(first, second):
    last, start = rows(first)[-1], rows(second)[0]
    assert (last["step"], start["step"]) == (9, 0)
    assert start["knn_top1"] == last["knn_top1"] != rows(first)[0]["knn_top1"]
    assert json.loads(first.with_name("run.json").read_text())["init"] is None


def test_the_record_says_from_what(image_folder, tmp_path, first, second):
    about = {
        "source": FINAL,
        "sha256": sha256(first),
        "branch": "online",
        "method": "rsa",
        "step": 9,
        "architecture": "test_resnet",
        "init": None,
    }
    saved = torch.load(second, weights_only=True)["run"]
    assert json.loads(second.with_name("run.json").read_text())["init"] == saved["init"] == about
    third = Path(train(second_cfg(image_folder, tmp_path, second)))
    init = json.loads(third.with_name("run.json").read_text())["init"]
    assert (init["sha256"], init["init"]) == (sha256(second), about)


def test_conversions_keep_from_what(image_folder, tmp_path):
    """Also those of a run that started from a converted file."""
    torchvision_pth(tmp_path / "r18.pth")
    final = train(tiny_cfg(image_folder, tmp_path, *R18, "MODEL.INIT", str(tmp_path / "r18.pth")))
    converted, provenance = convert(final, tmp_path / "weights.pkl")
    wanted = {"source": "r18.pth", "sha256": sha256(tmp_path / "r18.pth"), "architecture": "resnet18"}
    assert wanted.items() <= json.loads(provenance["run"])["init"].items()
    _, _, about = read_initial(converted)
    assert (about["source"], about["method"], about["step"]) == (FINAL, "rsa", 3)
    assert wanted.items() <= about["init"].items() and "run" not in about


@pytest.mark.parametrize("spelling", ["gone", "run/../first.pth"])
def test_a_run_that_goes_on_needs_no_file(
    image_folder, tmp_path, first, second, stop_after, monkeypatch, spelling
):
    monkeypatch.chdir(tmp_path)
    Path("first.pth").symlink_to(first)
    stop_after(4)
    with pytest.raises(Interrupted):
        train(second_cfg(image_folder, tmp_path, "first.pth"))
    if spelling == "gone":
        Path("first.pth").unlink()
        spelling = "first.pth"
    final = train(second_cfg(image_folder, tmp_path, spelling))
    assert_same(final_weights(final), final_weights(second))
    saved, wanted = (torch.load(path, weights_only=True)["run"]["init"] for path in (final, second))
    assert saved["sha256"] == wanted["sha256"]


def test_a_run_does_not_change_what_it_started_from(image_folder, tmp_path, second):
    run = second.parent
    for init, named in (("other.pth", "first.*/model_final.pth -> other.pth"), ("", "model_final.pth -> ")):
        cfg = second_cfg(image_folder, tmp_path, init, "OUTPUT_DIR", str(run))
        with pytest.raises(InputError, match=f"MODEL.INIT: .*{named}.*: give the same options, or"):
            train(cfg)


def test_a_finished_run_keeps_its_length(image_folder, tmp_path, first):
    """The line says why, and its advice works: with another recipe, too."""
    cfg = tiny_cfg(image_folder, tmp_path, "OUTPUT_DIR", str(first.parent), "SOLVER.EPOCHS", 5)
    line = (
        rf"SOLVER.EPOCHS: 3 -> 5\): give the same options, or another --output-dir with --init {first}, to "
        "start from its backbone; a run keeps its length, because the cosines of learning rate, beta and tau"
    )
    with pytest.raises(InputError, match=line):
        train(cfg)
    cfg.merge_from_list(["OUTPUT_DIR", str(tmp_path / "longer"), "MODEL.INIT", str(first)])
    assert rows(Path(train(cfg)))[-1]["step"] == 15


def test_a_stopped_run_may_go_on_with_another_recipe(image_folder, tmp_path, stop_after):
    stop_after(4)
    with pytest.raises(Interrupted):
        train(tiny_cfg(image_folder, tmp_path))
    last = tmp_path / "run" / LAST
    with pytest.raises(
        InputError, match=rf"METHOD: rsa -> byol\).*--init {last}, to start from its backbone$"
    ):
        train(tiny_cfg(image_folder, tmp_path, "METHOD", "byol"))
    final = train(second_cfg(image_folder, tmp_path / "byol", last))
    init = json.loads(Path(final).with_name("run.json").read_text())["init"]
    assert (init["source"], init["step"]) == (LAST, 4)
    with pytest.raises(InputError, match="-> resnet18.*: give the same options, or another --output-dir$"):
        train(tiny_cfg(image_folder, tmp_path, "MODEL.BACKBONE", "resnet18"))


@pytest.mark.parametrize(
    "settings, message",
    [
        (["MODEL.BACKBONE", "resnet50"], "was trained with MODEL.BACKBONE resnet18: give the same here, or"),
        (["MODEL.SMALL_STEM", True], "was trained with MODEL.SMALL_STEM False: give"),
        (
            ["DATA.MEAN", (0.5, 0.5, 0.5), "DATA.STD", (0.25, 0.25, 0.25)],
            r'DATA.MEAN "\(0.485, 0.456, 0.406\)", DATA.STD "\(0.229, 0.224, 0.225\)": give the same',
        ),
        (["MODEL.INIT", "absent.pth"], "no checkpoint absent.pth: give the file"),
        (["MODEL.INIT", "/"], "/ is a folder: give a checkpoint file in it"),
    ],
)
def test_what_does_not_fit_is_one_line(image_folder, tmp_path, settings, message):
    """It comes before the images are listed."""
    torchvision_pth(tmp_path / "r18.pth")
    cfg = tiny_cfg("none", tmp_path, "MODEL.INIT", str(tmp_path / "r18.pth"), *R18[:2], *settings)
    with pytest.raises(InputError, match=message):
        train(cfg)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_a_checkpoint_without_all_of_its_backbone(image_folder, tmp_path, first):
    saved = torch.load(first, weights_only=True)
    name = next(name for name in saved["model"] if name.startswith("online.backbone.") and "conv2" in name)
    del saved["model"][name]
    torch.save(saved, tmp_path / "cut.pth")
    line = f"cut.pth holds another network: 1 tensors .*{name.removeprefix('online.backbone.')} for one"
    with pytest.raises(InputError, match=line):
        train(second_cfg(image_folder, tmp_path, tmp_path / "cut.pth"))
    with pytest.raises(InputError, match=line):
        load_features(tmp_path / "cut.pth")


def test_two_processes(image_folder, tmp_path, first):
    cfg = tiny_cfg(image_folder, tmp_path, "MODEL.INIT", str(first), *R18[2:])
    start = rows(Path(launch.launch(train, cfg, launch.Processes(2))))[0]
    assert start["knn_top1"] == rows(first)[-1]["knn_top1"]


@pytest.mark.slow
def test_the_command_in_two_processes(image_folder, tmp_path, tool, first):
    words = ["--data", image_folder, "--output-dir", tmp_path, "--init", first, "--num-processes", 2]
    done = tool("pretrain", *words, *TINY, *R18[2:])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"the backbone is that of {first}: rsa, step 9, online branch\n") == 1
    start = rows(tmp_path / FINAL)[0]
    assert start["knn_top1"] == rows(first)[-1]["knn_top1"]
