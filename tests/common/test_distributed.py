"""What a process knows of itself, and what several agree on."""

import time

import pytest
import torch

from rsa_detectron2.common import distributed


@pytest.mark.parametrize(
    "capability, allowed, words",
    [
        ((9, 0), True, "float32, convolutions in TF32"),
        ((9, 0), False, "float32"),
        ((7, 5), True, "float32"),  # before Ampere there is no TF32
    ],
)
def test_precision_in_words(monkeypatch, capability, allowed, words):
    assert distributed.precision(None) == "float32"  # on a CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    assert distributed.precision(None) == words
    assert distributed.precision(torch.bfloat16) == "torch.bfloat16"


def test_a_single_process_is_asked_when_the_answer_is_read():
    asked = []
    answer = distributed.any_rank_later(lambda: bool(asked))
    asked.append(True)
    assert answer() is True


def ask(rank, folder):
    """Rank 1 joins the exchange once rank 0 has gone on from its begin."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2
    )
    begun, until = folder / "begun", time.monotonic() + 60
    while rank == 1 and not begun.is_file():
        assert time.monotonic() < until, "rank 0 waits"
        time.sleep(0.01)
    answer = distributed.any_rank_later(lambda: rank == 1)
    begun.touch()
    assert answer() is True
    assert distributed.any_rank_later(lambda: False)() is False
    torch.distributed.destroy_process_group()


def test_flags_are_exchanged_while_the_caller_works(tmp_path):
    torch.multiprocessing.spawn(ask, (tmp_path,), nprocs=2)
