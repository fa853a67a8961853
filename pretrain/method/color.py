"""Color jitter and grayscale of many views, in few passes over their pixels.

What a view's pixels mean is kept apart from them: its ``levels``, black and white. Brightness and contrast
only move the levels, because saturation and hue commute with them. Saturation and hue are linear maps. Of
each operation there remains a clamp, and a brightness leaves its clamp to the operation before it.

Turning the hue by s sixths of the circle, 0 <= s <= 1, is linear up to a clamp, too:

    g' = clamp(g - b - (1 - 2s) r + (1 - s) (highest + lowest), lowest, highest), and in turn for b and r.

On a sector of the circle one channel is the highest and one the lowest. The third moves by s times their
difference, until it meets one of them; then that one moves on. The formula gives this on each sector.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision rounds it
LUMA_REST = 1 - sum(LUMA)  # gray is darker than the color by this part


class ColorJitter:
    """Views under the jitter: after all operations, x = (pixels - black) / (white - black) is in [0, 1].

    ``views`` are uint8 [N, 3, H, W]. ``factors`` and ``order``, [N, 4] on the CPU, are those columns of
    ``params``; views with the same order should follow each other, and -1, no operation, comes last.
    ``pixels`` are float32 [N, 3, H * W], ``levels`` float32 [N, 2, 1, 1].
    """

    def __init__(self, views: torch.Tensor, factors: torch.Tensor, order: torch.Tensor) -> None:
        views, self.order = views.flatten(2), order.numpy()
        # Room for the highest and the lowest channel, which the hue needs beside the others.
        self.planes = torch.empty(len(views), 5, views.shape[2], device=views.device)
        self.pixels, self.ends = self.planes[:, :3], self.planes[:, 3:].split(1, 1)
        parts = coefficients(factors, order == BRIGHTNESS)
        widths = [part.flatten(1).shape[1] for part in parts]
        packed = to_device(torch.cat([part.flatten(1) for part in parts], 1).float(), views.device)
        white, stretch, saturations, rests, hues = packed.split(widths, 1)
        self.levels = F.pad(white, (1, 0))[..., None, None]
        self.black, self.white = self.levels.split(1, 1)
        self.stretch = [factor[:, None, None] for factor in stretch.split(1, 1)]
        self.saturations, self.hues = saturations.view(-1, 3, 3), hues.view(-1, 3, 5)
        self.rests, self.luma = rests[..., None], to_device(torch.tensor(LUMA), views.device)
        for brighter, part in runs(self.order[:, 0] == BRIGHTNESS):
            if brighter:
                torch.minimum(views[part], self.white[part, 0], out=self.pixels[part])
            else:
                self.pixels[part] = views[part]

    def apply(self) -> None:
        """All operations, in each view's order."""
        operations = {CONTRAST: self.contrast, SATURATION: self.saturation, HUE: self.hue}
        for slot in range(4):
            # 2 * operation, plus 1 where a brightness follows.
            steps = 2 * self.order[:, slot]
            if slot < 3:
                steps = steps + (self.order[:, slot + 1] == BRIGHTNESS)
            for step, part in runs(steps):
                if step // 2 in operations:
                    operations[step // 2](part, bool(step % 2))

    def contrast(self, part: slice, brighter: bool) -> None:
        """Stretch the levels about the mean luma."""
        pixels = self.pixels[part]
        mean = torch.addmv(self.black[part].flatten(), pixels.mean(2), self.luma, beta=LUMA_REST)
        self.stretch_levels(mean[:, None, None, None], part, CONTRAST)
        self.clamp(pixels, part, brighter)

    def saturation(self, part: slice, brighter: bool) -> None:
        """Mix each pixel with its luma."""
        rest = self.rests[part] * self.black[part, 0]
        self.clamp(torch.baddbmm(rest, self.saturations[part], self.pixels[part]), part, brighter)

    def hue(self, part: slice, brighter: bool) -> None:
        """Turn the hue."""
        pixels, highest, lowest = self.pixels[part], *(end[part] for end in self.ends)
        torch.amax(pixels, 1, keepdim=True, out=highest)  # aminmax is 100 times slower on a CPU
        torch.amin(pixels, 1, keepdim=True, out=lowest)
        turned = torch.bmm(self.hues[part], self.planes[part])
        if brighter:
            self.stretch_levels(self.black[part], part, BRIGHTNESS)
            torch.minimum(highest, self.white[part, 0], out=highest)
        torch.clamp(turned, lowest, highest, out=pixels)

    def gray(self, part: slice) -> torch.Tensor:
        """The luma of the pixels, [n, 1, H * W]."""
        pixels = self.pixels[part]
        return torch.baddbmm(LUMA_REST * self.black[part, 0], self.luma.expand(len(pixels), 1, 3), pixels)

    def stretch_levels(self, center: torch.Tensor, part: slice, operation: int) -> None:
        """Brightness or contrast: move the levels away from ``center`` [n, 1, 1, 1], or towards it."""
        self.levels[part] = torch.lerp(center, self.levels[part], self.stretch[operation][part])

    def clamp(self, source: torch.Tensor, part: slice, brighter: bool) -> None:
        """Clamp ``source`` into the pixels; if a brightness follows, for it as well."""
        black, white = self.black[part, 0], self.white[part, 0]
        if brighter:
            before = white.clone()
            self.stretch_levels(self.black[part], part, BRIGHTNESS)
            white = torch.minimum(before, white)
        torch.clamp(source, black, white, out=self.pixels[part])


def coefficients(factors: torch.Tensor, brightness_slots: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What the operations need of ``factors`` [N, 4] on the CPU, float64, for each view.

    White at first [N, 1]; by how much brightness and contrast stretch the levels [N, 2]; the matrix of the
    saturation [N, 3, 3] and the part of black that it adds [N, 1]; the matrix of the hue [N, 3, 5].
    """
    factors = factors.double()
    stretch = 1 / factors[:, :2].clamp(min=1e-6)
    saturation = factors[:, SATURATION, None, None]
    matrix = saturation * torch.eye(3).double() + (1 - saturation) * torch.tensor(LUMA).double()
    white = 255 * torch.where(brightness_slots[:, :1], stretch[:, :1], 1)
    return white, stretch, matrix, LUMA_REST * (1 - saturation[..., 0]), hue_matrices(factors[:, HUE])


def hue_matrices(turns: torch.Tensor) -> torch.Tensor:
    """[N] parts of the circle -> [N, 3, 5]: (r, g, b, highest, lowest) -> turned (r, g, b), not clamped."""
    sixths = 6 * turns[:, None, None]
    step = (sixths - sixths.round()).abs()
    same = torch.eye(3).double()
    following, preceding = same.roll(1, 1), same.roll(-1, 1)
    ahead = sixths >= sixths.round()
    matrix = same - torch.where(
        ahead, following + (1 - 2 * step) * preceding, preceding + (1 - 2 * step) * following
    )
    whole = SIXTH_TURNS[sixths.flatten().round().long() % 6]
    return torch.cat([matrix, (1 - step).expand(-1, 3, 2)], 2) @ whole


def sixth_turns() -> torch.Tensor:
    """(r, g, b, highest, lowest) turned by 0 to 5 sixths of the circle, as matrices [6, 5, 5].

    A sixth complements the channels, which is half a circle, and turns them back by a third.
    """
    sixth = torch.eye(5).double()
    sixth[:3] = torch.cat([-torch.eye(3).roll(1, 1), torch.ones(3, 2)], 1)
    return torch.stack([sixth.matrix_power(n) for n in range(6)])


SIXTH_TURNS = sixth_turns()


def runs(values: np.ndarray) -> Iterator[tuple[int, slice]]:
    """Equal values that follow each other: (value, where)."""
    starts = [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist(), len(values)]
    for start, stop in pairwise(starts):
        yield int(values[start]), slice(start, stop)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy for which no GPU is waited."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
