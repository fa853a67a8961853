"""Processes that load data. The program notices whatever happens to them, and none outlives the program.

The workers block the signals that stop a program: a scheduler sends them to all processes of a
job, and workers must live until the main process has saved. When a program ends, multiprocessing
sends its children SIGTERM and waits for them. Blocking it, the workers would never end, so the program
kills them first.
"""

import contextlib
import errno
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection
from multiprocessing.reduction import ForkingPickler
from multiprocessing.util import Finalize
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar, Union

import torch
from torch.multiprocessing import _prctl_pr_set_pdeathsig as signal_when_parent_dies
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from rsa_detectron2.common.errors import InputError, one_line
from rsa_detectron2.common.progress import say
from rsa_detectron2.common.signals import held_back

MORE_SHARED_MEMORY = "in Docker, run with --shm-size=8g or --ipc=host"

T = TypeVar("T")
Collate = Callable[[Any], Any]  # samples -> batch
Answer = Union["Parcel", Exception]  # what a worker sends


class MapStyle(Protocol):
    """A data set whose samples are read by their keys; torch's Dataset is one."""

    def __getitem__(self, key: Any, /) -> Any: ...


def load(
    dataset: MapStyle, batches: Iterable[list], num_workers: int, setting: str, collate: Collate | None = None
) -> "Loader":
    """Load ``batches`` (lists of keys) of a map-style ``dataset``; each is collated, by default into tensors.

    setting: the option or key that sets ``num_workers``, for messages. Iterating raises what the
    dataset raises. From a worker only InputError and OSError arrive as they are; any other exception, and
    the death of a worker, becomes an InputError.
    """
    collate = collate or default_collate
    return Loader(
        DataLoader(
            Batches(dataset, Sender(collate, setting)) if num_workers else dataset,
            batch_sampler=batches,
            collate_fn=as_it_is if num_workers else collate,
            num_workers=num_workers,
            worker_init_fn=prepare_worker,
            pin_memory=torch.cuda.is_available(),
        ),
        setting,
    )


class Loader:
    """Iterates a DataLoader whose workers answer with a :class:`Sender`; they end with the iteration."""

    def __init__(self, loader: DataLoader, setting: str):
        self.loader, self.setting = loader, setting
        if loader.num_workers:
            # With a fork server, Python 3.14's default, workers outlive a process that was killed.
            loader.multiprocessing_context = "fork"

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        if not self.loader.num_workers:
            yield from self.loader
            return
        workers = Workers(self.setting)
        end = Finalize(None, workers.kill, exitpriority=1)  # called below, or else when the program ends
        try:
            workers.start(self.loader)
            while (answer := workers.next()) is not None:
                yield (
                    [workers.opened(part) for part in answer]
                    if isinstance(answer, list)
                    else workers.opened(answer)
                )
        except GeneratorExit:
            workers.iterator = None  # torch ends the workers properly
            raise
        except BaseException:
            abandoned.append(workers.iterator)
            raise
        finally:
            end()


# Iterators that are kept, because torch may wait for a lock that a killed worker held if it deletes them.
abandoned = []


class Workers:
    """The worker processes of one iteration."""

    waited_for = None  # the Workers that the main thread is waiting for
    warned = False

    def __init__(self, setting: str):
        self.setting, self.processes, self.iterator = setting, [], None

    def start(self, loader: DataLoader) -> None:
        """Start to iterate the DataLoader. Raises InputError."""
        before = set(multiprocessing.active_children())
        try:
            with held_back():
                self.iterator = iter(loader)
        except OSError as error:
            # Its traceback keeps the unfinished iterator, which torch cannot take down.
            abandoned.append(error)
            fix = (
                f"/dev/shm is full: {MORE_SHARED_MEMORY}, or give {self.setting} 0"
                if error.errno == errno.ENOSPC
                else f"give {self.setting} {loader.num_workers // 2}"
            )
            raise InputError(
                f"{loader.num_workers} worker processes cannot be started ({error.strerror}): {fix}"
            ) from None
        finally:
            self.processes += set(multiprocessing.active_children()) - before
            # torch's handler raises wherever the program is; this one only where it waits for a batch.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, child_has_ended)

    def next(self) -> "Answer | list[Answer] | None":
        """The next answer, or None at the end. Raises InputError if a worker has died."""
        with self.watched():
            return next(self.iterator, None)

    def opened(self, answer: "Answer") -> Any:
        """The batch in an answer. Raises the answer if it is an exception; else as :meth:`next` does."""
        if isinstance(answer, Exception):
            raise answer
        if not answer.shared and not Workers.warned:
            Workers.warned = True
            say(
                "warning: /dev/shm is too small for a batch of images; "
                "they go through pipes, which is slower: " + MORE_SHARED_MEMORY
            )
        with self.watched():
            return answer.open()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Wraps code that waits for the workers. Raises InputError if one has died."""
        self.check()
        Workers.waited_for = self
        try:
            yield
        except InputError:
            raise
        except Exception:  # raised by torch or a connection, perhaps because a worker ended
            ended = connection.wait([process.sentinel for process in self.processes], 1)
            for process in self.processes:
                if process.sentinel in ended:
                    process.join(1)  # its files close a moment before its exit status exists
            self.check()
            raise
        finally:
            Workers.waited_for = None

    def check(self) -> None:
        """Raises InputError if a worker has died. At the end of an iteration they exit with status 0."""
        at_work = not self.iterator._shutdown
        for process in self.processes:
            if process.exitcode or at_work and process.exitcode is not None:
                raise InputError(
                    f"a worker process that loads images {self.cause(process.exitcode)}"
                ) from None

    def cause(self, status: int) -> str:
        """Why a worker ended, told from its exit status, and what to do."""
        fewer = len(self.processes) // 2
        if status == -signal.SIGKILL:
            return (
                "was killed (SIGKILL), most likely because memory ran out: close other programs, "
                f"or give {self.setting} {fewer}"
            )
        if status == -signal.SIGBUS:
            return (
                "died of SIGBUS, most likely because /dev/shm is full: "
                f"{MORE_SHARED_MEMORY}, or give {self.setting} 0"
            )
        how = f"died of {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return f"{how}: run the same command again, with {self.setting} 0 if it repeats"

    def kill(self) -> None:
        for process in self.processes:
            # A process that has ended may seem to run: the handler raised while its status was being read.
            # By now another process may have its number.
            if not connection.wait([process.sentinel], 0):
                process.kill()
        for process in self.processes:
            process.join(1)
            remove_unfinished(process.pid)


def child_has_ended(number: int, frame: FrameType | None) -> None:
    if Workers.waited_for:
        Workers.waited_for.check()


def prepare_worker(_: int) -> None:
    """Runs in each worker when it starts."""
    signal.signal(signal.SIGUSR2, lambda *_: os._exit(1))  # SIGKILL might leave a batch in /dev/shm
    signal_when_parent_dies(signal.SIGUSR2)
    for number in (signal.SIGBUS, signal.SIGSEGV, signal.SIGFPE):
        signal.signal(number, signal.SIG_DFL)  # no line by torch on stderr: the main process reports it


def remove_unfinished(pid: int) -> None:
    """Remove the shared memory that torch created in a process and could not fill.

    What it could fill has no name any more.
    """
    for path in Path("/dev/shm").glob(f"torch_{pid}_*"):
        path.unlink(missing_ok=True)


def as_it_is(batch: T) -> T:
    return batch


class Batches(Dataset):
    """Reads a list of keys of ``dataset`` at once, and gives the :class:`Sender`'s answer."""

    def __init__(self, dataset: MapStyle, sender: "Sender"):
        self.dataset, self.sender = dataset, sender

    def __getitems__(self, keys: list) -> "Answer":
        return self.sender(lambda: [self.dataset[key] for key in keys])


class Sender:
    """Runs a function that reads samples, in a worker.

    It answers with a :class:`Parcel` of the batch, or with an exception to raise in the main process.
    """

    def __init__(self, collate: Collate, setting: str):
        self.collate, self.setting = collate, setting

    def __call__(self, read: Callable[[], Any]) -> "Answer":
        try:
            return Parcel(read(), self.collate)
        except Exception as error:
            return self.portable(error)

    def portable(self, error: Exception) -> Exception:
        """``error`` in a form that another process can raise: itself, or an InputError in its place."""
        if isinstance(error, (InputError, OSError)):
            try:
                return pickle.loads(pickle.dumps(error))
            except Exception:
                pass  # its arguments do not pickle, or do not make the same exception
        if isinstance(error, MemoryError):
            fewer = get_worker_info().num_workers // 2
            return InputError(
                "a worker process that loads images ran out of memory: close other programs, "
                f"or give {self.setting} {fewer}"
            )
        return InputError(
            f"a worker process that loads images failed ({type(error).__name__}: {one_line(error)}): "
            f"the same command with {self.setting} 0 shows where"
        )


class Reader:
    """Wraps ``read`` for a DataLoader that other code makes and a :class:`Loader` iterates.

    In a worker it answers as a Sender does.
    """

    def __init__(self, read: Callable[[Any], Any], setting: str):
        self.read, self.sender = read, Sender(as_it_is, setting)

    def __call__(self, key: Any) -> Any:
        return self.sender(lambda: self.read(key)) if get_worker_info() else self.read(key)


class Parcel:
    """A batch on its way to the main process.

    It holds tensors in shared memory or, if that is full, the samples, which the main process collates.
    """

    def __init__(self, samples: Any, collate: Collate):
        try:
            self.content, self.shared = bytes(ForkingPickler.dumps(collate(samples))), True
        except RuntimeError:
            remove_unfinished(os.getpid())
            self.content, self.shared = pickle.dumps((collate, samples)), False

    def open(self) -> Any:
        if not isinstance(self.content, bytes):  # pin_memory has opened it
            return self.content
        if self.shared:
            return pickle.loads(self.content)
        collate, samples = pickle.loads(self.content)
        return collate(samples)

    def pin_memory(self) -> "Parcel":
        """For torch's thread that copies to page-locked memory."""
        self.content = tree_map_only(torch.Tensor, torch.Tensor.pin_memory, self.open())
        return self
