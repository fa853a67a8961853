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
SAID = {  # "hub": the config.json of Hugging Face beside the file
    "network": ("arch", "args.arch", "args.model", "args.backbone", "opt.arch", "opt.model", "opt.backbone", "config.arch",
                "hyper_parameters.arch", "hyper_parameters.backbone", "hyper_parameters.backbone.name",
                "hyper_parameters.base_encoder", "hub.architecture"),
    "method": ("method", "args.method", "opt.method", "hyper_parameters.method"),
    "step": ("step", "global_step"),
    "mean": ("lightly_train.normalize_args.mean", "hub.pretrained_cfg.mean"),
    "std": ("lightly_train.normalize_args.std", "hub.pretrained_cfg.std"),
}

# (pattern, replacement), each applied once: other names of a ResNet's tensors -> torchvision's.
SEQUENTIAL = (  # nn.Sequential(*resnet.children())
    (r"^0\.", "conv1."), (r"^1\.", "bn1."), (r"^4\.", "layer1."), (r"^5\.", "layer2."), (r"^6\.", "layer3."),
    (r"^7\.", "layer4."))
DETECTRON2 = (
    (r"^stem\.conv1\.norm\.", "bn1."), (r"^stem\.", ""), (r"^res2\.", "layer1."), (r"^res3\.", "layer2."),
    (r"^res4\.", "layer3."), (r"^res5\.", "layer4."), (r"\.conv(\d)\.norm\.", r".bn\1."),
    (r"\.shortcut\.norm\.", ".downsample.1."), (r"\.shortcut\.", ".downsample.0."))


HUGGING_FACE = (
    (r"^embedder\.embedder\.convolution\.", "conv1."), (r"^embedder\.embedder\.normalization\.", "bn1."),
    (r"^encoder\.stages\.0\.", "layer1."), (r"^encoder\.stages\.1\.", "layer2."),
    (r"^encoder\.stages\.2\.", "layer3."), (r"^encoder\.stages\.3\.", "layer4."), (r"\.layers\.(\d+)\.", r".\1."),
    (r"\.layer\.0\.convolution\.", ".conv1."), (r"\.layer\.0\.normalization\.", ".bn1."),
    (r"\.layer\.1\.convolution\.", ".conv2."), (r"\.layer\.1\.normalization\.", ".bn2."),
    (r"\.layer\.2\.convolution\.", ".conv3."), (r"\.layer\.2\.normalization\.", ".bn3."),
    (r"\.shortcut\.convolution\.", ".downsample.0."), (r"\.shortcut\.normalization\.", ".downsample.1."))

ASSUMED, ASK = "assumed", "ask"  # pixels of a layout whose files come from anywhere: ImageNet's, or to be stated


@dataclass(frozen=True)
class Format:
    """A layout, named by who is best known for it: what method a file holds, it may not say.

    ``branches``: where the backbone's names begin, "prefix" or "key/key/prefix" below those keys; a tuple where a
    family has several spellings. ``drops``: how all other names of the state dict begin; the longest prefix that fits
    a name decides. ``must``: beginnings of names without which a state dict is another family's; "a|b" asks for
    either. ``rename``: (pattern, replacement) pairs that give torchvision's names. ``pixels``: mean and std of the RGB
    input in [0, 1] that the family trains on, or :data:`ASSUMED` or :data:`ASK`. ``note``: what to tell who converts
    the online branch. All are convolutions with torchvision's stride, in the 3x3.
    """

    name: str
    branches: dict
    drops: tuple = ()
    must: tuple = ()
    rename: tuple = ()
    pixels: tuple | str = IMAGENET
    note: str = ""

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
SOLO_HEADS = ("classifier.weight", "classifier.bias", "momentum_classifier.", "projector.", "momentum_projector.",
              "predictor.", "predictor2.", "head.", "momentum_head.", "dino_loss_func.", "prototypes.", "queue",
              "local_memory_", "transformer_encoder.", "whitening.")
LIGHTLY_TRAIN_HEADS = ("student_projection_head", "teacher_projection_head", "projection_head", "prediction_head",
                       "query_encoder.local_projection_head.", "query_encoder.global_projection_head.", "key_encoder.",
                       "memory_bank.", "teacher_queue", "criterion.", "local_criterion.", "global_criterion.",
                       *(f"{model}.embed_head." for model in ("embedding_model", "embedding_model_momentum",
                                                              "student_embedding_model", "query_encoder.embedding_model")))


def lightly_train(*models):
    """Where lightly-train keeps the backbone of these embedding models: of torchvision's class, or of timm's."""
    return tuple(f"{model}.wrapped_model.{inner}." for model in models for inner in ("_features", "_model"))


# The first row that accounts for every name is taken: of rows with the same prefixes, the one with fewer drops first.
# A row that others' files could fit as well has a name that it must have.
FORMATS = (
    Format(OURS, {"online": "model/online.backbone.", "target": "model/target.backbone."},
           drops=("online.projector.", "target.projector.", "predictor.", "queue.")),
    # torchvision and timm also write fc; extracted backbones (Barlow Twins' resnet50.pth, SwAV's, OBoW's student,
    # lightly-train's exports, which are the teacher of DINO) are bare.
    Format("torchvision, timm", {"online": ""}, drops=("fc.",), pixels=ASSUMED),
    Format("nn.Sequential of a ResNet's children", {"online": ""}, drops=("9.",), must=("0.weight", "7.0."),
           rename=SEQUENTIAL, pixels=ASSUMED),
    Format("SwAV, DeepCluster v2", {"online": ""}, drops=("projection_head.", "prototypes."),
           must=("projection_head.|prototypes.",)),
    Format("Hugging Face", {"online": ("", "resnet.")}, drops=("classifier.",),
           must=("embedder.embedder.|resnet.embedder.embedder.",), rename=HUGGING_FACE, pixels=ASSUMED),
    # names of Detectron2, as the converters of MoCo, DenseCL, ReSim and of Detectron2 itself write them
    Format("Detectron2", {"online": "model/"}, drops=("stem.fc.", "fpn_", "backbone.fpn_", "box_head."),
           must=("stem.conv1.norm.",), rename=DETECTRON2, pixels=ASSUMED),
    Format("a detector fine-tuned with Detectron2", {"online": "model/backbone.bottom_up."},
           drops=("backbone.fpn_", "backbone.top_block.", "proposal_generator.", "roi_heads.", "head.", "anchor_generator.", "sem_seg_head.",
                  "pixel_mean", "pixel_std"), must=("backbone.bottom_up.stem.",), rename=DETECTRON2, pixels=ASK),
    Format("a detector of torchvision's", {"online": "backbone.body."},
           drops=("backbone.fpn.", "rpn.", "roi_heads.", "head."), pixels=ASK),
    # encoder_q, encoder_k and their like
    # RSA is a subclass of BYOL there: a file does not say which of them it holds, nor on which data set.
    Format("the authors' RSA or BYOL", {"online": "encoder_q.", "target": "encoder_k."},
           drops=("encoder_q_head.", "encoder_k_head.", "pred."), must=("encoder_q_head.",)),
    # PCL's and MoCo-EMAN's names are the same
    Format("MoCo v1, v2", {"online": "encoder_q.", "target": "encoder_k."},
           drops=("encoder_q.fc.", "encoder_k.fc.", "queue")),
    Format("MoCo of lightning-bolts", {"online": "encoder_q.", "target": "encoder_k."},
           drops=("encoder_q.fc.", "encoder_k.fc.", "head_q.", "head_k.", "queue.", "val_queue."), must=("val_queue.",),
           pixels=ASSUMED),
    Format("ReSim", {"online": "encoder_q.", "target": "encoder_k."},
           drops=("encoder_q.fc.", "encoder_k.fc.", "encoder_q.fpn_", "encoder_k.fpn_", "queue"), must=("encoder_q.fpn_",)),
    Format("SlotCon", {"online": "encoder_q.", "target": "encoder_k."},
           drops=("projector_", "grouping_", "predictor_slot.", "center"), must=("grouping_",),
           note="SlotCon's own script for detection takes its target network: --branch target"),
    Format("MSF, ISD", {"online": "encoder_q.module.", "target": ("encoder_t.module.", "encoder_k.module.")},
           drops=("encoder_q.module.fc.", "encoder_t.module.fc.", "encoder_k.module.fc.", "predict_q.", "queue", "labels"),
           must=("encoder_q.module.layer1.",)),
    Format("MoCo v3", {"online": "base_encoder.", "target": "momentum_encoder."},
           drops=("base_encoder.fc.", "momentum_encoder.fc.", "predictor.")),
    Format("DenseCL, OpenSelfSup, MMSelfSup 0.x",
           {"online": ("encoder_q.0.", "online_net.0.", "base_encoder.0.", "encoder.0."),
            "target": ("encoder_k.0.", "target_net.0.", "momentum_encoder.0.")},
           # backbone and neck are the online branch's own modules under a second name
           drops=("encoder_q.1.", "encoder_k.1.", "online_net.1.", "target_net.1.", "base_encoder.1.",
                  "momentum_encoder.1.", "encoder.1.", "backbone.", "neck.", "head.", "queue")),
    Format("SetSim", {"online": "encoder_q.0.", "target": "encoder_k.0."},
           drops=("encoder_q.0.fc.", "encoder_k.0.fc.", "encoder_q.1.", "encoder_k.1.", "backbone.", "neck.", "head.",
                  "queue"), must=("encoder_q.0.fc.",)),
    # encoder
    Format("InstDis, PIRL, InfoMin (PyContrast)", {"online": "model/encoder.", "target": "model_ema/encoder."},
           drops=("head.", "head_jig."), must=("head.",)),
    Format("an encoder alone", {"online": "encoder."}, drops=("encoder.fc.weight", "encoder.fc.bias"), pixels=ASSUMED),
    Format("SimSiam", {"online": "encoder."}, drops=("encoder.fc.", "predictor."), must=("predictor.",)),
    Format("PixPro, SoCo", {"online": "encoder.", "target": "encoder_k."},
           drops=("projector", "predictor.", "value_transform.", "neck", "head", "queue"), must=("encoder_k.layer1.",)),
    Format("SimCLR of lightning-bolts", {"online": "encoder."}, drops=("encoder.fc.", "projection.model."),
           must=("projection.model.",), pixels=ASSUMED),
    # without biases, and images are not normalized
    Format("SimCLR (Spijkervet/SimCLR)", {"online": "encoder."}, drops=("projector.0.weight", "projector.2.weight"),
           must=("projector.0.weight", "projector.2.weight"), pixels=UNSCALED),
    Format("self_supervised (KeremTurgutlu)", {"online": "encoder."}, drops=("projector.", "predictor.", "prototypes."),
           must=("projector.0.bias",), rename=SEQUENTIAL),
    Format("solo-learn before 1.0.3", {"online": "encoder.", "target": "momentum_encoder."}, drops=SOLO_HEADS,
           must=("classifier.weight",)),
    Format("PAWS, SuNCEt", {"online": "encoder/"}, drops=("fc.", "pred."), must=("fc.fc1.",)),
    Format("BYOL (sthalles/PyTorch-BYOL)",
           {"online": "online_network_state_dict/encoder.", "target": "target_network_state_dict/encoder."},
           drops=("projetion.",), rename=SEQUENTIAL, pixels=UNSCALED),
    Format("BYOL (yaox12/BYOL-PyTorch)", {"online": "online_network.encoder.", "target": "target_network.encoder."},
           drops=("online_network.projetion.", "target_network.projetion.", "predictor."), rename=SEQUENTIAL),
    Format("BYOL, SimSiam of lightning-bolts",
           {"online": "online_network.encoder.", "target": "target_network.encoder."},
           drops=("online_network.projector.", "target_network.projector.", "online_network.encoder.fc.",
                  "target_network.encoder.fc.", "predictor."), must=("online_network.projector.",), pixels=ASSUMED),
    Format("BYOL (lucidrains/byol-pytorch)", {"online": "online_encoder.net.", "target": "target_encoder.net."},
           # net is the online encoder's under a second name
           drops=("online_encoder.", "target_encoder.", "online_encoder.net.fc.", "target_encoder.net.fc.",
                  "online_predictor.", "net.")),
    Format("BYOL (EMAN)", {"online": "online_net.backbone.", "target": "target_net.backbone."},
           drops=("online_net.neck.", "target_net.neck.", "predictor.")),
    # backbone
    Format("a backbone alone", {"online": "backbone."}, drops=("backbone.fc.weight", "backbone.fc.bias"), pixels=ASSUMED),
    Format("VICReg", {"online": "backbone."}, drops=("projector.",), must=("projector.",), pixels=ASSUMED),
    Format("Barlow Twins", {"online": "model/backbone."}, drops=("projector.", "bn."), must=("projector.", "bn.")),
    Format("VICRegL", {"online": "model/backbone."}, drops=("maps_projector.", "projector.", "classifier."),
           must=("maps_projector.",)),
    Format("DINO", {"online": "student/backbone.", "target": "teacher/backbone."}, drops=("head.",), must=("head.",)),
    Format("SimCLR (sthalles/SimCLR)", {"online": "backbone."}, drops=("backbone.fc.",),
           must=("backbone.fc.0.", "backbone.fc.2."), pixels=UNSCALED),
    # encoder is backbone and projector under a second name
    Format("SimSiam, BYOL, SimCLR (PatrickHua/SimSiam)", {"online": "backbone.", "target": "target_encoder.0."},
           drops=("projector.", "predictor.", "encoder.0.", "encoder.1.", "online_encoder.", "target_encoder.1.",
                  "online_predictor."), must=("projector.layer1.", "encoder.0.|online_encoder.0.")),
    Format("InstanceLoc", {"online": "backbone.", "target": "backbone_k."}, drops=("neck", "roi_head", "rpn_head", "queue"),
           must=("backbone_k.", "roi_head.")),
    Format("MMSelfSup 1.x, OpenSelfSup",
           {"online": "backbone.",
            "target": ("encoder_k.module.0.", "target_net.module.0.", "momentum_encoder.module.0.")},
           drops=("encoder_k.", "target_net.", "momentum_encoder.", "neck.", "head.", "queue", "memory_bank.",
                  "data_preprocessor."), must=("neck.|head.|data_preprocessor.|encoder_k.|target_net.|momentum_encoder.",)),
    Format("solo-learn", {"online": "backbone.", "target": "momentum_backbone."}, drops=SOLO_HEADS,
           must=("classifier.weight|momentum_backbone.",)),
    Format("stable-pretraining", {"online": "backbone.student.", "target": "backbone.teacher."},
           drops=("backbone.base_ema_coefficient", "backbone.final_ema_coefficient", "backbone.ema_coefficient",
                  "projector", "predictor", "prototypes.", "queue", "callbacks_modules.", "callbacks_metrics."),
           must=("backbone.student.",)),
    Format("stable-pretraining", {"online": "backbone."},
           drops=("projector", "predictor", "proj_", "prototypes.", "queue", "callbacks_modules.", "callbacks_metrics."),
           must=("callbacks_modules.|callbacks_metrics.",)),
    Format("lightly",
           {"online": "backbone.",
            "target": ("backbone_momentum.", "momentum_backbone.", "teacher_backbone.", "key_backbone.")},
           drops=("projection_head", "prediction_head", "projection_mlp.", "prediction_mlp.", "local_projection_head",
                  "momentum_projection_head.", "teacher_projection_head.", "key_projection_head.", "prototypes.",
                  "memory_bank.", "queues.", "criterion", "smog.", "online_classifier.", "knn_classifier."),
           must=("projection_head|prediction_head|projection_mlp.|online_classifier.|"
                 "backbone_momentum.|momentum_backbone.|teacher_backbone.|key_backbone.",), rename=SEQUENTIAL),
    # its benchmark's teacher has the plain names
    Format("lightly's DINO", {"online": "student_backbone.", "target": ("backbone.", "teacher_backbone.")},
           drops=("student_projection_head.", "projection_head.", "student_head.", "teacher_head.", "criterion.",
                  "online_classifier."), rename=SEQUENTIAL),
    Format("lightly-train, DINO",
           {"online": lightly_train("student_embedding_model"), "target": lightly_train("teacher_embedding_model")},
           drops=(*LIGHTLY_TRAIN_HEADS, "teacher_embedding_model.embed_head."), must=("teacher_projection_head.",),
           note="lightly-train's own exports of DINO are its target network: --branch target"),
    Format("lightly-train, distillation", {"online": lightly_train("student_embedding_model")},  # of another network
           drops=(*LIGHTLY_TRAIN_HEADS, "teacher_embedding_model."), must=("student_projection_head",)),
    Format("lightly-train",
           {"online": lightly_train("embedding_model", "query_encoder.embedding_model"),
            "target": lightly_train("embedding_model_momentum", "key_encoder.embedding_model")},
           drops=LIGHTLY_TRAIN_HEADS),
    Format("VISSL", {"online": ("classy_state_dict/base_model/model/trunk/_feature_blocks.", "_feature_blocks.",
                                "classy_state_dict/base_model/model/trunk/base_model._feature_blocks."),
                     "target": tuple(f"classy_state_dict/loss/{teacher}trunk._feature_blocks." for teacher in (
                         "moco_encoder.", "momentum_teacher.", "momentum_teacher.module.", "momentum_encoder.",
                         "momentum_encoder.module."))},
           drops=("moco_encoder.heads.", "momentum_teacher.heads.", "momentum_teacher.module.heads.",
                  "momentum_encoder.heads.", "momentum_encoder.module.heads.", "queue", "heads.", "center")),
)

# Other networks, by a name that each is known by: looked for where no ResNet of the table was found.
OTHER_NETWORKS = (
    (r"res2_0_branch2a|res_conv1_bn_s", "MSRA's ResNet with Caffe's names: it takes BGR pixels and strides in the 1x1 "
                                        "convolution, which torchvision's and timm's ResNets do not"),
    (r"(^|\.)aux_classifier\.|(^|\.)classifier\.0\.convs\.", "a segmentation network, whose backbone is dilated"),
    (r"(^|\.)(cls_token|pos_embed|patch_embed\.)|encoder\.layers\.encoder_layer_0", "a vision transformer"),
    (r"(^|\.)(stages\.0\.blocks\.0\.conv_dw|downsample_layers\.0\.|stages\.0\.0\.dwconv)", "a ConvNeXt"),
    (r"(^|\.)conv1\.0\.weight$", "a ResNet with a deep stem (resnet50d and its like)"),
)
