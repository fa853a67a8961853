"""Two gloo processes under torchrun: the same tool joins them, and they learn one model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, TINY, tiny_cfg

def test_launcher_hands_on_what_a_process_raised(image_folder, tmp_path):
    """Two processes started by this one, without torchrun; a worker's InputError stays one."""
    from pretrain import distributed, train_loop
    from pretrain.config import InputError

    with pytest.raises(InputError, match="global batch of 9 does not divide among 2 processes: use 8"):
        distributed.launch(train_loop.train, tiny_cfg(image_folder, tmp_path, "SOLVER.BATCH_SIZE", 9), processes=2)


def test_two_processes_train_one_model(image_folder, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(ROOT / "tools" / "pretrain.py"), "--data", str(image_folder), "--output-dir", str(tmp_path / "run"),
               *TINY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("done:") == 1 and "4 x 2 on cpu" in done.stdout
    final = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)
    assert final["step"] == 9
    rows = [json.loads(line) for line in Path(tmp_path, "run", "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 10))
