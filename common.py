"""What two or more of the five scripts share: notation, settings, files, data, the U-Net, Euler, EMA, the training loop.

Notation, the same in every script:

    z        noise      N(0, I), shape (B, 3, H, W); a function of (seed, index), see noise_for
    x        data       image in [-1, 1], real or made by a teacher, shape (B, 3, H, W)
    t        t          time in [EPS, 1], shape (B,); t = 0 is noise, t = 1 is data
    x_t      x_t        = t x + (1 - t) z, the straight line from noise to data
    v        net        v(x_t, t), what every network here predicts: the velocity; its target is x - z
    theta'   ema        exponential moving average of the weights; only this copy is sampled from and saved

An image is uint8 on disk and in data sets, float in [-1, 1] everywhere else. Labels are int64, shape (B,), or None.
"""
import argparse
import contextlib
import copy
import dataclasses
import datetime
import hashlib
import http.client
import inspect
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import tarfile
import time
import traceback
import typing
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

PRESET = "shapes"  # shapes, cifar10_quick, cifar10, ffhq64 or imagenet64; --preset NAME overrides it for one run
EPS = 1e-3  # official code: times run from 0.001, not 0, to 1

# Noise indices. Each use has a range of its own, so that no picture that is judged comes from a noise that was trained on.
PAIRS, OWN_PAIRS, EVALUATION = 0, 10**9, 2 * 10**9


# ---------------------------------------------------------------------------------------------------------- settings

class UserError(ValueError):
    """Something the person at the keyboard can mend. run() prints it as one line, without a traceback."""


def require(condition, message):
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


@dataclasses.dataclass
class Settings:
    """What all five scripts can be told. The comment behind a field is also its --help text."""
    preset: str = PRESET  # which column of the script's PRESETS to start from
    out: str = "out"  # results go to <out>/<preset>/
    seed: int = 0  # everything random follows from it
    device: str = "auto"  # auto (a GPU where there is one), cpu, cuda, cuda:1, mps
    timeout: float = 10.0  # minutes after which one of several processes that has lost the others gives up
    restart: bool = False  # start this stage over, instead of continuing from what it has saved

    @property
    def folder(self):
        return Path(self.out) / self.preset


def check_ranges(cfg, **ranges):
    """check_ranges(cfg, steps=(1, None)): raises UserError unless each named setting lies between its two bounds."""
    for name, (low, high) in {"seed": (0, 2**63), "timeout": (0.01, None), **ranges}.items():
        value = getattr(cfg, name)
        inside = (low is None or value >= low) and (high is None or value <= high)  # False for NaN
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        require(inside, f"--{name} {value} is out of range: it must be {bounds}")


def read_settings(config, presets, doc, argv=None):
    """The dataclass `config`, filled from its defaults, then presets[--preset], then the command line.

    Types, choices and help texts come from the dataclass itself. Raises UserError for anything unknown or misspelt.
    """
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(message.removeprefix("argument "))

    def int_tuple(text):
        return tuple(int(part) for part in text.strip("()").split(",") if part.strip())

    int_tuple.__name__ = "comma-separated list of integers"
    source = "".join(inspect.getsource(c) for c in reversed(config.__mro__) if dataclasses.is_dataclass(c))
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    types = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        kind, choices = types[field.name], None
        if field.name == "preset":
            choices = list(presets)
        if typing.get_origin(kind) is typing.Literal:
            kind, choices = str, typing.get_args(kind)
        if typing.get_origin(kind) is tuple:
            kind = int_tuple
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind, "choices": choices}
        help_text = f"{comments.get(field.name, '')} [{field.default}]".replace("%", "%%")
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=help_text, **how)
    given, unknown = parser.parse_known_args(argv)
    valid = " ".join(f"--{field.name}" for field in dataclasses.fields(config))
    require(not unknown, f"unknown setting {' '.join(unknown)}; valid settings are {valid}")
    given = vars(given)
    preset = given.get("preset", config.preset)
    require(preset in presets, f"unknown preset {preset!r} in common.py; valid presets are {', '.join(presets)}")
    return config(**{"preset": preset, **presets[preset], **given})


def run(main, config, presets, doc, argv=None):
    """The guard of every script: settings, main(cfg), and one clear line, not a traceback, where a person can help."""
    try:
        main(read_settings(config, presets, doc, argv))
    except Stopped as stopped:
        sys.exit(str(stopped))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped at once: the same command continues from what was saved")
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: out of GPU memory ({str(error).splitlines()[0][:120]}). Smaller steps give the same result: a larger "
                 "--accumulate where a network is trained, a smaller --sample_batch or --feature_batch where images are made")
    except RuntimeError as error:
        if not dist.is_initialized():
            raise
        traceback.print_exc()
        sys.exit(f"error: process {rank()} of {world()} cannot go on ({str(error).splitlines()[0][:120]}). If another process "
                 "ended first, its message tells why; the same command, with any number of processes, continues")


def start(cfg, name):
    """Joins the other processes, if torchrun started several; settles what is "auto"; prints the settings; returns the
    torch.device to work on."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and cfg.device in ("auto", "cuda") else "gloo"
        # A process that has lost the others ends after this time instead of waiting for ever.
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=cfg.timeout))
    device = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index)
            torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {cfg.device} cannot be used here: {str(error).splitlines()[0]}") from error
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it; changes nothing on a CPU
    torch.manual_seed(cfg.seed)
    if getattr(cfg, "precision", "") == "auto":
        cfg.precision = best_precision(device)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    say(f"{name} | preset {cfg.preset} | {device} ({hardware}) x {world()} | torch {torch.__version__}")
    say("settings | " + " ".join(f"{k}={v}" for k, v in dataclasses.asdict(cfg).items() if k not in ("preset", "device")))
    return device


# --------------------------------------------------------------------------------------------------------- processes
# `torchrun --nproc_per_node=N script.py` starts N processes; without it there is one, and all of this is a matter of course.

def rank():
    """The number of this process, from 0. Only process 0 writes files and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def best_precision(device):
    """"bf16" where the hardware computes in it by itself, as recent GPUs and server CPUs do; otherwise "fp32"."""
    native = {"cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
              "cpu": lambda: any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))}
    return "bf16" if native.get(device.type, lambda: False)() else "fp32"


def say(text):
    """Prints a line, in process 0."""
    if rank() == 0:
        print(text, flush=True)


def sum_over_processes(*tensors):
    """Replaces each tensor by its sum over all processes."""
    for tensor in tensors if world() > 1 else ():
        dist.all_reduce(tensor)


def same_in_all_processes(*tensors):
    """Replaces each tensor by process 0's."""
    for tensor in tensors if world() > 1 else ():
        dist.broadcast(tensor, 0)


def share(n):
    """This process's slice of n things."""
    return slice(n * rank() // world(), n * (rank() + 1) // world())


def wait_for_all():
    """Returns when every process has come here."""
    sum_over_processes(torch.zeros(1))


@contextlib.contextmanager
def process_0_first():
    """Process 0 goes through the block, then the others: it makes a file, and they find it."""
    if rank():
        wait_for_all()
    yield
    if rank() == 0:
        wait_for_all()


@dataclasses.dataclass
class Part:
    """The share of a step's batch that is computed at once: samples first ... last - 1.

    A batch is divided among processes, and by `accumulate` into parts that are computed one after another. Every part draws
    the random numbers of the whole batch and keeps its own, so that neither division changes what is computed. (Dropout draws
    its masks elsewhere, anew for each part.)
    """
    batch: int
    first: int
    last: int

    def begin(self, seed, step):
        """To be called before the others: all randomness follows from (seed, step), so no state is carried on from step to step."""
        mixed = lambda *numbers: int(np.random.SeedSequence(numbers).generate_state(1)[0])
        self.seed, self.generators = mixed(seed, step), {}  # one generator for each device that asks
        torch.manual_seed(mixed(seed, step, self.first))  # dropout's
        return self

    def generator(self, device):
        if str(device) not in self.generators:
            self.generators[str(device)] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[str(device)]

    def __len__(self):
        return self.last - self.first

    def rand(self, device):
        """Uniform in [0, 1): (len(self),)."""
        return torch.rand(self.batch, device=device, generator=self.generator(device))[self.first:self.last]

    def randn(self, *shape, device):
        """N(0, I): (len(self), *shape)."""
        return torch.randn(self.batch, *shape, device=device, generator=self.generator(device))[self.first:self.last]

    def randint(self, high):
        """Integers from 0 to high - 1, on the CPU: (len(self),)."""
        return torch.randint(high, (self.batch,), generator=self.generator("cpu"))[self.first:self.last]


class Stopped(Exception):
    """The run was asked to end, and has saved where it is."""


@contextlib.contextmanager
def stop_requests():
    """`with stop_requests() as stopped:` stopped() is True once SIGINT or SIGTERM came to any process.

    Another one, five seconds later or more (torchrun passes each on a second time), ends at once.
    """
    received = []

    def note(number, frame):
        if received and time.time() - received[0] > 5:
            raise KeyboardInterrupt
        received.append(time.time())

    def stopped():
        total = torch.tensor([len(received)])
        sum_over_processes(total)
        return bool(total)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------------- files

SEAL = b"sha256"
# Settings that may change from a run to its continuation: they change no result but by rounding (and random numbers, which a
# GPU draws differently), or are asked for (more steps).
HARMLESS = {"out", "device", "timeout", "restart", "steps", "log_every", "save_every", "sample_steps", "sample_batch",
            "accumulate", "memory_gb", "compile"}
MADE_BY = {"01_teacher.pt": "01_train_teacher.py", "02_pairs.pt": "02_generate_pairs.py",
           "03_reflow.pt": "03_annealing_reflow.py", "04_pairs.pt": "04_flow_guided_distill.py",
           "04_student.pt": "04_flow_guided_distill.py"}


def command_for(script, cfg):
    """The command line that runs another stage for the same preset and output folder."""
    return f"python {script} --preset {cfg.preset}" + (f" --out {cfg.out}" if cfg.out != "out" else "")


@contextlib.contextmanager
def writing(path, everywhere=False):
    """`with writing(path) as file:` gives a binary file that appears under its name only when it is complete.

    It is written beside `path` as `<name>.tmp`, flushed to the disk, then renamed: whoever reads `path` finds the old
    content or the new one. Only process 0 writes, unless `everywhere`. Raises UserError where the disk is full or not writable.
    """
    if rank() and not everywhere:
        yield io.BytesIO()
        return
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise UserError(f"could not write {path}: {error.__context__ or error}; "
                        "what was there before is untouched") from error
    finally:
        temporary.unlink(missing_ok=True)


def save(path, cfg, everywhere=False, **content):
    """Writes a self-describing artifact: preset, settings, and the content (tensors, numbers, strings, dicts, lists).

    It ends in SEAL and the hash of all that comes before, by which read() knows that no bit has changed. Process 0 writes, or
    `everywhere` each process, a file of its own.
    """
    settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in HARMLESS or k == "steps"}
    if rank() == 0 or everywhere:
        with writing(path, everywhere) as file:
            torch.save({"preset": cfg.preset, "settings": settings, **content}, file)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").digest()
            file.seek(0, os.SEEK_END)
            file.write(SEAL + digest)


def read(path):
    """An artifact's content and, as "digest", its hash. Tensors are memory-mapped. Never unpickles, never runs code.

    Raises ValueError if the file is not one of ours, was cut off, or has a changed bit; OSError if it cannot be read.
    """
    digest, size = hashlib.sha256(), os.path.getsize(path) - len(SEAL) - 32
    with open(path, "rb") as file:
        while file.tell() < size:
            digest.update(file.read(min(1 << 20, size - file.tell())))
        if size < 0 or file.read() != SEAL + digest.digest():
            raise ValueError("its checksum is wrong")
    try:
        return {**torch.load(path, map_location="cpu", weights_only=True, mmap=True), "digest": digest.hexdigest()}
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        raise ValueError(str(error)) from error


def load(path, cfg):
    """read(), for an artifact that an earlier stage made. Raises UserError if it is missing, damaged, or another preset's."""
    path = Path(path)
    command = command_for(MADE_BY[path.name], cfg)
    require(path.exists(), f"{path} is missing; make it with: {command}")
    try:
        artifact = read(path)
        preset = artifact["preset"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged or not one of ours; make it again with: {command}") from error
    require(preset == cfg.preset, f"{path} was made with --preset {preset}, not {cfg.preset}; make it with: {command}")
    return artifact


def require_same_run(path, then, now):
    """Raises UserError unless what was saved in `path` was made in the same way: two dicts, of which it lists what differs."""
    differ = [f"{key} was {then.get(key)}, is {value}" for key, value in now.items() if then.get(key) != value]
    require(not differ, f"{path} belongs to a run with other settings ({'; '.join(differ)}). Start over with --restart, or keep "
            "both with another --out")


def save_network(path, cfg, net, **facts):
    """Saves a network's weights with the arguments that build it, and further facts that later stages need."""
    save(path, cfg, network=net.args, weights=net.state_dict(), **facts)


def load_network(path, cfg, device, precision="fp32"):
    """Returns (UNet in eval mode, from on_device(), and the whole artifact). Strict: raises UserError if the weights do not fit."""
    artifact = load(path, cfg)
    try:
        net = UNet(**artifact["network"])
        load_strictly(net, artifact["weights"], path)
    except (KeyError, TypeError, UserError) as error:
        raise UserError(f"{path} does not hold the network it describes ({error}); "
                        f"make it again with: {command_for(MADE_BY[Path(path).name], cfg)}") from error
    return on_device(net, device, precision).eval(), artifact


def require_same_kind(path_a, args_a, path_b, args_b):
    """Raises UserError unless two artifacts agree on image size, channels and number of classes."""
    for key in ("image_size", "channels", "classes"):
        require(args_a[key] == args_b[key], f"{path_a} and {path_b} do not belong together: {key} is {args_a[key]} in the "
                f"first and {args_b[key]} in the second; run the stages again from the first that changed")


# ---------------------------------------------------------------------------------------------------------- pictures

def save_grid(path, rows, titles=None, pixels=64):
    """Writes a PNG with one row of images for each float tensor (N, 3, H, W) in `rows`, and a title above each row.

    Images are enlarged to about `pixels` (whole pixels, not smoothed), so that 16x16 can be looked at.
    """
    size = rows[0].shape[-1]
    cell, gap, bar = size * max(1, pixels // size), 2, 18 if titles else 0
    width = max(len(row) for row in rows) * (cell + gap) + gap
    canvas = Image.new("RGB", (width, len(rows) * (cell + gap + bar) + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for r, row in enumerate(rows):
        top = gap + r * (cell + gap + bar)
        if titles:
            draw.text((gap + 2, top), titles[r], fill="black", font=ImageFont.load_default(12))
        for i, image in enumerate(to_uint8(row.cpu())):
            tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((cell, cell), Image.NEAREST)
            canvas.paste(tile, (gap + i * (cell + gap), top + bar))
    with writing(path) as file:
        canvas.save(file, "PNG")


def save_curve(path, values, title):
    """Draws positive numbers (the loss of every step) on a log axis, and their running mean, into a PNG."""
    width, height, left, right, top, bottom = 640, 320, 60, 625, 30, 290
    values = np.log10(np.maximum(values, 1e-12))
    window = max(1, len(values) // 50)
    low, high = values.min(), values.max() + 1e-3
    canvas = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    draw.text((left, 8), f"{title} (log scale; dark: mean of {window} steps); {len(values)} steps", fill="black", font=font)
    for y in range(top, bottom + 1, (bottom - top) // 4):
        draw.line([(left, y), (right, y)], fill="#dddddd")
        draw.text((5, y - 7), f"{10 ** (high - (y - top) / (bottom - top) * (high - low)):.2e}", fill="black", font=font)
    for line, colour in ((values, "#9ec5e8"), (np.convolve(values, np.ones(window) / window, mode="valid"), "#174a7c")):
        step = np.arange(len(line)) + len(values) - len(line)
        x = left + step / max(1, len(values) - 1) * (right - left)
        y = top + (high - line) / (high - low) * (bottom - top)
        draw.line(list(zip(x.tolist(), y.tolist())), fill=colour, width=1 if line is values else 2)
    with writing(path) as file:
        canvas.save(file, "PNG")


def clock(seconds):
    """12.6 -> '0:00:13'."""
    return str(datetime.timedelta(seconds=round(seconds)))


def time_left(started, done, total):
    """'0:12:33': the time that the rest will take if it goes on as it went since `started` (time.time())."""
    return clock((time.time() - started) / max(1, done) * (total - done))


# -------------------------------------------------------------------------------------------------------------- data

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
SHAPES = ("circle", "square", "triangle")
COLOURS = {"red": (230, 60, 50), "yellow": (235, 205, 60), "green": (70, 190, 80),
           "cyan": (70, 195, 215), "blue": (70, 100, 235), "magenta": (215, 80, 205)}


def from_uint8(images):
    """uint8 0..255 -> float32 -1..1."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """float -1..1 -> uint8 0..255: clipped, then rounded."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def random_flip(chance, *batches):
    """Mirrors images left to right where chance (B,), uniform in [0, 1), is below 1/2: the same in every batch (B, C, H, W)."""
    mirrored = (chance < 0.5)[:, None, None, None]
    return [torch.where(mirrored, batch.flip(3), batch) for batch in batches]


def noise_for(seed, indices, shape):
    """Noise z ~ N(0, I) for each index: float32 (len(indices), *shape).

    Row i depends on (seed, indices[i]) alone, whatever the batch size, device or machine: a pair's noise is never stored,
    it is drawn again. Philox is a counter-based generator, made for this: (seed, index) is its key.
    """
    noise = torch.empty(len(indices), *shape)
    for row, index in zip(noise.numpy(), torch.as_tensor(indices).tolist()):
        generator = np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))
        generator.standard_normal(out=row, dtype=np.float32)
    return noise


def draw_shapes(n, image_size, seed=0):
    """n pictures of one antialiased coloured circle, square or triangle on a dark ground, always the same for a seed.

    Returns images uint8 (n, 3, H, W) and attributes float32 (n, 5): shape 0..2, colour 0..5, then centre x, centre y and
    radius in units of the image's side.
    """
    rng = np.random.default_rng(seed)
    shape, colour = rng.integers(len(SHAPES), size=n), rng.integers(len(COLOURS), size=n)
    radius = rng.uniform(0.18, 0.34, size=n)
    centre_x, centre_y = rng.uniform(radius + 0.03, 0.97 - radius, size=(2, n))
    ground = rng.uniform(10, 60, size=(n, 1)) + rng.uniform(-8, 8, size=(n, 3))  # dark, nearly grey
    ink = np.array(list(COLOURS.values()))[colour] + rng.uniform(-20, 20, size=(n, 3))
    attributes = np.stack([shape, colour, centre_x, centre_y, radius], axis=1)

    images = np.empty((n, 3, image_size, image_size), dtype=np.uint8)
    pixel = (np.arange(image_size) + 0.5) / image_size
    for i in range(n):
        x = np.abs(pixel[None, :] - centre_x[i]) / radius[i]  # (1, W), in radii; all three shapes are symmetric in x
        y = (pixel[:, None] - centre_y[i]) / radius[i]  # (H, 1), downwards
        # Signed distance from the outline, in radii, negative inside.
        distance = (np.hypot(x, y) - 1, np.maximum(x, np.abs(y)) - 0.85,
                    np.maximum(0.884 * x - 0.467 * (y + 1), y - 0.8))[shape[i]]
        # Antialiasing: a pixel within half a pixel of the outline is covered in part.
        cover = np.clip(0.5 - distance * radius[i] * image_size, 0, 1)
        images[i] = (cover * ink[i, :, None, None] + (1 - cover) * ground[i, :, None, None]).round().clip(0, 255)
    return torch.from_numpy(images), torch.from_numpy(attributes).float()


def download(url, path, algorithm, digest):
    """Fetches url into path unless it is there already, and returns path.

    The file gets its name only when its hash begins with `digest`; a download that breaks off starts anew the next time.
    Raises UserError without a network, or if the content is not what was expected.
    """
    with process_0_first():
        if not Path(path).exists():
            fetch(url, Path(path), algorithm, digest)
    return Path(path)


def fetch(url, path, algorithm, digest):
    """download(), where the file is not there yet."""
    part = Path(f"{path}.part")
    advice = f"run the command again, or put the file at {path} yourself"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        say(f"downloading {url}")
        torch.hub.download_url_to_file(url, part)
        found = file_digest(part, algorithm)
        require(found.startswith(digest), f"{url} broke off or is not the file that was expected: its {algorithm} is {found}, "
                f"not {digest}; {advice}")
        os.replace(part, path)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"could not download {url} ({error}); {advice}") from error
    finally:
        part.unlink(missing_ok=True)


def published_weights(path, url, sha256, setting, otherwise, any_weights=False):
    """(state dict on the CPU, the file's sha256): weights from `path` or, where that is empty, downloaded into data/.

    sha256 is what the file's hash must begin with, unless any_weights; `setting` names the setting that gives the path, and
    `otherwise` says what goes without these weights. Raises UserError where they cannot be had or are not what they should be.
    """
    advice = f"--{setting} PATH takes the file from elsewhere; {otherwise}"
    try:
        path = Path(path or download(url, Path("data", url.split("/")[-1]), "sha256", sha256))
    except UserError as error:
        raise UserError(f"{error}. {advice}") from error
    require(path.is_file(), f"--{setting} {path} does not exist; {url} is where it comes from")
    digest = file_digest(path, "sha256")
    require(any_weights or digest.startswith(sha256), f"{path} is not the published file: its sha256 begins with "
            f"{digest[:8]}, not {sha256[:8]}. --any_weights takes it all the same; {advice}")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        require(isinstance(weights, dict), "it holds no state dict")
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise UserError(f"{path} does not hold weights: {' '.join(str(error).split())[:200]}") from error
    return weights, digest


def require_same_entries(shapes, weights, source):
    """Raises UserError unless `weights` has an entry for each in {key: shape}, and no other; it names the first that differ."""
    shape_of = lambda key: tuple(getattr(weights[key], "shape", ()))
    faults = {"missing": [key for key in shapes if key not in weights],
              "unexpected": [key for key in weights if key not in shapes],
              "misshapen": [f"{key} {shape_of(key)} instead of {tuple(shape)}" for key, shape in shapes.items()
                            if key in weights and shape_of(key) != tuple(shape)]}
    found = [f"{len(keys)} entries {fault}, first {', '.join(keys[:3])}" for fault, keys in faults.items() if keys]
    require(not found, f"{source} does not fit the network: {'; '.join(found)}")


def load_strictly(net, weights, source):
    """net.load_state_dict(weights), with require_same_entries' one line in place of a long message."""
    require_same_entries({key: value.shape for key, value in net.state_dict().items()}, weights, source)
    net.load_state_dict(weights)


def file_digest(path, algorithm):
    """The file's hash as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def load_images(source, image_size, memory_gb=4.0, skip_bad=False, cache="out/cache"):
    """Reads a data set: images uint8 (N, 3, H, W), and labels int64 (N,) or None.

    source      "shapes" (drawn here; label = shape * 6 + colour), "cifar10" (downloaded into data/), the path of CIFAR-10
                in its binary version (folder or .tar.gz), or a folder or zip of PNG, JPEG and WebP images. Their labels
                are in dataset.json, {"labels": [["a/0.png", 3], ...]}, or else the folders they lie in
    image_size  other sizes are cropped to the centre square and resized (Lanczos); None: as they are, all of one size
    memory_gb   a folder or zip that takes more than this is memory-mapped from a file under `cache`
    skip_bad    leaves out (and counts) files that are not readable images, instead of stopping at the first

    Raises UserError for a missing, empty or damaged source, naming the file.
    """
    if source == "shapes":
        images, attributes = draw_shapes(16_384, image_size or 16)
        return images, (attributes[:, 0] * len(COLOURS) + attributes[:, 1]).long()
    path = download(CIFAR10_URL, "data/cifar-10-binary.tar.gz", "md5", CIFAR10_MD5) if source == "cifar10" else Path(source)
    require(path.exists(), f"{path} does not exist: --data is shapes, cifar10, or the path of a folder or zip of images")
    if path.name.endswith(".tar.gz") or (path.is_dir() and any(path.rglob("data_batch_1.bin"))):
        return read_cifar10(path, image_size)
    return read_image_files(path, image_size, memory_gb, skip_bad, Path(cache))


def read_cifar10(path, image_size):
    """CIFAR-10's binary version: five files of 10,000 records, each of 1 label byte and 3,072 pixel bytes."""
    require(image_size in (None, 32), f"{path} holds 32x32 images: set --image_size 32, not {image_size}")
    names = [f"data_batch_{i}.bin" for i in range(1, 6)]
    try:
        if path.is_dir():
            folder = next(path.rglob(names[0])).parent
            content = b"".join((folder / name).read_bytes() for name in names)
        else:
            with tarfile.open(path) as archive:  # read in memory: nothing is unpacked to the disk
                members = {Path(member.name).name: member for member in archive}
                content = b"".join(archive.extractfile(members[name]).read() for name in names)
        table = np.frombuffer(content, dtype=np.uint8).reshape(50_000, 3073)
    except (OSError, EOFError, KeyError, ValueError, tarfile.TarError, zlib.error) as error:
        raise UserError(f"{path} is not CIFAR-10 in its binary version, or is damaged: {error}") from error
    return torch.from_numpy(table[:, 1:].reshape(-1, 3, 32, 32).copy()), torch.from_numpy(table[:, 0].astype(np.int64))


def read_image_files(path, image_size, memory_gb, skip_bad, cache):
    """load_images for a folder or zip; see there."""
    # 1. What is there: `names`, relative to the folder or zip, and `read(name)` -> bytes.
    if path.is_dir():
        names = [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()]
        read = lambda name: (path / name).read_bytes()
        version = [(name, (path / name).stat().st_size, (path / name).stat().st_mtime_ns) for name in sorted(names)]
    else:
        try:
            archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{path} is neither a folder nor a zip that can be read: {error}") from error
        names, read = [name for name in archive.namelist() if not name.endswith("/")], archive.read
        outside = [name for name in names if name.startswith("/") or ".." in name.split("/")]
        require(not outside, f"{path}: {''.join(outside[:1])} lies outside of the archive: it was made to do harm, or by mistake")
        version = [path.stat().st_size, path.stat().st_mtime_ns]
    described = "dataset.json" in names
    hidden = re.compile(r"(^|/)(\.|__MACOSX/|Thumbs\.db$|dataset\.json$)")
    names = sorted(name for name in names if not hidden.search(name))
    images = [name for name in names if name.lower().endswith((".png", ".jpg", ".jpeg", ".webp"))]
    strangers = sorted(set(names) - set(images))
    require(skip_bad or not strangers, f"{path}: {strangers[:1]} is not a PNG, JPEG or WebP image; remove it, or leave such "
            "files out with --skip_bad")
    require(images, f"{path} holds no PNG, JPEG or WebP images")
    labels = read_labels(path, images, read("dataset.json") if described else None)

    # 2. Its pixels: in memory or, where they do not fit, in a file that is made once and memory-mapped.
    shape = (len(images), *next(decode_all(path, images, read, image_size, skip_bad))[1].shape)  # (N, 3, H, W)
    decoded = decode_all(path, images, read, image_size, skip_bad)
    if math.prod(shape) <= memory_gb * 1e9:
        pixels, kept = np.empty(shape, dtype=np.uint8), []
        for i, image in decoded:
            pixels[len(kept)] = image
            kept.append(i)
    else:
        key = hashlib.sha256(repr((str(path.resolve()), image_size, skip_bad, version)).encode()).hexdigest()[:16]
        about_path, pixels_path = cache / f"{key}.json", cache / f"{key}.uint8"
        with process_0_first():
            kept = kept_in(about_path, pixels_path)
            if kept is None:
                kept = []
                with writing(pixels_path) as file:
                    for i, image in decoded:
                        file.write(image.tobytes())
                        kept.append(i)
                with writing(about_path) as file:
                    file.write(json.dumps({"kept": kept, "sha256": file_digest(pixels_path, "sha256")}).encode())
        pixels = np.memmap(pixels_path, dtype=np.uint8, mode="c").reshape(-1, *shape[1:])
        say(f"{path} | memory-mapped from {pixels_path}")
    if len(kept) < len(names):
        say(f"{path} | skipped {len(names) - len(kept)} of {len(names)} files that are not readable images")
    return torch.from_numpy(pixels[:len(kept)]), None if labels is None else torch.from_numpy(labels[kept])


def kept_in(about_path, pixels_path):
    """The positions of the images that a memory-mapped file holds; None if there is no such file, or not as it was written."""
    try:
        about = json.loads(about_path.read_bytes())
        return about["kept"] if file_digest(pixels_path, "sha256") == about["sha256"] else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def read_labels(path, names, dataset_json):
    """Labels int64 (len(names),) from dataset.json's bytes or, without it, from the folders; None if there are none."""
    if dataset_json is None:
        folders = [name.rpartition("/")[0] for name in names]
        classes = {folder: i for i, folder in enumerate(sorted(set(folders)))}
        return np.array([classes[folder] for folder in folders]) if len(classes) > 1 else None
    try:
        pairs = json.loads(dataset_json)["labels"]
        labels = {name: label for name, label in pairs or []}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path}: dataset.json must be {{"labels": [["a/0.png", 3], ...]}} or {{"labels": null}}') from error
    absent, unlabelled = sorted(set(labels) - set(names)), [name for name in names if name not in labels]
    wrong = [pair for pair in labels.items() if type(pair[1]) is not int or pair[1] < 0]
    require(not absent, f"{path}: dataset.json has labels for {len(absent)} images that are not there, first {absent[:1]}")
    require(not labels or not unlabelled,
            f"{path}: dataset.json has no label for {len(unlabelled)} images, first {unlabelled[:1]}")
    require(not wrong, f"{path}: a label in dataset.json must be an integer from 0: {wrong[:1]}")
    return np.array([labels[name] for name in names]) if labels else None


def decode_all(path, names, read, image_size, skip_bad):
    """Yields (position in names, uint8 (3, H, W), all of one size) for each file that can be decoded."""
    started = reported = time.time()
    first = None
    for i, name in enumerate(names):
        try:
            image = decode(read(name), image_size)
        except (OSError, SyntaxError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error,
                Image.DecompressionBombError) as error:
            require(skip_bad, f"{path}: {name} is not a PNG, JPEG or WebP image that can be read ({error}); remove it, or "
                    "leave such files out with --skip_bad")
            continue
        first = image if first is None else first
        require(image.shape == first.shape, f"{path}: {name} has {image.shape[2]}x{image.shape[1]} pixels, and the first image "
                f"{first.shape[2]}x{first.shape[1]}: all must have one size")
        yield i, image
        if time.time() - reported > 10:
            reported = time.time()
            say(f"reading {path} | {i + 1}/{len(names)} | left {time_left(started, i + 1, len(names))}")
    require(first is not None, f"{path}: none of its {len(names)} images can be read")


def decode(content, image_size):
    """The bytes of an image file -> uint8 (3, image_size, image_size): RGB, the centre square, resized; None: as it is."""
    with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as image:
        image = image.convert("RGB")
    if image_size and image.size != (image_size, image_size):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((image_size, image_size), Image.LANCZOS)
    return np.asarray(image).transpose(2, 0, 1)


# ----------------------------------------------------------------------------------------------------------- network

def init_(layer, scale=1.0):
    """Official code: Xavier-uniform weights with their variance multiplied by `scale`, biases 0. Returns the layer."""
    nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(scale))
    nn.init.zeros_(layer.bias)
    return layer


NEARLY_ZERO = 1e-10  # official code: the last layer of every branch starts at 1e-5 of its usual size, not at exactly 0


def group_norm(channels):
    groups = min(channels // 4, 32)
    require(groups and channels % groups == 0, f"{channels} channels cannot be normalised in {groups} groups: choose a base "
            "that is a multiple of 32 (or of 4, while no layer has more than 128 channels)")
    return nn.GroupNorm(groups, channels, eps=1e-6)


class Attention(nn.Module):
    """Every pixel looks at every pixel: one head over all channels, added to its input."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = init_(nn.Conv2d(channels, 3 * channels, 1), 0.2)
        self.proj = init_(nn.Conv2d(channels, channels, 1), NEARLY_ZERO)

    def forward(self, x):
        b, c, height, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, 3, c, height * width).transpose(2, 3).unbind(1)  # each (B, HW, C)
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]  # (B, HW, C): one head
        h = h.transpose(1, 2).reshape(b, c, height, width)
        return (x + self.proj(h)) * math.sqrt(0.5)


class ResBlock(nn.Module):
    """Two 3x3 convolutions that are told the time, added to their input; may change the size, and may end in attention."""

    def __init__(self, c_in, c_out, c_emb, dropout, attention=False, up=False, down=False):
        super().__init__()
        self.up, self.down = up, down
        self.norm0 = group_norm(c_in)
        self.conv0 = init_(nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb = init_(nn.Linear(c_emb, c_out))
        self.norm1 = group_norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = init_(nn.Conv2d(c_out, c_out, 3, padding=1), NEARLY_ZERO)
        self.skip = init_(nn.Conv2d(c_in, c_out, 1)) if c_in != c_out or up or down else nn.Identity()
        self.attention = Attention(c_out) if attention else nn.Identity()

    def resample(self, x):
        if self.up:
            return F.interpolate(x, scale_factor=2, mode="nearest")  # (B, C, 2H, 2W)
        return F.avg_pool2d(x, 2) if self.down else x  # (B, C, H/2, W/2)

    def forward(self, x, emb):
        h = self.conv0(self.resample(F.silu(self.norm0(x))))
        h = h + self.emb(F.silu(emb))[:, :, None, None]
        h = self.conv1(self.dropout(F.silu(self.norm1(h))))
        x = self.skip(self.resample(x))
        return self.attention((x + h) * math.sqrt(0.5))


class UNet(nn.Module):
    """The velocity network v(x_t, t): the paper's NCSN++ in its "DDPM++" form, which is also EDM's SongUNet.

    image_size  height and width of the images; must halve len(mult) - 1 times
    base, mult  channels of the first level, and of each level in multiples of it
    blocks      residual blocks per level
    attn        attention follows the residual blocks at these sizes (and always in the middle)
    classes     number of class labels, 0 for none
    edm_embedding  round the frequencies of the time embedding as EDM's code does, for weights that were trained there
    """

    def __init__(self, image_size, channels=3, base=64, mult=(1, 2, 2), blocks=2, attn=(16,), classes=0, dropout=0.0,
                 edm_embedding=False):
        super().__init__()
        self.args = dict(image_size=image_size, channels=channels, base=base, mult=tuple(mult), blocks=blocks,
                         attn=tuple(attn), classes=classes, dropout=dropout, edm_embedding=edm_embedding)
        require(mult and min(mult) >= 1 and blocks >= 1 and base >= 4, f"the network needs base >= 4, blocks >= 1 and a mult "
                f"of at least one positive number, not base {base}, blocks {blocks}, mult {tuple(mult)}")
        halvings = len(mult) - 1
        require(image_size % 2**halvings == 0, f"image_size {image_size} cannot be halved {halvings} times, as mult "
                f"{tuple(mult)} asks for: it must be a multiple of {2**halvings}")
        c_emb = 4 * base
        self.time0, self.time1 = init_(nn.Linear(base, c_emb)), init_(nn.Linear(c_emb, c_emb))
        self.label = init_(nn.Linear(classes, base)) if classes else None
        self.conv_in = init_(nn.Conv2d(channels, base, 3, padding=1))

        c, size, skips = base, image_size, [base]  # skips: the widths that the decoder will find on the stack
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        for level, m in enumerate(mult):
            for _ in range(blocks):
                self.encoder.append(ResBlock(c, base * m, c_emb, dropout, attention=size in attn))
                c = base * m
                skips.append(c)
            if level < halvings:
                self.encoder.append(ResBlock(c, c, c_emb, dropout, down=True))
                size //= 2
                skips.append(c)
        self.middle = nn.ModuleList([ResBlock(c, c, c_emb, dropout, attention=True), ResBlock(c, c, c_emb, dropout)])
        for level, m in reversed(list(enumerate(mult))):
            for i in range(blocks + 1):
                last = i == blocks
                self.decoder.append(ResBlock(c + skips.pop(), base * m, c_emb, dropout, attention=last and size in attn))
                c = base * m
            if level > 0:
                self.decoder.append(ResBlock(c, c, c_emb, dropout, up=True))
                size *= 2
        self.norm_out = group_norm(c)
        self.conv_out = init_(nn.Conv2d(c, channels, 3, padding=1), NEARLY_ZERO)

    def embed(self, t, labels):
        """Time (B,) in [0, 1], and labels (B,) where there are classes -> (B, 4 base)."""
        require((labels is None) == (self.label is None), f"this network has {self.args['classes']} classes: it takes "
                + ("no labels" if self.label is None else "a label for each image"))
        half = self.args["base"] // 2
        k = torch.arange(half, device=t.device, dtype=torch.float32)
        # Official code: 999, and this order of operations, in float32. At angles up to 999 rounding shows in the 5th digit.
        frequencies = torch.exp(k * -(math.log(10_000) / (half - 1)))
        if self.args["edm_embedding"]:
            frequencies = (1 / 10_000) ** (k / (half - 1))  # the same numbers, but for the rounding
        angles = 999 * t[:, None].float() * frequencies  # (B, base / 2)
        emb = torch.cat([angles.sin(), angles.cos()], dim=1).to(self.time0.weight.dtype)  # (B, base)
        if labels is not None:
            one_hot = F.one_hot(labels, self.args["classes"]).to(emb.dtype)
            emb = emb + self.label(one_hot * math.sqrt(self.args["classes"]))
        return self.time1(F.silu(self.time0(emb)))

    def forward(self, x, t, labels=None):
        """x (B, C, H, W), t (B,) in [0, 1], labels int64 (B,) or None -> velocity (B, C, H, W)."""
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
        # The output stays float32 where the rest is bf16. The shapes teacher's FD-shapes was 1.67 without this, and 1.52 with
        # it, as in fp32 (360 steps, one seed).
        with torch.autocast(x.device.type, enabled=False):
            return self.conv_out(F.silu(self.norm_out(h.to(self.conv_out.weight.dtype))))


def count_parameters(net):
    return sum(p.numel() for p in net.parameters())


def autocast(precision, device):
    """A context in which convolutions and matrix products have that precision; weights, losses and optimiser stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def on_device(net, device, precision):
    """The network on the device. On a CPU in fp32, convolutions are faster with channels last in memory; in bf16, others lose
    what they gain (GroupNorm's gradient takes ten times as long)."""
    last = torch.device(device).type == "cpu" and precision == "fp32"
    return net.to(device, memory_format=torch.channels_last if last else torch.contiguous_format)


# ---------------------------------------------------------------------------------------------------------- sampling

@torch.no_grad()
def euler(net, noise, steps, labels=None):
    """Follows the flow from noise (B, C, H, W) to an image in about [-1, 1]: exactly `steps` calls of the network.

    One step is noise + v(noise, EPS). Times begin at EPS, where training begins, and the N steps of 1/N still add up to 1
    (official code).
    """
    x = noise
    for i in range(steps):
        # dx/dt = v(x, t):  x <- x + v(x, t_i) / N,  t_i = EPS + (1 - EPS) i / N
        t = torch.full(x.shape[:1], EPS + (1 - EPS) * i / steps, device=x.device)
        x = x + net(x, t, labels) / steps
    return x


def edm_denoise(net, x, sigma, labels=None):
    """D(x; sigma), the clean image that an EDM network sees in x (B, C, H, W), noise level sigma (a float > 0) included.

    Karras et al. 2022 (arXiv 2206.00364), Eq. 7 and Table 1, with sigma_data = 0.5.
    """
    c_skip, c_out = 0.25 / (sigma**2 + 0.25), 0.5 * sigma / math.sqrt(sigma**2 + 0.25)
    c_in, c_noise = 1 / math.sqrt(sigma**2 + 0.25), math.log(sigma) / 4
    t = torch.full(x.shape[:1], c_noise / 999, device=x.device)  # the network multiplies by 999; EDM passes c_noise itself
    # D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)
    return c_skip * x + c_out * net((c_in * x).float(), t, labels).to(x.dtype)


@torch.no_grad()
def edm_heun(net, noise, steps, labels=None):
    """EDM's sampler: from noise (B, C, H, W) to images, by 2 steps - 1 calls of an EDM network. Karras et al., Algorithm 1.

    Its noise is 80 z, so that z ~ N(0, I) and the image are a pair, as for euler().
    """
    low, high, rho = 0.002, 80, 7  # paper (EDM): sigma_min, sigma_max, rho
    sigmas = [(high ** (1 / rho) + i / max(1, steps - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
              for i in range(steps)] + [0]
    x = high * noise.to(torch.float64 if noise.device.type != "mps" else torch.float32)  # official code: double precision
    for sigma, following in zip(sigmas, sigmas[1:]):
        # dx/dsigma = (x - D(x; sigma)) / sigma: an Euler step, then (but for the last) the mean of the slopes at both ends
        slope = (x - edm_denoise(net, x, sigma, labels)) / sigma
        x_next = x + (following - sigma) * slope
        if following:
            slope_next = (x_next - edm_denoise(net, x_next, following, labels)) / following
            x_next = x + (following - sigma) * (slope + slope_next) / 2
        x = x_next
    return x.float()


def sampler_of(artifact):
    """(sampler, calls(steps)) of a saved network: Euler, or for an imported EDM network its own; and how often it calls."""
    return (edm_heun, lambda steps: 2 * steps - 1) if artifact.get("edm") else (euler, lambda steps: steps)


def generate(net, seed, indices, steps, labels=None, batch=256, sampler=euler, precision="fp32"):
    """sampler() from noise_for(seed, indices), in batches: yields (slice of the indices, images float32 on the CPU)."""
    device = next(net.parameters()).device
    shape = (net.args["channels"], net.args["image_size"], net.args["image_size"])
    for first in range(0, len(indices), batch):
        rows = slice(first, min(first + batch, len(indices)))
        noise = noise_for(seed, indices[rows], shape).to(device)
        with autocast(precision, device):
            images = sampler(net, noise, steps, None if labels is None else labels[rows].to(device))
        yield rows, images.cpu()


def labels_for(seed, n, classes):
    """n labels int64, uniform over the classes; None where there are no classes."""
    return torch.from_numpy(np.random.default_rng(seed).integers(classes, size=n)) if classes else None


def evaluation_samples(net, seed, n, steps):
    """The first n (n, 3, H, W) of the images that stage 05 judges: from the same noise and labels, on the CPU."""
    indices = torch.arange(EVALUATION, EVALUATION + n)
    return torch.cat([x for _, x in generate(net, seed, indices, steps, labels_for(seed, n, net.args["classes"]))])


def make_pairs(path, cfg, net, artifact, n, steps, first_index):
    """Writes n pairs (noise, ODE[net](noise)) to `path`: images as float16, and the noise only as (seed, first index).

    net, artifact: from load_network. Says before it starts how many network calls, how much disk and about how long. Batches are
    kept in a folder beside `path` until all are there, so that a run that was broken off continues; processes share them out.
    """
    run = {"network": artifact["digest"], "pairs": n, "steps": steps, "seed": cfg.seed, "first_index": first_index,
           "precision": cfg.precision}
    folder = Path(f"{path}.parts")
    complete = None
    if path.exists() and not cfg.restart:
        try:
            complete = read(path)
            require_same_run(path, complete["run"], run)
            say(f"{path} is complete")
        except (KeyError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            say(f"{path} is damaged: it is made again")
    wait_for_all()  # all have looked
    if rank() == 0 and cfg.restart:
        path.unlink(missing_ok=True)
    if rank() == 0 and (complete or cfg.restart):
        shutil.rmtree(folder, ignore_errors=True)
    if complete:
        return
    wait_for_all()

    # 1. What is there already, and what the rest will take.
    labels, indices = labels_for(cfg.seed, n, net.args["classes"]), torch.arange(first_index, first_index + n)
    shape = (n, net.args["channels"], net.args["image_size"], net.args["image_size"])
    megabytes = 2 * math.prod(shape) / 1e6
    free = shutil.disk_usage(next(p for p in path.parents if p.exists())).free / 1e6
    require(free > 3 * megabytes, f"{path} needs {megabytes:.0f} MB, and three times that while it is made; {free:.0f} MB are free")
    sampler, calls = sampler_of(artifact)
    batches = [slice(i, min(i + cfg.sample_batch, n)) for i in range(0, n, cfg.sample_batch)]
    part_of = lambda rows: folder / f"{rows.start:09}-{rows.stop:09}.pt"
    sample = lambda rows, steps: next(generate(net, cfg.seed, indices[rows], steps, None if labels is None else labels[rows],
                                               cfg.sample_batch, sampler, cfg.precision))[1]

    def is_done(rows):
        try:
            part = read(part_of(rows))
        except (FileNotFoundError, ValueError):
            return False  # missing or damaged: made again
        require_same_run(folder, part["run"], run)
        return True

    todo = [rows for rows in batches if not is_done(rows)]
    wait_for_all()  # the same list in every process, before one of them adds to the folder
    started = time.time()
    sample(batches[0], 2)
    seconds = (time.time() - started) / calls(2) * calls(steps) * len(todo) / world()
    say(f"{n} pairs x {calls(steps)} calls = {n * calls(steps):,} images through the network | {megabytes:.0f} MB in {path} | "
        f"{len(batches) - len(todo)} of {len(batches)} batches are there | about {clock(seconds)}")

    # 2. The batches that are missing, each in a file of its own.
    started = reported = time.time()
    with stop_requests() as stopped:
        for i in range(0, len(todo), world()):
            for rows in todo[i:][rank():rank() + 1]:
                x = sample(rows, steps)
                require(x.isfinite().all(), f"the network made images that are not finite (pairs {rows.start} to {rows.stop})")
                save(part_of(rows), cfg, everywhere=True, images=x.half(), run=run)
            if stopped():
                raise Stopped(f"stopped: {folder} keeps what there is, and the same command continues (without --restart)")
            if time.time() - reported > 10:
                reported = time.time()
                say(f"pairs {todo[i].stop}/{n} | left {time_left(started, i + 1, len(todo))}")
    wait_for_all()

    # 3. All in one file.
    if rank() == 0:
        images = np.memmap(folder / "all", np.float16, "w+", shape=shape)
        for rows in batches:
            images[rows] = read(part_of(rows))["images"]
        save(path, cfg, images=torch.from_numpy(images), labels=labels, noise_seed=cfg.seed, first_index=first_index,
             network=net.args, run=run)
        shutil.rmtree(folder)
    wait_for_all()


def move(tensor, device):
    """A CPU tensor on the device. To a GPU through pinned memory: otherwise Python would wait for what the GPU still has to do."""
    return tensor.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else tensor.to(device)


def pair_batch(pairs, part, device):
    """Random pairs of an artifact that make_pairs wrote, for a part of a batch: noise, data, labels (or None)."""
    i = part.randint(len(pairs["images"]))
    data = pairs["images"][i].float()
    noise = noise_for(pairs["noise_seed"], i + pairs["first_index"], data.shape[1:])
    labels = None if pairs["labels"] is None else move(pairs["labels"][i], device)
    return move(noise, device), move(data, device), labels


# ---------------------------------------------------------------------------------------------------------- training

@torch.no_grad()
def ema_update(ema, net, decay, n):
    """theta' <- d theta' + (1 - d) theta,  d = min(decay, (1 + n) / (10 + n)),  n = updates so far, this one included."""
    d = min(decay, (1 + n) / (10 + n))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - d)


def learning_rate(step, cfg):
    """Rises over the first cfg.warmup steps, falls to 0 over the last cfg.cooldown (a fraction of all steps)."""
    rise = min(1.0, (step + 1) / max(1, cfg.warmup))
    fall = min(1.0, (cfg.steps - step) / max(1.0, cfg.cooldown * cfg.steps))
    return cfg.lr * rise * fall


def compiled(net, loss_of):
    """torch.compile(net), or where that is not possible the network as it is, with a line that says why.

    loss_of(net) -> a scalar: tried once, forward and backward, because compiling begins when the network is called.
    """
    say("compiling the network: a minute or more")
    try:
        fast = torch.compile(net)
        loss_of(fast).backward()
        return fast
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ImportError, OSError) as error:
        say(f"--compile does not work here, and the run goes on without: {str(error).strip().splitlines()[0]}")
        return net
    finally:
        net.zero_grad()


def train(name, cfg, net, loss_at, inputs=(), note=None):
    """The training loop of 01, 03 and 04. Returns (EMA network, the loss of every step).

    loss_at(net, step, part)  scalar loss of a part of that step's batch, which takes all its randomness from `part`
    inputs                    artifacts that this stage was given, from load(): a continued run must have the same
    note(step)                text for the log line, such as the current beta

    Adam, gradient norm clipped at cfg.clip, EMA; batches shared out to all processes. The state is saved every cfg.save_every
    steps and when the run is asked to stop, and the run continues from it. Raises UserError at a loss that is not finite.
    """
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), lr=cfg.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)  # paper
    device, losses, recent = next(net.parameters()).device, [], []

    # 1. Where the last run stopped.
    run = {key: value for key, value in dataclasses.asdict(cfg).items() if key not in HARMLESS}
    run |= {f"input {i}": artifact["digest"] for i, artifact in enumerate(inputs, 1)}
    state_path = cfg.folder / f"{name[:2]}_state.pt"
    state = newest_state(state_path, cfg.restart)
    if state:
        require_same_run(state_path, state["run"], run)
        require(state["step"] <= cfg.steps, f"{state_path} is at step {state['step']} already: --steps {cfg.steps} is less. Start "
                "over with --restart, or keep both with another --out")
        net.load_state_dict(state["weights"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        losses = state["losses"].tolist()
        say(f"{name} | continues after step {len(losses)} of {cfg.steps}, from {state_path}")
    first_step = len(losses)

    # 2. How a batch is divided.
    n_parts = world() * cfg.accumulate
    require(cfg.batch >= n_parts, f"--batch {cfg.batch} cannot be divided into {world()} processes x --accumulate {cfg.accumulate}")
    bounds = [cfg.batch * i // n_parts for i in range(rank() * cfg.accumulate, (rank() + 1) * cfg.accumulate + 1)]
    parts = [Part(cfg.batch, *pair) for pair in zip(bounds, bounds[1:])]
    parallel = nn.parallel.DistributedDataParallel(net) if world() > 1 else net  # averages gradients over processes

    def loss_of(net, step, part):
        part.begin(cfg.seed, step)
        with autocast(cfg.precision, device):
            return loss_at(net, step, part) * len(part) / cfg.batch

    def check_recent():
        """Moves the recent losses to `losses`, unless one is not finite. Reading them waits for the GPU, so not every step does."""
        loss, norm = torch.stack(recent, dim=1)  # (steps,) each
        sum_over_processes(loss)
        for step, values in enumerate(zip(loss.tolist(), norm.tolist()), len(losses)):
            for value, what in zip(values, ("loss", "gradient")):
                require(math.isfinite(value), f"{what} not finite at step {step}: nothing was saved since step {saved}. Try a lower "
                        "--lr, and look at the data")
        losses.extend(loss.tolist())
        recent.clear()

    # 3. The loop.
    net.train()
    forward = compiled(parallel, lambda net: loss_of(net, first_step, parts[0])) if cfg.compile else parallel
    started, logged, saved = time.time(), first_step, first_step
    with stop_requests() as stopped:
        for step in range(first_step, cfg.steps):
            optimizer.zero_grad()
            loss = torch.zeros((), device=device)
            for part in parts:
                last_part = part is parts[-1]
                with contextlib.nullcontext() if last_part or world() == 1 else parallel.no_sync():
                    part_loss = loss_of(forward, step, part)
                    (part_loss * world()).backward()  # DistributedDataParallel averages, and this is a sum
                loss += part_loss.detach()
            norm = nn.utils.clip_grad_norm_(net.parameters(), cfg.clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, cfg)
            optimizer.step()
            ema_update(ema, net, cfg.ema, step + 1)
            recent.append(torch.stack([loss, norm]))

            done, end = step + 1, step + 1 == cfg.steps or stopped()
            if end or done % cfg.log_every == 0 or done % cfg.save_every == 0:
                check_recent()
            if end or done % cfg.log_every == 0:
                speed, mean = cfg.batch * (done - first_step) / (time.time() - started), np.mean(losses[logged:])
                extra = f"{note(step)} | " if note else ""
                left = time_left(started, done - first_step, cfg.steps - first_step)
                say(f"{name} | step {done:>6}/{cfg.steps} | loss {mean:.4f} | {extra}lr {learning_rate(step, cfg):.1e} | "
                    f"{speed:.0f} img/s | left {left}")
                logged = done
            if end or done % cfg.save_every == 0:
                save_state(state_path, cfg, step=done, weights=net.state_dict(), ema=ema.state_dict(),
                           optimizer=optimizer.state_dict(), losses=torch.tensor(losses, dtype=torch.float32), run=run)
                saved = done
            if end and done < cfg.steps:
                raise Stopped(f"stopped after step {done} of {cfg.steps}: {state_path} keeps it, and the same command continues "
                              "(without --restart)")
    if rank() == 0:
        previous_state(state_path).unlink(missing_ok=True)
    return ema, losses


def previous_state(path):
    """Where the state before the last one is kept, while a run goes on."""
    return path.with_stem(path.stem + "_previous")


def save_state(path, cfg, **content):
    """save(), keeping the state before: the new one may become unreadable."""
    if rank() == 0 and path.exists():
        os.replace(path, previous_state(path))
    save(path, cfg, **content)


def newest_state(path, restart):
    """The last training state that can be read, or None. Removes what cannot be, or all if `restart`.

    Raises UserError if there are states but none can be read.
    """
    state, damaged = None, []
    for candidate in (path, previous_state(path)):
        if state is None and candidate.exists() and not restart:
            try:
                state = read(candidate)
            except ValueError as error:
                damaged.append(candidate)
                say(f"{candidate} is damaged: {error}")
    require(state or not damaged, f"{path} is damaged, and there is no other; start over with --restart")
    wait_for_all()  # all have looked
    for file in (path, previous_state(path)) if restart else damaged:
        if rank() == 0:
            file.unlink(missing_ok=True)
    return state
