import io
import os
import struct

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from gmarpp.data import decode, read_image, read_mask


def pixels(image, **options):
    """The decoded picture, after a round trip through the format, as nested lists (3, H, W)."""
    file = io.BytesIO()
    image.save(file, **options)
    file.seek(0)
    decoded = read_image(file, "picture")
    assert decoded.dtype.itemsize == 1
    return decoded.tolist()


def gray(value, size=(1, 1)):
    return Image.new("L", size, value)


def test_gray_and_one_bit_have_three_equal_channels():
    assert pixels(gray(77), format="PNG") == [[[77]]] * 3
    assert pixels(Image.new("1", (1, 1), 1), format="PNG") == [[[255]]] * 3


def test_half_transparent_red_is_pink():
    # 128/255 of red over white: 255 · (1 - 128/255) = 127 in green and blue
    assert pixels(Image.new("RGBA", (1, 1), (255, 0, 0, 128)), format="PNG") == [[[255]], [[127]], [[127]]]


def test_transparent_gray_and_palette_are_white():
    assert pixels(Image.new("LA", (1, 1), (10, 0)), format="PNG") == [[[255]]] * 3
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert pixels(palette, format="PNG") == [[[10, 40]], [[20, 50]], [[30, 60]]]
    assert pixels(palette, format="PNG", transparency=0) == [[[255, 40]], [[255, 50]], [[255, 60]]]


def test_sixteen_bits_keep_their_range():
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    for file_format in ("PNG", "TIFF"):
        assert pixels(Image.fromarray(values), format=file_format)[0] == [[0, 1, 128, 255]]
    wide = Image.fromarray(values.astype(np.int32))
    assert pixels(wide, format="TIFF")[0] == [[0, 1, 128, 255]]


def test_floating_point_is_taken_in_its_range():
    assert pixels(Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)), format="TIFF")[0] == [[0, 128, 255]]
    assert pixels(Image.fromarray(np.array([[0.0, 100.0]], np.float32)), format="TIFF")[0] == [[0, 100]]


@pytest.mark.parametrize("values", [np.array([[-1.0]], np.float32), np.array([[70000]], np.int32)])
def test_values_without_a_range_are_refused(values):
    with pytest.raises(ValueError, match=r"picture cannot be read .*no defined brightness"):
        pixels(Image.fromarray(values), format="TIFF")


def test_cmyk():
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red, green, blue = (np.array(channel) for channel in pixels(ink, format="JPEG", quality=100))
    assert red.min() > 245
    assert max(green.max(), blue.max()) < 10


def test_exif_orientation_is_applied():
    image = Image.fromarray(np.array([[[9, 9, 9], [200, 200, 200]]], np.uint8))  # dark left, bright right
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by 90 degrees to view
    assert pixels(image, format="PNG", exif=exif)[0] == [[9], [200]]


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"image .*absent\.png does not exist"):
        read_image(tmp_path / "absent.png")
    gray(3, (64, 64)).save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-200])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    for name in ("half.jpg", "text.png", "empty.png"):
        with pytest.raises(ValueError, match=rf"image .*{name} cannot be read .*: replace or remove it"):
            read_image(tmp_path / name)


def test_mask_is_everything_but_black(tmp_path):
    values = np.array([[0, 1], [255, 0]], np.uint8)
    Image.fromarray(values).save(tmp_path / "gray.png")
    Image.fromarray(np.stack([values, 0 * values, 0 * values], axis=2)).save(tmp_path / "color.png")
    palette = Image.fromarray(values, mode="P")
    palette.putpalette([0, 0, 0] * 256)
    palette.save(tmp_path / "palette.png")
    Image.fromarray(values > 0).save(tmp_path / "bits.png")
    for name in ("gray.png", "color.png", "palette.png", "bits.png"):
        assert read_mask(tmp_path / name).tolist() == [[False, True], [True, False]], name


def test_compressed_mask_has_no_noise(tmp_path):
    values = np.zeros((32, 32), np.uint8)
    values[5:20, 7:23] = 255
    Image.fromarray(values).save(tmp_path / "mask.jpg", quality=60)
    assert np.asarray(Image.open(tmp_path / "mask.jpg"))[values == 0].max() > 0
    assert (read_mask(tmp_path / "mask.jpg").numpy() == (values > 0)).all()


def tiff(values, **tags):
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags.items():
        info[int(tag[1:])] = value
    file = io.BytesIO()
    Image.fromarray(np.array([values], dtype=np.uint16)).save(file, format="TIFF", tiffinfo=info)
    file.seek(0)
    return read_image(file, "picture")[0].tolist()


def test_twelve_bits_in_sixteen_have_the_range_that_the_file_states(caplog):
    decode._warn_of_twelve_bits.cache_clear()
    assert tiff([0, 2048, 4095], _281=4095) == [[0, 128, 255]]
    assert not caplog.text
    assert tiff([0, 2048, 4095]) == [[0, 8, 16]]
    assert "a 16-bit image holds no value above 4095" in caplog.text


def test_pictures_beyond_the_limit_are_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    with pytest.raises(ValueError, match=r"picture cannot be read \(expected at most 99 pixels .*, got 10 x 10"):
        pixels(gray(0, (10, 10)), format="PNG")


def test_a_stated_range_bounds_the_values():
    assert tiff([0, 300], _281=300) == [[0, 255]]
    with pytest.raises(ValueError, match=r"integers outside 0 to 4095 have no defined brightness"):
        tiff([0, 5000], _281=4095)


def twelve_bit_tiff(first, second):
    """A TIFF of two samples packed in 12 bits each, which Pillow reads but does not write."""
    tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 3}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    strip = ((first << 12) | second).to_bytes(3, "big")
    return io.BytesIO(b"II*\0" + struct.pack("<I", 12) + strip + b"\0" + struct.pack("<H", 9) + entries + bytes(4))


def test_packed_twelve_bits_have_their_own_range():
    assert read_image(twelve_bit_tiff(0, 4095), "picture")[0].tolist() == [[0, 255]]
    assert read_image(twelve_bit_tiff(4095, 1000), "picture")[0].tolist() == [[255, 62]]  # 62.27


def test_zero_may_be_white():
    """In 16 bits Pillow does not invert; in 8 it does."""
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[262] = 0
    for dtype, largest in ((np.uint8, 255), (np.uint16, 65535)):
        file = io.BytesIO()
        Image.fromarray(np.array([[0, largest]], dtype)).save(file, format="TIFF")
        content = file.getvalue()
        # the tag's entry: 262, type short, one value, 1 (zero is black)
        entry = struct.pack("<HHIHH", 262, 3, 1, 1, 0)
        assert content.count(entry) == 1
        content = content.replace(entry, struct.pack("<HHIHH", 262, 3, 1, 0, 0))
        assert read_image(io.BytesIO(content), "picture")[0].tolist() == [[255, 0]]


def test_strips_and_programs_are_refused():
    with pytest.raises(
        ValueError, match=r"picture cannot be read \(expected an aspect ratio of at most 100, got 1 x 101"
    ):
        pixels(gray(0, (1, 101)), format="PNG")
    assert len(pixels(gray(0, (1, 100)), format="PNG")[0]) == 100
    with pytest.raises(ValueError, match=r"picture cannot be read \(Encapsulated PostScript is a program"):
        pixels(Image.new("RGB", (4, 4)), format="EPS")


@pytest.mark.parametrize("read", [read_image, read_mask])
def test_pipes_and_devices_are_not_opened(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name, kind in (("pipe.png", "named pipe"), ("zero.png", "device"), (".", "folder")):
        with pytest.raises(ValueError, match=rf"cannot be read \(.* is a {kind}, expected a file"):
            read(tmp_path / name)
