"""One optimizer step over the micro-batches of a process, and how its images reach the device."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from rsa_detectron2.pretrain.method import augment
from rsa_detectron2.pretrain.method.networks import Networks


@dataclass
class TrainState:
    """What a step changes, and the precision that it computes in."""

    model: nn.Module  # Networks, or its DistributedDataParallel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    amp: torch.dtype | None  # of autocast; None: float32
    skipped: int = 0  # steps that the scaler has skipped since the last reading of scaling()

    @property
    def networks(self) -> Networks:
        return getattr(self.model, "module", self.model)

    def scaling(self) -> dict[str, float]:
        """``loss_scale`` and ``skipped_steps`` since the last call; empty where losses are not scaled.

        On a GPU, it waits for the steps before.
        """
        if not self.scaler.is_enabled():
            return {}
        skipped, self.skipped = self.skipped, 0
        return {"loss_scale": self.scaler.get_scale(), "skipped_steps": skipped}


def train_step(
    state: TrainState, micro_batches: Iterable, count: int, beta: float, tau: float
) -> dict[str, torch.Tensor]:
    """One optimizer step on ``count`` micro-batches; returns the objective's figures, averaged over them.

    A micro-batch is (weak, aggressive): normalized views, [B, 2, 3, S, S] each, or None for the weak views of
    a method without. Processes exchange gradients after the last micro-batch only. A step that the scaler
    skips, because a gradient overflowed, leaves the target untouched as well.
    """
    networks, model, optimizer, scaler = state.networks, state.model, state.optimizer, state.scaler
    figures = {}
    optimizer.zero_grad(set_to_none=True)
    for i, (weak, aggressive) in enumerate(micro_batches, start=1):
        last = i == count
        with contextlib.nullcontext() if last or model is networks else model.no_sync():
            with torch.autocast(
                aggressive.device.type, state.amp or torch.bfloat16, enabled=state.amp is not None
            ):
                part = model(weak, aggressive, beta)
            scaler.scale(part["loss"] / count).backward()
        for name, value in part.items():
            figures[name] = figures.get(name, 0) + value.detach() / count
    stepped = []
    # A hook tells whether the scaler skipped the step. Comparing its scales would synchronize with the GPU.
    hook = optimizer.register_step_post_hook(lambda *_: stepped.append(True))
    scaler.step(optimizer)
    hook.remove()
    scaler.update()
    state.skipped += not stepped
    networks.end_step(tau, skipped=not stepped)
    return figures


def normalized_views(
    batch: dict, output: augment.Output, weak: bool = True
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The weak and the aggressive views of a micro-batch, [B, 2, 3, S, S] each, as ``output`` says, on the
    device that its ``views`` are on. Without ``weak``, which not all methods use, None stands for the former.
    """
    views = batch["views"]
    return augment.weak(views, output) if weak else None, augment.aggressive(views, batch["params"], output)


def prefetch(loader: Iterable[dict], device: torch.device) -> Iterator[dict]:
    """The loader's batches, with contiguous ``views`` on the device.

    On a GPU, a side stream copies the next batch while a step runs.
    """
    if device.type == "cpu":
        yield from ({**batch, "views": batch["views"].contiguous()} for batch in loader)
        return
    stream, compute = torch.cuda.Stream(), torch.cuda.current_stream()
    batches = iter(loader)
    batch = _copy_next(batches, device, stream)
    while batch:
        compute.wait_stream(stream)
        # Its memory belongs to the side stream, which must not reuse it while the step still reads it.
        batch["views"].record_stream(compute)
        following = _copy_next(batches, device, stream)
        yield batch
        batch = following


def _copy_next(batches, device, stream):
    """The next batch, whose views ``stream`` copies to the device; None after the last one."""
    batch = next(batches, None)
    if batch:
        with torch.cuda.stream(stream):
            batch["views"] = batch["views"].to(device, non_blocking=True).contiguous()
    return batch
