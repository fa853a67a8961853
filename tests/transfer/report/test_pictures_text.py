"""Users' texts in pictures are drawn as written, in a font that has their characters; what is missing is
reported once."""

import json
import warnings

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from rsa_detectron2.common import fonts
from rsa_detectron2.transfer.data.dataset import Dataset
from rsa_detectron2.transfer.report import detection_pictures, pictures
from rsa_detectron2.transfer.report.tables import COLUMNS, Row
from tests.conftest import write_json

PRICE, CAR = "$_{$ 5", "汽车"  # an error if it were a formula


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The list of system fonts that matplotlib sees, which is empty at first."""
    paths = []
    monkeypatch.setattr(fonts.font_manager, "findSystemFonts", lambda: paths)
    for cached in (fonts.fonts_for, fonts.tell_once):
        cached.cache_clear()
    yield paths
    for cached in (fonts.fonts_for, fonts.tell_once):
        cached.cache_clear()


def make_font(path, name, characters):
    """A font whose every character is a full square."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 1000), (1000, 1000), (1000, 0)):
        pen.lineTo(point)
    pen.closePath()
    glyphs = [".notdef", *(f"c{ord(c)}" for c in characters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(glyphs)
    builder.setupCharacterMap({ord(c): f"c{ord(c)}" for c in characters})
    builder.setupGlyf(dict.fromkeys(glyphs, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": name, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return str(path)


def make_run(folder, names):
    """The folder and the annotation file of a run with one object and one detection in one image."""
    Image.new("RGB", (40, 30), (90, 90, 90)).save(folder / "1.png")
    box = {"image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 15]}
    coco = {
        "images": [{"id": 1, "file_name": "1.png", "width": 40, "height": 30}],
        "annotations": [{**box, "id": 1, "area": 300, "iscrowd": 0, "segmentation": [[5, 5, 25, 5, 25, 20]]}],
        "categories": [{"id": n, "name": name} for n, name in enumerate(names, start=1)],
    }
    path = write_json(coco, folder)
    (folder / "inference").mkdir()
    write_json([{**box, "score": 0.9}], folder / "inference", "coco_instances_results.json")
    (folder / "metrics.json").write_text(
        "".join(
            json.dumps({"iteration": i, "total_loss": 2.0 - i, "bbox/AP": 10.0 * i}) + "\n" for i in range(2)
        )
    )
    return folder, path


def draw_all(folder, path, name):
    """Draw curves, APs and detections of runs with this name into ``folder``."""
    rows = [Row(name, runs=[folder], figures=dict.fromkeys(COLUMNS["ap"], (30.0, None)))]
    runs = {name: folder, f"other {name}": folder}
    return [
        pictures.plot_curves(None, runs, folder / "c.png"),
        pictures.plot_ap(rows, folder / "a.png"),
        detection_pictures.draw_detections(path, folder, runs, folder / "d.png"),
    ]


def test_dollars_begin_no_formula(tmp_path, installed):
    folder, path = make_run(tmp_path, [PRICE])
    for picture in draw_all(folder, path, PRICE):
        assert np.asarray(Image.open(picture)).std() > 5


def test_what_no_font_has_is_told_once(tmp_path, installed, capsys):
    folder, path = make_run(tmp_path, [CAR])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        draw_all(folder, path, "run")
        draw_all(folder, path, "run")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no installed font has 汽车: pictures show boxes instead" in said
    assert "install fonts-noto-cjk" in said


def test_an_installed_font_is_taken(tmp_path, installed, capsys):
    """This holds for a font that was installed after matplotlib's first start, and for several fonts if none
    has all characters."""
    folder, path = make_run(tmp_path, [CAR])
    draw_all(folder, path, "run")
    boxes = np.asarray(Image.open(folder / "d.png"))
    for cached in (fonts.fonts_for, fonts.tell_once):
        cached.cache_clear()
    (tmp_path / "broken.ttf").write_text("no font")
    installed += [
        str(tmp_path / "broken.ttf"),
        make_font(tmp_path / "a.ttf", "Square A", CAR[0]),
        make_font(tmp_path / "b.ttf", "Square B", CAR[1]),
        make_font(tmp_path / "c.ttf", "Square C", "字"),
    ]
    capsys.readouterr()
    draw_all(folder, path, "run")
    assert capsys.readouterr().err == ""
    assert fonts.fonts_for(frozenset(CAR)) == (["Square A", "Square B"], "")
    assert not np.array_equal(boxes, np.asarray(Image.open(folder / "d.png")))


def test_a_run_whose_name_begins_with_an_underscore_is_in_the_legend(tmp_path, installed, monkeypatch):
    folder, _ = make_run(tmp_path, ["a"])
    legends = []
    legend = pictures.Figure().subplots().__class__.legend
    monkeypatch.setattr(
        "matplotlib.axes.Axes.legend", lambda ax, *a, **k: legends.append(legend(ax, *a, **k))
    )
    pictures.plot_curves(None, {"_first": folder, "second": folder}, folder / "c.png")
    assert all(
        [text.get_text().strip() for text in found.get_texts()] == ["_first", "second"] for found in legends
    )
    assert legends


def test_classes_are_those_that_the_run_was_trained_with(tmp_path, installed, monkeypatch):
    """A run's detections have the ids of its own inference/annotations.json, not those of the file."""
    folder, path = make_run(tmp_path, ["cat"])
    coco = json.loads(path.read_text())
    sound = Dataset(
        "",
        "",
        coco["images"],
        [{**coco["annotations"][0], "category_id": 7}],
        [{"id": 1, "name": "dog"}, {"id": 7, "name": "cat"}],
    )
    sound.save(folder / "inference" / "annotations.json")
    detection = {"image_id": 1, "category_id": 7, "bbox": [5, 5, 20, 15], "score": 0.75}
    write_json([detection], folder / "inference", "coco_instances_results.json")
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.text", lambda ax, x, y, text, **options: drawn.append(text))
    detection_pictures.draw_detections(path, folder, {"run": folder}, folder / "d.png")
    assert drawn == ["cat", "cat 0.75"]


def test_detections_on_images_without_annotations_are_drawn(tmp_path, installed, monkeypatch):
    folder, path = make_run(tmp_path, ["cat"])
    coco = json.loads(path.read_text())
    del coco["annotations"]
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.text", lambda ax, x, y, text, **options: drawn.append(text))
    detection_pictures.draw_detections(write_json(coco, folder), folder, {"run": folder}, folder / "d.png")
    assert drawn == ["cat 0.90"]
