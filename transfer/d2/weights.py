"""Pre-trained weights -> a model of Detectron2, where every tensor of the ResNet must arrive.

Detectron2's checkpointer only warns about tensors that it cannot place, and training would start from noise.
"""

import re

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch.nn.parallel import DistributedDataParallel

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.transfer.config import RGB_IMAGENET
from rsa_detectron2.transfer.convert.architectures import tensor_shapes
from rsa_detectron2.transfer.convert.provenance import sha256
from rsa_detectron2.transfer.convert.writers import detectron2_name, load_weights
from rsa_detectron2.transfer.report.run_folder import save_checkpoint

# Detectron2's own files that the configs name, and what they need. In MSRA's, from Caffe, BatchNorm's running
# statistics are folded into its weight and bias.
ZOO = {
    "detectron2://ImageNetPretrained/torchvision/R-50.pkl": RGB_IMAGENET,
    "detectron2://ImageNetPretrained/MSRA/R-50.pkl": {
        "input_format": "BGR",
        "pixel_mean": [103.53, 116.28, 123.675],
        "pixel_std": [1.0, 1.0, 1.0],
        "stride_in_1x1": True,
        "statistics": False,
    },
}
# The name of a ResNet's tensor in a model. The ResNet is below an FPN, or is the backbone itself (C4, DC5);
# the res5 of C4 is in the RoI heads.
RESNET = re.compile(r"(?:backbone\.(?:bottom_up\.)?|roi_heads\.)((?:stem|res\d)\..+)")
ADVICE = "does MODEL.RESNETS build the file's network, and is its NORM a BatchNorm?"


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def resnet_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Model -> the tensors of its ResNet, wherever they are, under names such as "res5.0.conv1.weight"."""
    found = {RESNET.fullmatch(name): tensor for name, tensor in unwrap(model).state_dict().items()}
    return {match[1]: tensor for match, tensor in found.items() if match}


def load_backbone(model: torch.nn.Module, path: str) -> None:
    """Copy a converted file's tensors into the model's ResNet.

    Detectron2's checkpointer is not used, because it would run the code that a pickle may hold. Raises
    InputError that names the tensors of the model which the file does not fill, or those of the file that
    have no place.
    """
    needed = resnet_state(model)
    state = {detectron2_name(name): tensor for name, tensor in load_weights(path)[0].items()}
    fitting = {name for name in state if name in needed and needed[name].shape == state[name].shape}
    absent = [name for name in needed if name not in fitting and not name.endswith("num_batches_tracked")]
    if lost := absent or [name for name in state if name not in fitting]:
        raise InputError(
            f"{len(lost)} backbone tensors did not arrive from MODEL.WEIGHTS {path} "
            f"({', '.join(lost)[:200]}): {ADVICE}"
        )
    for name in fitting:
        needed[name].copy_(state[name])


def assert_backbone_arrived(model: torch.nn.Module, path: str) -> None:
    """Compare every tensor of the file with the model's. Raises InputError naming what did not arrive."""
    state, _ = load_weights(path)
    found = resnet_state(model)
    absent = [
        detectron2_name(name)
        for name, tensor in state.items()
        if not torch.equal(found.get(detectron2_name(name), torch.empty(0)).cpu(), tensor)
    ]
    if absent:
        raise InputError(
            f"{len(absent)} of {len(state)} backbone tensors of {path} did not arrive in the model ("
            f"{', '.join(absent[:3])}, ...): {ADVICE}"
        )


class Checkpointer(DetectionCheckpointer):
    """DetectionCheckpointer that keeps a list of what it could not place; Detectron2 only warns of it."""

    absent = unused = ("nothing was loaded",)

    def save(self, name: str, **more: object) -> bool:
        """Write a checkpoint whole or not at all; returns whether this process has. Detectron2 writes into
        the file itself: a kill leaves half of it, and a full disk ends training."""
        if not self.save_to_disk:  # not the main process
            return False
        parts = {key: part.state_dict() for key, part in self.checkpointables.items()}
        return save_checkpoint(
            self.save_dir, f"{name}.pth", {"model": self.model.state_dict(), **parts, **more}
        )

    def _load_model(self, checkpoint):
        incompatible = super()._load_model(checkpoint)
        missing = (*incompatible.missing_keys, *(entry[0] for entry in incompatible.incorrect_shapes))
        self.absent = [
            name for name in missing if RESNET.fullmatch(name) and not name.endswith("num_batches_tracked")
        ]
        self.unused = [
            name for name in map(detectron2_name, tensor_shapes()) if name in incompatible.unexpected_keys
        ]
        return incompatible

    def assert_backbone_arrived(self, statistics: bool = True) -> None:
        """Raises InputError that names the tensors of the backbone which the loaded file did not fill, or
        those of the file's ResNet-50 that have no place. ``statistics``: whether the file has BatchNorm's
        running statistics."""
        absent = [
            name for name in self.absent if statistics or not name.endswith(("running_mean", "running_var"))
        ]
        if lost := absent or self.unused:
            raise InputError(
                f"{len(lost)} backbone tensors did not arrive from MODEL.WEIGHTS "
                f"({', '.join(lost)[:200]}): {ADVICE}"
            )


def read_provenance(path: str) -> dict:
    """The provenance of the weights ``path``: a converted file, or one of :data:`ZOO`, which is fetched.

    Raises InputError.
    """
    if path not in ZOO:
        return load_weights(path)[1]
    try:
        local = PathManager.get_local_path(path)
    except Exception as error:  # no network, no such file, no room: the libraries' own exceptions
        raise InputError(f"{path} cannot be fetched ({type(error).__name__}: {error})") from None
    return {
        "source": path,
        "sha256": sha256(local),
        "format": "Detectron2's model zoo",
        "branch": "online",
        "method": "supervised",
        "step": -1,
        **ZOO[path],
    }
