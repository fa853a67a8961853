import numpy as np
import torch
from PIL import Image

from rsa_detectron2.pretrain.data.datasets import open_images
from rsa_detectron2.pretrain.evaluate import pictures


def write_images(root, colors):
    for name, color in colors.items():
        (root / name).mkdir(parents=True)
        for n in range(3):
            Image.fromarray(np.full((8, 8, 3), color, np.uint8)).save(root / name / f"{n}.png")
    return open_images(root)


def test_nearest_is_by_cosine_and_leaves_the_query_out():
    features = torch.tensor([[1.0, 0.0], [10.0, 1.0], [0.0, 1.0], [0.9, -0.5], [-1.0, 0.0]])
    assert pictures.nearest(features, 0) == [1, 3, 2, 4]  # the long vector is the closest in direction


def test_neighbors_stand_beside_their_image_with_the_frame_of_their_class(tmp_path):
    images = write_images(tmp_path / "images", {"dark": (40, 0, 0), "light": (200, 200, 255)})
    by_class = torch.eye(2)[torch.as_tensor(np.asarray(images.labels))] + 0.01 * torch.rand(6, 2)
    mixed = torch.tensor([[1.0, 0], [0, 1], [0, 1], [1, 0.1], [1, 0.2], [0, 1]])

    path = pictures.draw_neighbors(images, {"a": by_class, "b": mixed}, [0], tmp_path / "n.png")
    drawn = np.asarray(Image.open(path).convert("RGB")).astype(int)

    def count(color):
        wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
        return int((abs(drawn - wanted).max(2) < 12).sum())

    # Of five neighbors two are of the class of image 0 in either ranking: four green frames, six red ones.
    assert count(pictures.OTHER) > 1.3 * count(pictures.SAME) > 0
    images.labels = np.full(6, -1)
    pictures.draw_neighbors(images, {"a": by_class}, [0], path)
    drawn = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert count(pictures.SAME) == count(pictures.OTHER) == 0
