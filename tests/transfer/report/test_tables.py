import csv
import functools
import json
import re

import numpy as np
import pytest
from fvcore.common.config import CfgNode as CN
from PIL import Image, ImageDraw
from pycocotools import mask as rle

import rsa_detectron2.pretrain.config
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.record import Origin, describe, flatten
from rsa_detectron2.common.tables import to_markdown
from rsa_detectron2.transfer.config import torchvision_defaults
from rsa_detectron2.transfer.data.annotations import dataset_name
from rsa_detectron2.transfer.data.average_precision import AP_KEYS
from rsa_detectron2.transfer.data.masks import to_rle
from rsa_detectron2.transfer.report import detection_pictures, paper, pictures
from rsa_detectron2.transfer.report import runs as results
from rsa_detectron2.transfer.report.runs import Outcome, Setup
from rsa_detectron2.transfer.report.tables import make_rows, own_row, table_cells, weights_label, write_csv
from tests.conftest import ROOT


def aps(box, mask=None):
    return {"bbox": dict.fromkeys(AP_KEYS, box), "segm": dict.fromkeys(AP_KEYS, mask)}


def make_dataset(folder):
    """The annotation file, the image folder and the annotations of two gray 160 x 120 images with an ellipse
    each."""
    images, annotations = [], []
    (folder / "images").mkdir(parents=True)
    for i in (1, 2):
        Image.new("RGB", (160, 120), (128, 128, 128)).save(folder / "images" / f"{i}.png")
        ellipse = Image.new("L", (160, 120))
        ImageDraw.Draw(ellipse).ellipse((40, 30, 120, 90), fill=1)
        encoded = rle.encode(np.asfortranarray(np.array(ellipse)))
        images.append({"id": i, "file_name": f"{i}.png", "width": 160, "height": 120})
        annotations.append(
            {
                "id": i,
                "image_id": i,
                "category_id": 7,
                "bbox": [40, 30, 80, 60],
                "area": 3770,
                "iscrowd": 0,
                "segmentation": {**encoded, "counts": encoded["counts"].decode()},
            }
        )
    (folder / "ann.json").write_text(
        json.dumps(
            {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "ellipse"}]}
        )
    )
    return folder / "ann.json", folder / "images", annotations


def make_run(folder, ap, dataset="coco_2017_val", detections=None, weights=None):
    cfg = torchvision_defaults()
    cfg.OUTPUT_DIR = str(folder)
    cfg.DATASETS.TEST = (dataset,)
    results.write_results(cfg, Setup("torchvision", weights), Outcome(ap, 700, 12.5))
    (folder / "metrics.json").write_text(
        "".join(json.dumps({"iteration": i, "total_loss": 2 - i / 100}) + "\n" for i in range(0, 100, 20))
        + json.dumps({"iteration": 100, "bbox/AP": 33.0})
        + "\n"
    )
    if detections is not None:
        (folder / "inference").mkdir()
        (folder / "inference" / "coco_instances_results.json").write_text(json.dumps(detections))
    return folder


@pytest.fixture
def run_tool(tool):
    return functools.partial(tool, "report")


def test_weights_label():
    assert weights_label({"weights": {"method": "rsa", "step": 500}}) == "rsa, step 500"
    assert weights_label({"weights": None}) == "random"
    assert weights_label({"weights": {"method": "moco", "step": -1}}) == "moco"
    assert weights_label({"weights": {"method": "unknown", "format": "SimSiam", "step": -1}}) == "SimSiam"


def test_table_mean_std_and_missing_cells(tmp_path):
    boxes = [40.2, 41.1, 39.5]
    runs = {
        "rsa": [{"ap": aps(x, x - 4)} for x in boxes],
        "one": [{"ap": aps(30.04)}],
        "gap": [{"ap": aps(1.0)}, {"ap": aps(None)}],
    }
    rows = [own_row("ap", name, dict(enumerate(seeds))) for name, seeds in runs.items()]
    mean, std = rows[0].figures["box AP75"]
    np.testing.assert_allclose((mean, std), (np.mean(boxes), np.std(boxes, ddof=1)))
    cells = table_cells("ap", rows)
    assert cells[0] == ["", "seeds", "box AP", "box AP50", "box AP75", "mask AP", "mask AP50", "mask AP75"]
    assert cells[1] == ["rsa", "3"] + ["40.3 ± 0.8"] * 3 + ["36.3 ± 0.8"] * 3
    rest = [line for line in cells[2:] if line[0] in runs]
    assert rest == [["one", "1"] + ["30.0"] * 3 + ["–"] * 3, ["gap", "2"] + ["–"] * 6]

    lines = to_markdown([*cells, ["a|b"] + ["1"] * 7]).splitlines()
    assert len({len(line) for line in lines}) == 1 and "a\\|b" in lines[-1]

    write_csv("ap", rows, tmp_path / "table.csv")
    parsed = read_csv(tmp_path / "table.csv")
    assert len(parsed[0]) == 5 + 5 * 12
    assert float(parsed[0]["box APs"]) == pytest.approx(np.mean(boxes)) and parsed[0]["seeds"] == "3"
    assert float(parsed[0]["mask AP std"]) == pytest.approx(np.std(boxes, ddof=1))
    assert parsed[1]["box AP std"] == "" and parsed[2]["box AP"] == ""


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_series_survive_a_crash_and_a_resume(tmp_path):
    rows = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.5},
        {"step": 2, "knn_top1": 40.0},
        {"step": 2, "loss": 2.0},
    ]
    (tmp_path / "m").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 3, "lo')
    assert pictures.read_series(tmp_path / "m", "step", ["loss", "knn_top1", "beta"]) == {
        "loss": ((1, 2), (3.0, 2.0)),
        "knn_top1": ((2,), (40.0,)),
    }
    assert pictures.read_series(tmp_path / "absent", "step", ["loss"]) == {}


def test_curves_hold_only_panels_with_data(tmp_path):
    run = make_run(tmp_path / "run", aps(30.0))
    # BYOL: no beta; one evaluation
    rows = [{"step": s, "loss": 2 - s / 50, "tau": 0.99, "lr": 0.1} for s in range(50)]
    rows.append({"step": 50, "knn_top1": 40.0})
    (run / "metrics.json").write_text(
        "".join(
            map(
                "{}\n".format,
                map(
                    json.dumps,
                    (
                        {"iteration": 0, "total_loss": 2.0},
                        {"iteration": 50, "total_loss": 1.0, "bbox/AP": 3.0},
                    ),
                ),
            )
        )
    )
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    full = Image.open(pictures.plot_curves(tmp_path, {"run": run}, tmp_path / "full.png"))
    small = Image.open(pictures.plot_curves(None, {"run": run}, tmp_path / "small.png"))
    # loss, kNN and narrow schedules above, loss and AP below; then these two alone
    assert full.size == (1732, 900) and small.size == (1260, 450)
    assert np.asarray(full).std() > 10 and np.asarray(small).std() > 10
    assert (
        pictures.plot_curves(None, {}, tmp_path / "none.png") is None and not (tmp_path / "none.png").exists()
    )


def test_masks_from_polygons_and_both_rle_forms():
    square = np.zeros((20, 30), bool)
    square[5:10, 10:20] = True
    packed = rle.encode(np.asfortranarray(square.astype(np.uint8)))
    flat = square.flatten(order="F").astype(int)
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    for segmentation in (packed, {"size": [20, 30], "counts": counts}, [[10, 5, 20, 5, 20, 10, 10, 10]]):
        assert (rle.decode(to_rle(segmentation, 20, 30)) == square).all()


def test_a_curve_alone_is_named_on_its_axis(tmp_path):
    """It has no legend. With others on its axis it has one."""
    for more, label in (({}, "kNN top-1 (%)"), ({"consistency": 20.0}, "%")):
        rows = [{"step": step, "knn_top1": 10.0, **more} for step in (0, 5)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        [panel] = pictures.pretraining_panels(tmp_path)
        assert panel[0] == "Evaluation" and panel[2][0] == label


def test_detections_show_masks_and_fall_back_to_the_best(tmp_path):
    annotations, images, truth = make_dataset(tmp_path)
    found = [{**a, "score": 0.9} for a in truth]
    weak = [{**truth[0], "score": 0.1 + 0.01 * i} for i in range(5)]
    runs = {
        name: make_run(tmp_path / name, aps(1.0), detections=d)
        for name, d in (("found", found), ("weak", weak), ("empty", []))
    }

    def draw(**chosen):
        path = detection_pictures.draw_detections(annotations, images, chosen, tmp_path / "d.png")
        return np.asarray(Image.open(path).convert("RGB")).astype(int)

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


def test_tool_writes_table_page_and_pictures(run_tool, tmp_path):
    annotations, images, truth = make_dataset(tmp_path)
    name = dataset_name(annotations, images)
    found = [{**a, "score": 0.9} for a in truth]
    make_run(tmp_path / "rsa", aps(40.0, 36.0), name, found, {"method": "rsa", "step": 9})
    make_run(tmp_path / "scratch", aps(30.0, 27.0), name, [])
    done = run_tool("rsa", "scratch", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"\| rsa \(rsa, step 9\) +\| 1 +\| 40.0 ", done.stdout) and "paper" not in done.stdout
    output = tmp_path / "output" / "report"
    assert {p.name for p in output.iterdir()} == {
        "report.md",
        "report.html",
        "table.csv",
        "ap.png",
        "curves.png",
        "detections.png",
    }
    assert done.stdout.split("\n\n")[0] in (output / "report.md").read_text(encoding="utf-8")


def test_tool_needs_only_results_and_averages_runs_of_one_name(run_tool, tmp_path):
    for seed, box in enumerate((40.0, 42.0)):
        make_run(tmp_path / f"seed{seed}" / "rsa", aps(box))  # with seed -1, which means a new seed each time
    done = run_tool("seed0/rsa", "seed1/rsa", "--output", "out", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr.startswith("no picture of detections: ") and done.stderr.count("\n") == 1
    assert "| rsa (random) " in done.stdout and "41.0 ± 1.4" in done.stdout
    assert not (tmp_path / "out" / "detections.png").exists()


def test_tool_reports_a_missing_run_in_one_line(run_tool, tmp_path):
    done = run_tool("nowhere", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: nowhere/results.json ") and done.stderr.count("\n") == 1


def full_run(folder, box, mask, weights, row="random", table="table5", protocol="infomin", **changes):
    """results.json of a row of Table 5 or 6, as Detectron2 on another machine would have written it."""
    [cell] = [cell for cell in paper.cells(table) if cell.row == row]
    defaults = torchvision_defaults()
    defaults.SOLVER.update({"NESTEROV": False, "CLIP_GRADIENTS": CN({"ENABLED": False})})  # Detectron2's own
    cfg = defaults.clone()
    cfg.merge_from_file(str(ROOT / "configs" / cell.training.recipe))
    if protocol == "moco":
        cfg.merge_from_file(str(ROOT / "configs" / "transfer" / "protocol_moco.yaml"))
    cfg.OUTPUT_DIR, cfg.SEED = str(folder), 0
    cfg.merge_from_list([item for pair in changes.get("keys", {}).items() for item in pair])
    origin = Origin(cell.training.recipe, (), flatten(defaults))
    engine, processes = changes.get("engine", "detectron2"), changes.get("processes", 8)
    iterations = changes.get("iterations", cfg.SOLVER.MAX_ITER)
    results.write_results(
        cfg,
        Setup(engine, weights, processes, origin=origin),
        Outcome(aps(box, mask), iterations, 12.5, changes.get("eval_only", False)),
    )
    return folder


def rows_of(*folders, tables=None):
    return make_rows("ap", {str(folder): results.load_results(folder) for folder in folders}, tables)


def pretrained(**changes):
    """Provenance of RSA's weights from a run of the paper's row, with ``changes`` of its settings."""
    training = next(cell.training for cell in paper.cells("table4") if cell.row == "rsa_200")
    cfg = rsa_detectron2.pretrain.config.get_cfg()
    cfg.merge_from_file(str(ROOT / "configs" / training.recipe))
    cfg.merge_from_list([item for pair in changes.items() for item in pair])
    run = describe(
        "pretrain",
        cfg,
        Origin(training.recipe, (), flatten(rsa_detectron2.pretrain.config.get_cfg())),
        step=9,
        steps=9,
        bn_batch_size=2048,
        method="rsa",
        seed=0,
        data={"images": 1281167, "classes": 1000},
    )
    return {"method": "rsa", "step": 9, "branch": "online", "run": json.dumps(run)}


SUPERVISED = {"source": "detectron2://ImageNetPretrained/MSRA/R-50.pkl", "method": "supervised"}


@pytest.mark.parametrize(
    "row, weights",
    [
        ("random", None),
        ("supervised", SUPERVISED),
        ("rsa", pretrained()),
        ("infomin", {"method": "InfoMin"}),
        ("instdis", {"method": "InstDis"}),
        ("pirl", {"method": "PIRL"}),
        ("moco", {"method": "MoCo v1"}),
        ("moco_v2", {"method": "MoCo v2"}),
        ("rsa", {"method": "RSA", "format": paper.AUTHORS}),
    ],
)
@pytest.mark.parametrize("table", ["table5", "table6"])
def test_a_run_that_is_its_row(tmp_path, row, weights, table):
    """The name of its folder does not matter."""
    [found] = rows_of(full_run(tmp_path / "x", 40.0, 36.0, weights, row, table))
    [cell] = [cell for cell in paper.cells(table) if cell.row == row]
    assert (found.table, found.place, found.words) == (table, (row, ""), [])
    assert found.difference("box AP75") == pytest.approx(40 - cell.published[2][0])


@pytest.mark.parametrize(
    "row, weights, changes, words",
    [
        ("random", None, {"keys": {"SOLVER.MAX_ITER": 3000}}, "3000 iterations instead of 90000"),
        (
            "random",
            None,
            {"keys": {"DATASETS.TEST": ("a.json::b",)}},
            "DATASETS.TEST ['a.json'] instead of ['coco_2017_val']",
        ),
        ("random", None, {"engine": "torchvision"}, "engine torchvision instead of detectron2"),
        (
            "random",
            None,
            {"keys": {"SOLVER.IMS_PER_BATCH": 8}, "processes": 8},
            "8 images an iteration instead of 16; BatchNorm over 8 images instead of 16",
        ),
        (
            "random",
            None,
            {"processes": 1, "keys": {"MODEL.RESNETS.NORM": "BN", "SOLVER.IMS_PER_BATCH": 16}},
            "",
        ),
        ("random", None, {"iterations": 5000}, "step 5000 of 90000"),
        ("random", None, {"eval_only": True}, "only evaluated with these settings"),
        ("random", None, {"keys": {"SOLVER.BASE_LR": 0.03}}, "base lr 0.03 instead of 0.02"),
        ("random", None, {"keys": {"INPUT.FORMAT": "RGB"}}, "INPUT.FORMAT RGB instead of BGR"),
        (
            "random",
            None,
            {"keys": {"MODEL.BACKBONE.FREEZE_AT": 2}},
            "MODEL.BACKBONE.FREEZE_AT 2 instead of 0",
        ),
        ("random", None, {"keys": {"SOLVER.NESTEROV": True}}, "SOLVER.NESTEROV True instead of False"),
        (
            "random",
            None,
            {"keys": {"SOLVER.CLIP_GRADIENTS.ENABLED": True}},
            "SOLVER.CLIP_GRADIENTS.ENABLED True instead of False",
        ),
        ("random", None, {"keys": {"SOLVER.AMP.ENABLED": True, "SEED": 3, "DATALOADER.NUM_WORKERS": 9}}, ""),
        (
            "rsa",
            pretrained(**{"SOLVER.EPOCHS": 10, "SOLVER.WARMUP_EPOCHS": 1}),
            {},
            "pre-training: 10 epochs instead of 200; pre-training: SOLVER.WARMUP_EPOCHS 1 instead of 10",
        ),
        ("rsa", pretrained() | {"branch": "target"}, {}, "the target network's weights"),
        ("rsa", {"method": "rsa", "step": 144}, {}, "weights that do not say how they were pre-trained"),
    ],
)
def test_a_run_that_is_not_quite_its_row(tmp_path, row, weights, changes, words):
    [found] = rows_of(full_run(tmp_path, 40.0, 36.0, weights, row, **changes))
    assert (found.table, found.place) == ("table5", (row, "")) and "; ".join(found.words) == words
    cells = table_cells("ap", [found])
    assert cells[2][0] == "  paper" and cells[2][2] == f"{found.published['box AP'][0]}"
    assert cells[3][0] == (f"  {words}" if words else "  difference")


@pytest.mark.parametrize(
    "weights", [{"method": "SimSiam"}, {"method": "byol"}, {"method": "mine", "step": 5}]
)
def test_weights_of_another_method_stand_in_no_published_row(tmp_path, weights):
    full_run(tmp_path / "infomin", 40.0, 36.0, weights, "infomin")
    [found] = rows_of(tmp_path / "infomin")
    assert found.extra and not found.published and weights["method"].lower() in found.title.lower()


def test_all_rows_of_a_table(tmp_path):
    folders = [
        full_run(tmp_path / "a", 32.0, 29.9, None),
        full_run(tmp_path / "b", 41.0, 37.0, {"method": "mine"}, "infomin"),
    ]
    cells = table_cells("ap", rows_of(*folders, tables=["table5"]))
    assert [row[0] for row in cells] == [
        "",
        "random init.",
        "  paper",
        "  difference",
        *(
            f"{name} (paper)"
            for name in ("supervised", "InstDis", "PIRL", "MoCo", "MoCo v2", "InfoMin Aug.", "RSA")
        ),
        "not in the paper:",
        f"{tmp_path / 'b'} (mine)",
    ]
    for cell in paper.cells("table5"):
        if not cell.extra:
            assert [f"{mean}" for mean, _ in cell.published] in [row[2:] for row in cells]


def test_differences_and_their_mark(tmp_path):
    seeds = [
        full_run(tmp_path / str(box), box, 37.3, pretrained(), "rsa", keys={"SEED": seed})
        for seed, box in enumerate((40.7, 40.9))
    ]
    other = full_run(tmp_path / "b", 40.7, 37.7, pretrained(), "rsa")
    gap = full_run(tmp_path / "c", None, 37.0, pretrained(), "rsa")
    cells = table_cells("ap", rows_of(*seeds, other, gap))
    assert cells[1][:3] == ["RSA", "2", "40.8 ± 0.1"]
    assert cells[2][2:] == ["41.1", "61.4", "45.1", "37.3", "58.6", "40.1"]
    assert cells[3][2] == "-0.3" and cells[3][5] == "+0.0"  # 0.3 does not exceed 0.3
    assert cells[6][2] == "-0.4 *" and cells[6][5] == "+0.4 *"
    assert cells[9][2] == "–" and cells[9][5] == "-0.3"


def test_tool_compares_with_what_is_published(run_tool, tmp_path):
    full_run(tmp_path / "s0" / "random", 32.0, 29.9, None)
    full_run(tmp_path / "s1" / "random", 32.4, 29.9, None, keys={"SEED": 1})
    done = run_tool("s0/random", "s1/random", "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "32.2 ± 0.3" in done.stdout and "|   paper " in done.stdout and "-0.6 *" in done.stdout
    assert "* differs from the published number by more than 0.3 AP" in done.stdout
    [row] = read_csv(tmp_path / "out" / "table.csv")
    assert row["row"] == "random init." and row["table"] == "table5" and row["seeds"] == "2"
    assert row["beyond seed noise"].startswith("box AP, ") and float(
        row["box AP difference"]
    ) == pytest.approx(-0.6)
    picture = np.asarray(Image.open(tmp_path / "out" / "ap.png").convert("RGB")).reshape(-1, 3).tolist()
    assert [0x00, 0x72, 0xB2] in picture and [0xD5, 0x5E, 0x00] in picture  # a dot and a diamond


def test_only_runs_that_differ_in_the_seed_alone_are_averaged(tmp_path):
    mine = {"method": "mine", "step": 9}
    kept = results.load_results(full_run(tmp_path / "s0", 40.0, 36.0, mine, "infomin"))

    def together(**change):
        return [len(row.runs) for row in make_rows("ap", {"s0": kept, "s1": kept | change})]

    assert together(seed=1) == [2]
    # a seed in common; another network; a part of the training; no training of that config;
    # BatchNorm sees 4; another lr
    for change in (
        {},
        {"seed": 1, "weights": {**mine, "branch": "target"}},
        {"seed": 1, "iterations": 5000},
        {"seed": 1, "eval_only": True},
        {"seed": 1, "bn_batch_size": 4},
        {"seed": 1, "engine": "torchvision"},
        {"seed": 1, "settings": kept["settings"] | {"SOLVER.BASE_LR": 0.5}},
    ):
        assert together(**change) == [1, 1], change


def test_test_sets_are_never_mixed(run_tool, tmp_path):
    full_run(tmp_path / "a", 40.0, 36.0, None)
    full_run(tmp_path / "b", 40.0, 36.0, None, keys={"DATASETS.TEST": ("/x/val.json::/x/images",)})
    full_run(tmp_path / "c", 40.0, 36.0, None, keys={"DATASETS.TEST": ("/y/val.json::/y/images",)})
    done = run_tool("a", "b", cwd=tmp_path)
    assert done.returncode == 2 and "different test sets" in done.stderr and "b is val.json" in done.stderr
    assert run_tool("b", "c", cwd=tmp_path).returncode == 0


def test_protocols_are_never_mixed(run_tool, tmp_path):
    full_run(tmp_path / "a", 40.0, 36.0, None)
    full_run(tmp_path / "b", 40.0, 36.0, None, protocol="moco")
    done = run_tool("a", "b", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        re.search("different protocols.*a is infomin, b is moco", done.stderr)
        and done.stderr.count("\n") == 1
    )
    assert run_tool("b", cwd=tmp_path).returncode == 0
