"""tools/check_device.py: every check passes here, and fails on a defect of its kind."""

import math
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial

import pytest
import torch

from rsa_detectron2.pretrain.engine import parallel
from rsa_detectron2.pretrain.method import augment, objectives
from rsa_detectron2.pretrain.method.networks import Branch, Networks
from rsa_detectron2.tools import check_device, pretrain
from rsa_detectron2.tools.benchmarks import options, step_timer
from rsa_detectron2.tools.benchmarks.step_timer import StepTimer
from rsa_detectron2.tools.check_device import CHECKS
from rsa_detectron2.tools.checks import numerics, runs
from rsa_detectron2.tools.checks.figure import Figure, worst

PRETRAIN = runs.pretrain
# The checks with timm's smallest ResNet.
SMALLER = [{"resnet18": "test_resnet"}.get(word, word) for word in numerics.SMALL]


@pytest.fixture(autouse=True)
def smaller(monkeypatch):
    """Smaller networks, and no process that imports torch anew."""
    monkeypatch.setattr(numerics, "SMALL", SMALLER)
    for name, value in {"backbone": "test_resnet", "size": 32, "batch_size": 4}.items():
        monkeypatch.setitem(options.CPU, name, value)
    monkeypatch.setattr(runs, "pretrain", lambda arguments: in_process(monkeypatch, arguments))
    spawn_instead(monkeypatch, smaller_half)
    yield
    torch.use_deterministic_algorithms(False)


def in_process(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["pretrain", *arguments, "DATA.NUM_WORKERS", "0"])
    pretrain.main()


def spawn_instead(monkeypatch, function):
    start = partial(torch.multiprocessing.start_processes, function, start_method="forkserver")
    monkeypatch.setattr(torch.multiprocessing, "spawn", lambda _, *args, **kwargs: start(*args, **kwargs))


def smaller_half(rank, folder):
    numerics.SMALL = SMALLER
    runs.train_half(rank, folder)


def half_alone(rank, folder):
    """One of two processes that do not exchange gradients."""
    parallel.wrap = lambda networks: networks
    smaller_half(rank, folder)


def carry_out(name):
    """(status, text) of a check, also of one that needs a GPU."""
    return check_device.carry_out(replace(CHECKS[name], without_gpu=""))


@pytest.fixture
def main(monkeypatch, capsys):
    """``main("views", ...)`` returns the exit status and the lines that are printed."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["check_device", *arguments])
        return check_device.main(), capsys.readouterr().out.splitlines()

    return call


def test_every_check_passes(main):
    status, (machine, *lines, last) = main()
    found = {words[1]: words[0] for line in lines if (words := line.split())[1:] and words[1] in CHECKS}
    assert found == {name: "-" if name in ("fp16", "waits", "memory") else "ok" for name in CHECKS}
    assert status == 0 and last == "no check failed" and torch.__version__ in machine
    assert any(line.startswith("| rsa    | EMA ") for line in lines)


def tf32(convolution, self, images, weight, bias):
    """A convolution of float32 on inputs with 10 bits of mantissa, as GPUs compute it unless told not to."""

    def rounded(x):
        short = (x.detach().view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)
        return x + (short - x).detach()

    if images.dtype == torch.float32:
        images, weight = rounded(images), rounded(weight)
    return convolution(self, images, weight, bias)


def noisy_autocast(forward, self, images):
    output = forward(self, images)
    return output * torch.randn_like(output) if torch.is_autocast_enabled("cpu") else output


@pytest.mark.parametrize(
    "check, place, name, defect, figure",
    [
        ("views", augment, "blur_matrices", lambda f, sigma, size: f(1.2 * sigma, size), "is off by"),
        ("gradients", torch.nn.Conv2d, "_conv_forward", tf32, "float32 off by"),
        ("bf16", Branch, "forward", noisy_autocast, "loss off by"),
        ("float32", Networks, "update_target", lambda *_: None, "EMA off by"),
        ("float32", objectives, "cosine", lambda f, q, z: f(q, z) * math.nan, "not finite:"),
        (
            "bf16",
            Networks,
            "end_step",
            lambda f, self, tau, skipped: f(self, tau, skipped=False),
            "changed by a skipped step:",
        ),
        ("resume", torch.optim.Optimizer, "load_state_dict", lambda *_: None, "of 1 process:"),
        ("waits", StepTimer, "count_synchronizations", lambda *_: 2, "in fp16"),
        ("memory", step_timer, "gpu_memory", lambda *_: 1e6, "over what is set aside:"),
    ],
)
def test_defect_fails(monkeypatch, check, place, name, defect, figure):
    """``defect(original, *arguments)`` replaces a function; the figure that measures it is over its limit."""
    original = getattr(place, name)
    monkeypatch.setattr(place, name, lambda *args, **kwargs: defect(original, *args, **kwargs))
    status, text = carry_out(check)
    assert status == "FAILED" and re.search(rf"{figure} [\w.+-]+ \(OVER ", text), text


def test_processes_that_do_not_exchange_gradients_fail(monkeypatch):
    spawn_instead(monkeypatch, half_alone)
    status, text = carry_out("processes")
    assert status == "FAILED" and "(OVER 1e-08)" in text, text


@pytest.mark.parametrize("check", ["waits", "memory"])
def test_checks_of_a_gpu_pass(monkeypatch, check):
    """With figures as a GPU should give them."""
    monkeypatch.setattr(StepTimer, "count_synchronizations", lambda *_: 0)
    monkeypatch.setattr(step_timer, "gpu_memory", lambda *_: 1.0)
    assert carry_out(check)[0] == "ok"


def test_an_error_fails_and_the_other_checks_go_on(monkeypatch, main):
    monkeypatch.setattr(augment, "blur_matrices", lambda *_: torch.zeros(2) @ torch.zeros(3))
    status, lines = main("views", "speed", "fp16")
    assert status == 1 and lines[-1].endswith(" checks FAILED: views, speed")
    assert lines[1].startswith("FAILED  views      RuntimeError: inconsistent tensor size")
    assert lines[-2].startswith("-       fp16       needs a GPU")


def test_worst_of_several_trials():
    def trial(value):
        return [Figure("a", value, 1), Figure("b", 0)]

    assert [figure.value for figure in worst([trial(0.5), trial(0.2)])] == [0.5, 0]
    (figure, _) = worst([trial(math.nan), trial(0.2)])
    assert math.isnan(figure.value) and not figure.passes


@pytest.mark.slow
def test_as_a_user_runs_it(tool):
    done = tool("check_device", "resume")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert re.fullmatch(r".+\nok      resume     tensors .* 0 \(limit 0\)  \[\d+ s\]\n.+\n", done.stdout)
    unknown = tool("check_device", "resumes")
    assert unknown.returncode == 2 and "no check resumes: choose among views, " in unknown.stderr


def test_interrupt_leaves_nothing(monkeypatch, tmp_path):
    """Ctrl-C while a training runs."""
    started = []

    def interrupted(process):
        started.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "pretrain", PRETRAIN)
    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        carry_out("resume")
    assert started[0].poll() == -signal.SIGTERM
    assert not list(tmp_path.iterdir())
