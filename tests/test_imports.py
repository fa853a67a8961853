"""Imports run one way: tools use pretrain and transfer, which use common; engine uses method and data."""

import ast

import pytest

from tests.conftest import ROOT

PACKAGE = "rsa_detectron2."
# What each room may import, besides itself and common/. rsa_detectron2/ and tools/ may import everything.
ALLOWED = {
    "common": (),
    "pretrain.config": (),
    "pretrain.method": ("pretrain.config",),
    "pretrain.data": ("pretrain.config", "pretrain.method"),
    "pretrain.evaluate": ("pretrain.config", "pretrain.data", "pretrain.method"),
    "pretrain.engine": ("pretrain.config", "pretrain.data", "pretrain.method", "pretrain.evaluate"),
    "transfer.config": (),
    "transfer.precise_bn": (),
    "transfer.convert": ("transfer.config",),
    "transfer.data": ("transfer.config",),
    "transfer.report": ("transfer.config", "transfer.convert", "transfer.data"),
    **dict.fromkeys(
        ("transfer.d2", "transfer.tv"),
        ("transfer.config", "transfer.precise_bn", "transfer.convert", "transfer.data", "transfer.report"),
    ),
}


def room(module):
    """The room of a module: rsa_detectron2.pretrain.data.loader is in pretrain.data."""
    parts = module.removeprefix(PACKAGE).split(".")
    return ".".join(parts[:2]) if parts[0] in ("pretrain", "transfer") else parts[0]


def imports(path):
    """The modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


def files(folder):
    return [path for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py"]


@pytest.mark.parametrize("folder", ("common", "pretrain", "transfer"))
def test_imports_run_one_way(folder):
    wrong = []
    for path in files(folder):
        own = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for module in imports(path):
            if module.startswith(PACKAGE) and room(module) not in (own, "common", *ALLOWED[own]):
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong


def test_only_one_room_imports_detectron2():
    for folder in ("common", "pretrain", "transfer", "tools"):
        for path in files(folder):
            if path.parent != ROOT / "transfer" / "d2":
                assert not [m for m in imports(path) if m.split(".")[0] == "detectron2"], path
