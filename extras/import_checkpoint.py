"""Turn a published checkpoint into an artifact that the stages read.

The U-Net of common.py is the network of two published codes under other names: NCSN++ in the authors' files,
{"model": state dict, "ema": {"shadow_params": [...]}, ...}, and EDM's SongUNet in its DDPM++ settings. Files
may hold only tensors. EDM's own carry code; where that is installed (a clone of github.com/NVlabs/edm), these
lines save the state dict of one:

    import pickle, torch
    edm = pickle.load(open("edm-cifar10-32x32-uncond-vp.pkl", "rb"))
    torch.save(edm["ema"].model.state_dict(), "edm.pt")

A velocity network becomes the artifact --to. An EDM network (the paper's best teacher) predicts something
else, has an equation and a sampler of its own, and makes its pairs here, in place of stage 02.

Reads   --checkpoint PATH
Writes  out/<preset>/<--to>.pt; for an EDM network 02_pairs.pt, 02_pairs.png (05 then needs --reference)
"""
import hashlib
import importlib
import math
import pickle
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import PAIRS, UNet, UserError, load, on_device, require, run, save_grid, save_network, say, start

SETTINGS = [  # name, its value for each preset, text
    ("checkpoint", *[""] * 5, "the published file"),
    ("to", *["01_teacher"] * 5, "what it becomes: 01_teacher, 03_reflow or 04_student"),
    ("predicts", *["auto"] * 5, "velocity, edm, or auto: edm for a SongUNet"),
    ("image_size", 0, 0, 0, 0, 0, "pixels, for an NCSN++; 0: the size whose attention is at 16x16"),
    ("dropout", 0.0, 0.0, 0.0, 0.0, 0.0, "for training it further"),
    ("data", "shapes", "cifar10", "cifar10", "ffhq-64x64.zip", "imagenet-64x64.zip", "its training images"),
    ("n_pairs", 2048, 50_000, 50_000, 50_000, 200_000, "pairs, of an EDM network"),
    ("sample_steps", 18, 18, 18, 18, 18, "Heun steps of each pair. EDM: 18"),
    ("precision", *["fp32"] * 5, "of an EDM network: fp32, bf16 or auto"),
]


def edm_denoise(net, x, sigma, labels=None):
    """D(x; sigma), the clean image that an EDM network sees in x (B, C, H, W) = image + sigma noise.

    Karras et al. 2022 (2206.00364), Eq. 7 and Table 1, with sigma_data = 0.5. sigma: a float > 0.
    """
    c_skip, c_out = 0.25 / (sigma**2 + 0.25), 0.5 * sigma / math.sqrt(sigma**2 + 0.25)
    c_in, c_noise = 1 / math.sqrt(sigma**2 + 0.25), math.log(sigma) / 4
    t = torch.full(x.shape[:1], c_noise / 999, device=x.device)  # our network multiplies by 999
    # D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)
    return c_skip * x + c_out * net((c_in * x).float(), t, labels).to(x.dtype)


@torch.no_grad()
def edm_heun(net, z, steps, labels=None):
    """EDM's sampler, its Algorithm 1: 80 z, z noise (B, C, H, W) -> images, by 2 steps - 1 network calls."""
    low, high, rho = 0.002, 80, 7  # EDM: sigma_min, sigma_max, rho
    first, last = high ** (1 / rho), low ** (1 / rho)
    sigmas = [(first + i / max(1, steps - 1) * (last - first)) ** rho for i in range(steps)] + [0]
    x = high * z.to(torch.float32 if z.device.type == "mps" else torch.float64)  # official code: double
    for sigma, following in zip(sigmas, sigmas[1:]):
        # dx/dsigma = (x - D(x; sigma)) / sigma: an Euler step, then the mean of the slopes at both ends
        slope = (x - edm_denoise(net, x, sigma, labels)) / sigma
        x_next = x + (following - sigma) * slope
        if following:
            slope_next = (x_next - edm_denoise(net, x_next, following, labels)) / following
            x_next = x + (following - sigma) * (slope + slope_next) / 2
        x = x_next
    return x.float()


# ---------------------------------------------------------------------------------------------------- names
# A layout lists every tensor of the U-Net: (our key, their keys, kind). The kind says how theirs become ours.

def join(kind, theirs):
    """Their tensors of an entry -> ours."""
    if kind == "matrices":  # NIN: y = x W + b, W (in, out); ours is a 1x1 convolution, (out, in, 1, 1)
        return torch.cat([w.T for w in theirs])[:, :, None, None]
    if kind == "interleaved":  # SongUNet: row 3 c + s of q, k, v (s = 0, 1, 2) is our row s C + c
        return theirs[0].unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
    return torch.cat(theirs)


def split(kind, ours, n):
    """The inverse of join, for n of their tensors."""
    if kind == "matrices":
        return [w.T for w in ours[:, :, 0, 0].chunk(n)]
    if kind == "interleaved":
        return [ours.unflatten(0, (3, -1)).transpose(0, 1).flatten(0, 1)]
    return ours.chunk(n)


def both(ours, theirs, kind="joined"):
    """The layout of a layer's weight and bias."""
    return [(f"{ours}.{part}", [f"{theirs}.{part}"], kind) for part in ("weight", "bias")]


def residual_blocks(net):
    """(our prefix, block, SongUNet's name) of every residual block, in the order that all codes have."""
    size = net.args["image_size"]
    for part, side in (("encoder", "enc"), ("middle", "dec"), ("decoder", "dec")):
        number = 0  # among the blocks of this size
        for index, block in enumerate(getattr(net, part)):
            down, name = isinstance(block.resample, torch.nn.AvgPool2d), f"block{number}"
            if block.up or down:
                size, number, name = size * 2 if block.up else size // 2, -1, "up" if block.up else "down"
            number += 1
            name = f"in{index}" if part == "middle" else name
            yield f"{part}.{index}", block, f"{side}.{size}x{size}_{name}"


def ncsnpp_layout(net):
    """NCSN++: all_modules.<i>.<part>, i in the order of construction, attention a module of its own."""
    names = {"norm0": "GroupNorm_0", "conv0": "Conv_0", "emb": "Dense_0", "norm1": "GroupNorm_1",
             "conv1": "Conv_1", "skip": "Conv_2"}
    layout, i = [], 3
    for number, ours in enumerate(("time0", "time1", "conv_in")):
        layout += both(ours, f"all_modules.{number}")
    for prefix, block, _ in residual_blocks(net):
        for ours, theirs in names.items():
            if hasattr(getattr(block, ours), "weight"):  # most blocks have no layer in their skip
                layout += both(f"{prefix}.{ours}", f"all_modules.{i}.{theirs}")
        i += 1
        if hasattr(block.attention, "qkv"):
            ours, theirs = f"{prefix}.attention", f"all_modules.{i}"
            layout += both(f"{ours}.norm", f"{theirs}.GroupNorm_0")
            for layer, numbers in (("qkv", range(3)), ("proj", [3])):
                layout += [(f"{ours}.{layer}.weight", [f"{theirs}.NIN_{j}.W" for j in numbers], "matrices"),
                           (f"{ours}.{layer}.bias", [f"{theirs}.NIN_{j}.b" for j in numbers], "joined")]
            i += 1
    return layout + both("norm_out", f"all_modules.{i}") + both("conv_out", f"all_modules.{i + 1}")


def songunet_layout(net):
    """SongUNet: {enc,dec}.<size>x<size>_<block>.<part>, attention inside the block."""
    size = net.args["image_size"]
    layout = both("time0", "map_layer0") + both("time1", "map_layer1")
    layout += both("conv_in", f"enc.{size}x{size}_conv")
    if net.label is not None:
        layout += both("label", "map_label")
    for prefix, block, name in residual_blocks(net):
        for part in ("norm0", "conv0", "emb", "norm1", "conv1", "skip"):
            if hasattr(getattr(block, part), "weight"):
                layout += both(f"{prefix}.{part}", f"{name}.{'affine' if part == 'emb' else part}")
        if hasattr(block.attention, "qkv"):
            layout += both(f"{prefix}.attention.norm", f"{name}.norm2")
            layout += both(f"{prefix}.attention.qkv", f"{name}.qkv", "interleaved")
            layout += both(f"{prefix}.attention.proj", f"{name}.proj")
    layout += both("norm_out", f"dec.{size}x{size}_aux_norm")
    return layout + both("conv_out", f"dec.{size}x{size}_aux_conv")


def export(net, layout):
    """Their state dict of our network."""
    own = net.state_dict()
    return {key: value for ours, theirs, kind in layout
            for key, value in zip(theirs, split(kind, own[ours], len(theirs)))}


def fill(net, layout, state_dict, source):
    """Gives the network their weights. Raises UserError, with the first entries, if they do not fit."""
    shapes = {key: tuple(value.shape) for key, value in export(net, layout).items()}
    theirs = {key: tuple(value.shape) for key, value in state_dict.items()}
    faults = {"missing": [key for key in shapes if key not in theirs],
              "unexpected": [key for key in theirs if key not in shapes],
              "misshapen": [f"{key} {theirs[key]} instead of {shape}" for key, shape in shapes.items()
                            if theirs.get(key, shape) != shape]}
    found = [f"{len(k)} entries {fault}, first {', '.join(k[:3])}" for fault, k in faults.items() if k]
    require(not found, f"{source} does not fit the network: {'; '.join(found)}")
    net.load_state_dict({ours: join(kind, [state_dict[key] for key in keys]) for ours, keys, kind in layout})
    return net.eval()


def from_ncsnpp(state_dict, image_size=None):
    """The authors' network as a UNet. UserError, naming the first entries, if it is incomplete or another.

    state_dict: keys with or without "module."; image_size: if not given, attention is at 16x16, as published.
    """
    state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    state_dict.pop("sigmas", None)  # a table that the network does not use
    conv_in = state_dict.get("all_modules.2.weight", torch.empty(0))
    require(conv_in.ndim == 4, "not an NCSN++ state dict: all_modules.2.weight is missing or misshapen")

    # 1. Every residual block: (channels out, channels in, has a skip convolution, attention follows).
    parts, blocks = {}, []  # {i: what all_modules.i consists of}
    for key in state_dict:
        if match := re.fullmatch(r"all_modules\.(\d+)\.(.+)", key):
            parts.setdefault(int(match[1]), []).append(match[2])
    for i, names in sorted(parts.items()):
        if any(name.startswith(("Conv_", "Dense_")) for name in names):
            c_out, c_in = (*state_dict.get(f"all_modules.{i}.Conv_0.weight", conv_in).shape, 0)[:2]
            attention = any(name.startswith("NIN_") for name in parts.get(i + 1, []))
            blocks.append((c_out, c_in, "Conv_2.weight" in names, attention))

    # 2. L levels of n blocks have (2 n + 3) L in all. After the first n comes one that halves the size: it is
    #    the first that has a skip convolution although its width stays.
    halving = [i for i, (c_out, c_in, skip, _) in enumerate(blocks) if skip and c_in == c_out]
    n = halving[0] if halving else (len(blocks) - 3) // 2
    levels = len(blocks) // (2 * n + 3)
    require(n > 0 and len(blocks) == (2 * n + 3) * levels,
            f"not an NCSN++ state dict: {len(blocks)} residual blocks of these widths make no U-Net")
    first = blocks[:(n + 1) * levels:n + 1]  # of each level of the encoder
    with_attention = [level for level, block in enumerate(first) if block[3]]
    require(image_size or with_attention, "there is no attention outside the middle: give --image_size")
    image_size, (base, channels) = image_size or 16 * 2 ** with_attention[0], conv_in.shape[:2]
    net = UNet(image_size, channels, base, [block[0] // base for block in first], n,
               [image_size // 2**level for level in with_attention])
    return fill(net, ncsnpp_layout(net), state_dict, "the NCSN++ state dict")


def from_songunet(state_dict):
    """EDM's SongUNet as a UNet. UserError, naming the first entries, if it is incomplete or another.

    state_dict: keys with or without "model.". Its augmentation labels are left out: when sampling they are 0.
    Its constants (resample_filter) tell that EDM's code wrote it, and so how the time embedding was rounded.
    """
    by_edm = any(key.endswith("resample_filter") for key in state_dict)
    state_dict = {key.removeprefix("model."): value for key, value in state_dict.items()
                  if not key.endswith(("resample_filter", "map_augment.weight"))}
    first = re.findall(r"enc\.(\d+)x\1_conv\.weight", "\n".join(state_dict))
    require(len(first) == 1, "not a SongUNet state dict of the DDPM++ kind: it must have one "
            "enc.<size>x<size>_conv.weight (an ADM network, like EDM's of ImageNet-64, has none)")
    image_size = int(first[0])
    base, channels = state_dict[f"enc.{image_size}x{image_size}_conv.weight"].shape[:2]
    mult, attn, n, size = [], [], 1, image_size
    while level := [key for key in state_dict if key.startswith(f"enc.{size}x{size}_block")]:
        mult.append(max((len(state_dict[key]) for key in level if ".conv" in key), default=0) // base)
        attn += [size] if any(".qkv." in key for key in level) else []
        n = max(n, *(1 + int(re.search(r"_block(\d+)", key)[1]) for key in level))
        size //= 2
    label = state_dict.get("map_label.weight")
    net = UNet(image_size, channels, base, mult, n, attn, classes=0 if label is None else label.shape[1])
    if by_edm:  # the same numbers but for the rounding, which at angles up to 999 shows in the fifth digit
        k = torch.arange(base // 2, dtype=torch.float32)
        net.frequencies = (1 / 10_000) ** (k / (base // 2 - 1))
    return fill(net, songunet_layout(net), state_dict, "the SongUNet state dict")


def read_checkpoint(path, image_size=None):
    """(UNet, "ncsnpp" or "songunet") from a published file: its EMA, if it has one."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise UserError(f"{path} is damaged, or holds code, as EDM's own files do: see --help") from error
    state_dict = content.get("model", content) if isinstance(content, dict) else {"": None}
    require(isinstance(state_dict, dict) and all(map(torch.is_tensor, state_dict.values())),
            f"{path} holds no state dict")
    if not any("all_modules." in key for key in state_dict):
        return from_songunet(state_dict), "songunet"
    if "ema" in content:  # a list without names, in the order of the trained parameters
        names = [key for key in state_dict if not key.endswith("sigmas")]
        shadow = content["ema"].get("shadow_params", [])
        require(len(names) == len(shadow), f"{path}: the EMA has {len(shadow)} of {len(names)} tensors")
        state_dict = dict(zip(names, shadow))
    return from_ncsnpp(state_dict, image_size), "ncsnpp"


def main(cfg):
    device, path = start(cfg, "import"), Path(cfg.checkpoint)
    require(cfg.to in ("01_teacher", "03_reflow", "04_student"), "--to: 01_teacher, 03_reflow or 04_student")
    require(cfg.predicts in ("auto", "velocity", "edm"), "--predicts: auto, velocity or edm")
    require(path.is_file(), f"--checkpoint {cfg.checkpoint!r} does not exist")
    require(path.resolve().parent != cfg.folder.resolve() and not re.match(r"0\d_", path.name),
            f"{path}: move it out of {cfg.folder}, and give it a name that no result has")

    # 1. Read it under our names.
    net, kind = read_checkpoint(path, cfg.image_size or None)
    edm = cfg.predicts == "edm" or (cfg.predicts == "auto" and kind == "songunet")
    say(f"{kind} | {net.args} | predicts {'what EDM asks for' if edm else 'the velocity'}")
    made_from = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]}

    # 2. An EDM network makes the pairs.
    if edm:
        require(cfg.to == "01_teacher", f"an EDM network is a teacher, not {cfg.to}: it predicts no velocity")
        stage = importlib.import_module("02_generate_pairs")
        stage.make_pairs(cfg, "02_pairs.pt", on_device(net, device, cfg.precision), made_from, cfg.n_pairs,
                         cfg.sample_steps, PAIRS, sampler=edm_heun)
        save_grid(cfg.folder / "02_pairs.png", load(cfg, "02_pairs.pt")["x"][:64].split(8))
        say(f"wrote {cfg.folder}/02_pairs.pt, 02_pairs.png")
        return

    # 3. A velocity network is saved as a stage would have.
    target, net.args["dropout"] = cfg.folder / f"{cfg.to}.pt", cfg.dropout
    require(cfg.restart or not target.exists(), f"{target} is there already: --restart replaces it")
    save_network(cfg, target.name, net, made_from)
    say(f"wrote {target}")


if __name__ == "__main__":
    run(main, SETTINGS, __doc__)
