"""The drawings, the readers (made-up folders, zips and CIFAR files), downloads, and files that appear whole or not at all."""
import hashlib
import http.server
import io
import json
import resource
import signal
import tarfile
import threading
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import UserError, download, draw_shapes, from_uint8, load_images, read_settings, save, to_uint8, writing


def picture(colour, size=(8, 8), mode="RGB", form="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).convert(mode).save(buffer, form, **({"lossless": True} if form == "WEBP" else {}))
    return buffer.getvalue()


def write(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_drawings_are_deterministic_and_show_their_attributes():
    images, attributes = draw_shapes(300, 16)
    assert torch.equal(images, draw_shapes(300, 16)[0]) and not torch.equal(images, draw_shapes(300, 16, seed=1)[0])
    assert images.dtype == torch.uint8 and images.shape == (300, 3, 16, 16)
    assert {int(a) for a in attributes[:, 0]} == {0, 1, 2} and {int(a) for a in attributes[:, 1]} == set(range(6))
    for image, (shape, colour, x, y, radius) in zip(images.float(), attributes.tolist()):
        centre = image[:, int(y * 16), int(x * 16)]
        ink = torch.tensor(list(common.COLOURS.values())[int(colour)])
        assert (centre - ink).abs().max() <= 21  # the ink varies by 20
        assert image[:, 0, 0].max() < 75  # the ground is dark
        area = ((image - image[:, :1, :1]).abs().amax(0) / (ink - image[:, 0, 0]).abs().max()).sum() / 256
        expected = (3.14, 4 * 0.85**2, 0.95 * 1.8)[int(shape)] * radius**2
        assert area == pytest.approx(expected, rel=0.4)


def test_shapes_labels_are_shape_and_colour():
    images, labels = load_images("shapes", 16)
    _, attributes = draw_shapes(len(images), 16)
    assert torch.equal(labels, (attributes[:, 0] * 6 + attributes[:, 1]).long()) and labels.max() == 17


def test_uint8_and_back():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(values)), values)
    assert from_uint8(values).min() == -1 and from_uint8(values).max() == 1
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@pytest.mark.parametrize("packed", [False, True])
def test_folders_are_classes_and_any_mode_becomes_rgb(tmp_path, packed):
    files = {"b/deep/1.webp": picture("blue", form="WEBP"), "a/1.png": picture("red"), "a/2.png": picture("grey", mode="L"),
             "a/3.png": picture("lime", mode="P"), "b/.hidden": b"", "a/4.jpg": picture("white", form="JPEG")}
    source = write_zip(tmp_path / "x.zip", files) if packed else write(tmp_path / "x", files)
    images, labels = load_images(source, 8)
    assert images.shape == (5, 3, 8, 8) and images.dtype == torch.uint8
    assert labels.tolist() == [0, 0, 0, 0, 1]
    assert images[:, :, 4, 4].tolist() == [[255, 0, 0], [128] * 3, [0, 255, 0], [255] * 3, [0, 0, 255]]


def test_one_folder_has_no_labels_and_other_sizes_are_cropped_and_resized(tmp_path):
    wide = Image.new("RGB", (32, 8), "red")
    wide.paste(Image.new("RGB", (8, 8), "blue"), (12, 0))  # the centre square
    wide.save(tmp_path / "wide.png")
    Image.new("RGB", (8, 24), "blue").save(tmp_path / "tall.png")
    images, labels = load_images(tmp_path, 4)
    assert labels is None and (images == torch.tensor([0, 0, 255], dtype=torch.uint8)[:, None, None]).all()


def test_dataset_json_gives_the_labels(tmp_path):
    files = {"a/1.png": picture("red"), "b/1.png": picture("blue")}
    labels = [["b/1.png", 3], ["a/1.png", 7]]
    source = write_zip(tmp_path / "x.zip", {**files, "dataset.json": json.dumps({"labels": labels}).encode()})
    assert load_images(source, 8)[1].tolist() == [7, 3]
    source = write_zip(tmp_path / "y.zip", {**files, "dataset.json": b'{"labels": null}'})
    assert load_images(source, 8)[1] is None


@pytest.mark.parametrize("content, message", [
    (b'{"labels": [["a.png", 0], ["gone.png", 1]]}', "gone.png"), (b'{"labels": [["b.png", 0]]}', "no label for 1 images.*a.png"),
    (b'{"labels": [["a.png", -1], ["b.png", 0]]}', "integer from 0"), (b'{"labels": [["a.png", 0.5], ["b.png", 0]]}', "integer"),
    (b"{", "dataset.json must be"), (b'{"label": []}', "dataset.json must be"), (b'{"labels": [3]}', "dataset.json must be")])
def test_a_dataset_json_that_does_not_match_is_refused(tmp_path, content, message):
    source = write(tmp_path, {"a.png": picture("red"), "b.png": picture("red"), "dataset.json": content})
    with pytest.raises(UserError, match=message):
        load_images(source, 8)


@pytest.mark.parametrize("bad", [{"c/bad.png": b"this is not an image"}, {"c/bad.png": picture("red", (64, 64))[:90]},
                                 {"c/notes.txt": b"notes"}, {"c/bad.jpg": picture("red", form="GIF")}])
def test_bad_files_are_named_or_skipped_and_counted(tmp_path, bad, capsys):
    source = write(tmp_path / "x", {"a/1.png": picture("red"), "b/1.png": picture("blue"), **bad})
    with pytest.raises(UserError, match=next(iter(bad)).replace("/", ".")):
        load_images(source, 8)
    for memory_gb in (1.0, 0.0):
        images, labels = load_images(source, 8, memory_gb, skip_bad=True, cache=tmp_path / "cache")
        assert len(images) == 2 and labels.tolist() == [0, 1] and "skipped 1 of 3" in capsys.readouterr().out


def test_a_damaged_zip_and_empty_sources_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for source, message in ((write(tmp_path / "x", {"x.zip": b"PK"}) / "x.zip", "neither a folder nor a zip"),
                            (tmp_path / "empty", "no PNG"), (tmp_path / "gone", "does not exist"),
                            (write_zip(tmp_path / "e.zip", {}), "no PNG"),
                            (write(tmp_path / "z", {"1.png": b""}), "1.png")):
        with pytest.raises(UserError, match=message):
            load_images(source, 8)
    with pytest.raises(UserError, match="none of its 1 images"):
        load_images(tmp_path / "z", 8, skip_bad=True)


def test_a_set_larger_than_its_memory_is_mapped_from_a_file_and_reused(tmp_path, capsys):
    source = write(tmp_path / "x", {f"{c}/{i}.png": picture((i, 9, 9)) for c in "ab" for i in range(5)})
    a, labels = load_images(source, 8, cache=tmp_path / "c")
    for _ in range(2):
        b, mapped_labels = load_images(source, 8, memory_gb=0, cache=tmp_path / "c")
        assert torch.equal(a, b) and torch.equal(labels, mapped_labels)
        assert "memory-mapped" in capsys.readouterr().out
    assert len(list((tmp_path / "c").iterdir())) == 2
    write(source, {"a/9.png": picture("red")})  # another content, another file
    assert len(load_images(source, 8, memory_gb=0, cache=tmp_path / "c")[0]) == 11


def test_cifar10_in_its_binary_version(tmp_path):
    rng, files = np.random.default_rng(0), {}
    records = rng.integers(0, 256, (50_000, 3073), dtype=np.uint8)
    records[:, 0] %= 10
    for i in range(5):
        files[f"cifar-10-batches-bin/data_batch_{i + 1}.bin"] = records[i * 10_000:(i + 1) * 10_000].tobytes()
    write(tmp_path, files)
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz", compresslevel=0) as archive:
        archive.add(tmp_path / "cifar-10-batches-bin", "cifar-10-batches-bin")
    for source in (tmp_path / "cifar-10-batches-bin", tmp_path / "c.tar.gz"):
        images, labels = load_images(source, 32)
        assert images.shape == (50_000, 3, 32, 32) and images[41_000, 2, 5, 7] == records[41_000, 1 + 2 * 1024 + 5 * 32 + 7]
        assert torch.equal(labels, torch.from_numpy(records[:, 0]).long())
    with pytest.raises(UserError, match="image_size 32"):
        load_images(source, 16)
    broken = tmp_path / "broken.tar.gz"
    broken.write_bytes((tmp_path / "c.tar.gz").read_bytes()[:1_000_000])
    with pytest.raises(UserError, match="broken.tar.gz is not CIFAR-10"):
        load_images(broken, 32)
    (tmp_path / "cifar-10-batches-bin/data_batch_3.bin").write_bytes(b"short")
    with pytest.raises(UserError, match="is not CIFAR-10"):
        load_images(tmp_path / "cifar-10-batches-bin", 32)


@pytest.fixture
def server():
    """A server on the loopback address: /right gives the content, /short breaks off in the middle, anything else is 404."""
    content = bytes(range(256)) * 1000

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path in ("/right", "/short") else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content if self.path == "/right" else content[:1000])

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", content
    server.shutdown()
    server.server_close()


def test_downloads_are_checked(tmp_path, server):
    url, content = server
    target, md5 = tmp_path / "sub" / "file", hashlib.md5(content).hexdigest()
    for address, digest, message in ((f"{url}/right", "0000", "is not the file"), (f"{url}/short", md5, "broke off"),
                                     (f"{url}/gone", md5, "404"), ("http://127.0.0.1:9/x", md5, "could not download")):
        with pytest.raises(UserError, match=message):
            download(address, target, "md5", digest)
        assert not list(target.parent.iterdir())
    assert download(f"{url}/right", target, "md5", md5).read_bytes() == content
    assert download(f"{url}/gone", target, "md5", md5) == target  # there already


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "a" / "x.bin"
    with writing(path) as file:
        file.write(b"old")
    with pytest.raises(KeyError):
        with writing(path) as file:
            file.write(b"new")
            raise KeyError
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path, cfg = tmp_path / "x.pt", common.Settings()
    save(path, cfg, a=torch.zeros(3))
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
        with pytest.raises(UserError, match="could not write .*x.pt.*untouched"):
            save(path, cfg, a=torch.zeros(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert torch.load(path, weights_only=True)["a"].shape == (3,) and list(tmp_path.iterdir()) == [path]


def test_settings_come_from_the_dataclass_then_the_preset_then_the_command_line(stage):
    s = stage("03")
    read = lambda *a: read_settings(s.Config, s.PRESETS, s.__doc__, a)
    assert read().preset == "shapes" and read("--preset", "cifar10").base == 96
    cfg = read("--preset", "cifar10", "--base", "64", "--mult", "1,1,2", "--no-flip", "--schedule", "cosine")
    assert (cfg.base, cfg.mult, cfg.flip, cfg.schedule, cfg.lr) == (64, (1, 1, 2), False, "cosine", 2e-4)


@pytest.mark.parametrize("number", ["01", "02", "03", "04", "05"])
def test_every_setting_has_a_help_text_and_every_preset_holds_known_settings(stage, number, capsys):
    s = stage(number)
    assert list(s.PRESETS) == ["shapes", "cifar10_quick", "cifar10", "ffhq64", "imagenet64"]
    for preset in s.PRESETS:
        read_settings(s.Config, s.PRESETS, s.__doc__, ["--preset", preset])
    with pytest.raises(SystemExit):
        read_settings(s.Config, s.PRESETS, s.__doc__, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in s.Config.__dataclass_fields__:
        assert f"--{name}" in text
    assert "--seed SEED everything random follows from it [0]" in text
