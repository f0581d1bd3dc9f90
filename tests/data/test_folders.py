"""A folder of class folders, as people have them: what is read, and what is left out and said."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mosaic_jax.data import load
from mosaic_jax.data.formats import folders
from mosaic_jax.types import UserError

pytestmark = pytest.mark.usefixtures("nowhere")
COLOURS = {"cat": (200, 30, 30), "dog": (30, 200, 30)}


def picture(colour=(9, 9, 9), size=(8, 8)) -> Image.Image:
    return Image.new("RGB", size, colour)


def put(path: Path, image: Image.Image | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture()).save(path, **options)
    return path


@pytest.fixture
def mine(tmp_path):
    """Three training and one test picture of two classes."""
    for name, colour in COLOURS.items():
        for index in range(3):
            put(tmp_path / "mine/train" / name / f"{index}.png", picture(colour))
        put(tmp_path / "mine/test" / name / "0.png", picture(tuple(c + 1 for c in colour)))
    return tmp_path / "mine"


def read(folder):
    return load("own", directory=folder, image_size=8)


def assert_plain(data):
    """The two classes of `mine`, and nothing else."""
    assert data.class_names == ("cat", "dog")
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test_labels.tolist() == [0, 1]
    found = data.train_images[:, 4, 4].tolist()
    assert found == [list(COLOURS[name]) for name in ("cat",) * 3 + ("dog",) * 3]


def test_class_folders_are_the_classes(mine, caplog):
    assert_plain(read(mine))
    assert caplog.text == ""


@pytest.mark.parametrize(
    "name",
    [
        "train/.ipynb_checkpoints/x.png",
        "train/__MACOSX/x.png",
        "train/@eaDir/x.png",
        "train/.thumbnails/x.png",
        "train/cat/._x.png",
        "train/cat/.DS_Store.png",
        "train/cat/Thumbs.db",
        "test/.x.png",
        ".hidden/train/zebra/x.png",
    ],
)
def test_what_systems_add_is_left_out_and_said(mine, caplog, name):
    put(mine / name, format="PNG")
    assert_plain(read(mine))
    assert "left out of" in caplog.text
    assert "1 hidden or a system's" in caplog.text


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("old/train/zebra/x.png", "1 beside train and test"),
        ("v1/x.png", "1 beside train and test"),
        ("notes.txt", "1 beside train and test"),
        ("train/x.png", "1 in no class folder"),
        ("train/cat/about.txt", "1 no picture that Pillow can read"),
        ("train/cat/labels.json", "1 no picture that Pillow can read"),
        ("train/cat/scan.pdf", "1 no picture that Pillow can read"),
        ("train/cat/features.h5", "1 no picture that Pillow can read"),
        ("train/cat/README", "1 no picture that Pillow can read"),
    ],
)
def test_what_is_no_picture_of_a_class_is_left_out_and_said(mine, caplog, name, said):
    (mine / name).parent.mkdir(parents=True, exist_ok=True)
    (mine / name).write_text("P1 results of the experiment")  # begins like a PBM picture
    assert_plain(read(mine))
    assert said in caplog.text


@pytest.mark.parametrize(
    ("top", "message"),
    [
        ("Train", r"has no folder 'train'; it has Train, test\. data.directory names the folder"),
        ("v1/train", r"has no folder 'train'; it has test, v1\."),
    ],
)
def test_pictures_below_another_folder_are_not_taken(mine, top, message):
    (mine / "moved").mkdir()
    (mine / "train").rename(mine / "moved/train")
    (mine / top).parent.mkdir(exist_ok=True)
    (mine / "moved/train").rename(mine / top)
    (mine / "moved").rmdir()
    with pytest.raises(UserError, match=message):
        read(mine)


def test_a_subfolder_is_of_its_class_whatever_its_name(mine):
    """`train/cat/test/x.png` trains: `test` counts at the top only."""
    put(mine / "train/cat/test/x.png", picture(COLOURS["cat"]))
    put(mine / "train/cat/sub/deep/1.png", picture(COLOURS["cat"]))
    data = read(mine)
    assert data.train_labels.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert data.test_labels.tolist() == [0, 1]


@pytest.mark.parametrize("name", ["train", "train/cat", "test/cat", "train/cat/1.png"])
def test_links_are_followed(mine, tmp_path, name):
    (mine / name).rename(tmp_path / "elsewhere")
    (mine / name).symlink_to(tmp_path / "elsewhere")
    assert_plain(read(mine))


def test_a_link_that_leads_round_is_one_line(mine):
    (mine / "train/cat/loop").symlink_to(mine / "train")
    with pytest.raises(UserError, match="cat/loop is a link to a folder that it lies in"):
        read(mine)


@pytest.mark.parametrize("name", ["train/fox", "train/cat/x.png", "test"])
def test_a_link_that_points_nowhere_is_one_line(mine, name):
    if (mine / name).exists():
        (mine / name).rename(mine / "gone")
    (mine / name).symlink_to("/nowhere/at/all")
    with pytest.raises(UserError, match=f"{name} is a link that points nowhere"):
        read(mine)


def test_a_folder_that_cannot_be_read_is_one_line(mine, monkeypatch):
    """The tests may run as a user whom no permission stops."""
    whole = Path.iterdir

    def refuse(path):
        if path.name == "dog":
            raise PermissionError(13, "Permission denied")
        return whole(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match="train/dog cannot be read: Permission denied"):
        read(mine)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_without_pictures_is_one_line(mine, split):
    (mine / split / "eel").mkdir()
    (mine / split / "eel/read.me").write_text("x")
    with pytest.raises(UserError, match=f"{split}/eel has no pictures"):
        read(mine)


def test_a_class_that_is_only_tested_is_named(mine):
    put(mine / "test/eel/0.png")
    with pytest.raises(UserError, match=r"test has classes that .*train has not: eel"):
        read(mine)


def test_a_name_that_is_no_text_is_one_line(mine):
    put(mine / os.fsdecode(b"train/caf\xe9") / "x.png")
    with pytest.raises(UserError, match=r"train holds 'caf\\udce9', a name that is no text"):
        read(mine)


def test_a_class_that_is_not_tested_is_said(mine, caplog):
    put(mine / "train/eel/0.png")
    assert read(mine).num_classes == 3
    assert "has no test images of 1 classes: eel" in caplog.text


def test_numbers_in_names_count_by_their_value(tmp_path):
    for label in range(12):
        for split in ("train", "test"):
            put(tmp_path / split / str(label) / "x.png", picture((label, label, label)))
    data = read(tmp_path)
    assert data.class_names == tuple(map(str, range(12)))
    assert (data.train_images[:, 0, 0, 0] == data.train_labels).all()
    names = ["b2", "a10", "a2", "10", "9", "a", "02", "2"]
    assert sorted(names, key=folders.natural) == ["02", "2", "9", "10", "a", "a2", "a10", "b2"]


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def half(top, bottom, mode="RGB") -> Image.Image:
    """Eight by eight pixels, four rows of each."""
    image = Image.new(mode, (8, 8), top)
    image.paste(bottom, (0, 4, 8, 8))
    return image


RED, BLUE, WHITE = [255, 0, 0], [0, 0, 255], [255, 255, 255]
GREYS = Image.fromarray(np.repeat([[257 * 3], [257 * 200]], 4, axis=0).repeat(8, 1).astype("u2"))
CLEAR = half((0, 0, 0, 0), (0, 0, 0, 255), "RGBA")
TURNED = Image.Exif()
TURNED[0x0112] = 6
FIRST = {"save_all": True, "append_images": [picture((9, 9, 9))]}


@pytest.mark.parametrize(
    ("name", "content", "top", "bottom"),
    [
        ("x.png", encoded(GREYS, "PNG"), [3] * 3, [200] * 3),
        ("x.png", encoded(CLEAR, "PNG"), WHITE, [0] * 3),
        ("x.png", encoded(half((0, 0), (90, 255), "LA"), "PNG"), WHITE, [90] * 3),
        ("x.webp", encoded(CLEAR, "WEBP", lossless=True), WHITE, [0] * 3),
        ("x.gif", encoded(half(RED[0], 5, "P"), "GIF", transparency=5), None, WHITE),
        ("x.gif", encoded(half((0,) * 3, (250,) * 3), "GIF", **FIRST), [0] * 3, [250] * 3),
        ("x.tif", encoded(half((0, 255, 255, 0), (255, 255, 0, 0), "CMYK"), "TIFF"), RED, BLUE),
        ("x.bmp", encoded(half(1, 0, "1"), "BMP"), WHITE, [0] * 3),
        ("X.PNG", encoded(half((255, 0, 0), (0, 0, 255)), "PNG"), RED, BLUE),
        ("x.TIFF", encoded(half((255, 0, 0), (0, 0, 255)), "TIFF"), RED, BLUE),
        ("x.ppm", encoded(half((255, 0, 0), (0, 0, 255)), "PPM"), RED, BLUE),
        ("x.jfif", encoded(half((255,) * 3, (0,) * 3), "JPEG", quality=100), WHITE, [0] * 3),
        ("x", encoded(half((255, 0, 0), (0, 0, 255)), "PNG"), RED, BLUE),
        ("x.old", encoded(half((255, 0, 0), (0, 0, 255)), "PNG"), RED, BLUE),
        (
            "x.png",
            encoded(half((255, 0, 0), (0, 0, 255)).rotate(90), "PNG", exif=TURNED),
            RED,
            BLUE,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pictures_of_all_kinds_are_read(tmp_path, name, content, top, bottom):
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / name).write_bytes(content)
    image = read(tmp_path).train_images[0]
    assert image.shape == (8, 8, 3)
    for row, colour in ((0, top), (7, bottom)):
        if colour is not None:
            np.testing.assert_allclose(image[row, 4], colour, atol=3)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.fromarray(np.full((8, 8), 200, np.int32)), "pixels of 32 bits"),
        (Image.fromarray(np.full((8, 8), 0.5, np.float32)), "pixels of 32 bits"),
    ],
)
def test_pixels_of_no_known_range_are_one_line(mine, image, message):
    put(mine / "train/cat/x.tif", image)
    with pytest.raises(UserError, match=rf"cat/x\.tif has {message}"):
        read(mine)


def test_a_damaged_picture_is_named(mine):
    (mine / "train/cat/x.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(UserError, match=r"train/cat/x\.png is damaged") as found:
        read(mine)
    assert "BytesIO" not in str(found.value)


def test_test_images_that_are_training_images_are_said(mine, caplog):
    put(mine / "test/cat/again.png", picture(COLOURS["cat"]))
    read(mine)
    assert "1 of 3 test images are training images, too" in caplog.text


def test_greys_of_12_bits_stored_as_16_are_said(tmp_path, caplog):
    for split in ("train", "test"):
        put(tmp_path / split / "a/x.png", Image.fromarray(np.full((8, 8), 4095, np.uint16)))
    read(tmp_path)
    assert "no training pixel is brighter than 15 of 255" in caplog.text


def test_a_picture_replaced_under_its_old_time_is_read_anew(mine):
    before = read(mine).train_images
    old = mine / "train/cat/0.png"
    size, times = old.stat().st_size, (old.stat().st_atime_ns, old.stat().st_mtime_ns)
    put(old, picture((30, 200, 30)))
    assert old.stat().st_size == size
    os.utime(old, ns=times)
    assert (read(mine).train_images[0] != before[0]).any()
