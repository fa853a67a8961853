"""Processes that load data: however one fails, the program ends with one line and leaves nothing behind."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm

from rsa_detectron2.common import workers
from rsa_detectron2.common.cli import run
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.common.signals import STOP_SIGNALS, StopSignals, stop_signals
from rsa_detectron2.pretrain.data.images import UnreadableImage
from rsa_detectron2.tools import prepare_data
from tests.conftest import ROOT, TINY, processes

BATCHES = [[0, 1], [2, 3], [4, 5], [6, 7]]


class Samples(torch.utils.data.Dataset):
    """Sample ``key`` is a tensor of that number; key 5 calls ``fail()`` instead."""

    def __init__(self, fail=lambda: None, size=3):
        self.fail, self.size = fail, size

    def __getitem__(self, key):
        if key == 5:
            self.fail()
        return torch.full((self.size,), key)


class Unpicklable(Exception):
    def __init__(self, what, file):
        super().__init__(f"{what} is odd")
        self.file = file


def raises(error):
    def fail():
        raise error

    return fail


def dies_of(number):
    return lambda: os.kill(os.getpid(), number)


WORKER = "^a worker process that loads images "
FAILURES = {
    "own": (raises(UnreadableImage("a.jpg cannot be decoded")), UnreadableImage, "^a.jpg cannot be decoded$"),
    "source": (
        raises(OSError(errno.EIO, "Input/output error", "a.jpg")),
        OSError,
        "Input/output error: 'a.jpg'$",
    ),
    "disk": (
        raises(OSError(errno.ENOSPC, "No space left on device", "b")),
        OSError,
        "No space left on device: 'b'$",
    ),
    "memory": (raises(MemoryError()), InputError, WORKER + "ran out of memory: .* give --workers {fewer}$"),
    "bug": (
        raises(KeyError("label")),
        InputError,
        WORKER + r"failed \(KeyError: 'label'\): .* --workers 0 shows where$",
    ),
    "unpicklable": (
        lambda: raises(Unpicklable("a.jpg", open(os.devnull)))(),
        InputError,
        WORKER + r"failed \(Unpicklable: a.jpg is odd\)",
    ),
    "killed": (
        dies_of(signal.SIGKILL),
        InputError,
        WORKER + r"was killed \(SIGKILL\), .* memory .* --workers {fewer}$",
    ),
    "bus error": (
        dies_of(signal.SIGBUS),
        InputError,
        WORKER + "died of SIGBUS, .* --shm-size=8g .* --workers 0$",
    ),
    "segmentation fault": (
        dies_of(signal.SIGSEGV),
        InputError,
        WORKER + "died of SIGSEGV: run the same command again",
    ),
    "exit": (lambda: os._exit(3), InputError, WORKER + "ended with status 3: .* --workers 0 if it repeats$"),
    "exit in peace": (lambda: os._exit(0), InputError, WORKER + "ended with status 0: "),
}


def living_workers():
    """The living workers of this process. multiprocessing may count one whose status was lost: see
    Workers.kill."""
    children = multiprocessing.active_children()
    return [c for c in children if c.name.startswith("ForkProcess") and not is_gone(c.pid, 0)]


def no_child_is_left():
    return not living_workers()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("fail, kind, message", FAILURES.values(), ids=FAILURES)
def test_failure_of_a_worker_is_one_exception(fail, kind, message, count, capfd):
    received = []
    with pytest.raises(kind, match=message.format(fewer=count // 2)) as error:
        for batch in workers.load(Samples(fail), BATCHES, count, "--workers"):
            received.append(batch.tolist())
    assert "\n" not in str(error.value)
    assert received == [[[0] * 3, [1] * 3], [[2] * 3, [3] * 3]][: len(received)]
    assert no_child_is_left() and capfd.readouterr().err == ""


def test_worker_that_dies_while_the_program_is_elsewhere():
    """No line of the program may be interrupted: it gets the error when it asks for the next batch."""
    batches = iter(workers.load(Samples(), [[i] for i in range(200)], 2, "--workers"))
    next(batches)
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
        time.sleep(0)  # a handler would run now
    with pytest.raises(InputError, match=WORKER + r"was killed \(SIGKILL\)"):
        list(batches)


def test_workers_live_through_the_stop_signals():
    """A scheduler sends these signals to all processes of a job."""
    batches = iter(workers.load(Samples(), [[i] for i in range(50)], 2, "--workers"))
    received = [next(batches)]
    started = living_workers()
    assert len(started) == 2
    for child in started:
        for number in STOP_SIGNALS:
            os.kill(child.pid, number)
    received += batches
    assert [batch[0, 0].item() for batch in received] == list(range(50))


def test_stopped_iteration_ends_its_workers():
    batches = iter(workers.load(Samples(), [[i] for i in range(50)], 2, "--workers"))
    next(batches)
    batches.close()
    assert no_child_is_left()


held = []  # keeps the iteration alive until the program ends


def leave_amid_an_iteration(pids):
    """Leave an iteration while its workers sleep."""
    batches = iter(workers.load(Samples(lambda: time.sleep(1000)), [[0], [5], [5]], 2, "--workers"))
    held.append(batches)
    next(batches)
    for child in multiprocessing.active_children():
        pids.put(child.pid)
    raise SystemExit(3)


def wait_for_another_end(pids):
    batches = iter(workers.load(Samples(lambda: time.sleep(1000)), [[0], [5], [5]], 2, "--workers"))
    next(batches)
    for child in multiprocessing.active_children():
        pids.put(child.pid)
    time.sleep(1000)


def is_gone(pid, seconds=60):
    until = time.monotonic() + seconds
    while True:
        try:
            if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except OSError:
            return True
        if time.monotonic() >= until:
            return False
        time.sleep(0.01)


@pytest.mark.parametrize(
    "program, status", [(leave_amid_an_iteration, 3), (wait_for_another_end, -signal.SIGKILL)]
)
def test_workers_end_with_the_program(program, status):
    """They end when the program leaves with an error, even if something still holds the iteration, and when
    it is killed."""
    pids = processes.Queue()
    process = processes.Process(target=program, args=(pids,))
    process.start()
    children = [pids.get(timeout=120) for _ in range(2)]
    if status < 0:
        process.kill()
    process.join(60)
    hangs = process.is_alive()
    process.kill()
    gone = [is_gone(pid) for pid in children]
    for pid, ended in zip(children, gone):
        if not ended:
            os.kill(pid, signal.SIGKILL)
    assert not hangs and process.exitcode == status and all(gone)


def test_without_room_in_shared_memory_batches_take_another_way(monkeypatch, capfd):
    """torch raises RuntimeError, as it does when /dev/shm is full."""
    whole = list(workers.load(Samples(size=1000), BATCHES, 2, "--workers"))
    monkeypatch.setattr(workers.Workers, "warned", False)
    no_room = raises(RuntimeError("unable to allocate shared memory(shm)"))
    monkeypatch.setattr(workers, "ForkingPickler", SimpleNamespace(dumps=lambda _: no_room()))
    again = list(workers.load(Samples(size=1000), BATCHES, 2, "--workers"))
    assert len(again) == 4 and all(map(torch.equal, whole, again))
    assert capfd.readouterr().err.count("warning: /dev/shm is too small for a batch") == 1


SMALL = """
import os, torch, common.workers as workers
from tests.common.test_workers import Samples, BATCHES
from rsa_detectron2.common.cli import run
def main():
    for batch in workers.load(Samples(size=100_000), BATCHES, 2, "--workers"):
        print(batch[:, 0].tolist(), flush=True)
    print(os.listdir("/dev/shm"))
run(main)
"""


@pytest.mark.parametrize("size, status", [("256k", 0), ("4k", 2)])
def test_a_small_dev_shm(size, status):
    """The first size holds the semaphores of a loader, but no batch of 1.6 MB; the second holds nothing."""
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no mounts of one's own here")
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount + ' && exec "$0" "$@"', sys.executable, "-c", SMALL],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == status, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and "--shm-size=8g" in lines[0]
    if status == 0:
        assert done.stdout.splitlines() == [*map(str, BATCHES), "[]"] and lines[0].startswith("warning: ")
    else:
        assert lines[0].startswith(
            "error: 2 worker processes cannot be started (No space left on device): /dev/shm is full"
        )


def test_error_begins_below_the_progress_bar(capsys):
    def main():
        for _ in tqdm(range(3), "evaluating", file=sys.stderr):
            raise UnreadableImage("a.jpg\ncannot be decoded")

    with pytest.raises(SystemExit) as left:
        run(main)
    printed = capsys.readouterr().err
    assert (
        left.value.code == 2
        and printed.endswith("\nerror: a.jpg cannot be decoded\n")
        and printed.count("\n") == 2
    )


def test_memory_error_is_one_line(capsys):
    with pytest.raises(SystemExit) as left:
        run(raises(MemoryError()))
    assert left.value.code == 2 and capsys.readouterr().err == "error: out of memory\n"


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_each_stop_signal_asks_to_stop(number):
    with StopSignals() as stop:
        stop.stepping = True
        signal.raise_signal(number)
        assert stop.asked


def test_nohup_keeps_its_signal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            stop.stepping = True
            signal.raise_signal(signal.SIGHUP)
            assert not stop.asked and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert set(STOP_SIGNALS) - set(stop_signals()) == {signal.SIGHUP}
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_preparation_on_a_full_disk_goes_on_later(image_folder, tmp_path, monkeypatch, count):
    out = tmp_path / "out"
    command = ["prepare_data.py", str(image_folder), str(out), "--size", "32", "--workers", str(count)]
    monkeypatch.setattr(sys, "argv", command)
    write = Path.write_bytes

    def on_a_full_disk(path, data):
        if path.name.startswith("09."):
            write(path, bytes(data)[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", on_a_full_disk)
        with pytest.raises(
            InputError, match=r"09\.jpg cannot be written \(No space left on device\): make room, then run"
        ):
            prepare_data.main()
    assert not list(out.rglob("09*"))
    prepare_data.main()
    assert len([path for path in out.rglob("*.*g") if path.stat().st_size]) == 24


@pytest.fixture(scope="module")
def undecodable(tmp_path_factory):
    """A folder train/ with two classes, in which no image can be decoded."""
    folder = tmp_path_factory.mktemp("undecodable") / "train"
    for i in range(24):
        path = folder / "ab"[i % 2] / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no image")
    return folder


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_training_on_a_folder_where_nothing_decodes_ends(undecodable, tmp_path, count):
    """The tool runs as a program, as a user starts it, because its exit once hung."""
    command = [
        sys.executable,
        ROOT / "tools" / "pretrain.py",
        "--data",
        undecodable,
        "--output-dir",
        tmp_path,
        *TINY,
        "--workers",
        "1",
        "--num-processes",
        str(count),
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    lines = [
        line
        for line in done.stderr.splitlines()
        if not line.startswith(("pre-training:", "\rpre-training:")) and line
    ]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert lines[0].startswith("error: 24 images in a row cannot be decoded, ")
