"""The drawings, and the readers of images."""
import io
import json
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import UserError, draw_shapes, from_uint8, load_images, to_uint8


def picture(colour, size=(8, 8), mode="RGB", form="PNG", **options):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def write(root, content):
    """Writes bytes as a file, or {name: bytes} as a folder or a zip."""
    root.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        root.write_bytes(content)
    elif root.suffix == ".zip":
        with zipfile.ZipFile(root, "w") as archive:
            for name in content:
                archive.writestr(name, content[name])
    else:
        for name in content:
            write(root / name, content[name])
    return root


def labelled(labels):
    return {"a.png": RED, "b.png": RED, "dataset.json": json.dumps({"labels": labels}).encode()}


RED = picture("red")


def test_drawings_show_what_their_labels_name_and_bytes_come_back():
    images, labels = draw_shapes(300, 64)
    assert torch.equal(images, draw_shapes(300, 64)[0])
    assert not torch.equal(images, draw_shapes(300, 64, 1)[0])
    assert labels.dtype == torch.int64 and len(labels.unique()) == len(common.CLASSES) == 18
    fills = {"circle": 3.14 / 4, "square": 1, "triangle": 0.5}  # of the smallest upright rectangle around it
    for image, label in zip(images.float(), labels):
        colour, shape = common.CLASSES[label].split()
        ground, ink = image[:, 0, 0], torch.tensor(common.COLOURS[colour]).float()
        shown = (image - ground[:, None, None]).norm(dim=0) > 0.5 * (ink - ground).norm()
        rows, columns = (shown.any(dim).sum() for dim in (1, 0))
        assert min(fills, key=lambda name: abs(fills[name] - shown.sum() / (rows * columns))) == shape
        assert (image[:, shown].median(1).values - ink).abs().max() <= 21 and ground.max() < 75
    assert torch.equal(load_images("shapes", 16)[1], draw_shapes(500, 16)[1])
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(values)), values)
    assert from_uint8(values)[[0, 255]].tolist() == [-1, 1]
    assert to_uint8(torch.tensor([-3.0, -0.998, -0.994, 3.0])).tolist() == [0, 0, 1, 255]  # rounded, clipped


@pytest.mark.parametrize("name", ["x", "x.zip"])
def test_folders_are_classes_unless_dataset_json_has_the_labels_and_any_mode_becomes_rgb(tmp_path, name):
    files = {"b/deep/1.webp": picture("blue", form="WEBP", lossless=True), "a/1.png": RED, "b/.1.png": b"",
             "a/2.png": picture("grey", mode="L"), "a/3.png": picture("lime", mode="P"),
             "a/4.jpg": picture("white", form="JPEG"), "__MACOSX/a/._1.png": b"", "c.txt": b""}
    images, labels = load_images(write(tmp_path / name, files), 8)
    assert images.shape == (5, 3, 8, 8) and images.dtype == torch.uint8 and labels.tolist() == [0, 0, 0, 0, 1]
    assert images[:, :, 4, 4].tolist() == [[255, 0, 0], [128] * 3, [0, 255, 0], [255] * 3, [0, 0, 255]]
    assert load_images(write(tmp_path / f"no{name}", labelled(None)), 8)[1] is None
    given = write(tmp_path / f"given{name}", labelled([["b.png", 3], ["a.png", 7]]))
    assert load_images(given, 8)[1].tolist() == [7, 3]


def test_other_sizes_are_cropped_and_resized_and_photos_turned_upright(tmp_path):
    folder = write(tmp_path / "x", {"c.png": RED})
    wide, lying, exif = Image.new("RGB", (32, 8), "red"), Image.new("RGB", (8, 8), "red"), Image.Exif()
    wide.paste("blue", (12, 0, 20, 8))  # the centre square
    wide.save(folder / "a.png")
    lying.paste("blue", (0, 0, 4, 8))
    exif[0x0112] = 6  # the left side is the top
    lying.save(folder / "b.png", exif=exif)
    Image.fromarray(np.full((9, 9), 200 * 257, dtype=np.uint16)).save(folder / "c.png")  # 16-bit grey
    images, labels = load_images(folder, 8)
    assert labels is None and images[:, :, 1, 6].tolist() == [[0, 0, 255], [0, 0, 255], [200, 200, 200]]
    assert images[:2, :, 6, 1].tolist() == [[0, 0, 255], [255, 0, 0]]
    images[:] = 0  # does not reach the file in which they are kept
    assert load_images(folder, 8)[0].any() and load_images(folder, 4)[0].shape[2:] == (4, 4)
    (folder / "a.png").write_bytes(RED)  # another content, another file
    assert load_images(folder, 8)[0][0, 0].min() == 255


@pytest.mark.parametrize("name, content, message", [
    ("x", {"a.png": RED, "c/bad.png": b"not an image"}, "c/bad.png"), ("x", {"b.txt": b"text"}, "x holds no"),
    ("x", {"a.png": picture("red", (64, 64))[:90]}, "a.png"), ("x.zip", b"PK", "x.zip is neither"),
    ("x", {"a.png": RED, "b.png": picture("red", (9, 9))}, r"b.png.*\(3, 9, 9\).*\(3, 8, 8\)"),
    ("x", labelled([["a.png", 0]]), "labels of all images.*b.png"), ("y", {}, "y does not exist"),
    ("x", labelled([["b.png", "cat"], ["a.png", 7]]), "dataset.json"),
    ("x", {"a.png": RED, "dataset.json": b"{"}, "dataset.json must"), ("x.tar.gz", b"no", "is not CIFAR-10")])
def test_bad_sources_are_refused_and_nothing_is_kept(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        load_images(write(tmp_path / name, content), None if "9" in message else 32 if "tar" in name else 8)
    assert not list(tmp_path.rglob("cache/*"))


def test_cifar10_in_its_binary_version(tmp_path):
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz", compresslevel=1) as archive:
        for i in range(5):
            records = np.zeros((10_000, 3073), dtype=np.uint8)
            records[:, 0], records[7, 1 + 2 * 1024 + 5 * 32 + 3] = i, 200  # the label; blue, row 5, column 3
            info = tarfile.TarInfo(f"cifar-10-batches-bin/data_batch_{i + 1}.bin")
            info.size = records.size
            archive.addfile(info, io.BytesIO(records.data))
    images, labels = load_images(tmp_path / "c.tar.gz", 32)
    assert images.shape == (50_000, 3, 32, 32) and torch.equal(labels, torch.arange(50_000) // 10_000)
    assert images[40_007].nonzero().tolist() == [[2, 5, 3]] and images[40_007, 2, 5, 3] == 200
