"""Whether a configuration suits the converted weights that it fine-tunes."""

from fvcore.common.config import CfgNode

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.transfer.config import NORM_PARTS, RGB_IMAGENET, value_of
from rsa_detectron2.transfer.convert.architectures import ARCHITECTURES

# Key of the config: key of the provenance that it must agree with.
INPUT_KEYS = {
    "INPUT.FORMAT": "input_format",
    "MODEL.PIXEL_MEAN": "pixel_mean",
    "MODEL.PIXEL_STD": "pixel_std",
    "MODEL.RESNETS.STRIDE_IN_1X1": "stride_in_1x1",
}


def check_weights(cfg: CfgNode, provenance: dict | None) -> None:
    """Check that a config builds the network of its weights, with their pixels and stride.

    provenance: that of the converted file, with :data:`RGB_IMAGENET` for what it lacks; None stands for
    random initialization, which fits every config. Raises InputError for another network, other pixels or
    stride, or BatchNorm that is frozen in part.
    """
    if provenance is None:
        return
    needed = {**RGB_IMAGENET, **provenance}
    if fixes := _input_fixes(cfg, needed) + _network_fixes(cfg, needed):
        raise InputError(f"{cfg.MODEL.WEIGHTS} was trained with {', '.join(fixes)}: give these in the config")
    frozen = _frozen_parts(cfg)
    if frozen and needed.get("method") != "supervised":
        raise InputError(
            f"MODEL.{frozen[0]}, but {cfg.MODEL.WEIGHTS} is not known to be supervised (method "
            f"{needed.get('method')}): self-supervised weights need SyncBN, and FREEZE_AT 0 (or 5, which "
            "leaves the whole backbone as it is)"
        )


def _input_fixes(cfg, needed):
    """The input and stride that the weights need where ``cfg`` has others, as texts."""
    pairs = [(key, value_of(cfg, key), needed[name]) for key, name in INPUT_KEYS.items()]
    return [
        f"{key} {wanted!r} (it is {given!r})" for key, given, wanted in pairs if not _agree(given, wanted)
    ]


def _agree(given, wanted):
    """Whether a value of the config is the one that is needed; numbers agree to 0.01."""
    if isinstance(wanted, (str, bool)):
        return given == wanted
    return len(given) == len(wanted) and all(abs(a - b) < 0.01 for a, b in zip(given, wanted))


def _network_fixes(cfg, needed):
    """The keys of MODEL.RESNETS that the weights need where ``cfg`` has others, as texts."""
    if "architecture" not in needed:  # files of early versions are all ResNet-50
        return []
    resnets = cfg.MODEL.RESNETS
    return [
        f"MODEL.RESNETS.{key} {wanted} (it is {resnets[key]})"
        for key, wanted in ARCHITECTURES[needed["architecture"]].resnets().items()
        if resnets[key] != wanted
    ]


def _frozen_parts(cfg):
    """Settings of ``cfg`` that freeze BatchNorm, as texts."""
    frozen = [f"{part}.NORM is FrozenBN" for part in NORM_PARTS if cfg.MODEL[part].NORM == "FrozenBN"]
    # Detectron2 turns the BatchNorm of the stages that it freezes into FrozenBN. By default it freezes two of
    # the five, which suits supervised weights. Freezing all of them is a choice: it tests the features.
    if 0 < cfg.MODEL.BACKBONE.FREEZE_AT < 5:
        frozen.append(f"BACKBONE.FREEZE_AT is {cfg.MODEL.BACKBONE.FREEZE_AT}")
    return frozen
