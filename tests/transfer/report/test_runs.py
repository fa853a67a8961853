import json

import numpy as np
import pytest

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.transfer.config import torchvision_defaults
from rsa_detectron2.transfer.data.average_precision import AP_KEYS
from rsa_detectron2.transfer.report import runs as results
from rsa_detectron2.transfer.report.runs import Outcome, Setup


def test_results_round_trip_as_valid_json(tmp_path):
    ap = {"bbox": {"AP": float("nan"), "AP50": np.float32(61.5)}}
    weights = {"method": "rsa", "step": 500}
    cfg = torchvision_defaults()
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    results.write_results(cfg, Setup("torchvision", weights), Outcome(ap, 700, 12.5))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    stored = json.loads((tmp_path / "run" / "results.json").read_text(), parse_constant=refuse)
    loaded = results.load_results(tmp_path / "run")
    assert loaded == stored
    assert loaded["ap"]["bbox"] == dict.fromkeys(AP_KEYS, None) | {"AP50": 61.5}
    assert loaded["ap"]["segm"] == dict.fromkeys(AP_KEYS, None)
    assert (loaded["engine"], loaded["iterations"], loaded["seed"], loaded["seconds"]) == (
        "torchvision",
        700,
        -1,
        12.5,
    )
    assert loaded["eval_only"] is False
    assert loaded["weights"] == weights
    assert {"python", "rsa-detectron2", "torch", "torchvision", "timm", "detectron2"} == set(
        loaded["versions"]
    )
    assert "IMS_PER_BATCH: 16" in loaded["config"]
    assert [p.name for p in (tmp_path / "run").glob("*.tmp")] == []


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"ap": {"bbox": {}}}'])
def test_bad_results_are_one_line_that_names_the_file(tmp_path, content):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(InputError) as error:
        results.load_results(tmp_path)
    message = str(error.value)
    assert (
        str(tmp_path / "results.json") in message and "tools/train_net.py" in message and "\n" not in message
    )


def test_a_run_keeps_the_settings_that_it_began_with(tmp_path, capsys):
    cfg = torchvision_defaults()
    cfg.OUTPUT_DIR = str(tmp_path)
    with pytest.raises(InputError, match="training.json is missing, which holds the settings of the run"):
        results.check_unchanged(cfg)
    assert results.read_training(tmp_path) is None and not results.own_training(cfg)
    results.begin_training(cfg, Setup("torchvision", {"method": "rsa"}))
    assert {path.name for path in tmp_path.iterdir()} == {"training.json"}
    assert results.read_training(tmp_path)["weights"] == {"method": "rsa"}
    cfg.DATASETS.TEST, cfg.DATALOADER.NUM_WORKERS = ("other",), 9
    results.check_unchanged(cfg)
    assert results.own_training(cfg)
    for key, value, words in (
        ("BASE_LR", 0.5, "0.001 and not 0.5"),
        ("MAX_ITER", 80000, "40000 and not 80000"),
    ):
        changed = cfg.clone()
        changed.SOLVER[key] = value
        with pytest.raises(InputError, match=f"began with SOLVER.{key} {words}: give another OUTPUT_DIR"):
            results.check_unchanged(changed)
    changed.SEED = 3
    with pytest.raises(InputError, match="with SEED -1 and not 3; SOLVER.MAX_ITER 40000 and not 80000: give"):
        results.check_unchanged(changed)
    for name in ("scratch", "other"):
        (tmp_path / name / "images").mkdir(parents=True)
        for split in ("train", "val"):
            (tmp_path / name / f"{split}.json").write_text(split)

    def placed(name, split="train"):
        return (f"{tmp_path}/{name}/{split}.json::{tmp_path}/{name}/images",)

    moved = cfg.clone()  # the same files, in another machine's folders
    moved.MODEL.WEIGHTS, moved.DATASETS.TRAIN = "/scratch/w.pkl", placed("scratch")
    assert not results.own_training(moved)
    results.begin_training(moved, Setup("torchvision"))
    moved.MODEL.WEIGHTS, moved.DATASETS.TRAIN = "/other/w.pkl", placed("other")
    assert results.own_training(moved)
    moved.DATASETS.TRAIN = placed("other", "val")
    assert not results.own_training(moved)
    moved.DATASETS.TRAIN, moved.MODEL.RESNETS.NORM = placed("other"), "BN"
    moved.MODEL.DEVICE = "cuda"
    results.begin_training(moved, Setup("torchvision", processes=2, accumulate=4))
    results.check_unchanged(moved, processes=4, accumulate=2)  # 2 images at once without SyncBN, and 2 again
    with pytest.raises(InputError, match=r"began with 2 x 4 passes .* over 2 images at once, and not 4"):
        results.check_unchanged(moved, processes=2, accumulate=2)
    moved.MODEL.RESNETS.NORM = "SyncBN"
    with pytest.raises(InputError, match="over 2 images at once, and not 8"):
        results.check_unchanged(moved, processes=4, accumulate=2)
    moved.MODEL.RESNETS.NORM = "BN"
    capsys.readouterr()
    results.check_unchanged(moved, processes=2, accumulate=4)
    assert capsys.readouterr().out == ""
    (tmp_path / "other" / "train.json").write_text("without one image")
    results.check_unchanged(moved, processes=2, accumulate=4)
    assert "warning: train.json has changed since" in capsys.readouterr().out
    (tmp_path / "training.json").write_text("[]")
    with pytest.raises(InputError, match="training.json is not what"):
        results.check_unchanged(cfg)


@pytest.mark.parametrize(
    "key, value",
    [
        ("INPUT.FORMAT", "RGB"),
        ("MODEL.PIXEL_STD", [2.0, 1.0, 1.0]),
        ("MODEL.RESNETS.STRIDE_IN_1X1", False),
        ("MODEL.FPN.NORM", "BN"),
    ],
)
def test_a_model_is_evaluated_as_it_was_trained(tmp_path, key, value):
    cfg = torchvision_defaults()
    cfg.OUTPUT_DIR, cfg.MODEL.RESNETS.NORM = str(tmp_path), "SyncBN"
    results.check_network(cfg, tmp_path)  # nothing is known of it
    results.begin_training(cfg, Setup("torchvision"))
    cfg.MODEL.RESNETS.NORM, cfg.SOLVER.MAX_ITER, cfg.INPUT.MIN_SIZE_TEST = "BN", 9, 400
    results.check_network(cfg, tmp_path)
    cfg.merge_from_list([key, value])
    with pytest.raises(InputError, match=f"the model in .* was trained with {key} .* and not "):
        results.check_network(cfg, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"ap": {"bbox": {"AP": "41.1"}, "segm": {}}},
        {"ap": {"bbox": [1], "segm": [2]}},
        {"ap": {"bbox": None, "segm": None}},
        {"per_class": {"cat": {"objects": 3, "bbox": {"AP": 1.0}}}},
        {"errors": {"bbox": {"missed": 4}}},
        {"seconds": None},
        {"seed": None},
        {"weights": "rsa.pkl"},
        {"weights": {"method": "rsa", "step": None}},
        {"config": "MODEL: 3"},
        {"config": "[" * 100000},
        {"config": "!!python/object/apply:os.getcwd []"},
    ],
)
def test_results_of_another_kind_are_one_line(tmp_path, change):
    cfg = torchvision_defaults()
    cfg.OUTPUT_DIR = str(tmp_path)
    whole = results.write_results(
        cfg, Setup("torchvision", {"method": "rsa", "step": 9}), Outcome({}, 700, 12.5)
    )
    assert results.load_results(tmp_path)["weights"] == {"method": "rsa", "step": 9}
    (tmp_path / "results.json").write_text(json.dumps(whole | change))
    with pytest.raises(InputError, match="results.json does not hold a run's results") as error:
        results.load_results(tmp_path)
    assert "\n" not in str(error.value)


def test_the_last_row_of_the_metrics_is_the_result(tmp_path):
    cfg = torchvision_defaults()
    cfg.OUTPUT_DIR = str(tmp_path)
    (tmp_path / "metrics.json").write_text("x")  # of a run that wrote no checkpoint
    for ap in (40.0, 30.0):  # a finished run may be started again
        with results.open_rows(cfg, 700 if ap == 30 else 0) as rows:
            outcome = Outcome({"bbox": {"AP": ap}}, 700, 12.5)
            results.write_results(cfg, Setup("torchvision"), outcome, rows)
    evaluated = Outcome({"bbox": {"AP": 30.0}}, 700, 12.5, eval_only=True)
    results.write_results(cfg, Setup("torchvision"), evaluated)
    [row] = map(json.loads, (tmp_path / "metrics.json").read_text().splitlines())
    assert row["iteration"] == 699 and row["bbox/AP"] == 40 and row["segm/APl"] is None and len(row) == 13
