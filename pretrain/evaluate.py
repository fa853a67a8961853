"""Features of a frozen backbone, and kNN on them. Linear evaluation is in linear.py."""

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import BatchSampler, Dataset, SequentialSampler
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from pretrain.augment import normalize, to_float
from pretrain.bad_images import read_or_next
from pretrain.config import InputError
from pretrain.datasets import VAL_NAMES, open_images
from pretrain.distributed import device
from pretrain.feature_cache import fingerprint
from pretrain.loader import build_loader


class CenterCrops(Dataset):
    """The validation transform, short side to ``resize`` and centre crop: index -> (uint8 [3, size, size], label).

    With ``replace`` the next image stands in for one that cannot be decoded. Without, UnreadableImage is raised: a figure
    that is reported must be of all images.
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


def label_of(images, index):
    return int(images.labels[index % len(images)])


class Features:
    """uint8 images [B, 3, S, S] -> float32 features [B, D] of a frozen backbone in eval mode.

    ``data`` is a configuration's DATA, ``amp`` a dtype or None. With ``cache``, a FeatureCache of the checkpoint that
    the backbone is from, what depends on centre crops alone is computed once.
    """

    def __init__(self, backbone, data, amp, cache=None):
        self.backbone, self.data, self.amp, self.cache = backbone, data, amp, cache
        self.mean, self.std = (torch.tensor(values, device=device()) for values in (data.MEAN, data.STD))

    def __call__(self, images):
        return self.of_floats(to_float(images.to(device(), non_blocking=True)))

    @torch.no_grad()
    def of_floats(self, images):
        """The same of float32 images in [0, 1]."""
        self.backbone.eval()  # here, because the training loop that shares it has set it back
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
        for batch, batch_labels in self.batches(images, np.arange(count) * len(images) // count, description, replace):
            if features is None:  # all at once: those of ImageNet take 10 GB, and joining them would take 20
                features = batch.new_empty(count, batch.shape[1])
            part = slice(done, done + len(batch))
            features[part], labels[part], done = batch, batch_labels, part.stop
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
        loader = build_loader(crops, BatchSampler(SequentialSampler(crops), 128, False), self.data.NUM_WORKERS)
        for batch, labels in tqdm(loader, description, leave=False, dynamic_ncols=True, disable=None):
            yield self(batch), labels

    def describe(self, images):
        """What the centre-crop features of a source depend on, besides the checkpoint."""
        return {"images": fingerprint(images), "range": list(images.value_range), "resize": self.data.EVAL_RESIZE,
                "size": self.data.IMAGE_SIZE, "mean": list(self.data.MEAN), "std": list(self.data.STD), "dtype": str(self.amp)}


SIMILARITIES = 2 ** 27  # that are held at once: half a GB


def knn_top1(bank, bank_labels, queries, query_labels, k=200, temperature=0.1):
    """Weighted kNN (Wu et al. 2018): the k nearest by cosine vote with exp(cos / T). Features [N, D] and [M, D],
    labels [N] and [M] -> top-1 in percent. k is cut to the size of the bank."""
    lengths = bank.norm(dim=1).clamp(min=1e-12)  # the similarities are scaled: a copy of the bank may be too large
    queries, correct = F.normalize(queries, dim=1), 0
    size = max(1, min(1024, SIMILARITIES // len(bank)))
    for features, labels in zip(queries.split(size), query_labels.split(size)):
        similarity, nearest = (features @ bank.T).div_(lengths).topk(min(k, len(bank)), dim=1)
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
        val.value_range = images.value_range
        check_labelled(bank, val)
        return bank, val
    if not bank.classes or bank.labels.min() < 0:
        return None, None
    root = bank.root.absolute()
    for place in [cfg.DATA.PATH] if bank.own_val else [root.parent / name for name in VAL_NAMES if name != root.name]:
        try:
            val = open_images(place, "val", cfg.DATA.CLASSES)
            val.value_range = images.value_range
            check_labelled(bank, val)
            return bank, val
        except InputError:
            continue  # not there, or not meant for this
    return bank, None


def evaluate_knn(features, train, val, bank_size, replace=False):
    """kNN top-1 in percent of ``val`` images against a bank of ``train`` images (two labelled sources). ``replace``: a
    val image that cannot be decoded does not stop a run that only watches itself."""
    check_labelled(train, val)
    return knn_top1(*features.of(train, "kNN bank", bank_size, replace=True),
                    *features.of(val, "kNN queries", replace=replace))
