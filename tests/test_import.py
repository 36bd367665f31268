"""Published checkpoints: round trips, refusals; and EDM's sampler against a closed form."""
import math

import pytest
import torch

import common
from common import UNet, UserError, euler
from conftest import load_script

NETWORKS = [dict(image_size=32, base=32, mult=(1, 2, 2), blocks=2),
            dict(image_size=32, base=8, mult=(1, 1, 2), blocks=1),
            dict(image_size=16, base=8, mult=(2,), blocks=2),
            dict(image_size=64, base=8, mult=(1, 2, 1), blocks=3),
            dict(image_size=16, base=8, mult=(1, 2), blocks=1, classes=4)]


def random_network(**arguments):
    torch.manual_seed(1)
    net = UNet(**arguments).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net


def call(number, out, **more):
    """The main of a script with --preset cifar10, in this process."""
    s = load_script(number)
    flags = [f"--{key}={value}" for key, value in {"out": out, "preset": "cifar10", **more}.items()]
    s.main(common.read_settings(s.SETTINGS, s.__doc__, flags))


def refused(out, **more):
    with pytest.raises(UserError) as error:
        call("import", out, **more)
    return str(error.value)


@pytest.mark.parametrize("arguments", NETWORKS)
def test_round_trip_through_both_formats_gives_the_same_samples_bit_for_bit(arguments):
    s, net = load_script("import"), random_network(**arguments)
    z = torch.randn(2, 3, net.args["image_size"], net.args["image_size"])
    y = torch.tensor([0, 3]) if net.args["classes"] else None
    for kind, prefix in [("songunet", "model."), *([("ncsnpp", "module.")] if y is None else [])]:
        theirs = s.export(net, getattr(s, f"{kind}_layout")(net))
        assert sum(v.numel() for v in theirs.values()) == sum(p.numel() for p in net.parameters())
        again = getattr(s, f"from_{kind}")({prefix + key: value for key, value in theirs.items()})
        assert again.args == net.args and torch.equal(euler(again, z, 2, y), euler(net, z, 2, y))


def test_the_layouts_are_the_published_ones():
    """A second derivation of two entries: attention by hand, from the descriptions of both networks."""
    s, net = load_script("import"), random_network(image_size=16, base=8, mult=(1,), blocks=1)
    attention, x, c = net.encoder[0].attention, torch.randn(2, 8, 16, 16), 8
    ncsnpp, song = (s.export(net, layout(net)) for layout in (s.ncsnpp_layout, s.songunet_layout))
    w, b = ([ncsnpp[f"all_modules.4.NIN_{i}.{part}"] for i in range(4)] for part in "Wb")
    flat = attention.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
    q, k, v = (flat @ w[i] + b[i] for i in range(3))
    h = ((q @ k.transpose(1, 2) * c**-0.5).softmax(2) @ v @ w[3] + b[3]).transpose(1, 2).view_as(x)
    torch.testing.assert_close((x + h) / math.sqrt(2), attention(x))
    song = [song[f"enc.16x16_block0.qkv.{part}"] for part in ("weight", "bias")]
    torch.testing.assert_close((flat @ song[0][:, :, 0, 0].T + song[1])[..., 1::3], k)  # row 3 c + s


def published(net, folder, prefix=""):
    """The authors' checkpoint of a network: trained weights all 0, EMA as a nameless list."""
    ncsnpp = load_script("import").export(net, load_script("import").ncsnpp_layout(net))
    model = {prefix + k: torch.zeros_like(v) for k, v in {"sigmas": torch.ones(1000), **ncsnpp}.items()}
    ema = {"decay": 0.999999, "shadow_params": list(ncsnpp.values())}
    torch.save({"model": model, "ema": ema, "optimizer": {"state": {}}, "step": 7}, folder / "published.pth")
    return folder / "published.pth"


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_the_authors_checkpoint_becomes_a_teacher_that_makes_pairs(tmp_path, prefix):
    net = random_network(**NETWORKS[1])
    path = published(net, tmp_path, prefix)
    call("import", tmp_path, checkpoint=path, dropout=0.1)
    call("02", tmp_path, n_pairs=3, sample_steps=2)
    pairs, teacher = (common.read(tmp_path / "cifar10" / name) for name in ("02_pairs.pt", "01_teacher.pt"))
    expected = euler(net, common.noise_for(0, range(3), (3, 32, 32)), 2)
    torch.testing.assert_close(pairs["x"].float(), expected, atol=1e-2, rtol=1e-3)
    assert teacher["network"]["dropout"] == 0.1 and teacher["settings"]["data"] == "cifar10"
    assert list(pairs["made_from"]) == ["published.pth", "01_teacher.pt"]
    assert "is there already: --restart replaces it" in refused(tmp_path, checkpoint=path)


def test_an_edm_network_makes_pairs_with_its_own_sampler(tmp_path):
    s, net = load_script("import"), random_network(**NETWORKS[1])
    theirs = s.export(net, s.songunet_layout(net))
    assert torch.equal(s.from_songunet(theirs).frequencies, net.frequencies)
    theirs["model.enc.16x16_down.conv0.resample_filter"] = torch.ones(1, 1, 2, 2)  # so EDM's code wrote it
    torch.save(theirs, tmp_path / "edm.pt")
    by_edm, edm = s.from_songunet(theirs), dict(checkpoint=tmp_path / "edm.pt", n_pairs=3)
    assert torch.equal(by_edm.frequencies, (1 / 10_000) ** (torch.arange(4) / 3))
    call("import", tmp_path, **edm, sample_steps=3)
    pairs = common.read(tmp_path / "cifar10/02_pairs.pt")
    z = common.noise_for(0, range(3), (3, 32, 32)).half()
    assert torch.equal(pairs["z"], z) and not (tmp_path / "cifar10/01_teacher.pt").exists()
    torch.testing.assert_close(pairs["x"].float(), s.edm_heun(by_edm, z.float(), 3), atol=1e-2, rtol=1e-3)
    call("03", tmp_path, steps=1, batch=2, base=8, blocks=1)  # reads them
    assert "edm.pt" in common.read(tmp_path / "cifar10/03_reflow.pt")["made_from"]
    assert "steps was 3, is 4" in refused(tmp_path, **edm, sample_steps=4)
    assert "is a teacher, not 04_student" in refused(tmp_path, **edm, to="04_student")


def test_edm_sampler_follows_the_exact_path_of_a_gaussian():
    """Data N(0, s^2): D(x; sigma) = s^2 / (s^2 + sigma^2) x, and x(0) = x(80) s / sqrt(s^2 + 80^2)."""
    s, calls, edm_heun = 0.3, [], load_script("import").edm_heun

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


@pytest.mark.parametrize("kind, key", [("ncsnpp", "all_modules.9.Conv_0.weight"),
                                       ("songunet", "dec.8x8_in0.qkv.bias")])
def test_incomplete_state_dicts_are_refused_with_the_names_of_the_entries(kind, key):
    s, net = load_script("import"), random_network(**NETWORKS[1])
    good, read = s.export(net, getattr(s, f"{kind}_layout")(net)), getattr(s, f"from_{kind}")
    for bad, message in ((good | {"another.bias": good[key]}, "1 entries unexpected, first another.bias"),
                         (good | {key: good[key][1:]}, f"1 entries misshapen, first {key} .* instead of"),
                         ({k: v for k, v in good.items() if k != key}, f"1 entries missing, first {key}")):
        with pytest.raises(UserError, match=message):
            read(bad)


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "created"), "w"))

    (tmp_path / "text.pt").write_text("no")
    ema = torch.load(published(random_network(**NETWORKS[1]), tmp_path), weights_only=True)
    ema["ema"]["shadow_params"].pop()
    for name, content, message in (
            ("code.pkl", {"ema": Malicious()}, "holds code"), ("list.pt", [1, 2], "no state dict"),
            ("adm.pt", {"out_conv.weight": torch.zeros(1)}, "an ADM network"), ("ema.pt", ema, "the EMA has"),
            ("01_teacher.pt", {}, "a name that no result has"), ("text.pt", None, "is damaged"),
            ("gone.pt", None, "does not exist")):
        if content is not None:
            torch.save(content, tmp_path / name)
        assert message in refused(tmp_path, checkpoint=tmp_path / name), name
    assert not (tmp_path / "created").exists() and not (tmp_path / "cifar10").exists()
