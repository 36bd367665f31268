"""Read images: CIFAR-10, or a folder or zip of images. load_data() in common.py calls this.

What people have on their disks is varied: other sizes, transparent pictures, hidden folders, labels
in many forms. What is common is read, and said in one line. What is rare is refused, in a line that
names extras/prepare_images.py, which makes a plain zip of almost anything.
"""
import hashlib
import io
import json
import math
import os
import re
import tarfile
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from common import RANK, UserError, download, read, require, save, say, wait_for_all

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"  # 170 MB; has no pickles
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# Hidden files and folders, what macOS adds to a zip, and the entries of a zip that are folders.
HIDDEN = re.compile(r"(^|/)(\.[^/]|__MACOSX/)|/$")


def describe(source, images, labels, names):
    """A line about a data set; with the name and size of each class, if there are at most 20."""
    height, width = images.shape[2:]
    line = f"data | {len(images):,} images of {width}x{height} from {source}"
    if labels is None:
        return line
    counts = Counter(labels.tolist())
    sizes = f"{min(counts.values()):,} to {max(counts.values()):,} images each"
    if len(counts) <= 20:
        known = dict(enumerate(names))
        sizes = ", ".join(f"{known.get(y, y)} {n:,}" for y, n in sorted(counts.items()))
    return f"{line} | {len(counts):,} classes: {sizes}"


def read_source(source, image_size):
    """(images, labels, names of the classes, notes) of load_data() in common.py."""
    if source == "cifar10" or str(source).endswith(".tar.gz"):
        images, labels = read_cifar10(source, image_size)
        return images, labels, CIFAR10_CLASSES, ""
    return read_files(source, image_size)


def read_cifar10(path, image_size):
    """(images, labels) of CIFAR-10's binary version, in files of 10,000 records.

    A record is a label byte and 3,072 pixel bytes.
    """
    if path == "cifar10":
        instead = "give --data the path of a zip or folder of its images"
        path = download(CIFAR10_URL, CIFAR10_SHA256, instead)
    require(image_size in (None, 32), f"{path} holds 32x32 images: set --image_size 32")
    try:
        parts = []
        with tarfile.open(path) as archive:  # nothing is unpacked to the disk
            for i in range(1, 6):
                file = archive.extractfile(f"cifar-10-batches-bin/data_batch_{i}.bin")
                parts.append(np.frombuffer(file.read(30_730_000), np.uint8).reshape(10_000, 3073))
        table = torch.from_numpy(np.concatenate(parts))
    except Exception as error:  # a damaged archive can fail in many ways
        raise UserError(f"{path} is not CIFAR-10's binary version, or damaged: {error}") from error
    return table[:, 1:].reshape(-1, 3, 32, 32), table[:, 0].long()


def read_files(path, image_size):
    """load_data() for a folder or zip, with notes for its line.

    What is rare is refused, in a line that names extras/prepare_images.py.
    """
    # 1. The files, under names like cat/1.png.
    path = Path(path).expanduser()
    files, read_bytes = list_files(path)
    names = sorted(name for name in files if name.lower().endswith(SUFFIXES))
    others = files.keys() - {"dataset.json", *names}
    suffixes = Counter(Path(name).suffix.lower() or "without a suffix" for name in others)
    prepare = f"python extras/prepare_images.py {path} new.zip"
    require(names, f"{path} holds no {', '.join(SUFFIXES)} (left out: {listed(suffixes)}). "
            f"{prepare} reads more")

    # 2. The labels: those of dataset.json, or the folders.
    below = [name for name in files if name.endswith("/dataset.json")]
    require(not below, f"{path}: {below[:1]} is not at the top. {prepare} reads it there")
    if "dataset.json" in files:
        try:
            labels, classes = read_labels(read_bytes(files["dataset.json"]), names)
        except Exception as error:  # it can be wrong in many ways
            raise UserError(f"{path}: dataset.json must give a whole number to all images, as in "
                            f'{{"labels": [["a/0.png", 3], ...]}} ({error!r}). {prepare} reads '
                            "more forms") from error
    else:
        labels, classes = class_folders(names)

    # 3. The pixels: decoded once, into a file whose name changes with the images. It is mapped.
    sources = [files[name] for name in names] if path.is_dir() else [path]
    stamps = [(stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, sources)]
    version = repr((str(path.resolve()), image_size, names, stamps)).encode()
    cache = Path("data/cache", f"{hashlib.sha256(version).hexdigest()[:16]}.pt")
    if RANK == 0 and not is_whole(cache):
        say(f"reading {len(names):,} images from {path} into {cache}")
        cache.parent.mkdir(parents=True, exist_ok=True)
        shape, bad, changed = None, [], Counter()
        with tempfile.NamedTemporaryFile(dir=cache.parent) as file:  # each run has its own
            for name in names:  # threads were not faster: most of the time is Python's
                try:
                    image, changes = read_image(read_bytes(files[name]), image_size)
                    shape = shape or image.shape
                    require(image.shape == shape, f"is {image.shape}, and {names[0]} is {shape}")
                    file.write(image.tobytes())
                    changed.update(changes)
                except Exception as error:  # so can an image
                    bad.append(f"{name} ({str(error).partition(' <_io')[0]})")
            more = f" and {len(bad) - 10:,} more" if len(bad) > 10 else ""
            require(not bad, f"{path}: {len(bad):,} of {len(names):,} images cannot be read: "
                    f"{', '.join(bad[:10])}{more}. Remove them, or {prepare} leaves them out")
            file.flush()
            size = len(names) * math.prod(shape)
            images = torch.from_file(file.name, size=size, dtype=torch.uint8)
            own = f"{cache}.{os.getpid()}"  # another run may be writing the same
            save(own, images=images.view(len(names), *shape), changed=listed(changed))
            os.replace(own, cache)
    wait_for_all()
    content = read(cache, checksums=False)
    notes = f" | changed: {content['changed']} | left out: {listed(suffixes)}"
    return content["images"], labels, classes, notes


def list_files(path):
    """{name: file} of a folder or zip, and the function that reads such a file."""
    require(path.exists(),
            f"{path} does not exist: --data is shapes, cifar10, or a folder or zip of images")
    if path.is_dir():
        found = [(file.relative_to(path).as_posix(), file) for file in files_below(path)]
        read_bytes = Path.read_bytes
    else:
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise UserError(f"{path} is neither a folder nor a zip of images: {error}") from error
        found = [(entry.filename.replace("\\", "/"), entry) for entry in archive.infolist()]
        read_bytes = archive.read
    files = {}
    for name, file in found:
        require(name not in files, f"{path} holds two files named {name}. Remove one")
        if not HIDDEN.search(name):
            files[name] = file
    return files, read_bytes


def files_below(folder):
    """Yields the files in a folder and below. Links are followed, but not back to one above."""
    for path in folder.iterdir():
        if not path.is_dir():
            yield path
        elif not any(path.samefile(above) for above in path.parents):
            yield from files_below(path)


def read_labels(content, names):
    """class_folders() from the bytes of a dataset.json. Raises errors of many kinds."""
    dataset = json.loads(content)
    given = dict(dataset["labels"] or [])
    if not given:
        return None, []
    require(len(given) == len(dataset["labels"]), "an image is named twice")
    numbers = torch.tensor([given[name] for name in names])
    labels = numbers.long()
    require(labels.ndim == 1 and (labels == numbers).all(), "a label is not a whole number")
    classes = list(map(str, dataset.get("classes") or []))
    require(not classes or labels.max() < len(classes), "it names fewer classes than it has")
    return labels, classes


def class_folders(names):
    """(labels int64 (N,), names of the classes): each folder is a class. One folder: (None, [])."""
    folders = [os.path.dirname(name) or "." for name in names]
    classes = sorted(set(folders))
    if len(classes) < 2:
        return None, []
    if all(map(str.isdecimal, classes)):
        classes.sort(key=int)  # 2 before 10
    number = {folder: i for i, folder in enumerate(classes)}
    return torch.tensor([number[folder] for folder in folders]), classes


def read_image(content, image_size):
    """(uint8 (3, H, W), what was changed: a list) of an image file's bytes. Raises many errors."""
    with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as image:
        image = ImageOps.exif_transpose(image)  # a phone's photo may lie on its side, and says so
    require(not image.mode.startswith("I"), "16-bit grey")
    changes = []
    if Image.getmodebase(image.mode) == "L":
        changes.append("grey")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            changes.append("transparent (composited on white)")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if image_size:
        if image.width != image.height:
            changes.append("cropped to the centre square")
        if min(image.size) < image_size:
            changes.append("enlarged")
        image = ImageOps.fit(image, (image_size, image_size), Image.LANCZOS)
    return np.asarray(image).transpose(2, 0, 1), changes


def is_whole(cache):
    """Whether the file of decoded images is there, and not cut off."""
    try:
        return bool(read(cache, checksums=False))
    except UserError:
        return False


def listed(counts):
    """The most frequent of a Counter, as text: 30 .bmp, 5 .gif."""
    return ", ".join(f"{n:,} {name}" for name, n in counts.most_common(9)) or "nothing"
