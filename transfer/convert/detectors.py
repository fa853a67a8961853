"""A fine-tuned detector as the start of another one: a model of this project or of stock Detectron2."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.transfer.convert.files import local_file, open_checkpoint
from rsa_detectron2.transfer.convert.provenance import sha256
from rsa_detectron2.transfer.convert.stored import as_tensor

# The layers whose shape follows from the number of classes (or of keypoints).
CLASS_LAYERS = re.compile(
    r"(roi_heads\.(box_predictor(\.\d+)?\.\w+|mask_predictor\.mask_fcn_logits|mask_head\.predictor"
    r"|keypoint_head\.score_lowres)|head\.cls_score)\.(weight|bias)"
)
# What a model has besides its ResNet: so a file is known for a detector.
HEADS = ("roi_heads.", "rpn.", "proposal_generator.", "head.cls_score.")
Translate = Callable[[dict[str, torch.Tensor], Iterable[str]], dict[str, torch.Tensor]]
NOT_NEEDED = "num_batches_tracked"  # Detectron2's own models are without


def is_detector(path: str | Path) -> bool:
    """Whether the file ``path`` holds a detector, and not a backbone alone. Raises InputError."""
    local = local_file(path, f'no weights {path}: give a file, or MODEL.WEIGHTS "" for random weights')
    with open_checkpoint(local) as contents:
        return any(name.startswith(HEADS) for name in _tensors(contents))


def load_detector(path: str | Path, model: torch.nn.Module, translate: Translate | None = None) -> str:
    """Copy a detector into ``model``; returns a line that names the layers which start anew, because the
    number of classes is another one. ``translate``: from the file's tensors to those of the model's layout.

    Raises InputError where another tensor has no place or is absent. Never runs code of the file.
    """
    needed = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(NOT_NEEDED)}
    with open_checkpoint(path) as contents:
        stored = {name: as_tensor(value) for name, value in _tensors(contents).items()}
        found = {name: tensor.read() for name, tensor in stored.items() if tensor is not None}
        if translate:
            found = translate(found, needed)
        wrong = [
            name for name, tensor in needed.items() if name not in found or found[name].shape != tensor.shape
        ]
        if lost := [name for name in wrong if not CLASS_LAYERS.fullmatch(name)]:
            raise InputError(
                f"{path} is a detector that lacks {len(lost)} tensors of this config's model, or has them in "
                f"another shape ({', '.join(lost[:3])}): give its config and engine, or its backbone alone, "
                f"by tools/convert_to_d2.py {path}"
            )
        state = {name: found[name].to(tensor.dtype) for name, tensor in needed.items() if name not in wrong}
    model.load_state_dict(state, strict=False)
    anew = sorted({name.rpartition(".")[0] for name in wrong})
    return f"{path}: a detector; " + (f"starting anew: {', '.join(anew)}" if anew else "all of it is used")


def describe_detector(path: str | Path) -> dict:
    """The provenance of a detector, for the record of a run that starts from it."""
    return {
        "source": str(path),
        "sha256": sha256(path),
        "format": "a fine-tuned detector",
        "branch": "online",
        "method": "detector",
        "step": -1,
    }


def _tensors(contents):
    """The tensors of a model's file, by name; {} of another file."""
    model = contents.get("model") if type(contents) is dict else None
    return model if type(model) is dict and all(type(name) is str for name in model) else {}
