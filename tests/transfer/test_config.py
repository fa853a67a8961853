"""What is checked before training: configs against Detectron2's stock ones, the provenance of weights, YAML
files and annotations."""

import argparse
import shlex

import pytest
import yaml

from rsa_detectron2.common.config import merge_config
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.tools import train_net
from rsa_detectron2.transfer.config import (
    RGB_IMAGENET,
    protocol_of,
    scale_schedule,
    torchvision_defaults,
)
from rsa_detectron2.transfer.convert.needs import check_weights
from tests.conftest import ROOT, write_json

CONFIGS = ROOT / "configs" / "transfer"
INFOMIN = {  # What the InfoMin protocol changes in the stock config
    "MODEL.WEIGHTS": "output/weights/rsa_r50.pkl",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.NORM": "SyncBN",
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.FPN.NORM": "SyncBN",
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 4,
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_BOX_HEAD.NORM": "SyncBN",
    "MODEL.ROI_MASK_HEAD.NORM": "SyncBN",
    "INPUT.FORMAT": "RGB",
    "TEST.PRECISE_BN.ENABLED": True,
}
HEADS = (
    "MODEL.ROI_BOX_HEAD.NUM_CONV",
    "MODEL.ROI_BOX_HEAD.NUM_FC",
    "MODEL.ROI_BOX_HEAD.NORM",
    "MODEL.ROI_MASK_HEAD.NORM",
)
MOCO = {key: value for key, value in INFOMIN.items() if key not in HEADS}  # stock heads
BGR = dict.fromkeys(
    ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "MODEL.RESNETS.STRIDE_IN_1X1", "INPUT.FORMAT"), "stock"
)
ROWS = {  # row: its changes of the protocol; "stock" if it returns to Detectron2's value
    "": {},
    "_random": {"MODEL.WEIGHTS": "", **BGR},
    "_supervised": {"MODEL.WEIGHTS": "detectron2://ImageNetPretrained/torchvision/R-50.pkl"},
    "_msra": {"MODEL.WEIGHTS": "stock", **BGR},
    "_ssl": {"MODEL.WEIGHTS": "output/weights/ssl_r50.pkl"},
}
TWICE = {"SOLVER.STEPS": (120000, 160000), "SOLVER.MAX_ITER": 180000}


def flat(cfg, prefix=""):
    for key, value in cfg.items():
        if hasattr(value, "items"):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def configured(cfg, name, protocol="infomin", overrides=(), **more):
    options = dict(
        config_file=f"transfer/{name}.yaml",
        protocol=protocol,
        scale_schedule=False,
        train=None,
        val=None,
        eval_only=False,
        resume=False,
        overrides=list(overrides),
        **more,
    )
    train_net.configure(cfg, argparse.Namespace(**options))
    return cfg


@pytest.mark.parametrize("protocol", ["infomin", "moco"])
@pytest.mark.parametrize("schedule", ["1x", "2x"])
@pytest.mark.parametrize("row", ROWS)
def test_configs_are_stock_but_for_the_protocol_and_the_row(row, schedule, protocol):
    pytest.importorskip("detectron2")
    from detectron2 import model_zoo
    from detectron2.config import get_cfg

    stock = get_cfg()
    stock.merge_from_file(model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"))
    stock, name = dict(flat(stock)), f"mask_rcnn_R50_FPN_{schedule}{row}"
    wanted = {
        **(INFOMIN if protocol == "infomin" else MOCO),
        **ROWS[row],
        **(TWICE if schedule == "2x" else {}),
        "OUTPUT_DIR": f"output/{name}" + "_moco" * (protocol == "moco"),
    }
    wanted = {key: value for key, value in wanted.items() if value != "stock"}
    if (schedule, row) == ("2x", ""):
        wanted["SOLVER.BASE_LR"] = 0.03  # RSA's own, by the paper
    ours = configured(get_cfg(), name, protocol)
    assert {key: value for key, value in flat(ours) if stock[key] != value} == wanted
    assert protocol_of(yaml.safe_load(ours.dump())) == protocol


def test_twice_the_1x_schedule_lies_between_detectron2s_1x_and_3x():
    pytest.importorskip("detectron2")
    from detectron2 import model_zoo
    from detectron2.config import get_cfg

    triple, ours = get_cfg(), configured(get_cfg(), "mask_rcnn_R50_FPN_2x_random")
    triple.merge_from_file(model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"))
    rest = triple.SOLVER.MAX_ITER - triple.SOLVER.STEPS[1], triple.SOLVER.MAX_ITER - triple.SOLVER.STEPS[0]
    assert rest == (ours.SOLVER.MAX_ITER - ours.SOLVER.STEPS[1], ours.SOLVER.MAX_ITER - ours.SOLVER.STEPS[0])
    assert triple.SOLVER.MAX_ITER * 2 == ours.SOLVER.MAX_ITER * 3


def test_every_header_has_command_cost_and_published_figures():
    configs = sorted(CONFIGS.glob("mask_rcnn_*.yaml"))
    assert len([path for path in configs if "_R50_" in path.name]) == 2 * len(ROWS)
    for path in configs:
        head = path.read_text().split("\n_BASE_")[0]
        assert f"--config-file transfer/{path.name}" in head, path
        assert "#   cost  " in head and "#   published  " in head, path


def test_embedded_engine_reads_every_config_that_it_can_honor():
    for path in CONFIGS.glob("mask_rcnn_*.yaml"):
        assert configured(torchvision_defaults(), path.stem, "moco").MODEL.ROI_BOX_HEAD.NUM_FC == 2


def test_protocols_by_their_layers():
    cfg = configured(torchvision_defaults(), "mask_rcnn_R50_FPN_1x")
    assert protocol_of(cfg) == "infomin"
    for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"):
        cfg.MODEL[part].NORM = "BN"  # what SyncBN is on CPU processes
    assert protocol_of(cfg) == "infomin"
    cfg.MODEL.ROI_MASK_HEAD.NORM = ""
    assert protocol_of(cfg) == "other" and protocol_of(torchvision_defaults()) == "other"


RSA = {"method": "rsa"}
MSRA = {
    "method": "supervised",
    "input_format": "BGR",
    "pixel_mean": [103.53, 116.28, 123.675],
    "pixel_std": [1, 1, 1],
    "stride_in_1x1": True,
}


@pytest.mark.parametrize(
    "config, provenance, overrides, message",
    [
        ("1x", RSA, [], None),  # an older file without the keys
        ("1x", {**RSA, **RGB_IMAGENET}, [], None),
        ("1x", None, [], None),
        ("1x_msra", MSRA, [], None),
        ("1x_msra", MSRA, ["MODEL.RESNETS.NORM", "FrozenBN"], None),  # as Detectron2's own models do
        ("1x", RSA, ["INPUT.FORMAT", "BGR"], r"INPUT.FORMAT 'RGB' \(it is 'BGR'\)"),
        ("1x", RSA, ["MODEL.PIXEL_STD", [1.0, 1.0, 1.0]], r"MODEL.PIXEL_STD \[58.395"),
        ("1x", RSA, ["MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675]], r"MODEL.PIXEL_MEAN \[123.675"),
        ("1x", RSA, ["MODEL.PIXEL_MEAN", [123.675]], r"MODEL.PIXEL_MEAN"),
        ("1x", RSA, ["MODEL.RESNETS.STRIDE_IN_1X1", True], r"STRIDE_IN_1X1 False \(it is True\)"),
        ("1x", MSRA, [], "INPUT.FORMAT 'BGR'.*PIXEL_MEAN.*PIXEL_STD.*STRIDE_IN_1X1 True"),
        ("1x_msra", RSA, [], "INPUT.FORMAT 'RGB'.*PIXEL_MEAN.*PIXEL_STD.*STRIDE_IN_1X1 False"),
        ("1x", {**RSA, "pixel_mean": [127.5] * 3, "pixel_std": [127.5] * 3}, [], "PIXEL_MEAN.*127.5"),
        ("1x", RSA, ["MODEL.RESNETS.NORM", "FrozenBN"], "RESNETS.NORM is FrozenBN.*self-supervised.*SyncBN"),
        (
            "1x",
            {**RSA, "method": "MoCo v1, v2"},
            ["MODEL.FPN.NORM", "FrozenBN"],
            "FPN.NORM is FrozenBN.*MoCo",
        ),
        ("1x", RSA, ["MODEL.BACKBONE.FREEZE_AT", 2], "BACKBONE.FREEZE_AT is 2.*self-supervised.*FREEZE_AT 0"),
        ("1x", RSA, ["MODEL.BACKBONE.FREEZE_AT", 5], None),
        ("1x_msra", MSRA, ["MODEL.BACKBONE.FREEZE_AT", 2], None),
    ],
)
def test_config_must_fit_the_weights(config, provenance, overrides, message):
    cfg = configured(torchvision_defaults(), f"mask_rcnn_R50_FPN_{config}", overrides=overrides)
    if message is None:
        check_weights(cfg, provenance)
    else:
        with pytest.raises(InputError, match=message) as error:
            check_weights(cfg, provenance)
        assert "\n" not in str(error.value)


def test_random_weights_must_be_asked_for():
    """A config file that does not name weights means the converted ones, never random initialization
    unasked."""
    quickstart = configured(torchvision_defaults(), "quickstart_mask_rcnn_R18_FPN")
    assert quickstart.MODEL.WEIGHTS == "output/weights/rsa_r50.pkl"
    assert configured(torchvision_defaults(), "mask_rcnn_R50_FPN_1x_random").MODEL.WEIGHTS == ""


@pytest.mark.parametrize(
    "text, line",
    [
        (
            "SOLVER:\n  MAX_ITER: 3\n  BASE_LR: 0.1\n  MAX_ITER: 5\n",
            "line 4: SOLVER.MAX_ITER is given a second time",
        ),
        (
            "SOLVER:\n  MAX_ITER: 3\nMODEL:\n  MASK_ON: True\nSOLVER:\n  BASE_LR: 0.1\n",
            "line 5: SOLVER is given a second",
        ),
        ("a: [{b: 1, b: 2}]", None),
    ],
)
def test_a_repeated_key_is_one_line_with_file_and_line(tmp_path, text, line):
    (tmp_path / "base.yaml").write_text(text)
    (tmp_path / "child.yaml").write_text("_BASE_: base.yaml\nOUTPUT_DIR: x\n")
    for name in ("base.yaml", "child.yaml"):
        with pytest.raises(InputError) as error:
            merge_config(torchvision_defaults(), str(tmp_path / name), [])
        if line:
            assert f"{tmp_path / 'base.yaml'}, {line}" in str(error.value)
        assert "\n" not in str(error.value)


def test_a_yaml_file_runs_no_code(tmp_path):
    (tmp_path / "c.yaml").write_text(
        f"OUTPUT_DIR: !!python/object/apply:os.system ['touch {tmp_path}/ran']\n"
    )
    with pytest.raises(InputError, match="python/object"):
        merge_config(torchvision_defaults(), str(tmp_path / "c.yaml"), [])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "images, max_iter, steps, warmup",
    [
        (117266, 90000, (60000, 80000), 1000),
        (58633, 45000, (30000, 40000), 1000),
        (234532, 180000, (120000, 160000), 1000),
        (5863, 4500, (3000, 4000), 450),
        (120, 3000, (2000, 2667), 300),
        (1, 3000, (2000, 2667), 300),
    ],
)
def test_schedule_follows_the_size_of_the_data_set(images, max_iter, steps, warmup):
    solver = configured(torchvision_defaults(), "mask_rcnn_R50_FPN_1x").SOLVER
    solver.WARMUP_ITERS = 1000
    line = scale_schedule(solver, images)
    assert solver.MAX_ITER == pytest.approx(max_iter, abs=1) and solver.STEPS == pytest.approx(steps, abs=1)
    assert solver.WARMUP_ITERS == pytest.approx(warmup, abs=1)
    assert f"{solver.MAX_ITER * 16 / images:.1f} epochs of {images} images" in line


def test_schedule_of_a_smaller_batch_has_as_many_epochs(tiny_coco, tmp_path, capsys):
    """An IMS_PER_BATCH that is given as KEY VALUE counts, too."""
    path = str(write_json(tiny_coco, tmp_path))
    args = argparse.Namespace(
        config_file="transfer/mask_rcnn_R50_FPN_1x.yaml",
        protocol="infomin",
        eval_only=False,
        resume=False,
        scale_schedule=False,
        train=(path, str(tmp_path)),
        val=(path, str(tmp_path)),
        overrides=["SOLVER.IMS_PER_BATCH", "2"],
    )
    cfg = torchvision_defaults()
    train_net.configure(cfg, args)
    assert cfg.SOLVER.MAX_ITER == 24000 and cfg.SOLVER.STEPS == (16000, 21333)
    args.overrides = ["SOLVER.IMS_PER_BATCH", "0"]
    with pytest.raises(InputError, match="SOLVER.IMS_PER_BATCH is 0"):
        train_net.configure(torchvision_defaults(), args)
    said = capsys.readouterr().out
    assert "48000.0 epochs of 1 images" in said
    assert "SOLVER.BASE_LR 0.02 is for 16 images an iteration; for 2 give SOLVER.BASE_LR 0.0025\n" in said


def test_a_smaller_batch_on_coco_is_told_what_fits(capsys):
    """The options that the line suggests can be copied, and with them the line no longer appears."""

    def said(*overrides, **options):
        cfg = configured(torchvision_defaults(), "mask_rcnn_R50_FPN_1x", overrides=overrides, **options)
        return capsys.readouterr().out, cfg.SOLVER

    line, _ = said("SOLVER.IMS_PER_BATCH", "4")
    assert line == (
        "SOLVER.BASE_LR 0.02 is for 16 images an iteration; for 4 give SOLVER.BASE_LR 0.005 "
        'SOLVER.MAX_ITER 360000 SOLVER.STEPS "(240000, 320000)"\n'
    )
    line, solver = said("SOLVER.IMS_PER_BATCH", "4", *shlex.split(line.split(" give ")[1]))
    assert line == "" and (solver.BASE_LR, solver.MAX_ITER, solver.STEPS) == (0.005, 360000, (240000, 320000))
    line, _ = said("SOLVER.IMS_PER_BATCH", "8", "SOLVER.MAX_ITER", "9")
    assert line.endswith("for 8 give SOLVER.BASE_LR 0.01\n")
    assert said()[0] == said("SOLVER.IMS_PER_BATCH", "16")[0] == ""


def test_train_option_takes_classes_and_schedule_from_the_data_set(tiny_coco, tmp_path, capsys):
    path = write_json(tiny_coco, tmp_path)

    def made(*overrides, eval_only=False, config_file="transfer/mask_rcnn_R50_FPN_1x.yaml"):
        cfg = torchvision_defaults()
        train_net.configure(
            cfg,
            argparse.Namespace(
                config_file=config_file,
                protocol="infomin",
                scale_schedule=False,
                eval_only=eval_only,
                resume=False,
                train=(str(path), str(tmp_path)),
                val=(str(path), str(tmp_path)),
                overrides=list(overrides),
            ),
        )
        return cfg

    cfg = made()
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2 and cfg.SOLVER.MAX_ITER == 3000
    assert "schedule: 3000 iterations instead of 90000" in capsys.readouterr().out
    assert made("SOLVER.MAX_ITER", "77").SOLVER.MAX_ITER == 77
    assert made("SOLVER.STEPS", "(5,)").SOLVER.MAX_ITER == 90000
    assert made(eval_only=True).SOLVER.MAX_ITER == 90000 and capsys.readouterr().out == ""
    # beside the results of the recipe's own run
    assert made(eval_only=True).OUTPUT_DIR == f"{cfg.OUTPUT_DIR}_eval"
    (tmp_path / "own.yaml").write_text("SOLVER:\n  MAX_ITER: 5000\n  STEPS: [4000]\n")
    assert made(config_file=str(tmp_path / "own.yaml")).SOLVER.MAX_ITER == 5000
