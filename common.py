"""What two or more of the five scripts share. Read the U-Net, euler and Trainer; the rest is plumbing.

Notation, the same in every script and in the equations:

    z      noise N(0, I), shape (B, 3, H, W)
    x      image in [-1, 1], real or made by a network, shape (B, 3, H, W)
    t      time, shape (B,): t = 0 is noise, t = 1 is data
    x_t    t x + (1 - t) z, a point on the straight line from z to x
    v      velocity: what every network predicts, as v(x_t, t). Along the straight line it is x - z

Images are uint8 on disk, float in [-1, 1] everywhere else. Labels are int64 (B,), or None.

Constants carry their origin: "paper:" (Zhu, Liu, Liu: SlimFlow, arXiv 2407.12718), "official code:" (only in
the code that its authors published) or "ours:". The settings of cifar10 and ffhq64 are the paper's unless the
text says otherwise; those of the other presets are ours.
"""
import argparse
import concurrent.futures
import contextlib
import copy
import datetime
import hashlib
import io
import json
import math
import os
import re
import signal
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

PRESETS = ("shapes", "cifar10_quick", "cifar10", "ffhq64", "imagenet64")  # the columns of the settings
PRESET = "shapes"  # the column in use; --preset NAME chooses another for one run

# Training draws t from [EPS, 1] and sampling begins at EPS: a network is asked only what it was taught.
EPS = 1e-3  # official code: 0.001, inherited from diffusion models, which divide by t
# Noise is numbered. Each use has numbers of its own: no image that is judged comes from a noise trained on.
PAIRS, OWN_PAIRS, EVALUATION = 0, 10**9, 2 * 10**9
# `torchrun --nproc_per_node=8 01_train_teacher.py` starts 8 processes, one for each GPU; else there is one.
# They divide the batch among them: its size stays, and only the random draws of training differ.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class UserError(ValueError):
    """Something that the user can mend. run() prints it as one line, without a traceback."""


def require(condition, message):
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def read_settings(table, doc, argv=None):
    """A script's settings as attributes: the preset's column of its table, then the command line's."""
    def int_tuple(text):
        return tuple(int(part) for part in text.split(","))  # "1,2,2" -> (1, 2, 2)

    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, add_help=False)
    parser.add_argument("--preset", default=PRESET, choices=PRESETS, help=f"column of settings [{PRESET}]")
    preset = parser.parse_known_args(argv)[0].preset
    parser.add_argument("--help", "-h", action="help", help="show this, with the values of the preset")
    parser.add_argument("--out", default="out", help="results go into <out>/<preset>/ [out]")
    parser.add_argument("--seed", type=int, default=0, help="all random numbers follow from it [0]")
    parser.add_argument("--device", default="auto", help="auto (cuda if there is any), cpu, cuda:1, mps")
    parser.add_argument("--restart", action="store_true", help="start over instead of continuing")
    parser.add_argument("--allow_mixed", action="store_true", help="accept files made from replaced ones")
    for name, *values, text in table:
        value = values[PRESETS.index(preset)]
        how = {"type": int_tuple if isinstance(value, tuple) else type(value)}
        if isinstance(value, bool):
            how = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(f"--{name}", default=value, help=f"{text} [%(default)s]", **how)
    cfg = parser.parse_args(argv)
    for name, value in vars(cfg).items():
        require(not isinstance(value, (int, float)) or 0 <= value < math.inf,
                f"--{name} {value} must be finite, and not negative")
    cfg.folder = Path(cfg.out, cfg.preset)
    return cfg


def settings_of(cfg):
    """The settings that a result depends on, as a dict."""
    others = ("out", "folder", "device", "restart", "allow_mixed")
    return {name: value for name, value in vars(cfg).items() if name not in others}


def require_same_run(path, then, now):
    """Raises UserError unless the run that left `path` had the same settings. then, now: dicts."""
    differ = [f"{key} was {then.get(key)}, is {now[key]}" for key in now if then.get(key) != now[key]]
    require(not differ, f"{path} belongs to a run with other settings ({'; '.join(differ)}). "
            "--restart starts over; another --out keeps both")


def run(main, table, doc, argv=None):
    """Calls main(settings). What the user can mend ends in one line and exit code 1, without a traceback."""
    try:
        if WORLD == 1:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same as Ctrl-C
        main(read_settings(table, doc, argv))
        if dist.is_initialized():
            dist.destroy_process_group()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        sys.exit(str(stop) or "stopped: what was saved is kept, and the same command continues")
    except torch.OutOfMemoryError:
        sys.exit("error: out of GPU memory: a smaller --batch (02, 05: BATCH), or more processes, need less")


def start(cfg, name):
    """Joins the other processes if there are any, prints the settings, and returns the torch.device."""
    if WORLD > 1 and not dist.is_initialized():  # a process that waits for another one for an hour gives up
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=1))
    device = cfg.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    has_bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    try:
        if device.startswith("cuda"):
            torch.cuda.set_device(int(device[5:] or os.environ.get("LOCAL_RANK", 0)))
            torch.backends.cudnn.allow_tf32 = False  # fp32 means float32
            torch.backends.cudnn.benchmark = True  # look for the fastest convolution
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        device = torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"--device {cfg.device} cannot be used: {str(error).splitlines()[0]}") from error
    if getattr(cfg, "precision", "") == "auto":
        cfg.precision = "bf16" if has_bf16 else "fp32"
    require(getattr(cfg, "precision", "fp32") in ("fp32", "bf16"), "--precision is fp32, bf16 or auto")
    torch.manual_seed(cfg.seed)  # the networks' first weights
    say(f"{name} | {device} x {WORLD}, {torch.get_num_threads()} threads | torch {torch.__version__}")
    say("settings | " + " ".join(f"{key}={value}" for key, value in settings_of(cfg).items()))
    return device


def say(text):  # in process 0
    if RANK == 0:
        print(text, flush=True)


def wait_for_all():
    """Returns when every process has come here."""
    if WORLD > 1:
        dist.barrier()


# ----------------------------------------------------------------------------------------- files and pictures
# An artifact (.pt) is a dict. `id` is a fingerprint of its content, `made_from` {file name: id} of all that
# it was made from, so that nothing is mixed unnoticed.

def fingerprint(*tensors):
    """16 hexadecimal digits that change with any bit of the tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def writing(path):
    """`with writing(path) as file:` gives a binary file that gets its name only when it is complete."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns an OSError into a RuntimeError
        raise UserError(f"could not write {path}, kept the old one: {error.__context__ or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def save(path, **content):
    """Writes a dict as a .pt file, whole or not at all."""
    with writing(path) as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())  # on the disk before it replaces what was there


def read(path):
    """The dict in a .pt file, its tensors memory-mapped. No code is unpickled. UserError if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch's files are zips, with checksums
            require(archive.testzip() is None, "a checksum is wrong")
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except Exception as error:  # a damaged zip can fail in a dozen ways
        raise UserError(f"{path} is damaged or not one of ours ({str(error)[:60]!r}): delete it") from error


def load(cfg, name):
    """The artifact <out>/<preset>/<name>. It gets a "lineage": the made_from of what is made from it."""
    path, stage = cfg.folder / name, f"Run stage {name[:2]} for --preset {cfg.preset} --out {cfg.out}"
    require(path.exists(), f"{path} is missing. {stage} first")
    artifact = read(path)
    made_from, preset = artifact.get("made_from"), artifact.get("preset")
    require(preset == cfg.preset, f"{path} was made with --preset {preset}. {stage} again, with --restart")
    for parent, identity in made_from.items():
        if (cfg.folder / parent).exists() and not cfg.allow_mixed:
            require(read(cfg.folder / parent)["id"] == identity, f"{path} is out of date: it was made from "
                    f"another {parent} than the one beside it. {stage} again, with --restart")
    return {**artifact, "lineage": {**made_from, name: artifact["id"]}}


def save_network(cfg, name, net, made_from):
    """Process 0 writes the weights, and the arguments that build the network, as <out>/<preset>/<name>."""
    if RANK == 0:
        weights = {key: value.cpu() for key, value in net.state_dict().items()}
        save(cfg.folder / name, id=fingerprint(*weights.values()), made_from=made_from, preset=cfg.preset,
             settings=settings_of(cfg), network=net.args, weights=weights)


def load_network(cfg, name, device):
    """(UNet in eval mode, its artifact) from what save_network wrote. Raises UserError as load() does."""
    artifact = load(cfg, name)
    try:
        net = UNet(**artifact["network"])
        net.load_state_dict(artifact["weights"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{cfg.folder / name} is not the network it says: {str(error)[:80]!r}") from error
    return on_device(net, device, cfg.precision).eval(), artifact


def download(url, sha256, instead):
    """The path data/<file name> of a published file, downloaded once. UserError says what to do `instead`."""
    path = Path("data", url.split("/")[-1])
    try:
        if RANK == 0 and not path.exists():
            path.parent.mkdir(exist_ok=True)
            say(f"downloading {url}")
            torch.hub.download_url_to_file(url, path, hash_prefix=sha256)
        wait_for_all()
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        require(found.startswith(sha256), f"the sha256 of {path} is {found}")
    except (OSError, RuntimeError, UserError) as error:
        raise UserError(f"no {url} ({error}). Put it at {path}, or {instead}") from error
    return path


def save_grid(path, rows, titles=None, columns=()):
    """Process 0 writes a PNG: a row of images for each float tensor (N, 3, H, W), with titles above them."""
    if RANK > 0:
        return
    size = rows[0].shape[-1]
    cell, bar, top = size * max(1, 64 // size) + 2, 18 if titles else 0, 32 if columns else 0
    canvas = Image.new("RGB", (len(rows[0]) * cell + 2, top + len(rows) * (cell + bar) + 2), "white")
    draw = ImageDraw.Draw(canvas)
    for i, column in enumerate(columns):  # "red circle" in two lines
        draw.text((i * cell + 4, 2), column.replace(" ", "\n"), "black", font_size=12)
    for r, row in enumerate(rows):
        y = top + r * (cell + bar)
        if titles:
            draw.text((4, y + 2), titles[r], "black", font_size=12)
        for i, image in enumerate(to_uint8(row.cpu())):
            tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((cell - 2, cell - 2), Image.NEAREST)
            canvas.paste(tile, (i * cell + 2, y + bar + 2))
    with writing(path) as file:
        canvas.save(file, "PNG")


# ------------------------------------------------------------------------------------------------------ data
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"  # 170 MB: the version without pickles
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
SHAPES = ("circle", "square", "triangle")
COLOURS = {"red": (230, 60, 50), "yellow": (235, 205, 60), "green": (70, 190, 80),
           "cyan": (70, 195, 215), "blue": (70, 100, 235), "magenta": (215, 80, 205)}
CLASSES = [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS]  # of `shapes`; a label is an index


def from_uint8(images):
    return images.float() / 127.5 - 1  # 0..255 -> float32 -1..1


def to_uint8(images):
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)  # -1..1, clipped -> 0..255


def noise_for(seed, indices, shape):
    """Noise z ~ N(0, I) for each index, float32 (len(indices), *shape): a function of (seed, index) alone."""
    noise = torch.empty(len(indices), *shape)
    for row, index in zip(noise.numpy(), indices):
        philox = np.random.Philox(key=np.array([seed, index], dtype=np.uint64))  # a generator with a key
        np.random.Generator(philox).standard_normal(out=row, dtype=np.float32)
    return noise


def labels_for(seed, n, classes):
    """n labels, int64, uniform over the classes; None if there are none."""
    return torch.from_numpy(np.random.default_rng(seed).integers(classes, size=n)) if classes else None


def draw_shapes(n, image_size, seed=0):
    """n drawings of a circle, square or triangle, always the same for a seed: images uint8 (n, 3, H, W), and
    their labels int64 (n,), numbers of CLASSES."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(len(CLASSES), size=n)
    radius = rng.uniform(0.18, 0.34, size=n)  # in units of the image's side
    centre_x, centre_y = rng.uniform(radius + 0.03, 0.97 - radius, size=(2, n))
    ground = rng.uniform(10, 60, size=(n, 1)) + rng.uniform(-8, 8, size=(n, 3))  # nearly grey
    ink = np.array(list(COLOURS.values()))[labels % len(COLOURS)] + rng.uniform(-20, 20, size=(n, 3))
    images = np.empty((n, 3, image_size, image_size), dtype=np.uint8)
    pixel = (np.arange(image_size) + 0.5) / image_size
    for i in range(n):
        x = np.abs(pixel[None, :] - centre_x[i]) / radius[i]  # (1, W), in radii; all shapes are symmetric
        y = (pixel[:, None] - centre_y[i]) / radius[i]  # (H, 1), downwards
        # The distance from the outline, in radii, negative inside: of each shape.
        distance = (np.hypot(x, y) - 1, np.maximum(x, np.abs(y)) - 0.85,
                    np.maximum(0.884 * x - 0.467 * (y + 1), y - 0.8))[labels[i] // len(COLOURS)]
        # Antialiasing: a pixel within half a pixel of the outline is covered in part.
        cover = np.clip(0.5 - distance * radius[i] * image_size, 0, 1)
        pixels = cover * ink[i, :, None, None] + (1 - cover) * ground[i, :, None, None]
        images[i] = pixels.round().clip(0, 255)
    return torch.from_numpy(images), torch.from_numpy(labels)


def load_images(source, image_size):
    """A data set: images uint8 (N, 3, H, W), and labels int64 (N,) or None. UserError names a wrong file.

    source: "shapes" (drawn), "cifar10" (downloaded), or a path: of CIFAR-10's binary version (.tar.gz), or
    of images, a folder or zip. There, as in EDM, dataset.json has labels, {"labels": [["a/0.png", 3], ...]};
    without it each folder is a class. Images of other sizes than image_size are cropped to the centre square
    and resized; with None all have one size already.
    """
    if source == "shapes":
        return draw_shapes(16_384, image_size or 16)
    path = download(CIFAR10_URL, CIFAR10_SHA256, "give a path") if source == "cifar10" else Path(source)
    require(path.exists(), f"{path} does not exist: --data is shapes, cifar10, or a folder or zip of images")
    if not path.name.endswith(".tar.gz"):
        return read_files(path, image_size)
    # CIFAR-10's binary version: 5 x 10,000 records of a label byte and 3,072 pixel bytes.
    require(image_size in (None, 32), f"{path} holds 32x32 images: set --image_size 32, not {image_size}")
    try:
        with tarfile.open(path) as archive:  # nothing is unpacked to the disk
            files = [archive.extractfile(f"cifar-10-batches-bin/data_batch_{i}.bin").read(30_730_000)
                     for i in range(1, 6)]
        table = torch.frombuffer(bytearray().join(files), dtype=torch.uint8).view(50_000, 3073)
    except Exception as error:  # a damaged archive can fail in many ways
        raise UserError(f"{path} is not CIFAR-10 in its binary version, or is damaged: {error}") from error
    return table[:, 1:].reshape(-1, 3, 32, 32), table[:, 0].long()


def read_files(path, image_size):
    """load_images for a folder or zip: decoded once into data/cache/<key>.npy, then memory-mapped."""
    # 1. The files: {name: (bytes, date or checksum)}.
    try:
        archive = None if path.is_dir() else zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path} is neither a folder nor a zip that can be read: {error}") from error
    if archive:
        files = {info.filename: (info.file_size, info.CRC) for info in archive.infolist()}
    else:
        stats = {file.relative_to(path).as_posix(): file.stat() for file in path.rglob("*") if file.is_file()}
        files = {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
    ignored = r"(^|/)(\.[^/]*|__MACOSX/.*|Thumbs\.db|dataset\.json)$|/$"
    names = [name for name in sorted(files) if not re.search(ignored, name)]
    require(names, f"{path} holds no PNG, JPEG or WebP images")

    def content(name):
        require(files[name][0] < 10**8, "it has more than 100 MB")  # a small zip may unpack to gigabytes,
        # and may lie about a size: read no more than it says.
        return archive.open(name).read(files[name][0] + 1) if archive else (path / name).read_bytes()

    # 2. Labels.
    labels, folders = None, sorted({name.rpartition("/")[0] for name in names})
    if "dataset.json" in files:
        try:
            given = dict(json.loads(content("dataset.json"))["labels"] or {})
            labels = [given.pop(name) for name in names] if given else None
            integers = all(type(label) is int and label >= 0 for label in labels or [])
            require(integers and not given, f"{list(given)[:1] or 'a label that is not 0, 1, ...'}")
        except (KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f'{path}: dataset.json must be {{"labels": [["a/0.png", 3], ...]}} for all images'
                            f' or {{"labels": null}}; wrong is {error}') from error
    elif len(folders) > 1:
        labels = [folders.index(name.rpartition("/")[0]) for name in names]

    # 3. The pixels.
    def pixels(name):
        try:
            with Image.open(io.BytesIO(content(name)), formats=("PNG", "JPEG", "WEBP")) as image:
                image = ImageOps.exif_transpose(image)  # a phone's photo may lie on its side, and says so
            if image.mode.startswith("I"):  # 16-bit grey
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            image = image.convert("RGB")
            if image_size:  # the centre square, resized
                image = ImageOps.fit(image, (image_size, image_size), Image.LANCZOS)
            return np.asarray(image).transpose(2, 0, 1)
        except Exception as error:  # so can a damaged image
            raise UserError(f"{path}: {name} is no usable PNG, JPEG or WebP image ({error})") from error

    version = repr((str(path.resolve()), image_size, sorted(files.items()))).encode()
    cache = Path("data", "cache", f"{hashlib.sha256(version).hexdigest()[:16]}.npy")
    if RANK == 0 and not cache.exists():
        say(f"reading {len(names):,} images from {path} into {cache}")
        shape = pixels(names[0]).shape
        with writing(cache) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(names), *shape)}
            np.lib.format.write_array_header_1_0(file, header)
            for name in names:
                image = pixels(name)
                require(image.shape == shape, f"{path}: {name} is {image.shape}, and {names[0]} is {shape}")
                file.write(image.tobytes())
    wait_for_all()
    # Mode "c": a tensor has to be writable, but what is written never reaches the file.
    return torch.from_numpy(np.load(cache, mmap_mode="c")), None if labels is None else torch.tensor(labels)


# ----------------------------------------------------------------------------------------------------- U-Net
# The paper's network (NCSN++, as "DDPM++"; EDM calls it SongUNet). An encoder halves the image step by step,
# a decoder doubles it again, and gets at each size what the encoder left there: the skips.
# The student of `shapes` (image_size 16, base 12, mult (1, 2), blocks 1, attn (8,)), channels and size:
#
#     conv_in                              3 -> 12   16x16   leaves 12
#     encoder  block                      12 -> 12   16x16   leaves 12
#              block, halving             12 -> 12    8x8    leaves 12
#              block, attention           12 -> 24    8x8    leaves 24
#     middle   block, attention; block    24 -> 24    8x8
#     decoder  2 blocks, attention        24 -> 24    8x8    take 24, 12 (appended: the first sees 48)
#              doubling; 2 blocks         24 -> 12   16x16   take 12, 12
#     conv_out                            12 -> 3    16x16

# Official code: the scale of each branch's last layer. So blocks begin by passing on their input (scaled),
# and the network by answering 0; training adds to that little by little, which deep networks learn best.
NEARLY_ZERO = 1e-10


def init_(layer, scale=1.0):
    """Official code: Xavier-uniform weights with their variance multiplied by `scale`, biases 0."""
    nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(scale))
    nn.init.zeros_(layer.bias)
    return layer


class GroupNorm(nn.GroupNorm):
    """In groups of 4 channels or more, at most 32 of them. Its result has the type of its input."""

    def __init__(self, channels):
        groups = min(channels // 4, 32)
        require(groups and channels % groups == 0, f"{channels} channels make no groups: --base must be a "
                "multiple of 4, and of 32 if there are more than 128")
        super().__init__(groups, channels, eps=1e-6)

    def forward(self, x):
        if x.dtype == torch.float32:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):  # it makes all float32 on GPUs: twice the bytes
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Every pixel looks at every pixel: one head over all channels, added to its input."""

    def __init__(self, channels):
        super().__init__()
        self.norm = GroupNorm(channels)
        self.qkv = init_(nn.Conv2d(channels, 3 * channels, 1), 0.2)
        self.proj = init_(nn.Conv2d(channels, channels, 1), NEARLY_ZERO)

    def forward(self, x):
        b, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).view(b, 3, 1, c, height * width).transpose(3, 4)
        if x.device.type != "cpu":
            qkv = qkv.contiguous()  # a GPU's fused attention wants the channels last in memory
        h = F.scaled_dot_product_attention(*qkv.unbind(1))  # q, k, v (B, 1, HW, C) -> (B, 1, HW, C)
        h = h.transpose(2, 3).reshape(b, c, height, width)
        return (x + self.proj(h)) * math.sqrt(0.5)


class ResBlock(nn.Module):
    """Two 3x3 convolutions that are told the time, added to their input. May halve or double the size."""

    def __init__(self, c_in, c_out, c_emb, dropout, attention=False, up=False, down=False):
        super().__init__()
        self.up = up
        self.resample = nn.Upsample(scale_factor=2) if up else nn.AvgPool2d(2) if down else nn.Identity()
        self.norm0 = GroupNorm(c_in)
        self.conv0 = init_(nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb = init_(nn.Linear(c_emb, c_out))
        self.norm1 = GroupNorm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = init_(nn.Conv2d(c_out, c_out, 3, padding=1), NEARLY_ZERO)
        self.skip = init_(nn.Conv2d(c_in, c_out, 1)) if c_in != c_out or up or down else nn.Identity()
        self.attention = Attention(c_out) if attention else nn.Identity()

    def forward(self, x, emb):
        h = self.conv0(self.resample(F.silu(self.norm0(x))))
        h = h + self.emb(emb)[:, :, None, None]
        h = self.conv1(self.dropout(F.silu(self.norm1(h))))
        x = self.skip(self.resample(x))
        return self.attention((x + h) * math.sqrt(0.5))  # a sum of two has twice the variance: undone


class UNet(nn.Module):
    """The velocity network v(x_t, t): base * mult[i] channels and `blocks` residual blocks on level i.

    Attention follows each block of the encoder, and the last one of the decoder, at the sizes `attn`; and the
    first block in the middle.
    """
    precision = "fp32"  # "bf16": all but the weights and the last layer in bfloat16

    def __init__(self, image_size, channels=3, base=64, mult=(1, 2, 2), blocks=2, attn=(16,), classes=0,
                 dropout=0.0):
        super().__init__()
        self.args = dict(image_size=image_size, channels=channels, base=base, mult=tuple(mult), blocks=blocks,
                         attn=tuple(attn), classes=classes, dropout=dropout)
        halvings = len(mult) - 1
        require(base >= 4 and blocks and min(mult) and dropout < 1,
                "a network needs base >= 4, blocks >= 1, mult >= 1, dropout < 1")
        require(image_size and image_size % 2**halvings == 0, f"image_size {image_size} must be a multiple "
                f"of {2**halvings}, to be halved {halvings} times for mult {tuple(mult)}")
        c_emb = 4 * base
        self.time0, self.time1 = init_(nn.Linear(base, c_emb)), init_(nn.Linear(c_emb, c_emb))
        self.label = init_(nn.Linear(classes, base)) if classes else None
        frequencies = torch.exp(torch.arange(base // 2) * -(math.log(10_000) / (base // 2 - 1)))
        self.register_buffer("frequencies", frequencies, persistent=False)  # from 1 to 1/10000
        self.conv_in = init_(nn.Conv2d(channels, base, 3, padding=1))

        c, size, skips = base, image_size, [base]  # skips: the channels that the encoder leaves
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        for level, m in enumerate(mult):
            for _ in range(blocks):
                self.encoder.append(ResBlock(c, base * m, c_emb, dropout, size in attn))
                c = base * m
                skips.append(c)
            if level < halvings:
                self.encoder.append(ResBlock(c, c, c_emb, dropout, down=True))
                size //= 2
                skips.append(c)
        self.middle = nn.ModuleList([ResBlock(c, c, c_emb, dropout, True), ResBlock(c, c, c_emb, dropout)])
        for level, m in reversed(list(enumerate(mult))):
            for i in range(blocks + 1):
                attention = i == blocks and size in attn
                self.decoder.append(ResBlock(c + skips.pop(), base * m, c_emb, dropout, attention))
                c = base * m
            if level > 0:
                self.decoder.append(ResBlock(c, c, c_emb, dropout, up=True))
                size *= 2
        self.norm_out = GroupNorm(c)
        self.conv_out = init_(nn.Conv2d(c, channels, 3, padding=1), NEARLY_ZERO)

    def embed(self, t, labels):
        """Time (B,) in [0, 1], and labels (B,) where there are classes -> (B, 4 base)."""
        assert (labels is None) == (self.label is None), "labels are for networks with classes"
        # Official code: 999 t, since this embedding was made for step numbers from 0 to 999.
        angles = 999 * t[:, None] * self.frequencies  # (B, base / 2)
        emb = torch.cat([angles.sin(), angles.cos()], dim=1)  # (B, base)
        if labels is not None:
            classes = self.label.in_features
            emb = emb + self.label(F.one_hot(labels, classes).to(emb.dtype) * math.sqrt(classes))
        return F.silu(self.time1(F.silu(self.time0(emb))))

    def forward(self, x, t, labels=None):
        """x (B, C, H, W), t (B,) in [0, 1], labels int64 (B,) or None -> velocity (B, C, H, W)."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            emb = self.embed(t, labels)
            h = self.conv_in(x)
            skips = [h]
            for block in self.encoder:
                h = block(h, emb)
                skips.append(h)
            for block in self.middle:
                h = block(h, emb)
            for block in self.decoder:
                if not block.up:
                    h = torch.cat([h, skips.pop()], dim=1)
                h = block(h, emb)
        # The last layer is float32 always: its rounding would be seen in the image.
        return self.conv_out(F.silu(self.norm_out(h.to(self.conv_out.weight.dtype))))


def on_device(net, device, precision):
    """The network on the device, computing in fp32 or bf16. CPUs are faster in fp32 with channels last."""
    net.precision = precision
    last = device.type == "cpu" and precision == "fp32"
    return net.to(device, memory_format=torch.channels_last if last else torch.contiguous_format)


def compiled(net, calls):
    """The network; on a CUDA GPU compiled, where so many calls pay for a minute's wait. That fuses all that
    lies between the convolutions. What cannot be traced runs as it is, and torch says why."""
    if next(net.parameters()).is_cuda and calls >= 5000:  # ours
        torch._dynamo.config.suppress_errors = True
        net.to(memory_format=torch.channels_last).compile(dynamic=False)  # the layout of tensor cores
    return net


# ------------------------------------------------------------------------------------- sampling and training
def draw_t(n, distribution, device):
    """n times t in [EPS, 1]: (n,)."""
    t = torch.rand(n, device=device)  # "uniform" (paper)
    if distribution == "early":  # more often near the noise: sampling in one call uses v(z, EPS) alone
        t = t**2
    elif distribution == "logit_normal":  # more often in the middle. Esser et al., 2403.03206
        t = torch.randn(n, device=device).sigmoid()
    else:
        require(distribution == "uniform", f"--t_distribution {distribution}: uniform, logit_normal or early")
    return EPS + (1 - EPS) * t


@torch.no_grad()
def euler(net, z, steps, labels=None):
    """Follows dx/dt = v(x, t) from noise z (B, C, H, W) to images (B, C, H, W), in `steps` network calls."""
    x = z
    for i in range(steps):
        # x <- x + v(x, t_i) / N,  t_i = EPS + (1 - EPS) i / N.  One step: x = z + v(z, EPS)
        t = torch.full(x.shape[:1], EPS + (1 - EPS) * i / steps, device=x.device)
        x = x + net(x, t, labels) / steps
    return x


def samples(net, seed, numbers, steps, labels=None):
    """Images (N, 3, H, W): from the noises of these numbers (a range) that stage 05 judges.

    labels: int64, labels[i] for number i; by default those of the seed.
    """
    device, size = net.conv_in.weight.device, net.args["image_size"]
    z = noise_for(seed, [EVALUATION + i for i in numbers], (net.args["channels"], size, size))
    y = labels_for(seed, numbers[-1] + 1, net.args["classes"]) if labels is None else labels
    y = None if y is None else y[list(numbers)].to(device)
    return euler(net, z.to(device), steps, y).cpu()


LOG_SECONDS, SAVE_SECONDS = 10, 300  # ours: between two log lines, and between two saved states


def learning_rate(step, cfg):
    """Rises over the first cfg.warmup steps, and falls to 0 over the last cfg.cooldown (a share of all)."""
    rise = min(1.0, (step + 1) / max(1, cfg.warmup))
    fall = min(1.0, (cfg.steps - step) / max(1.0, cfg.cooldown * cfg.steps))
    return cfg.lr * rise * fall


@torch.no_grad()
def ema_update(averages, weights, decay, n):
    """theta' <- d theta' + (1 - d) theta,  d = min(decay, (1 + n) / (10 + n)),  n = updates with this one.

    The weights theta (a list of tensors) jitter from batch to batch. Their moving averages theta' do not, and
    make better images. d rises with n, to forget the first weights. The paper's 0.999999 is out of reach (n =
    9 million), and 0.999 in the short runs of `shapes`: there d = (1 + n) / (10 + n) throughout.
    """
    d = min(decay, (1 + n) / (10 + n))
    torch._foreach_lerp_(averages, weights, 1 - d)


class Muon(torch.optim.Optimizer):
    """Steps along the momentum made orthogonal, which learns all directions of a weight matrix equally fast.

    Jordan et al. 2024. A convolution is the matrix (C_out, C_in k k) here; those of one shape step together.
    The judge of 05 names 99.6 % of the teacher's `shapes` as asked with it, 97.9 % with Adam (one seed).
    """

    def __init__(self, params):
        groups = {}
        for p in params:
            groups.setdefault(p.flatten(1).shape, []).append(p)
        super().__init__([{"params": group} for group in groups.values()], {"lr": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            gradient = torch.stack([p.grad.flatten(1) for p in group["params"]])
            momentum = self.state[group["params"][0]].setdefault("momentum", torch.zeros_like(gradient))
            momentum.lerp_(gradient, 0.05)
            x = gradient.lerp(momentum, 0.95)  # Nesterov's: a look ahead
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-12)
            for _ in range(5):  # Newton-Schulz: takes all singular values to between 0.7 and 1.2
                a = x @ x.mT
                b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)  # b = -4.7750 a + 2.0315 a a
                x = torch.baddbmm(x, b, x, beta=3.4445)  # x <- 3.4445 x + b x
            updates = [update.view_as(p) for p, update in zip(group["params"], x)]
            size = 0.2 * math.sqrt(max(x.shape[1:]))  # weights change by 0.2 lr on average, as Adam's do
            torch._foreach_sub_(group["params"], updates, alpha=size * group["lr"])


class Trainer:
    """What surrounds a training step: optimiser, clipping, learning rate, EMA, log lines, resume, processes.

    The loop is `for step in trainer.steps()`. It calls trainer.net on what trainer.draw() gives, ends in
    trainer.update(loss). trainer.ema is the averaged network: only this one makes images and is saved.
    Before each step torch's generators are seeded from (seed, step, process): a run that continues draws what
    the unbroken one would have drawn, and no random state has to be saved.
    """

    def __init__(self, cfg, name, net, made_from):
        require(cfg.steps and cfg.batch and cfg.batch % WORLD == 0, f"--steps {cfg.steps} and --batch "
                f"{cfg.batch} must be at least 1, and the batch a multiple of the {WORLD} processes")
        self.cfg, self.name, self.path = cfg, name, cfg.folder / f"{name[:2]}_state.pt"
        self.batch = cfg.batch // WORLD  # of this process
        self.trained = compiled(net, cfg.steps).train()  # with dropout
        self.ema = copy.deepcopy(net).eval().requires_grad_(False)  # without
        self.weights, self.averages = list(net.parameters()), list(self.ema.parameters())
        self.device = self.weights[0].device
        require(cfg.optimizer in ("adam", "muon"), f"--optimizer {cfg.optimizer}: choose adam or muon")
        hidden = {name: p for name, p in net.named_parameters()  # the 3x3 convolutions but the first and last
                  if cfg.optimizer == "muon" and p.shape[2:] == (3, 3) and min(p.shape[:2]) > 3}
        rest = [p for name, p in net.named_parameters() if name not in hidden]
        self.optimizers = [torch.optim.Adam(rest, betas=(0.9, 0.999), eps=1e-8, fused=True)]  # paper
        if hidden:
            self.optimizers.append(Muon(hidden.values()))
        self.done, self.recent, self.note = 0, [], ""  # steps done; of the last ones (loss, gradient norm)
        # See draw(). The thread that reads ahead must not have further threads, which would slow training.
        self.reader = concurrent.futures.ThreadPoolExecutor(1, "", torch.set_num_threads, (1,))
        self.ahead = None
        self.strips = {}  # samples along the way
        self.run = {**settings_of(cfg), "data": "", "made from": made_from}  # data: by fingerprint, not path
        if cfg.restart and RANK == 0:
            self.path.unlink(missing_ok=True)
        if self.path.exists() and not cfg.restart:
            state = read(self.path)
            require_same_run(self.path, state["run"], self.run)
            self.trained.load_state_dict(state["weights"])
            self.ema.load_state_dict(state["ema"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"]):
                optimizer.load_state_dict(saved)
                for p, state_of_p in optimizer.state.items():  # another device may have another memory layout
                    state_of_p.update({key: torch.empty_like(p).copy_(value)
                                       for key, value in state_of_p.items() if value.shape == p.shape})
            self.done, self.strips = state["done"], state["strips"]
            say(f"{name} | continues after step {self.done} of {cfg.steps}, from {self.path}")
        if WORLD > 1:  # averages the gradients of all processes
            net = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
        self.net = net

    def steps(self):
        """Yields the number of each step. In between it logs, saves, and ends the run when asked to."""
        cfg, first, asked_to_stop = self.cfg, self.done, []
        if WORLD == 1:  # one process finishes its step; several end at once, and continue from the last state
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: asked_to_stop.append(True))
        began = logged = saved = time.time()
        for step in range(first, cfg.steps):
            torch.manual_seed(self.seed(step, use=1))
            yield step
            end, now = self.done == cfg.steps or bool(asked_to_stop), time.time()
            save_now = end or now - saved > SAVE_SECONDS
            if save_now or now - logged > LOG_SECONDS:
                logged, loss, speed = now, self.mean_loss(), (self.done - first) / (now - began)
                say(f"{self.name} | step {self.done:>6}/{cfg.steps} | loss {loss:.4f} | {self.note}lr "
                    f"{learning_rate(step, cfg):.1e} | {cfg.batch * speed:.0f} img/s | left "
                    f"{datetime.timedelta(seconds=round((cfg.steps - self.done) / speed))}")
            if save_now:
                saved = now
                if RANK == 0:
                    save(self.path, run=self.run, done=self.done, weights=self.trained.state_dict(),
                         ema=self.ema.state_dict(), strips=self.strips,
                         optimizers=[optimizer.state_dict() for optimizer in self.optimizers])
            if end and self.done < cfg.steps:
                raise KeyboardInterrupt(f"stopped after step {self.done}: {self.path} keeps it, and the same "
                                        "command (without --restart) continues")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)

    def seed(self, step, use):
        """A seed of this process's own. use: 1 for what a step draws, 2 for the rows that draw() takes."""
        return int(np.random.SeedSequence(self.cfg.seed, spawn_key=(step, RANK, use)).generate_state(1)[0])

    def draw(self, *tensors):
        """The same random rows of each tensor (None stays None), on the device. A thread reads those of the
        next step meanwhile, so that a GPU waits neither for memory nor for a disk."""
        def rows(step):
            generator = torch.Generator().manual_seed(self.seed(step, use=2))
            i = torch.randint(len(tensors[0]), (self.batch,), generator=generator)
            parts = [None if tensor is None else tensor[i] for tensor in tensors]
            return [part.pin_memory() if cuda and part is not None else part for part in parts]

        cuda = self.device.type == "cuda"  # copies from pinned memory while the program goes on
        parts = self.ahead.result() if self.ahead else rows(self.done)
        self.ahead = self.reader.submit(rows, self.done + 1)
        return [part if part is None else part.to(self.device, non_blocking=cuda) for part in parts]

    def update(self, loss, note=""):
        """One step down the gradient of `loss`, and one of the EMA. `note` is for the log line."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.weights, 1.0)  # paper: 1
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.done, self.cfg)
            optimizer.step()
        self.done += 1
        ema_update(self.averages, self.weights, self.cfg.ema, self.done)
        self.recent.append(torch.stack([loss.detach(), norm]))  # to read it here would be to wait for the GPU
        self.note = f"{note} | " if note else ""

    def mean_loss(self):
        """The mean loss since the last call. Raises UserError if a loss or gradient was not finite."""
        recent, self.recent = torch.stack(self.recent), []
        first = self.done - len(recent)
        require(recent.isfinite().all(), "a loss or gradient was not finite in steps "
                f"{first} to {self.done - 1}. The last state is kept. Look at the data, or start over with "
                "--restart and a lower --lr")
        return recent[:, 0].mean().item()
