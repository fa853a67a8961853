"""Several processes (gloo, on the CPU) learn one model, however they are started."""

import errno
import json
import logging
import os
import signal
import stat
import subprocess
import sys
import weakref

import pytest
import torch

from rsa_detectron2.common import distributed, launch
from rsa_detectron2.common.errors import InputError, Interrupted
from rsa_detectron2.pretrain.data.images import UnreadableImage
from rsa_detectron2.pretrain.engine import trainer as train_loop
from tests.conftest import ROOT, TINY, Program, assert_same, final_weights, tiny_cfg

EPOCHS = 10  # of three steps: long enough to receive a signal before the end
TOOL = str(ROOT / "tools" / "pretrain.py")


def arguments(image_folder, folder, *more):
    return ["--data", str(image_folder), "--output-dir", str(folder / "run"), *TINY, *map(str, more)]


@pytest.fixture(scope="module")
def two_processes(image_folder, tmp_path_factory):
    """The final file of a run in two processes that this process started."""
    cfg = tiny_cfg(image_folder, tmp_path_factory.mktemp("two"), "SOLVER.EPOCHS", EPOCHS, "KNN.PERIOD", 1)
    return launch.launch(train_loop.train, cfg, launch.Processes(2))


def test_two_processes_equal_accumulation_over_two(image_folder, tmp_path, two_processes):
    """The parameters of online network, predictor and target agree after the last step, to 1e-5 of each
    tensor's largest."""
    cfg = tiny_cfg(image_folder, tmp_path, "SOLVER.EPOCHS", EPOCHS, "SOLVER.MICRO_BATCH", 4)
    one, two = final_weights(train_loop.train(cfg)), final_weights(two_processes)
    checked = 0
    for name, tensor in one.items():
        if "running_" not in name and "num_batches" not in name:  # those are only rank 0's
            assert (tensor - two[name]).abs().max() <= 1e-5 * tensor.abs().max(), name
            checked += 1
    assert checked > 60
    rows = [
        [json.loads(line) for line in open(os.path.join(os.path.dirname(final), "metrics.jsonl"))]
        for final in (two_processes, str(tmp_path / "run" / "model_final.pth"))
    ]
    losses = [[row["loss"] for row in part if "loss" in row] for part in rows]
    # both are means over the global batch
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 3 * EPOCHS


def test_launcher_hands_on_what_a_process_raised(image_folder, tmp_path):
    logger, records, handler = (
        logging.getLogger("torch.distributed.elastic.multiprocessing.api"),
        [],
        logging.Handler(),
    )
    handler.emit = records.append
    logger.addHandler(handler)
    with pytest.raises(
        InputError, match="global batch of 9 does not divide among 2 processes: use --batch-size 8 or 10"
    ):
        launch.launch(
            train_loop.train, tiny_cfg(image_folder, tmp_path, "SOLVER.BATCH_SIZE", 9), launch.Processes(2)
        )
    logger.removeHandler(handler)
    assert not [record for record in records if record.exc_info]  # the user reads one line, and no traceback


@pytest.fixture
def one_of_one(monkeypatch):
    """The state of a process that a launcher has started and whose process group exists."""
    environment = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)


def test_a_kind_of_input_error_is_handed_on_as_one(one_of_one):
    """The launcher knows an error by its name."""
    for error, message in (
        (UnreadableImage("a.jpg cannot be decoded"), "^a.jpg cannot be decoded$"),
        (OSError(errno.EIO, "Input/output error", "a.jpg"), "Input/output error: 'a.jpg'"),
        (MemoryError(), "^out of memory$"),
    ):

        def train(cfg, error=error):
            raise error

        with pytest.raises(InputError, match=message) as handed_on:
            launch.join_and_run(train, None)
        assert type(handed_on.value) is InputError


def test_model_goes_before_the_group(one_of_one, monkeypatch):
    """The other way round, the group's threads sometimes deadlock with the thread that ends them."""
    gone = []
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: gone.append("group"))

    def train(cfg):
        model = torch.nn.Module()
        weakref.finalize(model, gone.append, "model")
        raise Interrupted("stopped at step 3")

    with pytest.raises(Interrupted, match="stopped at step 3"):
        launch.join_and_run(train, None)
    assert gone == ["model", "group"]


def fail_in(rank):
    """A train(cfg) that fails in one process while the other is at the end of a step."""
    torch.distributed.destroy_process_group = os.abort  # on NCCL it may wait for its peer forever
    if distributed.rank() == rank:
        raise InputError("one image cannot be decoded")
    distributed.any_rank(False)


@pytest.mark.parametrize("rank", [0, 1])
def test_error_of_one_process_is_the_one_that_is_told(rank):
    """The error of its peer, which loses the connection, is not reported."""
    with pytest.raises(InputError, match="^one image cannot be decoded$"):
        launch.launch(fail_in, rank, launch.Processes(2))


def killed(rank):
    if distributed.rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.any_rank(False)


def test_killed_process_is_reported():
    with pytest.raises(
        InputError, match="^process 1 of 2 died of SIGKILL, most likely because memory ran out: the same"
    ):
        launch.launch(killed, 1, launch.Processes(2))


@pytest.mark.parametrize("ignored", [False, True])
def test_launcher_leaves_nohups_signal_ignored(monkeypatch, ignored):
    found = []

    def elastic_launch(config, run):
        found.extend([config.signals_to_handle.split(","), signal.getsignal(signal.SIGHUP)])
        return lambda *_: {0: None}

    monkeypatch.setattr(launch, "elastic_launch", elastic_launch)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        launch.launch(None, None, launch.Processes(2))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert set(found[0]) == {"SIGTERM", "SIGINT", "SIGUSR1", "SIGQUIT", *(() if ignored else ("SIGHUP",))}


def test_signal_that_elastic_does_not_know(monkeypatch):
    """torch before 2.10 sets no handler for SIGUSR1."""

    def elastic_launch(config, run):
        return lambda *_: signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr(launch, "elastic_launch", elastic_launch)
    before = signal.signal(signal.SIGUSR1, ignore := lambda *_: None)
    try:
        with pytest.raises(Interrupted, match="stopped by SIGUSR1; the same command goes on"):
            launch.launch(None, None, launch.Processes(2))
        assert signal.getsignal(signal.SIGUSR1) is ignore
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_cores_of_a_process(monkeypatch):
    """srun may have bound a task to some cores of the machine; torchrun does not."""
    for name in ("SLURM_CPUS_PER_TASK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(96))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert distributed.cores() == 12
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "12")
    assert distributed.cores() == 12
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12))
    assert distributed.cores() == 12
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "96")  # one task, in which torchrun has started eight processes
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(96))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert distributed.cores() == 12


def test_torchrun(image_folder, tmp_path, two_processes):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr",
        "localhost",
        "--nproc_per_node",
        "2",
        TOOL,
        *arguments(image_folder, tmp_path, "SOLVER.EPOCHS", EPOCHS),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("done:") == 1 and "2 cpu x 1 accumulated x 4" in done.stdout
    assert done.stdout.count("SyncBatchNorm needs GPUs") == 1
    assert_same(final_weights(tmp_path / "run" / "model_final.pth"), final_weights(two_processes))


def slurm(rank):
    return {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_JOB_ID": str(os.getpid()),
    }


def test_tasks_of_srun_need_no_launcher(image_folder, tmp_path, two_processes):
    """The tool runs with the variables that srun sets, and gets a warning before the time limit."""

    def both():
        return [
            Program(
                tmp_path,
                "pretrain",
                *arguments(image_folder, tmp_path, "SOLVER.EPOCHS", EPOCHS),
                environment=slurm(rank),
            )
            for rank in (0, 1)
        ]

    tasks = both()
    tasks[0].wait_for(tmp_path / "run" / "metrics.jsonl", '"loss"')
    for task in tasks:
        os.kill(task.process.pid, signal.SIGUSR1)
    done = [task.finish() for task in tasks]
    assert [task.returncode for task in done] == [75, 75], done
    assert sum("saved; the same command goes on" in task.stderr for task in done) == 1
    done = [task.finish() for task in both()]
    assert [task.returncode for task in done] == [0, 0], done
    assert "goes on after step" in done[0].stdout and "recipe" not in done[1].stdout  # gloo greets in each
    assert_same(final_weights(tmp_path / "run" / "model_final.pth"), final_weights(two_processes))


@pytest.mark.parametrize(
    "nodes, per_node, first, local",
    [
        ("node[003-006,9]", "8(x4),4", "node003", "8"),
        ("gpu7", "2", "gpu7", "2"),
        ("a1,b[2-3]", "4,8(x2)", "a1", "4"),
        ("rack1-node05.local,rack2", "1(x2)", "rack1-node05.local", "1"),
    ],
)
def test_slurm_in_torchruns_words(nodes, per_node, first, local):
    environment = {
        "SLURM_STEP_NUM_TASKS": "36",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_STEP_TASKS_PER_NODE": per_node,
        "SLURM_JOB_ID": "123456",
    }
    launch.adopt_slurm(environment)
    assert environment["MASTER_ADDR"] == first and environment["LOCAL_WORLD_SIZE"] == local
    assert (environment["RANK"], environment["LOCAL_RANK"], environment["WORLD_SIZE"]) == ("9", "1", "36")
    assert 1024 < int(environment["MASTER_PORT"]) < 65536


def test_slurm_batch_script_is_one_process():
    """SLURM_NTASKS and SLURM_PROCID are set there, too, but nothing has started the other tasks."""
    environment = {"SLURM_NTASKS": "32", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}
    launch.adopt_slurm(environment)
    assert "RANK" not in environment


ARRAY = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}


@pytest.mark.parametrize(
    "status, array, requeued",
    [(75, {}, "requeue 77\n"), (75, ARRAY, "requeue 70_3\n"), (0, {}, None), (2, ARRAY, None)],
)
def test_sbatch_file_requeues_itself(tmp_path, status, array, requeued):
    for name, body in {
        "srun": f'echo "$@" > "{tmp_path}/srun.txt"; exit {status}',
        "scontrol": f'echo "$@" > "{tmp_path}/scontrol.txt"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    done = subprocess.run(
        ["bash", str(ROOT / "tools" / "job.sbatch"), "pretrain", "--epochs", "200", "--data", "a b"],
        timeout=60,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", **array},
    )
    assert done.returncode == status
    assert (
        (tmp_path / "srun.txt")
        .read_text()
        .strip()
        .endswith("python3 tools/pretrain.py --epochs 200 --data a b")
    )
    written = tmp_path / "scontrol.txt"
    assert (written.read_text() if written.is_file() else None) == requeued


def test_signal_to_the_launcher_reaches_its_processes(image_folder, tmp_path, two_processes):
    number = signal.SIGUSR1
    command = [
        "pretrain",
        *arguments(image_folder, tmp_path, "SOLVER.EPOCHS", EPOCHS),
        "--num-processes",
        "2",
    ]
    first = Program(tmp_path, *command)
    first.wait_for(tmp_path / "run" / "metrics.jsonl", '"loss"')
    os.kill(first.process.pid, number)
    stopped = first.finish()
    assert stopped.returncode == 75 and stopped.stderr.endswith(
        f"stopped by {number.name}; the same command goes on from there\n"
    ), stopped.stderr
    assert "Closing process" not in stopped.stderr
    step = torch.load(tmp_path / "run" / "checkpoint_last.pth", weights_only=True)["step"]
    assert 0 < step < 3 * EPOCHS
    cfg = tiny_cfg(image_folder, tmp_path, "SOLVER.EPOCHS", EPOCHS)
    final = launch.launch(train_loop.train, cfg, launch.Processes(2))
    assert_same(final_weights(final), final_weights(two_processes))
