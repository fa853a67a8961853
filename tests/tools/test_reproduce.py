"""tools/reproduce.py: what it plans, shares, skips and runs, and that the tools accept its commands."""

import importlib
import json
import sys

import pytest

from rsa_detectron2.common import record
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.tools import _steps, reproduce
from rsa_detectron2.transfer.report import paper
from tests.conftest import ROOT
from tests.tools.test_report_top1 import CIFAR, cell_of, make_run
from tests.transfer.report.test_tables import full_run

WEIGHTS = [f"{row}={row}.pth" for row in ("instdis", "pirl", "moco", "moco_v2", "infomin", "byol", "mine")]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *map(str, arguments)])
    return reproduce.main()


def planned(monkeypatch, *arguments):
    """The Plan of a command line, without running it."""
    plans = []
    monkeypatch.setattr(reproduce, "show", lambda plan, missing: plans.append((plan, missing)))
    assert call(monkeypatch, *arguments, "--dry-run") == 0
    return plans[0]


def touch(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    "table, steps, hours",
    [
        ("table1", 2 * 52, 608.4 + 0.4 * 24 + 0.2 * 12 + 4 * 12 + 0.6 * 4),
        ("table2", 2 * 80, None),
        ("table3", 2 * 10, None),
        ("table4", 2 * 2, 631 + 12),
        ("table7", 6, 259.6),
        ("table8", 2 * 14, None),
        ("figure1", 1, 0),
        ("figure3", 2 * 21, None),
        ("table5", 3 + 2 + 1, 4 * 69 + 420.7),
        ("table6", 3 + 2 + 1, 4 * 138 + 420.7),
    ],
)
def test_plan_of_each_table(here, monkeypatch, table, steps, hours):
    """Every training of each seed and its evaluation occur once. Of detection, the rows occur whose weights
    need not be given."""
    plan, missing = planned(monkeypatch, table)
    assert len(missing) == len(plan.steps) == steps
    assert hours is None or sum(step.hours for step in missing) == pytest.approx(hours, rel=2e-3)
    seen = set()
    for step in missing:
        assert step.needs is None or step.needs in seen
        seen.add(step.done)


def test_all_tables_share_their_runs(here, monkeypatch, capsys):
    assert call(monkeypatch, "all", "--dry-run", *(f"--weights={text}" for text in WEIGHTS)) == 0
    said = capsys.readouterr().out
    runs = [line for line in said.splitlines() if "tools/pretrain.py" in line]
    assert len(runs) == len(set(runs)) == 84 + 2 * 34  # distinct trainings; 34 of them with two more seeds
    once = said[said.index("imagenet100_byol_R50_100ep") :].splitlines()[1]
    assert once == "    for table1 byol_aa imagenet100, table3 byol imagenet100, figure3 byol imagenet100"
    assert "table4 rsa_200 imagenet, table5 rsa, table6 rsa" in said and "left out" not in said
    total = float(said.split("about ")[1].split(" V100-hours")[0])
    plan, missing = planned(monkeypatch, "all", *(f"--weights={text}" for text in WEIGHTS))
    by_table = sum(step.hours for step in missing)
    assert total == pytest.approx(by_table, abs=0.5)


@pytest.mark.parametrize("table", paper.load()["tables"])
def test_commands_are_ones_that_the_tools_take(here, monkeypatch, table):
    """Each is parsed by the tool itself, and names a config that exists."""
    options = [f"--weights={text}" for text in WEIGHTS] if paper.shows(table) == "ap" else []
    _, missing = planned(monkeypatch, table, *options)
    for step in missing:
        tool = importlib.import_module(step.command[0].removesuffix(".py").replace("/", "."))
        monkeypatch.setattr(sys, "argv", step.command)
        args = tool.parse()
        if getattr(args, "config_file", None):
            assert (ROOT / "configs" / args.config_file).is_file()
    if options:
        # ten rows, and one of its own
        assert sum(step.command[0] == "tools/train_net.py" for step in missing) == 11


def test_commands_of_a_row(here, monkeypatch):
    _, (train, judge) = planned(
        monkeypatch, "table1", "--rows", "rsa_fixed", "--columns", "cifar10", "--seeds", 1
    )
    folder = "output/reproduce/seed0/cifar10_rsa_R18_200ep_beta_0.5_beta_schedule_fixed"
    assert train.command == [
        "tools/pretrain.py",
        "--config-file",
        "pretrain/cifar10_rsa_R18.yaml",
        "--output-dir",
        folder,
        "--seed",
        "0",
        "MODEL.BETA",
        "0.5",
        "MODEL.BETA_SCHEDULE",
        "fixed",
    ]
    assert judge.command == [
        "tools/evaluate.py",
        "linear",
        f"{folder}/model_final.pth",
        "--seed",
        "0",
        "--output",
        f"{folder}/linear.json",
        "--train-bn",
    ]
    _, (_, judge) = planned(monkeypatch, "table3", "--rows", "rsa", "--columns", "imagenet100")
    assert "--train-bn" not in judge.command


def test_weights_of_a_row(here, monkeypatch, capsys):
    plan, missing = planned(
        monkeypatch,
        "table5",
        "--weights",
        "infomin=a b.pth",
        "--weights",
        "mine=c.pth",
        "--rows",
        "infomin",
        "mine",
        "rsa",
        "pirl",
    )
    commands = [step.command for step in missing]
    assert [
        "tools/convert_to_d2.py",
        "a b.pth",
        "output/reproduce/weights/infomin_r50.pkl",
        "--method",
        "InfoMin",
    ] in commands
    assert [
        "tools/convert_to_d2.py",
        "c.pth",
        "output/reproduce/weights/mine_r50.pkl",
        "--method",
        "mine",
    ] in commands
    assert plan.left_out == ["table5 pirl needs --weights pirl=FILE, its authors' checkpoint"]
    rsa = [step for step in missing if "table5 rsa" in step.rows]
    assert [step.command[0] for step in rsa] == [
        "tools/pretrain.py",
        "tools/convert_to_d2.py",
        "tools/train_net.py",
    ]
    assert rsa[1].command[1] == str(rsa[0].done) and str(rsa[1].done) in rsa[2].command
    _, (convert, _) = planned(monkeypatch, "table5", "--rows", "rsa", "--weights", "rsa=authors.pth")
    assert convert.command[1:2] + convert.command[3:] == ["authors.pth", "--method", "RSA"]


def test_what_is_done_is_skipped_and_so_is_what_led_to_it(here, monkeypatch):
    arguments = ["table2", "--rows", "rsa", "--columns", "cifar10", "--seeds", 2]
    folder = here / "output/reproduce/seed0" / CIFAR.training.name
    make_run(folder, CIFAR)  # with linear.json the checkpoint itself is no longer needed
    _, missing = planned(monkeypatch, *arguments)
    assert [step.done.parent.parent.name for step in missing] == ["seed1", "seed1"]
    (folder / "linear.json").unlink()
    touch(folder / "model_final.pth")
    _, missing = planned(monkeypatch, *arguments)
    assert [step.done.name for step in missing] == ["linear.json", "model_final.pth", "linear.json"]


def test_a_finished_run_of_other_settings_is_not_taken_for_done(here, monkeypatch):
    folder = here / "output/reproduce/seed0" / CIFAR.training.name
    make_run(folder, CIFAR, settings={"SOLVER.EPOCHS": 3})
    touch(folder / "model_final.pth")
    arguments = ["table2", "--rows", "rsa", "--columns", "cifar10"]
    with pytest.raises(
        InputError, match=r"holds another run \(3 epochs instead of 200\): move it away, or give another"
    ):
        planned(monkeypatch, *arguments)
    (folder / record.FILE).unlink()
    with pytest.raises(InputError, match="run.json cannot be read .no such file.: it says what the run was"):
        planned(monkeypatch, *arguments)


def test_a_finished_fine_tuning_is_checked_as_well(here, monkeypatch):
    folder = full_run(here / "output/reproduce/seed0/mask_rcnn_R50_FPN_1x_random", 32.0, 29.0, None)
    _, missing = planned(monkeypatch, "table5", "--rows", "random")
    assert missing == []
    full_run(folder, 32.0, 29.0, None, keys={"SOLVER.MAX_ITER": 10})
    with pytest.raises(
        InputError, match=r"holds another run \(10 iterations instead of 90000\): move it away"
    ):
        planned(monkeypatch, "table5", "--rows", "random")


def test_the_run_of_the_three_commands_serves(here, monkeypatch):
    """output/pretrain is used if its record is that of the row, and only then."""
    cell = cell_of("table4", "rsa_200", "imagenet")
    make_run(here / "output/pretrain", cell)
    touch(here / "output/pretrain/model_final.pth")
    _, missing = planned(monkeypatch, "table5", "--rows", "rsa")
    assert [step.command[0] for step in missing] == ["tools/convert_to_d2.py", "tools/train_net.py"]
    assert missing[0].command[1] == "output/pretrain/model_final.pth"
    make_run(here / "output/pretrain", cell, settings={"SOLVER.EPOCHS": 100})
    _, missing = planned(monkeypatch, "table5", "--rows", "rsa")
    assert missing[0].command[0] == "tools/pretrain.py"


def test_another_grid_of_figure3(here, monkeypatch):
    plan, missing = planned(monkeypatch, "figure3", "--betas", 0, 0.25, "--columns", "cifar100")
    names = [step.done.parent.name for step in missing[::2]]
    assert names == [
        "cifar100_byol_R18_800ep",
        "cifar100_rsa_R18_800ep_beta_0.0",
        "cifar100_rsa_R18_800ep_beta_0.25",
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        (["table5", "--num-gpus", "0"], "--num-gpus is 0: it must be at least 1"),
        (["table5", "--set", "SEED"], "--set takes KEY VALUE pairs, but 'SEED' has no value"),
        (["table1", "--set", "SOLVER.EPOCHS", "1"], "--set: of no use for table1; leave it out"),
        (["table1", "--betas", "0.1"], "--betas: of no use for table1"),
        (["table2", "--short"], "--short: of no use for table2"),
        (["figure1", "--rows", "a"], "--rows: of no use for figure1"),
        (
            ["table1", "--rows", "rsa"],
            "table1 has no row rsa: choose from byol_aa, byol_aw, rsa_fixed, rsa_decay",
        ),
        (
            ["table1", "--columns", "imagenet"],
            "table1 has no column imagenet: choose from cifar10, cifar100, stl10",
        ),
    ],
)
def test_wrong_options_are_one_line(here, monkeypatch, options, message):
    with pytest.raises(InputError, match=message):
        call(monkeypatch, *options)


def test_runs_stops_and_goes_on(here, monkeypatch, capfd):
    """A step with exit status 75 stops it. The same command goes on, and ends in the report."""
    folder = here / "output/reproduce/seed0" / CIFAR.training.name
    commands = ["raise SystemExit(75)"]

    def command_line(step):
        if not commands:
            make_run(folder, CIFAR, 91.0)  # as both steps would write it
            touch(folder / "model_final.pth")
        return [sys.executable, "-c", commands.pop() if commands else ""]

    monkeypatch.setattr(_steps, "command_line", command_line)
    arguments = ["table2", "--rows", "rsa", "--columns", "cifar10", "--seeds", 1]
    assert call(monkeypatch, *arguments) == 75
    assert "stopped with status 75" in capfd.readouterr().err
    assert call(monkeypatch, *arguments) == 0
    said = capfd.readouterr().out
    assert "[1 of 2] $ tools/pretrain.py" in said and "seed 1, 2 is missing" in said and "-1.3 *" in said
    report = json.dumps((here / "output/reproduce/table2/report.md").read_text(), ensure_ascii=False)
    assert "MoCo v2, Tiny ImageNet, 800 epochs (paper)" in report


def test_all_is_the_papers(here, monkeypatch, capsys):
    """The controlled test is not among its tables."""
    assert call(monkeypatch, "all", "--dry-run") == 0
    assert "shapes" not in capsys.readouterr().out
