import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fvcore.common.config import CfgNode as CN
from PIL import Image, ImageDraw
from pycocotools import mask as rle

from transfer import pictures, report, results
from transfer.annotations import dataset_name
from transfer.masks import to_rle
from transfer.config import InputError, torchvision_defaults

ROOT = Path(__file__).resolve().parents[1]


def aps(box, mask=None):
    return {"bbox": dict.fromkeys(results.AP_KEYS, box), "segm": dict.fromkeys(results.AP_KEYS, mask)}


def make_dataset(folder):
    """Two gray 160 x 120 images with one ellipse each -> (annotation file, image folder, COCO annotations)."""
    images, annotations = [], []
    (folder / "images").mkdir(parents=True)
    for i in (1, 2):
        Image.new("RGB", (160, 120), (128, 128, 128)).save(folder / "images" / f"{i}.png")
        ellipse = Image.new("L", (160, 120))
        ImageDraw.Draw(ellipse).ellipse((40, 30, 120, 90), fill=1)
        encoded = rle.encode(np.asfortranarray(np.array(ellipse)))
        images.append({"id": i, "file_name": f"{i}.png", "width": 160, "height": 120})
        annotations.append({"id": i, "image_id": i, "category_id": 7, "bbox": [40, 30, 80, 60], "area": 3770,
                            "iscrowd": 0, "segmentation": {**encoded, "counts": encoded["counts"].decode()}})
    (folder / "ann.json").write_text(json.dumps(
        {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "ellipse"}]}))
    return folder / "ann.json", folder / "images", annotations


def make_run(folder, ap, dataset="coco_2017_val", detections=None, weights=None):
    cfg = torchvision_defaults()
    cfg.OUTPUT_DIR = str(folder)
    cfg.DATASETS.TEST = (dataset,)
    results.write_results(cfg, "torchvision", ap, weights, 700, 12.5)
    (folder / "metrics.json").write_text("".join(
        json.dumps({"iteration": i, "total_loss": 2 - i / 100}) + "\n" for i in range(0, 100, 20))
        + json.dumps({"iteration": 100, "bbox/AP": 33.0}) + "\n")
    if detections is not None:
        (folder / "inference").mkdir()
        (folder / "inference" / "coco_instances_results.json").write_text(json.dumps(detections))
    return folder


def run_tool(*arguments, cwd):
    return subprocess.run([sys.executable, ROOT / "tools" / "report.py", *map(str, arguments)], cwd=cwd,
                          capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "utf-8"})


def test_weights_label():
    assert report.weights_label({"weights": {"method": "rsa", "step": 500}}) == "rsa, step 500"
    assert report.weights_label({"weights": None}) == "random"
    assert report.weights_label({"weights": {"method": "moco", "step": -1}}) == "moco"
    assert report.weights_label({"weights": {"method": "unknown", "format": "SimSiam", "step": -1}}) == "SimSiam"


def test_table_mean_std_and_missing_cells(tmp_path):
    boxes = [40.2, 41.1, 39.5]
    runs = {"rsa": [{"ap": aps(x, x - 4)} for x in boxes], "one": [{"ap": aps(30.04)}],
            "gap": [{"ap": aps(1.0)}, {"ap": aps(None)}]}
    rows = report.ap_table(runs)
    mean, std = rows[0]["box AP75"]
    np.testing.assert_allclose((mean, std), (np.mean(boxes), np.std(boxes, ddof=1)))
    cells = report.table_cells(rows)
    assert cells[0] == ["", "box AP", "box AP50", "box AP75", "mask AP", "mask AP50", "mask AP75"]
    assert cells[1] == ["rsa"] + ["40.3 ± 0.8"] * 3 + ["36.3 ± 0.8"] * 3
    assert cells[2] == ["one"] + ["30.0"] * 3 + ["–"] * 3
    assert cells[3] == ["gap"] + ["–"] * 6

    lines = report.to_markdown([*cells, ["a|b"] + ["1"] * 6]).splitlines()
    assert len({len(line) for line in lines}) == 1 and "a\\|b" in lines[-1]

    report.write_csv(rows, tmp_path / "table.csv")
    with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
        parsed = list(csv.DictReader(file))
    assert len(parsed[0]) == 4 + 2 * 12
    assert float(parsed[0]["box APs"]) == pytest.approx(np.mean(boxes)) and parsed[0]["seeds"] == "3"
    assert float(parsed[0]["mask AP std"]) == pytest.approx(np.std(boxes, ddof=1))
    assert parsed[1]["box AP std"] == "" and parsed[2]["box AP"] == ""


def test_series_survive_a_crash_and_a_resume(tmp_path):
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}, {"step": 2, "knn_top1": 40.0}, {"step": 2, "loss": 2.0}]
    (tmp_path / "m").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 3, "lo')
    assert pictures.read_series(tmp_path / "m", "step", ["loss", "knn_top1", "beta"]) == {
        "loss": ((1, 2), (3.0, 2.0)), "knn_top1": ((2,), (40.0,))}
    assert pictures.read_series(tmp_path / "absent", "step", ["loss"]) == {}


def test_curves_hold_only_panels_with_data(tmp_path):
    run = make_run(tmp_path / "run", aps(30.0))
    # BYOL: no beta; one evaluation
    rows = [{"step": s, "loss": 2 - s / 50, "tau": 0.99, "lr": 0.1} for s in range(50)]
    rows.append({"step": 50, "knn_top1": 40.0})
    (run / "metrics.json").write_text("".join(map("{}\n".format, map(json.dumps, (
        {"iteration": 0, "total_loss": 2.0}, {"iteration": 50, "total_loss": 1.0, "bbox/AP": 3.0})))))
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    full = Image.open(pictures.plot_curves(tmp_path, {"run": run}, tmp_path / "full.png"))
    small = Image.open(pictures.plot_curves(None, {"run": run}, tmp_path / "small.png"))
    assert full.size == (1890, 900) and small.size == (1260, 450)  # six panels; loss and AP
    assert np.asarray(full).std() > 10 and np.asarray(small).std() > 10
    assert pictures.plot_curves(None, {}, tmp_path / "none.png") is None and not (tmp_path / "none.png").exists()


def test_masks_from_polygons_and_both_rle_forms():
    square = np.zeros((20, 30), bool)
    square[5:10, 10:20] = True
    packed = rle.encode(np.asfortranarray(square.astype(np.uint8)))
    flat = square.flatten(order="F").astype(int)
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    for segmentation in (packed, {"size": [20, 30], "counts": counts}, [[10, 5, 20, 5, 20, 10, 10, 10]]):
        assert (rle.decode(to_rle(segmentation, 20, 30)) == square).all()


def test_detections_show_masks_and_fall_back_to_the_best(tmp_path):
    annotations, images, truth = make_dataset(tmp_path)
    found = [{**a, "score": 0.9} for a in truth]
    weak = [{**truth[0], "score": 0.1 + 0.01 * i} for i in range(5)]
    runs = {name: make_run(tmp_path / name, aps(1.0), detections=d)
            for name, d in (("found", found), ("weak", weak), ("empty", []))}

    def draw(**chosen):
        return np.asarray(Image.open(
            pictures.draw_detections(annotations, images, chosen, tmp_path / "d.png")).convert("RGB")).astype(int)

    two, empty = draw(run=runs["found"]), draw(run=runs["empty"])
    assert two.shape[1] == 900 and two.shape == empty.shape
    # a quarter and three quarters down: the ellipses' middles, in the columns "ground truth" and the run's
    for y in (int(0.3 * two.shape[0]), int(0.77 * two.shape[0])):
        assert abs(two[y, 225] - 128).sum() > 30 and abs(two[y, 675] - two[y, 225]).sum() < 5
        assert abs(empty[y, 675] - 128).sum() == 0
    assert (draw(run=runs["weak"]) != empty).any()
    assert (draw(run=runs["found"]) == two).all()

    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.open(images / "2.png").transpose(Image.Transpose.ROTATE_90).save(images / "2.png", exif=exif)
    assert (draw(run=runs["found"]) == two).all()
    (images / "2.png").unlink()
    with pytest.raises(InputError, match="2.png"):
        draw(run=runs["found"])
    with pytest.raises(InputError, match="coco_instances_results.json"):
        draw(run=tmp_path)


def test_page_is_self_contained(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "p.png")
    report.write_report(tmp_path / "page", "A <title>", [
        ("Words", "a < b"), ("Table", [["", "AP"], ["rsa & co", "41.1"]]), ("Picture", tmp_path / "p.png")])
    page = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert "A &lt;title&gt;" in page and "a &lt; b" in page and "<td>rsa &amp; co<td>41.1" in page
    assert 'src="data:image/png;base64,' in page and "p.png" not in page
    text = (tmp_path / "page" / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# A <title>\n\n## Words\n\na < b\n") and "| rsa & co | 41.1 |" in text
    assert "![Picture](../p.png)" in text


def test_tool_writes_table_page_and_pictures(tmp_path):
    annotations, images, truth = make_dataset(tmp_path)
    name = dataset_name(annotations, images)
    found = [{**a, "score": 0.9} for a in truth]
    make_run(tmp_path / "rsa", aps(40.0, 36.0), name, found, {"method": "rsa", "step": 9})
    make_run(tmp_path / "scratch", aps(30.0, 27.0), name, [])
    done = run_tool("rsa", "scratch", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "| rsa (rsa, step 9) | 40.0 " in done.stdout and "published" not in done.stdout
    output = tmp_path / "output" / "report"
    assert {p.name for p in output.iterdir()} == {
        "report.md", "report.html", "table.csv", "ap.png", "curves.png", "detections.png"}
    assert done.stdout.split("\n\n")[0] in (output / "report.md").read_text(encoding="utf-8")


def test_tool_needs_only_results_and_averages_runs_of_one_name(tmp_path):
    for seed, box in enumerate((40.0, 42.0)):
        make_run(tmp_path / f"seed{seed}" / "rsa", aps(box))
    done = run_tool("seed0/rsa", "seed1/rsa", "--output", "out", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr.startswith("no picture of detections: ") and done.stderr.count("\n") == 1
    assert "| rsa (random) " in done.stdout and "41.0 ± 1.4" in done.stdout
    assert not (tmp_path / "out" / "detections.png").exists()


def test_tool_reports_a_missing_run_in_one_line(tmp_path):
    done = run_tool("nowhere", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: nowhere/results.json ") and done.stderr.count("\n") == 1


def full_run(folder, box, mask, weights, schedule="1x", protocol="infomin", **changes):
    """results.json of a row of Table 5 or 6, as Detectron2 on another machine would have left it."""
    method = (weights or {"method": "random"})["method"]
    config = {"rsa": "", "the authors' RSA or BYOL": "", "random": "_random", "supervised": "_supervised"}.get(method, "_ssl")
    config = "_msra" if (weights or {}).get("stride_in_1x1") else config
    cfg = torchvision_defaults()
    cfg.merge_from_file(str(ROOT / "configs" / "transfer" / f"mask_rcnn_R50_FPN_{schedule}{config}.yaml"))
    if protocol == "moco":
        cfg.merge_from_file(str(ROOT / "configs" / "transfer" / "protocol_moco.yaml"))
    cfg.OUTPUT_DIR = str(folder)
    cfg.merge_from_list([item for pair in changes.pop("keys", {}).items() for item in pair])
    cfg.SOLVER.update(changes.get("more", {}))  # for which the embedded engine has no key
    iterations = changes.get("iterations", cfg.SOLVER.MAX_ITER)
    results.write_results(cfg, changes.get("engine", "detectron2"), aps(box, mask), weights, iterations, 12.5,
                         changes.get("eval_only", False), 8, 1)
    return folder


RSA = {"method": "rsa", "step": 125_000}  # 200 epochs of 625 steps


@pytest.mark.parametrize("weights, name, schedule, row", [
    (None, "x", "1x", ("1x", "random")), (RSA, "x", "2x", ("2x", "rsa")), (RSA, "x", "1x", ("1x", "rsa")),
    ({"method": "rsa", "step": 144}, "x", "1x", None),  # of a shorter pre-training
    ({"method": "rsa", "step": 125_000, "branch": "target"}, "x", "1x", None),
    ({"method": "the authors' RSA or BYOL"}, "rsa", "1x", ("1x", "rsa")),  # by the folder's name alone
    ({"method": "the authors' RSA or BYOL"}, "x", "1x", None), ({"method": "SimSiam"}, "infomin", "1x", None),
    ({"method": "InstDis, PIRL, InfoMin (PyContrast)"}, "infomin", "1x", ("1x", "infomin")),
    ({"method": "supervised", "stride_in_1x1": True}, "x", "1x", ("1x", "msra")),
    ({"method": "supervised", "stride_in_1x1": False}, "x", "1x", None),  # nobody published that row
    ({"method": "MoCo v1, v2"}, "moco_v2", "2x", ("2x", "mocov2")), ({"method": "MoCo v1, v2"}, "moco_v2", "1x", None),
    ({"method": "unknown", "format": "MoCo v1, v2"}, "moco_v2", "2x", ("2x", "mocov2")),
    ({"method": "MoCo v1, v2"}, "rsa", "1x", None), ({"method": "byol"}, "x", "1x", None)])
def test_which_published_row_a_run_is(tmp_path, weights, name, schedule, row):
    run = full_run(tmp_path / name, 40.0, 36.0, weights, schedule)
    assert report.table_row(results.load_results(run)) == row


@pytest.mark.parametrize("changes", [
    {"keys": {"SOLVER.MAX_ITER": 3000}}, {"keys": {"DATASETS.TEST": ("a.json::b",)}}, {"engine": "torchvision"},
    {"keys": {"SOLVER.IMS_PER_BATCH": 8}}, {"keys": {"DATASETS.TRAIN": ("a.json::b",)}}, {"protocol": "moco"},
    {"iterations": 5000}, {"eval_only": True}, {"keys": {"SOLVER.BASE_LR": 0.03}},
    {"keys": {"MODEL.BACKBONE.FREEZE_AT": 2}}, {"keys": {"TEST.PRECISE_BN.ENABLED": False}},
    {"keys": {"INPUT.MIN_SIZE_TRAIN": (320,)}}, {"keys": {"SOLVER.STEPS": (1000,)}}, {"keys": {"INPUT.FORMAT": "BGR"}},
    {"keys": {"SOLVER.WEIGHT_DECAY": 0.5}}, {"keys": {"MODEL.ROI_MASK_HEAD.NUM_CONV": 1}},
    {"more": {"NESTEROV": True}}, {"more": {"CLIP_GRADIENTS": CN({"ENABLED": True})}}])
def test_only_full_runs_stand_beside_published_numbers(tmp_path, changes):
    assert report.table_row(results.load_results(full_run(tmp_path, 40.0, 36.0, None, **changes))) is None


def test_what_a_published_row_leaves_open(tmp_path):
    keys = {"SOLVER.AMP.ENABLED": True, "SEED": 3, "DATALOADER.NUM_WORKERS": 9, "MODEL.DEVICE": "cuda:1"}
    assert report.table_row(results.load_results(full_run(tmp_path, 40.0, 36.0, None, keys=keys))) == ("1x", "random")


def test_differences_and_their_mark(tmp_path):
    runs = {"a": [results.load_results(full_run(tmp_path / str(box), box, 37.3, RSA)) for box in (40.7, 40.9)],
            "b": [results.load_results(full_run(tmp_path / "b", 40.7, 37.7, RSA))],
            "c": [results.load_results(full_run(tmp_path / "c", None, 37.0, RSA))]}
    cells = report.table_cells(report.ap_table(runs, published=True))
    assert cells[1][:2] == ["a", "40.8 ± 0.1"]
    assert cells[2] == ["published 1x (paper)", "41.1", "–", "–", "37.3", "–", "–"]
    assert cells[3] == ["difference", "-0.3", "–", "–", "+0.0", "–", "–"]  # 0.3 does not exceed 0.3
    assert cells[6] == ["difference", "-0.4 *", "–", "–", "+0.4 *", "–", "–"]
    assert cells[9] == ["difference", "–", "–", "–", "-0.3", "–", "–"]


def test_tool_compares_with_what_is_published(tmp_path):
    full_run(tmp_path / "s0" / "random", 32.0, 29.9, None)
    full_run(tmp_path / "s1" / "random", 32.4, 29.9, None)
    done = run_tool("s0/random", "s1/random", "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "32.2 ± 0.3" in done.stdout and "published 1x (InfoMin's authors)" in done.stdout and "-0.6 *" in done.stdout
    assert "* differs from the published number by more than 0.3 AP" in done.stdout
    with open(tmp_path / "out" / "table.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["random (random)", "published 1x (InfoMin's authors)", "difference"]
    assert [row["of"] for row in rows] == ["", "random (random)", "random (random)"]
    assert [row["beyond seed noise"] for row in rows] == ["", "", "box AP"]
    assert float(rows[2]["box AP"]) == pytest.approx(-0.6)
    picture = np.asarray(Image.open(tmp_path / "out" / "ap.png").convert("RGB")).reshape(-1, 3).tolist()
    assert [0x00, 0x72, 0xB2] in picture and [0xD5, 0x5E, 0x00] in picture  # a dot and a diamond


def test_only_runs_that_differ_in_the_seed_alone_are_averaged(tmp_path):
    rsa = {"method": "rsa", "step": 9}
    folders = {"one": full_run(tmp_path / "s0" / "rsa", 40.0, 36.0, rsa, keys={"SEED": 0}),
               "two": full_run(tmp_path / "s1" / "rsa", 40.0, 36.0, rsa, keys={"SEED": 1}),
               "longer": full_run(tmp_path / "2x" / "rsa", 40.0, 36.0, rsa, "2x")}

    def labels(*names):
        return report.row_labels({folders[name]: results.load_results(folders[name]) for name in names})

    assert set(labels("one", "two").values()) == {"rsa (rsa, step 9)"}
    kept = results.load_results(folders["one"])
    # a seed in common; another network; a part of the training; no training of that config
    for change in ({}, {"seed": 1, "weights": {**rsa, "branch": "target"}}, {"seed": 1, "iterations": 5000},
                   {"seed": 1, "eval_only": True}):
        folders["other"] = tmp_path / "other" / "rsa"
        folders["other"].mkdir(parents=True, exist_ok=True)
        (folders["other"] / "results.json").write_text(json.dumps(kept | change))
        assert len(set(labels("one", "other").values())) == 2
    (folders["other"] / "results.json").write_text(json.dumps(kept | {"seed": 1, "engine": "torchvision"}))
    assert set(labels("one", "other").values()) == {"rsa (rsa, step 9, detectron2)", "rsa (rsa, step 9, torchvision)"}
    (folders["other"] / "results.json").write_text(json.dumps(kept | {"seed": 1, "accumulate": 4}))  # BatchNorm sees 4
    assert len(set(labels("one", "other").values())) == 2
    assert labels("one", "longer") == {folders[name]: f"{folders[name]} (rsa, step 9)" for name in ("one", "longer")}


def test_test_sets_are_never_mixed(tmp_path):
    full_run(tmp_path / "a", 40.0, 36.0, None)
    full_run(tmp_path / "b", 40.0, 36.0, None, keys={"DATASETS.TEST": ("/x/val.json::/x/images",)})
    full_run(tmp_path / "c", 40.0, 36.0, None, keys={"DATASETS.TEST": ("/y/val.json::/y/images",)})
    done = run_tool("a", "b", cwd=tmp_path)
    assert done.returncode == 2 and "different test sets" in done.stderr and "b is val.json" in done.stderr
    assert run_tool("b", "c", cwd=tmp_path).returncode == 0


def test_protocols_are_never_mixed(tmp_path):
    full_run(tmp_path / "a", 40.0, 36.0, None)
    full_run(tmp_path / "b", 40.0, 36.0, None, protocol="moco")
    done = run_tool("a", "b", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert re.search("different protocols.*a is infomin, b is moco", done.stderr) and done.stderr.count("\n") == 1
    assert run_tool("b", cwd=tmp_path).returncode == 0
