"""Decoding one image: every decoder against Pillow, bands and bits of TIFF and PNG, damaged files."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from rsa_detectron2.common.errors import InputError
from rsa_detectron2.pretrain.config import check, get_cfg
from rsa_detectron2.pretrain.data import images
from rsa_detectron2.pretrain.data.datasets import ImageFolder, open_images
from rsa_detectron2.pretrain.data.images import UnreadableImage, decode
from rsa_detectron2.pretrain.data.pixels import check_pixels
from rsa_detectron2.pretrain.engine import trainer as train_loop
from rsa_detectron2.pretrain.evaluate.knn import find_labeled
from tests.conftest import ROOT, tiny_cfg

RNG = np.random.default_rng(0)
GRADIENT = np.linspace(0, 255, 30 * 40).astype(np.uint8).reshape(30, 40)
COLORS = Image.fromarray(np.stack([GRADIENT, GRADIENT[::-1], GRADIENT // 2], 2))


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def by_pillow(data):
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def photograph(height, width):
    small = Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    noise = RNG.integers(-20, 21, (height, width, 3))
    pixels = np.asarray(small.resize((width, height), Image.BICUBIC)).astype(int) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def tiff(pixels, photometric, extra=(), bits=None):
    """An uncompressed little-endian TIFF of uint8, uint16 or float32 pixels [H, W, bands], tag by tag."""
    height, width, bands = pixels.shape
    data = pixels.tobytes()
    bits = bits or 8 * pixels.itemsize
    tags = [
        (256, 3, [width]),
        (257, 3, [height]),
        (258, 3, [bits] * bands),
        (259, 3, [1]),
        (262, 3, [photometric]),
        (273, 4, [8]),
        (277, 3, [bands]),
        (278, 3, [height]),
        (279, 4, [len(data)]),
    ]
    tags += [(338, 3, list(extra))] if extra else []
    tags += [(339, 3, [3] * bands)] if pixels.dtype == np.float32 else []
    data += bytes(len(data) % 2)
    position, rest, entries = 8 + len(data) + 2 + 12 * len(tags) + 4, b"", b""
    for tag, kind, values in tags:
        value = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if len(value) > 4:
            value, rest = struct.pack("<I", position + len(rest)), rest + value
        entries += struct.pack("<HHI4s", tag, kind, len(values), value.ljust(4, b"\0"))
    return (
        b"II*\0"
        + struct.pack("<I", 8 + len(data))
        + data
        + struct.pack("<H", len(tags))
        + entries
        + struct.pack("<I", 0)
        + rest
    )


def png_rgb16(pixels):
    """A PNG of uint16 RGB [H, W, 3], which Pillow cannot write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


# ---- the decoders, against Pillow ----


@pytest.fixture(params=["torchcodec", "torchvision", "Pillow"])
def decoder(request, monkeypatch):
    """Each installed decoder in turn."""
    loaders = {
        "torchcodec": images.by_torchcodec,
        "torchvision": images.by_torchvision,
        "Pillow": lambda: None,
    }
    try:
        monkeypatch.setattr(images, "native", loaders[request.param]())
    except (ImportError, OSError, RuntimeError, AttributeError):
        pytest.skip(f"{request.param} is not installed")
    return request.param


@pytest.mark.parametrize(
    "mode, kind, options",
    [
        ("RGB", "JPEG", {}),
        ("RGB", "JPEG", {"subsampling": 0}),
        ("RGB", "JPEG", {"progressive": True}),
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "PNG", {}),
        ("L", "PNG", {}),
        ("1", "PNG", {}),
        ("P", "PNG", {}),
        ("P", "PNG", {"transparency": 3}),
        ("LA", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("RGB", "WEBP", {}),
        ("RGBA", "WEBP", {"lossless": True}),
        ("RGB", "GIF", {}),
        ("RGB", "BMP", {}),
        ("RGB", "TIFF", {}),
        ("LA", "TIFF", {}),
        ("RGBA", "TIFF", {}),
        ("CMYK", "TIFF", {}),
        ("P", "TIFF", {}),
        ("1", "TIFF", {}),
    ],
)
def test_every_decoder_gives_the_pixels_of_pillow(decoder, mode, kind, options):
    image = photograph(60, 70).convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(RNG.integers(0, 256, (60, 70), dtype=np.uint8)))
    data = encoded(image, kind, **options)
    result = decode(data, "x")
    assert result.dtype == torch.uint8 and torch.equal(result, by_pillow(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_upright(decoder, kind):
    """All eight orientations of EXIF, and invalid values, in both byte orders."""
    for endian in "<>":
        for orientation in range(10):
            exif = Image.Exif()
            exif.endian, exif[0x0112] = endian, orientation
            data = encoded(COLORS, kind, exif=exif if kind == "TIFF" else exif.tobytes())
            result = decode(data, "x")
            assert result.shape == ((3, 40, 30) if 5 <= orientation <= 8 else (3, 30, 40))
            assert torch.equal(result, by_pillow(data))


def test_a_rotation_in_xmp_alone_does_not_count(decoder):
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    assert torch.equal(decode(encoded(COLORS, "JPEG", xmp=xmp), "x"), decode(encoded(COLORS, "JPEG"), "x"))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animation_is_its_first_image(decoder, kind):
    first, second = (Image.fromarray(np.full((6, 9, 3), value, np.uint8)) for value in (10, 200))
    data = encoded(
        first, kind, save_all=True, append_images=[second], **({"lossless": True} if kind == "WEBP" else {})
    )
    assert decode(data, "x").unique().tolist() == [10]


def test_damaged_exif_is_no_reason_to_leave_an_image_out(decoder):
    data = encoded(COLORS, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff broken")
    assert torch.equal(decode(data, "x"), decode(encoded(COLORS, "JPEG"), "x"))


def test_the_best_decoder_that_is_installed_is_taken(monkeypatch):
    assert images.choose_native()[0] == images.native_name != "Pillow"
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    assert images.choose_native()[0] == "torchvision"
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    assert images.choose_native() == ("Pillow", None)


# ---- more than 8 bits ----


def test_16_bits_are_scaled_by_every_decoder(decoder):
    gray = np.linspace(0, 65535, 30 * 40).astype(np.uint16).reshape(30, 40)
    data = encoded(Image.fromarray(gray), "PNG")
    assert all(np.array_equal(channel, gray // 257) for channel in decode(data, "x"))
    scaled = decode(data, "x", (1000, 5000))[1].numpy()
    assert np.abs(scaled - np.clip((gray - 1000.0) * 255 / 4000, 0, 255)).max() <= 1


def test_12_bits_in_16_are_256_gray_levels_by_the_range_that_is_given(decoder):
    gray = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    color = np.stack([gray, gray[::-1], gray.T], 2)
    for data in (
        encoded(Image.fromarray(gray), "PNG"),
        encoded(Image.fromarray(gray), "TIFF"),
        tiff(gray[..., None], 1),
    ):
        assert np.array_equal(decode(data, "x", (0, 4095))[0], gray.astype(int) * 255 // 4095)
    if decoder == "Pillow":
        with pytest.raises(UnreadableImage, match="x.png has 16 bits .* only the upper 8"):
            decode(png_rgb16(color), "x.png", (0, 4095))
    else:
        assert np.array_equal(
            decode(png_rgb16(color), "x", (0, 4095)).permute(1, 2, 0), color.astype(int) * 255 // 4095
        )


def test_bits_that_the_format_states():
    """12 bits packed in a TIFF, and the largest value that a PGM states."""
    gray = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    pairs = gray.reshape(-1, 2).astype(int)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
    data = bytearray(tiff(packed.astype(np.uint8).reshape(64, 96, 1), 1, bits=12))
    data[data.find(struct.pack("<HHIH", 256, 3, 1, 96)) + 8] = 64  # pixels in a row, of 96 bytes
    expected = gray.astype(int) * 255 // 4095
    assert np.array_equal(decode(bytes(data), "x")[0], expected)
    assert np.array_equal(decode(b"P5 64 64 4095\n" + gray.astype(">u2").tobytes(), "x")[0], expected)


def test_a_range_is_for_channels_of_more_than_8_bits():
    assert torch.equal(decode(encoded(COLORS, "PNG"), "x", (0, 4095)), by_pillow(encoded(COLORS, "PNG")))
    values = np.linspace(-1, 2, 12, dtype=np.float32).reshape(3, 4, 1)
    scaled = decode(tiff(values, 1), "x", (0.0, 1.0))[0].numpy()
    assert np.abs(scaled - np.clip(values[..., 0] * 255, 0, 255)).max() <= 1


@pytest.mark.parametrize("value", [(1,), (1, 2, 3), (5, 5), (9, 2)])
def test_ranges_that_are_none(value):
    cfg = get_cfg()
    cfg.DATA.RANGE = value
    with pytest.raises(InputError, match="DATA.RANGE"):
        check(cfg)


# ---- bands ----

BANDS = RNG.integers(0, 256, (6, 7, 13), dtype=np.uint8)


@pytest.mark.parametrize(
    "bands, photometric, extra",
    [
        (4, 2, (0,)),
        (4, 2, ()),
        (5, 2, (0, 0)),
        (5, 2, (2, 0)),
        (4, 1, (0, 0, 0)),
        (13, 1, (0,) * 12),
        (13, 1, ()),
        (2, 1, (0,)),
        (5, 5, (0,)),
        (3, 1, ()),
    ],
)
@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_bands_do_not_get_lost(bands, photometric, extra, depth):
    data = tiff(BANDS[..., :bands].astype(depth), photometric, extra)
    with pytest.raises(UnreadableImage, match=rf"^x.tif has {bands} bands.*gdal_translate"):
        decode(data, "x.tif")


@pytest.mark.parametrize(
    "bands, photometric, extra", [(3, 2, ()), (4, 2, (2,)), (4, 2, (1,)), (1, 1, ()), (2, 1, (2,))]
)
def test_bands_that_are_known(bands, photometric, extra):
    color = BANDS[..., : 3 if photometric == 2 else 1]
    result = decode(tiff(BANDS[..., :bands].copy(), photometric, extra), "x").permute(1, 2, 0)
    if extra != (1,):  # otherwise the colors were multiplied by alpha
        assert np.array_equal(result, np.broadcast_to(color, (6, 7, 3)))


def test_a_tiff_that_pillow_does_not_read():
    with pytest.raises(
        UnreadableImage, match=r"^x.tif is a TIFF of 3 x 32 bits, .*gdal_translate -ot UInt16"
    ):
        decode(tiff(BANDS[..., :3].astype(np.float32), 2), "x.tif")


def test_large_images():
    """A TIFF of 202 megapixels, above Pillow's own limit, is decoded; one above our limit is refused in
    words."""
    image = Image.new("1", (15000, 13500))
    image.putpixel((7, 5), 1)
    result = decode(encoded(image, "TIFF", compression="group4"), "x")
    assert (
        result.shape == (3, 13500, 15000)
        and result[:, 5, 7].tolist() == [255] * 3
        and result[:, :99].sum() == 765
    )
    with pytest.raises(UnreadableImage, match="x has 40000 x 40000 pixels, over the limit of 500 megapixels"):
        decode(b"P6 40000 40000 255\n", "x")


# ---- damaged files ----


def test_where_a_jpeg_ends():
    whole = encoded(photograph(200, 300), "JPEG")
    thumbnail = encoded(COLORS, "JPEG")
    with_thumbnail = (
        whole[:2] + b"\xff\xe1" + struct.pack(">H", 8 + len(thumbnail)) + b"Exif\0\0" + thumbnail + whole[2:]
    )
    for data in (whole, with_thumbnail, whole + b"what a camera adds" * 9):
        assert images.has_end(data)
        assert torch.equal(decode(data, "x"), by_pillow(whole))
    for data in (
        whole[:-2],
        whole[:-1],
        whole[: len(whole) // 2],
        with_thumbnail[: -len(whole) // 2],
        whole[:300],
        b"\xff\xd8\xff",
    ):
        assert not images.has_end(data)
        with pytest.raises(UnreadableImage, match="^x.jpg cannot be decoded"):
            decode(data, "x.jpg")


def test_truncated_images_leave_no_memory_behind(tmp_path):
    """Reading each 50 times takes less than 150 MB. torchvision 0.25 kept every image, of 12 MB each."""
    image = photograph(2000, 2000)
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encoded(image, kind, **({"compress_level": 1} if kind == "PNG" else {}))
        (tmp_path / kind).write_bytes(data[: len(data) // 2])
    program = """
import sys
from rsa_detectron2.pretrain.data.images import UnreadableImage, read_image

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2 ** 20

def read(path, times):
    for _ in range(times):
        try:
            read_image(path)
            sys.exit(f"{path} was decoded")
        except UnreadableImage:
            pass

for path in sys.argv[1:]:
    read(path, 5)
    before = resident()
    read(path, 50)
    print(resident() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *(str(tmp_path / kind) for kind in ("JPEG", "PNG", "WEBP"))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 3 and max(map(float, done.stdout.split())) < 150


def test_out_of_memory_is_not_a_damaged_image(monkeypatch):
    def fails(*_):
        raise MemoryError

    monkeypatch.setattr(images, "by_pillow", fails)
    with pytest.raises(MemoryError):
        decode(encoded(COLORS, "BMP"), "x")


# ---- what is checked before training ----


def folder_of(path, **files):
    for name, data in files.items():
        (path / name.replace("_", ".")).write_bytes(data)
    return ImageFolder(path)


def gray(greatest, mode=np.uint16):
    return Image.fromarray(np.linspace(0, greatest, 30 * 40).astype(mode).reshape(30, 40))


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_few_gray_levels_are_refused_until_a_range_is_given(tmp_path, kind):
    kinds = {"png": "PNG", "tif": "TIFF"}
    source = folder_of(
        tmp_path,
        **{
            f"a_{kind}": encoded(gray(900), kinds[kind]),
            f"b_{kind}": encoded(gray(4000), kinds[kind]),
            "c_jpg": encoded(COLORS, "JPEG"),
            "d_jpg": b"damaged",
        },
    )
    with pytest.raises(InputError) as error:
        check_pixels(source)
    assert str(error.value) == (
        f"{tmp_path}/b.{kind} holds values up to 4000 of 65535, and no other image that was looked at has "
        "greater ones: they would become 16 of 256 gray levels. Give the values that become black and white: "
        'DATA.RANGE "(0, 4095)", or DATA.RANGE "(0, 65535)" to keep them dark'
    )
    for value_range in ((0, 4095), (0, 65535)):
        source.value_range = value_range
        assert check_pixels(source) == []
    assert source.read(0).max() == 900 * 255 // 65535
    source.value_range = ()
    (tmp_path / f"e.{kind}").write_bytes(encoded(gray(20000), kinds[kind]))  # one that is bright enough
    assert check_pixels(ImageFolder(tmp_path)) == []


def test_color_of_which_only_the_upper_bits_can_be_read(tmp_path):
    color = np.stack([np.asarray(gray(4000))] * 3, 2)
    with pytest.raises(
        InputError, match=r'a.tif uses 16 of the 256 gray levels.* to PNG .* DATA.RANGE "\(0, 4095\)"'
    ):
        check_pixels(folder_of(tmp_path, a_tif=tiff(color, 2)))
    (tmp_path / "a.tif").unlink()
    source = folder_of(tmp_path, a_png=png_rgb16(color))  # the advice, followed
    with pytest.raises(InputError, match=r'a.png holds values up to 4000 .* DATA.RANGE "\(0, 4095\)"'):
        check_pixels(source)
    source.value_range = (0, 4095)
    assert check_pixels(source) == [] and np.array_equal(
        source.read(0)[0], color[..., 0].astype(int) * 255 // 4095
    )


def test_a_training_looks_before_it_starts(tmp_path):
    """It uses its range for the validation images, too."""
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(4):
                (tmp_path / split / name / f"{i}.png").write_bytes(encoded(gray(4000), "PNG"))
    cfg = tiny_cfg(tmp_path / "train", tmp_path)
    with pytest.raises(InputError, match="DATA.RANGE"):
        train_loop.train(cfg)
    assert not (tmp_path / "run" / "model_final.pth").exists()
    source = open_images(cfg.DATA.PATH)
    source.value_range = (0, 4095)
    assert all(found.read(0).max() == 4000 * 255 // 4095 for found in find_labeled(cfg, source))


def test_what_is_assumed_is_said(tmp_path):
    source = folder_of(
        tmp_path,
        a_tif=tiff(np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4, 1), 1),
        b_tif=encoded(Image.new("RGBA", (8, 8)), "TIFF"),
        c_jpg=encoded(COLORS, "JPEG"),
        d_tif=encoded(COLORS, "TIFF", save_all=True, append_images=[COLORS]),
        e_tif=encoded(COLORS, "TIFF", save_all=True, append_images=[COLORS.resize((20, 15))]),
    )
    notes = [line.removeprefix(f"{tmp_path}/") for line in check_pixels(source, "--range {} {}")]
    assert notes == [
        "a.tif holds signed, float or 32-bit values: each image is stretched from its least to its greatest; "
        "--range LOW HIGH maps all alike",
        "b.tif has 4 bands, 1 of them alpha by its tags, which is left out",
        "d.tif has 2 frames or pages: the first is read",
    ]


def test_bands_are_refused_before_a_training(tmp_path):
    with pytest.raises(InputError, match="a.tif has 5 bands"):
        check_pixels(
            folder_of(tmp_path, a_tif=tiff(BANDS[..., :5].copy(), 2, (0, 0)), b_jpg=encoded(COLORS, "JPEG"))
        )
