"""The drawings, the readers of images, and what they say about what they read."""
import io
import json
import re
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import UserError, from_uint8, load_data, to_uint8
from conftest import artifact, refused, script, settings_of
from extras import drawings, image_files
from extras.drawings import draw_shapes

RED = [255, 0, 0]
BLUE = [0, 0, 255]
WHITE = [255, 255, 255]


# -------------------------------------------------------------------------- Files for the readers

def load_images(source, image_size):
    images, labels, _ = load_data(source, image_size)
    return images, labels


def encoded(image, form="PNG", **options):
    """The content of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def picture(colour, size=(8, 8), mode="RGB", form="PNG"):
    """The content of an image file that has one colour."""
    image = Image.new("RGB", size, colour)
    return encoded(image.convert(mode), form)


PNG = picture("red")
GIF = picture("red", form="GIF")
VALUES_16_BIT = np.full((9, 9), 200 * 257, dtype=np.uint16)
GREY_16_BIT = encoded(Image.fromarray(VALUES_16_BIT))


def write(name, content):
    """Writes bytes as a file, or {name: bytes} as a folder or a zip. Returns the path."""
    path = Path(name).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name in content:
                archive.writestr(name, content[name])
    else:
        for name in content:
            write(path / name, content[name])
    return path


def rows(a, b):
    """Labels of a.png and b.png, as a dataset.json lists them."""
    return [["a.png", a], ["b.png", b]]


def labelled(labels):
    """Two images and a dataset.json with these labels."""
    dataset = json.dumps({"labels": labels}).encode()
    return {"a.png": PNG, "b.png": PNG, "dataset.json": dataset}


def image_in(folder):
    """The name of an image in a folder; the folder "." is the top."""
    return f"{folder}/1.png".removeprefix("./")


# ---------------------------------------------------------------------------- What the tests repeat

def load(name, content, size=8):
    """Writes a file, folder or zip, and loads it: (images, labels, names of the classes)."""
    return load_data(write(name, content), size)


def refusal(name, content, size=8):
    """The message with which a file, folder or zip is refused."""
    with pytest.raises(UserError) as error:
        load(name, content, size)
    return str(error.value)


def line_about(path, capsys):
    """The line that load_data() prints about the images at a path."""
    load_data(path, 8)
    return capsys.readouterr().out.splitlines()[-1]


def prepared(source, *flags):
    """The zip that extras/prepare_images.py makes of a folder or zip."""
    target = source.parent / "prepared.zip"
    argv = ["prepare_images.py", str(source), str(target), *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        script("prepare").main()
    return target


def centres(images):
    """The colour in the middle of each image."""
    return images[:, :, 4, 4].tolist()


def cached():
    """The files of decoded images that were kept."""
    return list(Path("data/cache").glob("*"))


# -------------------------------------------------------------------------------------- The formats

def test_drawings_show_what_their_labels_name_and_bytes_come_back():
    """A drawing has the colour and shape of its label; bytes survive the way to floats and back."""
    images, labels = draw_shapes(300, 64)
    again, _ = draw_shapes(300, 64)
    others, _ = draw_shapes(300, 64, 1)
    assert torch.equal(images, again)
    assert not torch.equal(images, others)
    assert labels.dtype == torch.int64
    assert len(labels.unique()) == len(drawings.CLASSES) == 18

    # Shapes differ in how much they fill of the smallest upright rectangle around them.
    fills = {"circle": 3.14 / 4, "square": 1, "triangle": 0.5}
    for image, label in zip(images.float(), labels):
        colour, shape = drawings.CLASSES[label].split()
        ink = torch.tensor(drawings.COLOURS[colour]).float()
        ground = image[:, 0, 0]
        contrast = (image - ground[:, None, None]).norm(dim=0)
        shown = contrast > 0.5 * (ink - ground).norm()
        height = shown.any(1).sum()
        width = shown.any(0).sum()
        fill = shown.sum() / (height * width)
        errors = {name: abs(fills[name] - fill) for name in fills}
        assert min(errors, key=errors.get) == shape
        drawn = image[:, shown].median(1).values
        assert (drawn - ink).abs().max() <= 21
        assert ground.max() < 75

    _, labels = load_images("shapes", 16)
    assert torch.equal(labels, draw_shapes(500, 16)[1])

    # Bytes become floats in [-1, 1]. Back again, these are clipped and rounded.
    values = torch.arange(256, dtype=torch.uint8)
    floats = from_uint8(values)
    assert floats[[0, 255]].tolist() == [-1, 1]
    assert torch.equal(to_uint8(floats), values)
    floats = torch.tensor([-3.0, -0.998, -0.994, 3.0])
    assert to_uint8(floats).tolist() == [0, 0, 1, 255]


@pytest.mark.parametrize("name", ["x", "x.zip"])
def test_folders_are_classes_unless_dataset_json_has_the_labels_and_any_mode_becomes_rgb(name):
    """The labels are the folders, or those of a dataset.json; all images become RGB."""
    blue = Image.new("RGB", (8, 8), "blue")
    files = {
        "b/deep/1.webp": encoded(blue, "WEBP", lossless=True),
        "a/1.png": PNG,
        "b/.1.png": b"",
        "a/2.png": picture("grey", mode="L"),
        "a/3.png": picture("lime", mode="P"),
        "a/4.jpg": picture("white", form="JPEG"),
        "__MACOSX/a/._1.png": b"",
        "c.txt": b"",
    }
    images, labels, _ = load(name, files)
    assert images.shape == (5, 3, 8, 8)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [0, 0, 0, 0, 1]
    grey, lime = [128, 128, 128], [0, 255, 0]
    assert centres(images) == [RED, grey, lime, WHITE, BLUE]

    _, labels, _ = load(f"no{name}", labelled(None))
    assert labels is None
    given = [["b.png", 3], ["a.png", 7]]
    _, labels, _ = load(f"given{name}", labelled(given))
    assert labels.tolist() == [7, 3]


def test_other_sizes_are_cropped_and_resized_and_photos_turned_upright():
    """An image becomes its centre square, upright; what was decoded is kept, and not changed."""
    wide = Image.new("RGB", (32, 8), "red")
    wide.paste("blue", (12, 0, 20, 8))  # the centre square
    lying = Image.new("RGB", (8, 8), "red")
    lying.paste("blue", (0, 0, 4, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the left side is the top
    files = {"a.png": encoded(wide), "b.png": encoded(lying, exif=exif), "c.png": PNG}
    folder = write("x", files)
    images, labels = load_images(folder, 8)
    assert labels is None
    assert images[:2, :, 1, 6].tolist() == [BLUE, BLUE]  # top right
    assert images[:2, :, 6, 1].tolist() == [BLUE, RED]  # bottom left

    # A change of the images does not reach the file in which they are kept.
    images[:] = 0
    again, _ = load_images(folder, 8)
    assert again.any()
    smaller, _ = load_images(folder, 4)
    assert smaller.shape[2:] == (4, 4)

    # If a source has changed, it is decoded again.
    (folder / "a.png").write_bytes(PNG)
    changed, _ = load_images(folder, 8)
    assert changed[0, 0].min() == 255


CUT_OFF = picture("red", (64, 64))[:90]
NO_NUMBER = labelled([["b.png", "cat"], ["a.png", 7]])
TWO_SIZES = {"a.png": PNG, "b.png": picture("red", (9, 9))}
TWO_SHAPES = r"b.png.*\(3, 9, 9\).*\(3, 8, 8\)"
BAD_SOURCES = {
    "an image is text": ("x", {"a.png": PNG, "c/bad.png": b"not an image"}, 8, "c/bad.png"),
    "no image": ("x", {"b.txt": b"text"}, 8, "x holds no"),
    "an image is cut off": ("x", {"a.png": CUT_OFF}, 8, "a.png"),
    "no zip": ("x.zip", b"PK", 8, "x.zip is neither"),
    "two sizes": ("x", TWO_SIZES, None, TWO_SHAPES),
    "a label is missing": ("x", labelled([["a.png", 0]]), 8, "number to all images.*b.png"),
    "no folder": ("y", {}, 8, "y does not exist"),
    "a label is a word": ("x", NO_NUMBER, 8, "dataset.json"),
    "no JSON": ("x", {"a.png": PNG, "dataset.json": b"{"}, 8, "dataset.json must"),
    "no CIFAR-10": ("x.tar.gz", b"no", 32, "is not CIFAR-10"),
}


@pytest.mark.parametrize("name, content, size, message", BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_bad_sources_are_refused_and_nothing_is_kept(name, content, size, message):
    """What cannot be read is named, and leaves no decoded images behind."""
    assert re.search(message, refusal(name, content, size))
    assert not cached()


def test_cifar10_in_its_binary_version():
    """A record of CIFAR-10 is a label and three planes of 32 rows."""
    with tarfile.open("c.tar.gz", "w:gz", compresslevel=1) as archive:
        for i in range(5):
            records = np.zeros((10_000, 3073), dtype=np.uint8)
            records[:, 0] = i  # the label
            records[7, 1 + 2 * 1024 + 5 * 32 + 3] = 200  # blue, row 5, column 3
            info = tarfile.TarInfo(f"cifar-10-batches-bin/data_batch_{i + 1}.bin")
            info.size = records.size
            archive.addfile(info, io.BytesIO(records.data))
    images, labels = load_images("c.tar.gz", 32)
    assert images.shape == (50_000, 3, 32, 32)
    assert torch.equal(labels, torch.arange(50_000) // 10_000)
    image = images[40_007]
    assert image.nonzero().tolist() == [[2, 5, 3]]
    assert image[2, 5, 3] == 200


# ---------------------------------------------------------------------------- A user's own images

FOLDERS = {  # which: (folders, classes in order)
    "numbers": (["0", "1", "2", "10"], ["0", "1", "2", "10"]),
    "hidden ones": (["b", "a", ".ipynb_checkpoints", "__MACOSX", "c/.hidden"], ["a", "b"]),
    "nested": (["val/dog", "train/cat", "val/cat"], ["train/cat", "val/cat", "val/dog"]),
    "not only numbers": (["10", "9", "x"], ["10", "9", "x"]),
    "the top, too": ([".", "a"], [".", "a"]),
}


@pytest.mark.parametrize("folders, classes", FOLDERS.values(), ids=FOLDERS)
@pytest.mark.parametrize("kind", ["x", "x.zip"])
def test_visible_folders_are_classes_in_order_and_named_in_the_line(kind, folders, classes, capsys):
    """Each folder that is not hidden is a class. The line names the classes and their sizes."""
    files = {image_in(folder): PNG for folder in folders}
    images, labels, names = load(kind, files)
    assert names == classes
    assert len(images) == len(classes)

    # Images are in the order of their names; each has the label of its folder.
    labelled_as = [image_in(names[label]) for label in labels]
    assert labelled_as == sorted(map(image_in, classes))

    sizes = ", ".join(f"{name} 1" for name in classes)
    line = f"| {len(classes)} classes: {sizes} | changed: nothing"
    assert line in capsys.readouterr().out


def test_of_many_classes_the_line_says_the_number_and_the_extremes(capsys):
    """More than 20 classes are not listed one by one."""
    files = {f"{i}/a.png": PNG for i in range(21)}
    files |= {"3/b.png": PNG, "3/c.png": PNG}
    line = line_about(write("x", files), capsys)
    assert "| 21 classes: 1 to 3 images each |" in line


def test_transparency_becomes_white_and_is_counted_where_something_shows_through(capsys):
    """Transparent pixels show white, whatever colour is stored for them."""
    half = Image.new("RGBA", (8, 8), (0, 0, 200, 128))
    hidden = Image.new("RGBA", (8, 8), (0, 0, 200, 0))
    grey = Image.new("LA", (8, 8), (7, 0))
    files = {
        "grey.png": encoded(grey),
        "half.png": encoded(half),
        "hidden.webp": encoded(hidden, "WEBP", lossless=True, exact=True),
        "opaque.png": picture("red", mode="RGBA"),
        "palette.png": encoded(hidden.convert("P"), transparency=bytes(256)),
        "rgb.png": PNG,
    }
    folder = write("x", files)
    images, _ = load_images(folder, 8)
    assert centres(images) == [WHITE, [127, 127, 227], WHITE, RED, WHITE, RED]
    line = line_about(folder, capsys)
    assert "4 transparent (composited on white), 1 grey" in line


def test_linked_folders_are_followed_but_not_in_a_circle():
    """A link to a folder is read like the folder, but not if it leads to one above it."""
    store = write("store", {"cats/1.png": PNG, "dogs/1.png": PNG})
    folder = write("x", {"readme.txt": b""})
    (folder / "cat").symlink_to(store / "cats")
    (folder / "dog").symlink_to(store / "dogs")
    (store / "cats/again").symlink_to(folder)  # x/cat/again is x
    (store / "dogs/again").symlink_to(store / "dogs")
    images, _, names = load_data(folder, 8)
    assert names == ["cat", "dog"]
    assert len(images) == 2


def test_the_line_says_what_was_changed_and_left_out_the_second_time_too(capsys):
    """The line counts what was changed and what was not read, also when the cache is used."""
    files = {f"{i}.png": picture("red", (64, 16)) for i in range(8)}
    files |= {f"b{i}.bmp": b"" for i in range(3)}
    files |= {
        "small.jpeg": picture("red", (4, 4), "L", "JPEG"),
        "UPPER.PNG": PNG,
        "c.GIF": b"",
        "LICENSE": b"",
        "Thumbs.db": b"",
        ".DS_Store": b"",
    }
    source = write("x", files)
    first = line_about(source, capsys)
    assert line_about(source, capsys) == first
    beginning = f"data | 10 images of 8x8 from {source} | changed: 8 cropped to the centre "
    assert first.startswith(beginning)
    assert "1 grey" in first
    assert "1 enlarged" in first
    assert "left out: 3 .bmp, " in first
    assert "1 .db" in first
    assert "1 .gif" in first
    assert "1 without a suffix" in first
    assert "DS_" not in first

    line = line_about(write("y", {"a.png": PNG}), capsys)
    assert line.endswith("changed: nothing | left out: nothing")


def test_all_bad_images_are_named_at_once_ten_and_a_count_and_nothing_is_kept():
    """One message names all bad images, so that nobody has to start again for each of them."""
    files = {f"{i:02}.png": PNG for i in range(30)}
    files["07.png"] = PNG[:40]
    files["23.png"] = b""
    message = refusal("x", files)
    both = r"2 of 30 .*07.png \(.*\), 23.png \(.*\)\. Remove.*prepare_images"
    assert re.search(both, message)
    assert "<" not in message
    assert "\n" not in message

    message = refusal("y", dict.fromkeys(files, b"no image"))
    assert re.search(r"09.png \(cannot identify image file\) and 20 more", message)
    assert not cached()


WHOLE_NUMBERS = {
    "floats": (rows(1.0, 0.0), [1, 0]),
    "truth values": (rows(True, False), [1, 0]),
    "a dictionary": ({"a.png": 1, "b.png": 0, "gone.png": 5}, [1, 0]),
    "with a gap": (rows(0, 2), [0, 2]),
}


@pytest.mark.parametrize("labels, numbers", WHOLE_NUMBERS.values(), ids=WHOLE_NUMBERS)
def test_whole_numbers_are_labels_in_any_form(labels, numbers):
    """Any form of a whole number is a label."""
    _, found, _ = load("x", labelled(labels))
    assert found.dtype == torch.int64
    assert found.tolist() == numbers


OTHER_LABELS = {
    "one-hot": rows([0, 1], [1, 0]),
    "a fraction": rows(0.5, 1),
    "text": rows("1", "0"),
    "NaN": rows(float("nan"), 1),
    "too large": rows(10**30, 1),
    "none": rows(None, 1),
    "twice": [*rows(0, 1), ["b.png", 0]],
    "only names": ["a.png", "b.png"],
    "a number": 7,
}


@pytest.mark.parametrize("labels", OTHER_LABELS.values(), ids=OTHER_LABELS)
def test_other_labels_are_refused_in_one_line_that_names_the_command(labels):
    """What is not one whole number for each image is refused, with a way out."""
    message = refusal("x", labelled(labels))
    assert re.search("must give a whole number .*prepare_images.py.*x new.zip", message)


FAR_OFF = {
    "large": (rows(10**12, 0), r"2 classes, but labels from 0 to 10{12}\. "),
    "negative": (rows(-1, 0), "2 classes, but labels from -1 to 0"),
    "from 1 on": (rows(1, 1), "1 classes, but labels from 1 to 1"),
}


@pytest.mark.parametrize("labels, message", FAR_OFF.values(), ids=FAR_OFF)
def test_labels_far_off_are_refused_before_anything_is_made_as_long_as_they_are(
        labels, message, tmp_path):
    """Labels with gaps are refused before memory is asked for as many classes."""
    source = write("x", labelled(labels))
    line = refused("01", tmp_path, data=source, image_size=8)
    assert re.search(message, line)


def test_a_zips_names_may_have_backslashes_but_no_name_may_occur_twice():
    """The names in a zip are read as Windows and other tools write them, if they are unique."""
    images, _, _ = load("dot.zip", {"./a.png": PNG, "./b.png": PNG})
    assert len(images) == 2
    _, _, names = load("x.zip", {"cat\\1.png": PNG, "dog\\1.png": PNG, "cat\\": b""})
    assert names == ["cat", "dog"]

    twice = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(twice, "w") as archive:
        warnings.simplefilter("ignore")  # zipfile warns
        archive.writestr("a.png", PNG)
        archive.writestr("a.png", PNG)
    message = refusal("twice.zip", twice.getvalue())
    assert "two files named a.png" in message


def test_a_dataset_json_below_the_top_is_refused_and_read_by_the_command():
    """The reader wants dataset.json at the top; prepare_images.py finds it anywhere."""
    content = labelled(rows(1, 0))
    files = {f"my/{name}": content[name] for name in content}
    message = refusal("x.zip", files)
    assert re.search("my/dataset.json.* not at the top.*prepare_images", message)
    _, labels = load_images(prepared(Path("x.zip")), 8)
    assert labels.tolist() == [1, 0]


def test_a_file_of_decoded_images_that_is_not_whole_is_made_again():
    """A damaged cache file is noticed and replaced."""
    source = write("x", {"a.png": PNG, "b.png": PNG})
    images, _ = load_images(source, 8)
    expected = images.clone()
    cache, = cached()
    whole = cache.read_bytes()
    zeros = bytes(len(whole))
    for damaged in (whole[:300], whole[:-1], b"", zeros):
        cache.write_bytes(damaged)
        images, _ = load_images(source, 8)
        assert torch.equal(images, expected)
        assert cache.read_bytes() == whole


def test_two_runs_that_read_the_same_images_at_once_both_read_them_whole(monkeypatch):
    """Two runs that decode the same images do not write into each other's file."""
    source = write("x", {"a.png": PNG, "b.png": PNG})
    read_image = image_files.read_image
    found = []

    def slowly(*given):
        # The second run begins and ends before the first has read an image.
        monkeypatch.setattr(image_files, "read_image", read_image)
        second, _ = load_images(source, 8)
        found.append(second)
        return read_image(*given)

    monkeypatch.setattr(image_files, "read_image", slowly)
    first, _ = load_images(source, 8)
    red = torch.tensor(RED)[:, None, None]
    for images in (first, found[0]):
        assert (images == red).all()
    assert len(cached()) == 1


def test_odd_files_are_read_as_pillow_reads_them_or_named():
    """Files that are unusual, but readable, are read. Others are named in the message."""
    white = Image.new("RGB", (8, 8), "white")
    black = Image.new("RGB", (8, 8))
    files = {
        "cmyk.jpg": picture("white", mode="CMYK", form="JPEG"),
        "bit.png": picture("white", mode="1"),
        "wrong.png": picture("white", form="JPEG"),
        "one.png": picture("white", (1, 1)),
        "moving.webp": encoded(white, "WEBP", save_all=True, append_images=[black], lossless=True),
    }
    folder = write("x", files)
    images, _ = load_images(folder, 8)
    assert images.min() >= 254  # of an animation the first picture

    message = refusal("with_gif", files | {"gif.png": GIF})
    assert re.search("1 of 6 .*gif.png", message)
    message = refusal("with_16_bit", files | {"deep.png": GREY_16_BIT})
    assert re.search("1 of 6 .*deep.png", message)

    (folder / "broken.png").symlink_to("nowhere")
    with pytest.raises(OSError, match="broken.png"):
        load_images(folder, 8)


def test_the_command_reads_other_formats_and_labels_and_leaves_out_what_is_bad(capsys):
    """prepare_images.py makes a plain zip of formats and labels that the reader refuses."""
    labels = {"a.bmp": [0, 1], "b.gif": "0", "c.png": 1.0, "bad.png": 0}
    dataset = {"labels": list(labels.items()), "classes": ["no", "yes"]}
    files = {
        "a.bmp": picture("red", (16, 8), form="BMP"),
        "b.gif": GIF,
        "c.png": GREY_16_BIT,
        "bad.png": b"",
        "d.txt": b"",
        "dataset.json": json.dumps(dataset).encode(),
    }
    target = prepared(write("x", files), "--image_size=8")
    said = capsys.readouterr().out
    assert "3 images" in said
    assert "1 cropped" in said
    assert "left out: 1 .txt, 1 images" in said
    assert "bad.png" in said
    images, labels, names = load_data(target, 8)
    assert labels.tolist() == [1, 0, 1]
    assert names == ["no", "yes"]
    assert centres(images) == [RED, RED, [200, 200, 200]]

    # A class of which no image is left does not count.
    folders = {"0/a.png": PNG, "10/a.png": PNG, "2/a.png": PNG, "1/bad.png": b""}
    _, labels, names = load_data(prepared(write("y", folders)), 8)
    assert labels.tolist() == [0, 2, 1]
    assert names == ["0", "2", "10"]


def test_classes_without_names_have_numbers_and_artifacts_of_before_too(tmp_path):
    """Without names, classes are called by their numbers; so are those of older artifacts."""
    cfg = settings_of("05", out=tmp_path)
    net = common.UNet(16, base=8, blocks=1, classes=3)
    common.save_network(cfg, "01_teacher.pt", net, {})
    content = artifact(tmp_path, "01_teacher.pt")
    assert content.pop("class_names") == ["0", "1", "2"]

    # An older artifact has no such entry.
    common.save(tmp_path / "shapes/01_teacher.pt", **content)
    net, _ = common.load_network(cfg, "01_teacher.pt", torch.device("cpu"))
    assert net.class_names == ["0", "1", "2"]
