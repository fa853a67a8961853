"""Processes that load data. Whatever happens to one, the program learns of it; and none outlives the program.

The workers hold back the signals that stop a program: a scheduler sends them to all processes of a
job, and workers must live until the main process has saved. When a program ends, multiprocessing
sends its children SIGTERM and waits for them, here for ever. So they are killed before that.
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
Answer = Union["Parcel", Exception]  # of a worker


class MapStyle(Protocol):
    """A data set whose samples are read by their keys; torch's Dataset is one."""

    def __getitem__(self, key: Any, /) -> Any: ...


def load(
    dataset: MapStyle, batches: Iterable[list], num_workers: int, setting: str, collate: Collate | None = None
) -> "Loader":
    """The ``batches`` (lists of keys) of a map-style ``dataset``, each collated, by default into tensors.

    setting: the option or key that sets ``num_workers``, for messages. Iterating raises what the
    dataset raises. In a worker these are InputError and OSError; any other exception, or the death
    of a worker, becomes an InputError.
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
            # Workers of a fork server, Python 3.14's default, outlive a process that was killed.
            multiprocessing_context="fork" if num_workers else None,
        ),
        setting,
    )


class Loader:
    """Iterates a DataLoader whose workers answer with a :class:`Sender`; they end with the iteration."""

    def __init__(self, loader: DataLoader, setting: str):
        self.loader, self.setting = loader, setting

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        if not self.loader.num_workers:
            yield from self.loader
            return
        workers = Workers(self.setting)
        end = Finalize(None, workers.kill, exitpriority=1)  # called here, or else when the program ends
        try:
            workers.start(self.loader)
            while (answer := workers.next()) is not None:
                yield (
                    [workers.opened(part) for part in answer]
                    if isinstance(answer, list)
                    else workers.opened(answer)
                )
        except GeneratorExit:
            workers.iterator = None  # torch ends the workers in order
            raise
        except BaseException:
            abandoned.append(workers.iterator)
            raise
        finally:
            end()


# To take down its iterator, torch may wait for a lock that a killed worker held. So it is left as it is.
abandoned = []


class Workers:
    """The worker processes of one iteration."""

    waited_for = None  # the Workers of which the main thread awaits something
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
            abandoned.append(error)  # with what there is of the iterator, which torch could not take down
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
            # torch's handler raises wherever the program is; this one where it waits for a batch.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, child_has_ended)

    def next(self) -> "Answer | list[Answer] | None":
        """The next answer, or None at the end. Raises InputError if a worker has died."""
        with self.watched():
            return next(self.iterator, None)

    def opened(self, answer: "Answer") -> Any:
        """What a :class:`Sender` made, in this process. Raises the exception that it is, or as
        :meth:`next`."""
        if isinstance(answer, Exception):
            raise answer
        if not answer.shared and not Workers.warned:
            Workers.warned = True
            say(
                "warning: /dev/shm has no room for a batch of images; "
                "they go through pipes, which is slower: " + MORE_SHARED_MEMORY
            )
        with self.watched():
            return answer.open()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Where something is awaited from the workers. Raises InputError if one has died."""
        self.check()
        Workers.waited_for = self
        try:
            yield
        except InputError:
            raise
        except Exception:  # torch's RuntimeError, or that of a connection: has a worker ended?
            ended = connection.wait([process.sentinel for process in self.processes], 1)
            for process in self.processes:
                if process.sentinel in ended:
                    process.join(1)  # its files are closed a moment before it has a status
            self.check()
            raise
        finally:
            Workers.waited_for = None

    def check(self) -> None:
        """Raises InputError if a worker has died. At the end, torch has them exit with status 0."""
        at_work = not self.iterator._shutdown
        for process in self.processes:
            if process.exitcode or at_work and process.exitcode is not None:
                raise InputError(
                    f"a worker process that loads images {self.cause(process.exitcode)}"
                ) from None

    def cause(self, status: int) -> str:
        """What a worker died of, by its exit status, and what to do."""
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
            # An ended process may have no status: the handler raised while it was being read. Its
            # number may be another process's by now.
            if not connection.wait([process.sentinel], 0):
                process.kill()
        for process in self.processes:
            process.join(1)
            remove_unfinished(process.pid)


def child_has_ended(number: int, frame: FrameType | None) -> None:
    if Workers.waited_for:
        Workers.waited_for.check()


def prepare_worker(_: int) -> None:
    """In a worker, as it starts."""
    signal.signal(signal.SIGUSR2, lambda *_: os._exit(1))  # SIGKILL might leave a batch in /dev/shm
    signal_when_parent_dies(signal.SIGUSR2)
    for number in (signal.SIGBUS, signal.SIGSEGV, signal.SIGFPE):
        signal.signal(number, signal.SIG_DFL)  # without torch's line on stderr: the main process reports it


def remove_unfinished(pid: int) -> None:
    """Remove the shared memory that torch created in a process and could not fill; what it filled
    has no name."""
    for path in Path("/dev/shm").glob(f"torch_{pid}_*"):
        path.unlink(missing_ok=True)


def as_it_is(batch: T) -> T:
    return batch


class Batches(Dataset):
    """A list of keys -> what a :class:`Sender` makes of these samples of ``dataset``."""

    def __init__(self, dataset: MapStyle, sender: "Sender"):
        self.dataset, self.sender = dataset, sender

    def __getitems__(self, keys: list) -> "Answer":
        return self.sender(lambda: [self.dataset[key] for key in keys])


class Sender:
    """In a worker: a function that reads samples -> a :class:`Parcel` of the batch, or an exception
    to raise."""

    def __init__(self, collate: Collate, setting: str):
        self.collate, self.setting = collate, setting

    def __call__(self, read: Callable[[], Any]) -> "Answer":
        try:
            return Parcel(read(), self.collate)
        except Exception as error:
            return self.portable(error)

    def portable(self, error: Exception) -> Exception:
        """``error``, or an InputError that stands for it, to be raised in another process."""
        if isinstance(error, (InputError, OSError)):
            try:
                return pickle.loads(pickle.dumps(error))
            except Exception:
                pass  # one whose arguments do not pickle, or not those that it is made with
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
    """``read`` for a DataLoader that is made elsewhere and iterated by a :class:`Loader`: in a
    worker it answers as a Sender does."""

    def __init__(self, read: Callable[[Any], Any], setting: str):
        self.read, self.sender = read, Sender(as_it_is, setting)

    def __call__(self, key: Any) -> Any:
        return self.sender(lambda: self.read(key)) if get_worker_info() else self.read(key)


class Parcel:
    """A batch on its way to the main process: its tensors in shared memory, or where that is full,
    the samples with their pixels, which are collated there."""

    def __init__(self, samples: Any, collate: Collate):
        try:
            self.content, self.shared = bytes(ForkingPickler.dumps(collate(samples))), True
        except RuntimeError:
            remove_unfinished(os.getpid())
            self.content, self.shared = pickle.dumps((collate, samples)), False

    def open(self) -> Any:
        if not isinstance(self.content, bytes):  # it was opened by pin_memory
            return self.content
        if self.shared:
            return pickle.loads(self.content)
        collate, samples = pickle.loads(self.content)
        return collate(samples)

    def pin_memory(self) -> "Parcel":
        """For torch's thread that copies to page-locked memory."""
        self.content = tree_map_only(torch.Tensor, torch.Tensor.pin_memory, self.open())
        return self
