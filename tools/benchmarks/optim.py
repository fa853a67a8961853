"""Milliseconds of LARS and of the EMA: over all tensors at once, and one by one."""

import argparse
from collections.abc import Callable

import torch
from fvcore.common.config import CfgNode

from rsa_detectron2.common.distributed import device
from rsa_detectron2.pretrain.method.networks import build_networks
from rsa_detectron2.pretrain.method.objectives import METHODS
from rsa_detectron2.pretrain.method.optim import build_optimizer
from rsa_detectron2.tools.benchmarks.options import add_recipe
from rsa_detectron2.tools.benchmarks.timing import device_clock, take_turns


def add_options(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser, "backbone")


def measure(args: argparse.Namespace) -> list[dict]:
    """Time both on random gradients: neither depends on the images."""
    args.cfg.SOLVER.OPTIMIZER = "lars"
    torch.manual_seed(0)
    networks = build_networks(args.cfg, METHODS["rsa"]).to(device())
    parameters = [p for p in networks.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    variants = {
        "LARS, all at once": lars(networks, args.cfg.SOLVER, foreach=True),
        "LARS, one by one": lars(networks, args.cfg.SOLVER, foreach=False),
        "EMA, all at once": lambda _: networks.update_target(0.99),
        "EMA, one by one": lambda _: ema_one_by_one(networks),
    }
    seconds = take_turns(variants, [None], 5 * args.repeats, device_clock)
    return [
        {
            "variant": name,
            "backbone": args.cfg.MODEL.BACKBONE,
            "tensors": len(parameters),
            "ms": 1000 * value,
        }
        for name, value in seconds.items()
    ]


def lars(networks: torch.nn.Module, solver: CfgNode, foreach: bool) -> Callable:
    """A step of LARS, with a learning rate that leaves the weights about as they are."""
    optimizer = build_optimizer(networks, solver)
    for group in optimizer.param_groups:
        group["lr"], group["foreach"] = 1e-6, foreach
    return lambda _: optimizer.step()


@torch.no_grad()
def ema_one_by_one(networks: torch.nn.Module) -> None:
    for target, online in zip(networks.target.parameters(), networks.online.parameters()):
        target.lerp_(online, 0.01)
