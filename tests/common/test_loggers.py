"""Rows of a run that goes on, and the library of each logger; tests/logged.py compares the loggers."""

import errno
import struct
import sys

import numpy as np
import pytest
from fvcore.common.config import CfgNode
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rsa_detectron2.common import loggers
from rsa_detectron2.common.errors import InputError, Interrupted
from tests.logged import assert_same_rows, counted, tensorboard, wandb

__all__ = ["wandb"]


def config(folder, *names):
    return CfgNode({"OUTPUT_DIR": str(folder), "LOGGERS": names, "SOLVER": {"BASE_LR": 0.1}})


def open_rows(folder, last, *names):
    return loggers.Rows(config(folder, *names), "rows.jsonl", "step", last)


def test_steps_that_are_made_again(tmp_path, wandb):
    """A killed process came to step 5, its checkpoint is of step 3, and it had evaluated after that."""
    killed = open_rows(tmp_path, None, "tensorboard", "wandb")
    for step in range(6):
        killed.write(step, {"loss": step / 3, "lr": 0.1})
        if step % 3 == 0:
            killed.write(step, {"top1": 50.0, "absent": None})
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # cut short
    with open_rows(tmp_path, 3, "tensorboard", "wandb") as rows:
        rows.write(3, {"top1": 50.0, "absent": None})
        for step in range(4, 8):
            rows.write(step, {"loss": step / 3, "lr": 0.1})
    rows = assert_same_rows(tmp_path, "rows.jsonl", "step", wandb, again=(4, 5))
    assert [row["step"] for row in rows] == [0, 0, 1, 2, 3, 3, 4, 5, 6, 7]
    assert rows[1] == {"step": 0, "top1": 50.0, "absent": None}


def test_a_run_that_begins_anew_has_no_earlier_rows(tmp_path, wandb):
    for value in (1.0, 2.0):
        with open_rows(tmp_path, None, "tensorboard", "wandb") as rows:
            rows.write(0, {"loss": value})
    assert (tmp_path / "rows.jsonl").read_text() == '{"step": 0, "loss": 2.0}\n'
    assert tensorboard(tmp_path) == [(0, {"loss": 2.0})]
    assert [run.rows for run in wandb.runs.values()] == [[(0, {"loss": 1.0})], [(0, {"loss": 2.0})]]


def test_what_wandb_is_told(tmp_path, wandb, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    open_rows(tmp_path / "..", None, "wandb").close()
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    open_rows(tmp_path / "..", 1, "wandb").close()
    first, second = wandb.given
    assert first["project"] == "rsa-detectron2" and second["project"] == "mine"
    assert first["name"] == tmp_path.parent.name and first["config"]["SOLVER.BASE_LR"] == 0.1
    assert first["id"] == second["id"] and first["resume"] == "allow"


def test_a_logger_that_is_not_asked_for_is_not_imported(tmp_path, wandb, monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it would fail
    with open_rows(tmp_path, None) as rows:
        rows.write(0, {"loss": 1.0})
    assert "wandb" not in sys.modules and [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    "kind, closed", [(Interrupted, True), (KeyboardInterrupt, True), (InputError, False)]
)
def test_a_run_that_fails_is_left_for_wandb_to_close(tmp_path, wandb, kind, closed):
    with pytest.raises(kind), open_rows(tmp_path, None, "wandb"):
        raise kind("x")
    (run,) = wandb.runs.values()
    assert run.open != closed


def test_names_and_libraries(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # as wandb itself leaves it
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("wandb", "tensorboard"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert loggers.problem(()) == ""
    assert loggers.problem(("wandb",)) == "wandb is not installed: pip install -e '.[wandb]', or leave it out"
    assert loggers.problem(("tensorboard",)).startswith(
        "tensorboard is not installed: pip install tensorboard"
    )
    with pytest.raises(InputError, match=r"LOGGERS is \('mlflow',\): 'mlflow' is none of tensorboard, wandb"):
        loggers.check(config(tmp_path, "mlflow"))


def test_wandb_that_does_not_start_is_one_line(tmp_path, wandb, monkeypatch):
    def fail(**_):
        raise RuntimeError("No API key\nconfigured.")

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.raises(InputError, match="does not start .No API key configured.*WANDB_MODE=offline"):
        open_rows(tmp_path, None, "wandb")
    assert not (tmp_path / loggers.WANDB_ID).exists()


def test_tensorboard_that_does_not_start_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as where its libraries do not fit
    with pytest.raises(InputError, match=r"TensorBoard does not start .*, or give LOGGERS '\(\)'$"):
        open_rows(tmp_path, None, "tensorboard")


@pytest.mark.parametrize("part", ["file", "tensorboard", "wandb"])
def test_rows_that_cannot_be_written_do_not_end_the_run(tmp_path, wandb, monkeypatch, capsys, part):
    """The others get their rows all the same."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    rows = open_rows(tmp_path, None, "tensorboard", "wandb")
    if part == "file":
        rows.file.close()
        rows.file = open("/dev/full", "w", buffering=1)
    else:
        logger = rows.loggers[0].writer if part == "tensorboard" else rows.loggers[1].run
        monkeypatch.setattr(logger, "add_scalar" if part == "tensorboard" else "log", full)
    for step in range(3):
        rows.write(step, {"loss": 1.0})
    rows.close()
    line = "warning: cannot write metrics (No space left on device); the run goes on without them"
    assert capsys.readouterr().err.count(line) == 1
    (run,) = wandb.runs.values()
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    found = {"file": len(lines), "tensorboard": len(tensorboard(tmp_path)), "wandb": len(run.rows)}
    assert found == {name: 0 if name == part else 3 for name in found}


def test_images_go_to_the_loggers(tmp_path, wandb):
    image = np.zeros((3, 4, 6), np.uint8)
    with open_rows(tmp_path, None, "tensorboard", "wandb") as rows:
        rows.draw(2, "seen", image)
    (run,) = wandb.runs.values()
    [(step, drawn)] = run.rows
    assert step == 2 and drawn["seen"].shape == (4, 6, 3)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [image.step for image in events.Images("seen")] == [2]


def history(path):
    """The rows in a .wandb file: protobuf records in LevelDB's log format, here in a single block."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, rows = path.read_bytes()[7:], 0, []
    while place + 7 <= len(data):
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        assert kind == 1 and place + 7 + length <= 32768  # a whole record
        record = Record.FromString(data[place + 7 : place + 7 + length])
        if record.WhichOneof("record_type") == "history":
            items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            step = int(items.pop("step"))
            rows.append((step, {k: float(v) for k, v in items.items() if not k.startswith("_")}))
        place += 7 + length
    return rows


def test_rows_in_the_file_of_the_real_wandb(tmp_path, monkeypatch):
    """Offline: nothing leaves the machine. The first process was killed after step 4, saved at step 3."""
    real = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    made = [(step, {"loss": step / 3, "lr": 0.1}) for step in range(1, 7)] + [(6, {"top1": 50.0})]
    for last, part in ((None, made[:4]), (3, made[3:])):
        with open_rows(tmp_path, last, "wandb") as rows:
            for step, figures in part:
                rows.write(step, figures)
    real.teardown()  # its own process has then written all
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len({path.name for path in files}) == 1  # the same run
    assert counted(row for path in files for row in history(path)) == counted(made + [made[3]])
