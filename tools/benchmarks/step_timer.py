"""Training steps of one method, timed by their parts."""

import itertools
import time
import warnings
from collections.abc import Callable, Iterator

import torch
from fvcore.common.config import CfgNode

from rsa_detectron2.common.distributed import amp_dtype, device
from rsa_detectron2.pretrain.engine.step import TrainState, normalized_views, train_step
from rsa_detectron2.pretrain.method.augment import Output
from rsa_detectron2.pretrain.method.networks import build_networks
from rsa_detectron2.pretrain.method.objectives import METHODS
from rsa_detectron2.pretrain.method.optim import build_optimizer, set_lr
from rsa_detectron2.tools.benchmarks.augment import synthetic_views
from rsa_detectron2.tools.benchmarks.timing import device_clock
from rsa_detectron2.tools.benchmarks.traffic import Traffic, TrafficCounter

PARTS = ("data wait", "aggressive stage", "forward target", "forward online", "backward", "optimizer", "EMA")
BETA, TAU = 0.2, 0.99
WARM_UP = 3  # steps in which cuDNN chooses its algorithms and torch.compile compiles


class StepTimer:
    """A method's networks and optimizer, with hooks that time the parts of a training step."""

    def __init__(self, cfg: CfgNode, method: str, compiled: bool = False) -> None:
        self.memory_before = gpu_memory(torch.cuda.memory_allocated)
        self.peak = None  # MiB
        self.cfg = cfg.clone()
        self.cfg.METHOD = method
        self.label = f"{method}, compiled" if compiled else method
        amp = amp_dtype(cfg.SOLVER.AMP)
        torch.manual_seed(0)
        self.networks = build_networks(self.cfg, METHODS[method]).to(device()).train()
        if compiled:
            self.networks.compile_backbones()
        optimizer = build_optimizer(self.networks, cfg.SOLVER, METHODS[method].fix_predictor_lr)
        set_lr(optimizer, 0.01, 0.01)
        scaler = torch.amp.GradScaler(
            device().type,
            init_scale=1024.0,  # low enough that no step is skipped
            enabled=amp == torch.float16,
        )
        self.state = TrainState(self.networks, optimizer, scaler, amp)
        mean, std = (torch.tensor(values, device=device()) for values in (cfg.DATA.MEAN, cfg.DATA.STD))
        self.output = Output(mean, std, amp or torch.float32)
        self.weak, self.compiled = METHODS[method].weak, compiled
        self.marks, self.counter = [], None
        self.add_hooks()

    def add_hooks(self) -> None:
        """Mark where each part ends. The arguments of the hooks are not used."""
        target = self.networks.target
        if target is not None:
            target.register_forward_pre_hook(lambda *_: self.mark("forward online"))
            target.register_forward_hook(lambda *_: self.mark("forward target"))
        self.networks.register_forward_hook(lambda *_: self.mark("forward online"))
        self.state.optimizer.register_step_pre_hook(lambda *_: self.mark("backward"))
        self.state.optimizer.register_step_post_hook(lambda *_: self.mark("optimizer"))

    def mark(self, part: str | None) -> None:
        """Note the time: ``part`` has run since the last mark."""
        if self.counter:
            self.counter.end_part(part)
            return
        if device().type == "cuda":
            point = torch.cuda.Event(enable_timing=True)
            point.record()
        else:
            point = time.perf_counter()
        self.marks.append((part, point))

    def warm_up(self) -> None:
        """Run some steps that are not timed, and measure the peak of memory."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.run(synthetic_batches(self.cfg), WARM_UP)
        self.peak = gpu_memory(torch.cuda.max_memory_allocated, self.memory_before)

    def run(self, batches: Iterator[dict], steps: int) -> dict[str, float]:
        """Milliseconds per step over ``steps`` steps: {part: ms}, and their sum as "ms"."""
        self.marks = []
        self.mark(None)
        for _ in range(steps):
            self.step(batches)
            self.mark("EMA")
        device_clock()
        parts = dict.fromkeys(PARTS, 0.0)
        for (_, before), (part, after) in zip(self.marks, self.marks[1:]):
            parts[part] += milliseconds(before, after) / steps
        return {"ms": sum(parts.values()), **parts}

    def count_traffic(self, batches: Iterator[dict]) -> dict[str, Traffic]:
        """What the operators of each part of a step move."""
        with TrafficCounter(device().type) as self.counter:
            self.step(batches)
            self.mark("EMA")
        parts, self.counter = self.counter.parts, None
        return parts

    def count_synchronizations(self, batches: Iterator[dict]) -> int:
        """How often a step waits for the GPU."""
        device_clock()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.step(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(warning.message) for warning in caught)

    def step(self, batches: Iterator[dict]) -> dict[str, torch.Tensor]:
        """One step; returns the figures of the objective."""
        return train_step(self.state, self.views(batches), 1, beta=BETA, tau=TAU)

    def views(self, batches: Iterator[dict]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The one micro-batch of a step: normalized weak and aggressive views."""
        self.mark("optimizer")  # it has cleared the gradients
        batch = next(batches)
        self.mark("data wait")
        views = normalized_views(batch, self.output, self.weak)
        self.mark("aggressive stage")
        yield views


def milliseconds(before: float | torch.cuda.Event, after: float | torch.cuda.Event) -> float:
    """Milliseconds between two marks, which are events of the GPU, or seconds."""
    if device().type == "cuda":
        return before.elapsed_time(after)
    return 1000 * (after - before)


def gpu_memory(read: Callable[[], int], before: float | None = None) -> float | None:
    """MiB that ``read`` reports beyond ``before``; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    return read() / 2**20 - (before or 0)


def synthetic_batches(cfg: CfgNode) -> Iterator[dict]:
    """The same batch of noise again and again, on the device."""
    views, params = synthetic_views(cfg.SOLVER.BATCH_SIZE, cfg.DATA.IMAGE_SIZE)
    return itertools.repeat({"views": views.to(device()), "params": params})
