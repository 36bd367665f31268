"""Frechet distances with known answers, the feature networks, and reference numbers where they are at hand."""
import io
import json
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common import EPS, UserError, draw_shapes, from_uint8, read_settings, to_uint8
from conftest import load_script
from test_network import FIXTURES


def test_frechet_distance_of_known_gaussians(stage):
    distance = stage("05").frechet_distance
    mu, eye = torch.zeros(4), torch.eye(4)
    assert distance(mu, eye, mu, eye) == pytest.approx(0, abs=1e-12)
    assert distance(mu, eye, mu + 3, eye) == pytest.approx(36)
    assert distance(mu, 4 * eye, mu, 9 * eye) == pytest.approx(4 * (3 - 2) ** 2)
    # Singular: one direction each, at right angles.
    a, b = torch.diag(torch.tensor([1.0, 0, 0, 0])), torch.diag(torch.tensor([0, 4.0, 0, 0]))
    assert distance(mu, a, mu, b) == pytest.approx(5) and distance(mu, a, mu, 4 * a) == pytest.approx(1)


def test_gaussian_streams_to_the_same_moments_in_any_batch_size(stage):
    images, _ = draw_shapes(70, 4)
    features_of = lambda x: x.flatten(1)[:, :10].float()
    expected = features_of(images).double().numpy()
    for batch in (1, 32, 70):
        mu, sigma = stage("05").gaussian(map(features_of, images.split(batch)), 10)
        np.testing.assert_allclose(mu, expected.mean(0), rtol=1e-12)
        np.testing.assert_allclose(sigma, np.cov(expected.T), rtol=1e-9)


def test_fd_shapes_orders_what_a_person_would_order(stage):
    s = stage("05")
    images, attributes = draw_shapes(2000, 16)
    net = s.train_shape_net(images, attributes, 150, 0, "cpu")
    once, again = (s.train_shape_net(images, attributes, 3, 0, "cpu").head.weight for _ in range(2))
    assert torch.equal(once, again)
    features_of = torch.no_grad()(lambda x: net(from_uint8(x)))
    reference = s.gaussian(map(features_of, images.split(500)), 72)
    other, kinds = draw_shapes(1000, 16, seed=1)
    noisy = to_uint8(from_uint8(other) + 0.3 * torch.randn(other.shape))
    variants = [other, noisy, other[kinds[:, 0] == 0], (torch.rand(other.shape) * 255).byte()]
    floor, noise, circles, static = [s.frechet_distance(*s.gaussian(map(features_of, x.split(500)), 72), *reference) for x in variants]
    assert 10 * floor < noise < static and 10 * floor < circles < static


def test_gaussians_that_are_none_are_refused(stage):
    mu, sigma = torch.zeros(3), torch.eye(3)
    crooked = sigma.clone()
    crooked[0, 1] = 0.5
    for bad_mu, bad_sigma, message in ((mu, crooked, "not symmetric"), (mu * float("nan"), sigma, "not finite"), (mu[:2], sigma, "shape"),
                                       (mu, sigma / 0, "not finite"), (torch.zeros(4), torch.eye(4), "4 and 3 dimensions")):
        with pytest.raises(UserError, match=message):
            stage("05").frechet_distance(bad_mu, bad_sigma, mu, sigma)


def test_frechet_distance_of_two_gaussians_drawn_in_feature_space(stage):
    """Samples of N(m, a^2) and N(0, b^2), independent: d = |m|^2 + D (a - b)^2; and of a set against itself: 0."""
    s, n, d = stage("05"), 200_000, 5
    first, second = 0.5 + 2 * torch.randn(n, d), 3 * torch.randn(n, d)
    a, b = (s.gaussian(x.split(1000), d) for x in (first, second))
    assert s.frechet_distance(*a, *b) == pytest.approx(d * 0.25 + d * 1, rel=0.02)
    assert s.frechet_distance(*a, *a) == pytest.approx(0, abs=1e-6)
    shuffled = s.gaussian(first[torch.randperm(n)].split(777), d)
    assert s.frechet_distance(*shuffled, *b) == pytest.approx(s.frechet_distance(*a, *b), rel=1e-6)


def test_quantise_rounds_or_truncates(stage):
    x = torch.tensor([-2.0, -1, -0.995, 0, 1, 2])
    assert stage("05").quantise(x, "round").tolist() == [0, 0, 1, 128, 255, 255]
    assert stage("05").quantise(x, "truncate").tolist() == [0, 0, 0, 127, 255, 255]


def test_straightness_is_the_variance_of_the_velocity_along_the_path(stage):
    noise = torch.randn(4, 3, 2, 2)
    straight = lambda x, t, labels: torch.full_like(x, 3.0)
    assert stage("05").straightness(straight, noise, 4) == pytest.approx(0, abs=1e-5)
    # v = (number of the step): 0, 1, 2, 3, whose variance is 1.25
    curved = lambda x, t, labels: torch.full_like(x, ((t[0] - EPS) / (1 - EPS) * 4).round())
    assert stage("05").straightness(curved, noise, 4) == pytest.approx(1.25, abs=1e-5)


def test_wrong_weights_are_refused(stage, tmp_path):
    s, read = stage("05"), lambda name, **more: stage("05").load_inception(
        s.Config(inception_weights=str(tmp_path / name), **more), "cpu")
    torch.save({"fc.weight": torch.zeros(2), "extra": torch.zeros(1)}, tmp_path / "w.pth")
    (tmp_path / "x.pth").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"w.pth is not the published file: its sha256 begins with \w{8}, not 6726825d"):
        read("w.pth")
    with pytest.raises(UserError, match="missing, first Conv2d_1a_3x3.*1 entries unexpected, first extra; 1 entries misshapen, first fc"):
        read("w.pth", any_weights=True)
    with pytest.raises(UserError, match="x.pth does not hold weights"):
        read("x.pth", any_weights=True)
    with pytest.raises(UserError, match="does not exist; https://github.com/mseitzer"):
        read("gone.pth")


def write_set(path, images):
    """uint8 (N, 3, H, W) as a zip of PNGs."""
    with zipfile.ZipFile(path, "w") as archive:
        for i, image in enumerate(images):
            file = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")
            archive.writestr(f"{i:04}.png", file.getvalue())


def test_sets_of_images_are_the_same_from_a_zip_and_from_arrays(stage, tmp_path):
    s, images = stage("05"), draw_shapes(5, 8)[0]
    write_set(tmp_path / "a.zip", images)
    np.save(tmp_path / "b.npy", images.permute(0, 2, 3, 1).numpy())
    np.savez(tmp_path / "c.npz", images.numpy())
    np.save(tmp_path / "d.npy", from_uint8(images).numpy())
    for name in ("a.zip", "b.npy", "c.npz", "d.npy"):
        assert torch.equal(s.read_set(str(tmp_path / name), None, s.Config()), images), name
    bad = {"gray.npy": np.zeros((4, 8, 8), np.uint8), "empty.npy": np.zeros((0, 8, 8, 3), np.uint8), "range.npy": np.full((2, 3, 8, 8), 7.0),
           "objects.npy": np.array([{}], dtype=object)}
    for (name, array), message in zip(bad.items(), ("RGB images.*grayscale", "RGB images", "in .-1, 1., not float64 from 7", "read")):
        np.save(tmp_path / name, array)
        with pytest.raises(UserError, match=f"{name}.*{message}"):
            s.read_set(str(tmp_path / name), None, s.Config())
    with pytest.raises(UserError, match="8x8 pixels, and the networks make 16x16"):
        s.read_set(str(tmp_path / "b.npy"), 16, s.Config())
    write_set(tmp_path / "mixed.zip", [images[0], images[1][:, :6]])
    with pytest.raises(UserError, match="0001.png has 8x6 pixels, and the first image 8x8"):
        s.read_set(str(tmp_path / "mixed.zip"), None, s.Config())


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Weights that Inception accepts, made by a formula: a stand-in for the published file, which is 91 MB."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    shapes = {k: tuple(v.shape) for k, v in sorted(load_script("05").Inception().state_dict().items()) if "num_batches" not in k}
    torch.save(filled(list(shapes), list(shapes.values())), path)
    return path


def test_fid_of_two_sets_without_networks(inception_file, tmp_path):
    images, others = draw_shapes(6, 16)[0], draw_shapes(5, 16, seed=1)[0]
    write_set(tmp_path / "a.zip", images)
    write_set(tmp_path / "b.zip", others)
    flags = ["--metric=fid", f"--inception_weights={inception_file}", "--any_weights", f"--out={tmp_path}"]

    def measured(images, reference, *more):
        s = load_script("05")
        s.main(read_settings(s.Config, s.PRESETS, "", [*flags, "--allow_few", f"--images={images}", f"--reference={reference}", *more]))
        return json.loads((tmp_path / "shapes/05_images.json").read_text())

    itself, other = (measured(tmp_path / "a.zip", tmp_path / name) for name in ("a.zip", "b.zip"))
    assert itself["rows"][0]["distance"] == pytest.approx(0, abs=1e-6) and other["rows"][0]["distance"] > 1e-4
    assert other["protocol"]["metric"].startswith("FD-inception-") and other["protocol"]["n_reference"] == 5  # not called FID
    # The reference was kept: with its statistics as they are, and without its images, the distance is the same.
    kept = [torch.load(p, weights_only=True) for p in sorted((tmp_path / "shapes").glob("05_reference_*.pt"))]
    reference, = [k for k in kept if "(5, 3, 16, 16)" in k["made_from"] or "[5, 3, 16, 16]" in k["made_from"]]
    np.savez(tmp_path / "statistics.npz", mu=reference["mu"].numpy(), sigma=reference["sigma"].numpy())
    again = measured(tmp_path / "a.zip", tmp_path / "statistics.npz", "--feature_batch=2")
    assert again["rows"][0]["distance"] == pytest.approx(other["rows"][0]["distance"], rel=1e-4)
    assert again["protocol"]["n_reference"] is None and again["protocol"]["reference_sha256"]

    for more, message in (([], "6 images are fewer than the 2048 features"), (["--reference="], "--images needs --reference"),
                          ([f"--reference={tmp_path / 'small.zip'}", "--allow_few"], "bring them to one size")):
        write_set(tmp_path / "small.zip", images[:, :, :8, :8])
        with pytest.raises(UserError, match=message):
            s = load_script("05")
            s.main(read_settings(s.Config, s.PRESETS, "", [*flags, f"--images={tmp_path / 'a.zip'}", f"--reference={tmp_path / 'b.zip'}", *more]))
    np.savez(tmp_path / "wrong.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(UserError, match="statistics of 3 features, and FD-inception.* has 2048"):
        measured(tmp_path / "a.zip", tmp_path / "wrong.npz")


def test_resize_tf1_has_no_half_pixel_centres(stage):
    x = torch.tensor([[0.0, 10.0]]).expand(1, 1, 2, 2)
    assert stage("05").resize_tf1(x, 4)[0, 0, 0].tolist() == [0, 5, 10, 10]


@pytest.mark.skipif(not FIXTURES.exists(), reason="reference numbers are not at hand")
def test_frechet_distances_equal_the_references(stage):
    data = np.load(FIXTURES / "frechet.npz")
    names = sorted({key.split("::")[0] for key in data.files if "::" in key})
    assert len(names) == 11
    for name in names:
        parts = [data[f"{name}::{part}"] for part in ("mu1", "sigma1", "mu2", "sigma2")]
        assert stage("05").frechet_distance(*parts) == pytest.approx(float(data[f"{name}::dist"]), rel=1e-9, abs=1e-9), name


def filled(keys, shapes):
    """The reference's formula for weights: a hash of (tensor, position), no random state."""
    weights = {}
    for i, (key, shape) in enumerate(zip(keys, shapes)):
        h = (np.arange(int(np.prod(shape)), dtype=np.uint64) * 2654435761 + (i + 1) * 2246822519) & 0xFFFFFFFF
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            h = ((h ^ (h >> np.uint64(shift))) * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
        u = h.astype(np.float64) / 2**32
        s = 2 * u - 1
        if key.endswith(("conv.weight", "fc.weight")) or key.startswith("features.") and key.endswith("weight"):
            values = s * np.sqrt(6 / np.prod(shape[1:]))
        elif key.endswith("bn.weight"):
            values = 1 + 0.1 * s
        else:
            values = 0.5 + u if key.endswith("running_var") else 0.1 * s
        weights[key] = torch.from_numpy(values.astype(np.float32).reshape(shape))
    return weights


@pytest.mark.skipif(not FIXTURES.exists(), reason="reference numbers are not at hand")
def test_inception_features_equal_the_references(stage, tmp_path):
    s, data = stage("05"), np.load(FIXTURES / "inception_ref.npz")
    state = s.Inception().state_dict()
    assert sorted(state) == sorted(data["all_keys"].tolist())
    keys = data["keys"].tolist()
    torch.save(filled(keys, [tuple(state[key].shape) for key in keys]), tmp_path / "weights.pth")
    net, _ = s.load_inception(s.Config(inception_weights=str(tmp_path / "weights.pth"), any_weights=True), "cpu")
    images = torch.from_numpy(data["images"])
    for resize, name in (("tf1", "feat_tf1"), ("pytorch_fid", "feat_pytorchfid")):
        assert np.abs(s.inception_features(net, images, resize).numpy() - data[name]).max() < 1e-4, resize


# ------------------------------------------------------------------------------------------------- LPIPS

def random_lpips(stage):
    torch.manual_seed(0)
    lpips = stage("04").LPIPS()
    for i in range(5):
        lpips.get_submodule(f"lin{i}.model.1").weight.data.uniform_(0.1, 1)
    return lpips


def test_lpips_is_what_its_definition_says(stage):
    """A second derivation, from VGG's layers by number."""
    lpips, x, y = random_lpips(stage), torch.rand(2, 3, 64, 64) * 2 - 1, torch.rand(2, 3, 64, 64) * 2 - 1
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    expected = []
    for i, last in enumerate((3, 8, 15, 22, 29)):
        a, b = (F.normalize(lpips.features[:last + 1]((v - shift[:, None, None]) / scale[:, None, None])) for v in (x, y))
        weight = lpips.state_dict()[f"lin{i}.model.1.weight"]
        expected.append(F.conv2d((a - b) ** 2, weight).mean(dim=(1, 2, 3)))
    torch.testing.assert_close(lpips.per_layer(x, y), torch.stack(expected, 1))
    torch.testing.assert_close(lpips(x, y), sum(expected))
    assert lpips(x, x).abs().max() == 0 and sum(p.requires_grad for p in lpips.parameters()) == 0
    small = x[:, :, ::2, ::2]
    large = F.interpolate(small, (64, 64), mode="bilinear", align_corners=True)
    torch.testing.assert_close(lpips(small, y), lpips(large, y))


def test_lpips_has_a_finite_gradient_where_all_features_are_zero(stage):
    lpips = random_lpips(stage)
    for layer in lpips.features[:4:2]:
        layer.bias.data.fill_(-100.0)  # every ReLU is off
    x = torch.zeros(1, 3, 64, 64, requires_grad=True)
    lpips(x, torch.rand(1, 3, 64, 64)).sum().backward()
    assert x.grad.isfinite().all()


def test_pseudo_huber_and_l2(stage):
    x, y = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    y[1] = 2.0
    assert stage("04").squared_l2(x, y).tolist() == [0, 4]
    assert stage("04").pseudo_huber(x, y).tolist() == pytest.approx([0, 2 * 48**0.5], rel=1e-3)  # far away it is the length


def test_lpips_reads_the_published_files_and_refuses_others(stage, tmp_path):
    s, lpips = stage("04"), random_lpips(stage)
    state = lpips.state_dict()
    vgg = {k: v for k, v in state.items() if k.startswith("features.")}
    torch.save({**vgg, "classifier.0.weight": torch.zeros(3)}, tmp_path / "vgg.pth")
    torch.save({k: v for k, v in state.items() if k.startswith("lin")}, tmp_path / "lin.pth")
    paths = dict(vgg_weights=str(tmp_path / "vgg.pth"), lpips_weights=str(tmp_path / "lin.pth"))
    with pytest.raises(UserError, match="not the published file.*--distance l2 or huber goes without"):
        s.load_lpips(s.Config(**paths), "cpu")
    again = s.load_lpips(s.Config(**paths, any_weights=True), "cpu")
    x, y = torch.rand(2, 1, 3, 32, 32)
    assert torch.equal(again(x, y), lpips(x, y))
    torch.save({k: v for k, v in vgg.items() if k != "features.28.bias"}, tmp_path / "vgg.pth")
    with pytest.raises(UserError, match="1 entries missing, first features.28.bias"):
        s.load_lpips(s.Config(**paths, any_weights=True), "cpu")


@pytest.mark.skipif(not FIXTURES.exists(), reason="reference numbers are not at hand")
def test_lpips_equals_the_reference(stage):
    data, lpips = np.load(FIXTURES / "lpips_ref.npz"), stage("04").LPIPS()
    keys = data["keys"].tolist()
    lin = {k.removeprefix("lin::"): torch.from_numpy(data[k]) for k in data.files if k.startswith("lin::")}
    lpips.load_state_dict({**filled(keys, [tuple(lpips.state_dict()[key].shape) for key in keys]), **lin})
    x, y = torch.from_numpy(data["x"]).requires_grad_(), torch.from_numpy(data["y"])
    distance = lpips(x, y)
    np.testing.assert_allclose(distance.detach(), data["dist"], atol=1e-6)
    np.testing.assert_allclose(lpips.per_layer(x, y).detach().T, data["per_layer"], atol=1e-6)
    np.testing.assert_allclose(lpips(x[:, :, ::2, ::2], y[:, :, ::2, ::2]).detach(), data["dist_up32"], atol=1e-6)
    distance.sum().backward()
    np.testing.assert_allclose(x.grad, data["grad_x"], atol=1e-6)
