"""With three or more processes sums depend on their order. Stopped and uninterrupted runs still agree to the
bit."""

import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from rsa_detectron2.common import launch
from rsa_detectron2.common.errors import REQUEUE, Interrupted
from rsa_detectron2.pretrain.engine import checkpoint
from rsa_detectron2.pretrain.engine import trainer as train_loop
from tests.conftest import assert_same, processes, tiny_cfg

EPOCHS = 8  # of one step
RECIPE = (
    "SOLVER.OPTIMIZER",
    "lars",
    "SOLVER.AMP",
    "bf16",
    "SOLVER.EPOCHS",
    EPOCHS,
    "SOLVER.BATCH_SIZE",
    24,
    "CHECKPOINT.KEEP_PERIOD",
    0,
)


def join(cfg, rank, ranks, port):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "localhost",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_PORT": str(port),
    }
    try:
        launch.join_and_run(train_loop.train, cfg)
    except Interrupted as stopped:
        Path(cfg.OUTPUT_DIR, f"stopped_{rank}.txt").write_text(str(stopped))
        os._exit(REQUEUE)


def start(cfg, ranks):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    group = [processes.Process(target=join, args=(cfg, rank, ranks, port)) for rank in range(ranks)]
    for process in group:
        process.start()
    return group


def finish(group):
    """Wait for the end of all processes; return their exit codes."""
    for process in group:
        process.join(300)
        if process.is_alive():
            process.kill()
            process.join()
    return {process.exitcode for process in group}


def state(cfg, name):
    """Every tensor of a checkpoint: the networks', their BatchNorm's and the optimizer's."""
    saved = checkpoint.load(Path(cfg.OUTPUT_DIR, name))
    momenta = saved.get("optimizer", {}).get("state", {})
    return saved["model"] | {f"momentum {i}": entry["momentum_buffer"] for i, entry in momenta.items()}


@pytest.fixture(scope="module", params=[3, pytest.param(4, marks=pytest.mark.slow)])
def uninterrupted(image_folder, tmp_path_factory, request):
    """(processes, configuration) of a run. Each process handles its 8 or 6 images in two micro-batches."""
    micro_batch = 24 // request.param // 2
    cfg = tiny_cfg(image_folder, tmp_path_factory.mktemp("whole"), *RECIPE, "SOLVER.MICRO_BATCH", micro_batch)
    assert finish(start(cfg, request.param)) == {0}
    return request.param, cfg


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, REQUEUE), (signal.SIGKILL, -signal.SIGKILL)])
def test_several_processes_go_on_bit_for_bit(image_folder, tmp_path, uninterrupted, number, code):
    """The run is stopped as soon as the first checkpoint exists, resumed, and stopped once more."""
    ranks, whole = uninterrupted
    cfg = tiny_cfg(image_folder, tmp_path, *RECIPE, "SOLVER.MICRO_BATCH", whole.SOLVER.MICRO_BATCH)
    last = Path(cfg.OUTPUT_DIR, checkpoint.LAST)
    for _ in range(2):
        before = last.stat().st_mtime_ns if last.is_file() else 0
        group = start(cfg, ranks)
        until = time.monotonic() + 300
        while time.monotonic() < until and not (last.is_file() and last.stat().st_mtime_ns > before):
            time.sleep(0.005)
        for process in group:
            os.kill(process.pid, number)
        assert finish(group) == {code}
    assert 1 < checkpoint.load(last)["step"] < EPOCHS
    assert finish(start(cfg, ranks)) == {0}
    for name in (checkpoint.LAST, checkpoint.FINAL):
        assert_same(state(cfg, name), state(whole, name))


def test_another_number_of_processes_is_said(image_folder, tmp_path, uninterrupted, capfd):
    """BatchNorm sees as many images as before, but a sum over other parts is rounded differently."""
    ranks, whole = uninterrupted
    shutil.copytree(whole.OUTPUT_DIR, tmp_path / "run")
    (tmp_path / "run" / checkpoint.FINAL).unlink()
    micro_batch = "SOLVER.MICRO_BATCH", whole.SOLVER.MICRO_BATCH
    train_loop.train(tiny_cfg(image_folder, tmp_path, *RECIPE, *micro_batch))
    assert f"1 instead of {ranks} processes change the order of sums" in capfd.readouterr().out


@pytest.mark.parametrize("rank", [0, 1])
def test_signal_to_one_process_stops_both_at_the_same_step(image_folder, tmp_path, rank):
    cfg = tiny_cfg(image_folder, tmp_path, "SOLVER.EPOCHS", 200, "CHECKPOINT.PERIOD", 200)
    metrics, group = Path(cfg.OUTPUT_DIR, "metrics.jsonl"), start(cfg, 2)
    until = time.monotonic() + 300
    while time.monotonic() < until and not (metrics.is_file() and '"loss"' in metrics.read_text()):
        time.sleep(0.005)
    os.kill(group[rank].pid, signal.SIGTERM)
    assert finish(group) == {REQUEUE}
    said = {Path(cfg.OUTPUT_DIR, f"stopped_{other}.txt").read_text() for other in (0, 1)}
    step = checkpoint.load(Path(cfg.OUTPUT_DIR, checkpoint.LAST))["step"]
    assert said == {f"stopped at step {step} of 600, saved; the same command goes on from there"}
