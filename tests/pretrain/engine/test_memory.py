"""The global batch in micro-batches: which sizes are chosen or refused, and what does not depend on them."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from rsa_detectron2.common.errors import InputError, Interrupted
from rsa_detectron2.pretrain.data.loader import MultiStageViews
from rsa_detectron2.pretrain.engine import memory
from rsa_detectron2.pretrain.engine import trainer as train_loop
from rsa_detectron2.pretrain.engine.checkpoint import LAST
from rsa_detectron2.pretrain.method.networks import build_backbone, build_networks
from rsa_detectron2.pretrain.method.objectives import METHODS
from tests.conftest import rsa_networks, tiny_cfg


def test_share_of_a_process():
    assert memory.per_process(2048, 32) == 64
    with pytest.raises(
        InputError, match="2048 does not divide among 3 processes: use --batch-size 2046 or 2049"
    ):
        memory.per_process(2048, 3)
    with pytest.raises(InputError, match="use --batch-size 4$"):
        memory.per_process(2, 4)


@pytest.mark.parametrize("room, expected", [(1, 1), (100, 64), (256, 256), (300, 256), (10_000, 256)])
def test_largest_divisor_that_fits(room, expected):
    assert memory.resolve(0, 256, lambda: room) == expected


def test_given_size_must_divide():
    assert memory.resolve(32, 256, None) == 32
    with pytest.raises(InputError, match="48 does not divide the 256 images .* use --micro-batch 32 or 64"):
        memory.resolve(48, 256, None)
    with pytest.raises(InputError, match="use --micro-batch 256$"):
        memory.resolve(512, 256, None)


def test_activations_of_a_known_network():
    """Float32 convolutions, BatchNorm and ReLU save their inputs, whose size grows only with the batch."""
    networks = rsa_networks(build_backbone("resnet18"), 64, 16)
    before = {name: tensor.clone() for name, tensor in networks.state_dict().items()}
    small, large = (memory.activations(networks, size, None) for size in (64, 128))
    assert large == pytest.approx(4 * small, rel=0.02)  # the heads do not grow with the image
    half = memory.activations(networks, 128, torch.bfloat16)
    assert 0.4 < half / large < 0.7
    # The inputs of ResNet-18's 20 convolutions (He et al. 2016, table 1), two views, are a lower bound.
    inputs = 3 * 128**2 + 6 * 64 * 32**2 + 5 * 128 * 16**2 + 5 * 256 * 8**2 + 3 * 512 * 4**2
    assert 2 * 4 * inputs < large < 2 * 4 * inputs * 5
    assert all(torch.equal(tensor, before[name]) for name, tensor in networks.state_dict().items())


def saved_by_a_real_pass(networks, count, amp):
    """Bytes that autograd saves of ``count`` images of 32 px, counted by the addresses of real tensors."""
    sizes = {}

    def note(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    views = torch.zeros(count, 2, 3, 32, 32)
    with (
        saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=amp is not None),
    ):
        networks(views, views, 0.5)
    return sum(sizes.values())


def assert_counted_as_by_a_real_pass(amp):
    for name, method in METHODS.items():
        cfg = tiny_cfg("images", Path("folder"), "METHOD", name)
        networks = build_networks(cfg, method)
        counted = memory.activations(networks, 32, amp)
        assert not (networks.queue and networks.queue.pending)
        assert counted == saved_by_a_real_pass(networks, 3, amp) - saved_by_a_real_pass(networks, 2, amp)


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_activations_are_those_of_a_real_pass(amp):
    assert_counted_as_by_a_real_pass(amp)


def in_a_group(rank, store):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    assert_counted_as_by_a_real_pass(None)
    torch.distributed.destroy_process_group()


def test_activations_among_processes_that_gather_views(tmp_path):
    torch.multiprocessing.spawn(in_a_group, (tmp_path / "store",), nprocs=2)


@pytest.fixture
def order(monkeypatch):
    """The pairs (epoch, index) that are read, in order."""
    read, get = [], MultiStageViews.__getitem__
    monkeypatch.setattr(MultiStageViews, "__getitem__", lambda self, key: read.append(key) or get(self, key))
    return read


def test_other_accumulation_sees_the_same_samples(image_folder, tmp_path, order, stop_after, capsys):
    """The run is stopped after four steps without accumulation, then resumed with two micro-batches per
    step."""
    train_loop.train(tiny_cfg(image_folder, tmp_path / "whole"))
    whole = order.copy()
    order.clear()
    stop_after(4)
    with pytest.raises(Interrupted):
        train_loop.train(tiny_cfg(image_folder, tmp_path))
    assert "1 accumulated x 8" in capsys.readouterr().out
    train_loop.train(tiny_cfg(image_folder, tmp_path, "SOLVER.MICRO_BATCH", 4))
    said = capsys.readouterr().out
    assert "2 accumulated x 4" in said and "BatchNorm now sees 4 images at once instead of 8" in said
    assert order == whole and len(order) == 3 * 24


def test_chosen_size_is_kept_with_the_run(image_folder, tmp_path, monkeypatch, stop_after):
    """Less memory at the next start changes nothing."""
    monkeypatch.setattr(memory, "max_batch_size", lambda *_: 5)
    stop_after(2)
    with pytest.raises(Interrupted):
        train_loop.train(tiny_cfg(image_folder, tmp_path))
    monkeypatch.setattr(memory, "max_batch_size", lambda *_: 1)
    stop_after(2)
    cfg = tiny_cfg(image_folder, tmp_path)
    with pytest.raises(Interrupted):
        train_loop.train(cfg)
    assert cfg.SOLVER.MICRO_BATCH == 4
    assert torch.load(tmp_path / "run" / LAST, weights_only=True)["step"] == 4


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear ..."),
        RuntimeError("GET was unable to find an engine to execute this computation"),
    ],
)
def test_size_too_large_for_the_memory_is_one_line(image_folder, tmp_path, monkeypatch, error):
    monkeypatch.setattr(train_loop, "train_step", mock.Mock(side_effect=error))
    words = f"8 images of 32 px at once do not fit .*{str(error)[:20]}.* give --micro-batch 4"
    with pytest.raises(InputError, match=words):
        train_loop.train(tiny_cfg(image_folder, tmp_path))


def test_no_smaller_size_is_advised_than_batchnorm_takes(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        train_loop, "train_step", mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    )
    with pytest.raises(InputError, match=r"2 images of 32 px .* lower DATA.IMAGE_SIZE$"):
        train_loop.train(tiny_cfg(image_folder, tmp_path, "SOLVER.MICRO_BATCH", 2))


def test_another_error_of_cudnn_is_not_the_memorys(image_folder, tmp_path, monkeypatch):
    error = RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")
    monkeypatch.setattr(train_loop, "train_step", mock.Mock(side_effect=error))
    with pytest.raises(RuntimeError, match="EXECUTION_FAILED"):
        train_loop.train(tiny_cfg(image_folder, tmp_path))
