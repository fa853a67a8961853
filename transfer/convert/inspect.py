"""What a checkpoint holds, in lines for a terminal: tools/convert_to_d2.py --inspect."""

from pathlib import Path

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.transfer.convert.architectures import ARCHITECTURES, tensor_shapes
from rsa_detectron2.transfer.convert.files import local_file, open_checkpoint, printable
from rsa_detectron2.transfer.convert.formats import Pixels
from rsa_detectron2.transfer.convert.provenance import BRANCHES, method_of, remarks
from rsa_detectron2.transfer.convert.readers import read_checkpoint
from rsa_detectron2.transfer.convert.stored import Tensor
from rsa_detectron2.transfer.convert.survey import grouped, networks, some, state_dicts


def inspect(path: str | Path, branch: str | None = None, pixels: Pixels | None = None) -> list[str]:
    """Lines on what lies where in the file, then on each branch: what it holds, or why it cannot be
    converted.

    Raises InputError for a file that cannot be opened.
    """
    path = local_file(path, f"no checkpoint {path}")
    lines = [f"{path}: opened without running any of its code"]
    with open_checkpoint(path) as contents:
        for key, held in state_dicts(contents):
            names = [
                name for name, value in held.items() if isinstance(name, str) and isinstance(value, Tensor)
            ]
            if names:
                lines.append(
                    f"  under {printable(key) or 'its own names'}: {len(names)} tensors, {grouped(names)}"
                )
        places = ["/".join(filter(None, place)) or "its own names" for place in networks(contents)]
        lines.append(f"  ResNets: {some(places, 8).strip(' ()') or 'none'}")
    for wanted in BRANCHES if branch is None else [branch]:
        try:
            _, provenance = read_checkpoint(path, wanted, pixels)
        except InputError as error:
            lines.append(f"{wanted}: {str(error).removeprefix(path).lstrip(': ')}")
            continue
        network = provenance["architecture"]
        step = f" at step {provenance['step']}" if provenance["step"] >= 0 else ""
        lines.append(
            f"{wanted}: a whole {ARCHITECTURES[network].label}, {len(tensor_shapes(network))} tensors, of "
            f"{method_of(provenance)}{step}; pixels: mean {provenance['pixel_mean']}, std "
            f"{provenance['pixel_std']} ({provenance.get('pixel_source', 'file')})"
        )
        lines += [f"  {remark}" for remark in remarks(provenance)]
    return lines
