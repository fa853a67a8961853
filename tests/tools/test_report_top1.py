"""Top-1 tables: which row of the paper a run belongs to, by its record alone, and the line below a run that
differs from its row."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from rsa_detectron2.common.record import Origin, describe, flatten
from rsa_detectron2.common.tables import to_markdown
from rsa_detectron2.pretrain.config import get_cfg
from rsa_detectron2.tools import report_top1
from rsa_detectron2.transfer.report import paper, pictures
from rsa_detectron2.transfer.report.tables import difference_cell, make_rows, read_run, table_cells
from tests.conftest import ROOT


def cell_of(table, row, column):
    return next(cell for cell in paper.cells(table) if (cell.row, cell.column) == (row, column))


def make_run(folder, cell, best=90.0, seed=0, settings=(), record=(), evaluation=()):
    """Write linear.json and run.json as a run of a cell would, with changes of settings, of the record and of
    the evaluation."""
    training, cfg = cell.training, get_cfg()
    cfg.merge_from_file(str(ROOT / "configs" / training.recipe))
    cfg.merge_from_list([item for pair in (*training.overrides, *dict(settings).items()) for item in pair])
    dataset = paper.load()["datasets"][training.dataset]
    data = {"name": "x", "images": dataset["images"][0], "classes": dataset["classes"], "sha256": "0"}
    run = describe(
        "pretrain",
        cfg,
        Origin(training.recipe, (), flatten(get_cfg())),
        method=cfg.METHOD,
        seed=seed,
        step=99,
        steps=99,
        processes=dataset["gpus"],
        device="Tesla V100",
        bn_batch_size=training.bn,
        data=data,
        seconds=3600.0,
    ) | dict(record)
    linear = dataset["linear"]
    result = {
        "kind": "linear",
        "checkpoint": "c",
        "branch": "online",
        "protocol": linear["protocol"],
        "epochs": linear["epochs"],
        "val": {"images": dataset["images"][1]},
        "seed": seed,
        "pretrain": run,
        "linear_top1_last": best - 3,
        "linear_top1_best": best - 2,
    }
    if linear["train_bn"]:
        result |= {"train_bn_top1_last": best - 1, "train_bn_top1_best": best}
    else:
        result["linear_top1_best"] = best
    folder.mkdir(parents=True, exist_ok=True)
    result = {key: value for key, value in (result | dict(evaluation)).items() if value is not None}
    for name, content in (("linear.json", result), ("run.json", run)):
        (folder / name).write_text(json.dumps(content))
    return folder


def rows_of(*folders, tables=None):
    return make_rows("top1", {str(folder): report_top1.read_top1(folder) for folder in folders}, tables)


@pytest.mark.parametrize("table", [table for table in paper.load()["tables"] if paper.shows(table) == "top1"])
def test_every_row_and_every_number_of_a_table(tmp_path, table):
    """A run of each training stands beside every number that it is compared with; quotations are printed
    alone."""
    cells = paper.cells(table)
    folders = [make_run(tmp_path / f"{i}", cell, 50.0) for i, cell in enumerate(cells) if cell.training]
    rows = rows_of(*folders, tables=[table])
    assert len(rows) == len(cells)
    for row, cell in zip(rows, cells):
        assert row.title == cell.title and list(row.published.values()) == [n for n in cell.published if n]
        assert len(row.runs) == bool(cell.training) and row.words == []
        for name, (mean, _) in row.published.items():
            assert row.difference(name) == (pytest.approx(50 - mean) if cell.training else None)
    text = to_markdown(table_cells("top1", rows))
    for cell in cells:
        for mean, std in filter(None, cell.published):
            assert (f"{mean}" if std is None else f"{mean} ± {std}") in text


CIFAR = cell_of("table2", "rsa", "cifar10")


def test_seeds_and_their_difference(tmp_path):
    folders = [
        make_run(tmp_path / f"{seed}", CIFAR, best, seed) for seed, best in enumerate((91.0, 92.0, 94.0))
    ]
    [row] = rows_of(*folders)
    np.testing.assert_allclose(
        row.figures["train BN, best"], (np.mean([91, 92, 94]), np.std([91, 92, 94], ddof=1))
    )
    lines = table_cells("top1", [row])
    assert lines[0] == ["", "seeds", "last epoch", "best epoch", "train BN, last", "train BN, best"]
    assert lines[1] == [
        "RSA, CIFAR-10, 200 epochs",
        "3",
        "89.3 ± 1.5",
        "90.3 ± 1.5",
        "91.3 ± 1.5",
        "92.3 ± 1.5",
    ]
    assert (
        lines[2] == ["  paper", "", "–", "–", "–", "92.3 ± 0.1"]
        and lines[3][-1] == "+0.0"
        and len(lines) == 4
    )


@pytest.mark.parametrize("best, text", [(92.7, "+0.4"), (92.9, "+0.6 *"), (91.7, "-0.6 *")])
def test_mark_beyond_seed_noise(tmp_path, best, text):
    [row] = rows_of(make_run(tmp_path, CIFAR, best))
    assert difference_cell(row, "train BN, best") == text


def test_noise_of_a_row_with_a_large_deviation(tmp_path):
    """The mark takes twice the published deviation, if that is more than the noise that is assumed for all
    rows."""
    cell = cell_of("table8", "simsiam", "cifar100")
    mean, std = cell.published[0]
    for gap, mark in ((2 * std - 0.1, ""), (2 * std + 0.1, " *")):
        [row] = rows_of(make_run(tmp_path / f"{gap}", cell, mean + gap))
        assert difference_cell(row, "train BN, best") == f"+{gap:.1f}{mark}"


@pytest.mark.parametrize(
    "settings, record, evaluation, words",
    [
        ({"SOLVER.EPOCHS": 10, "MODEL.SMALL_STEM": False}, {}, {}, "ordinary stem; 10 epochs instead of 200"),
        ({"MODEL.BETA": 0.2}, {}, {}, "β_base 0.2 instead of 0.3"),
        ({"MODEL.BETA_SCHEDULE": "fixed"}, {}, {}, "β fixed instead of cosine"),
        ({"SOLVER.BASE_LR": 0.2}, {}, {}, "base lr 0.2 instead of 0.1"),
        ({"SOLVER.AMP": "bf16"}, {}, {}, "AMP bf16 instead of off"),
        (
            {"MODEL.TAU": 0.9},
            {},
            {},
            "MODEL.TAU 0.9 instead of 0.99",
        ),  # which the recipe leaves at its default
        ({"DATA.IMAGE_SIZE": 24}, {}, {}, "DATA.IMAGE_SIZE 24 instead of 32"),
        ({}, {"data": {"name": "x", "images": 600, "classes": 10}}, {}, "600 images instead of 50000"),
        ({}, {"data": {"name": "x", "images": 50000, "classes": 9}}, {}, "9 classes instead of 10"),
        ({}, {"bn_batch_size": 64}, {}, "BatchNorm over 64 images instead of 256"),
        ({}, {"step": 50}, {}, "step 50 of 99"),
        ({}, {}, {"epochs": 5}, "linear evaluation of 5 epochs instead of 100"),
        ({}, {}, {"protocol": "large"}, "the large linear protocol instead of the small one"),
        ({}, {}, {"branch": "target"}, "the target network"),
        ({}, {}, {"val": {"images": 100}}, "100 validation images instead of 10000"),
        ({}, {}, {"train_bn_top1_best": None}, "linear evaluation without --train-bn"),
        ({}, {}, {"linear_top1_last": None}, "no linear evaluation"),
        (
            {"SOLVER.MICRO_BATCH": 128, "DATA.NUM_WORKERS": 3, "KNN.PERIOD": 0, "OUTPUT_DIR": "y"},
            {"seed": 7},
            {},
            "",
        ),
    ],
)
def test_what_a_run_differs_in(tmp_path, settings, record, evaluation, words):
    [row] = rows_of(make_run(tmp_path, CIFAR, 38.4, 0, settings, record, evaluation))
    assert (row.table, row.place, "; ".join(row.words)) == ("table2", ("rsa", "cifar10"), words)
    lines = table_cells("top1", [row])
    assert lines[2][0] == "  paper" and lines[2][-1] == "92.3 ± 0.1"
    assert [line[0] for line in lines[3:]] == (
        [f"  {words}"] if words else ["  difference", "  seed 0, 1, 2 is missing"]
    )


def test_a_seed_that_is_missing_and_one_that_is_there_twice(tmp_path):
    folders = [make_run(tmp_path / "a", CIFAR, 91.0, 0), make_run(tmp_path / "b", CIFAR, 92.0, 2)]
    [row] = rows_of(*folders)
    assert row.missing == [1] and table_cells("top1", [row])[-1][0] == "  seed 1 is missing"
    assert len(rows_of(*folders, make_run(tmp_path / "c", CIFAR, 93.0, 2))) == 2


def test_one_run_serves_the_rows_that_share_it(tmp_path):
    shared = cell_of("table1", "byol_aa", "imagenet100")
    run = make_run(tmp_path, shared, 80.0)
    for table in ("table1", "table3", "figure3"):
        rows = [row for row in rows_of(run, tables=[table]) if row.runs]
        assert [row.difference("best epoch") for row in rows] == [
            pytest.approx(80.0 - shared.published[0][0])
        ]
    assert len(rows_of(run)) == 1  # without a table it is named once


def test_runs_that_are_nothing_of_the_papers(tmp_path):
    mine = make_run(tmp_path / "mine", CIFAR, 70.0, 0, {"SOLVER.EPOCHS": 3}, {"recipe": "/home/me/my.yaml"})
    old = make_run(tmp_path / "old", CIFAR, 71.0, 0, evaluation={"pretrain": None, "source": "old.pth"})
    rows = rows_of(mine, old)
    assert [row.title for row in rows] == [
        f"rsa, x, 3 epochs ({mine})",
        "old.pth (no record of its pre-training)",
    ]
    assert all(row.extra and not row.published for row in rows)


def test_times_and_their_ratio(tmp_path):
    hours = {("byol", "cifar100"): 12.0, ("rsa", "cifar100"): 12.6}
    folders = [
        make_run(tmp_path / row, cell_of("table7", row, column), record={"seconds": 3600 * value})
        for (row, column), value in hours.items()
    ]
    rows = make_rows("hours", {str(folder): read_run(folder) for folder in folders}, ["table7"])
    [byol, rsa] = [row for row in rows if row.runs]
    assert byol.difference("hours") == pytest.approx(12 - 11.3) and not byol.words
    assert report_top1.ratios("table7", rows)[1:3] == [
        ["cifar100", "1.018", "1.050"],
        ["stl10", "1.026", "–"],
    ]
    slow = make_run(
        tmp_path / "slow", cell_of("table7", "rsa", "cifar100"), record={"device": "H100", "processes": 2}
    )
    [row] = make_rows("hours", {"slow": read_run(slow)})
    assert row.words == ["2 x H100 instead of 1 x V100"] and row.difference("hours") is None


def test_short_form_of_times(tmp_path, capsys):
    """7,200 s in 800 epochs of 9 s are 2 hours; ImageNet-100 has 200."""
    files = {}
    for column in paper.load()["tables"]["table7"]["columns"]:
        lines = [
            {"method": method, "data": data, "machine": "M", "s per epoch": seconds}
            for data, method, seconds in (
                ("synthetic", "byol", 1.0),
                ("2 workers", "byol", 9.0),
                ("2 workers", "rsa", 9.9),
            )
        ]
        files[column] = tmp_path / f"{column}.json"
        files[column].write_text("\n".join(map(json.dumps, lines)))
    report_top1.write_short("table7", files, tmp_path)
    said = [[word.strip() for word in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert said[2] == ["CIFAR-100, 800 epochs", "2.0", "2.2", "1.100", "11.3", "11.5", "1.018", "M"]
    assert said[4][:4] == ["ImageNet-100, 200 epochs", "0.5", "0.6", "1.100"]


def test_tool_writes_the_table_and_figure3(tool, tmp_path):
    cells = [cell_of("figure3", f"beta_{beta}", "cifar100") for beta in ("0.0", "0.3", "0.5")]
    folders = [make_run(tmp_path / cell.row, cell, 69.0 + i) for i, cell in enumerate(cells)]
    done = tool("report_top1", *folders, "--table", "figure3", "--output", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    assert (
        "Figure 3: Sensitivity to β_base" in done.stdout
        and "β_base 0.1, STL-10, 800 epochs (not run)" in done.stdout
    )
    rows = {row["row"]: row for row in csv.DictReader(open(tmp_path / "report" / "table.csv"))}
    row = rows["β_base 0.3, CIFAR-100, 800 epochs"]
    assert float(row["train BN, best"]) == 70 and float(row["train BN, best difference"]) == pytest.approx(
        -0.4
    )
    assert row["table"] == "figure3" and row["differs in"] == ""
    picture = (
        np.asarray(Image.open(tmp_path / "report" / "figure3.png").convert("RGB")).reshape(-1, 3).tolist()
    )
    for color in pictures.PALETTE[:3]:  # dots, published diamonds, the dashed line
        assert [int(color[i : i + 2], 16) for i in (1, 3, 5)] in picture
    assert "figure3.png" in (tmp_path / "report" / "report.md").read_text()


def test_what_is_missing(tool, tmp_path):
    for name, content, text in (
        ("empty", None, "holds no linear.json"),
        ("broken", "[]", "holds no JSON object"),
        ("foreign", "{}", "is not what tools/evaluate.py"),
        ("record", '{"knn_top1": 1.0, "pretrain": {"kind": "pretrain"}}', "is not what tools/evaluate.py"),
        ("text", '{"linear_top1_last": "high"}', "is not what tools/evaluate.py"),
    ):
        (tmp_path / name).mkdir()
        if content:
            (tmp_path / name / "linear.json").write_text(content)
        done = tool("report_top1", tmp_path / name, "--output", tmp_path / "report")
        assert done.returncode == 2 and text in done.stderr and done.stderr.count("\n") == 1
