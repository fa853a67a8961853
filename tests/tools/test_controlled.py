"""The controlled test in a minute: what runs, what is skipped, and what the report says."""

import csv
import json
import statistics
import subprocess
import sys

import pytest

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.config import get_cfg
from rsa_detectron2.tools import _controlled, reproduce
from rsa_detectron2.tools._controlled import FIGURES, ControlledTest, write_report
from tests.conftest import ROOT

SMALL = (
    "SOLVER.EPOCHS 1 SOLVER.WARMUP_EPOCHS 0 MODEL.BACKBONE test_resnet MODEL.HIDDEN_DIM 16 SOLVER.AMP off"
).split()


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "controlled", *map(str, arguments)])
    monkeypatch.setattr(_controlled, "IMAGES", {"train": (3, 0), "val": (2, 1)})
    return reproduce.main()


@pytest.mark.slow
def test_runs_are_done_once_and_reported(tmp_path, monkeypatch, capsys):
    arguments = ["--rows", "byol", "simsiam_rsa", "--seeds", 1, "--jobs", 2]
    arguments += ["--output-dir", tmp_path, "--set", *SMALL]
    assert call(monkeypatch, "--dry-run", *arguments) == 0
    assert capsys.readouterr().out.count("[to run]") == 5 and not list(tmp_path.iterdir())
    assert call(monkeypatch, *arguments) == 0
    folder = tmp_path / "controlled"
    results = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("seed0/*/top1.json")}
    assert {name: result["method"] for name, result in results.items()} == {
        name: name for name in ("untrained", "byol", "simsiam_rsa")
    }
    for result in results.values():
        right = [result[figure] * 48 / 100 for figure in FIGURES]  # of 48 images
        assert right == pytest.approx([round(count) for count in right], abs=1e-3)
        assert 0 <= min(right) <= max(right) <= 48
    report = (folder / "report.md").read_text()
    assert "chance is 4.2, 25.0 and 16.7 %" in report and f"{results['byol']['knn_pair']:.1f}" in report
    assert (folder / "seed0" / "byol" / "model_final.log").is_file()
    capsys.readouterr()

    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("ran again"))
    (folder / "report.md").unlink()
    assert call(monkeypatch, *arguments) == 0
    assert capsys.readouterr().out.count("[done]") == 5 and (folder / "report.md").read_text() == report
    with pytest.raises(InputError, match="byol holds another run .*; 1 epochs instead of 20; "):
        call(monkeypatch, *arguments[: arguments.index("--set")])


def test_a_run_that_fails_names_its_log(tmp_path, monkeypatch, capsys, forked_steps):
    arguments = ["--rows", "byol", "--seeds", 1, "--jobs", 2, "--output-dir", tmp_path]
    assert call(monkeypatch, *arguments, "--set", "SOLVER.BATCH_SIZE", 128) == 2
    log = tmp_path / "controlled" / "seed0" / "byol" / "model_final.log"
    assert f"(printed: {log}); the same command goes on" in capsys.readouterr().err
    assert "fewer than the global batch" in log.read_text()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--seeds", 0], "--seeds is 0: it must be at least 1"),
        (["--jobs", 0], "--jobs is 0: it must be at least 1"),
        (["--rows", "byo"], "controlled has no row byo: choose from rsa, rsa_fixed_beta, "),
        (["--rehearse", "--columns", "a"], "--columns, --rehearse: of no use for controlled; leave it out"),
        (["--set", "SEED"], "--set takes KEY VALUE pairs, but 'SEED' has no value"),
    ],
)
def test_wrong_options_are_one_line(monkeypatch, options, message):
    with pytest.raises(InputError, match=message):
        call(monkeypatch, *options)


FORMER = {
    "tools/ablation.py is now tools/reproduce.py controlled": ["tools/ablation.py"],
    "rsa-d2 ablation is now rsa-d2 reproduce controlled": [
        "-c",
        "from rsa_detectron2.cli import main; import sys; sys.argv[1:1] = ['ablation']; main()",
    ],
}


@pytest.mark.parametrize("message, command", FORMER.items())
def test_the_former_command_names_the_new_one(message, command):
    done = subprocess.run(
        [sys.executable, *command, "--seeds", "2"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr == f"error: {message}\n"


def test_report_against_statistics(tmp_path):
    results = {
        "untrained": [dict.fromkeys(FIGURES, 10.0)] * 3,
        "rsa": [{name: 10.0 * i + j for j, name in enumerate(FIGURES)} for i in (2, 4, 5)],
    }
    markdown = write_report(tmp_path, results)
    rows = {row["row"]: row for row in csv.DictReader(open(tmp_path / "table.csv"))}
    for j, name in enumerate(FIGURES):
        values = [20 + j, 40 + j, 50 + j]
        assert float(rows["rsa"][name]) == pytest.approx(statistics.fmean(values))
        assert float(rows["rsa"][f"{name} std"]) == pytest.approx(statistics.stdev(values))
    assert rows["rsa"]["seeds"] == "3" and "36.7 ± 15.3" in markdown and "10.0 ± 0.0" in markdown
    assert (tmp_path / "controlled.png").stat().st_size > 10_000


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
    for method in ControlledTest.ROWS:
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
