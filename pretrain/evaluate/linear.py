"""Linear evaluation: a classifier trained by SGD on the features of a frozen backbone (paper, 4.1)."""

import copy
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from rsa_detectron2.common.distributed import device
from rsa_detectron2.pretrain.data.bad_images import read_or_next
from rsa_detectron2.pretrain.data.loader import SAMPLE_STREAM, StepBatches, build_loader
from rsa_detectron2.pretrain.data.source import Source
from rsa_detectron2.pretrain.evaluate.features import Features, Labeled, label_of
from rsa_detectron2.pretrain.evaluate.knn import check_labeled
from rsa_detectron2.pretrain.method.augment import draw_crop, weak_view


@dataclass(frozen=True)
class LinearProtocol:
    epochs: int
    lr: float
    weight_decay: float
    milestones: tuple
    nesterov: bool
    standardize: bool  # l2-normalized features, standardized with the training set's mean and variance


# The paper's: the small data sets', and for ImageNet that of Mean Shift (Koohpayegani et al. 2021).
LINEAR = {
    "small": LinearProtocol(
        epochs=100, lr=30.0, weight_decay=0.0, milestones=(60, 80), nesterov=True, standardize=False
    ),
    "large": LinearProtocol(
        epochs=40, lr=0.01, weight_decay=1e-4, milestones=(15, 30), nesterov=False, standardize=True
    ),
}


@dataclass(frozen=True)
class Trial:
    """One training of a protocol's classifier."""

    seed: int = 0
    batch_size: int = 256  # at most; a smaller training set is one batch
    train_bn: bool = False  # the backbone's BatchNorm in train mode while the classifier learns


def shorten(protocol: LinearProtocol, epochs: int | None) -> LinearProtocol:
    """The protocol with another number of epochs, None for its own; the milestones move in proportion."""
    if epochs is None:
        return protocol
    milestones = tuple(round(m * epochs / protocol.epochs) for m in protocol.milestones)
    return replace(protocol, epochs=epochs, milestones=milestones)


class RandomCrops(Dataset):
    """The training transform of linear evaluation: (epoch, index) -> (uint8 [3, S, S], label).

    RandomResizedCrop(S) at its default scale of 0.08-1, then a horizontal flip.
    """

    def __init__(self, images: Source, size: int, seed: int):
        self.images, self.size, self.seed = images, size, seed
        images.share_bad()

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, index = key
        rng = np.random.default_rng((self.seed, SAMPLE_STREAM, epoch, index))
        image, skipped = read_or_next(self.images, index)
        view = weak_view(image, draw_crop(rng, scale=(0.08, 1.0)), self.size)
        return view, label_of(self.images, index + skipped)


class LinearClassifier:
    """A classifier on features [B, D], trained by SGD as a LinearProtocol says.

    ``statistics`` are the mean and variance that the protocol may standardize with.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        protocol: LinearProtocol,
        seed: int,
        statistics: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        torch.manual_seed(seed)
        self.protocol, self.statistics = protocol, statistics
        self.layer = nn.Linear(dim, num_classes)
        nn.init.normal_(self.layer.weight, std=0.01)
        nn.init.zeros_(self.layer.bias)
        self.layer.to(device())
        self.optimizer = torch.optim.SGD(
            self.layer.parameters(),
            protocol.lr,
            momentum=0.9,
            weight_decay=protocol.weight_decay,
            nesterov=protocol.nesterov,
        )

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        if self.statistics:
            features = standardize(features, *self.statistics)
        return self.layer(features)

    def step(self, features: torch.Tensor, labels: torch.Tensor, epoch: int) -> None:
        """One step of SGD in ``epoch``, counted from 0."""
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.protocol, epoch)
        loss = F.cross_entropy(self(features), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def top1(self, features: torch.Tensor, labels: torch.Tensor) -> float:
        """In percent."""
        return 100 * (self(features).argmax(1) == labels).float().mean().item()

    def arrays(self) -> dict[str, np.ndarray]:
        """{name: array} of the state that training goes on from."""
        arrays = {name: p.detach().cpu().numpy() for name, p in self.layer.named_parameters()}
        return arrays | {
            f"{name} momentum": self.optimizer.state[p]["momentum_buffer"].cpu().numpy()
            for name, p in self.layer.named_parameters()
        }

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        for name, p in self.layer.named_parameters():
            p.data.copy_(torch.from_numpy(arrays[name]))
            self.optimizer.state[p]["momentum_buffer"] = torch.from_numpy(arrays[f"{name} momentum"]).to(
                p.device
            )


def learning_rate(protocol: LinearProtocol, epoch: int) -> float:
    """The learning rate of an epoch, counted from 0: each milestone divides it by ten."""
    return protocol.lr * 0.1 ** sum(epoch >= milestone for milestone in protocol.milestones)


def standardize(features: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
    """l2-normalized features, standardized with mean and variance [D]: [B, D] -> [B, D]."""
    return (F.normalize(features, dim=1) - mean) / (var + 1e-5).sqrt()


def evaluate_linear(
    features: Features, train: Source, val: Source, protocol: LinearProtocol, trial: Trial = Trial()
) -> list[float]:
    """Train a linear classifier on features of random crops; val top-1 of each epoch in percent.

    ``trial.train_bn`` is what the authors' code does on the small data sets. The running statistics of
    BatchNorm, which the val images are evaluated with, then move too. They are those of a copy: ``features``
    stay as they are. With a cache in ``features``, a call that was stopped goes on from its last whole epoch.
    Raises InputError as :func:`check_labeled` does.
    """
    check_labeled(train, val)
    seed, train_bn, batch_size = trial.seed, trial.train_bn, min(trial.batch_size, len(train))
    moving = Features(copy.deepcopy(features.backbone), features.data, features.amp) if train_bn else features
    moved = moving.backbone.named_buffers() if train_bn else ()
    buffers = {f"backbone {name}": buffer for name, buffer in moved}
    val_crops = features.of(val, "validation features")
    statistics = features.statistics(train) if protocol.standardize else None
    classifier = LinearClassifier(val_crops.features.shape[1], len(train.classes), protocol, seed, statistics)
    what = features.cache and {
        "linear": asdict(protocol),
        "seed": seed,
        "batch": batch_size,
        "train_bn": train_bn,
        "train": features.describe(train),
        "val": features.describe(val),
    }
    top1 = []
    if found := features.cache and features.cache.get(what):
        top1 = found.pop("top1").tolist()
        classifier.restore(found)
        for name, buffer in buffers.items():
            buffer.copy_(torch.from_numpy(found[name]))

    steps_per_epoch = len(train) // batch_size
    done, total = len(top1) * steps_per_epoch, protocol.epochs * steps_per_epoch
    batches = StepBatches(len(train), batch_size, range(done, total), seed)
    crops = RandomCrops(train, features.data.IMAGE_SIZE, seed)
    loader = build_loader(crops, batches, features.data.NUM_WORKERS)
    progress = tqdm(loader, "linear evaluation", total=total, initial=done, dynamic_ncols=True)
    for step, (images, labels) in enumerate(progress, start=done + 1):
        classifier.step(moving(images, train_bn), labels.to(device(), non_blocking=True), len(top1))
        if step % steps_per_epoch == 0:
            if train_bn:
                val_crops = moving.of(val, "validation features")
            top1.append(classifier.top1(*val_crops))
            progress.set_postfix(epoch=len(top1), top1=f"{top1[-1]:.2f}")
            if features.cache:
                features.cache.put(
                    what,
                    top1=np.array(top1),
                    **classifier.arrays(),
                    **{name: buffer.cpu().numpy() for name, buffer in buffers.items()},
                )
    return top1


def evaluate_linear_on(
    bank: Labeled, queries: Labeled, protocol: LinearProtocol, trial: Trial = Trial()
) -> list[float]:
    """Train a linear classifier on the features of ``bank``; top-1 of ``queries`` of each epoch in percent.

    Without random crops it is faster than :func:`evaluate_linear`, but the top-1 is lower.
    """
    features, labels = bank
    batch_size = min(trial.batch_size, len(features))
    steps_per_epoch = len(features) // batch_size
    statistics = None
    if protocol.standardize:
        statistics = torch.var_mean(F.normalize(features, dim=1), dim=0)[::-1]
    num_classes = int(max(labels.max(), queries.labels.max())) + 1
    classifier = LinearClassifier(features.shape[1], num_classes, protocol, trial.seed, statistics)
    batches = StepBatches(len(features), batch_size, range(protocol.epochs * steps_per_epoch), trial.seed)
    top1 = []
    for step, batch in enumerate(batches, start=1):
        indices = torch.tensor([index for _, index in batch], device=features.device)
        classifier.step(features[indices], labels[indices], len(top1))
        if step % steps_per_epoch == 0:
            top1.append(classifier.top1(*queries))
    return top1
