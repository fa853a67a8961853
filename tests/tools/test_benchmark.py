"""tools/benchmark.py measures what it says it measures. No test depends on how long anything takes."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.config import get_cfg
from rsa_detectron2.pretrain.engine.step import normalized_views, train_step
from rsa_detectron2.pretrain.method.augment import aggressive
from rsa_detectron2.tools import benchmark
from rsa_detectron2.tools.benchmarks import data, pil, step_timer
from rsa_detectron2.tools.benchmarks.augment import one_by_one, synthetic_views
from rsa_detectron2.tools.benchmarks.photographs import write_photographs
from rsa_detectron2.tools.benchmarks.step_timer import PARTS, StepTimer, synthetic_batches
from rsa_detectron2.tools.benchmarks.timing import take_turns
from rsa_detectron2.tools.benchmarks.traffic import measure_traffic


@pytest.fixture
def bench(monkeypatch, capsys):
    """``bench("data", ...)`` returns the rows of its JSON lines; the table has as many."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, arguments)])
        threads = torch.get_num_threads()
        benchmark.main()
        torch.set_num_threads(threads)
        out = capsys.readouterr().out
        rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        table = out.split("\n\n")[-2].splitlines()
        assert len(table) == 2 + len(rows) and rows[0]["benchmark"] == arguments[0] and rows[0]["torch"]
        return rows

    return call


FLAT = [torch.zeros(3, 32, 32, dtype=torch.uint8)] * 2
TINY = "--backbone test_resnet --size 32 --batch-size 4 --repeats 2".split()


def test_turns_are_interleaved_and_their_medians_summed_up():
    now, calls = 0.0, []

    def work(name, seconds):
        def of_part(part):
            nonlocal now
            calls.append(name + part)
            now += seconds[len([call for call in calls if call[0] == name]) - 1]

        return of_part

    a = [99, 1, 99, 30, 99, 10, 99, 2, 99, 5, 99, 5]
    seconds = take_turns({"a": work("a", a), "b": work("b", [99, 1] * 6)}, ["1", "2"], 3, lambda: now)
    # 5 of 1, 10, 5 and 5 of 30, 2, 5; the call before each is not counted
    assert seconds == {"a": 10, "b": 2}
    turns = [tuple(calls[i : i + 4]) for i in range(0, len(calls), 4)]
    assert [sorted(turn) for turn in turns] == [[f"a{part}"] * 2 + [f"b{part}"] * 2 for part in (1, 2)] * 3
    assert all(turn[0] == turn[1] for turn in turns) and len({turn[0][0] for turn in turns}) == 2


def test_data(bench, image_folder):
    rows = {
        row["variant"]: row
        for row in bench("data", "--data", image_folder, "--images", 10, "--size", 32, "--repeats", 1)
    }
    assert list(rows) == [
        "RSA in PIL, four float views",
        "BYOL in PIL, two float views",
        "this project",
        "this project, REDUCED_DECODE False",
        "decoding alone",
    ]
    rates = {name: row["images/s per core"] for name, row in rows.items()}
    for name, row in rows.items():
        assert row["x decoding"] == pytest.approx(rates[name] / rates["decoding alone"])
        assert row["x RSA in PIL"] == pytest.approx(rates[name] / rates["RSA in PIL, four float views"])


def test_data_with_prepared_images(bench, image_folder, tmp_path):
    rows = bench(
        "data",
        "--data",
        image_folder,
        "--prepared",
        image_folder,
        "--images",
        2,
        "--size",
        32,
        "--repeats",
        1,
    )
    assert rows[-1]["variant"] == "this project, prepared images" and rows[-1]["images/s per core"] > 0
    shutil.copytree(next(image_folder.iterdir()), tmp_path / "class")
    with pytest.raises(InputError, match="--prepared .* has .* write it with tools/prepare_data.py"):
        bench("data", "--data", image_folder, "--prepared", tmp_path, "--images", 2)


def test_data_draws_images_where_there_are_none(bench, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert len(bench("data", "--images", 2, "--size", 32, "--repeats", 1)) == 5
    assert not any(tmp_path.iterdir())


def test_data_draws_photographs(bench, monkeypatch, tmp_path):
    """Of so many megapixels, in files of as many bytes a pixel as a camera's; one variant reduces them."""
    monkeypatch.setattr(data, "DRAWN", 1)
    monkeypatch.setattr(data.MultiStageViews, "weak_views", lambda self, *_: seen.append(self.images) or FLAT)
    seen = []
    rows = bench("data", "--megapixels", 4, "--size", 32, "--repeats", 1)
    assert rows[3]["variant"] == "this project, REDUCED_DECODE False"
    assert {images.reduced_decode for images in seen} == {True, False}
    [photograph] = write_photographs(tmp_path, 1, 1, 90).iterdir()
    with Image.open(photograph) as image:
        assert image.format == "JPEG" and 1.0 <= image.width * image.height / 1e6 < 1.01
    assert 0.25 < photograph.stat().st_size / 1e6 < 0.45


def test_pil_pipelines_make_the_papers_views(image_folder, monkeypatch):
    """Without aggressive operations the two views of a pair are equal, because they share their crop."""
    name = next(image_folder.rglob("*.jpg"))
    four, two = pil.rsa_views(24)(name), pil.byol_views(24)(name)
    assert len(four) == 4 and len(two) == 2
    assert all(view.shape == (3, 24, 24) and view.dtype == torch.float32 for view in four + two)
    monkeypatch.setattr(pil, "aggressive_stage", lambda: lambda image: image)
    four = pil.rsa_views(24)(name)
    assert (
        torch.equal(four[0], four[2]) and torch.equal(four[1], four[3]) and not torch.equal(four[0], four[1])
    )


def test_augment(bench):
    rows = bench("augment", "--size", 32, "--batch-size", 2, "--repeats", 1)
    assert [row["variant"] for row in rows[:2]] == ["this project", "torchvision, one by one"]
    assert all(row["ms per view"] == pytest.approx(row["ms"] / 4) for row in rows)


def test_the_reference_does_the_same_as_what_it_is_compared_with():
    views, params = synthetic_views(8, 32)
    assert (one_by_one(views, params) - aggressive(views, params)).abs().max() < 1e-4


def test_step(bench, image_folder):
    rows = bench("step", *TINY, "--data", image_folder, "--workers", 0)
    assert [(row["method"], row["data"]) for row in rows] == [
        (method, source) for source in ("synthetic", "0 workers") for method in ("byol", "rsa", "simsiam")
    ]
    for row in rows:
        for part in PARTS:
            assert (row[part] > 0) == (part != "forward target" or row["method"] != "simsiam"), (
                row["method"],
                part,
            )
        assert row["x byol"] == pytest.approx(row["ms"] / rows[0]["ms"])


def test_step_of_a_recipe(bench, tmp_path):
    """Options on the command line replace the recipe's settings. The printed rows are also written to a
    file."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "MODEL:\n  BACKBONE: test_resnet\n  HIDDEN_DIM: 16\n  OUT_DIM: 8\nDATA:\n  IMAGE_SIZE: 24\n"
        "SOLVER:\n  OPTIMIZER: sgd\n  BATCH_SIZE: 64\n  AMP: bf16\n"
    )
    output = tmp_path / "new" / "rows.json"
    rows = bench(
        "step",
        "--config-file",
        recipe,
        "--batch-size",
        4,
        "--repeats",
        1,
        "--methods",
        "byol",
        "rsa",
        "--epoch-images",
        100,
        "--output",
        output,
    )
    assert [json.loads(line) for line in output.read_text().splitlines()] == rows
    for row in rows:
        assert [row[key] for key in ("backbone", "size", "batch", "amp")] == [
            "test_resnet",
            24,
            4,
            "bfloat16",
        ]
        assert row["s per epoch"] == pytest.approx(100 / 4 * row["ms"] / 1000)


def small_cfg():
    cfg = get_cfg()
    cfg.MODEL.BACKBONE, cfg.DATA.IMAGE_SIZE = "test_resnet", 32
    cfg.SOLVER.BATCH_SIZE, cfg.SOLVER.AMP = 4, "off"
    return cfg


def test_hooks_leave_the_step_as_it_is():
    """Three measured steps give the same weights as three plain calls of train_step."""
    measured, plain = (StepTimer(small_cfg(), "rsa") for _ in range(2))
    measured.run(synthetic_batches(small_cfg()), 3)
    views, params = synthetic_views(4, 32)
    pair = normalized_views({"views": views, "params": params}, plain.output)
    for _ in range(3):
        train_step(plain.state, [pair], 1, 0.2, 0.99)
    weights = measured.networks.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in plain.networks.state_dict().items())


def test_methods_without_weak_views_take_none():
    timer = StepTimer(small_cfg(), "byol")
    weak, _ = next(timer.views(synthetic_batches(small_cfg())))
    assert weak is None


def test_traffic_of_the_parts_is_that_of_the_step():
    """The counts of the parts add up; the optimizer reads weights, gradients and momentum at least."""
    timer = StepTimer(small_cfg(), "rsa")
    timer.warm_up()
    batches = synthetic_batches(small_cfg())
    parts = timer.count_traffic(batches)
    assert set(parts) == set(PARTS) and not parts["data wait"].bytes
    whole = measure_traffic(lambda _: timer.step(batches), "cpu")
    assert sum(part.bytes for part in parts.values()) == whole.bytes
    trained = sum(p.nbytes for p in timer.networks.parameters() if p.requires_grad)
    assert parts["optimizer"].bytes >= 5 * trained
    assert parts["EMA"].bytes >= 3 * sum(p.nbytes for p in timer.networks.target.parameters())


def test_parts_add_up_to_the_step(monkeypatch):
    ticks = iter(np.arange(1000.0))
    timer = StepTimer(small_cfg(), "rsa")
    timer.warm_up()
    monkeypatch.setattr(step_timer.time, "perf_counter", lambda: next(ticks))
    turn = timer.run(synthetic_batches(small_cfg()), 2)
    # How often a step runs these parts; it runs the others once.
    marks = {"optimizer": 2, "forward target": 2, "forward online": 3}
    assert turn == {"ms": 11_000.0, **{part: 1000.0 * marks.get(part, 1) for part in PARTS}}


def test_optim(bench):
    rows = bench("optim", *TINY[:2], "--repeats", 1)
    assert [row["variant"] for row in rows] == [
        "LARS, all at once",
        "LARS, one by one",
        "EMA, all at once",
        "EMA, one by one",
    ]
    assert all(row["ms"] > 0 for row in rows)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["data", "--data", "absent"], "no image folder absent"),
        (["augment", "--repeats", "0"], "0 is not positive"),
        (["--repeats", "1", "step"], "options follow the benchmark: tools/benchmark.py step --repeats"),
        (["augment", "--data", "x"], "augment has no option --data x: tools/benchmark.py augment --help"),
        (["data", "--batch-size", "2"], "data has no option --batch-size 2"),
        (["optim", "--amp", "off"], "optim has no option --amp off"),
        (["step", "--workers", "2"], "--workers sets those of the loader"),
    ],
)
def test_bad_input_is_one_line(tool, arguments, message):
    done = tool("benchmark", *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
