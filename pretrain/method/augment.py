"""Multi-stage augmentation (paper, eq. 3): weak view v_w = t_w(x), aggressive view v_a = t_a(v_w).

t_w (random resized crop, flip) runs in the loader's workers on uint8. t_a (color jitter, grayscale, Gaussian
blur) runs on whole batches on the device, with ``params`` that the workers drew. So every aggressive view has
the crop of its weak view, and four views cost the transfer of two. Drawing is separate from applying: both
stages are pure functions.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

# Columns of ``params``: factors of brightness, contrast, saturation and hue; the operation in each
# of the four slots of the jitter (-1: none); grayscale (0 or 1); sigma of the blur in pixels
# (0: none).
FACTORS, ORDER, GRAY, SIGMA = slice(0, 4), slice(4, 8), 8, 9
NUM_PARAMS = 10
MAX_SIGMA = 2.0
BLUR_RADIUS = 6  # 3 sigma


# ---- weak stage, on one image in a worker ----


def crop_box(
    rng: np.random.Generator,
    height: int,
    width: int,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """RandomResizedCrop's box (top, left, height, width) in pixels.

    Ten tries, then the largest central crop.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for u in rng.random((10, 4)):
        area = height * width * (scale[0] + u[0] * (scale[1] - scale[0]))
        aspect = math.exp(low + u[1] * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1)), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (height - h) // 2, (width - w) // 2, h, w


def weak_view(
    image: torch.Tensor, rng: np.random.Generator, size: int, scale: tuple[float, float] = (0.2, 1.0)
) -> torch.Tensor:
    """t_w: uint8 [3, H, W] -> uint8 [3, size, size], channels last in memory."""
    top, left, height, width = crop_box(rng, *image.shape[-2:], scale)
    # Copy the crop first: resizing the strided crop takes 1.5 times as long, for the same bits.
    crop = image[None, :, top : top + height, left : left + width].contiguous(
        memory_format=torch.channels_last
    )
    view = F.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]
    return view.flip(-1) if rng.random() < 0.5 else view


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


def aggressive(views: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    """t_a on a batch: uint8 [B, V, 3, H, W] on any device -> float32 [B, V, 3, H, W] in [0, 1].

    ``params`` is float32 [B, V, P] on the CPU. There it is known, without a synchronization for each
    operation, which views the operation takes.
    """
    images, params = to_float(views.flatten(0, 1)), params.flatten(0, 1)
    # Row: one of 18 operations. Column: whether a view takes it.
    taken = torch.stack(
        [
            *(slot == operation for slot in params[:, ORDER].unbind(1) for operation in range(4)),
            params[:, GRAY] > 0,
            params[:, SIGMA] > 0,
        ]
    )
    indices = taken.nonzero()[:, 1]
    if images.is_cuda:
        indices = indices.pin_memory().to(images.device, non_blocking=True)
    *jitter, gray, blurred = indices.split(taken.sum(1).tolist())
    params = params.to(images.device, non_blocking=True)
    for n, picked in enumerate(jitter):
        if len(picked):
            factor = params[picked, n % 4, None, None, None]
            images[picked] = ADJUST[n % 4](images[picked], factor)
    if len(gray):
        images[gray] = grayscale(images[gray]).expand(-1, 3, -1, -1)
    if len(blurred):
        images[blurred] = gaussian_blur(images[blurred], params[blurred, SIGMA])
    return images.view(views.shape)


def grayscale(images: torch.Tensor) -> torch.Tensor:
    """Luma of ITU-R 601: [N, 3, H, W] -> [N, 1, H, W]."""
    r, g, b = images.unbind(1)
    return (0.2989 * r + 0.587 * g + 0.114 * b).unsqueeze(1)


def _blend(images, other, factor):
    return (factor * images + (1 - factor) * other).clamp_(0, 1)


def adjust_brightness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return (images * factor).clamp_(0, 1)


def adjust_contrast(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return _blend(images, grayscale(images).mean((-3, -2, -1), keepdim=True), factor)


def adjust_saturation(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return _blend(images, grayscale(images), factor)


def adjust_hue(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Turn the hue by ``factor`` [N, 1, 1, 1] of a full circle, through HSV."""
    r, g, b = images.unbind(1)
    value, lowest = images.amax(1), images.amin(1)
    chroma = value - lowest
    divisor = torch.where(chroma == 0, 1, chroma)
    sector = torch.where(
        value == r, (g - b) / divisor, torch.where(value == g, 2 + (b - r) / divisor, 4 + (r - g) / divisor)
    )
    hue = sector / 6 + factor[:, 0]
    # The farther a channel is from the hue, the more of the chroma is taken from the value.
    channels = []
    for offset in (5, 3, 1):
        k = (offset + 6 * hue) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(channels, 1)


ADJUST = adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue  # in the order of FACTORS


def gaussian_blur(images: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Separable Gaussian, each image with its own sigma: [N, 3, H, W], sigma [N] in pixels. The border is
    reflected."""
    count, channels, height, width = images.shape
    offsets = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)[:, None]
    planes = F.pad(images.reshape(1, count * channels, height, width), (BLUR_RADIUS,) * 4, mode="reflect")
    planes = F.conv2d(planes, kernel[:, :, None, :], groups=count * channels)
    planes = F.conv2d(planes, kernel[:, :, :, None], groups=count * channels)
    return planes.view(images.shape)


def normalize(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """[..., 3, H, W] -> (images - mean) / std, with mean and std float32 [3] on the images' device."""
    return (images - mean[:, None, None]) / std[:, None, None]
