"""Features of a frozen backbone, and kNN on them. Linear evaluation is in linear.py."""

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import BatchSampler, Dataset, SequentialSampler
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from rsa_detectron2.common.distributed import device
from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.data.bad_images import read_or_next
from rsa_detectron2.pretrain.data.datasets import open_images
from rsa_detectron2.pretrain.data.folders import find_folders, part_of, rank
from rsa_detectron2.pretrain.data.images import printable
from rsa_detectron2.pretrain.data.loader import build_loader
from rsa_detectron2.pretrain.data.source import say
from rsa_detectron2.pretrain.evaluate.cache import fingerprint
from rsa_detectron2.pretrain.method.augment import normalize, to_float

LONGEST = 4  # short sides of an image that the centre crop may need, its filter included


class CenterCrops(Dataset):
    """The validation transform, short side to ``resize`` and centre crop: index -> (uint8 [3, size, size], label).

    With ``replace`` the next image stands in for one that cannot be decoded. Without, UnreadableImage is raised: a figure
    that is reported must be of all images.
    """

    def __init__(self, images, indices, resize, size, replace=False):
        self.images, self.indices, self.resize, self.size, self.replace = (
            images,
            indices,
            resize,
            size,
            replace,
        )
        images.bad  # made here, so that all workers share it

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        index = self.indices[i]
        image, skipped = read_or_next(self.images, index) if self.replace else (self.images.read(index), 0)
        return center_crop(image, self.resize, self.size), label_of(self.images, index + skipped)


def center_crop(image, resize, size):
    """uint8 [3, H, W] -> [3, size, size]: short side to ``resize``, then the centre."""
    height, width = image.shape[-2:]
    short = min(height, width)
    if max(height, width) > LONGEST * short:  # one line of 20000 pixels would become 5 million columns
        # As many pixels go on either side: the centre stays where it is.
        image = TF.center_crop(
            image, [side - 2 * max(0, (side - LONGEST * short) // 2) for side in (height, width)]
        )
    if short != resize:
        image = TF.resize(image, [resize], antialias=True)
    return TF.center_crop(image, [size, size])


def label_of(images, index):
    return int(images.labels[index % len(images)])


class Features:
    """uint8 images [B, 3, S, S] -> float32 features [B, D] of a frozen backbone, in eval mode unless asked otherwise.

    ``data`` is a configuration's DATA, ``amp`` a dtype or None. With ``cache``, a FeatureCache of the checkpoint that
    the backbone is from, what depends on centre crops alone is computed once.
    """

    def __init__(self, backbone, data, amp, cache=None):
        self.backbone, self.data, self.amp, self.cache = backbone, data, amp, cache
        self.mean, self.std = (torch.tensor(values, device=device()) for values in (data.MEAN, data.STD))

    def __call__(self, images, train=False):
        return self.of_floats(to_float(images.to(device(), non_blocking=True)), train)

    @torch.no_grad()
    def of_floats(self, images, train=False):
        """The same of float32 images in [0, 1]. train: BatchNorm normalizes with the batch's statistics, and renews its
        running ones."""
        self.backbone.train(train)  # here, because the training loop that shares it has set it back
        images = normalize(images, self.mean, self.std)
        with torch.autocast(device().type, self.amp or torch.bfloat16, enabled=self.amp is not None):
            return self.backbone(images.contiguous(memory_format=torch.channels_last)).float()

    def of(self, images, description, limit=None, replace=False):
        """Centre-crop features float32 [N, D] and labels [N] of a source, at most ``limit``, evenly spaced; ``replace``
        as in CenterCrops."""
        count = min(len(images), limit or len(images))
        what = {"features": count, "replace": replace, **self.describe(images)} if self.cache else None
        if found := self.cache and self.cache.get(what):
            return tuple(torch.from_numpy(found[name]).to(device()) for name in ("features", "labels"))
        features, labels, done = None, torch.empty(count, dtype=torch.long, device=device()), 0
        for batch, batch_labels in self.batches(
            images, np.arange(count) * len(images) // count, description, replace
        ):
            if features is None:  # all at once: those of ImageNet take 10 GB, and joining them would take 20
                features = batch.new_empty(count, batch.shape[1])
            part = slice(done, done + len(batch))
            features[part], labels[part], done = batch, batch_labels, part.stop
        if replace and (bad := images.known_bad()):
            say(
                f"{len(bad)} of the {len(images)} images of {printable(images.root)} cannot be decoded, "
                f"{printable(images.name(bad[0]))} first: the next ones stand in for them"
            )
        if self.cache:
            self.cache.put(what, features=features.cpu().numpy(), labels=labels.cpu().numpy())
        return features, labels

    def statistics(self, images):
        """Mean and variance, float32 [D] each, of the l2-normalised centre-crop features of a source; summed up batch
        by batch, because those of ImageNet would fill 10 GB."""
        what = {"statistics": len(images), **self.describe(images)} if self.cache else None
        if found := self.cache and self.cache.get(what):
            return tuple(torch.from_numpy(found[name]).to(device()) for name in ("mean", "var"))
        total = squares = 0
        for features, _ in self.batches(images, np.arange(len(images)), "feature statistics", replace=True):
            features = F.normalize(features, dim=1).double()
            total, squares = total + features.sum(0), squares + features.square().sum(0)
        mean = total / len(images)
        var = (squares - len(images) * mean.square()) / (len(images) - 1)
        mean, var = mean.float(), var.clamp_(min=0).float()
        if self.cache:
            self.cache.put(what, mean=mean.cpu().numpy(), var=var.cpu().numpy())
        return mean, var

    def batches(self, images, indices, description, replace):
        """Centre-crop features [B, D] and labels [B], batch by batch."""
        crops = CenterCrops(images, indices, self.data.EVAL_RESIZE, self.data.IMAGE_SIZE, replace)
        loader = build_loader(
            crops, BatchSampler(SequentialSampler(crops), 128, False), self.data.NUM_WORKERS
        )
        for batch, labels in tqdm(loader, description, leave=False, dynamic_ncols=True, disable=None):
            yield self(batch), labels

    def describe(self, images):
        """What the centre-crop features of a source depend on, besides the checkpoint."""
        return {
            "images": fingerprint(images),
            "range": list(images.value_range),
            "resize": self.data.EVAL_RESIZE,
            "size": self.data.IMAGE_SIZE,
            "mean": list(self.data.MEAN),
            "std": list(self.data.STD),
            "dtype": str(self.amp),
        }


SIMILARITIES = 2**27  # that are held at once: half a GB


def knn_top1(bank, bank_labels, queries, query_labels, k=200, temperature=0.1):
    """Weighted kNN (Wu et al. 2018): the k nearest by cosine vote with exp(cos / T). Features [N, D] and [M, D],
    labels [N] and [M] -> top-1 in percent. k is cut to the size of the bank."""
    lengths = bank.norm(dim=1).clamp(
        min=1e-12
    )  # the similarities are scaled: a copy of the bank may be too large
    queries, correct = F.normalize(queries, dim=1), 0
    size = max(1, min(1024, SIMILARITIES // len(bank)))
    for features, labels in zip(queries.split(size), query_labels.split(size)):
        similarity, nearest = (features @ bank.T).div_(lengths).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(features), int(bank_labels.max()) + 1, device=bank.device)
        votes.scatter_add_(1, bank_labels[nearest], (similarity / temperature).exp())
        correct += (votes.argmax(1) == labels).sum().item()
    return 100 * correct / len(queries)


class NoValidation(InputError):
    """Nothing to classify was found; the message says why."""


def unlabelled(images):
    """Why the images of a source cannot be told apart by class; "" if they can."""
    root, missing = printable(images.root), np.flatnonzero(np.asarray(images.labels) < 0)
    if not images.classes:
        return f"{root} has no labels (class folders)"
    if len(missing):
        return f"{len(missing)} of the {len(images)} images of {root} have no label, {printable(images.name(missing[0]))} first"
    return f"{root} has one class only, {printable(images.classes[0])}" if len(images.classes) == 1 else ""


def mismatch(train, val):
    """Why kNN and linear evaluation cannot classify ``val`` by ``train``; "" if they can."""
    why = unlabelled(train) or unlabelled(val)
    if why or train.classes == val.classes:
        return why
    parts = [
        f"{word} {len(names)} ({', '.join(map(printable, names[:3]))}{', ...' * (len(names) > 3)})"
        for word, names in (
            ("without", sorted({*train.classes} - {*val.classes})),
            ("with other", sorted({*val.classes} - {*train.classes})),
        )
        if names
    ]
    return (
        f"{printable(val.root)} has other classes than {printable(train.root)}: {', '.join(parts)}"
        if parts
        else f"{printable(val.root)} and {printable(train.root)} have their classes in another order"
    )


def check_labelled(train, val):
    """Raises InputError unless both sources have the same classes and a label for every image."""
    if why := mismatch(train, val):
        raise InputError(
            f"kNN and linear evaluation need the same classes in training and validation images, and a label "
            f"for every image: {why}"
        )


def find_labelled(cfg, images):
    """(bank, val), the labelled training images and those to classify, for the ``images`` of pre-training.

    val is DATA.VAL; else the data set's own validation images, or those beside its folder, if they are labelled as the
    bank is. Raises NoValidation where there are none, and InputError for a DATA.VAL that does not fit.
    """
    bank = images
    if images.classes and images.labels.min() < 0:  # STL-10: only its training set is labelled
        bank = open_images(cfg.DATA.PATH, "train", cfg.DATA.CLASSES, cfg.DATA.LIMIT)
    if cfg.DATA.VAL:
        val = open_images(cfg.DATA.VAL, "val", cfg.DATA.CLASSES, cfg.DATA.LIMIT)
        val.value_range = images.value_range
        check_labelled(bank, val)
        return bank, val
    if why := unlabelled(bank):
        raise NoValidation(why)
    found = []
    for place in [cfg.DATA.PATH] if bank.own_val else beside(bank.root.absolute()):
        try:
            val = open_images(place, "val", cfg.DATA.CLASSES, cfg.DATA.LIMIT)
            val.value_range = images.value_range
            why = mismatch(bank, val)
        except InputError as error:
            why = str(error)
        if not why:
            return bank, val
        found.append(why)
    raise NoValidation(
        found[0] if found else f"there are no validation images (val/ or test/) beside {printable(bank.root)}"
    )


def beside(root):
    """The folders beside ``root`` that hold validation images by their names, the preferred first."""
    try:
        folders = find_folders(root.parent)
    except InputError:  # which need not be readable
        return []
    names = [name for name in folders if part_of(name) == "val" and name != root.name]
    return [root.parent / name for name in sorted(names, key=rank)]


def evaluate_knn(features, train, val, bank_size, replace=False):
    """kNN top-1 in percent of ``val`` images against a bank of ``train`` images (two labelled sources). ``replace``: a
    val image that cannot be decoded does not stop a run that only watches itself."""
    check_labelled(train, val)
    return knn_top1(
        *features.of(train, "kNN bank", bank_size, replace=True),
        *features.of(val, "kNN queries", replace=replace),
    )
