"""The U-Net: parameter counts to the digit, labels, precision, and the official network's outputs."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import PRESETS, UNet, UserError
from conftest import load_script

FIXTURES = Path(__file__).resolve().parents[2] / "shared" / "fixtures"  # official outputs, not in every clone
PAPER = [(dict(base=64, mult=(1, 1, 2), blocks=1), 3_437_123), (dict(base=64), 6_989_891),
         (dict(base=96), 15_707_235), (dict(base=128), 27_906_179),
         (dict(base=128, mult=(1, 2, 2, 2), blocks=4), 61_804_419),
         (dict(image_size=64, base=64, mult=(1, 1, 2), blocks=1), 3_536_195)]


def parameters(image_size=32, **arguments):
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(image_size, **arguments).parameters())


def filled(std, image_size, **arguments):
    """A network with random weights, zero nowhere. (NumPy promises that RandomState never changes.)"""
    net, rng = UNet(image_size, **arguments), np.random.RandomState(0)
    for name, p in sorted(net.named_parameters()):
        noise = torch.from_numpy(rng.standard_normal(tuple(p.shape)))
        p.data.copy_(std * noise + (1 if "norm" in name and name.endswith("weight") else 0))
    return net


def in_double(net):
    """The network in float64, but for the sines and cosines: angles up to 999 are rounded as always."""
    frequencies = net.frequencies
    net.double().frequencies = frequencies
    net.time0.register_forward_pre_hook(lambda layer, given: given[0].double())
    return net.eval()


def test_parameters_and_macs_are_the_papers(stage):
    assert [parameters(**arguments) for arguments, _ in PAPER] == [count for _, count in PAPER]
    for arguments, macs in ((dict(base=96), 3.699), (PAPER[0][0], 0.705)):
        assert round(stage("05").count_macs(UNet(32, **arguments)) / 1e9, 3) == macs
    sizes = {"shapes": (0.8635, 0.3177), "cifar10_quick": (27.9, 7.0), "cifar10": (61.8, 15.7),
             "ffhq64": (61.8, 15.7), "imagenet64": (114.0, 80.6)}
    for column, preset in enumerate(PRESETS, 1):
        first, small = ({row[0]: row[column] for row in stage(number).SETTINGS} for number in ("01", "03"))
        size, classes = first["image_size"], 1000 if first["conditional"] else 0
        for table, millions in zip((first, small), sizes[preset]):
            arguments = {key: table[key] for key in ("base", "mult", "blocks", "attn")}
            count = parameters(size, classes=classes, **arguments)
            assert count == pytest.approx(1e6 * millions, rel=0.005), preset


def test_at_first_the_network_answers_nearly_zero_and_dropout_acts_in_training_only():
    arguments = dict(base=16, dropout=0.15, attn=(8,), classes=3)
    given = torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([0, 2])
    assert 0 < UNet(16, **arguments)(*given).abs().max() < 1e-3
    net = filled(0.1, 16, **arguments)
    out = net(*given)
    assert not torch.equal(out, net(*given)) and torch.equal(net.eval()(*given), net(*given))
    out.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in net.parameters())


def test_bf16_computes_in_bf16_but_for_the_last_layer():
    net, given = filled(0.1, 8, base=8, mult=(1,), blocks=1), (torch.randn(2, 3, 8, 8), torch.rand(2))
    dtypes, exact, net.precision = [], net(*given), "bf16"
    for layer in (net.encoder[0].conv0, net.conv_out):
        layer.register_forward_hook(lambda layer, given, out: dtypes.append(out.dtype))
    assert 0 < (net(*given) - exact).abs().max() < 0.1 * exact.std()
    assert dtypes == [torch.bfloat16, torch.float32]


# ------------------------------------------------------------------------ the official network, a second time

def sinusoid(label, base):
    """(B, base): sines, then cosines, of the label, which is 999 t."""
    angles = label[:, None] * torch.exp(torch.arange(base // 2) * (-math.log(10_000) / (base // 2 - 1)))
    return torch.cat([torch.sin(angles), torch.cos(angles)], 1)


def conv(h, m, name=""):
    return F.conv2d(h, m[f"{name}weight"], m[f"{name}bias"], padding=m[f"{name}weight"].shape[-1] // 2)


def norm(h, m, name=""):
    return F.group_norm(h, min(h.shape[1] // 4, 32), m[f"{name}weight"], m[f"{name}bias"], eps=1e-6)


def block(x, temb, m, resample=None):
    h = F.silu(norm(x, m, "GroupNorm_0."))
    if resample:
        h, x = resample(h), resample(x)
    temb = F.linear(F.silu(temb), m["Dense_0.weight"], m["Dense_0.bias"])
    h = conv(h, m, "Conv_0.") + temb[:, :, None, None]
    h = conv(F.silu(norm(h, m, "GroupNorm_1.")), m, "Conv_1.")
    return ((conv(x, m, "Conv_2.") if "Conv_2.weight" in m else x) + h) / math.sqrt(2)


def attention(x, m):
    h = norm(x, m, "GroupNorm_0.").flatten(2).transpose(1, 2)  # (B, positions, C)
    q, k, v = (h @ m[f"NIN_{i}.W"] + m[f"NIN_{i}.b"] for i in range(3))
    h = (q @ k.transpose(1, 2) * x.shape[1] ** -0.5).softmax(2) @ v @ m["NIN_3.W"] + m["NIN_3.b"]
    return (x + h.transpose(1, 2).reshape(x.shape)) / math.sqrt(2)


def ncsnpp(w, x, label, mult, blocks, attn):
    """The official NCSN++ in float64, module after module. w: {official name, all_modules.<i>...: tensor}."""
    modules = {}
    for key in [key for key in w if key != "sigmas"]:
        _, i, part = key.split(".", 2)
        modules.setdefault(int(i), {})[part] = w[key].double()
    modules = iter([modules[i] for i in range(len(modules))])
    temb = sinusoid(label, len(w["all_modules.2.bias"])).double()
    temb = F.linear(temb, *next(modules).values())
    temb = F.linear(F.silu(temb), *next(modules).values())
    h = conv(x, next(modules))
    skips = [h]
    for level in range(len(mult)):
        for _ in range(blocks):
            h = block(h, temb, next(modules))
            h = attention(h, next(modules)) if h.shape[-1] in attn else h
            skips.append(h)
        if level < len(mult) - 1:
            h = block(h, temb, next(modules), lambda h: F.avg_pool2d(h, 2))
            skips.append(h)
    h = attention(block(h, temb, next(modules)), next(modules))
    h = block(h, temb, next(modules))
    for level in reversed(range(len(mult))):
        for _ in range(blocks + 1):
            h = block(torch.cat([h, skips.pop()], 1), temb, next(modules))
        h = attention(h, next(modules)) if h.shape[-1] in attn else h
        h = block(h, temb, next(modules), lambda h: F.interpolate(h, scale_factor=2)) if level else h
    h = conv(F.silu(norm(h, next(modules))), next(modules))
    assert not skips and not list(modules)
    return h


@pytest.mark.parametrize("mult, blocks, attn, base", [((1, 2), 1, (8,), 8), ((1, 2, 2), 2, (16,), 16),
                                                      ((2, 1, 3), 1, (16, 4), 12)])
def test_output_equals_a_second_derivation_of_the_official_network(mult, blocks, attn, base):
    net = in_double(filled(0.15, 16, base=base, mult=mult, blocks=blocks, attn=attn))
    x, t = torch.randn(3, 3, 16, 16, dtype=torch.float64), torch.tensor([0.001, 0.37, 1.0])
    weights = load_script("import").export(net, load_script("import").ncsnpp_layout(net))
    expected = ncsnpp(weights, x, 999 * t, mult, blocks, attn)
    assert expected.std() > 0.1
    torch.testing.assert_close(net(x, t), expected, atol=1e-9, rtol=0)


def test_known_numbers_of_the_embedding_and_the_whole_network_and_labels_as_in_songunet():
    # Official output for t = 0.7351 and 32 channels: sines 0, 1, 5, 15, then cosines 0, 1, 5, 15.
    emb = sinusoid(torch.tensor([0.7351]) * 999, 32)[0, [0, 1, 5, 15, 16, 17, 21, 31]]
    official = [-0.694563, 0.999990, 0.454061, 0.073370, 0.719432, -0.004423, -0.890970, 0.997305]
    np.testing.assert_allclose(emb, official, atol=1e-4)
    # Our own output, as it was when it equalled the official one.
    net = in_double(filled(0.15, 16, base=16, mult=(1, 2), blocks=1, attn=(8,)))
    x = torch.from_numpy(np.random.RandomState(1).standard_normal((1, 3, 16, 16)))
    out = net(x, torch.tensor([0.37]))[0, :, 4, 4:6].flatten()
    np.testing.assert_allclose(out.detach(), [-0.9144, 1.0147, 2.6104, 0.8383, -3.4398, -0.9030], atol=3e-4)

    net, t = filled(0.3, 8, base=8, mult=(1,), blocks=1, classes=5), torch.rand(2)
    labels = torch.tensor([4, 1])
    emb = sinusoid(999 * t, 8) + net.label.weight.T[labels] * math.sqrt(5) + net.label.bias
    torch.testing.assert_close(net.embed(t, labels), net.time1(F.silu(net.time0(emb))))
    with pytest.raises(AssertionError, match="labels are for networks with classes"):
        net(torch.randn(2, 3, 8, 8), t)
    with pytest.raises(UserError, match="144 channels"):
        UNet(16, base=24, mult=(1, 2, 6))


@pytest.mark.skipif(not FIXTURES.exists(), reason="the official outputs are not at hand")
@pytest.mark.parametrize("name, reader, time", [("ncsnpp_tiny", "from_ncsnpp", "t999"),
                                                ("edm_songunet_tiny", "from_songunet", "noise_labels")])
def test_output_and_gradient_equal_the_official_network(name, reader, time):
    data = np.load(FIXTURES / f"{name}.npz")
    data = {key: torch.from_numpy(data[key]) for key in data if key != "meta"}
    w = {key.removeprefix("param::"): data[key] for key in data if key.startswith("param::")}
    net, x, label = getattr(load_script("import"), reader)(w), data["x"], data[time]
    torch.testing.assert_close(net(x, label / 999), data["out"], atol=2e-4, rtol=0)
    x = x.double().requires_grad_()
    answers = [in_double(net)(x, label / 999)]
    answers += [ncsnpp(w, x, label, (1, 2, 2), 2, (16,))] if name == "ncsnpp_tiny" else []
    for answer in answers:
        torch.testing.assert_close(answer, data["out"].double(), atol=1e-6, rtol=0)
        gradient, = torch.autograd.grad(answer, x, data["v"].double())
        torch.testing.assert_close(gradient, data["grad_x"].double(), atol=1e-4, rtol=0)  # it reaches 81
