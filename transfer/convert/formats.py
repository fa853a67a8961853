"""Known layouts of checkpoints: where the backbone of each branch lies in a file, and what else it may hold.

A family is a row of :data:`FORMATS`. This file is data; match.py finds the row that a file fits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

Pixels = Sequence[Sequence[float]]  # mean and std of RGB in [0, 1]
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
UNSCALED = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

# Keys of a file under which state dicts are looked for. "": the file itself, where it has none of the others.
CONTAINERS = ("state_dict", "model", "model_state_dict", "network", "module", "")
# Keys of the moving average of a network. It is the target of a row that names no target.
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
# Prefixes that wrappers put before every name: DataParallel, torch.compile, LightningModules (learner: that
# of byol-pytorch), FSDP, Fabric, and the classes of timm and Hugging Face that hold a network.
WRAPPERS = (
    "module. _orig_mod. model. learner. _fsdp_wrapped_module. _forward_module. timm_model. _backbone.".split()
)
# Prefixes that torch.compile, FSDP and activation checkpointing put before the names of a part.
INNER_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
IGNORED = ("n_averaged",)  # torch.optim.swa_utils.AveragedModel's counter

# Where a file says what it holds: keys of dicts, and attributes of pickled objects such as argparse's
# Namespace. "hub": the config.json of Hugging Face beside the file.
SAID = {
    "network": (
        "arch args.arch args.model args.backbone opt.arch opt.model opt.backbone config.arch "
        "hyper_parameters.arch hyper_parameters.backbone hyper_parameters.backbone.name "
        "hyper_parameters.base_encoder hub.architecture"
    ).split(),
    "config": "meta.config meta.cfg cfg".split(),  # text of OpenMMLab's
    "method": "method args.method opt.method hyper_parameters.method".split(),
    "step": "step global_step".split(),
    "mean": "lightly_train.normalize_args.mean hub.pretrained_cfg.mean".split(),
    "std": "lightly_train.normalize_args.std hub.pretrained_cfg.std".split(),
}

# (pattern, replacement), each applied once: the names of a ResNet's tensors elsewhere -> torchvision's.
SEQUENTIAL = (  # nn.Sequential(*resnet.children())
    (r"^0\.", "conv1."),
    (r"^1\.", "bn1."),
    (r"^4\.", "layer1."),
    (r"^5\.", "layer2."),
    (r"^6\.", "layer3."),
    (r"^7\.", "layer4."),
)
DETECTRON2 = (
    (r"^stem\.conv1\.norm\.", "bn1."),
    (r"^stem\.", ""),
    *((rf"^res{stage + 1}\.", f"layer{stage}.") for stage in (1, 2, 3, 4)),
    (r"\.conv(\d)\.norm\.", r".bn\1."),
    (r"\.shortcut\.norm\.", ".downsample.1."),
    (r"\.shortcut\.", ".downsample.0."),
)
HUGGING_FACE = (
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    *((rf"^encoder\.stages\.{stage - 1}\.", f"layer{stage}.") for stage in (1, 2, 3, 4)),
    (r"\.layers\.(\d+)\.", r".\1."),
    *((rf"\.layer\.{i - 1}\.convolution\.", f".conv{i}.") for i in (1, 2, 3)),
    *((rf"\.layer\.{i - 1}\.normalization\.", f".bn{i}.") for i in (1, 2, 3)),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
)

# The pixels of a layout that does not tell them: assume ImageNet's, or ask the user to state them.
ASSUMED, ASK = "assumed", "ask"


@dataclass(frozen=True)
class Format:
    """A layout of checkpoints, named by the best-known project that uses it.

    A file in the layout may be of another method. Several names in one text are separated by spaces.

    online, target: prefixes of the backbone's names: "prefix", or "key/key/prefix" below those keys of the
        file. A family with several spellings has several.
    drops: prefixes of all other names in the state dict. The longest prefix that fits a name decides.
    must: prefixes without which a state dict is another family's; "a|b" asks for either.
    rename: (pattern, replacement) pairs that give torchvision's names.
    pixels: (mean, std) of RGB in [0, 1] that the family trains on, or :data:`ASSUMED` or :data:`ASK`.
    note: what to tell users who convert the online branch.

    All layouts hold ResNets with torchvision's stride, in the 3x3 convolution.
    """

    name: str
    online: str
    target: str | None = None
    drops: str = ""
    must: str = ""
    rename: tuple = ()
    pixels: Pixels | str = IMAGENET
    note: str = ""


OWN_FILE = "rsa-pretraining"  # the "format" of this project's checkpoints
OURS = "this project's pre-training"
SOLO_HEADS = (
    "classifier.weight classifier.bias momentum_classifier. projector. momentum_projector. predictor. "
    "predictor2. head. momentum_head. dino_loss_func. prototypes. queue local_memory_ transformer_encoder. "
    "whitening."
)
# The wrapped model keeps its fc.
LIGHTLY_TRAIN_HEADS = (
    "student_projection_head teacher_projection_head projection_head prediction_head key_encoder. "
    "query_encoder.local_projection_head. query_encoder.global_projection_head. memory_bank. teacher_queue "
    "criterion. local_criterion. global_criterion. "
) + " ".join(
    f"{model}.embed_head. {model}.wrapped_model._model.fc."
    for model in (
        "embedding_model",
        "embedding_model_momentum",
        "student_embedding_model",
        "teacher_embedding_model",
        "query_encoder.embedding_model",
        "key_encoder.embedding_model",
    )
)

# The first row that accounts for every name of a file is taken, so of rows with the same prefixes the one
# with fewer drops comes first. A row that files of another family could fit has ``must``.
FORMATS = (
    Format(
        OURS,
        "model/online.backbone.",
        "model/target.backbone.",
        drops="online.projector. target.projector. predictor. queue.",
    ),
    # torchvision and timm write fc as well. Bare are the extracted backbones of Barlow Twins (resnet50.pth),
    # SwAV, OpenSelfSup and OBoW (the student), and lightly-train's exports (the teacher of DINO).
    Format("torchvision, timm", "", drops="fc.", pixels=ASSUMED),
    Format(
        "nn.Sequential of a ResNet's children",
        "",
        drops="9.",
        must="0.weight 7.0.",
        rename=SEQUENTIAL,
        pixels=ASSUMED,
    ),
    Format(
        "SwAV, DeepCluster v2", "", drops="projection_head. prototypes.", must="projection_head.|prototypes."
    ),
    Format(
        "Hugging Face",
        "",
        drops="classifier.",
        must="embedder.embedder.",
        rename=HUGGING_FACE,
        pixels=ASSUMED,
    ),
    Format(
        "Hugging Face",
        "resnet.",
        drops="classifier.",
        must="resnet.embedder.embedder.",
        rename=HUGGING_FACE,
        pixels=ASSUMED,
    ),
    # As the converters of MoCo, DenseCL, ReSim and of Detectron2 itself write it.
    Format(
        "Detectron2",
        "model/",
        drops="stem.fc. fpn_ backbone.fpn_ box_head.",
        must="stem.conv1.norm.",
        rename=DETECTRON2,
        pixels=ASSUMED,
    ),
    Format(
        "a detector fine-tuned with Detectron2",
        "model/backbone.bottom_up.",
        drops=(
            "backbone.fpn_ backbone.top_block. proposal_generator. roi_heads. head. anchor_generator. "
            "sem_seg_head. pixel_mean pixel_std"
        ),
        must="backbone.bottom_up.stem.",
        rename=DETECTRON2,
        pixels=ASK,
    ),
    Format(
        "a detector of torchvision's",
        "backbone.body.",
        drops="backbone.fpn. rpn. roi_heads. head.",
        pixels=ASK,
    ),
    # Their RSA is a subclass of BYOL: a file says neither which of them it holds, nor the data.
    Format(
        "the authors' RSA or BYOL",
        "encoder_q.",
        "encoder_k.",
        drops="encoder_q_head. encoder_k_head. pred.",
        must="encoder_q_head.",
    ),
    # PCL and MoCo-EMAN use the same names.
    Format("MoCo v1, v2", "encoder_q.", "encoder_k.", drops="encoder_q.fc. encoder_k.fc. queue"),
    Format(
        "MoCo of lightning-bolts",
        "encoder_q.",
        "encoder_k.",
        drops="encoder_q.fc. encoder_k.fc. head_q. head_k. queue. val_queue.",
        must="val_queue.",
        pixels=ASSUMED,
    ),
    Format(
        "ReSim",
        "encoder_q.",
        "encoder_k.",
        drops="encoder_q.fc. encoder_k.fc. encoder_q.fpn_ encoder_k.fpn_ queue",
        must="encoder_q.fpn_",
    ),
    Format(
        "SlotCon",
        "encoder_q.",
        "encoder_k.",
        drops="projector_ grouping_ predictor_slot. center",
        must="grouping_",
        note="SlotCon's own script for detection takes its target network: --branch target",
    ),
    Format(
        "MSF, ISD",
        "encoder_q.module.",
        "encoder_t.module. encoder_k.module.",
        drops="encoder_q.module.fc. encoder_t.module.fc. encoder_k.module.fc. predict_q. queue labels",
        must="encoder_q.module.layer1.",
    ),
    Format(
        "MoCo v3",
        "base_encoder.",
        "momentum_encoder.",
        drops="base_encoder.fc. momentum_encoder.fc. predictor.",
    ),
    # backbone and neck are second names of the online branch's modules.
    Format(
        "DenseCL, OpenSelfSup, MMSelfSup 0.x",
        "encoder_q.0. online_net.0. base_encoder.0. encoder.0.",
        "encoder_k.0. target_net.0. momentum_encoder.0.",
        drops=(
            "encoder_q.1. encoder_k.1. online_net.1. target_net.1. base_encoder.1. momentum_encoder.1. "
            "encoder.1. backbone. neck. head. queue"
        ),
    ),
    Format(
        "SetSim",
        "encoder_q.0.",
        "encoder_k.0.",
        drops="encoder_q.0.fc. encoder_k.0.fc. encoder_q.1. encoder_k.1. backbone. neck. head. queue",
        must="encoder_q.0.fc.",
    ),
    Format(
        "InstDis, PIRL, InfoMin (PyContrast)",
        "model/encoder.",
        "model_ema/encoder.",
        drops="head. head_jig.",
        must="head.",
    ),
    Format("an encoder alone", "encoder.", drops="encoder.fc.weight encoder.fc.bias", pixels=ASSUMED),
    Format("SimSiam", "encoder.", drops="encoder.fc. predictor.", must="predictor."),
    Format(
        "PixPro, SoCo",
        "encoder.",
        "encoder_k.",
        drops="projector predictor. value_transform. neck head queue",
        must="encoder_k.layer1.",
    ),
    Format(
        "SimCLR of lightning-bolts",
        "encoder.",
        drops="encoder.fc. projection.model.",
        must="projection.model.",
        pixels=ASSUMED,
    ),
    # Its projector has no biases, and it does not normalize images.
    Format(
        "SimCLR (Spijkervet/SimCLR)",
        "encoder.",
        drops="projector.0.weight projector.2.weight",
        must="projector.0.weight projector.2.weight",
        pixels=UNSCALED,
    ),
    Format(
        "self_supervised (KeremTurgutlu)",
        "encoder.",
        drops="projector. predictor. prototypes.",
        must="projector.0.bias",
        rename=SEQUENTIAL,
    ),
    Format(
        "solo-learn before 1.0.3", "encoder.", "momentum_encoder.", drops=SOLO_HEADS, must="classifier.weight"
    ),
    Format("PAWS, SuNCEt", "encoder/", drops="fc. pred.", must="fc.fc1."),
    Format(
        "BYOL (sthalles/PyTorch-BYOL)",
        "online_network_state_dict/encoder.",
        "target_network_state_dict/encoder.",
        drops="projetion.",
        rename=SEQUENTIAL,
        pixels=UNSCALED,
    ),
    Format(
        "BYOL (yaox12/BYOL-PyTorch)",
        "online_network.encoder.",
        "target_network.encoder.",
        drops="online_network.projetion. target_network.projetion. predictor.",
        rename=SEQUENTIAL,
    ),
    Format(
        "BYOL, SimSiam of lightning-bolts",
        "online_network.encoder.",
        "target_network.encoder.",
        drops=(
            "online_network.projector. target_network.projector. online_network.encoder.fc. "
            "target_network.encoder.fc. predictor."
        ),
        must="online_network.projector.",
        pixels=ASSUMED,
    ),
    # net is a second name of the online encoder's network.
    Format(
        "BYOL (lucidrains/byol-pytorch)",
        "online_encoder.net.",
        "target_encoder.net.",
        drops=(
            "online_encoder. target_encoder. online_encoder.net.fc. target_encoder.net.fc. "
            "online_predictor. net."
        ),
    ),
    Format(
        "BYOL (EMAN)",
        "online_net.backbone.",
        "target_net.backbone.",
        drops="online_net.neck. target_net.neck. predictor.",
    ),
    Format("a backbone alone", "backbone.", drops="backbone.fc.weight backbone.fc.bias", pixels=ASSUMED),
    Format("VICReg", "backbone.", drops="projector.", must="projector.", pixels=ASSUMED),
    Format("Barlow Twins", "model/backbone.", drops="projector. bn.", must="projector. bn."),
    Format(
        "VICRegL", "model/backbone.", drops="maps_projector. projector. classifier.", must="maps_projector."
    ),
    Format("DINO", "student/backbone.", "teacher/backbone.", drops="head.", must="head."),
    Format(
        "SimCLR (sthalles/SimCLR)",
        "backbone.",
        drops="backbone.fc.",
        must="backbone.fc.0. backbone.fc.2.",
        pixels=UNSCALED,
    ),
    # encoder is a second name of backbone and projector.
    Format(
        "SimSiam, BYOL, SimCLR (PatrickHua/SimSiam)",
        "backbone.",
        "target_encoder.0.",
        drops=(
            "projector. predictor. encoder.0. encoder.1. online_encoder. target_encoder.1. online_predictor."
        ),
        must="projector.layer1. encoder.0.|online_encoder.0.",
    ),
    Format(
        "InstanceLoc",
        "backbone.",
        "backbone_k.",
        drops="neck roi_head rpn_head queue",
        must="backbone_k. roi_head.",
    ),
    Format(
        "MMSelfSup 1.x, OpenSelfSup",
        "backbone.",
        "encoder_k.module.0. target_net.module.0. momentum_encoder.module.0.",
        drops="encoder_k. target_net. momentum_encoder. neck. head. queue memory_bank. data_preprocessor.",
        must="neck.|head.|data_preprocessor.|encoder_k.|target_net.|momentum_encoder.",
    ),
    Format(
        "solo-learn",
        "backbone.",
        "momentum_backbone.",
        drops=SOLO_HEADS,
        must="classifier.weight|momentum_backbone.",
    ),
    Format(
        "stable-pretraining",
        "backbone.student.",
        "backbone.teacher.",
        drops=(
            "backbone.base_ema_coefficient backbone.final_ema_coefficient backbone.ema_coefficient "
            "backbone.student.fc. backbone.teacher.fc. "
            "projector predictor prototypes. queue callbacks_"
        ),
        must="backbone.student.",
    ),
    Format(
        "stable-pretraining",
        "backbone.",
        drops="backbone.fc. projector predictor proj_ prototypes. queue callbacks_",
        must="callbacks_modules.|callbacks_metrics.",
    ),
    Format(
        "lightly",
        "backbone.",
        "backbone_momentum. momentum_backbone. teacher_backbone. key_backbone.",
        drops=(
            "projection_head prediction_head projection_mlp. prediction_mlp. local_projection_head "
            "momentum_projection_head. teacher_projection_head. key_projection_head. prototypes. "
            "memory_bank. queues. criterion smog. online_classifier. knn_classifier."
        ),
        must=(
            "projection_head|prediction_head|projection_mlp.|online_classifier."
            "|backbone_momentum.|momentum_backbone.|teacher_backbone.|key_backbone."
        ),
        rename=SEQUENTIAL,
    ),
    # In its benchmark, the teacher has the names without a prefix.
    Format(
        "lightly's DINO",
        "student_backbone.",
        "backbone. teacher_backbone.",
        drops=(
            "student_projection_head. projection_head. student_head. teacher_head. criterion. "
            "online_classifier."
        ),
        rename=SEQUENTIAL,
    ),
    Format(
        "lightly-train, DINO",
        ("student_embedding_model.wrapped_model._features. student_embedding_model.wrapped_model._model."),
        ("teacher_embedding_model.wrapped_model._features. teacher_embedding_model.wrapped_model._model."),
        drops=LIGHTLY_TRAIN_HEADS,
        must="teacher_projection_head.",
        note="lightly-train's own exports of DINO are its target network: --branch target",
    ),
    # The teacher is another network.
    Format(
        "lightly-train, distillation",
        ("student_embedding_model.wrapped_model._features. student_embedding_model.wrapped_model._model."),
        drops=LIGHTLY_TRAIN_HEADS + " teacher_embedding_model.",
        must="student_projection_head",
    ),
    Format(
        "lightly-train",
        (
            "embedding_model.wrapped_model._features. embedding_model.wrapped_model._model. "
            "query_encoder.embedding_model.wrapped_model._features. "
            "query_encoder.embedding_model.wrapped_model._model."
        ),
        (
            "embedding_model_momentum.wrapped_model._features. "
            "embedding_model_momentum.wrapped_model._model. "
            "key_encoder.embedding_model.wrapped_model._features. "
            "key_encoder.embedding_model.wrapped_model._model."
        ),
        drops=LIGHTLY_TRAIN_HEADS,
    ),
    Format(
        "VISSL",
        (
            "classy_state_dict/base_model/model/trunk/_feature_blocks. _feature_blocks. "
            "classy_state_dict/base_model/model/trunk/base_model._feature_blocks."
        ),
        (
            "classy_state_dict/loss/moco_encoder.trunk._feature_blocks. "
            "classy_state_dict/loss/momentum_teacher.trunk._feature_blocks. "
            "classy_state_dict/loss/momentum_teacher.module.trunk._feature_blocks. "
            "classy_state_dict/loss/momentum_encoder.trunk._feature_blocks. "
            "classy_state_dict/loss/momentum_encoder.module.trunk._feature_blocks."
        ),
        drops=(
            "moco_encoder.heads. momentum_teacher.heads. momentum_teacher.module.heads. "
            "momentum_encoder.heads. momentum_encoder.module.heads. queue heads. center"
        ),
    ),
)

# (pattern in OpenMMLab's configuration, how that ResNet differs although its names are the same).
OTHER_STRIDES = (
    (r"style['\"]?\s*[=:]\s*['\"]caffe", "strides in the 1x1 convolution"),
    (r"dilations['\"]?\s*[=:]\s*[(\[]1,\s*1,\s*[124],\s*[24]", "is dilated"),
)

# (pattern of a tensor's name, the network that has it), for files in which no row finds a ResNet.
OTHER_NETWORKS = (
    (
        r"res2_0_branch2a|res_conv1_bn_s",
        "MSRA's ResNet with Caffe's names: it takes BGR pixels and strides in the 1x1 "
        "convolution, which torchvision's and timm's ResNets do not",
    ),
    (
        r"(^|\.)aux_classifier\.|(^|\.)classifier\.0\.convs\.",
        "a segmentation network, whose backbone is dilated",
    ),
    (r"(^|\.)(cls_token|pos_embed|patch_embed\.)|encoder\.layers\.encoder_layer_0", "a vision transformer"),
    (r"(^|\.)(stages\.0\.blocks\.0\.conv_dw|downsample_layers\.0\.|stages\.0\.0\.dwconv)", "a ConvNeXt"),
    (r"(^|\.)conv1\.0\.weight$", "a ResNet with a deep stem (resnet50d and its like)"),
)
