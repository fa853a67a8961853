import json

import numpy as np
import pytest

from transfer import results
from transfer.config import InputError, torchvision_defaults


def test_results_round_trip_as_valid_json(tmp_path):
    ap = {"bbox": {"AP": float("nan"), "AP50": np.float32(61.5)}}
    weights = {"method": "rsa", "step": 500}
    cfg = torchvision_defaults()
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    results.write_results(cfg, "torchvision", ap, weights, 700, 12.5)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    stored = json.loads((tmp_path / "run" / "results.json").read_text(), parse_constant=refuse)
    loaded = results.load_results(tmp_path / "run")
    assert loaded == stored
    assert loaded["ap"]["bbox"] == dict.fromkeys(results.AP_KEYS, None) | {"AP50": 61.5}
    assert loaded["ap"]["segm"] == dict.fromkeys(results.AP_KEYS, None)
    assert (loaded["engine"], loaded["iterations"], loaded["seed"], loaded["seconds"]) == ("torchvision", 700, -1, 12.5)
    assert loaded["eval_only"] is False
    assert loaded["weights"] == weights
    assert {"python", "torch", "torchvision", "detectron2"} == set(loaded["versions"])
    assert "IMS_PER_BATCH: 16" in loaded["config"]
    assert [p.name for p in (tmp_path / "run").glob("*.tmp")] == []


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"ap": {"bbox": {}}}'])
def test_bad_results_are_one_line_that_names_the_file(tmp_path, content):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(InputError) as error:
        results.load_results(tmp_path)
    message = str(error.value)
    assert str(tmp_path / "results.json") in message and "tools/train_net.py" in message and "\n" not in message


def test_a_run_keeps_the_settings_that_it_began_with(tmp_path):
    cfg = torchvision_defaults()
    cfg.OUTPUT_DIR = str(tmp_path)
    results.check_unchanged(cfg)
    assert results.read_training(tmp_path) is None and not results.trained_with(cfg)
    for name in ("last_checkpoint", "results.json"):  # of a run that was here before
        (tmp_path / name).write_text("")
    results.begin_training(cfg, {"method": "rsa"})
    assert {path.name for path in tmp_path.iterdir()} == {"training.json", "results.json"}
    assert results.read_training(tmp_path)["weights"] == {"method": "rsa"}
    cfg.DATASETS.TEST, cfg.DATALOADER.NUM_WORKERS = ("other",), 9
    results.check_unchanged(cfg)
    assert results.trained_with(cfg)
    for key, value, words in (("BASE_LR", 0.5, "0.001 and not 0.5"), ("MAX_ITER", 80000, "40000 and not 80000")):
        changed = cfg.clone()
        changed.SOLVER[key] = value
        with pytest.raises(InputError, match=f"began with SOLVER.{key} {words}: give another OUTPUT_DIR"):
            results.check_unchanged(changed)
    moved = cfg.clone()  # the same files, in another machine's folders
    moved.MODEL.WEIGHTS, moved.DATASETS.TRAIN = "/scratch/w.pkl", ("/scratch/train.json::/scratch/images",)
    assert not results.trained_with(moved)
    results.begin_training(moved, None)
    moved.MODEL.WEIGHTS, moved.DATASETS.TRAIN = "/other/w.pkl", ("/other/train.json::/other/images",)
    assert results.trained_with(moved)
    moved.DATASETS.TRAIN = ("/other/val.json::/other/images",)
    assert not results.trained_with(moved)
    (tmp_path / "training.json").write_text("[]")
    with pytest.raises(InputError, match="training.json is not what"):
        results.check_unchanged(cfg)
