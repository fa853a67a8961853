"""The table of top-1 figures: seeds of a row together, beside the paper's, and what is missing said in a line."""

import csv
import json
import statistics


def test_table(tool, tmp_path):
    figures = {("cifar10_rsa_R18", 0): (91.0, 92.0), ("cifar10_rsa_R18", 1): (92.0, 92.5),
               ("cifar10_rsa_R18", 2): (94.0, 94.0), ("cifar10_byol_aw_R18", 0): (88.25, 88.5)}
    for (name, seed), (last, best) in figures.items():
        folder = tmp_path / f"seed{seed}" / name
        folder.mkdir(parents=True)
        found = {"checkpoint": "x", "linear_top1_last": last, "linear_top1_best": best}
        (folder / "linear.json").write_text(json.dumps(found))
    (tmp_path / "seed0/cifar10_byol_aw_R18/knn.json").write_text(json.dumps({"knn_top1": 80.0, "step": 3}))
    runs = [tmp_path / f"seed{seed}" / name for name, seed in figures]
    done = tool("report_top1", *runs, "--output", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    rows = {row["run"]: row for row in csv.DictReader(open(tmp_path / "report" / "table.csv"))}
    rsa, byol = rows["cifar10_rsa_R18"], rows["cifar10_byol_aw_R18"]
    assert float(rsa["linear_top1_last"]) == statistics.fmean([91, 92, 94]) and rsa["seeds"] == "3"
    assert float(rsa["linear_top1_last std"]) == statistics.stdev([91, 92, 94])
    assert rsa["paper"] == "92.3 ± 0.1" and rsa["knn_top1"] == "" and byol["paper"] == ""
    assert float(byol["knn_top1"]) == 80 and byol["linear_top1_best std"] == ""
    report = (tmp_path / "report" / "report.md").read_text()
    assert "92.3 ± 1.5" in report and "92.8 ± 1.0" in report and "88.2" in report  # means and deviations, one decimal


def test_what_is_missing(tool, tmp_path):
    for name, content, text in (("empty", None, "holds no linear.json"),
                                ("broken", "[]", "is not what tools/evaluate.py")):
        (tmp_path / name).mkdir()
        if content:
            (tmp_path / name / "linear.json").write_text(content)
        done = tool("report_top1", tmp_path / name, "--output", tmp_path / "report")
        assert done.returncode == 2 and text in done.stderr and done.stderr.count("\n") == 1
