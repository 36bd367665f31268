"""The drawings, the readers of images, and what they say about what they read."""
import io
import json
import re
import sys
import tarfile
import warnings
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import common
from extras import image_files
from common import UserError, draw_shapes, from_uint8, load_data, load_images, to_uint8
from conftest import artifact, refused, script, settings_of


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


def line_about(path, capsys, size=8):
    """The line that load_data() prints about the images at a path."""
    load_data(path, size)
    return capsys.readouterr().out.splitlines()[-1]


def prepared(source, *flags):
    """The zip that extras/prepare_images.py makes of a folder or zip."""
    target = source.parent / "prepared.zip"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare_images.py", str(source), str(target), *flags])
        script("prepare").main()
    return target


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
    images, labels = load_images(folder, 8)
    assert labels is None and images[:2, :, 1, 6].tolist() == [[0, 0, 255], [0, 0, 255]]
    assert images[:2, :, 6, 1].tolist() == [[0, 0, 255], [255, 0, 0]]
    images[:] = 0  # does not reach the file in which they are kept
    assert load_images(folder, 8)[0].any() and load_images(folder, 4)[0].shape[2:] == (4, 4)
    (folder / "a.png").write_bytes(RED)  # another content, another file
    assert load_images(folder, 8)[0][0, 0].min() == 255


@pytest.mark.parametrize("name, content, message", [
    ("x", {"a.png": RED, "c/bad.png": b"not an image"}, "c/bad.png"), ("x", {"b.txt": b"text"}, "x holds no"),
    ("x", {"a.png": picture("red", (64, 64))[:90]}, "a.png"), ("x.zip", b"PK", "x.zip is neither"),
    ("x", {"a.png": RED, "b.png": picture("red", (9, 9))}, r"b.png.*\(3, 9, 9\).*\(3, 8, 8\)"),
    ("x", labelled([["a.png", 0]]), "number to all images.*b.png"), ("y", {}, "y does not exist"),
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


# ------------------------------------------------------------------------------------------- One's own images

@pytest.mark.parametrize("folders, classes", [
    (("0", "1", "2", "10"), ["0", "1", "2", "10"]),  # numbers in order
    (("b", "a", ".ipynb_checkpoints", "__MACOSX", "c/.hidden"), ["a", "b"]),
    (("val/dog", "train/cat", "val/cat"), ["train/cat", "val/cat", "val/dog"]),
    (("10", "9", "x"), ["10", "9", "x"]), ((".", "a"), [".", "a"])])
@pytest.mark.parametrize("kind", ["x", "x.zip"])
def test_visible_folders_are_classes_in_order_and_named_in_the_line(tmp_path, capsys, folders, classes, kind):
    files = {f"{folder}/1.png".removeprefix("./"): RED for folder in folders}
    images, labels, names = load_data(write(tmp_path / kind, files), 8)
    assert names == classes and len(images) == len(classes)
    # Images are in the order of their names; each has the label of its folder.
    seen = sorted(f"{name}/1.png".removeprefix("./") for name in classes)
    assert [f"{names[label]}/1.png".removeprefix("./") for label in labels] == seen
    sizes = ", ".join(f"{name} 1" for name in classes)
    assert f"| {len(classes)} classes: {sizes} | changed: nothing" in capsys.readouterr().out


def test_of_many_classes_the_line_says_the_number_and_the_extremes(tmp_path, capsys):
    files = {f"{i}/a.png": RED for i in range(21)} | {"3/b.png": RED, "3/c.png": RED}
    assert "| 21 classes: 1 to 3 images each |" in line_about(write(tmp_path / "x", files), capsys)


def test_transparency_becomes_white_and_is_counted_where_something_shows_through(tmp_path, capsys):
    half, hidden, palette = (Image.new("RGBA", (8, 8), (0, 0, 200, alpha)) for alpha in (128, 0, 0))
    files = {"opaque.png": picture("red", mode="RGBA"), "rgb.png": RED}
    folder = write(tmp_path / "x", files)
    half.save(folder / "half.png")
    hidden.save(folder / "hidden.webp", lossless=True, exact=True)
    palette.convert("P").save(folder / "palette.png", transparency=bytes(256))
    Image.new("LA", (8, 8), (7, 0)).save(folder / "grey.png")
    images = load_images(folder, 8)[0][:, :, 4, 4].tolist()  # grey, half, hidden, opaque, palette, rgb
    assert images == [[255] * 3, [127, 127, 227], [255] * 3, [255, 0, 0], [255] * 3, [255, 0, 0]]
    assert "4 transparent (composited on white), 1 grey" in line_about(folder, capsys)


def test_linked_folders_are_followed_but_not_in_a_circle(tmp_path):
    store = write(tmp_path / "store", {"cats/1.png": RED, "dogs/1.png": RED})
    folder = write(tmp_path / "x", {"readme.txt": b""})
    (folder / "cat").symlink_to(store / "cats")
    (folder / "dog").symlink_to(store / "dogs")
    (store / "cats/again").symlink_to(folder)  # x/cat/again is x
    (store / "dogs/again").symlink_to(store / "dogs")
    assert load_data(folder, 8)[2] == ["cat", "dog"] and len(load_images(folder, 8)[0]) == 2


def test_the_line_says_what_was_changed_and_left_out_the_second_time_too(tmp_path, capsys):
    files = {f"{i}.png": picture("red", (64, 16)) for i in range(8)}
    files |= {f"b{i}.bmp": b"" for i in range(3)} | {"c.GIF": b"", "LICENSE": b"", "Thumbs.db": b""}
    files |= {"small.jpeg": picture("red", (4, 4), "L", "JPEG"), ".DS_Store": b"", "UPPER.PNG": RED}
    source = write(tmp_path / "x", files)
    first, second = line_about(source, capsys), line_about(source, capsys)
    assert first == second
    assert first.startswith(f"data | 10 images of 8x8 from {source} | changed: 8 cropped to the centre ")
    assert "1 grey" in first and "1 enlarged" in first and "left out: 3 .bmp, " in first
    assert all(other in first for other in ("1 .db", "1 .gif", "1 without a suffix")) and "DS_" not in first
    assert line_about(write(tmp_path / "y", {"a.png": RED}), capsys).endswith(
        "changed: nothing | left out: nothing")


def test_all_bad_images_are_named_at_once_ten_and_a_count_and_nothing_is_kept(tmp_path):
    files = {f"{i:02}.png": RED for i in range(30)}
    files["07.png"], files["23.png"] = RED[:40], b""
    both = r"2 of 30 .*07.png \(.*\), 23.png \(.*\)\. Remove.*prepare_images"
    with pytest.raises(UserError, match=both) as two:
        load_images(write(tmp_path / "x", files), 8)
    assert "<" not in str(two.value) and "\n" not in str(two.value)
    with pytest.raises(UserError, match=r"09.png \(cannot identify image file\) and 20 more"):
        load_images(write(tmp_path / "y", dict.fromkeys(files, b"no image")), 8)
    assert not list(tmp_path.rglob("cache/*"))


@pytest.mark.parametrize("labels, numbers", [
    ([["a.png", 1.0], ["b.png", 0.0]], [1, 0]), ([["a.png", True], ["b.png", False]], [1, 0]),
    ({"a.png": 1, "b.png": 0, "gone.png": 5}, [1, 0]), ([["a.png", 0], ["b.png", 2]], [0, 2])])
def test_whole_numbers_are_labels_in_any_form(tmp_path, labels, numbers):
    loaded = load_images(write(tmp_path / "x", labelled(labels)), 8)[1]
    assert loaded.dtype == torch.int64 and loaded.tolist() == numbers


@pytest.mark.parametrize("labels", [
    [["a.png", [0, 1]], ["b.png", [1, 0]]], [["a.png", 0.5], ["b.png", 1]], [["a.png", "1"], ["b.png", "0"]],
    [["a.png", float("nan")], ["b.png", 1]], [["a.png", 10**30], ["b.png", 1]],
    [["a.png", None], ["b.png", 1]], [["a.png", 0], ["b.png", 1], ["b.png", 0]], ["a.png", "b.png"], 7])
def test_other_labels_are_refused_in_one_line_that_names_the_command(tmp_path, labels):
    with pytest.raises(UserError, match="must give a whole number .*prepare_images.py.*x new.zip"):
        load_images(write(tmp_path / "x", labelled(labels)), 8)


@pytest.mark.parametrize("labels, message", [
    ([["a.png", 10**12], ["b.png", 0]], r"up to 10{12}, no images of class \[1\]"),
    ([["a.png", -1], ["b.png", 0]], r"no images of class \[1\]"),
    ([["a.png", 1], ["b.png", 1]], r"no images of class \[0\]")])
def test_labels_far_off_are_refused_before_anything_is_made_as_long_as_they_are(tmp_path, labels, message):
    source = write(tmp_path / "x", labelled(labels))
    assert re.search(message, refused("01", tmp_path, data=source, image_size=8))


def test_a_zips_names_may_have_backslashes_but_no_name_may_occur_twice(tmp_path):
    files = {"./a.png": RED, "./b.png": RED}
    assert len(load_images(write(tmp_path / "dot.zip", files), 8)[0]) == 2
    files = {"cat\\1.png": RED, "dog\\1.png": RED, "cat\\": b""}
    assert load_data(write(tmp_path / "x.zip", files), 8)[2] == ["cat", "dog"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns
        with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
            archive.writestr("a.png", RED)
            archive.writestr("a.png", RED)
    with pytest.raises(UserError, match="two files named a.png"):
        load_images(tmp_path / "twice.zip", 8)


def test_a_dataset_json_below_the_top_is_refused_and_read_by_the_command(tmp_path):
    files = {f"my/{name}": content for name, content in labelled([["a.png", 1], ["b.png", 0]]).items()}
    source = write(tmp_path / "x.zip", files)
    with pytest.raises(UserError, match="my/dataset.json.* not at the top.*prepare_images"):
        load_images(source, 8)
    assert load_images(prepared(source), 8)[1].tolist() == [1, 0]


def test_a_file_of_decoded_images_that_is_not_whole_is_made_again(tmp_path):
    source = write(tmp_path / "x", {"a.png": RED, "b.png": RED})
    expected = load_images(source, 8)[0].clone()
    cache, = (tmp_path / "data/cache").iterdir()
    whole = cache.read_bytes()
    for damaged in (whole[:300], whole[:-1], b"", bytes(len(whole))):
        cache.write_bytes(damaged)
        assert torch.equal(load_images(source, 8)[0], expected) and cache.read_bytes() == whole


def test_two_runs_that_read_the_same_images_at_once_both_read_them_whole(tmp_path, monkeypatch):
    source, read_image = write(tmp_path / "x", {"a.png": RED, "b.png": RED}), image_files.read_image
    second = []

    def slowly(*given):
        monkeypatch.setattr(image_files, "read_image", read_image)
        second.append(load_images(source, 8)[0])  # begins and ends while the first run has nothing yet
        return read_image(*given)

    monkeypatch.setattr(image_files, "read_image", slowly)
    first = load_images(source, 8)[0]
    for images in (first, second[0]):
        assert (images == torch.tensor([255, 0, 0])[:, None, None]).all()
    assert len(list((tmp_path / "data/cache").iterdir())) == 1


def test_odd_files_are_read_as_pillow_reads_them_or_named(tmp_path, capsys):
    files = {"cmyk.jpg": picture("white", (8, 8), "CMYK", "JPEG"), "bit.png": picture("white", mode="1"),
             "wrong.png": picture("white", (8, 8), "RGB", "JPEG"), "one.png": picture("white", (1, 1))}
    white = Image.new("RGB", (8, 8), "white")
    folder = write(tmp_path / "x", files)
    white.save(folder / "moving.webp", save_all=True, append_images=[Image.new("RGB", (8, 8))], lossless=True)
    assert load_images(folder, 8)[0].min() >= 254  # of an animation the first picture
    for name, content in (("gif.png", picture("red", form="GIF")), ("deep.png", None)):
        (folder / name).write_bytes(content or b"")
        if not content:
            Image.fromarray(np.full((9, 9), 200 * 257, dtype=np.uint16)).save(folder / name)
        with pytest.raises(UserError, match=f"1 of 6 .*{name}"):
            load_images(folder, 8)
        (folder / name).unlink()
    (folder / "broken.png").symlink_to("nowhere")
    with pytest.raises(OSError, match="broken.png"):
        load_images(folder, 8)


def test_the_command_reads_other_formats_and_labels_and_leaves_out_what_is_bad(tmp_path, capsys):
    labels = [["a.bmp", [0, 1]], ["b.gif", "0"], ["c.png", 1.0], ["bad.png", 0]]
    form = {"labels": labels, "classes": ["no", "yes"]}
    files = {"a.bmp": picture("red", (16, 8), form="BMP"), "b.gif": picture("red", form="GIF"), "d.txt": b"",
             "bad.png": b"", "dataset.json": json.dumps(form).encode()}
    folder = write(tmp_path / "x", files)
    Image.fromarray(np.full((9, 9), 200 * 257, dtype=np.uint16)).save(folder / "c.png")
    target = prepared(folder, "--image_size=8")
    said = capsys.readouterr().out
    assert all(text in said for text in ("3 images", "1 cropped", "left out: 1 .txt, 1 images", "bad.png"))
    images, labels, names = load_data(target, 8)
    assert labels.tolist() == [1, 0, 1] and names == ["no", "yes"]
    assert images[:, :, 4, 4].tolist() == [[255, 0, 0], [255, 0, 0], [200] * 3]
    folders = {"0/a.png": RED, "10/a.png": RED, "2/a.png": RED, "1/bad.png": b""}
    labels, names = load_data(prepared(write(tmp_path / "y", folders)), 8)[1:]
    assert labels.tolist() == [0, 2, 1] and names == ["0", "2", "10"]  # a class of which nothing is left


def test_classes_without_names_have_numbers_and_artifacts_of_before_too(tmp_path):
    net, cfg = common.UNet(16, base=8, mult=(1, 1), blocks=1, classes=3), settings_of("05", out=tmp_path)
    common.save_network(cfg, "01_teacher.pt", net, {})
    content = artifact(tmp_path, "01_teacher.pt")
    assert content.pop("class_names") == []
    common.save(tmp_path / "shapes/01_teacher.pt", **content)  # as it was written before
    net, _ = common.load_network(cfg, "01_teacher.pt", torch.device("cpu"))
    assert script("05").class_names(net) == ["0", "1", "2"]
