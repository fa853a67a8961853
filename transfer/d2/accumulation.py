"""An iteration of several forward and backward passes and one optimizer step."""

import contextlib
import time
from collections.abc import Iterable

import detectron2.utils.comm as comm
import torch
from detectron2.engine import SimpleTrainer
from torch.nn.parallel import DistributedDataParallel

from rsa_detectron2.transfer.d2.data import seed_of


class AccumulatingTrainer(SimpleTrainer):
    """SimpleTrainer whose iteration is ``accumulate`` forward and backward passes and one optimizer step.

    ``data_loader`` gives the images of one pass, each time the same number. BatchNorm sees only those; the
    gradient is the mean over the passes, as it is over GPUs. amp: float16 on a GPU, with one gradient
    scaler for all passes. seed: of all that a pass draws, if it is not negative.
    """

    seed = -1

    def __init__(
        self,
        model: torch.nn.Module,
        data_loader: Iterable[list[dict]],
        optimizer: torch.optim.Optimizer,
        accumulate: int = 1,
        amp: bool = False,
    ):
        super().__init__(model, data_loader, optimizer)
        self.accumulate, self.amp = accumulate, amp
        self.grad_scaler = torch.amp.GradScaler("cuda", enabled=amp)

    def run_step(self) -> None:
        self.optimizer.zero_grad()
        losses, data_time = {}, 0
        for n in range(1, self.accumulate + 1):
            start = time.perf_counter()
            images = next(self._data_loader_iter)
            data_time += time.perf_counter() - start
            if self.seed >= 0:
                # Of the samples among anchors and proposals: a resumed run must draw the same.
                torch.manual_seed(seed_of(self.seed, comm.get_rank(), self.iter, n))
            distributed = isinstance(self.model, DistributedDataParallel)
            with self.model.no_sync() if distributed and n < self.accumulate else contextlib.nullcontext():
                with torch.autocast("cuda", torch.float16, enabled=self.amp):
                    part = {name: loss / self.accumulate for name, loss in self.model(images).items()}
                self.grad_scaler.scale(sum(part.values())).backward()
            for name, loss in part.items():
                losses[name] = losses.get(name, 0) + loss.detach()
        self._write_metrics(losses, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self) -> dict:
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        if self.amp and state_dict["grad_scaler"]:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
