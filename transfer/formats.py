"""Known layouts of checkpoints: where the backbone of each branch lies in a file, and what else the file may hold.

A family is a row of :data:`FORMATS`. This file is data; readers.py applies it.
"""

import re
from dataclasses import dataclass

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std of RGB in [0, 1]
UNSCALED = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

# State dicts are looked for under these keys of a file; "" is the file itself, where none of the others is a dict.
CONTAINERS = ("state_dict", "model", "model_state_dict", "network", "module", "")
# Moving averages of a network beside it: the target of a row that names no other.
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
# What wrappers put before every name: DataParallel, torch.compile, LightningModules (byol-pytorch's example: learner),
# FSDP, Fabric, and the classes of timm and Hugging Face that hold a network.
WRAPPERS = ("module.", "_orig_mod.", "model.", "learner.", "_fsdp_wrapped_module.", "_forward_module.",
            "timm_model.", "_backbone.")
# What torch.compile, FSDP and activation checkpointing put before the names of a part that they wrap.
INNER_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
IGNORED = ("n_averaged",)  # torch.optim.swa_utils.AveragedModel's counter

# Where a file says what it holds: keys of dicts, and attributes of pickled objects such as argparse's Namespace.
SAID = {
    "network": ("arch", "args.arch", "args.model", "opt.arch", "opt.model", "config.arch", "hyper_parameters.arch",
                "hyper_parameters.backbone", "hyper_parameters.backbone.name"),
    "method": ("method", "args.method", "opt.method", "hyper_parameters.method"),
    "step": ("step", "global_step"),
}

# (pattern, replacement), each applied once: other names of a ResNet's tensors -> torchvision's.
SEQUENTIAL = (  # nn.Sequential(*resnet.children())
    (r"^0\.", "conv1."), (r"^1\.", "bn1."), (r"^4\.", "layer1."), (r"^5\.", "layer2."), (r"^6\.", "layer3."),
    (r"^7\.", "layer4."))
DETECTRON2 = (
    (r"^stem\.conv1\.norm\.", "bn1."), (r"^stem\.", ""), (r"^res2\.", "layer1."), (r"^res3\.", "layer2."),
    (r"^res4\.", "layer3."), (r"^res5\.", "layer4."), (r"\.conv(\d)\.norm\.", r".bn\1."),
    (r"\.shortcut\.norm\.", ".downsample.1."), (r"\.shortcut\.", ".downsample.0."))


@dataclass(frozen=True)
class Format:
    """``branches``: where the backbone's names begin, "prefix" or "key/key/prefix" below those keys; a tuple where a
    family has several spellings. ``drops``: how all other names of the state dict begin; the longest prefix that fits
    a name decides. ``must``: names without which a state dict is another family's; "a|b" asks for either.
    ``rename``: (pattern, replacement) pairs that give torchvision's names. ``pixels``: mean and std of the RGB input
    in [0, 1] that the family trains on; None where its files may come from anywhere. All are convolutions with
    torchvision's stride, in the 3x3.
    """

    name: str
    branches: dict
    drops: tuple = ()
    must: tuple = ()
    rename: tuple = ()
    pixels: tuple | None = IMAGENET

    def places(self):
        """(branch, container, prefix) of each place; container None: each of :data:`CONTAINERS`."""
        for branch, places in self.branches.items():
            for place in (places,) if isinstance(places, str) else places:
                container, slash, prefix = place.rpartition("/")
                yield branch, container if slash else None, prefix
                if not slash and "target" not in self.branches:
                    yield from (("target", average, prefix) for average in AVERAGES)

    def lacks(self, names):
        """Whether a state dict with these names lacks one that this row must have."""
        return not all(any(name.startswith(tuple(starts.split("|"))) for name in names) for starts in self.must)


def rename(name, pairs):
    """The name of a tensor after all ``pairs`` of :attr:`Format.rename`."""
    for pattern, replacement in pairs:
        name = re.sub(pattern, replacement, name, count=1)
    return name


OWN_FILE = "rsa-pretraining"  # what a checkpoint of this project has under "format"
OURS = "this project's pre-training"
# The first row that accounts for every name is taken: of rows with the same prefixes, the one with fewer drops first.
FORMATS = (
    Format(OURS, {"online": "model/online.backbone.", "target": "model/target.backbone."},
           drops=("online.projector.", "target.projector.", "predictor.", "queue.")),
    # torchvision and timm also write fc; extracted backbones (Barlow Twins' resnet50.pth, SwAV's, OpenSelfSup's and
    # lucidrains' BYOL) are bare.
    Format("torchvision, timm", {"online": ""}, drops=("fc.",), pixels=None),
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
    # names of Detectron2, written by the converters of MoCo, DenseCL and Detectron2 itself
    Format("Detectron2", {"online": "model/"}, drops=("stem.fc.",), must=("stem.conv1.norm.",), rename=DETECTRON2),
)

# Other networks, by a name that each is known by: looked for where no ResNet of the table was found.
OTHER_NETWORKS = (
    (r"res2_0_branch2a|res_conv1_bn_s", "MSRA's ResNet with Caffe's names: it takes BGR pixels and strides in the 1x1 "
                                        "convolution, which torchvision's and timm's ResNets do not"),
    (r"(^|\.)(cls_token|pos_embed|patch_embed\.)|encoder\.layers\.encoder_layer_0", "a vision transformer"),
    (r"(^|\.)(stages\.0\.blocks\.0\.conv_dw|downsample_layers\.0\.|stages\.0\.0\.dwconv)", "a ConvNeXt"),
    (r"(^|\.)conv1\.0\.weight$", "a ResNet with a deep stem (resnet50d and its like)"),
)
