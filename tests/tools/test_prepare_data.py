"""tools/prepare_data.py: what it writes, how it goes on after a stop, and what it refuses."""

import sys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.data.datasets import ImageFolder
from rsa_detectron2.pretrain.data.images import read_image
from rsa_detectron2.tools import prepare_data

SIZES = {
    "a/wide.jpg": (90, 120),
    "a/tall.JPEG": (150, 75),
    "b/deep/noalpha.png": (80, 200),
    "b/small.jpg": (40, 60),
    "b/small.png": (30, 90),
    "exact.jpg": (48, 64),
    "gray.jpg": (100, 100),
}


def smooth(height, width, seed):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def source(tmp_path):
    for seed, (name, (height, width)) in enumerate(SIZES.items()):
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = smooth(height, width, seed)
        (image.convert("L") if name == "gray.jpg" else image).save(
            path, **({"quality": 95} if path.suffix != ".png" else {})
        )
    return tmp_path / "source"


@pytest.fixture
def prepare(monkeypatch, capsys, source):
    """``prepare(destination, option, ...)`` returns what the tool printed to stdout and to stderr."""

    def call(destination, *options):
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "prepare_data.py",
                str(source),
                str(destination),
                "--size",
                "48",
                "--workers",
                "0",
                *map(str, options),
            ],
        )
        prepare_data.main()
        return capsys.readouterr()

    return call


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_writes_the_short_side_and_keeps_the_folders(prepare, source, tmp_path):
    out = prepare(tmp_path / "new" / "out").out
    written, originals = files(tmp_path / "new" / "out"), files(source)
    assert set(written) == {
        "b/deep/noalpha.png.jpg" if name == "b/deep/noalpha.png" else name for name in SIZES
    } | {"prepared.json"}
    assert "4 images written, 3 copied, 0 were there" in out
    for name, (height, width) in SIZES.items():
        if min(height, width) <= 48:
            assert written[name] == originals[name]
            continue
        image = read_image(tmp_path / "new" / "out" / (name + ".jpg" if name.endswith("png") else name))
        assert min(image.shape[1:]) == 48 and (height > width) == (image.shape[1] > image.shape[2])
        assert max(image.shape[1:]) == pytest.approx(48 * max(height, width) / min(height, width), abs=1)
        # On a photograph without its finest grain, JPEG and another resampling differ by less than two gray
        # levels on average.
        exact = Image.fromarray(read_image(source / name).permute(1, 2, 0).numpy()).resize(
            (image.shape[2], image.shape[1]), Image.Resampling.LANCZOS
        )
        assert (image.permute(1, 2, 0).float() - torch.from_numpy(np.array(exact)).float()).abs().mean() < 2
    assert len(ImageFolder(tmp_path / "new" / "out")) == len(SIZES)


def test_goes_on_where_it_stopped(prepare, tmp_path):
    out = tmp_path / "out"
    prepare(out)
    whole = files(out)
    (out / "a/wide.jpg").rename(out / "a/wide.jpg.part")  # killed before the renaming
    (out / "a/wide.jpg.part").write_bytes(b"half")
    (out / "b/small.png").write_bytes(b"")  # a power cut
    (out / "exact.jpg").write_bytes(b"another's")  # existing files are not opened
    assert "1 images written, 1 copied, 5 were there" in prepare(out).out
    assert files(out) == whole | {"exact.jpg": b"another's"}


def test_number_of_workers_changes_nothing(prepare, tmp_path):
    prepare(tmp_path / "one")
    prepare(tmp_path / "two", "--workers", 2)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_unreadable_images_are_named_and_left_out(prepare, source, tmp_path):
    (source / "a/text.jpg").write_text("not an image")
    (source / "b/cut.png").write_bytes((source / "b/deep/noalpha.png").read_bytes()[:60])
    printed = prepare(tmp_path / "out")
    lines = [line for line in printed.err.splitlines() if "cannot be decoded" in line]
    assert len(lines) == 2 and "a/text.jpg" in lines[0] and "b/cut.png" in lines[1]
    assert "2 unreadable ones left out" in printed.out
    assert not {"a/text.jpg", "b/cut.png", "b/cut.png.jpg"} & set(files(tmp_path / "out"))


def test_refusals(prepare, source, tmp_path):
    prepare(tmp_path / "out")
    before = files(tmp_path / "out")
    for destination, options, message in (
        (tmp_path / "out", ["--size", 40], "was made with"),
        (tmp_path / "out", ["--quality", 80], "was made with"),
        (source, [], "lies in"),
        (source / "small", [], "lies in"),
        (tmp_path, [], "not empty"),
        (tmp_path / "x", ["--quality", 101], "--quality 101"),
        (tmp_path / "x", ["--size", 0], "--size 0"),
    ):
        with pytest.raises(InputError, match=message):
            prepare(destination, *options)
    assert (
        files(tmp_path / "out") == before
        and not (tmp_path / "x").exists()
        and not (source / "small").exists()
    )


def test_folders_without_images(monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, message in (("absent", "no image folder"), ("empty", "no images below")):
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", str(tmp_path / name), str(tmp_path / "out")])
        with pytest.raises(InputError, match=message):
            prepare_data.main()
    assert not (tmp_path / "out").exists()


def test_deep_pixels_need_a_range(prepare, source, tmp_path):
    """12-bit values in 16-bit files are refused, then mapped by the given range; small files are only
    copied."""
    for path in list(source.rglob("*.*")):
        path.unlink()
    values = np.linspace(0, 4095, 60 * 80).astype(np.uint16).reshape(60, 80)
    for name, pixels in (("large.png", values), ("small.png", values[:40])):
        Image.fromarray(pixels).save(source / name)
    with pytest.raises(
        InputError, match="large.png holds values up to 4095 .*: --range 0 4095, or --range 0 65535"
    ):
        prepare(tmp_path / "out")
    prepare(tmp_path / "out", "--range", "0", "4095")
    written = read_image(tmp_path / "out" / "large.png.jpg")
    assert written.shape == (3, 48, 64) and written.min() < 5 and written.max() > 250
    assert (tmp_path / "out" / "small.png").read_bytes() == (source / "small.png").read_bytes()
    with pytest.raises(InputError, match="was made with"):
        prepare(tmp_path / "out", "--range", "0", "65535")


def test_jpegs_are_those_of_the_decoders_libraries():
    """The bytes equal those of torchvision's and torchcodec's encoders, whatever the order in memory."""
    image = torch.from_numpy(np.array(smooth(60, 90, 0))).permute(2, 0, 1)
    for contents in (image, image.contiguous()):
        ours = prepare_data.encode_jpeg(contents, 92)
        assert ours == torchvision.io.encode_jpeg(image.contiguous(), 92).numpy().tobytes()
    try:
        from torchcodec.encoders import JpegEncoder
    except (ImportError, OSError, RuntimeError):
        return
    assert ours == JpegEncoder(image.contiguous()).to_tensor(quality=92).numpy().tobytes()
