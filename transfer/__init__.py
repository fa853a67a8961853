"""Conversion of pre-trained weights, and fine-tuning with them. Nothing here imports pretrain."""

import warnings

# What libraries are warned of for their own code: a user can mend none of it. (message, category, module)
for known in (
    ("`torch.jit.script(_method)?` is deprecated", FutureWarning),  # fvcore's and Detectron2's, when imported
    ("torch.meshgrid: in an upcoming release", UserWarning),  # Detectron2's anchors
    ("The given NumPy array is not writable", UserWarning, r"detectron2\."),  # its masks, which it only reads
    ("Creating a tensor from a list of numpy.ndarrays", UserWarning, r"detectron2\."),  # its keypoints
):
    warnings.filterwarnings("ignore", *known)
