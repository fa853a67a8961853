"""Multi-stage augmentation (paper, eq. 3): weak view v_w = t_w(x), aggressive view v_a = t_a(v_w).

t_w (random resized crop, flip) runs in the loader's workers on uint8. t_a (color jitter, grayscale, Gaussian
blur) runs on whole batches on the device, with ``params`` that the workers drew. So every aggressive view has
the crop of its weak view, and four views cost the transfer of two. Drawing is separate from applying: both
stages are pure functions.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from rsa_detectron2.pretrain.method.color import ColorJitter, runs, to_device

# Columns of ``params``: factors of brightness, contrast, saturation and hue; the operation in each
# of the four slots of the jitter (-1: none); grayscale (0 or 1); sigma of the blur in pixels
# (0: none).
FACTORS, ORDER, GRAY, SIGMA = slice(0, 4), slice(4, 8), 8, 9
NUM_PARAMS = 10
MAX_SIGMA = 2.0
BLUR_RADIUS = 6  # 3 sigma
GRAYED, GRAYED_AND_BLURRED, BLURRED = 1, 2, 3


# ---- weak stage, on one image in a worker ----


Box = tuple[int, int, int, int]  # top, left, height, width in pixels
RATIO = (3 / 4, 4 / 3)  # of a box's width to its height


@dataclass(frozen=True)
class Crop:
    """What is drawn for one t_w, RandomResizedCrop and flip: it fits an image of any size."""

    tries: np.ndarray  # float64 [10, 4] in [0, 1): area, aspect, top and left of each
    flip: bool
    scale: tuple[float, float]  # least and greatest area, as a fraction of the image's

    def box(self, height: int, width: int) -> Box:
        """The first of ten tries that fits into the image, else the largest central crop."""
        low, high = math.log(RATIO[0]), math.log(RATIO[1])
        for u in self.tries:
            area = height * width * (self.scale[0] + u[0] * (self.scale[1] - self.scale[0]))
            aspect = math.exp(low + u[1] * (high - low))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1)), h, w
        aspect = min(max(width / height, RATIO[0]), RATIO[1])
        w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
        return (height - h) // 2, (width - w) // 2, h, w


def draw_crop(rng: np.random.Generator, scale: tuple[float, float] = (0.2, 1.0)) -> Crop:
    """Draw one t_w."""
    return Crop(rng.random((10, 4)), rng.random() < 0.5, scale)


def weak_view(image: torch.Tensor, crop: Crop, size: int) -> torch.Tensor:
    """t_w: uint8 [3, H, W] -> uint8 [3, size, size], channels last in memory."""
    top, left, height, width = crop.box(*image.shape[-2:])
    # Copy the crop first: resizing the strided crop takes 1.5 times as long, for the same bits.
    pixels = image[None, :, top : top + height, left : left + width].contiguous(
        memory_format=torch.channels_last
    )
    view = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)[0]
    return view.flip(-1) if crop.flip else view


def draw_params(rng: np.random.Generator) -> torch.Tensor:
    """Draw one t_a: float32 [NUM_PARAMS].

    ColorJitter(0.4, 0.4, 0.4, 0.1) with p 0.8, grayscale with p 0.2, blur with p 0.5.
    """
    params = np.zeros(NUM_PARAMS, dtype=np.float32)
    params[0:3] = rng.uniform(0.6, 1.4, 3)
    params[3] = rng.uniform(-0.1, 0.1)
    params[ORDER] = rng.permutation(4)
    jitter, gray, blur = rng.random(3)
    if jitter >= 0.8:
        params[ORDER] = -1
    params[GRAY] = gray < 0.2
    params[SIGMA] = rng.uniform(0.1, MAX_SIGMA) if blur < 0.5 else 0
    return torch.from_numpy(params)


# ---- aggressive stage, on a batch on the device ----


def to_float(views: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [0, 1]."""
    return views.float() / 255


@dataclass(frozen=True)
class Output:
    """How views are handed over: (x - mean) / std with mean and std float32 [3] on their device, in
    ``dtype``."""

    mean: torch.Tensor
    std: torch.Tensor
    dtype: torch.dtype = torch.float32

    def map(self, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(start, divisor), [N, 3, 1, 1] each: a pixel becomes start + pixel / divisor, if ``levels``,
        [N, 2, 1, 1, 1], are the pixels that mean black and white."""
        black, white = levels.unbind(1)
        mean, std = (values.view(3, 1, 1) for values in (self.mean, self.std))
        span = white - black
        return -(black / span + mean) / std, span * std


def plain(device: torch.device) -> Output:
    """Views in [0, 1]."""
    return Output(torch.zeros(3, device=device), torch.ones(3, device=device))


def aggressive(views: torch.Tensor, params: torch.Tensor, output: Output | None = None) -> torch.Tensor:
    """t_a on a batch: uint8 [B, V, 3, H, W] on any device -> [B, V, 3, H, W] as ``output`` says, which
    without it is float32 in [0, 1]. In memory a [:, v] is contiguous, with channels last.

    ``params`` is float32 [B, V, P] on the CPU. There it is known, without a synchronization for each
    operation, which views the operation takes.
    """
    output = output or plain(views.device)
    shape, views, params = views.shape, views.flatten(0, 1), params.flatten(0, 1)
    order = processing_order(params)
    params = params[order]
    jitter = ColorJitter(views[to_device(order, views.device)], params[:, FACTORS], params[:, ORDER])
    jitter.apply()
    result = torch.empty(views.shape, dtype=output.dtype, device=views.device)
    start, divisor = output.map(jitter.levels[..., None])
    sigma = params[:, SIGMA]
    blur = Blur(to_device(sigma[sigma > 0], views.device), shape[-2:])
    for finish, part in runs(finishes(params)):
        pixels = jitter.gray(part) if finish in (GRAYED, GRAYED_AND_BLURRED) else jitter.pixels[part]
        pixels = pixels.unflatten(2, shape[-2:])
        if finish in (GRAYED_AND_BLURRED, BLURRED):
            pixels = blur.next(pixels)
        torch.addcdiv(start[part], pixels, divisor[part], out=result[part])
    batch = empty_batch(shape, output.dtype, views.device)
    back = order.argsort().view(shape[:2]).T.flatten()  # to all first views, then all second ones
    torch.index_select(result, 0, to_device(back, views.device), out=batch.transpose(0, 1).flatten(0, 1))
    return batch


def empty_batch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Room for views [B, V, 3, H, W], of which the [:, v] are contiguous, with channels last."""
    batch, views, channels, height, width = shape
    rows = torch.empty(views, batch, height, width, channels, dtype=dtype, device=device)
    return rows.permute(1, 0, 4, 2, 3)


def weak(views: torch.Tensor, output: Output) -> torch.Tensor:
    """Weak views as :func:`aggressive` hands over its own: uint8 [B, V, 3, H, W] -> [B, V, 3, H, W]."""
    levels = to_device(torch.tensor([0.0, 255.0]), views.device).view(1, 2, 1, 1, 1)
    start, divisor = output.map(levels)
    return torch.addcdiv(start, views, divisor, out=empty_batch(views.shape, output.dtype, views.device))


def processing_order(params: torch.Tensor) -> torch.Tensor:
    """An order of the views [N] in which those with the same operations follow each other.

    Within an order of the jitter they are sorted by their finish, within the next one the other way around:
    so there are fewer changes of the finish.
    """
    orders = params[:, ORDER].numpy() @ 5 ** np.arange(4)[::-1]
    group = np.unique(orders, return_inverse=True)[1]
    finish = finishes(params)
    keys = 4 * group + np.where(group % 2, 3 - finish, finish)
    return torch.from_numpy(keys.argsort(kind="stable"))


def finishes(params: torch.Tensor) -> np.ndarray:
    """What follows the jitter of each view, [N]: 0 for nothing, GRAYED, GRAYED_AND_BLURRED or BLURRED."""
    gray, blurred = ((params[:, column] > 0).numpy() for column in (GRAY, SIGMA))
    return np.where(blurred, BLURRED - gray, gray.astype(int) * GRAYED)


class Blur:
    """Separable Gaussian, each image with its own sigma, [N] in pixels. The border is reflected."""

    def __init__(self, sigma: torch.Tensor, size: tuple[int, int]) -> None:
        height, width = size
        self.down = blur_matrices(sigma, height)
        self.across = self.down if width == height else blur_matrices(sigma, width)
        self.done = 0

    def next(self, images: torch.Tensor) -> torch.Tensor:
        """Blur the next of the images: [n, 3, H, W] -> the same, with channels last in memory."""
        count, channels, height, width = images.shape
        part = slice(self.done, self.done + count)
        self.done = part.stop
        # Each product turns the axes of an image, here (c, h, w), once: to (w, c, h), then to (h, w, c).
        rows = images.reshape(count, -1, width)
        rows = torch.bmm(self.across[part], rows.transpose(1, 2)).view(count, -1, height)
        rows = torch.bmm(self.down[part], rows.transpose(1, 2))
        return rows.view(count, height, width, channels).permute(0, 3, 1, 2)


def blur_matrices(sigma: torch.Tensor, size: int) -> torch.Tensor:
    """The matrices [N, size, size] that blur a line of ``size`` pixels by ``sigma`` [N]."""
    offsets = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    pixels = (torch.arange(size, device=sigma.device) + offsets[:, None]).abs()
    reflected = size - 1 - (size - 1 - pixels).abs()
    return (kernel @ torch.eye(size, device=sigma.device)[reflected].flatten(1)).view(-1, size, size)


def normalize(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """[..., 3, H, W] -> (images - mean) / std, with mean and std float32 [3] on the images' device."""
    return (images - mean[:, None, None]) / std[:, None, None]
