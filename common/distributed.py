"""What both halves ask of DistributedDataParallel."""

import inspect

from torch.nn.parallel import DistributedDataParallel

# Each process keeps BatchNorm's running statistics of its own between steps. torch 2.14 renamed the option,
# and warns of the old name.
SYNC_OPTION = "forward_sync_buffers"
if SYNC_OPTION not in inspect.signature(DistributedDataParallel).parameters:
    SYNC_OPTION = "broadcast_buffers"
OWN_BUFFERS = {SYNC_OPTION: False}
