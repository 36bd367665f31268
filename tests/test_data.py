"""The drawings, the readers, downloads, the tables of settings, and files that appear whole or not at all."""
import functools
import hashlib
import http.server
import io
import json
import resource
import signal
import tarfile
import threading
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import UserError, draw_shapes, from_uint8, load_images, read_settings, save, to_uint8, writing


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


RED, BLUE, GIF = picture("red"), picture("blue"), picture("red", form="GIF")


def test_drawings_show_their_attributes_labels_name_them_and_bytes_come_back():
    images, attributes = draw_shapes(300, 16)
    other = draw_shapes(300, 16, 1)[0]
    assert torch.equal(images, draw_shapes(300, 16)[0]) and not torch.equal(images, other)
    for image, (shape, colour, x, y, radius) in zip(images.float(), attributes.tolist()):
        ink = torch.tensor(list(common.COLOURS.values())[int(colour)])
        assert (image[:, int(y * 16), int(x * 16)] - ink).abs().max() <= 21 and image[:, 0, 0].max() < 75
        area = ((image - image[:, :1, :1]).abs().amax(0) / (ink - image[:, 0, 0]).abs().max()).sum() / 256
        assert area == pytest.approx((3.14, 4 * 0.85**2, 0.95 * 1.8)[int(shape)] * radius**2, rel=0.4)
    labels, attributes = load_images("shapes", 16)[1], draw_shapes(500, 16)[1]
    assert torch.equal(labels, (attributes[:, 0] * 6 + attributes[:, 1]).long()) and labels.max() == 17
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(values)), values)
    assert from_uint8(values)[[0, 255]].tolist() == [-1, 1]
    assert to_uint8(torch.tensor([-3.0, -0.998, -0.994, 3.0])).tolist() == [0, 0, 1, 255]  # rounded, clipped


@pytest.mark.parametrize("name", ["x", "x.zip"])
def test_folders_are_classes_and_any_mode_becomes_rgb(tmp_path, name):
    files = {"b/deep/1.webp": picture("blue", form="WEBP", lossless=True), "a/1.png": RED, "b/.hidden": b"",
             "a/2.png": picture("grey", mode="L"), "a/3.png": picture("lime", mode="P"),
             "a/4.jpg": picture("white", form="JPEG"), "__MACOSX/a.png": b""}
    images, labels = load_images(write(tmp_path / name, files), 8)
    assert images.shape == (5, 3, 8, 8) and images.dtype == torch.uint8 and labels.tolist() == [0, 0, 0, 0, 1]
    assert images[:, :, 4, 4].tolist() == [[255, 0, 0], [128] * 3, [0, 255, 0], [255] * 3, [0, 0, 255]]


def test_other_sizes_are_cropped_and_resized_and_photos_turned_upright(tmp_path):
    wide, lying, exif = Image.new("RGB", (32, 8), "red"), Image.new("RGB", (8, 8), "red"), Image.Exif()
    wide.paste("blue", (12, 0, 20, 8))  # the centre square
    wide.save(tmp_path / "wide.png")
    lying.paste("blue", (0, 0, 4, 8))
    exif[0x0112] = 6  # the left side is the top
    lying.save(tmp_path / "x.png", exif=exif)
    Image.fromarray(np.full((9, 9), 200 * 257, dtype=np.uint16)).save(tmp_path / "y.png")  # 16-bit grey
    images, labels = load_images(tmp_path, 8)
    assert labels is None and images[:, :, 1, 6].tolist() == [[0, 0, 255], [0, 0, 255], [200, 200, 200]]
    assert images[:2, :, 6, 1].tolist() == [[0, 0, 255], [255, 0, 0]]


@pytest.mark.parametrize("labels, found", [
    ([["b.png", 3], ["a.png", 7]], [7, 3]), (None, None), ([["a.png", 0]], "b.png"), ([3], "must"),
    ([["b.png", -1], ["a.png", 7]], "a label that is not"),
    ([["b.png", 0.5], ["a.png", 7]], "a label that is not"),
    ([["b.png", 3], ["a.png", 7], ["gone.png", 1]], "gone.png")])
def test_dataset_json_gives_the_labels_or_is_refused(tmp_path, labels, found):
    files = {"a.png": RED, "b.png": BLUE, "dataset.json": json.dumps({"labels": labels}).encode()}
    if isinstance(found, str):
        with pytest.raises(UserError, match=f"x.zip: .*{found}"):
            load_images(write(tmp_path / "x.zip", files), 8)
    else:
        labels = load_images(write(tmp_path / "x.zip", files), 8)[1]
        assert found == (None if labels is None else labels.tolist())


@pytest.mark.parametrize("name, content, message", [
    ("x", {"a.png": RED, "c/bad.png": b"not an image"}, "c/bad.png"), ("x", {"b.txt": b"text"}, "b.txt"),
    ("x", {"a.png": picture("red", (64, 64))[:90]}, "a.png"), ("x", {"a.jpg": GIF}, "a.jpg"),
    ("x", {"a.png": RED, "b.png": picture("red", (9, 9))}, r"b.png.*\(3, 9, 9\).*\(3, 8, 8\)"),
    ("x", {"a.png": RED, "dataset.json": b"{"}, "dataset.json must"), ("x", {".a": b""}, "x holds no"),
    ("x.zip", b"PK", "x.zip is neither"), ("x.zip", {}, "x.zip holds no"), ("y", {}, "y does not exist"),
    ("x.zip", (b"PK\5\6", b"PK\5\7"), "x.zip is neit"), ("x.zip", (b"PK\1\2", b"PK\1\3"), "x.zip is neither"),
    ("x.zip", (b"null", b"nuLL"), "dataset.json must"), ("x.zip", (RED[-9:], RED[-8:] + b"x"), "1.png is")])
def test_bad_sources_are_refused_and_nothing_is_kept(tmp_path, name, content, message):
    if isinstance(content, tuple):  # a good zip, with some bytes changed
        good = write(tmp_path / name, {"1.png": RED, "dataset.json": b'{"labels": null}'})
        content = good.read_bytes().replace(*content)
    with pytest.raises(UserError, match=message):
        load_images(write(tmp_path / name, content), None if "9" in message else 8)
    assert not list(tmp_path.rglob("cache/*"))


@pytest.mark.parametrize("size, message", [(800 * 10**6, "more than 100 MB"), (1000, "")])
def test_a_zip_that_unpacks_to_gigabytes_is_refused_without_using_memory(tmp_path, size, message):
    packer = zlib.compressobj(wbits=-15)
    packed = (packer.compress(bytes(2 * 10**6)) + packer.flush(zlib.Z_FULL_FLUSH)) * 400 + packer.flush()
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w") as archive:
        archive.writestr("1.png", packed)
        member = archive.getinfo("1.png")
        member.compress_type, member.file_size = zipfile.ZIP_DEFLATED, size  # which may be a lie
    tracemalloc.start()
    with pytest.raises(UserError, match=f"bomb.zip: 1.png .*{message}"):
        load_images(tmp_path / "bomb.zip", 8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(packed) < 10**6 and peak < 2e7


def test_images_are_decoded_once(tmp_path, monkeypatch):
    source = write(tmp_path / "x", {f"{c}/{i}.png": picture((i, 9, 9)) for c in "ab" for i in range(5)})
    images, labels = load_images(source, 8)
    images[:] = 0  # does not reach the file
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", None)
        again, again_labels = load_images(source, 8)
    assert again[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4] * 2 and torch.equal(labels, again_labels)
    assert load_images(source, 4)[0].shape[2:] == (4, 4)
    write(source / "a/0.png", RED)  # another content, another file
    assert load_images(source, 8)[0][0, 0, 0, 0] == 255 and len(list(tmp_path.glob("data/cache/*.npy"))) == 3


def test_cifar10_in_its_binary_version(tmp_path):
    records = np.random.default_rng(0).integers(0, 256, (50_000, 3073), dtype=np.uint8)
    for name, count in (("short.tar.gz", 9), ("c.tar.gz", 10_000)):
        with tarfile.open(tmp_path / name, "w:gz", compresslevel=0) as archive:
            for i in range(5):
                info = tarfile.TarInfo(f"cifar-10-batches-bin/data_batch_{i + 1}.bin")
                info.size = 3073 * count
                archive.addfile(info, io.BytesIO(records[i * 10_000:].data))
    images, labels = load_images(tmp_path / "c.tar.gz", 32)
    assert torch.equal(labels, torch.from_numpy(records[:, 0]).long()) and len(images) == 50_000
    assert images[41_000, 2, 5, 7] == records[41_000, 1 + 2 * 1024 + 5 * 32 + 7]
    write(tmp_path / "cut.tar.gz", (tmp_path / "c.tar.gz").read_bytes()[:10**6])
    for name, size, message in (("c", 16, "image_size 32"), ("cut", 32, "is not"), ("short", 32, "is not")):
        with pytest.raises(UserError, match=f"{name}.tar.gz .*{message}"):
            load_images(tmp_path / f"{name}.tar.gz", size)


def test_downloads_are_checked(tmp_path):
    folder = write(tmp_path / "www", {"right": b"content", "cut": b"con"})
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        here, right = f"http://127.0.0.1:{server.server_port}", hashlib.sha256(b"content").hexdigest()
        for host, name, digest in ((here, "right", "0000"), (here, "cut", right), (here, "gone", right),
                                   ("http://127.0.0.1:9", "x", right)):
            with pytest.raises(UserError, match=f"no {host}/{name} .*Put it at data/{name}, or do without"):
                common.download(f"{host}/{name}", digest, "do without")
            assert not list((tmp_path / "data").iterdir())
        path = common.download(f"{here}/right", right[:8], "")
        server.shutdown()
    assert common.download(f"{here}/right", right, "").read_bytes() == b"content"  # it is there already
    write(path, b"another file")
    with pytest.raises(UserError, match="the sha256 of data/right is"):
        common.download(f"{here}/right", right, "do without")


def test_writing_is_all_or_nothing_also_on_a_full_disk(tmp_path):
    path = tmp_path / "a" / "x.pt"
    save(path, a=torch.zeros(3))
    with pytest.raises(KeyError), writing(path) as file:
        file.write(b"new")
        raise KeyError
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
        with pytest.raises(UserError, match="could not write .*x.pt.*File too large"):
            save(path, a=torch.zeros(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert common.read(path)["a"].shape == (3,) and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("number", ["01", "02", "03", "04", "05"])
def test_every_setting_has_five_values_of_one_type_and_a_text(stage, number, capsys):
    table = stage(number).SETTINGS
    assert len(table) <= 18 and all(len(row) == 7 and len({type(v) for v in row[1:6]}) == 1 for row in table)
    for column, preset in enumerate(common.PRESETS, 1):
        cfg = read_settings(table, "", ["--preset", preset])
        assert {row[0]: row[column] for row in table}.items() <= vars(cfg).items()
        with pytest.raises(SystemExit):
            read_settings(table, "", ["--preset", preset, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert all(len(row[6]) > 3 and f"{row[6]} [{row[column]}]" in text for row in table)
    name, value = table[0][:2]  # the command line has the last word
    cfg = read_settings(table, "", [f"--{name}={value}", "--preset=cifar10", "--seed=3"])
    assert (cfg.seed, getattr(cfg, name), str(cfg.folder)) == (3, value, "out/cifar10")
    with pytest.raises(UserError, match="--seed -1"):
        read_settings(table, "", ["--seed=-1"])
