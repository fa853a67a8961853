"""Frozen backbones judged by a classifier on their features: weighted kNN, and linear evaluation (paper, 4.1)."""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from pretrain.augment import normalize, to_float, weak_view
from pretrain.config import InputError
from pretrain.datasets import VAL_NAMES, open_images, read_or_next
from pretrain.distributed import device
from pretrain.loader import SAMPLE_STREAM, StepBatches, build_loader, resolve_workers


class CenterCrops(Dataset):
    """The validation transform, short side to ``resize`` and centre crop: index -> (uint8 [3, size, size], label).

    With ``replace`` the next image stands in for one that cannot be decoded; without, as befits what a figure is
    reported on, UnreadableImage is raised.
    """

    def __init__(self, images, indices, resize, size, replace=False):
        self.images, self.indices, self.resize, self.size, self.replace = images, indices, resize, size, replace

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        index = self.indices[i]
        image, skipped = read_or_next(self.images, index) if self.replace else (self.images.read(index), 0)
        if min(image.shape[-2:]) != self.resize:
            image = TF.resize(image, [self.resize], antialias=True)
        return TF.center_crop(image, [self.size, self.size]), label_of(self.images, index + skipped)


class RandomCrops(Dataset):
    """The training transform of linear evaluation: (epoch, index) -> (uint8 [3, S, S], label): RandomResizedCrop(S) at
    its default scale of 0.08-1, horizontal flip."""

    def __init__(self, images, size, seed):
        self.images, self.size, self.seed = images, size, seed

    def __getitem__(self, key):
        epoch, index = key
        rng = np.random.default_rng((self.seed, SAMPLE_STREAM, epoch, index))
        image, skipped = read_or_next(self.images, index)
        return weak_view(image, rng, self.size, scale=(0.08, 1.0)), label_of(self.images, index + skipped)


def label_of(images, index):
    return int(images.labels[index % len(images)])


class Features:
    """uint8 images [B, 3, S, S] -> float32 features [B, D] of a frozen backbone in eval mode."""

    def __init__(self, backbone, data, amp):
        self.backbone, self.data, self.amp = backbone, data, amp

    @torch.no_grad()
    def __call__(self, images):
        self.backbone.eval()  # here, because the training loop that shares it has set it back
        images = normalize(to_float(images.to(device(), non_blocking=True)), self.data.MEAN, self.data.STD)
        with torch.autocast(device().type, self.amp or torch.bfloat16, enabled=self.amp is not None):
            return self.backbone(images.contiguous(memory_format=torch.channels_last)).float()

    def of(self, images, description, limit=None, replace=False):
        """Centre-crop features float32 [N, D] and labels [N] of a source, at most ``limit``, evenly spaced; ``replace``
        as in CenterCrops."""
        count = min(len(images), limit or len(images))
        indices = np.arange(count) * len(images) // count
        crops = CenterCrops(images, indices, self.data.EVAL_RESIZE, self.data.IMAGE_SIZE, replace)
        loader = DataLoader(crops, batch_size=128, num_workers=resolve_workers(self.data.NUM_WORKERS))
        progress = tqdm(loader, description, leave=False, dynamic_ncols=True, disable=None)
        features, labels = zip(*[(self(batch), labels) for batch, labels in progress])
        return torch.cat(features), torch.cat(labels).to(device())


def knn_top1(bank, bank_labels, queries, query_labels, k=200, temperature=0.1):
    """Weighted kNN (Wu et al. 2018): the k nearest by cosine vote with exp(cos / T). Features [N, D] and [M, D],
    labels [N] and [M] -> top-1 in percent. k is cut to the size of the bank."""
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    correct = 0
    for features, labels in zip(queries.split(1024), query_labels.split(1024)):
        similarity, nearest = (features @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(features), int(bank_labels.max()) + 1, device=bank.device)
        votes.scatter_add_(1, bank_labels[nearest], (similarity / temperature).exp())
        correct += (votes.argmax(1) == labels).sum().item()
    return 100 * correct / len(queries)


def check_labelled(train, val):
    """Raises InputError unless both sources have the same classes and a label for every image."""
    if not train.classes or train.classes != val.classes or min(train.labels.min(), val.labels.min()) < 0:
        raise InputError(f"{train.root} and {val.root} are not labelled alike: kNN and linear evaluation need the same "
                         "classes in both, and every image in one of them")


def find_labelled(cfg, images):
    """(bank, val), the labelled training images and those to classify, for the ``images`` of pre-training.

    val is DATA.VAL; else the data set's own validation images, or those beside its folder, if they are labelled as the
    bank is; else None. (None, None) where nothing is labelled. Raises InputError for a DATA.VAL that does not fit.
    """
    bank = images
    if images.classes and images.labels.min() < 0:  # STL-10: only its training set is labelled
        bank = open_images(cfg.DATA.PATH, "train", cfg.DATA.CLASSES)
    if cfg.DATA.VAL:
        val = open_images(cfg.DATA.VAL, "val", cfg.DATA.CLASSES)
        check_labelled(bank, val)
        return bank, val
    if not bank.classes or bank.labels.min() < 0:
        return None, None
    root = bank.root.absolute()
    for place in [cfg.DATA.PATH] if bank.own_val else [root.parent / name for name in VAL_NAMES if name != root.name]:
        try:
            val = open_images(place, "val", cfg.DATA.CLASSES)
            check_labelled(bank, val)
            return bank, val
        except InputError:
            continue  # not there, or not meant for this
    return bank, None


def evaluate_knn(features, train, val, bank_size):
    """kNN top-1 in percent of ``val`` images against a bank of ``train`` images (two labelled sources)."""
    check_labelled(train, val)
    return knn_top1(*features.of(train, "kNN bank", bank_size, replace=True), *features.of(val, "kNN queries"))


@dataclass(frozen=True)
class LinearProtocol:
    epochs: int
    lr: float
    weight_decay: float
    milestones: tuple
    nesterov: bool
    standardize: bool  # l2-normalised features, standardised with the training set's mean and variance


# The paper's: the small data sets', and for ImageNet that of Mean Shift (Koohpayegani et al. 2021).
LINEAR = {
    "small": LinearProtocol(epochs=100, lr=30.0, weight_decay=0.0, milestones=(60, 80), nesterov=True,
                            standardize=False),
    "large": LinearProtocol(epochs=40, lr=0.01, weight_decay=1e-4, milestones=(15, 30), nesterov=False,
                            standardize=True),
}


def shorten(protocol, epochs):
    """The protocol over another number of epochs (None: its own), with the milestones in proportion."""
    if epochs is None:
        return protocol
    milestones = tuple(round(m * epochs / protocol.epochs) for m in protocol.milestones)
    return replace(protocol, epochs=epochs, milestones=milestones)


def evaluate_linear(features, train, val, protocol, seed=0, batch_size=256):
    """Train a linear classifier on frozen features of random crops; returns the val top-1 of each epoch in percent."""
    check_labelled(train, val)
    batch_size = min(batch_size, len(train))
    val_features, val_labels = features.of(val, "validation features")
    prepare = lambda x: x  # noqa: E731
    if protocol.standardize:
        var, mean = torch.var_mean(F.normalize(features.of(train, "feature statistics", replace=True)[0], dim=1), dim=0)
        prepare = lambda x: (F.normalize(x, dim=1) - mean) / (var + 1e-5).sqrt()  # noqa: E731

    torch.manual_seed(seed)
    classifier = nn.Linear(val_features.shape[1], len(train.classes)).to(device())
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.SGD(classifier.parameters(), protocol.lr, momentum=0.9,
                                weight_decay=protocol.weight_decay, nesterov=protocol.nesterov)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, protocol.milestones, gamma=0.1)
    steps_per_epoch = len(train) // batch_size
    batches = StepBatches(len(train), batch_size, protocol.epochs * steps_per_epoch, seed)
    loader = build_loader(RandomCrops(train, features.data.IMAGE_SIZE, seed), batches, features.data.NUM_WORKERS)

    top1 = []
    progress = tqdm(loader, "linear evaluation", dynamic_ncols=True)
    for step, (images, labels) in enumerate(progress, start=1):
        loss = F.cross_entropy(classifier(prepare(features(images))), labels.to(device()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % steps_per_epoch == 0:
            schedule.step()
            with torch.no_grad():
                correct = classifier(prepare(val_features)).argmax(1) == val_labels
            top1.append(100 * correct.float().mean().item())
            progress.set_postfix(epoch=len(top1), top1=f"{top1[-1]:.2f}")
    return top1
