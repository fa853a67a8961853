"""Values that no run could use are refused in one line that names the key."""

import pytest

from rsa_detectron2.common.config import NoSuchKey, find_config, merge_config
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.config import check, differences, get_cfg
from rsa_detectron2.transfer.config import torchvision_defaults

KEYS = {
    "choose one of": {
        "METHOD": "rsaa",
        "MODEL.BETA_SCHEDULE": "linear",
        "MODEL.TAU_SCHEDULE": "",
        "SOLVER.AMP": "fp8",
        "SOLVER.OPTIMIZER": "adam",
    },
    "must be at least": {
        "SEED": -1,
        "LOG_PERIOD": 0,
        "DATA.IMAGE_SIZE": 6,
        "DATA.EVAL_RESIZE": 223,
        "DATA.NUM_WORKERS": -2,
        "MODEL.HIDDEN_DIM": 0,
        "MODEL.OUT_DIM": 1,
        "SOLVER.WEIGHT_DECAY": -1e-6,
        "SOLVER.BATCH_SIZE": 0,
        "SOLVER.MICRO_BATCH": -1,
        "SOLVER.EPOCHS": 0,
        "SOLVER.WARMUP_EPOCHS": -3,
        "CHECKPOINT.PERIOD": 0,
        "CHECKPOINT.KEEP_PERIOD": -1,
        "KNN.PERIOD": -1,
        "KNN.BANK": -1,
        "ALARM.NONFINITE_STEPS": 0,
        "ALARM.COLLAPSE_STEPS": 0,
    },
    "must lie between 0 and 1": {"MODEL.BETA": 1.1, "MODEL.TAU": -0.1, "SOLVER.MOMENTUM": 2.0},
    "must be positive": {
        "MODEL.TEMPERATURE": 0.0,
        "SOLVER.BASE_LR": float("nan"),
        "SOLVER.TRUST_COEFFICIENT": 0.0,
    },
    "takes three numbers": {"DATA.MEAN": (0.5,), "DATA.STD": (0.2, 0.0, 0.2)},
    "divide those of 0 to 255": {"DATA.MEAN": (123.7, 116.3, 103.5), "DATA.STD": (58.4, 57.1, 57.4)},
}


@pytest.mark.parametrize(
    "reason, key, value", [(reason, *pair) for reason in KEYS for pair in KEYS[reason].items()]
)
def test_values_that_no_run_could_use(reason, key, value):
    cfg = get_cfg()
    check(cfg)  # the defaults are fine
    cfg.merge_from_list([key, value])
    with pytest.raises(InputError, match=f"^{key} is .*{reason}"):
        check(cfg)


def test_values_that_fit_only_together():
    for overrides, message in (
        (
            ["SOLVER.EPOCHS", 10],
            "warm-up of 10 epochs leaves nothing of 10: give SOLVER.WARMUP_EPOCHS 0, or at least 11 epochs",
        ),
        (["METHOD", "moco", "MODEL.QUEUE", 4095], "must hold the 4096 keys of a step"),
    ):
        cfg = get_cfg()
        cfg.merge_from_list(overrides)
        with pytest.raises(InputError, match=message):
            check(cfg)


def test_whole_numbers_for_keys_that_hold_floats():
    cfg = merge_config(get_cfg(), None, ["MODEL.BETA", "0", "SOLVER.BASE_LR", "1", "SOLVER.EPOCHS", "20"])
    assert (cfg.MODEL.BETA, cfg.SOLVER.BASE_LR, cfg.SOLVER.EPOCHS) == (0.0, 1.0, 20)
    assert type(cfg.MODEL.BETA) is float and type(cfg.SOLVER.EPOCHS) is int
    for key, value, reason in (
        ("SOLVER.EPOCHS", "2.5", "SOLVER.EPOCHS takes a whole number, not '2.5'$"),
        ("MODEL.BETA", "many", "MODEL.BETA takes a number, not 'many'$"),
        ("SOLVER.COMPILE", "3", "SOLVER.COMPILE takes True or False, not '3'$"),
        ("MODEL.BETA.X", "0", "MODEL.BETA.X"),
    ):
        with pytest.raises(InputError, match=reason):
            merge_config(get_cfg(), None, [key, value])


def test_keys_and_files_that_are_not_there_name_the_nearest():
    for key, near in (
        ("MODEL.BETTA", "MODEL.BETA"),
        ("SOLVER.LR", "SOLVER.BASE_LR"),
        ("solver.epochs", "SOLVER.EPOCHS"),
        ("base_lr", "SOLVER.BASE_LR"),
    ):
        with pytest.raises(NoSuchKey, match=f"there is no key {key}: did you mean {near}\\?$"):
            merge_config(get_cfg(), None, [key, "0"])
    with pytest.raises(NoSuchKey, match="there is no key ELSEWHERE$"):
        merge_config(get_cfg(), None, ["ELSEWHERE", "0"])
    for name, near in (
        ("imagenet_rsa_R50.yaml", "pretrain/imagenet_rsa_R50.yaml"),
        ("pretrain/cifar10_rsa.yaml", "pretrain/cifar10_rsa_R18.yaml"),
        ("transfer/mask_rcnn_r50_fpn_1x.yaml", "transfer/mask_rcnn_R50_FPN_1x.yaml"),
    ):
        with pytest.raises(InputError, match=f"no config file {name}: .*did you mean .*{near}"):
            find_config(name)
    with pytest.raises(InputError, match="configs$"):
        find_config("absent.yaml")


def test_words_that_are_no_key_are_told_their_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photographs").mkdir()
    for cfg, word, advice in (
        (get_cfg(), "SOLVER.EPOCHS=3", "^SOLVER.EPOCHS=3: write SOLVER.EPOCHS 3$"),
        (get_cfg(), "photographs", "^photographs is no KEY: give --data PATH"),
        (get_cfg(), "a/b", "--data PATH"),
        (get_cfg(), "pretrain/cifar10_rsa_R18.yaml", "as --config-file pretrain/cifar10_rsa_R18.yaml$"),
        (torchvision_defaults(), "out/rsa.pkl", "MODEL.WEIGHTS FILE for weights$"),
    ):
        for words in ([word], [word, "SEED", "1"], ["SEED", "1", word]):
            with pytest.raises(InputError, match=advice):
                merge_config(cfg, None, words)


def test_recipes_of_the_other_stage(tmp_path):
    (tmp_path / "mine.yaml").write_text("DATASETS: {TRAIN: (a,)}\n")
    (tmp_path / "theirs.yaml").write_text("METHOD: rsa\n")
    for cfg, path, advice in (
        (get_cfg(), find_config("transfer/mask_rcnn_R50_FPN_1x.yaml"), "tools/train_net.py takes it$"),
        (get_cfg(), tmp_path / "mine.yaml", "is a fine-tuning recipe: tools/train_net.py takes it$"),
        (
            torchvision_defaults(),
            find_config("pretrain/imagenet_rsa_R50.yaml"),
            "tools/pretrain.py takes it$",
        ),
        (torchvision_defaults(), tmp_path / "theirs.yaml", "is a pre-training recipe: tools/pretrain.py"),
    ):
        with pytest.raises(InputError, match=advice):
            merge_config(cfg, str(path), [])


def test_differences_name_what_would_change_the_result():
    cfg = get_cfg()
    saved = cfg.dump()
    cfg.merge_from_list(["DATA.NUM_WORKERS", 3, "SOLVER.BASE_LR", 0.9, "DATA.STD", (0.1, 0.2, 0.3)])
    before, changed = differences(saved, cfg, "config.yaml")
    assert before["SOLVER.BASE_LR"] == 0.6
    assert changed == ["DATA.STD: [0.229, 0.224, 0.225] -> [0.1, 0.2, 0.3]", "SOLVER.BASE_LR: 0.6 -> 0.9"]
    assert differences("SEED: 0", get_cfg(), "config.yaml")[1] == []  # a key that it lacks had its default
    with pytest.raises(InputError, match="config.yaml cannot be read as a configuration"):
        differences("[", cfg, "config.yaml")


def test_a_run_from_before_large_photographs_were_reduced_goes_on_either_way():
    for switch in (True, False):
        cfg = get_cfg()
        cfg.DATA.REDUCED_DECODE = switch
        assert differences("SEED: 0", cfg, "config.yaml")[1] == []
        saved = f"DATA: {{REDUCED_DECODE: {not switch}}}"
        assert differences(saved, cfg, "config.yaml")[1] == [f"DATA.REDUCED_DECODE: {not switch} -> {switch}"]
