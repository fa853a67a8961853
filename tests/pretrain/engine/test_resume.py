"""A run that was stopped, killed or moved ends with the same bits as one that was not."""

import json
import shutil
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch

from rsa_detectron2.common import distributed
from rsa_detectron2.common.errors import InputError, Interrupted
from rsa_detectron2.pretrain.config import METHODS
from rsa_detectron2.pretrain.data import identity
from rsa_detectron2.pretrain.data.datasets import open_images
from rsa_detectron2.pretrain.engine import trainer as train_loop
from rsa_detectron2.pretrain.engine.checkpoint import FINAL, LAST, PREVIOUS
from tests.conftest import assert_same, final_weights
from tests.conftest import tiny_cfg as tiny


@pytest.fixture(scope="module")
def uninterrupted(image_folder, tmp_path_factory):
    return train_loop.train(tiny(image_folder, tmp_path_factory.mktemp("whole")))


def test_lars_and_bfloat16_go_on_bit_for_bit(image_folder, tmp_path, stop_after):
    recipe = ("SOLVER.OPTIMIZER", "lars", "SOLVER.AMP", "bf16", "SOLVER.EPOCHS", 2)
    whole = train_loop.train(tiny(image_folder, tmp_path / "whole", *recipe))
    stop_after(4)
    with pytest.raises(Interrupted):
        train_loop.train(tiny(image_folder, tmp_path, *recipe))
    assert_same(final_weights(train_loop.train(tiny(image_folder, tmp_path, *recipe))), final_weights(whole))


@pytest.mark.parametrize("after, workers", [(1, 0), (4, 1), (8, 0)])
def test_stopped_run_goes_on_bit_for_bit(image_folder, tmp_path, stop_after, uninterrupted, after, workers):
    """Stop in mid-epoch after some steps, resume with another number of workers."""
    cfg = tiny(image_folder, tmp_path)
    steps = stop_after(after)
    with pytest.raises(Interrupted, match=f"step {after} of 9"):
        train_loop.train(cfg)
    assert torch.load(Path(cfg.OUTPUT_DIR, LAST), weights_only=True)["step"] == after
    final = train_loop.train(tiny(image_folder, tmp_path, "DATA.NUM_WORKERS", workers))
    assert len(steps) == 9
    assert_same(final_weights(final), final_weights(uninterrupted))
    rows = [json.loads(line) for line in Path(cfg.OUTPUT_DIR, "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 10))
    assert [row["step"] for row in rows if "knn_top1" in row] == [0, 9]


def test_evaluating_on_the_way_changes_nothing(image_folder, tmp_path, uninterrupted):
    """With kNN after every epoch, BatchNorm's running statistics must not see the evaluation."""
    final = train_loop.train(tiny(image_folder, tmp_path, "KNN.PERIOD", 1))
    assert_same(final_weights(final), final_weights(uninterrupted))


def test_an_evaluation_that_a_signal_left_out_is_made_up_for(
    image_folder, tmp_path, uninterrupted, stop_after, monkeypatch
):
    """Then it is not made again: the run is killed after it, during step 4."""

    def train():
        return train_loop.train(tiny(image_folder, tmp_path, "KNN.PERIOD", 1))

    def counted(*given, **options):
        calls.append(len(steps))
        return evaluate(*given, **options)

    steps, evaluate, calls = stop_after(3), train_loop.evaluate_knn, []
    with pytest.raises(Interrupted, match="step 3 of 9"):
        train()
    monkeypatch.setattr(train_loop, "evaluate_knn", counted)
    with monkeypatch.context() as patch:
        patch.setattr(train_loop, "train_step", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train()
    final = train()
    assert calls == [3, 6, 9]
    rows = [json.loads(line) for line in Path(final).with_name("metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "knn_top1" in row] == [0, 3, 6, 9]
    assert_same(final_weights(final), final_weights(uninterrupted))


def test_signal_while_a_checkpoint_is_read(image_folder, tmp_path, uninterrupted, stop_after, monkeypatch):
    """The signal is not mistaken for a damaged file."""
    stop_after(4)
    with pytest.raises(Interrupted):
        train_loop.train(tiny(image_folder, tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted, match="with nothing to save; the same command goes on"):
            train_loop.train(tiny(image_folder, tmp_path))
    assert not list((tmp_path / "run").glob("*.damaged"))
    assert_same(final_weights(train_loop.train(tiny(image_folder, tmp_path))), final_weights(uninterrupted))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_signal_before_the_first_step(image_folder, tmp_path, uninterrupted, monkeypatch, number):
    """The signal comes while the data set is opened or the first kNN runs: nothing is lost, and the exit
    status tells a scheduler to requeue."""
    evaluate = train_loop.evaluate_knn
    monkeypatch.setattr(train_loop, "evaluate_knn", lambda *_, **__: signal.raise_signal(number))
    handler = signal.getsignal(number)
    with pytest.raises(Interrupted, match="with nothing to save"):
        train_loop.train(tiny(image_folder, tmp_path))
    assert signal.getsignal(number) == handler
    monkeypatch.setattr(train_loop, "evaluate_knn", evaluate)
    assert_same(final_weights(train_loop.train(tiny(image_folder, tmp_path))), final_weights(uninterrupted))


def test_an_epoch_is_saved_before_its_knn(image_folder, tmp_path, uninterrupted, monkeypatch):
    """kNN may take longer than a launcher waits before it kills."""
    with monkeypatch.context() as patch:
        calls = iter([50.0])  # before the first step
        patch.setattr(train_loop, "evaluate_knn", lambda *_, **__: next(calls))
        with pytest.raises(StopIteration):
            train_loop.train(tiny(image_folder, tmp_path, "KNN.PERIOD", 1))
        assert torch.load(tmp_path / "run" / LAST, weights_only=True)["step"] == 3
        with pytest.raises(StopIteration):  # at the end
            train_loop.train(tiny(image_folder, tmp_path))
        assert torch.load(tmp_path / "run" / LAST, weights_only=True)["step"] == 9
    final = train_loop.train(tiny(image_folder, tmp_path))
    assert_same(final_weights(final), final_weights(uninterrupted))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "knn_top1" in row] == [0, 9]


@pytest.fixture
def stopped(image_folder, tmp_path, stop_after):
    """A copy of the image folder and its val/. A run on it in ``tmp_path`` has made four of nine steps."""
    data = tmp_path / "data"
    shutil.copytree(image_folder.parent, data)
    stop_after(4)
    with pytest.raises(Interrupted):
        train_loop.train(tiny(data / "train", tmp_path))
    return data


@pytest.mark.parametrize(
    "spelling", ["{0}/train/", "{0}", "{0}/../data/train", "data/train", "moved", "copied"]
)
def test_the_same_images_under_another_path_go_on(tmp_path, stopped, spelling, uninterrupted, monkeypatch):
    """They are known by their content, also by a finished run."""
    monkeypatch.chdir(tmp_path)
    path = spelling.format(stopped)
    if spelling == "moved":
        path = stopped.rename(tmp_path / "elsewhere") / "train"
    if spelling == "copied":
        path = shutil.copytree(stopped, tmp_path / "copy") / "train"
    final = train_loop.train(tiny(path, tmp_path))
    assert_same(final_weights(final), final_weights(uninterrupted))
    assert "data" in torch.load(final, weights_only=True)
    Path(tmp_path, "run", LAST).unlink()
    Path(tmp_path, "run", PREVIOUS).unlink()
    assert train_loop.train(tiny(f"{path}/.", tmp_path)) == final


def remove(data):
    (data / "a" / "03.jpg").unlink()


def add(data):
    shutil.copy(data / "b" / "02.png", data / "b" / "xyz.png")


def rename(data):
    (data / "a" / "03.jpg").rename(data / "a" / "03 (1).jpg")


def rename_class(data):
    (data / "b").rename(data / "c")


@pytest.mark.parametrize(
    "change, words",
    [
        (remove, "has 23; a/03.jpg is gone: restore"),
        (add, "has 25; b/xyz.png is new: restore"),
        (rename, r"has 24; a/03.jpg is gone; a/03 \(1\).jpg is new: restore"),
        (rename_class, "has 24; b/00.jpg is gone, and 11 more; c/00.jpg is new, and 11 more: restore"),
    ],
)
def test_changed_data_set_is_refused(tmp_path, stopped, change, words):
    change(stopped / "train")
    line = f"holds a run on 24 images, and .*train {words} the data set, or give another --output-dir$"
    with pytest.raises(InputError, match=line):
        train_loop.train(tiny(stopped / "train", tmp_path))


def test_a_finished_run_is_not_that_of_other_images(image_folder, uninterrupted, tmp_path):
    run = shutil.copytree(Path(uninterrupted).parent, tmp_path / "run")
    for path in run.glob("checkpoint_*.pth"):
        path.unlink()  # to save space: model_final.pth knows the images as well, but not their names
    other = shutil.copytree(image_folder, tmp_path / "other")
    rename(other)
    with pytest.raises(
        InputError, match="24 images, and .* has 24; names, labels or classes differ: restore"
    ):
        train_loop.train(tiny(other, tmp_path))


def test_checkpoint_without_a_data_set_goes_on(tmp_path, stopped, uninterrupted):
    """It is that of an older version, which knew the images by their path and their number."""
    last = tmp_path / "run" / LAST
    saved = torch.load(last, weights_only=True)
    del saved["data"]
    torch.save(saved, last)
    with pytest.raises(InputError, match="another configuration .DATA.PATH: "):
        train_loop.train(tiny(f"{stopped}/train/", tmp_path))
    final = train_loop.train(tiny(stopped / "train", tmp_path))
    assert_same(final_weights(final), final_weights(uninterrupted))


def test_removing_a_listed_image_changes_nothing(image_folder, tmp_path, stop_after, capsys):
    """The message on it advises this. Its place is kept, and the next image stands in for it as before."""
    data = shutil.copytree(image_folder, tmp_path / "data")
    (data / "a" / "03.jpg").write_bytes(b"damaged")
    whole = train_loop.train(tiny(data, tmp_path / "whole"))
    stop_after(4)
    with pytest.raises(Interrupted):
        train_loop.train(tiny(data, tmp_path))
    (data / "a" / "03.jpg").unlink()
    moved = data.rename(tmp_path / "moved")
    final = train_loop.train(tiny(moved, tmp_path))
    assert "1 images of" in capsys.readouterr().out
    assert_same(final_weights(final), final_weights(whole))


def test_removing_images_beyond_the_limit_is_advice_that_works(tmp_path, stopped):
    (stopped / "train" / "a" / "03.jpg").write_bytes(b"damaged")
    cfg = tiny(stopped / "train", tmp_path, "DATA.MAX_BAD", 0.0)
    for _ in range(2):
        with pytest.raises(InputError, match="lists 1 of 24 .* allows 0: replace or remove them"):
            train_loop.train(cfg)
    (stopped / "train" / "a" / "03.jpg").unlink()
    assert train_loop.train(cfg)


def test_images_of_a_limit_are_known_by_their_names(image_folder, tmp_path):
    folder = Path(shutil.copytree(image_folder, tmp_path / "data"))
    images = open_images(folder, limit=5)
    saved = {"num_images": 5, "data": identity.describe(images)}
    of_an_early_version = {"num_images": 5, "data": {"sha256": identity.digest(images, named=False)}}
    for known in (saved, of_an_early_version):
        assert identity.recognize(images, known, set(), tmp_path) == 0
    Path(images.name(2)).rename(folder / "a" / "99.jpg")
    with pytest.raises(InputError, match="holds a run on 5 images, .* is gone.*: restore the data set"):
        identity.recognize(open_images(folder, limit=5), saved, set(), tmp_path)


def test_processes_with_other_images_are_refused(image_folder, monkeypatch):
    """One of several machines may hold an incomplete copy."""
    monkeypatch.setattr(distributed, "from_first", lambda mine: (24, "another digest"))
    with pytest.raises(InputError, match="train has 24 images on .*, other than the 24 that the first"):
        identity.check_same_everywhere(open_images(image_folder))


def test_validation_folder_that_does_not_fit_is_left_alone(image_folder, tmp_path):
    """With unlabeled images beside each other a run goes without kNN; only an explicit DATA.VAL is an
    error."""
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for i, path in enumerate(sorted(image_folder.glob("*/*"))):
            shutil.copy(path, tmp_path / split / f"{i}{path.suffix}")
    final = train_loop.train(tiny(tmp_path / "train", tmp_path, "SOLVER.EPOCHS", 2))
    assert "knn" not in Path(final).with_name("metrics.jsonl").read_text()
    with pytest.raises(InputError, match="need the same classes"):
        train_loop.train(tiny(tmp_path / "train", tmp_path / "other", "DATA.VAL", str(tmp_path / "val")))


def test_finished_run_is_left_alone(image_folder, uninterrupted, capsys):
    before = Path(uninterrupted).stat().st_mtime_ns
    assert train_loop.train(tiny(image_folder, Path(uninterrupted).parents[1])) == uninterrupted
    assert Path(uninterrupted).stat().st_mtime_ns == before and "complete" in capsys.readouterr().out


def test_killed_before_the_final_file(image_folder, uninterrupted, tmp_path):
    """The last checkpoint exists but not model_final.pth: the same command only writes that."""
    folder = shutil.copytree(Path(uninterrupted).parent, tmp_path / "run")
    (folder / FINAL).unlink()
    assert_same(final_weights(train_loop.train(tiny(image_folder, tmp_path))), final_weights(uninterrupted))


def test_another_configuration_is_refused(image_folder, uninterrupted):
    with pytest.raises(InputError, match=r"MODEL.BETA: 0.4 -> 0.3; SEED: 0 -> 1"):
        train_loop.train(tiny(image_folder, Path(uninterrupted).parents[1], "SEED", 1, "MODEL.BETA", 0.3))


def test_kept_checkpoints(uninterrupted):
    names = sorted(path.name for path in Path(uninterrupted).parent.glob("*.pth"))
    assert names == [
        "checkpoint_0000003.pth",
        "checkpoint_0000006.pth",
        "checkpoint_0000009.pth",
        LAST,
        PREVIOUS,
        FINAL,
    ]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_bit_for_bit(image_folder, tmp_path, stop_after, method):
    """MoCo's queue of 40 keys wraps around within three steps."""
    options = ("METHOD", method, "MODEL.QUEUE", 40, "SOLVER.MICRO_BATCH", 4)
    whole = train_loop.train(tiny(image_folder, tmp_path / "whole", *options))
    stop_after(4)
    with pytest.raises(Interrupted):
        train_loop.train(tiny(image_folder, tmp_path, *options))
    final = train_loop.train(tiny(image_folder, tmp_path, *options))
    assert torch.load(final, weights_only=True)["method"] == method
    assert_same(final_weights(final), final_weights(whole))
