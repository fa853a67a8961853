import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from rsa_detectron2.pretrain.data.datasets import open_images
from rsa_detectron2.pretrain.evaluate import feature_pictures as pictures


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

    def count(color):
        drawn = np.asarray(Image.open(path).convert("RGB")).astype(int)
        wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
        return int((abs(drawn - wanted).max(2) < 12).sum())

    path = pictures.draw_neighbors(images, {"a": by_class, "b": mixed}, [0], tmp_path / "n.png")
    # Of five neighbors two are of the class of image 0 in either ranking: four green frames, six red ones.
    assert count(pictures.OTHER) > 1.3 * count(pictures.SAME) > 0
    before = count(pictures.OTHER), count(pictures.SAME)
    (tmp_path / "images" / "dark" / "2.png").write_bytes(b"")  # an image of the other class stands in for it
    pictures.draw_neighbors(images, {"a": by_class, "b": mixed}, [0], path)
    assert count(pictures.OTHER) == pytest.approx(before[0] * 8 / 6, rel=0.05)
    assert count(pictures.SAME) == pytest.approx(before[1] * 2 / 4, rel=0.05)
    images.labels = np.full(6, -1)
    pictures.draw_neighbors(images, {"a": by_class}, [0], path)
    assert count(pictures.SAME) == count(pictures.OTHER) == 0


def clusters(count, dim=64):
    """``count`` tight clusters of 30 features each, and the class of each feature."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30 * count) % count
    centers = torch.randn(count, dim, generator=generator)
    return centers[labels] + 0.1 * torch.randn(len(labels), dim, generator=generator), labels


@pytest.mark.parametrize("count, dim", [(4, 64), (2, 8), (1, 100)])
def test_principal_components_are_scikit_learns(count, dim):
    decomposition = pytest.importorskip("sklearn.decomposition", reason="scikit-learn is not installed")
    features, _ = clusters(count, dim)
    found, shares = pictures.principal_components(features)
    reference = decomposition.PCA(2, svd_solver="full")
    expected = reference.fit_transform(features.double().numpy())
    signs = np.sign((found * expected).sum(0))
    np.testing.assert_allclose(found * signs, expected, atol=1e-5)
    np.testing.assert_allclose(shares, reference.explained_variance_ratio_, atol=1e-6)
    axes = np.linalg.lstsq(features - features.mean(0), found, rcond=None)[0]
    assert (np.take_along_axis(axes, abs(axes).argmax(0)[None], 0) > 0).all()  # never drawn mirrored


def test_principal_components_of_equal_features():
    found, shares = pictures.principal_components(torch.full((5, 8), 3.0))
    assert not found.any() and shares == [0, 0]


TAB10 = [matplotlib.colormaps["tab10"](i)[:3] for i in range(7)]  # the next one is the gray of text


def colors_in(path, colors):
    """How many of the colors the picture has, as its translucent points show them on white."""
    drawn = np.asarray(Image.open(path).convert("RGB")).astype(int).reshape(-1, 3)
    wanted = 255 * (0.7 * np.array(colors) + 0.3)
    return sum(int((abs(drawn - color).max(1) < 3).sum()) > 300 for color in wanted)


@pytest.mark.filterwarnings("error")
def test_a_map_has_the_colors_of_its_classes(tmp_path):
    features, labels = clusters(4)
    names = ["$a", "b$", "_c", "车"]  # where no font has the last, that is told, not warned of
    path = pictures.draw_map(features, labels, names, tmp_path / "map.png")
    assert colors_in(path, TAB10) == 4
    assert path.read_bytes() == pictures.draw_map(features, labels, names, tmp_path / "b.png").read_bytes()
    pictures.draw_map(features, torch.where(labels < 2, labels, -1), names, path)
    assert colors_in(path, TAB10) == 2 and colors_in(path, [[float(pictures.PALE)] * 3]) == 1
    pictures.draw_map(features, None, [], path)
    assert colors_in(path, TAB10) == 0


def test_a_map_of_many_classes_and_of_many_images(tmp_path, monkeypatch):
    features, labels = clusters(30)
    monkeypatch.setattr(pictures, "MAPPED", 127)
    legends = []
    monkeypatch.setattr(pictures.Figure, "legend", lambda *_, **__: legends.append(1))
    measured = pictures.principal_components
    given = []
    monkeypatch.setattr(pictures, "principal_components", lambda f: (given.append(f), measured(f))[1])
    pictures.draw_map(features, labels, list(map(str, range(30))), tmp_path / "map.png")
    pictures.draw_map(*clusters(12), list(map(str, range(12))), tmp_path / "map.png")
    assert [len(features) for features in given] == [127, 127] and legends == [1]
    assert all(torch.allclose(features.norm(dim=1), torch.ones(127)) for features in given)
