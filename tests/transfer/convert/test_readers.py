"""Each family's checkpoint, in its real layout, gives back the features of the network that wrote it.

The layouts are built from the modules and names of each family's public code, which the comments name; the
weights are random. Where a family writes objects of its own libraries beside the tensors, classes with the
same names replace them. For speed the ResNet-50 is an eighth as wide inside its blocks; it has 265 tensors of
the same names and 2048 features.
"""

import argparse
import copy
import json
import re
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.config import get_cfg
from rsa_detectron2.pretrain.method import networks as own
from rsa_detectron2.pretrain.method.objectives import Method
from rsa_detectron2.transfer.convert import architectures
from rsa_detectron2.transfer.convert.formats import OURS
from rsa_detectron2.transfer.convert.inspect import inspect
from rsa_detectron2.transfer.convert.metadata import parse_pixels
from rsa_detectron2.transfer.convert.provenance import remarks
from rsa_detectron2.transfer.convert.readers import read_checkpoint
from rsa_detectron2.transfer.convert.writers import detectron2_name


def resnet50():
    return ResNet(Bottleneck, [3, 4, 6, 3], width_per_group=8)


with torch.device("meta"):
    CHILDREN = [name for name, _ in resnet50().named_children()]
    SHAPES = {
        name: tensor.shape
        for name, tensor in resnet50().state_dict().items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def randomize(network, seed):
    """Also make BatchNorm's weights and statistics random, so that a swapped pair of tensors changes the
    features."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, generator=generator)
            elif isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                module.weight.uniform_(0.5, 1, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
    return network.eval()


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    wide = architectures.tensor_shapes
    assert SHAPES.keys() == wide().keys()
    monkeypatch.setattr(
        architectures, "tensor_shapes", lambda name="resnet50": SHAPES if name == "resnet50" else wide(name)
    )


@pytest.fixture(scope="module")
def pair():
    """Online and target network."""
    return {"online": randomize(resnet50(), 1), "target": randomize(resnet50(), 2)}


def with_fc(network, fc):
    """The same backbone, not a copy, with another fc."""
    other = copy.copy(network)
    other._modules = {**network._modules, "fc": fc}
    return other


def trunk(network):
    """Convolutions and pooling in an nn.Sequential, without fc. It returns [B, 2048, 1, 1]."""
    return nn.Sequential(*list(network.children())[:-1])


def net(**parts):
    """A module with these modules as children and these tensors as buffers."""
    module = nn.Module()
    for name, part in parts.items():
        module.register_buffer(name, part) if isinstance(part, torch.Tensor) else module.add_module(
            name, part
        )
    return module


def parallel(**parts):
    return nn.DataParallel(net(**parts)).state_dict()


def mlp():
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4))


STAND_INS = {}


def foreign(module, name, **state):
    """An instance of a class that exists only in the process that writes the file."""
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        parent = STAND_INS.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
    kind = type(name, (), {"__module__": module})
    setattr(parent, name, kind)
    instance = kind()
    instance.__dict__.update(state)
    return instance


def save(contents, path, **options):
    with pytest.MonkeyPatch.context() as patch:
        for name, module in STAND_INS.items():
            patch.setitem(sys.modules, name, module)
        torch.save(contents, path, **options)
    return path


class SwavResNet(nn.Module):
    """facebookresearch/swav src/resnet50.py: padding is a module of its own, and the heads are in the same
    module."""

    def __init__(self, network):
        super().__init__()
        self._modules.update(network._modules)
        del self.fc
        self.projection_head, self.prototypes = mlp(), nn.Linear(4, 4, bias=False)

    def forward(self, images):
        padded = nn.functional.pad(images, (1, 1, 1, 1))
        x = nn.functional.conv2d(padded, self.conv1.weight, stride=2, padding=2)
        x = self.maxpool(self.relu(self.bn1(x)))
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))


def vissl_trunk(network):
    """facebookresearch/vissl models/trunks/resnext.py."""
    blocks = nn.ModuleDict(
        [
            ("conv1", network.conv1),
            ("bn1", network.bn1),
            ("conv1_relu", network.relu),
            ("maxpool", network.maxpool),
            *((f"layer{i}", getattr(network, f"layer{i}")) for i in range(1, 5)),
            ("avgpool", network.avgpool),
            ("flatten", nn.Flatten(1)),
        ]
    )
    return net(_feature_blocks=blocks)


def ours(heads, queue=0, target=True, config=""):
    """The networks of pretrain/method/networks.py, as pretrain/engine/trainer.py saves them."""
    backbone = timm.create_model("resnet50", num_classes=0, base_width=8)
    cfg = get_cfg().MODEL
    cfg.HIDDEN_DIM, cfg.OUT_DIM, cfg.QUEUE = 8, 4, queue
    method = Method(None, heads, target, queue=queue > 0)
    model = own.Networks(randomize(backbone, 3), method, cfg)
    backbones = {"online": model.online.backbone}
    if target:
        backbones["target"] = randomize(model.target.backbone, 4)
    return {
        "format": "rsa-pretraining",
        "method": "rsa",
        "step": 70,
        "config": config,
        "model": model.state_dict(),
    }, backbones


def layouts(pair):
    """{family: function that gives (content of the file, {branch: source network})}."""
    q, k = pair["online"], pair["target"]
    both = {"online": with_fc(q, nn.Identity()), "target": with_fc(k, nn.Identity())}
    only_q = {"online": both["online"]}
    trunks = {"online": trunk(q), "target": trunk(k)}
    neck = nn.Sequential(nn.Linear(4, 4))  # stands for any head, because only the names count
    swav = SwavResNet(q).eval()
    queue, step = torch.zeros(4, 8), torch.zeros(1, dtype=torch.long)

    def lightning(**parts):
        return {
            "epoch": 9,
            "global_step": 123,
            "pytorch-lightning_version": "2.1.0",
            "loops": {"fit_loop": {}},
            "optimizer_states": [torch.optim.SGD(neck.parameters(), 0.1).state_dict()],
            "hyper_parameters": {
                "cfg": foreign("omegaconf.dictconfig", "DictConfig", _content={"lr": np.float64(0.1)})
            },
            "state_dict": net(**parts).state_dict(),
        }

    def mm(**parts):  # mmcv's and mmengine's runner
        return {
            "meta": {"epoch": 200, "mmselfsup_version": "1.0"},
            "state_dict": net(**parts).state_dict(),
            "message_hub": {
                "log_scalars": OrderedDict(
                    loss=foreign("mmengine.logging.history_buffer", "HistoryBuffer", _log_history=np.ones(3))
                )
            },
        }

    simple = {
        "epoch": 200,
        "arch": "resnet50",
        "optimizer": torch.optim.SGD(neck.parameters(), 0.1).state_dict(),
    }
    return {
        "ours": lambda: ours(own.byol_heads),
        # tmllab/RSA methods/BYOL.py; train_multi.py saves the bare state dict
        "the authors' RSA": lambda: (
            parallel(
                encoder_q=both["online"],
                encoder_k=both["target"],
                encoder_q_head=mlp(),
                encoder_k_head=mlp(),
                pred=mlp(),
            ),
            both,
        ),
        # facebookresearch/moco moco/builder.py, main_moco.py
        "MoCo v2": lambda: (
            {
                **simple,
                "state_dict": parallel(
                    encoder_q=with_fc(q, mlp()), encoder_k=with_fc(k, mlp()), queue=queue, queue_ptr=step
                ),
            },
            both,
        ),
        # facebookresearch/moco-v3 moco/builder.py
        "MoCo v3": lambda: (
            {
                **simple,
                "scaler": {"scale": 65536.0},
                "state_dict": parallel(
                    base_encoder=with_fc(q, mlp()), momentum_encoder=with_fc(k, mlp()), predictor=mlp()
                ),
            },
            both,
        ),
        # facebookresearch/simsiam simsiam/builder.py
        "SimSiam": lambda: (
            {**simple, "state_dict": parallel(encoder=with_fc(q, mlp()), predictor=mlp())},
            only_q,
        ),
        # HobbitLong/PyContrast learning/contrast_trainer.py: DDP around the model, none around its
        # moving average
        "InfoMin": lambda: (
            {
                "model": parallel(encoder=both["online"], head=mlp(), head_jig=net(fc1=mlp(), fc2=neck)),
                "model_ema": net(
                    encoder=both["target"], head=mlp(), head_jig=net(fc1=mlp(), fc2=neck)
                ).state_dict(),
                "contrast": {"memory": queue},
                "epoch": 200,
                "opt": argparse.Namespace(method="InfoMin"),
            },
            both,
        ),
        # WXinlong/DenseCL openselfsup/models/densecl.py: backbone is encoder_q[0] again
        "DenseCL": lambda: (
            mm(
                encoder_q=nn.Sequential(both["online"], net(mlp=mlp(), mlp2=nn.Conv2d(4, 4, 1))),
                encoder_k=nn.Sequential(both["target"], net(mlp=mlp(), mlp2=nn.Conv2d(4, 4, 1))),
                backbone=both["online"],
                queue=queue,
                queue_ptr=step,
                queue2=queue,
                queue2_ptr=step,
            ),
            both,
        ),
        # open-mmlab/mmselfsup 1.x models/algorithms/byol.py, models/utils/ema.py
        "MMSelfSup BYOL": lambda: (
            mm(
                backbone=both["online"],
                neck=mlp(),
                head=net(predictor=mlp()),
                target_net=net(steps=step, module=nn.Sequential(both["target"], mlp())),
            ),
            both,
        ),
        # sthalles/PyTorch-BYOL trainer.py, models/resnet_base_network.py
        "BYOL sthalles": lambda: (
            {
                "online_network_state_dict": net(encoder=trunk(q), projetion=net(net=mlp())).state_dict(),
                "target_network_state_dict": net(encoder=trunk(k), projetion=net(net=mlp())).state_dict(),
                "optimizer_state_dict": {},
            },
            trunks,
        ),
        # lucidrains/byol-pytorch byol_pytorch.py, examples/lightning: the online encoder's net is net again
        "BYOL lucidrains": lambda: (
            lightning(
                learner=net(
                    net=q,
                    online_encoder=net(net=q, projector=mlp()),
                    target_encoder=net(net=k, projector=mlp()),
                    online_predictor=mlp(),
                )
            ),
            both,
        ),
        "SwAV": lambda: ({**simple, "state_dict": nn.DataParallel(swav).state_dict()}, {"online": swav}),
        # facebookresearch/barlowtwins main.py
        "Barlow Twins": lambda: (
            {
                "epoch": 1000,
                "optimizer": {},
                "model": parallel(
                    backbone=both["online"], projector=mlp(), bn=nn.BatchNorm1d(4, affine=False)
                ),
            },
            only_q,
        ),
        # lightly-ai/lightly examples/pytorch_lightning/byol.py
        "lightly": lambda: (
            lightning(
                backbone=trunk(q),
                backbone_momentum=trunk(k),
                projection_head=net(layers=mlp()),
                prediction_head=net(layers=mlp()),
                projection_head_momentum=net(layers=mlp()),
            ),
            trunks,
        ),
        # vturrisi/solo-learn solo/methods/base.py, mocov2plus.py
        "solo-learn": lambda: (
            lightning(
                backbone=both["online"],
                momentum_backbone=both["target"],
                classifier=neck[0],
                momentum_classifier=neck[0],
                projector=mlp(),
                momentum_projector=mlp(),
                queue=queue,
                queue_ptr=step,
            ),
            both,
        ),
        # facebookresearch/vissl models/base_ssl_model.py, losses/moco_loss.py
        "VISSL": lambda: (
            {
                "phase_idx": 1,
                "iteration": 5,
                "type": "consolidated",
                "classy_state_dict": {
                    "train": True,
                    "optimizer": {"optim": {}},
                    "meters": [],
                    "hooks": {},
                    "base_model": {
                        "model": {
                            "trunk": vissl_trunk(q).state_dict(),
                            "heads": nn.ModuleList([net(clf=mlp())]).state_dict(),
                        },
                        "meta": {"trunk": {}, "heads": []},
                    },
                    "loss": net(
                        queue=queue,
                        queue_ptr=step,
                        moco_encoder=net(trunk=vissl_trunk(k), heads=nn.ModuleList([mlp()])),
                    ).state_dict(),
                },
            },
            {"online": vissl_trunk(q)._feature_blocks, "target": vissl_trunk(k)._feature_blocks},
        ),
        "torchvision": lambda: (q.state_dict(), only_q),
    }


# Family: the format that must be found, and how torch.save writes the file.
FAMILIES = {
    "ours": OURS,
    "the authors' RSA": "the authors' RSA or BYOL",
    "MoCo v2": "MoCo v1, v2",
    "MoCo v3": "MoCo v3",
    "SimSiam": "SimSiam",
    "InfoMin": "InstDis, PIRL, InfoMin (PyContrast)",
    "DenseCL": "DenseCL, OpenSelfSup, MMSelfSup 0.x",
    "MMSelfSup BYOL": "MMSelfSup 1.x, OpenSelfSup",
    "BYOL sthalles": "BYOL (sthalles/PyTorch-BYOL)",
    "BYOL lucidrains": "BYOL (lucidrains/byol-pytorch)",
    "SwAV": "SwAV, DeepCluster v2",
    "Barlow Twins": "Barlow Twins",
    "lightly": "lightly",
    "solo-learn": "solo-learn",
    "VISSL": "VISSL",
    "torchvision": "torchvision, timm",
}
LEGACY = {"InfoMin", "DenseCL", "torchvision"}  # written before torch 1.6, or in the format of that time


def features(network):
    """The last block's output [2, 2048, 2, 2] and the pooled features [2, 2048] of :data:`IMAGES`."""
    layer4 = []
    last = [module for module in network.modules() if hasattr(module, "conv3")][-1]
    hook = last.register_forward_hook(lambda module, inputs, output: layer4.append(output))
    with torch.no_grad():
        pooled = IMAGES
        for part in network.values() if isinstance(network, nn.ModuleDict) else [network]:
            pooled = part(pooled)
    hook.remove()
    return layer4[0], pooled.flatten(1)


def assert_same_features(state, source):
    network = resnet50()
    result = network.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert all(name.startswith("fc.") or name.endswith("num_batches_tracked") for name in result.missing_keys)
    network.fc = nn.Identity()
    for found, expected in zip(features(network.eval()), features(source)):
        assert expected.std() > 0.01
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_the_sources(pair, tmp_path, family):
    contents, sources = layouts(pair)[family]()
    path = save(contents, tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=family not in LEGACY)
    for branch in ("online", "target"):
        if branch not in sources:
            with pytest.raises(InputError, match=f"without the {branch} branch"):
                read_checkpoint(path, branch)
            continue
        state, provenance = read_checkpoint(path, branch)
        assert (provenance["format"], provenance["branch"]) == (FAMILIES[family], branch)
        assert list(state) == list(SHAPES)
        assert_same_features(state, sources[branch])
        assert json.loads(json.dumps(provenance)) == provenance
    path.unlink()


def test_timm_safetensors(tmp_path):
    """A file as on the Hugging Face hub."""
    network = randomize(timm.create_model("resnet50", base_width=8), 5)
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(network.state_dict(), path, metadata={"format": "pt"})
    network.reset_classifier(0)
    state, provenance = read_checkpoint(path)
    assert provenance["format"] == "torchvision, timm"
    assert_same_features(state, network)


def small(*prefixes, rename=lambda name: name):
    """The names of a ResNet-50 below each prefix. Each tensor holds one number, its place, and takes little
    space in a file."""
    return {
        prefix + rename(name): torch.tensor(float(1000 * block + place)).expand(shape)
        for block, prefix in enumerate(prefixes)
        for place, (name, shape) in enumerate(SHAPES.items())
    }


def by_number(name):
    """The name in nn.Sequential(*resnet.children()) for torchvision's name."""
    first, _, rest = name.partition(".")
    return f"{CHILDREN.index(first)}.{rest}"


def heads(*names):
    return {name + "0.weight": torch.zeros(4) for name in names}


def linear(*names):
    return {name + end: torch.zeros(4) for name in names for end in ("weight", "bias")}


def hugging_face(name):
    """The name in transformers' ResNetModel for torchvision's name."""
    name = re.sub(
        r"^conv1\.",
        "embedder.embedder.convolution.",
        re.sub(r"^bn1\.", "embedder.embedder.normalization.", name),
    )
    name = re.sub(r"^layer(\d)\.(\d+)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}.", name)
    name = re.sub(r"\.(conv|bn)(\d)\.", lambda m: f".layer.{int(m[2]) - 1}.{PARTS[m[1]]}.", name)
    return re.sub(r"\.downsample\.(\d)\.", lambda m: f".shortcut.{list(PARTS.values())[int(m[1])]}.", name)


PARTS = {"conv": "convolution", "bn": "normalization"}


def counters(state):
    """Add BatchNorm's counters, which every real file has beside the statistics."""
    return state | {
        name.replace("running_mean", "num_batches_tracked"): torch.tensor(7)
        for name in state
        if name.endswith("running_mean")
    }


def ema(state):
    return {name: tensor + 1000 for name, tensor in state.items()}


LIGHTLY_MODEL = foreign("lightly_train.models", "ModelWrapper")


def train_lightly(inner, online, target="", **more):
    prefixes = [f"{model}.wrapped_model.{inner}." for model in (online, target) if model]
    fc = [prefix + "fc." for prefix in prefixes if inner == "_model"]  # timm's class keeps it
    return {
        "state_dict": counters(small(*prefixes)) | linear(*fc),
        "lightly_train": {
            "version": "0.6",
            "models": {"model": LIGHTLY_MODEL},
            "normalize_args": {"mean": (0.5, 0.4, 0.3), "std": (0.25, 0.2, 0.1)},
        },
        **more,
    }


# Other layouts: the content of the file, the format that must be found, and whether it has a target.
VARIANTS = {
    "ours, without target": (
        {"format": "rsa-pretraining", "model": small("online.backbone.") | heads("predictor.")},
        OURS,
        0,
    ),
    "MoCo v1": (
        {
            "state_dict": small("module.encoder_q.", "module.encoder_k.")
            | heads("module.encoder_q.fc.", "module.encoder_k.fc.", "module.queue")
        },
        "MoCo v1, v2",
        1,
    ),
    "MoCo v3, linear": ({"state_dict": small("module.") | heads("module.fc.")}, "torchvision, timm", 0),
    "Barlow Twins, resnet50.pth": (small(""), "torchvision, timm", 0),
    "SwAV, released": (
        small("module.") | heads("module.projection_head.", "module.prototypes."),
        "SwAV, DeepCluster v2",
        0,
    ),
    "DeepCluster v2": (
        {"state_dict": small("module.") | heads("module.projection_head.", "module.prototypes.prototypes0.")},
        "SwAV, DeepCluster v2",
        0,
    ),
    "InstDis": (
        {"model": small("module.encoder.") | heads("module.head."), "contrast": heads("memory")},
        "InstDis, PIRL, InfoMin (PyContrast)",
        0,
    ),
    "OpenSelfSup BYOL": (
        {
            "state_dict": small("online_net.0.", "target_net.0.", "backbone.")
            | heads("online_net.1.", "target_net.1.", "head.predictor.")
        },
        "DenseCL, OpenSelfSup, MMSelfSup 0.x",
        1,
    ),
    "OpenSelfSup SimCLR": (
        {"state_dict": small("backbone.") | heads("neck.")},
        "MMSelfSup 1.x, OpenSelfSup",
        0,
    ),
    "OpenSelfSup NPID": (
        {"state_dict": small("backbone.") | heads("neck.", "memory_bank.")},
        "MMSelfSup 1.x, OpenSelfSup",
        0,
    ),
    "OpenSelfSup, extracted": ({"state_dict": small(""), "author": "OpenSelfSup"}, "torchvision, timm", 0),
    "MMSelfSup 0.x SimSiam": (
        {"state_dict": small("encoder.0.", "backbone.") | heads("encoder.1.", "neck.", "head.")},
        "DenseCL, OpenSelfSup, MMSelfSup 0.x",
        0,
    ),
    "MMSelfSup 0.x MoCo v3": (
        {
            "state_dict": small("base_encoder.0.", "momentum_encoder.0.", "backbone.")
            | heads("base_encoder.1.", "momentum_encoder.1.", "neck.", "head.")
        },
        "DenseCL, OpenSelfSup, MMSelfSup 0.x",
        1,
    ),
    "MMSelfSup 1.x MoCo": (
        {
            "state_dict": small("backbone.", "encoder_k.module.0.")
            | heads("neck.", "encoder_k.module.1.", "encoder_k.steps", "queue", "queue_ptr")
        },
        "MMSelfSup 1.x, OpenSelfSup",
        1,
    ),
    "BYOL yaox12": (
        {
            "steps": 9,
            "model": small(
                "module.online_network.encoder.", "module.target_network.encoder.", rename=by_number
            )
            | heads(
                "module.online_network.projetion.l1.",
                "module.target_network.projetion.l1.",
                "module.predictor.predictor.l1.",
            ),
        },
        "BYOL (yaox12/BYOL-PyTorch)",
        1,
    ),
    "BYOL lucidrains": (
        small("online_encoder.net.", "target_encoder.net.", "net.")
        | heads(
            "net.fc.",
            "online_encoder.net.fc.",
            "target_encoder.net.fc.",
            "online_encoder.projector.",
            "target_encoder.projector.",
            "online_predictor.",
        ),
        "BYOL (lucidrains/byol-pytorch)",
        1,
    ),
    "lightly models.MoCo": (
        {
            "state_dict": small("model.backbone.", "model.momentum_backbone.", rename=by_number)
            | heads("model.projection_head.", "model.momentum_projection_head.")
        },
        "lightly",
        1,
    ),
    "lightly benchmark BYOL": (
        {
            "state_dict": small("backbone.", "teacher_backbone.")
            | heads("projection_head.", "prediction_head.", "teacher_projection_head.", "online_classifier.")
        },
        "lightly",
        1,
    ),
    "lightly benchmark MoCo": (
        {
            "state_dict": small("backbone.", "key_backbone.")
            | heads(
                "projection_head.", "key_projection_head.", "criterion.memory_bank.bank", "online_classifier."
            )
        },
        "lightly",
        1,
    ),
    "lightly SwAV": (
        {"state_dict": small("backbone.", rename=by_number) | heads("projection_head.", "prototypes.")},
        "lightly",
        0,
    ),
    "lightly benchmark DINO": (
        {
            "state_dict": small("student_backbone.", "backbone.")
            | heads("student_projection_head.", "projection_head.", "criterion.center", "online_classifier.")
        },
        "lightly's DINO",
        1,
    ),
    "lightly benchmark VICRegL": (
        {
            "state_dict": small("backbone.")
            | heads("projection_head.", "local_projection_head.", "online_classifier.")
        },
        "lightly",
        0,
    ),
    "solo-learn DINO": (
        {
            "state_dict": small("backbone.", "momentum_backbone.")
            | heads("head.mlp.", "momentum_head.mlp.", "dino_loss_func.center")
            | linear("classifier."),
        },
        "solo-learn",
        1,
    ),
    "VISSL, trunk only": ({"model_state_dict": small("_feature_blocks.")}, "VISSL", 0),
    "VISSL, feature extractor": (
        {
            "classy_state_dict": {
                "base_model": {"model": {"trunk": small("base_model._feature_blocks."), "heads": {}}},
                "loss": {},
            }
        },
        "VISSL",
        0,
    ),
    "timm training": (
        {
            "state_dict": small("") | heads("fc."),
            "args": argparse.Namespace(model="resnet50"),
            "state_dict_ema": {n: t + 1000 for n, t in small("").items()} | heads("fc."),
        },
        "torchvision, timm",
        1,
    ),
    # containers and wrappers
    "under network": ({"network": small("module."), "epoch": 9}, "torchvision, timm", 0),
    "OBoW's student": ({"network": small("") | linear("fc.")}, "torchvision, timm", 0),
    "under module": ({"module": small("model.")}, "torchvision, timm", 0),
    "FSDP": ({"model": small("_fsdp_wrapped_module.")}, "torchvision, timm", 0),
    "FSDP of parts": (
        {"model": small("", rename=lambda n: n.replace("layer1.", "layer1._fsdp_wrapped_module."))},
        "torchvision, timm",
        0,
    ),
    "Fabric": (small("_forward_module.module."), "torchvision, timm", 0),
    "timm in transformers": (small("timm_model."), "torchvision, timm", 0),
    "timm backbone in transformers": (small("_backbone."), "torchvision, timm", 0),
    "a compiled part": (
        small("", rename=lambda n: n.replace("layer1.", "layer1._orig_mod.")),
        "torchvision, timm",
        0,
    ),
    "an average beside it": (
        {"model": small(""), "model_ema": ema(small("module.")) | {"n_averaged": torch.tensor(5)}},
        "torchvision, timm",
        1,
    ),
    "SimSiam with an average": (
        {
            "state_dict": small("module.encoder.") | heads("module.predictor."),
            "state_dict_ema": ema(small("encoder.")) | heads("predictor."),
        },
        "SimSiam",
        1,
    ),
    "AveragedModel": ({"n_averaged": torch.tensor(5)} | small("module."), "torchvision, timm", 0),
    "nn.Sequential": (small("", rename=by_number) | linear("9."), "nn.Sequential of a ResNet's children", 0),
    # lightly-train: https://github.com/lightly-ai/lightly-train, src/lightly_train/_methods
    "lightly-train SimCLR": (train_lightly("_features", "embedding_model"), "lightly-train", 0),
    "lightly-train DenseCL": (
        train_lightly("_model", "query_encoder.embedding_model", "key_encoder.embedding_model"),
        "lightly-train",
        1,
    ),
    "lightly-train DetConB": (
        train_lightly("_features", "embedding_model", "embedding_model_momentum"),
        "lightly-train",
        1,
    ),
    # made for detection
    "PixPro": (
        {
            "opt": argparse.Namespace(arch="resnet50", model="PixPro"),
            "model": counters(small("module.encoder.", "module.encoder_k."))
            | heads(
                "module.projector.",
                "module.projector_k.",
                "module.projector_instance.",
                "module.predictor.",
                "module.value_transform.",
            ),
        },
        "PixPro, SoCo",
        1,
    ),
    "SoCo": (
        {
            "model": counters(small("module.encoder.", "module.encoder_k."))
            | heads(
                "module.neck.lateral_convs.",
                "module.neck_k.fpn_convs.",
                "module.head.",
                "module.head_k.",
                "module.projector.",
                "module.queue",
                "module.queue_ptr",
            ),
            "model_ema": small("encoder."),
        },
        "PixPro, SoCo",
        1,
    ),
    "SlotCon": (
        {
            "args": argparse.Namespace(arch="resnet50"),
            "model": counters(small("module.encoder_q.", "module.encoder_k."))
            | heads(
                "module.projector_q.",
                "module.projector_k.",
                "module.grouping_q.slot_embed.",
                "module.grouping_k.slot_embed.",
                "module.predictor_slot.",
                "module.center",
            ),
        },
        "SlotCon",
        1,
    ),
    "ReSim": (
        {
            "arch": "resnet50",
            "state_dict": counters(small("module.encoder_q.", "module.encoder_k."))
            | heads(
                "module.encoder_q.fc.",
                "module.encoder_k.fc.",
                "module.encoder_q.fpn_lateral2.",
                "module.encoder_k.fpn_output2.",
                "module.queue",
            ),
        },
        "ReSim",
        1,
    ),
    "SetSim": (
        {
            "state_dict": small("encoder_q.0.", "encoder_k.0.", "backbone.")
            | heads(
                "encoder_q.0.fc.",
                "encoder_k.0.fc.",
                "encoder_q.1.mlp.",
                "encoder_k.1.mlp.",
                "queue",
                "queue2",
            )
        },
        "SetSim",
        1,
    ),
    "InstanceLoc": (
        {
            "meta": {},
            "state_dict": small("backbone.", "backbone_k.")
            | heads(
                "neck.lateral_convs.",
                "neck_k.",
                "roi_head.bbox_head.",
                "roi_head_k.bbox_head.",
                "queue",
                "queues",
                "queue_ptr",
            ),
        },
        "InstanceLoc",
        1,
    ),
    # two views of networks
    "DINO, full": (
        {
            "student": counters(small("module.backbone.")) | heads("module.head.mlp."),
            "teacher": ema(small("backbone.")) | heads("head.mlp."),
            "dino_loss": {"center": torch.zeros(1, 4)},
            "args": argparse.Namespace(arch="resnet50"),
            "epoch": 3,
        },
        "DINO",
        1,
    ),
    "VICReg": ({"epoch": 3, "model": small("module.backbone.") | heads("module.projector.")}, "VICReg", 0),
    "VICRegL": (
        {
            "model": small("module.backbone.")
            | heads("module.maps_projector.", "module.projector.")
            | linear("module.classifier.")
        },
        "VICRegL",
        0,
    ),
    "PAWS": (
        {
            "encoder": small("module.") | heads("module.fc.fc1.", "module.fc.bn1.", "module.pred.fc1."),
            "opt": {},
        },
        "PAWS, SuNCEt",
        0,
    ),
    "EMAN's BYOL": (
        {
            "arch": "resnet50",
            "state_dict": small("module.online_net.backbone.", "module.target_net.backbone.")
            | heads("module.online_net.neck.", "module.target_net.neck.", "module.predictor."),
        },
        "BYOL (EMAN)",
        1,
    ),
    "MSF": (
        {
            "opt": argparse.Namespace(arch="resnet50"),
            "state_dict": small("encoder_q.module.", "encoder_t.module.")
            | heads(
                "encoder_q.module.fc.",
                "encoder_t.module.fc.",
                "predict_q.module.",
                "queue",
                "labels",
                "queue_ptr",
            ),
        },
        "MSF, ISD",
        1,
    ),
    "ISD": (
        {
            "state_dict": small("encoder_q.module.", "encoder_k.module.")
            | heads("encoder_q.module.fc.", "encoder_k.module.fc.", "predict_q.module.", "queue", "queue_ptr")
        },
        "MSF, ISD",
        1,
    ),
    "lightly example DINO": (
        {
            "state_dict": small("student_backbone.", "teacher_backbone.", rename=by_number)
            | heads("student_head.", "teacher_head.", "criterion.center")
        },
        "lightly's DINO",
        1,
    ),
    "stable-pretraining BYOL": (
        {
            "state_dict": small("backbone.student.", "backbone.teacher.")
            | heads(
                "backbone.base_ema_coefficient",
                "backbone.final_ema_coefficient",
                "backbone.ema_coefficient",
                "projector.student.",
                "projector.teacher.",
                "predictor.",
                "callbacks_modules.probe.",
                "callbacks_metrics.probe.",
            )
        },
        "stable-pretraining",
        1,
    ),
    "stable-pretraining SimCLR": (
        {"state_dict": small("backbone.") | heads("projector.", "callbacks_modules.probe.")},
        "stable-pretraining",
        0,
    ),
    "bolts SimCLR": (
        {"state_dict": small("encoder.") | heads("projection.model.") | linear("encoder.fc.")},
        "SimCLR of lightning-bolts",
        0,
    ),
    "bolts BYOL": (
        {
            "state_dict": small("online_network.encoder.", "target_network.encoder.")
            | heads("online_network.projector.model.", "target_network.projector.model.", "predictor.model.")
        },
        "BYOL, SimSiam of lightning-bolts",
        1,
    ),
    "bolts MoCo": (
        {
            "state_dict": small("encoder_q.", "encoder_k.")
            | heads("queue.", "val_queue.")
            | linear("encoder_q.fc.", "encoder_k.fc.")
        },
        "MoCo of lightning-bolts",
        1,
    ),
    "bolts SwAV": (
        {"state_dict": small("model.") | heads("model.projection_head.", "model.prototypes.")},
        "SwAV, DeepCluster v2",
        0,
    ),
    "SimCLR sthalles": (
        {"arch": "resnet50", "state_dict": small("backbone.") | linear("backbone.fc.0.", "backbone.fc.2.")},
        "SimCLR (sthalles/SimCLR)",
        0,
    ),
    "SimCLR Spijkervet": (
        small("encoder.") | {f"projector.{i}.weight": torch.zeros(4) for i in (0, 2)},
        "SimCLR (Spijkervet/SimCLR)",
        0,
    ),
    "SimSiam PatrickHua": (
        {
            "state_dict": small("backbone.", "encoder.0.")
            | heads("projector.layer1.", "encoder.1.layer1.", "predictor.layer1.")
        },
        "SimSiam, BYOL, SimCLR (PatrickHua/SimSiam)",
        0,
    ),
    "BYOL PatrickHua": (
        {
            "state_dict": small("backbone.", "target_encoder.0.", "online_encoder.0.")
            | heads(
                "projector.layer1.",
                "online_encoder.1.layer1.",
                "target_encoder.1.layer1.",
                "online_predictor.layer1.",
            )
        },
        "SimSiam, BYOL, SimCLR (PatrickHua/SimSiam)",
        1,
    ),
    "self_supervised": (
        {"model": small("encoder.", rename=by_number) | linear("projector.0.", "projector.2."), "opt": {}},
        "self_supervised (KeremTurgutlu)",
        0,
    ),
    "older solo-learn": (
        {
            "state_dict": small("encoder.", "momentum_encoder.")
            | heads("projector.", "momentum_projector.", "predictor.")
            | linear("classifier.")
        },
        "solo-learn before 1.0.3",
        1,
    ),
    "solo-learn, linear": ({"state_dict": small("backbone.") | linear("classifier.")}, "solo-learn", 0),
    "VISSL DINO": (
        {
            "classy_state_dict": {
                "base_model": {"model": {"trunk": small("_feature_blocks."), "heads": {}}},
                "loss": {
                    n: t + 1000 for n, t in small("momentum_teacher.module.trunk._feature_blocks.").items()
                }
                | heads("momentum_teacher.module.heads."),
            }
        },
        "VISSL",
        1,
    ),
    # files of other libraries
    "Hugging Face, classifier": (
        counters(small("resnet.", rename=hugging_face)) | linear("classifier.1."),
        "Hugging Face",
        0,
    ),
    "Hugging Face": (counters(small("", rename=hugging_face)), "Hugging Face", 0),
    "Detectron2, torchvision's R-50": (
        {
            "__author__": "torchvision",
            "matching_heuristics": True,
            "model": counters(small("", rename=detectron2_name)) | linear("stem.fc."),
        },
        "Detectron2",
        0,
    ),
    "Detectron2, ReSim's": (
        {
            "__author__": "MOCO",
            "matching_heuristics": True,
            "model": small("", rename=detectron2_name) | heads("backbone.fpn_lateral2.", "stem.fc."),
        },
        "Detectron2",
        0,
    ),
    "a backbone alone": (small("backbone."), "a backbone alone", 0),
    "an encoder alone": (small("encoder."), "an encoder alone", 0),
    "torch.compile around DataParallel": (
        {
            "model": small("_orig_mod.module.encoder.")
            | heads("_orig_mod.module.encoder.fc.", "_orig_mod.module.predictor.")
        },
        "SimSiam",
        0,
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_of_a_variant_finds_its_place(tmp_path, variant):
    contents, layout, has_target = VARIANTS[variant]
    path = save(contents, tmp_path / "checkpoint.pth")
    for branch, first in {"online": 0, "target": 1000}.items():
        if branch == "target" and not has_target:
            with pytest.raises(InputError, match="without the target branch"):
                read_checkpoint(path, branch)
            continue
        state, provenance = read_checkpoint(path, branch)
        assert provenance["format"] == layout
        assert [tensor.unique().tolist() for tensor in state.values()] == [[first + i] for i in range(265)]


def test_a_plain_backbone_reads_alike_under_every_wrapper(tmp_path):
    expected = read_checkpoint(save(small(""), tmp_path / "plain.pth"))[0]
    for wrapper in ("module.", "_orig_mod.", "model.", "module.module."):
        state, _ = read_checkpoint(save({"state_dict": small(wrapper)}, tmp_path / "wrapped.pth"))
        assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32(pair, tmp_path, dtype):
    network = copy.deepcopy(pair["online"]).to(dtype)
    state, _ = read_checkpoint(save(network.state_dict(), tmp_path / "other.pth"))
    assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in state.values())
    assert all(torch.equal(state[name], network.state_dict()[name].float()) for name in state)


def test_views_of_one_storage_and_permuted_tensors(pair, tmp_path):
    """Converters from other frameworks write such tensors."""
    flat, contents = torch.cat([pair["online"].state_dict()[name].flatten() for name in SHAPES]), {}
    for name, part in zip(SHAPES, flat.split([shape.numel() for shape in SHAPES.values()])):
        contents[name] = part.view(SHAPES[name])
    contents["conv1.weight"] = contents["conv1.weight"].permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    for legacy in (False, True):
        path = save(contents, tmp_path / "views.pth", _use_new_zipfile_serialization=not legacy)
        state, _ = read_checkpoint(path)
        assert all(torch.equal(state[name], pair["online"].state_dict()[name]) for name in state)


def test_pixels_are_those_of_the_pre_training(tmp_path):
    def provenance(contents):
        return read_checkpoint(save(contents, tmp_path / "checkpoint.pth"))[1]

    imagenet = {
        "pixel_mean": [123.675, 116.28, 103.53],
        "pixel_std": [58.395, 57.12, 57.375],
        "input_format": "RGB",
        "stride_in_1x1": False,
    }
    assert imagenet.items() <= provenance(small("")).items()
    own_model = {
        "format": "rsa-pretraining",
        "method": "byol_aa",
        "step": 7,
        "model": small("online.backbone."),
    }
    found = provenance(own_model)
    assert imagenet.items() <= found.items() and (found["method"], found["step"]) == ("byol_aa", 7)
    cfg = get_cfg()
    cfg.merge_from_list(["DATA.MEAN", (0.5, 0.25, 0.125), "DATA.STD", (0.2, 0.4, 1.0)])
    found = provenance(own_model | {"config": cfg.dump()})
    assert found["pixel_mean"] == [127.5, 63.75, 31.875] and found["pixel_std"] == [51.0, 102.0, 255.0]
    # PyTorch-BYOL's data/transforms.py ends in ToTensor
    found = provenance({"online_network_state_dict": small("encoder.", rename=by_number)})
    assert found["pixel_mean"] == [0, 0, 0] and found["pixel_std"] == [255, 255, 255]


KEY = "layer3.2.conv2.weight"


@pytest.mark.parametrize(
    "contents, message",
    [
        (
            small("net2.encoder_query."),
            r"begin with net2: ResNets lie under net2.encoder_query., .*known layouts",
        ),
        (
            {"epoch": 3, "weights": small("encoder_q.")},
            r"begin with epoch, weights: ResNets lie under weights/encoder_q.",
        ),
        (
            {"student": small("net."), "teacher": {"net": small("")}},
            r"ResNets lie under student/net., teacher/net",
        ),
        ({"state_dict": {"visual.conv1.weight": torch.zeros(3)}}, r"begin with visual: no ResNet was found"),
        (small("student_backbone.", "momentum_backbone."), r"not accounted for: momentum_backbone. \(265\)"),
        # A second copy of the backbone that no row expects
        (
            {"state_dict": small("encoder_q.", "encoder_k.", "encoder_ema.") | heads("queue")},
            r"the online branch is whole, a ResNet-50 under state_dict/encoder_q.; "
            r"not accounted for: encoder_ema. \(265\)",
        ),
        # One name twice, by name and by number
        (
            {"state_dict": small("backbone.") | {"backbone.1.bias": torch.zeros(64)}},
            r"not accounted for: backbone.1.bias",
        ),
        (small("") | {"layer3.6.conv1.weight": torch.zeros(3)}, r"not accounted for: layer3.6.conv1.weight"),
        (
            {name: t for name, t in small("module.encoder_q.").items() if KEY not in name},
            rf"1 of 265 tensors missing \(encoder_q.{KEY}\)",
        ),
        (small("") | {KEY: torch.zeros(32, 32, 3, 3)[:, 1:]}, rf"{KEY} has shape \(32, 31, 3, 3\)"),
        (small("") | {KEY: torch.zeros(SHAPES[KEY], dtype=torch.int64)}, rf"{KEY} holds torch.int64"),
        (small("") | {KEY: torch.full(SHAPES[KEY], torch.nan)}, f"{KEY} holds NaN"),
        (
            small("") | {KEY: torch.full(SHAPES[KEY], 1e300, dtype=torch.float64)},
            f"{KEY} holds NaN or infinite",
        ),
        (
            small("") | {KEY: torch.zeros(SHAPES[KEY]).to_sparse()},
            rf"{KEY} has shape torch._utils _rebuild_sparse_tensor",
        ),
        (
            small("") | {KEY: torch.quantize_per_tensor(torch.zeros(SHAPES[KEY]), 1, 0, torch.qint8)},
            f"{KEY} has shape torch",
        ),
        (small("") | {KEY: torch.zeros(SHAPES[KEY], device="meta")}, f"{KEY} has shape torch"),
        ({name: str(t) for name, t in small("").items()}, "conv1.weight has shape str"),
        ([1, 2], "does not hold a state dict but a list"),
        ({1: 2}, "does not hold a state dict"),
    ],
)
def test_fails_closed(tmp_path, contents, message):
    path = save(contents, tmp_path / "foreign.pth")
    with pytest.raises(InputError, match=message) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_two_spellings_of_one_branch_are_ambiguous(tmp_path):
    path = save(
        {"state_dict": small("backbone.", "backbone_momentum.", "key_backbone.")}, tmp_path / "foreign.pth"
    )
    assert read_checkpoint(path)[1]["format"] == "lightly"  # there is only one online branch
    with pytest.raises(
        InputError, match=r"the target branch is whole.*not accounted for: key_backbone. \(265\)"
    ):
        read_checkpoint(path, "target")


def test_other_depths_and_widths_fail_on_their_own_list(tmp_path):
    network = ResNet(Bottleneck, [3, 4, 23, 3], width_per_group=8)
    with pytest.raises(
        InputError, match=r"layer1.0.conv1.weight has shape \(8, 64, 1, 1\), a [\w ]*Res\w+-101.* needs"
    ):
        read_checkpoint(save(network.state_dict(), tmp_path / "other.pth"))
    network = ResNet(Bottleneck, [2, 2, 2, 2], width_per_group=8)
    with pytest.raises(
        InputError,
        match="not one that is converted; it is most like a ResNet-18, .*not accounted for: layer1",
    ):
        read_checkpoint(save(network.state_dict(), tmp_path / "other.pth"))


def provenance_of(contents, path, **options):
    return read_checkpoint(save(contents, path), **options)[1]


def test_a_layout_is_no_method(tmp_path):
    """The names in a file do not tell the method that trained it; only its own statement counts."""
    moco = {"state_dict": small("module.encoder_q.", "module.encoder_k.") | heads("module.queue")}
    path = tmp_path / "pcl.pth"
    for contents, method in (
        (moco, "unknown"),
        (moco | {"args": argparse.Namespace(method="PCL")}, "PCL"),
        (
            {"model": small("encoder.") | heads("head."), "opt": argparse.Namespace(method="InfoMin")},
            "InfoMin",
        ),
        (moco | {"hyper_parameters": {"method": "byol"}}, "byol"),
        (
            moco
            | {
                "hyper_parameters": foreign(
                    "omegaconf.dictconfig",
                    "DictConfig",
                    _content={"method": foreign("omegaconf.nodes", "AnyNode", _val="nnclr")},
                )
            },
            "nnclr",
        ),
    ):
        assert provenance_of(contents, path)["method"] == method
    with pytest.raises(InputError, match="holds a segmentation network, whose backbone is dilated"):
        provenance_of(small("backbone.") | heads("classifier.0.convs.0.", "aux_classifier."), path)


@pytest.mark.parametrize(
    "key, value, refused",
    [
        ("arch", "resnetblur50", True),
        ("args", argparse.Namespace(model="resnetaa50"), True),
        ("args", argparse.Namespace(arch="resnet101"), True),
        ("args", {"arch": "resnet50d"}, True),
        ("arch", "seresnet50", True),
        ("arch", "wide_resnet50_2", True),
        ("arch", "deeplabv3_resnet50", True),
        ("arch", "resnet50", False),
        ("arch", "ResNet-50", False),
        ("arch", "resnet50.a1_in1k", False),
        ("arch", "resnet50_dilated8", True),
        ("arch", "fcn_resnet50", True),
        ("arch", "simclr_resnet50", False),
        ("arch", "tv_resnet50", False),
        ("arch", "gluon_resnet50_v1b", False),
        ("args", argparse.Namespace(model="torchvision/resnet50"), False),
        ("args", argparse.Namespace(model="PixPro"), False),
        ("arch", 50, False),
    ],
)
def test_a_file_that_names_another_network_is_refused(tmp_path, key, value, refused):
    """timm's resnetblur50 and resnetaa50 have the names and shapes of a ResNet-50 but other pooling."""
    contents = {"state_dict": small(""), key: value}
    if not refused:
        assert provenance_of(contents, tmp_path / "c.pth")["architecture"] == "resnet50"
        return
    with pytest.raises(
        InputError, match=r"says that its network is '\w+': its names and shapes are those of a ResNet-50"
    ):
        provenance_of(contents, tmp_path / "c.pth")


def test_hugging_faces_config_beside_a_file_counts(tmp_path):
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    safetensors.torch.save_file({name: t.contiguous() for name, t in small("").items()}, path)
    config.write_text(
        json.dumps({"architecture": "resnet50", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}})
    )
    provenance = read_checkpoint(path)[1]
    assert provenance["pixel_mean"] == [127.5] * 3 and provenance["pixel_source"] == "file"
    for text, message in (
        (json.dumps({"architecture": "resnetaa50"}), "says that its network is 'resnetaa50'"),
        (json.dumps({"downsample_in_bottleneck": True}), "strides in the 1x1 convolution"),
        ("{", "the config.json beside it, .*cannot be read"),
    ):
        config.write_text(text)
        with pytest.raises(InputError, match=message):
            read_checkpoint(path)


def test_openmmlabs_configuration_counts(tmp_path):
    for text, message in (
        ("dict(type='ResNet', style='caffe')", "strides in the 1x1"),
        ('{"style": "caffe"}', "strides in"),
        ("dilations=(1, 1, 2, 4)", "is dilated"),
        ("style='pytorch', dilations=(1, 1, 1, 1)", None),
    ):
        path = save(
            {"meta": {"config": text}, "state_dict": small("backbone.") | heads("neck.")}, tmp_path / "c.pth"
        )
        if message is None:
            assert read_checkpoint(path)[1]["format"] == "MMSelfSup 1.x, OpenSelfSup"
            continue
        with pytest.raises(InputError, match=f"says in its configuration that the ResNet {message}"):
            read_checkpoint(path)


def test_pixels_of_names_that_say_nothing_are_assumed_or_given(tmp_path):
    path = tmp_path / "c.pth"
    bare = provenance_of(small(""), path)
    assert bare["pixel_source"] == "assumed" and "is assumed (--pixels states another)" in remarks(bare)[0]
    for text, mean, std in (
        ("unscaled", 0, 255),
        ("0.5,0.5,0.5/0.25,0.25,0.25", 127.5, 63.75),
        ("127.5,127.5,127.5/255,255,255", 127.5, 255),
    ):
        given = read_checkpoint(path, pixels=parse_pixels(text))[1]
        assert (given["pixel_mean"], given["pixel_std"], given["pixel_source"]) == (
            [mean] * 3,
            [std] * 3,
            "given",
        )
        assert not remarks(given)
    for text in (
        "caffe",
        "1,2,3",
        "1,2/1,2",
        "1,2,3/0,1,1",
        "a,b,c/1,1,1",
        "nan,0,0/1,1,1",
        "1,2,3/1,2,3/1,2,3",
    ):
        with pytest.raises(InputError, match="--pixels .*: give imagenet, unscaled, or mean and std"):
            parse_pixels(text)
    lightly = provenance_of(train_lightly("_features", "embedding_model"), path)
    assert lightly["pixel_mean"] == [127.5, 102.0, 76.5] and lightly["pixel_source"] == "file"
    with pytest.raises(InputError, match="says that it was trained on mean and std .*: leave --pixels out"):
        read_checkpoint(path, pixels=parse_pixels("unscaled"))
    for family in ("SimCLR sthalles", "SimCLR Spijkervet"):
        assert provenance_of(VARIANTS[family][0], path)["pixel_std"] == [255] * 3
    for family in ("a backbone alone", "self_supervised", "SimSiam PatrickHua", "older solo-learn"):
        assert provenance_of(VARIANTS[family][0], path)["pixel_std"] == [58.395, 57.12, 57.375]


def test_a_fine_tuned_detector_must_state_its_pixels(tmp_path):
    for prefix, rename in (("backbone.bottom_up.", detectron2_name), ("backbone.body.", str)):
        contents = {
            "model": counters(small(prefix, rename=rename))
            | heads("roi_heads.box_head.fc1.")
            | (
                heads("backbone.fpn_lateral2.", "proposal_generator.rpn_head.")
                if rename is not str
                else heads("backbone.fpn.", "rpn.")
            ),
            "iteration": 89,
            "optimizer": {},
        }
        path = save(contents, tmp_path / "model_final.pth")
        with pytest.raises(InputError, match="does not say how it sees pixels: .*give --pixels imagenet"):
            read_checkpoint(path)
        state, provenance = read_checkpoint(path, pixels=parse_pixels("imagenet"))
        assert provenance["pixel_source"] == "given"
        assert [tensor.unique().tolist() for tensor in state.values()] == [[i] for i in range(265)]
        settings = {
            "MODEL.PIXEL_MEAN": [51, 102, 153],
            "MODEL.PIXEL_STD": [51, 51, 51],
            "INPUT.FORMAT": "RGB",
        }
        contents["run"] = {"kind": "finetune", "settings": settings}
        _, provenance = read_checkpoint(save(contents, path))
        assert provenance["pixel_mean"] == [51, 102, 153] and provenance["pixel_source"] == "file"
        for key, value in (("INPUT.FORMAT", "BGR"), ("MODEL.RESNETS.STRIDE_IN_1X1", True)):
            contents["run"] = {"kind": "finetune", "settings": settings | {key: value}}
            with pytest.raises(InputError, match=f"was fine-tuned with {key} {value}; what is converted has"):
                read_checkpoint(save(contents, path))


def test_untrained_weights_are_named(tmp_path):
    torch.manual_seed(0)
    fresh = provenance_of(resnet50().state_dict(), tmp_path / "c.pth")
    assert fresh["untrained"] and "look untrained" in remarks(fresh)[-1]
    assert "untrained" not in provenance_of(small(""), tmp_path / "c.pth")


@pytest.mark.parametrize(
    "contents, places",
    [
        ({"state_dict": small(""), "model": small("")}, "state_dict and model"),
        (
            {"state_dict": small("module.encoder_q.") | heads("module.queue"), "network": small("")},
            "network.*state_dict/module.encoder_q.",
        ),
        (
            {"state_dict": small(""), "best": {"net": small("backbone.")}},
            "state_dict and another under best/net/backbone.",
        ),
        (
            {"model": small("encoder."), "teacher": small("encoder.")},
            "model/encoder. and another under teacher/encoder.",
        ),
    ],
)
def test_two_networks_of_one_file_are_named(tmp_path, contents, places):
    with pytest.raises(InputError, match=places):
        read_checkpoint(save(contents, tmp_path / "c.pth"))


def test_the_average_is_where_a_missing_target_was_looked_for(tmp_path):
    path = save({"model": small("")}, tmp_path / "c.pth")
    with pytest.raises(
        InputError, match="without the target branch: nothing lies under state_dict_ema or model_ema or "
    ):
        read_checkpoint(path, "target")
    path = save(VARIANTS["lightly-train SimCLR"][0], tmp_path / "c.pth")
    with pytest.raises(
        InputError, match="without the target branch: nothing lies under embedding_model_momentum.wrapped"
    ):
        read_checkpoint(path, "target")


def test_notes(tmp_path):
    for family, note in (("SlotCon", "takes its target network: --branch target"), ("PixPro", None)):
        path = save(VARIANTS[family][0], tmp_path / "c.pth")
        found = remarks(read_checkpoint(path)[1])
        assert any(note in line for line in found) if note else not found
        assert not remarks(read_checkpoint(path, "target")[1])
    dino = train_lightly("_model", "student_embedding_model", "teacher_embedding_model")
    dino["state_dict"] |= heads("student_projection_head.", "teacher_projection_head.", "criterion.center")
    assert "exports of DINO are its target network" in remarks(provenance_of(dino, tmp_path / "c.pth"))[0]
    distilled = train_lightly("_features", "student_embedding_model")
    distilled["state_dict"] |= heads(
        "student_projection_head.", "teacher_embedding_model.wrapped_model._model.blocks.", "teacher_queue"
    )
    assert provenance_of(distilled, tmp_path / "c.pth")["format"] == "lightly-train, distillation"


@pytest.mark.parametrize(
    "contents, message",
    [
        (
            {"model": torch.nn.Linear(2, 2)},
            "model holds a whole pickled module, whose code is never run: save its state_dict",
        ),
        (torch.nn.Linear(2, 2), "holds a whole pickled module"),
        (
            {"cls_token": torch.zeros(1), "blocks.0.attn.qkv.weight": torch.zeros(1)},
            r"holds a vision transformer \(cls_token\); what is",
        ),
        (
            {"state_dict": {"model.encoder.layers.encoder_layer_0.ln_1.weight": torch.zeros(1)}},
            "holds a vision transformer",
        ),
        ({"model": {"stages.0.blocks.0.conv_dw.weight": torch.zeros(1)}}, "holds a ConvNeXt"),
        ({"downsample_layers.0.0.weight": torch.zeros(1)}, "holds a ConvNeXt"),
        (
            {"blobs": {"res2_0_branch2a_w": torch.zeros(1), "conv1_w": torch.zeros(1)}},
            "MSRA's ResNet with Caffe's names: it takes BGR pixels and strides in the 1x1",
        ),
        (
            {name: t for name, t in small("").items() if "running" not in name},
            "its norm layers are no BatchNorm",
        ),
    ],
)
def test_other_networks_are_named(tmp_path, contents, message):
    with pytest.raises(InputError, match=message):
        read_checkpoint(save(contents, tmp_path / "c.pth"))


def test_a_deep_stem_is_named(tmp_path):
    with pytest.raises(InputError, match="a ResNet with a deep stem"):
        read_checkpoint(save(timm.create_model("resnet26d").state_dict(), tmp_path / "c.pth"))


def test_two_names_that_become_one_are_refused(tmp_path):
    contents = small("") | {"layer1._orig_mod.0.conv1.weight": torch.zeros(SHAPES["layer1.0.conv1.weight"])}
    with pytest.raises(InputError, match="two of its names are the same without their wrappers"):
        read_checkpoint(save(contents, tmp_path / "c.pth"))


def test_inspect_says_what_lies_where(tmp_path):
    path = save(VARIANTS["DINO, full"][0], tmp_path / "dino.pth")
    lines = "\n".join(inspect(path))
    assert re.search(r"under student: \d+ tensors, module. \(\d+\)", lines)
    assert "ResNets: student/module.backbone., teacher/backbone." in lines
    assert (
        "online: a whole ResNet-50, 265 tensors, of unknown method (layout of DINO)" in lines
        and "target: a whole" in lines
    )
    path = save({"student": small("net.")}, tmp_path / "other.pth")
    lines = "\n".join(inspect(path))
    assert (
        "ResNets: student/net." in lines
        and "online: unknown checkpoint, its keys begin with student" in lines
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dino.pth", "other.pth"]
