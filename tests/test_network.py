"""The U-Net: sizes, labels, precision, the official network's outputs; published checkpoints."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from torch.testing import assert_close

import common
from common import ResBlock, UNet, UserError, euler
from conftest import SHARED, filled, script, settings_of

TEACHER = dict(
    base=128,
    mult=(1, 2, 2, 2),
    blocks=4,
)
STUDENT = dict(base=64, mult=(1, 1, 2), blocks=1)
TWO_LEVELS = dict(mult=(1, 2), blocks=1, attn=(8,))
LABELLED = dict(
    base=16,
    dropout=0.15,
    attn=(8,),
    classes=3,
)


def inputs(*labels):
    """x_t, t and labels for a network of 16x16 images."""
    n = len(labels)
    x, t = torch.randn(n, 3, 16, 16), torch.rand(n)
    return x, t, torch.tensor(labels)


def in_double(net):
    """The network in float64, but for the sines and cosines: angles up to 999 are rounded."""
    frequencies = net.frequencies
    net.double()
    net.frequencies = frequencies
    net.time0.register_forward_pre_hook(lambda layer, given: given[0].double())
    return net.eval()


@pytest.mark.parametrize("image_size, arguments, count, billions", [
    (32, STUDENT, 3_437_123, 0.705),
    (32, dict(base=96), 15_707_235, 3.699),
    (32, TEACHER, 61_804_419, None),
    (64, STUDENT, 3_536_195, None),
])
def test_parameters_and_macs_are_the_papers(image_size, arguments, count, billions):
    """The networks are as large as the paper says, and MACs are counted as it counts them."""
    with torch.device("meta"):
        net = UNet(image_size, **arguments)
    assert sum(p.numel() for p in net.parameters()) == count
    if billions:
        net = UNet(image_size, **arguments)
        macs = script("05").count_macs(net)
        assert round(macs / 1e9, 3) == billions


def test_it_begins_near_zero_drops_out_in_training_only_and_computes_in_bf16_if_asked():
    """A new network answers almost 0, and all of its weights learn."""
    given = inputs(0, 2)
    new = UNet(16, **LABELLED)
    assert 0 < new(*given).abs().max() < 1e-3

    # Dropout in training makes two answers differ.
    net = filled(16, **LABELLED).train()
    out = net(*given)
    assert not torch.equal(out, net(*given))
    net.eval()
    exact = net(*given)
    assert torch.equal(exact, net(*given))

    # Each weight has a gradient.
    out.sum().backward()
    for p in net.parameters():
        assert p.grad.isfinite().all()
        assert p.grad.abs().sum() > 0

    # All layers but the last compute in bfloat16.
    dtypes = []
    for layer in (net.encoder[0].conv0, net.conv_out):
        layer.register_forward_hook(lambda layer, given, out: dtypes.append(out.dtype))
    net.precision = "bf16"
    error = net(*given) - exact
    assert 0 < error.std() < 0.05 * exact.std()
    assert dtypes == [torch.bfloat16, torch.float32]


def test_dropout_sits_between_the_silu_and_the_second_convolution():
    """Nothing normalises or bends what dropout leaves: conv1 sees zeros and scaled SiLUs."""
    block = ResBlock(8, 8, 4, dropout=0.5)
    seen, dropped = [], []
    block.dropout.register_forward_hook(lambda layer, given, out: dropped.append(out))
    block.norm1.register_forward_hook(lambda layer, given, out: seen.append(out))
    block.conv1.register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    x, emb = torch.randn(2, 8, 16, 16), torch.randn(2, 4)
    block(x, emb)
    normalised, given = seen
    kept = given != 0
    assert 0.4 < kept.float().mean() < 0.6
    assert_close(given, 2 * F.silu(normalised) * kept)
    assert len(dropped) == 1


# -------------------------------------------------------------- the official network, a second time

def sinusoid(label, base):
    """(B, base): sines, then cosines, of the label, which is 999 t."""
    n = base // 2
    step = math.log(10_000) / (n - 1)
    frequencies = torch.exp(-step * torch.arange(n))
    angles = label[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


def parameters(m, name):
    return m[name + "weight"], m[name + "bias"]


def linear(h, m, name=""):
    return F.linear(h, *parameters(m, name))


def conv(h, m, name=""):
    return F.conv2d(h, *parameters(m, name), padding="same")


def norm(h, m, name=""):
    groups = min(h.shape[1] // 4, 32)
    return F.group_norm(h, groups, *parameters(m, name), eps=1e-6)


def nin(h, m, i):
    return h @ m[f"NIN_{i}.W"] + m[f"NIN_{i}.b"]


def block(x, temb, m, resample=None):
    h = F.silu(norm(x, m, "GroupNorm_0."))
    if resample:
        h, x = resample(h), resample(x)
    temb = linear(F.silu(temb), m, "Dense_0.")
    h = conv(h, m, "Conv_0.")
    h = h + temb[:, :, None, None]
    h = F.silu(norm(h, m, "GroupNorm_1."))
    h = conv(h, m, "Conv_1.")
    if "Conv_2.weight" in m:
        x = conv(x, m, "Conv_2.")
    return (x + h) / math.sqrt(2)


def attention(x, m):
    h = norm(x, m, "GroupNorm_0.").flatten(2).mT  # (B, positions, C)
    q, k, v = (nin(h, m, i) for i in range(3))
    scores = q @ k.mT / math.sqrt(x.shape[1])
    h = nin(scores.softmax(2) @ v, m, 3)
    return (x + h.mT.reshape(x.shape)) / math.sqrt(2)


def down(h):
    return F.avg_pool2d(h, 2)


def up(h):
    return F.interpolate(h, scale_factor=2)


def ncsnpp(w, x, label, mult, blocks, attn):
    """The official NCSN++ in float64. w: {official name, all_modules.<i>...: tensor}."""
    modules = {}
    for key in w:
        if key != "sigmas":
            _, i, part = key.split(".", 2)
            module = modules.setdefault(int(i), {})
            module[part] = w[key].double()
    modules = map(modules.get, range(len(modules)))

    def residual(h, resample=None):
        return block(h, temb, next(modules), resample)

    base = len(w["all_modules.2.bias"])
    temb = sinusoid(label, base).double()
    temb = linear(temb, next(modules))
    temb = linear(F.silu(temb), next(modules))
    h = conv(x, next(modules))
    skips = [h]
    levels = range(len(mult))
    for level in levels:
        for _ in range(blocks):
            h = residual(h)
            if h.shape[-1] in attn:
                h = attention(h, next(modules))
            skips.append(h)
        if level < levels[-1]:
            h = residual(h, down)
            skips.append(h)
    h = residual(h)
    h = attention(h, next(modules))
    h = residual(h)
    for level in reversed(levels):
        for _ in range(blocks + 1):
            h = residual(torch.cat([h, skips.pop()], 1))
        if h.shape[-1] in attn:
            h = attention(h, next(modules))
        if level > 0:
            h = residual(h, up)
    h = F.silu(norm(h, next(modules)))
    h = conv(h, next(modules))
    assert not skips
    assert not list(modules)
    return h


@pytest.mark.parametrize("mult, blocks, attn, base", [
    ((1, 2), 1, (8,), 8),
    ((1, 2, 2), 2, (16,), 16),
    ((2, 1, 3), 1, (16, 4), 12),
])
def test_output_equals_a_second_derivation_of_the_official_network(mult, blocks, attn, base):
    """The U-Net computes what the authors' network does, layer after layer."""
    net = filled(16, 0.15, base=base, mult=mult, blocks=blocks, attn=attn)
    in_double(net)
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    t = torch.tensor([0.001, 0.37, 1.0])
    w = exported(net, "ncsnpp")
    expected = ncsnpp(w, x, 999 * t, mult, blocks, attn)
    assert expected.std() > 0.1
    assert_close(net(x, t), expected, atol=1e-9, rtol=0)


def test_known_numbers_of_the_embedding():
    """The second derivation has the official embedding of t = 0.7351 in 32 channels."""
    emb = sinusoid(torch.tensor([0.7351]) * 999, 32)
    found = emb.view(2, 16)[:, [0, 1, 5, 15]]
    official = [
        [-0.694563, 0.999990, 0.454061, 0.073370],  # sines
        [0.719432, -0.004423, -0.890970, 0.997305],  # cosines
    ]
    np.testing.assert_allclose(found, official, atol=1e-4)


def test_known_numbers_of_the_whole_network():
    """Its output is still what it was when it equalled the official one."""
    net = in_double(filled(16, 0.15, base=16, **TWO_LEVELS))
    x = np.random.RandomState(1).standard_normal((1, 3, 16, 16))
    out = net(torch.from_numpy(x), torch.tensor([0.37]))
    expected = [
        [-0.9144, 1.0147],
        [2.6104, 0.8383],
        [-3.4398, -0.9030],
    ]
    found = out[0, :, 4, 4:6].detach()
    np.testing.assert_allclose(found, expected, atol=3e-4)


def test_known_sum_of_the_embeddings_of_time_and_label_as_in_songunet():
    """A label's embedding is scaled by sqrt(classes), and added to that of the time."""
    net = filled(16, **LABELLED)
    x, t, labels = inputs(2, 0)
    found = []
    net.time0.register_forward_pre_hook(lambda layer, given: found.append(given[0]))
    net(x, t, labels)
    of_time = sinusoid(999 * t, 16)
    of_labels = net.label.weight.T[labels] * math.sqrt(3)
    assert_close(found[0], of_time + of_labels + net.label.bias)


@pytest.mark.skipif(not SHARED.exists(), reason="the official outputs are not at hand")
@pytest.mark.parametrize("name, reader, time", [
    ("ncsnpp_tiny", "from_ncsnpp", "t999"),
    ("edm_songunet_tiny", "from_songunet", "noise_labels"),
])
def test_output_and_gradient_equal_the_official_network(name, reader, time):
    """The official code found the same output, and the same gradient by the image."""
    data, w = {}, {}
    for key, value in np.load(SHARED / f"{name}.npz").items():
        if key.startswith("param::"):
            w[key.removeprefix("param::")] = torch.from_numpy(value)
        elif key != "meta":
            data[key] = torch.from_numpy(value)
    net = getattr(script("import"), reader)(w)
    x, label = data["x"], data[time]
    out = net(x, label / 999)
    assert_close(out, data["out"], atol=2e-4, rtol=0)

    x = x.double().requires_grad_()
    answers = [in_double(net)(x, label / 999)]
    if name == "ncsnpp_tiny":
        second = ncsnpp(w, x, label, (1, 2, 2), 2, (16,))
        answers.append(second)
    for answer in answers:
        assert_close(answer, data["out"].double(), atol=1e-6, rtol=0)
        gradient, = torch.autograd.grad(answer, x, data["v"].double())
        # The gradient's numbers reach 81.
        assert_close(gradient, data["grad_x"].double(), atol=1e-4, rtol=0)


# --------------------------------------------------------------------------- Published checkpoints

SMALL = dict(base=8, mult=(1, 1, 2), blocks=1)


def import_main(number="import", **settings):
    script(number).main(settings_of(number, preset="cifar10", **settings))


def exported(net, kind):
    """The state dict of a published network: "ncsnpp" or "songunet"."""
    s = script("import")
    layout = getattr(s, f"{kind}_layout")(net)
    return s.export(net, layout)


def authors_file(net):
    """Their checkpoint of a network: trained weights all 0, the EMA a list without names."""
    weights = exported(net, "ncsnpp")
    model = {f"module.{key}": torch.zeros_like(w) for key, w in weights.items()}
    model["sigmas"] = torch.ones(9)
    ema = {"decay": 0.999999, "shadow_params": list(weights.values())}
    return {"model": model, "ema": ema, "step": 7}


@pytest.mark.parametrize("image_size, mult, blocks, classes", [
    (32, (1, 1, 2), 1, 0),
    (16, (2,), 2, 0),
    (64, (1, 2, 1), 3, 0),
    (16, (1, 2), 1, 4),
])
def test_round_trip_through_both_formats_gives_the_same_samples_bit_for_bit(
        image_size, mult, blocks, classes):
    """A network that is exported and imported again is the same network."""
    net = filled(image_size, base=8, mult=mult, blocks=blocks, classes=classes)
    z = torch.randn(2, *net.shape)
    labels = None
    formats = {"songunet": "model.", "ncsnpp": "module."}
    if classes:
        labels = torch.tensor([0, 3])
        del formats["ncsnpp"]  # it has no labels
    expected = euler(net, z, 2, labels)
    for kind, prefix in formats.items():
        theirs = exported(net, kind)
        theirs = {prefix + key: theirs[key] for key in theirs}
        again = getattr(script("import"), f"from_{kind}")(theirs)
        assert again.args == net.args
        assert torch.equal(euler(again, z, 2, labels), expected)

    # Row 3 c + s of SongUNet's attention is query, key or value (s) of channel c.
    size = image_size // 2 ** (len(mult) - 1)
    rows = exported(net, "songunet")[f"dec.{size}x{size}_in0.qkv.weight"]
    q_k_v = torch.cat([rows[s::3] for s in range(3)])
    assert torch.equal(q_k_v, net.middle[0].attention.qkv.weight)


def test_a_published_network_becomes_a_teacher(tmp_path):
    """Stage 02 makes its pairs with the authors' averaged weights."""
    net, out = filled(32, **SMALL), tmp_path / "out/cifar10"
    torch.save(authors_file(net), "theirs.pth")
    import_main(checkpoint="theirs.pth", dropout=0.1)
    import_main("02", n_pairs=3, sample_steps=2, precision="fp32")
    z = common.noise_for(0, range(3), net.shape)
    x = common.read(out / "02_pairs.pt")["x"].float()
    assert_close(x, euler(net, z, 2), atol=1e-2, rtol=1e-3)
    teacher = common.read(out / "01_teacher.pt")
    assert teacher["network"]["dropout"] == 0.1
    assert teacher["made_from"].keys() == {"theirs.pth"}


def test_a_published_network_of_edm_makes_pairs_with_its_own_sampler(tmp_path):
    """EDM's network keeps its own frequencies, and its pairs come from edm_heun."""
    s, net = script("import"), filled(32, **SMALL)
    theirs = exported(net, "songunet")
    assert torch.equal(s.from_songunet(theirs).frequencies, net.frequencies)
    # A resample_filter says that EDM's code wrote it.
    theirs["model.enc.16x16_down.conv0.resample_filter"] = torch.ones(1, 1, 2, 2)
    edm = s.from_songunet(theirs)
    frequencies = (1 / 10_000) ** (torch.arange(4) / 3)
    assert torch.equal(edm.frequencies, frequencies)

    torch.save(theirs, "edm.pt")
    import_main(checkpoint="edm.pt", n_pairs=3, sample_steps=3)
    pairs = common.read(tmp_path / "out/cifar10/02_pairs.pt")
    z = common.noise_for(0, range(3), net.shape).half()
    assert torch.equal(pairs["z"], z)
    expected = s.edm_heun(edm, z.float(), 3)
    assert_close(pairs["x"].float(), expected, atol=1e-2, rtol=1e-3)
    assert pairs["made_from"].keys() == {"edm.pt"}


def test_edm_sampler_follows_the_exact_path_of_a_gaussian():
    """For data N(0, s^2) the path is known: x(0) = x(80) s / sqrt(s^2 + 80^2)."""
    edm_heun = script("import").edm_heun
    s, sigmas = 0.3, []

    def network(x, t, labels):
        """Exact, since D(x; sigma) = s^2 / (s^2 + sigma^2) x."""
        sigma = math.exp(4 * 999 * t[0].item())
        sigmas.append(sigma)
        variance = sigma**2 + 0.25
        share = s**2 / (s**2 + sigma**2) - 0.25 / variance  # (D(x) - c_skip x) / x
        return share * x * variance / (0.5 * sigma)  # divided by c_in and c_out

    z = torch.randn(5, 3, 4, 4)
    edm_heun(network, z, 18)
    assert len(sigmas) == 35
    ends = sigmas[0], sigmas[-1]
    assert ends == approx((80, 0.002), rel=1e-3)
    expected = z * 80 * s / math.hypot(s, 80)

    def error(steps):
        return (edm_heun(network, z, steps) - expected).abs().max()

    assert error(200) < 1e-3
    assert 3 < error(100) / error(200) < 5  # of second order


def test_files_that_are_no_checkpoints_are_refused_and_no_code_runs(tmp_path):
    """A file with code, and one that does not fit, end in a line that names the reason."""
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "created"), "w"))

    net = filled(32, **SMALL)
    good, short = exported(net, "ncsnpp"), authors_file(net)
    short["ema"]["shadow_params"].pop()
    key = "all_modules.9.Conv_0.weight"
    without = {k: good[k] for k in good if k != key}
    for content, message in (
        ({"ema": Malicious()}, "holds code"),
        (short, "the EMA has"),
        (good | {"a.bias": good[key]}, "1 entries unexpected, first a.bias"),
        (good | {key: good[key][1:]}, f"1 entries misshapen, first {key}"),
        (without, f"1 entries missing, first {key}"),
    ):
        torch.save(content, "a.pt")
        with pytest.raises(UserError, match=message):
            import_main(checkpoint="a.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_the_network_is_one_graph_to_the_compiler():
    """With fullgraph, compiling fails where a graph would break."""
    net = filled(16, base=8, classes=4, **TWO_LEVELS)
    net.precision = "bf16"
    given = inputs(1, 3)
    fast = torch.compile(net, backend="aot_eager", fullgraph=True)
    found = fast(*given)
    assert_close(found, net(*given), rtol=1e-3, atol=1e-3)
    found.square().mean().backward()
