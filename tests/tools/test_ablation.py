"""The controlled test in a minute: what runs, what is skipped, and what the report says."""

import csv
import json
import statistics
import sys

import pytest

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.config import get_cfg
from rsa_detectron2.tools import ablation
from rsa_detectron2.transfer.data.shapes import COLOUR_CLASSES
from tests.conftest import ROOT

SMALL = (
    "SOLVER.EPOCHS 1 SOLVER.WARMUP_EPOCHS 0 MODEL.BACKBONE test_resnet MODEL.HIDDEN_DIM 16 SOLVER.AMP off"
).split()


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["ablation.py", *map(str, arguments)])
    monkeypatch.setattr(ablation, "IMAGES", {"train": (3, 0), "val": (2, 1)})
    ablation.main()


def test_runs_are_done_once_and_reported(tmp_path, monkeypatch, capsys):
    arguments = [
        "--methods",
        "byol",
        "simsiam_rsa",
        "--seeds",
        1,
        "--jobs",
        2,
        "--output-dir",
        tmp_path,
        "--set",
        *SMALL,
    ]
    call(monkeypatch, "--dry-run", *arguments)
    assert capsys.readouterr().out.count("[to run]") == 3 and not list(tmp_path.iterdir())
    call(monkeypatch, *arguments)
    results = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("seed0/*/top1.json")}
    assert set(results) == {"untrained", "byol", "simsiam_rsa"}
    for name, result in results.items():
        assert result["method"] == name and {*result} == {"method", "seed", *ablation.FIGURES}
        right = [result[figure] * 48 / 100 for figure in ablation.FIGURES]  # of 48 images
        assert right == pytest.approx([round(count) for count in right], abs=1e-3)
        assert 0 <= min(right) <= max(right) <= 48
    report = (tmp_path / "report.md").read_text()
    assert "chance is 4.2, 25.0 and 16.7 %" in report and f"{results['byol']['knn_pair']:.1f}" in report
    capsys.readouterr()

    monkeypatch.setattr(ablation.subprocess, "Popen", lambda *_, **__: pytest.fail("ran again"))
    (tmp_path / "report.md").unlink()
    call(monkeypatch, *arguments)
    assert capsys.readouterr().out.count("[done]") == 3 and (tmp_path / "report.md").read_text() == report


def test_a_run_that_fails_names_its_log(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="log.txt"):
        call(
            monkeypatch,
            "--methods",
            "byol",
            "--seeds",
            1,
            "--output-dir",
            tmp_path,
            "--set",
            "SOLVER.BATCH_SIZE",
            "128",
        )
    assert "fewer than the global batch" in (tmp_path / "seed0" / "byol" / "log.txt").read_text()
    with pytest.raises(InputError, match="--seeds is 0"):
        call(monkeypatch, "--seeds", 0)


def test_report_against_statistics(tmp_path):
    results = {
        "untrained": [dict.fromkeys(ablation.FIGURES, 10.0)] * 3,
        "rsa": [{name: 10.0 * i + j for j, name in enumerate(ablation.FIGURES)} for i in (2, 4, 5)],
    }
    markdown = ablation.write_report(tmp_path, results)
    rows = {row["method"]: row for row in csv.DictReader(open(tmp_path / "table.csv"))}
    for j, name in enumerate(ablation.FIGURES):
        values = [20 + j, 40 + j, 50 + j]
        assert float(rows["rsa"][name]) == pytest.approx(statistics.fmean(values))
        assert float(rows["rsa"][f"{name} std"]) == pytest.approx(statistics.stdev(values))
    assert rows["rsa"]["seeds"] == "3" and "36.7 ± 15.3" in markdown and "10.0 ± 0.0" in markdown
    assert (tmp_path / "ablation.png").stat().st_size > 10_000


def test_parts_of_the_label():
    classes = sorted(COLOUR_CLASSES)
    pair, form, colour = (ablation.part_of(classes, part) for part in ablation.PARTS)
    assert pair == list(range(24)) and len({*form}) == 4 and len({*colour}) == 6
    assert len({*zip(form, colour)}) == 24
    for name, f, c in zip(classes, form, colour):
        assert ["circle", "cross", "square", "star"][f] == name.split("-")[0]
        assert ["blue", "cyan", "green", "magenta", "red", "yellow"][c] == name.split("-")[1]


def test_recipes_differ_in_their_method_alone():
    """The learning rate, the length and everything else are the same; only the method differs."""

    def flat(tree, prefix=""):
        return {
            key: value
            for name, part in tree.items()
            for key, value in (
                flat(part, f"{prefix}{name}.") if isinstance(part, dict) else {prefix + name: part}
            ).items()
        }

    settings = {}
    for method in ablation.METHODS:
        cfg = get_cfg()
        cfg.merge_from_file(str(ROOT / "configs" / "pretrain" / f"shapes_colour_{method}_R18.yaml"))
        settings[method] = flat(cfg)
    changed = {
        method: {
            key: value
            for key, value in settings[method].items()
            if value != settings["rsa"][key] and key != "OUTPUT_DIR"
        }
        for method in settings
    }
    assert changed == {
        "rsa": {},
        "rsa_fixed_beta": {"MODEL.BETA_SCHEDULE": "fixed"},
        "rsa_beta_0": {"MODEL.BETA": 0.0},
        "byol": {"METHOD": "byol"},
        "byol_aw": {"METHOD": "byol_aw"},
        "simsiam": {"METHOD": "simsiam", "MODEL.OUT_DIM": 512},
        "simsiam_rsa": {"METHOD": "simsiam_rsa", "MODEL.OUT_DIM": 512},
    }
