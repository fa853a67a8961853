"""Mixed precision against float32, and on a GPU what the CPU cannot show. On the ImageNet sample where it is at hand."""

import json
from pathlib import Path

import pytest
import torch

from pretrain import train_loop
from pretrain.config import Interrupted
from tests.conftest import assert_same, final_weights, tiny_cfg
from tests.test_resume import stop_after  # noqa: F401  (a fixture)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenet_sample" / "train"
SHORT = ("DATA.IMAGE_SIZE", 64, "MODEL.BACKBONE", "resnet18", "SOLVER.BATCH_SIZE", 24, "SOLVER.MICRO_BATCH", 12,
         "SOLVER.BASE_LR", 0.1, "SOLVER.EPOCHS", 4, "SOLVER.WARMUP_EPOCHS", 0)


def run(image_folder, folder, *overrides):
    """(final file, losses of the steps) of a short run with accumulation."""
    cfg = tiny_cfg(SAMPLE if SAMPLE.is_dir() else image_folder, folder, *SHORT, *overrides)
    final = train_loop.train(cfg)
    rows = map(json.loads, Path(cfg.OUTPUT_DIR, "metrics.jsonl").read_text().splitlines())
    return final, torch.tensor([row["loss"] for row in rows if "loss" in row])


@pytest.mark.parametrize("amp", ["bf16", pytest.param("fp16", marks=needs_gpu)])
def test_mixed_precision_agrees_with_float32(image_folder, tmp_path, amp):
    _, losses = run(image_folder, tmp_path / "float32")
    _, mixed = run(image_folder, tmp_path / amp, "SOLVER.AMP", amp)
    assert (mixed - losses)[:10].abs().max() <= 0.01 * losses.abs().max()  # later, rounding has led two runs apart
    assert mixed.mean() == pytest.approx(losses.mean(), rel=0.01)


@needs_gpu
def test_deterministic_kernels_resume_bit_for_bit(image_folder, tmp_path, stop_after):  # noqa: F811
    options = ("SOLVER.DETERMINISTIC", True, "SOLVER.AMP", "fp16")
    whole, _ = run(image_folder, tmp_path / "whole", *options)
    stop_after(2)
    with pytest.raises(Interrupted):
        run(image_folder, tmp_path, *options)
    final, _ = run(image_folder, tmp_path, *options)
    assert_same(final_weights(final), final_weights(whole))
