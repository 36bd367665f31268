"""Frechet distances with known answers, the feature networks, and reference numbers where they are at hand."""
import numpy as np
import pytest
import torch

from common import UserError, draw_shapes, to_uint8, from_uint8
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
        mu, sigma = stage("05").gaussian(features_of, images, batch, "cpu")
        np.testing.assert_allclose(mu, expected.mean(0), rtol=1e-12)
        np.testing.assert_allclose(sigma, np.cov(expected.T), rtol=1e-9)


def test_fd_shapes_orders_what_a_person_would_order(stage):
    s = stage("05")
    images, attributes = draw_shapes(2000, 16)
    net = s.train_shape_net(images, attributes, 150, 0, "cpu")
    assert torch.equal(net.head.weight, s.train_shape_net(images, attributes, 150, 0, "cpu").head.weight)
    features_of = torch.no_grad()(lambda x: net(from_uint8(x)))
    reference = s.gaussian(features_of, images, 500, "cpu")
    other, kinds = draw_shapes(1000, 16, seed=1)
    noisy = to_uint8(from_uint8(other) + 0.3 * torch.randn(other.shape))
    variants = [other, noisy, other[kinds[:, 0] == 0], (torch.rand(other.shape) * 255).byte()]
    floor, noise, circles, static = [s.frechet_distance(*s.gaussian(features_of, x, 500, "cpu"), *reference) for x in variants]
    assert 10 * floor < noise < static and 10 * floor < circles < static


def test_wrong_inception_weights_are_refused(stage, tmp_path):
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "w.pth")
    (tmp_path / "x.pth").write_bytes(b"nonsense")
    for name in ("w.pth", "x.pth"):
        with pytest.raises(UserError, match=f"{name} does not hold the FID Inception weights"):
            stage("05").load_inception(str(tmp_path / name), "cpu")
    with pytest.raises(UserError, match="does not exist"):
        stage("05").load_inception(str(tmp_path / "gone.pth"), "cpu")


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
        if key.endswith(("conv.weight", "fc.weight")):
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
    net, _ = s.load_inception(str(tmp_path / "weights.pth"), "cpu")
    images = torch.from_numpy(data["images"])
    for resize, name in (("tf1", "feat_tf1"), ("pytorch_fid", "feat_pytorchfid")):
        assert np.abs(s.inception_features(net, images, resize).numpy() - data[name]).max() < 1e-4, resize
