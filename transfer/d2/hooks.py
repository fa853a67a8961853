"""Hooks of the training loop: precise BatchNorm over all ranks, and a progress bar."""

import itertools
import sys

from detectron2.engine import HookBase, hooks
from detectron2.utils.events import EventStorage
from tqdm import tqdm

from rsa_detectron2.transfer.precise_bn import update_statistics


class PreciseBN(hooks.PreciseBN):
    """Precise BatchNorm over the images of all ranks. By Detectron2's hook each rank has its own
    statistics."""

    def update_stats(self) -> None:
        if self._data_iter is None:
            self._data_iter = iter(self._data_loader)
        with EventStorage():  # the layers log here, not into the training's storage
            update_statistics(self._model, itertools.islice(self._data_iter, self._num_iter))


class ProgressBar(HookBase):
    """Iterations done, loss and time left, beside Detectron2's own lines."""

    bar = None

    def before_train(self) -> None:
        self.bar = tqdm(
            total=self.trainer.max_iter,
            initial=self.trainer.start_iter,
            desc="fine-tuning",
            unit="it",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 10,
        )

    def after_step(self) -> None:
        losses = self.trainer.storage.histories().get("total_loss")
        if losses:
            self.bar.set_postfix(loss=f"{losses.median(20):.3f}", refresh=False)
        self.bar.update()

    def after_train(self) -> None:
        if self.bar is not None:  # None when another hook failed before training began
            self.bar.close()
