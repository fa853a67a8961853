"""Checks of what the device computes: views, gradients, steps in each precision."""

import copy
import math
from collections.abc import Iterable

import torch
from fvcore.common.config import CfgNode

from rsa_detectron2.common.distributed import device
from rsa_detectron2.pretrain.config import get_cfg
from rsa_detectron2.pretrain.method.augment import aggressive
from rsa_detectron2.pretrain.method.networks import Networks, build_networks
from rsa_detectron2.pretrain.method.objectives import METHODS
from rsa_detectron2.tools.benchmarks.augment import one_by_one, synthetic_views
from rsa_detectron2.tools.benchmarks.step_timer import BETA, TAU, StepTimer, synthetic_batches
from rsa_detectron2.tools.checks.figure import Figure, worst

# Networks and images that a CPU trains in a moment.
SMALL = (
    "MODEL.BACKBONE resnet18 MODEL.HIDDEN_DIM 64 MODEL.OUT_DIM 32 MODEL.QUEUE 256 "
    "DATA.IMAGE_SIZE 32 DATA.EVAL_RESIZE 32 SOLVER.BATCH_SIZE 16"
).split()
# Float32 comes to about 1e-5. TF32 would come to 5e-2.
GRADIENT_LIMITS = {torch.float32: 1e-2, torch.float64: 1e-8}


def small_cfg(amp: str = "off") -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_list([*SMALL, "SOLVER.AMP", amp])
    return cfg


def small_networks(method: str, device: torch.device, dtype: torch.dtype) -> Networks:
    """Networks of a method, the same on any device, in which no layer has a gradient of zero."""
    torch.manual_seed(0)
    networks = build_networks(small_cfg(), METHODS[method]).train()
    with torch.no_grad():
        for parameter in networks.parameters():
            if not parameter.any():  # as the last scale of each residual branch is at first
                parameter.fill_(0.5)
    return networks.to(device, dtype)


def random_views(device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Weak and aggressive views, [B, 2, 3, S, S] each, the same for any device and precision."""
    cfg, generator = small_cfg(), torch.Generator().manual_seed(1)
    shape = cfg.SOLVER.BATCH_SIZE, 2, 3, cfg.DATA.IMAGE_SIZE, cfg.DATA.IMAGE_SIZE
    views = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    return [view.to(device, dtype) for view in views]


def distance(values: torch.Tensor, wanted: torch.Tensor) -> float:
    """|values - wanted| / |wanted|, of float tensors of one shape on any devices."""
    values, wanted = values.double().cpu(), wanted.double().cpu()
    return ((values - wanted).norm() / wanted.norm()).item()


def flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """All elements of float tensors in one vector."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def check_views() -> list[Figure]:
    """The aggressive stage on the device against torchvision's functions on the CPU, view by view."""

    def compare(num_images: int, size: int) -> list[Figure]:
        views, params = synthetic_views(num_images, size)
        difference = aggressive(views.to(device()), params).cpu() - one_by_one(views, params)
        return [Figure("a pixel in [0, 1] is off by", difference.abs().max().item(), 1e-4)]

    return worst([compare(64, 32), compare(4, 224)])


def check_gradients() -> list[Figure]:
    """Losses and gradients of all methods on the device against the CPU's in float64.

    A GPU is tried in float32, without TF32, and in float64; a CPU in float32.
    """
    dtypes = GRADIENT_LIMITS if device().type == "cuda" else [torch.float32]
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        return worst(compare_gradients(method, dtypes) for method in METHODS)
    finally:
        torch.backends.cudnn.allow_tf32 = tf32


def compare_gradients(method: str, dtypes: list[torch.dtype]) -> list[Figure]:
    figures = []
    wanted_loss, wanted = loss_and_gradient(method, torch.device("cpu"), torch.float64)
    for dtype in dtypes:
        loss, gradient = loss_and_gradient(method, device(), dtype)
        error = max(abs(loss - wanted_loss), distance(gradient, wanted))
        figures.append(Figure(f"{str(dtype).removeprefix('torch.')} off by", error, GRADIENT_LIMITS[dtype]))
    return figures


def loss_and_gradient(method: str, device: torch.device, dtype: torch.dtype) -> tuple[float, torch.Tensor]:
    """The loss, and the gradients of all parameters in one vector."""
    networks = small_networks(method, device, dtype)
    loss = networks(*random_views(device, dtype), BETA)["loss"]
    loss.backward()
    return loss.item(), flat(p.grad for p in networks.parameters() if p.grad is not None)


def check_steps(amp: str) -> list[Figure]:
    """Two steps of every method in a precision. The first one overflows, and must leave no trace."""
    return worst(two_steps(StepTimer(small_cfg(amp), method)) for method in METHODS)


def two_steps(timer: StepTimer) -> list[Figure]:
    networks, state, batches = timer.networks, timer.state, synthetic_batches(timer.cfg)
    before, scaler = learned(networks), state.scaler
    state.scaler = torch.amp.GradScaler(device().type, init_scale=math.inf)
    timer.step(batches)
    changed = sum(not torch.equal(before[name], tensor) for name, tensor in learned(networks).items())
    state.scaler = scaler
    start = move_target_back(networks)
    float32 = float32_loss(timer)
    figures = timer.step(batches)
    loss, tensors = figures["loss"].item(), [*figures.values(), *networks.state_dict().values()]
    return [
        Figure("loss off by", abs(loss - float32), 0.1),
        Figure("EMA off by", 0.0 if start is None else ema_error(networks, start), 1e-2),
        Figure("not finite:", sum((~tensor.isfinite()).sum().item() for tensor in tensors), 0),
        Figure("changed by a skipped step:", changed, 0),
    ]


@torch.no_grad()
def move_target_back(networks: Networks) -> torch.Tensor | None:
    """Put the target some way behind the online network; returns its parameters, in float64."""
    if networks.target is None:
        return None
    for parameter in networks.target.parameters():
        parameter *= 0.9
    return flat(networks.target.parameters()).double()


def ema_error(networks: Networks, start: torch.Tensor) -> float:
    """How far the target, from ``start``, is from its EMA after a step, as a fraction of the way."""
    target, online = (flat(branch.parameters()).double() for branch in (networks.target, networks.online))
    return distance(target - start, (1 - TAU) * (online - start))


def learned(networks: Networks) -> dict[str, torch.Tensor]:
    """Copies of the parameters and of the queue: all but the statistics of BatchNorm."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    tensors = networks.state_dict().items()
    return {name: tensor.clone() for name, tensor in tensors if not name.endswith(statistics)}


@torch.no_grad()
def float32_loss(timer: StepTimer) -> float:
    """The loss of the next step, computed without autocast."""
    pair = next(timer.views(synthetic_batches(timer.cfg)))
    views = [view if view is None else view.float() for view in pair]
    return copy.deepcopy(timer.networks)(*views, BETA)["loss"].item()
