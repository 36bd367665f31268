"""The U-Net: parameter counts, labels, precision, the official network's outputs; published checkpoints."""
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
from common import UNet, UserError, euler
from conftest import SHARED, filled, script, settings_of

PAPER = [(dict(base=64, mult=(1, 1, 2), blocks=1), 3_437_123), (dict(base=96), 15_707_235),
         (dict(base=128, mult=(1, 2, 2, 2), blocks=4), 61_804_419),
         (dict(image_size=64, base=64, mult=(1, 1, 2), blocks=1), 3_536_195)]
LABELLED = dict(image_size=16, base=16, dropout=0.15, attn=(8,), classes=3)


def in_double(net):
    """The network in float64, but for the sines and cosines: angles up to 999 are rounded as always."""
    frequencies = net.frequencies
    net.double().frequencies = frequencies
    net.time0.register_forward_pre_hook(lambda layer, given: given[0].double())
    return net.eval()


def test_parameters_and_macs_are_the_papers():
    for arguments, count in PAPER:
        with torch.device("meta"):
            net = UNet(**{"image_size": 32, **arguments})
        assert sum(p.numel() for p in net.parameters()) == count
    for arguments, macs in ((dict(base=96), 3.699), (PAPER[0][0], 0.705)):
        assert round(script("05").count_macs(UNet(32, **arguments)) / 1e9, 3) == macs


def test_it_begins_near_zero_drops_out_in_training_only_and_computes_in_bf16_if_asked():
    given = torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([0, 2])
    assert 0 < UNet(**LABELLED)(*given).abs().max() < 1e-3
    net, dtypes = filled(**LABELLED).train(), []
    out = net(*given)
    assert not torch.equal(out, net(*given)) and torch.equal(net.eval()(*given), net(*given))
    out.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in net.parameters())
    exact, net.precision = net(*given), "bf16"
    for layer in (net.encoder[0].conv0, net.conv_out):  # the last one does not
        layer.register_forward_hook(lambda layer, given, out: dtypes.append(out.dtype))
    assert 0 < (net(*given) - exact).std() < 0.05 * exact.std()
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
    net = in_double(filled(16, 0.15, base=base, mult=mult, blocks=blocks, attn=attn))
    x, t = torch.randn(3, 3, 16, 16, dtype=torch.float64), torch.tensor([0.001, 0.37, 1.0])
    expected = ncsnpp(exported(net, "ncsnpp"), x, 999 * t, mult, blocks, attn)
    assert expected.std() > 0.1
    torch.testing.assert_close(net(x, t), expected, atol=1e-9, rtol=0)


def test_known_numbers_of_the_embedding_and_the_whole_network_and_labels_as_in_songunet():
    # Official output for t = 0.7351 and 32 channels: sines 0, 1, 5, 15, then cosines 0, 1, 5, 15.
    emb = sinusoid(torch.tensor([0.7351]) * 999, 32)[0, [0, 1, 5, 15, 16, 17, 21, 31]]
    official = [-0.694563, 0.999990, 0.454061, 0.073370, 0.719432, -0.004423, -0.890970, 0.997305]
    np.testing.assert_allclose(emb, official, atol=1e-4)
    # Our own output, as it was when it equalled the official one.
    net = in_double(filled(16, 0.15, base=16, mult=(1, 2), blocks=1, attn=(8,)))
    x = torch.from_numpy(np.random.RandomState(1).standard_normal((1, 3, 16, 16)))
    out = net(x, torch.tensor([0.37]))[0, :, 4, 4:6].flatten()
    np.testing.assert_allclose(out.detach(), [-0.9144, 1.0147, 2.6104, 0.8383, -3.4398, -0.9030], atol=3e-4)

    net, t, labels, found = filled(**LABELLED), torch.rand(2), torch.tensor([2, 0]), []
    net.time0.register_forward_pre_hook(lambda layer, given: found.append(given[0]))
    net(torch.randn(2, 3, 16, 16), t, labels)
    emb = sinusoid(999 * t, 16) + net.label.weight.T[labels] * math.sqrt(3) + net.label.bias
    torch.testing.assert_close(found[0], emb)


@pytest.mark.skipif(not SHARED.exists(), reason="the official outputs are not at hand")
@pytest.mark.parametrize("name, reader, time", [("ncsnpp_tiny", "from_ncsnpp", "t999"),
                                                ("edm_songunet_tiny", "from_songunet", "noise_labels")])
def test_output_and_gradient_equal_the_official_network(name, reader, time):
    data = np.load(SHARED / f"{name}.npz")
    data = {key: torch.from_numpy(data[key]) for key in data if key != "meta"}
    w = {key.removeprefix("param::"): data[key] for key in data if key.startswith("param::")}
    net, x, label = getattr(script("import"), reader)(w), data["x"], data[time]
    torch.testing.assert_close(net(x, label / 999), data["out"], atol=2e-4, rtol=0)
    x = x.double().requires_grad_()
    answers = [in_double(net)(x, label / 999)]
    answers += [ncsnpp(w, x, label, (1, 2, 2), 2, (16,))] if name == "ncsnpp_tiny" else []
    for answer in answers:
        torch.testing.assert_close(answer, data["out"].double(), atol=1e-6, rtol=0)
        gradient, = torch.autograd.grad(answer, x, data["v"].double())
        torch.testing.assert_close(gradient, data["grad_x"].double(), atol=1e-4, rtol=0)  # it reaches 81


# --------------------------------------------------------------------------------- Published checkpoints

NETWORKS = [dict(image_size=32, base=8, mult=(1, 1, 2), blocks=1),
            dict(image_size=16, base=8, mult=(2,), blocks=2),
            dict(image_size=64, base=8, mult=(1, 2, 1), blocks=3),
            dict(image_size=16, base=8, mult=(1, 2), blocks=1, classes=4)]


def import_main(number="import", **settings):
    script(number).main(settings_of(number, preset="cifar10", **settings))


def exported(net, kind):
    """The state dict of a published network: "ncsnpp" or "songunet"."""
    return script("import").export(net, getattr(script("import"), f"{kind}_layout")(net))


def authors_file(net):
    """Their checkpoint of a network: trained weights all 0, the EMA a list without names."""
    weights = exported(net, "ncsnpp")
    model = {f"module.{key}": torch.zeros_like(w) for key, w in weights.items()} | {"sigmas": torch.ones(9)}
    return {"model": model, "ema": {"decay": 0.999999, "shadow_params": list(weights.values())}, "step": 7}


@pytest.mark.parametrize("arguments", NETWORKS)
def test_round_trip_through_both_formats_gives_the_same_samples_bit_for_bit(arguments):
    net = filled(**arguments)
    z = torch.randn(2, 3, net.args["image_size"], net.args["image_size"])
    y = torch.tensor([0, 3]) if net.args["classes"] else None
    for kind, prefix in [("songunet", "model."), *([("ncsnpp", "module.")] if y is None else [])]:
        theirs = {prefix + key: value for key, value in exported(net, kind).items()}
        again = getattr(script("import"), f"from_{kind}")(theirs)
        assert again.args == net.args and torch.equal(euler(again, z, 2, y), euler(net, z, 2, y))
    # Row 3 c + s in SongUNet's attention: query, key or value (s) of channel c. (NCSN++ is derived above.)
    size = net.args["image_size"] // 2 ** (len(net.args["mult"]) - 1)
    rows = exported(net, "songunet")[f"dec.{size}x{size}_in0.qkv.weight"]
    assert torch.equal(torch.cat([rows[s::3] for s in range(3)]), net.middle[0].attention.qkv.weight)


def test_published_networks_become_a_teacher_or_make_pairs_with_edms_own_sampler(tmp_path):
    s, net, out = script("import"), filled(**NETWORKS[0]), tmp_path / "out/cifar10"
    z = common.noise_for(0, range(3), (3, 32, 32))
    torch.save(authors_file(net), "theirs.pth")
    import_main(checkpoint="theirs.pth", dropout=0.1)
    import_main("02", n_pairs=3, sample_steps=2, precision="fp32")
    x = common.read(out / "02_pairs.pt")["x"].float()
    torch.testing.assert_close(x, euler(net, z, 2), atol=1e-2, rtol=1e-3)
    teacher = common.read(out / "01_teacher.pt")
    assert teacher["network"]["dropout"] == 0.1 and teacher["made_from"].keys() == {"theirs.pth"}

    theirs = exported(net, "songunet")
    assert torch.equal(s.from_songunet(theirs).frequencies, net.frequencies)
    theirs["model.enc.16x16_down.conv0.resample_filter"] = torch.ones(1, 1, 2, 2)  # so EDM's code wrote it
    torch.save(theirs, "edm.pt")
    edm = s.from_songunet(theirs)
    assert torch.equal(edm.frequencies, (1 / 10_000) ** (torch.arange(4) / 3))
    shutil.rmtree(out)
    import_main(checkpoint="edm.pt", n_pairs=3, sample_steps=3)
    pairs = common.read(out / "02_pairs.pt")
    assert torch.equal(pairs["z"], z.half())
    torch.testing.assert_close(pairs["x"].float(), s.edm_heun(edm, z.half().float(), 3), atol=1e-2, rtol=1e-3)
    assert pairs["made_from"].keys() == {"edm.pt"}


def test_edm_sampler_follows_the_exact_path_of_a_gaussian():
    """Data N(0, s^2): D(x; sigma) = s^2 / (s^2 + sigma^2) x, and x(0) = x(80) s / sqrt(s^2 + 80^2)."""
    s, calls, edm_heun = 0.3, [], script("import").edm_heun

    def network(x, t, labels):
        sigma = math.exp(4 * 999 * t[0].item())
        calls.append(sigma)
        x = x * math.sqrt(sigma**2 + 0.25)  # undo c_in
        share = s**2 / (s**2 + sigma**2) - 0.25 / (sigma**2 + 0.25)  # D(x) - c_skip x
        return share * x * math.sqrt(sigma**2 + 0.25) / (0.5 * sigma)

    z = torch.randn(5, 3, 4, 4)
    edm_heun(network, z, 18)
    assert len(calls) == 35 and [calls[0], calls[-1]] == pytest.approx([80, 0.002], rel=1e-3)
    expected = z * 80 * s / math.sqrt(s**2 + 80**2)
    errors = [(edm_heun(network, z, steps) - expected).abs().max() for steps in (100, 200)]
    assert errors[1] < 1e-3 and 3 < errors[0] / errors[1] < 5  # of second order


def test_files_that_are_no_checkpoints_are_refused_and_no_code_runs(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "created"), "w"))

    good, ema = exported(filled(**NETWORKS[0]), "ncsnpp"), authors_file(filled(**NETWORKS[0]))
    ema["ema"]["shadow_params"].pop()
    key = "all_modules.9.Conv_0.weight"
    for content, message in (({"ema": Malicious()}, "holds code"), (ema, "the EMA has"),
                             (good | {"a.bias": good[key]}, "1 entries unexpected, first a.bias"),
                             (good | {key: good[key][1:]}, f"1 entries misshapen, first {key}"),
                             ({k: good[k] for k in good if k != key}, f"1 entries missing, first {key}")):
        torch.save(content, "a.pt")
        with pytest.raises(UserError, match=message):
            import_main(checkpoint="a.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_the_network_is_one_graph_to_the_compiler():
    net = filled(16, base=8, mult=(1, 2), blocks=1, attn=(8,), classes=4)
    net.precision = "bf16"
    given = torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([1, 3])
    found = torch.compile(net, backend="aot_eager", fullgraph=True)(*given)  # fails where a graph would break
    torch.testing.assert_close(found, net(*given), rtol=1e-3, atol=1e-3)
    found.square().mean().backward()
