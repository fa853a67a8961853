"""The rows of figures of a training: a file of JSON lines, and the loggers of the key LOGGERS."""

import importlib.util
import json
import math
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from fvcore.common.config import CfgNode

from rsa_detectron2.common.errors import InputError, Interrupted, one_line
from rsa_detectron2.common.files import write_atomically
from rsa_detectron2.common.progress import say
from rsa_detectron2.common.record import flatten

if TYPE_CHECKING:
    import numpy as np

Figures = dict[str, float]
PROJECT = "rsa-detectron2"  # in Weights & Biases
WANDB_ID = "wandb_id.txt"  # which run of Weights & Biases goes on with the training in this folder


class TensorBoard:
    """Event files in OUTPUT_DIR. Their readers drop the steps after ``last`` from the files before."""

    install = "pip install tensorboard"

    def __init__(self, cfg: CfgNode, step: str, last: int | None):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except Exception as error:  # its libraries may not fit each other
            raise InputError(
                f"TensorBoard does not start ({one_line(error)}): {self.install}, or give LOGGERS '()'"
            ) from None

        self.writer = SummaryWriter(cfg.OUTPUT_DIR, purge_step=0 if last is None else last + 1)

    def write(self, step: int, figures: Figures) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a killed run must not lose the steps before its checkpoint

    def draw(self, step: int, name: str, image: "np.ndarray") -> None:
        self.writer.add_image(name, image, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases. It goes on where the training goes on.

    The steps are a figure of their own, because wandb drops rows whose step is lower than its last: it would
    not take the steps that are made again after a kill. wandb's environment variables choose the mode, the
    project and all else.
    """

    install = "pip install -e '.[wandb]'"

    def __init__(self, cfg: CfgNode, step: str, last: int | None):
        # Without it, a run whose network has gone would wait for it at its end, without limit.
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "300")
        folder = Path(cfg.OUTPUT_DIR)
        path = folder / WANDB_ID
        run_id = path.read_text() if last is not None and path.is_file() else secrets.token_hex(4)
        try:
            import wandb

            self.run = wandb.init(
                dir=folder,
                id=run_id,
                resume="allow",
                reinit="finish_previous",
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=os.environ.get("WANDB_NAME", folder.resolve().name),
                config=flatten(cfg),
            )
            self.run.define_metric("*", step_metric=step)
        except Exception as error:  # of many kinds: no key, no network, libraries that do not fit
            raise InputError(
                f"wandb does not start ({one_line(error)}): run `wandb login`, or set WANDB_MODE=offline and "
                "upload later with `wandb sync`"
            ) from None
        self.step, self.image = step, wandb.Image
        write_atomically(path, lambda file: file.write(run_id.encode()))

    def write(self, step: int, figures: Figures) -> None:
        self.run.log({self.step: step, **figures})

    def draw(self, step: int, name: str, image: "np.ndarray") -> None:
        self.run.log({self.step: step, name: self.image(image.transpose(1, 2, 0))})

    def close(self) -> None:
        self.run.finish()


LOGGERS = {"tensorboard": TensorBoard, "wandb": WandB}


def problem(names: Sequence[str]) -> str:
    """What is wrong with a value of LOGGERS; "" where it is right."""
    for name in names:
        if name not in LOGGERS:
            return f"{name!r} is none of {', '.join(LOGGERS)}"
        library = importlib.util.find_spec(name)
        if library is None or library.origin is None:  # without origin, it is only a folder of that name
            return f"{name} is not installed: {LOGGERS[name].install}, or leave it out"
    return ""


def check(cfg: CfgNode) -> None:
    """Raises InputError for a value of LOGGERS that cannot be used."""
    if found := problem(cfg.LOGGERS):
        raise InputError(f"LOGGERS is {cfg.LOGGERS!r}: {found}")


class Rows:
    """Writes rows to the file ``name`` in OUTPUT_DIR, under the key ``step``, and to all of LOGGERS.

    last: the last step of the checkpoint that the training goes on from; None where it begins. Rows of later
    steps, which a killed process has left in the file, are dropped, because those steps are made again. Where
    a disk is full or a connection lost, rows are lost, not the run. Raises InputError if a logger does not
    start.
    """

    def __init__(self, cfg: CfgNode, name: str, step: str, last: int | None):
        path, self.step = Path(cfg.OUTPUT_DIR, name), step
        lines = path.read_text().splitlines(keepends=True) if path.is_file() and last is not None else []
        steps = [self._step(line) for line in lines]
        kept = [line for line, i in zip(lines, steps) if i <= last]
        # A training that goes on may evaluate after step ``last`` again.
        self.written = {
            (last, name) for line, i in zip(lines, steps) if i == last for name in json.loads(line)
        }
        self.loggers = [LOGGERS[name](cfg, step, last) for name in dict.fromkeys(cfg.LOGGERS)]
        write_atomically(path, lambda file: file.writelines(line.encode() for line in kept))
        self.file = open(path, "a", buffering=1)
        self.warned = False

    def write(self, step: int, figures: dict[str, float | None]) -> None:
        """Write a row, without what is there already. Loggers get no figure that is None."""
        new = {name: value for name, value in figures.items() if (step, name) not in self.written}
        if not new:
            return
        numbers = {name: value for name, value in new.items() if value is not None}
        self._try(lambda: self.file.write(json.dumps({self.step: step, **new}) + "\n"))
        for logger in self.loggers:
            self._try(lambda logger=logger: logger.write(step, numbers))

    def draw(self, step: int, name: str, image: "np.ndarray") -> None:
        """Give the loggers an image: uint8 [3, H, W] RGB."""
        for logger in self.loggers:
            self._try(lambda logger=logger: logger.draw(step, name, image))

    def close(self) -> None:
        for part in (*self.loggers, self.file):
            self._try(part.close)

    def _try(self, work):
        """Do it. The first failure is printed, and none ends the run."""
        try:
            work()
        except Exception as error:  # a full disk, or what a library makes of a lost connection
            if not self.warned:
                reason = getattr(error, "strerror", None) or one_line(error)
                say(f"warning: cannot write metrics ({reason}); the run goes on without them")
            self.warned = True

    def _step(self, line):
        """The step of a line; infinite for one that a kill or a full disk cut short."""
        try:
            return json.loads(line)[self.step] if line.endswith("\n") else math.inf
        except (ValueError, TypeError, KeyError):
            return math.inf

    def __enter__(self) -> "Rows":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # After an error wandb closes its run itself, as failed. A signal is none.
        if kind is None or issubclass(kind, Interrupted) or not issubclass(kind, Exception):
            self.close()
