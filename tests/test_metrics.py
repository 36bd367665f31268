"""Frechet distances, feature networks and LPIPS: known answers, and numbers of reference implementations.

tests/fixtures: Frechet distances to 60 digits; features of FID's network with `filled` weights.
"""
import hashlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
from common import UserError, draw_shapes, from_uint8, to_uint8
from conftest import ROOT, load_script

FIXTURES, CPU = Path(__file__).with_name("fixtures"), torch.device("cpu")
LPIPS_REFERENCE = ROOT.parent / "shared/fixtures/lpips_ref.npz"  # holds published weights: it stays outside


def test_frechet_distances_of_known_gaussians_and_of_the_references(stage):
    distance, mu, eye = stage("05").frechet_distance, torch.zeros(4), torch.eye(4)
    assert distance(mu, eye, mu + 3, eye) == pytest.approx(36)
    assert distance(mu, 4 * eye, mu, 9 * eye) == pytest.approx(4 * (3 - 2) ** 2)
    a, b = torch.diag(torch.tensor([1.0, 0, 0, 0])), torch.diag(torch.tensor([0, 4.0, 0, 0]))  # singular
    assert distance(mu, a, mu, b) == pytest.approx(5) and distance(mu, a, mu, 4 * a) == pytest.approx(1)
    for bad_mu, bad_sigma, message in ((mu, eye + a.roll(1, 0), "symmetric"), (mu / 0, eye, "finite"),
                                       (mu, eye / 0, "finite"), (mu[:2], eye[:2, :2], "dimension")):
        with pytest.raises(UserError, match=message):
            distance(bad_mu, bad_sigma, mu, eye)
    data = np.load(FIXTURES / "frechet.npz")
    names = {key.split("::")[0] for key in data.files}
    for name in names:
        gaussians = (data[f"{name}::{part}"] for part in ("mu1", "sigma1", "mu2", "sigma2"))
        assert distance(*gaussians) == pytest.approx(float(data[f"{name}::dist"]), rel=1e-9, abs=1e-9), name
    assert len(names) == 11


def test_gaussian_streams_to_mean_and_covariance(stage):
    features = draw_shapes(70, 4)[0].flatten(1)[:, :10].float()
    mu, sigma = stage("05").gaussian(iter(features.split(32)), 10)
    np.testing.assert_allclose(mu, features.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(features.double().numpy().T), rtol=1e-9)


def test_fd_shapes_orders_what_a_person_would_order(stage):
    s, (other, kinds), gaussians = stage("05"), draw_shapes(1000, 16, seed=1), []
    features_of, dimensions, name, _ = s.feature_network(common.read_settings(s.SETTINGS, "", []), CPU)
    noisy = to_uint8(from_uint8(other) + 0.3 * torch.randn(other.shape))
    static = (torch.rand(other.shape) * 255).byte()
    for images in (draw_shapes(2000, 16)[0], other, noisy, other[kinds[:, 0] == 0], static):
        with torch.no_grad():
            gaussians.append(s.gaussian([features_of(images)], dimensions))
    floor, noise, circles, worst = (s.frechet_distance(*other, *gaussians[0]) for other in gaussians[1:])
    assert name == "FD-shapes" and 10 * floor < noise < worst and 10 * floor < circles < worst


def test_quantise_rounds_or_truncates_and_resize_tf1_has_no_half_pixel_centres(stage):
    x = torch.tensor([-2.0, -1, -0.995, 0, 1, 2])
    assert stage("05").quantise(x, "round").tolist() == [0, 0, 1, 128, 255, 255]
    assert stage("05").quantise(x, "truncate").tolist() == [0, 0, 0, 127, 255, 255]
    x = torch.tensor([[0.0, 10.0]]).expand(1, 1, 2, 2)
    assert stage("05").resize_tf1(x, 4)[0, 0, 0].tolist() == [0, 5, 10, 10]


def test_pseudo_huber_and_l2(stage):
    x = torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 2.0)])
    assert stage("04").squared_l2(x, 0 * x).tolist() == [0, 4]
    assert stage("04").pseudo_huber(x, 0 * x).tolist() == pytest.approx([0, 2 * 48**0.5], rel=1e-3)


# ---------------------------------------------------------------------------------------------- Inception

def filled(state):
    """Weights by the references' formula, a hash of (number of the tensor, position): no random state."""
    weights, keys = {}, sorted(key for key in state if not key.endswith("num_batches_tracked"))
    for i, key in enumerate(keys):
        h = (np.arange(state[key].numel(), dtype=np.uint64) * 2654435761 + (i + 1) * 2246822519) & 0xFFFFFFFF
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            h = ((h ^ (h >> np.uint64(shift))) * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
        u = h.astype(np.float64) / 2**32
        values = 0.2 * u - 0.1
        if state[key].ndim > 1:
            values = (2 * u - 1) * np.sqrt(6 / state[key][0].numel())
        elif key.endswith("bn.weight"):
            values += 1
        elif key.endswith("running_var"):
            values = 0.5 + u
        weights[key] = torch.from_numpy(values.astype(np.float32)).view(state[key].shape)
    return weights


@pytest.fixture
def published(monkeypatch):
    """Stage 05, and a stand-in for the published file of 91 MB at data/inception.pth."""
    s, path = load_script("05"), Path("data/inception.pth")
    path.parent.mkdir()
    torch.save(filled(s.Inception().state_dict()), path)
    monkeypatch.setattr(s, "INCEPTION_URL", "http://127.0.0.1:9/inception.pth")
    monkeypatch.setattr(s, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    return s


def test_inception_features_equal_the_references_and_other_weights_are_refused(published):
    data, net = np.load(FIXTURES / "inception.npz"), published.load_inception(CPU)
    assert sorted(net.state_dict()) == sorted(data["keys"].tolist()) and not net.training
    for resize, name in (("tf1", "feat_tf1"), ("pytorch_fid", "feat_pytorchfid")):
        features = published.inception_features(net, torch.from_numpy(data["images"]), resize)
        assert np.abs(features.numpy() - data[name]).max() < 1e-4, resize
    Path("data/inception.pth").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="sha256 of data/inception.pth is .*--metric none"):
        published.load_inception(CPU)


def test_fid_of_two_sets_without_networks(published, monkeypatch):
    images, frechet_distance = draw_shapes(7, 16)[0], published.frechet_distance

    def of_64_features(*gaussians):  # of the 2048, which would take seconds
        return frechet_distance(*(a[:64, :64] if a.ndim == 2 else a[:64] for a in gaussians))

    def measured(images, reference, *flags):
        argv = ["--metric=fid", f"--images={images}", f"--reference={reference}", *flags]
        published.main(common.read_settings(published.SETTINGS, "", argv))
        return json.loads(Path("out/shapes/05_images.json").read_text())

    monkeypatch.setattr(published, "frechet_distance", of_64_features)
    for name, part in (("a", images[:3]), ("b", images[3:]), ("small", images[:3, :, ::2, ::2])):
        Path(name).mkdir()
        with zipfile.ZipFile(f"{name}.zip", "w") as archive:
            for i, image in enumerate(part):
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"{name}/{i}.png")
                archive.write(f"{name}/{i}.png")
    net = published.load_inception(CPU)
    features = published.inception_features(net, images).split([3, 4])
    (mu, sigma), reference = (published.gaussian([part], 2048) for part in features)
    np.savez("edm.npz", mu=reference[0], sigma=reference[1])  # statistics as EDM publishes them
    expected = of_64_features(mu, sigma, *reference)
    for given, against in (("a.zip", "b"), ("a", "b.zip"), ("a", "edm.npz")):
        result = measured(given, against, "--allow_few")
        assert 1e-3 < expected == pytest.approx(result["rows"][0]["distance"], rel=1e-4)
        protocol = [result["protocol"].get(key) for key in ("metric", "resize", "n_samples", "n_reference")]
        assert protocol == ["FID", "tf1", 3, 4 if against != "edm.npz" else None]
    other = measured("a", "b", "--allow_few", "--resize=pytorch_fid")["rows"][0]["distance"]
    assert other != pytest.approx(expected, rel=1e-3)
    np.savez("wrong.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez("objects.npz", mu=np.array([{}]), sigma=np.eye(3))
    for reference, message in (("wrong.npz", "wrong.npz .*2048"), ("objects.npz", "objects.npz"),
                               ("small", "another size than small")):
        with pytest.raises(UserError, match=message):
            measured("a", reference, "--allow_few")
    with pytest.raises(UserError, match="3 images are fewer than the 2048 features"):
        measured("a", "b")


# -------------------------------------------------------------------------------------------------- LPIPS

@pytest.fixture(scope="module")
def lpips():
    """LPIPS with VGG's weights from the formula, and made-up positive weights of the channels."""
    net, generator = load_script("04").LPIPS(), torch.Generator().manual_seed(0)
    net.features.load_state_dict(filled(net.features.state_dict()))
    for i in range(5):
        net.get_submodule(f"lin{i}.model.1").weight.uniform_(0.1, 1, generator=generator)
    return net


def test_lpips_is_what_its_definition_says(lpips):
    """A second derivation, from the names of the published weights: VGG16's convolutions by number."""
    (x, y), state, expected = torch.rand(2, 2, 3, 64, 64) * 2 - 1, lpips.state_dict(), []
    h = torch.cat([x, y]) - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    h = h / torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28):
        h = F.max_pool2d(h, 2) if i in (5, 10, 17, 24) else h
        h = F.relu(F.conv2d(h, state[f"features.{i}.weight"], state[f"features.{i}.bias"], padding=1))
        if i in (2, 7, 14, 21, 28):
            a, b = F.normalize(h).chunk(2)
            weight = state[f"lin{len(expected)}.model.1.weight"]
            expected.append(F.conv2d((a - b) ** 2, weight).mean(dim=(1, 2, 3)))
    torch.testing.assert_close(lpips.per_layer(x, y), torch.stack(expected, 1))
    torch.testing.assert_close(lpips(x, y), sum(expected))
    assert lpips(x, x).abs().max() == 0 and not any(p.requires_grad for p in lpips.parameters())
    large = F.interpolate(x[:, :, ::2, ::2], (64, 64), mode="bilinear", align_corners=True)
    torch.testing.assert_close(lpips(x[:, :, ::2, ::2], y), lpips(large, y))


def test_lpips_is_finite_where_all_features_are_zero(stage):
    net, x = stage("04").LPIPS(), torch.zeros(1, 3, 64, 64, requires_grad=True)
    net.features[0].bias.fill_(-100.0)  # every ReLU is off
    net.features[2].bias.fill_(-100.0)
    distance = net(x, x.detach() + 1)
    distance.backward()
    assert distance.isfinite() and x.grad.isfinite().all()


def test_lpips_reads_the_published_files_and_refuses_others(lpips, stage, monkeypatch):
    s, state, (x, y) = stage("04"), lpips.state_dict(), torch.rand(2, 1, 3, 32, 32)
    Path("data").mkdir()
    for kind, start, more in (("LPIPS", "lin", {}), ("VGG", "features.", {"classifier.0.weight": x})):
        path = Path("data", getattr(s, f"{kind}_URL").split("/")[-1])
        torch.save({key: state[key] for key in state if key.startswith(start)} | more, path)
        monkeypatch.setattr(s, f"{kind}_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    assert torch.equal(s.load_lpips(CPU)(x, y), lpips(x, y))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="sha256 of data/vgg16.* is .*--distance l2 or huber"):
        s.load_lpips(CPU)


@pytest.mark.skipif(not LPIPS_REFERENCE.exists(), reason="the published weights of LPIPS are not at hand")
def test_lpips_equals_the_reference(lpips, stage):
    data, net = np.load(LPIPS_REFERENCE), stage("04").LPIPS()
    linear = {key[5:]: torch.from_numpy(data[key]) for key in data.files if key.startswith("lin::")}
    net.load_state_dict(lpips.state_dict() | linear)
    x, y = torch.from_numpy(data["x"]).requires_grad_(), torch.from_numpy(data["y"])
    distance = net(x, y)
    distance.sum().backward()
    small = net(x[:, :, ::2, ::2], y[:, :, ::2, ::2])
    layers = net.per_layer(x, y).T
    for name, ours in {"dist": distance, "per_layer": layers, "dist_up32": small, "grad_x": x.grad}.items():
        np.testing.assert_allclose(ours.detach(), data[name], atol=1e-6)
