"""Checkpoints of known pre-training methods -> the 265 tensors of a ResNet-50 under torchvision's names.

A format is a row of :data:`FORMATS`: where each branch's backbone lies, and the keys that are dropped knowingly.
Reading fails closed: a missing, misshapen or not-finite tensor, or a key that no row accounts for, is an error that
names it. Opening a file never runs its code (safe_load.py).
"""

import difflib
import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
import yaml
from torchvision.models import resnet50

from transfer.config import InputError
from transfer.safe_load import Call, as_tensor, open_checkpoint, printable

BRANCHES = ("online", "target")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std of RGB in [0, 1]
UNSCALED = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

# State dicts are looked for under the first of these keys that a file has; "" is the file itself.
CONTAINERS = ("state_dict", "model", "model_state_dict", "")
# What wrappers put before every name: DataParallel, torch.compile, LightningModules (byol-pytorch's example: learner).
WRAPPERS = ("module.", "_orig_mod.", "model.", "learner.")
# Children of a ResNet by number: nn.Sequential(*resnet.children()).
SEQUENTIAL = {"0.": "conv1.", "1.": "bn1.", "4.": "layer1.", "5.": "layer2.", "6.": "layer3.", "7.": "layer4."}


@dataclass(frozen=True)
class Format:
    """``branches``: where the backbone's names begin, "prefix" or "key/key/prefix" below those keys; a tuple where a
    family has several spellings. ``drops``: how all other names of the state dict begin; the longest prefix that fits
    a name decides. ``rename``: first component of a name -> torchvision's. ``pixels``: mean and std of the RGB input
    in [0, 1] that the backbone was trained on. All are convolutions with torchvision's stride, in the 3x3.
    """

    name: str
    branches: dict
    drops: tuple = ()
    rename: dict = field(default_factory=dict)
    pixels: tuple = IMAGENET

    def places(self):
        """(branch, container, prefix) of each place; container None: the first of :data:`CONTAINERS`."""
        for branch, places in self.branches.items():
            for place in (places,) if isinstance(places, str) else places:
                container, slash, prefix = place.rpartition("/")
                yield branch, container if slash else None, prefix


OURS = "this project's pre-training"
# The first row that accounts for every name is taken: of rows with the same prefixes, the one with fewer drops first.
FORMATS = (
    Format(OURS, {"online": "model/online.backbone.", "target": "model/target.backbone."},
           drops=("online.projector.", "target.projector.", "predictor.", "queue.")),
    # torchvision and timm also write fc; extracted backbones (Barlow Twins' resnet50.pth, SwAV's, OpenSelfSup's and
    # lucidrains' BYOL) are bare. timm's training checkpoints have the moving average beside the weights.
    Format("torchvision, timm", {"online": "", "target": "state_dict_ema/"}, drops=("fc.",)),
    Format("SwAV, DeepCluster v2", {"online": ""}, drops=("projection_head.", "prototypes.")),
    # encoder_q, encoder_k and their like
    # RSA is a subclass of BYOL there: a file does not say which of them it holds, nor on which data set.
    Format("the authors' RSA or BYOL", {"online": "encoder_q.", "target": "encoder_k."},
           drops=("encoder_q_head.", "encoder_k_head.", "pred.")),
    Format("MoCo v1, v2", {"online": "encoder_q.", "target": "encoder_k."},
           drops=("encoder_q.fc.", "encoder_k.fc.", "queue")),
    Format("MoCo v3", {"online": "base_encoder.", "target": "momentum_encoder."},
           drops=("base_encoder.fc.", "momentum_encoder.fc.", "predictor.")),
    Format("DenseCL, OpenSelfSup, MMSelfSup 0.x",
           {"online": ("encoder_q.0.", "online_net.0.", "base_encoder.0.", "encoder.0."),
            "target": ("encoder_k.0.", "target_net.0.", "momentum_encoder.0.")},
           # backbone and neck are the online branch's own modules under a second name
           drops=("encoder_q.1.", "encoder_k.1.", "online_net.1.", "target_net.1.", "base_encoder.1.",
                  "momentum_encoder.1.", "encoder.1.", "backbone.", "neck.", "head.", "queue")),
    # encoder
    Format("InstDis, PIRL, InfoMin (PyContrast)", {"online": "model/encoder.", "target": "model_ema/encoder."},
           drops=("head.", "head_jig.")),
    Format("SimSiam", {"online": "encoder."}, drops=("encoder.fc.", "predictor.")),
    Format("BYOL (sthalles/PyTorch-BYOL)",
           {"online": "online_network_state_dict/encoder.", "target": "target_network_state_dict/encoder."},
           drops=("projetion.",), rename=SEQUENTIAL, pixels=UNSCALED),
    Format("BYOL (yaox12/BYOL-PyTorch)", {"online": "online_network.encoder.", "target": "target_network.encoder."},
           drops=("online_network.projetion.", "target_network.projetion.", "predictor."), rename=SEQUENTIAL),
    Format("BYOL (lucidrains/byol-pytorch)", {"online": "online_encoder.net.", "target": "target_encoder.net."},
           # net is the online encoder's under a second name
           drops=("online_encoder.", "target_encoder.", "online_encoder.net.fc.", "target_encoder.net.fc.",
                  "online_predictor.", "net.")),
    # backbone
    Format("Barlow Twins", {"online": "model/backbone."}, drops=("projector.", "bn.")),
    Format("MMSelfSup 1.x, OpenSelfSup",
           {"online": "backbone.",
            "target": ("encoder_k.module.0.", "target_net.module.0.", "momentum_encoder.module.0.")},
           drops=("encoder_k.", "target_net.", "momentum_encoder.", "neck.", "head.", "queue", "memory_bank.",
                  "data_preprocessor.")),
    Format("solo-learn", {"online": "backbone.", "target": "momentum_backbone."},
           drops=("classifier.", "momentum_classifier.", "projector.", "momentum_projector.", "predictor.",
                  "predictor2.", "head.", "momentum_head.", "dino_loss_func.", "prototypes.", "queue",
                  "local_memory_", "transformer_encoder.", "whitening.")),
    Format("lightly",
           {"online": "backbone.",
            "target": ("backbone_momentum.", "momentum_backbone.", "teacher_backbone.", "key_backbone.")},
           drops=("projection_head", "prediction_head", "projection_mlp.", "prediction_mlp.", "local_projection_head",
                  "momentum_projection_head.", "teacher_projection_head.", "key_projection_head.", "prototypes.",
                  "memory_bank.", "queues.", "criterion.", "online_classifier.", "knn_classifier."),
           rename=SEQUENTIAL),
    # its teacher has the plain names
    Format("lightly's DINO", {"online": "student_backbone.", "target": "backbone."},
           drops=("student_projection_head.", "projection_head.", "criterion.", "online_classifier.")),
    Format("VISSL", {"online": ("classy_state_dict/base_model/model/trunk/_feature_blocks.", "_feature_blocks.",
                                "classy_state_dict/base_model/model/trunk/base_model._feature_blocks."),
                     "target": "classy_state_dict/loss/moco_encoder.trunk._feature_blocks."},
           drops=("moco_encoder.heads.", "queue", "heads.")),
)


@lru_cache
def resnet50_shapes():
    """{torchvision name: shape} of the 53 convolutions and 53 x 4 BatchNorm tensors, 265 in all."""
    with torch.device("meta"):
        state = resnet50().state_dict()
    return {name: tensor.shape for name, tensor in state.items()
            if not name.startswith("fc.") and not name.endswith("num_batches_tracked")}


@dataclass
class Match:
    """What a row finds in a file: ``found`` {torchvision name: stored value} of ``branch``, where names begin with
    ``prefix``, and the names that it does not account for."""

    layout: Format
    branch: str
    prefix: str
    found: dict
    left_over: list

    def whole(self):
        return len(self.found) == len(resnet50_shapes()) and not self.left_over


def read_checkpoint(path, branch="online"):
    """Checkpoint file -> (265 float32 CPU tensors under torchvision's names, provenance dict of plain JSON values).

    The provenance says what the backbone was trained on, for fine-tuning to check: ``pixel_mean`` and ``pixel_std``
    (0-255), ``input_format`` and ``stride_in_1x1``. Raises InputError with one line that names the file and what is
    missing, left over, misshapen or not finite.
    """
    if not Path(path).is_file():
        raise InputError(f"no checkpoint {path}: give the file as INPUT, or pre-train first (tools/pretrain.py)")
    with open_checkpoint(path) as contents:
        if type(contents) is not dict or not all(type(name) is str for name in contents):
            raise InputError(f"{path} does not hold a state dict but a {type(contents).__name__}")
        match = find_branch(contents, branch, path)
        state = read_tensors(match.found, path, match.prefix)
        layout, own = match.layout, match.layout.name == OURS
        mean, std = _own_pixels(contents) if own else layout.pixels
        method = contents.get("method", "unknown") if own else layout.name
        step = contents.get("step", contents.get("global_step", -1))
    provenance = {
        "source": Path(path).name, "sha256": sha256(path), "format": layout.name, "branch": branch,
        "method": printable(method) if type(method) is str else "unknown", "step": step if type(step) is int else -1,
        "pixel_mean": [round(255 * value, 3) for value in mean], "pixel_std": [round(255 * value, 3) for value in std],
        "input_format": "RGB", "stride_in_1x1": False,
    }
    return state, provenance


def find_branch(contents, branch, path):
    """The :class:`Match` of ``branch`` in the first row that accounts for the file. Raises InputError."""
    layout, matches = None, []
    for row in FORMATS:
        own = list(_matches(row, contents))
        if any(match.whole() for match in own):
            layout, matches = row, own
            break
        matches += own
    nearest = max((match for match in matches if match.branch == branch),
                  key=lambda match: (len(match.found), -len(match.left_over)), default=None)
    if nearest and nearest.whole():
        return nearest
    if nearest and nearest.found:
        missing = [nearest.prefix + name for name in resnet50_shapes() if name not in nearest.found]
        raise InputError(f"{path}: not a ResNet-50 of {nearest.layout.name}, the nearest format: {len(missing)} of "
                         f"{len(resnet50_shapes())} tensors missing{_some(missing)}, {len(nearest.left_over)} left over"
                         f"{_some(nearest.left_over)}; its names begin with {_beginnings(contents)}")
    if layout:
        raise InputError(f"{path}: a checkpoint of {layout.name} without the {branch} branch")
    raise InputError(f"{path}: unknown checkpoint, its keys begin with {_beginnings(contents)}; nearest format: "
                     f"{_most_alike(contents)}; known: {'; '.join(layout.name for layout in FORMATS)}")


def _matches(layout, contents):
    """A :class:`Match` for each place of ``layout`` where the file has names."""
    for branch, container, prefix in layout.places():
        state = _state_dict(contents, container)
        if not any(name.startswith(prefix) for name in state):
            continue
        # The other places of the same branch are not accounted for: a file that had both would be ambiguous.
        taken = {**dict.fromkeys(layout.drops, False),
                 **{other: False for kind, _, other in layout.places() if kind != branch}, prefix: True}
        match = Match(layout, branch, prefix, {}, [])
        for name, value in state.items():
            longest = max((start for start in taken if name.startswith(start)), key=len, default=None)
            short = _rename(name.removeprefix(prefix), layout.rename)
            if longest is not None and not taken[longest]:
                continue
            if longest is not None and short in resnet50_shapes() and short not in match.found:
                match.found[short] = value
            elif longest is None or not short.endswith("num_batches_tracked"):
                match.left_over.append(name)
        yield match


def _state_dict(contents, container):
    """{name: value} below the keys "a/b", or below the first of :data:`CONTAINERS` for None, without wrappers."""
    if container is None:
        container = next(key for key in CONTAINERS if not key or type(contents.get(key)) is dict)
    for key in filter(None, container.split("/")):
        contents = contents.get(key) if type(contents) is dict else None
    state = {str(name): value for name, value in contents.items()} if type(contents) is dict else {}
    while wrapper := next((w for w in WRAPPERS if state and all(name.startswith(w) for name in state)), None):
        state = {name.removeprefix(wrapper): value for name, value in state.items()}
    return state


def _rename(name, renames):
    first, dot, rest = name.partition(".")
    return renames.get(first + dot, first + dot) + rest


def read_tensors(found, path, prefix=""):
    """{torchvision name: stored value} of all 265 -> the same, float32 and contiguous, checked. Raises InputError."""
    state = {}
    for name, shape in resnet50_shapes().items():
        tensor = as_tensor(found[name])
        if tensor is None or tensor.shape != shape:
            raise InputError(f"{path}: {prefix}{name} has shape {_kind(found[name], tensor)}, "
                             f"a ResNet-50 needs {tuple(shape)}")
        tensor = tensor.read()
        if not tensor.is_floating_point():
            raise InputError(f"{path}: {prefix}{name} holds {tensor.dtype}, a ResNet-50 needs floats")
        # A copy, because small tensors may be views of one large storage
        state[name] = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if not torch.isfinite(torch.stack(state[name].aminmax())).all():
            raise InputError(f"{path}: {prefix}{name} holds NaN or infinite values")
    return state


def sha256(path):
    """Hexadecimal sha256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _own_pixels(contents):
    """Mean and std in [0, 1] from the configuration in a checkpoint of this project."""
    config = yaml.safe_load(contents.get("config") or "{}")
    mean, std = (config.get("DATA", {}).get(key, values) for key, values in zip(("MEAN", "STD"), IMAGENET))
    if len(mean) != 3 or len(std) != 3:
        raise ValueError("DATA.MEAN and DATA.STD of its configuration are not those of three channels")
    return [float(value) for value in mean], [float(value) for value in std]


def _kind(value, tensor):
    if isinstance(value, Call):  # what is to be called may be nested to any depth
        return printable(value.function if isinstance(value.function, str) else "a call")
    return printable(tensor.shape if tensor else type(value).__name__)


def _beginnings(contents):
    found = sorted({name.split(".")[0] for name in _state_dict(contents, None)})
    return ", ".join(printable(name, 40) for name in found[:8]) or "nothing"


def _most_alike(contents):
    """The format one of whose prefixes is most like what stands before a ResNet's names, or names at all, in a file."""
    last = "layer4.2.bn3.weight"
    names = list(_state_dict(contents, None))
    starts = {name.removesuffix(last) for name in names if name.endswith(last)} or {name.split(".")[0] for name in names}

    def likeness(layout):
        return max((difflib.SequenceMatcher(None, start[:60], prefix).ratio()
                    for start in sorted(starts)[:8] for _, _, prefix in layout.places()), default=0)

    return max(FORMATS, key=likeness).name


def _some(names, most=4):
    shown = ", ".join(printable(name, 80) for name in names[:most])
    return f" ({shown}{', …' if len(names) > most else ''})" if names else ""
