"""The theory's measurements against closed forms, scikit-learn, SciPy and plain NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls
from scipy.stats import entropy
from sklearn.decomposition import PCA
from torch.testing import assert_close

from slicefine.analysis.features import (
    components_for,
    explained_variance,
    kernel_check,
    separating_dimension,
    task_covariance,
    task_energy_ratio,
    task_rank,
)
from slicefine.analysis.shift import linear_cka, prediction_shift
from slicefine.analysis.spectra import null_weight, spectral_balance
from slicefine.analysis.winners import layer_overlap, overlap, slice_gradients, step_decrease
from slicefine.errors import ConfigError, DataError, NumericalError
from slicefine.geometry import Slice

SEEDS = st.integers(0, 2**16)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- spectra ----------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, rows=st.integers(4, 14), columns=st.integers(3, 14), groups=st.integers(1, 4))
@pytest.mark.parametrize("axis", ["row", "column"])
def test_spectra_are_those_of_the_dense_covariances(axis, seed, rows, columns, groups):
    weight = draw(seed, rows, columns)
    if groups > weight.shape[axis == "column"]:
        return
    found = spectral_balance(weight, groups, axis)
    parts = np.array_split(weight.numpy() if axis == "row" else weight.numpy().T, groups)
    spectra = [np.sort(np.linalg.eigvalsh(part @ part.T))[::-1][: min(part.shape)] for part in parts]
    count = min(len(s) for s in spectra)
    values = np.stack([s[:count] for s in spectra])
    assert_close(found.eigenvalues.numpy(), values, rtol=1e-8, atol=1e-10)
    means = [s.mean() for s in spectra]
    assert found.energy_ratio == pytest.approx(max(means) / min(means))
    pairs = [abs(a - b) / b for a in values for b in values]
    assert found.decay_difference == pytest.approx(np.max(pairs), rel=1e-6)
    assert found.variance == pytest.approx(values.var(0).mean(), rel=1e-6, abs=1e-12)
    assert found.relative_variance == pytest.approx((values / values.mean()).var(0).mean(), rel=1e-6, abs=1e-12)


def test_equal_groups_balance_and_a_strong_one_shows():
    block = draw(0, 3, 8)
    found = spectral_balance(torch.cat([block, block, block]), 3)
    assert (found.energy_ratio, found.decay_difference, found.variance) == pytest.approx((1.0, 0.0, 0.0), abs=1e-9)
    found = spectral_balance(torch.cat([block, 2 * block]), 2)
    assert found.energy_ratio == pytest.approx(4.0)
    assert found.decay_difference == pytest.approx(3.0)


def test_column_groups_compare_nonzero_eigenvalues_only():
    weight = draw(1, 40, 12)  # W_g W_g^T is 40 x 40 of rank 3
    found = spectral_balance(weight, 4, "column")
    assert found.eigenvalues.shape == (4, 3)
    assert math.isfinite(found.decay_difference)
    assert found.decay_difference < 5


def test_nulls_keep_what_they_say():
    weight = draw(2, 30, 20).float() * torch.linspace(0.1, 3, 30)[:, None]
    shuffled, gaussian = null_weight(weight, "shuffled"), null_weight(weight, "gaussian", seed=1)
    assert torch.equal(shuffled.reshape(-1).sort().values, weight.double().reshape(-1).sort().values)
    assert float(gaussian.std()) == pytest.approx(float(weight.std()), rel=0.1)
    trained, null = (spectral_balance(w, 3).energy_ratio for w in (weight, shuffled))
    assert trained > 2 * null  # the rows' scales differ; shuffled entries have none
    assert torch.equal(null_weight(weight, "shuffled", seed=4), null_weight(weight, "shuffled", seed=4))


@pytest.mark.parametrize(
    ("weight", "settings", "error", "message"),
    [
        (torch.ones(4, 4), {"axis": "diagonal"}, ConfigError, "axis='diagonal' is unknown"),
        (torch.ones(4), {}, ConfigError, "expected a matrix, got a tensor of shape"),
        (torch.ones(4, 4), {"groups": 5}, ConfigError, "groups=5 must lie between 1 and the 4 rows"),
        (torch.full((8, 4), torch.nan), {}, NumericalError, "NaN or infinite"),
        (torch.cat([torch.ones(4, 4), torch.zeros(4, 4)]), {"groups": 2}, NumericalError, "group 1 of 2 is zero"),
    ],
)
def test_bad_weights_are_refused(weight, settings, error, message):
    with pytest.raises(error, match=message):
        spectral_balance(weight, **settings)
    with pytest.raises(ConfigError, match="kind='odd' is unknown"):
        null_weight(torch.ones(2, 2), "odd")


# -- features ---------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, n=st.integers(3, 20), d=st.integers(1, 12))
def test_explained_variance_is_scikit_learns(seed, n, d):
    features = draw(seed, n, d)
    count = min(n - 1, d)
    oracle = PCA(n_components=count).fit(features.numpy()).explained_variance_ratio_.cumsum()
    assert_close(explained_variance(features).numpy(), oracle, rtol=1e-7, atol=1e-9)
    for tau in (0.5, 0.9, 1.0):
        k = components_for(features, tau)
        assert oracle[k - 1] >= tau - 1e-9
        assert k == 1 or oracle[k - 2] < tau


def test_half_precision_features_are_widened():
    features = draw(0, 12, 6)
    assert_close(explained_variance(features.bfloat16()), explained_variance(features.bfloat16().double()))


@given(seed=SEEDS, n=st.integers(4, 15), d=st.integers(2, 8), classes=st.integers(2, 4))
def test_task_covariance_projects_onto_the_rows_of_y(seed, n, d, classes):
    features = draw(seed, n, d)
    labels = torch.arange(n) % classes
    y = np.eye(classes)[labels.numpy()].T  # (c, n), as in the paper
    y = y[y.any(1)]
    projector = y.T @ np.linalg.pinv(y @ y.T) @ y
    phi = features.numpy().T
    oracle = phi @ projector @ phi.T / n
    assert_close(task_covariance(features, labels).numpy(), oracle, rtol=1e-8, atol=1e-10)
    assert_close(task_covariance(features, torch.from_numpy(y.T)).numpy(), oracle, rtol=1e-8, atol=1e-10)
    assert task_rank(features, labels) == np.linalg.matrix_rank(oracle, tol=1e-9)
    assert task_rank(features, labels) <= min(classes, d)


def test_the_three_numbers_differ():
    """Labels by the third of three directions of falling variance."""
    features = draw(5, 60, 3) * torch.tensor([10.0, 3.0, 1.0])
    features[:, 2] += 6 * (features[:, 2] > 0)
    labels = (features[:, 2] > 3).long()
    assert components_for(features, 0.7) == 1
    assert separating_dimension(features, labels) in (2, 3)
    assert task_rank(features, labels) == 2


@given(seed=SEEDS, noise=st.sampled_from([0.1, 1.0, 3.0]))
def test_separating_dimension_is_where_the_convex_hulls_part(seed, noise):
    """Two classes are separable unless their hulls meet: a non-negative least-squares problem, solved to zero."""
    labels = torch.arange(24) % 2
    features = noise * draw(seed, 24, 6) + torch.nn.functional.one_hot(labels, 6) * 2
    found = separating_dimension(features, labels)
    scores = PCA(n_components=6, whiten=True).fit_transform(features.numpy())

    def separates(k: int) -> bool:
        first, second = scores[labels == 0][:, :k], scores[labels == 1][:, :k]
        sums = np.kron(np.eye(2), np.ones(12))
        _, residual = nnls(np.vstack([np.hstack([first.T, -second.T]), sums]), np.r_[np.zeros(k), 1, 1])
        return residual > 1e-9

    assert found is None or separates(found)
    assert found == 1 or not separates(6 if found is None else found - 1)


def test_three_classes_are_separated_by_one_score_each():
    corners = torch.tensor([[1.0, 0.0], [-0.5, 0.87], [-0.5, -0.87]]).double().repeat(5, 1)
    labels = torch.arange(15) % 3
    assert separating_dimension(corners + 0.1 * draw(0, 15, 2), labels) in (1, 2)
    middle = torch.cat([corners, torch.zeros(3, 2)])  # one point of each class in the same place
    assert separating_dimension(middle.double(), torch.cat([labels, torch.arange(3)])) is None
    line = torch.arange(9.0)[:, None].double()
    assert separating_dimension(line, torch.arange(9) // 3) == 1  # in order along a line
    assert separating_dimension(line, torch.arange(9) % 3) is None


def test_energy_ratio_and_kernel_lemma():
    features = draw(7, 9, 5)
    values = np.linalg.svd(features.numpy(), compute_uv=False) ** 2
    for k in range(1, 6):
        assert task_energy_ratio(features, k) == pytest.approx(values[:k].sum() / values.sum())
    for shape in ((9, 5), (5, 9), (6, 6)):
        check = kernel_check(draw(8, *shape))
        assert max(check.kernel_difference, check.eigenvalue_difference, check.share_difference) < 1e-12


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: explained_variance(torch.ones(1, 4)), DataError, r"at least 2 examples, got \(1, 4\)"),
        (lambda: explained_variance(torch.ones(5, 4)), NumericalError, "all examples have the same features"),
        (lambda: explained_variance(torch.full((5, 4), torch.inf)), NumericalError, "NaN or infinite"),
        (lambda: components_for(draw(0, 5, 4), 0.0), ConfigError, r"tau=0.0 must lie in \(0, 1\]"),
        (lambda: task_covariance(draw(0, 5, 4), torch.zeros(4)), DataError, "5 examples and labels of shape"),
        (lambda: task_energy_ratio(draw(0, 5, 4), 9), ConfigError, "k=9 must lie between 1 and 4"),
        (lambda: separating_dimension(draw(0, 5, 4), torch.zeros(5)), DataError, "all labels are the same"),
        (lambda: prediction_shift(torch.zeros(3, 2), torch.zeros(3, 3)), DataError, r"got \(3, 2\) and \(3, 3\)"),
        (lambda: prediction_shift(torch.full((1, 2), torch.nan), torch.zeros(1, 2)), NumericalError, "NaN"),
        (lambda: linear_cka(draw(0, 5, 4), draw(0, 6, 4)), DataError, "features of the same examples"),
        (lambda: linear_cka(draw(0, 1, 4), draw(0, 1, 4)), DataError, "one example has no variance"),
        (lambda: linear_cka(torch.ones(5, 4), draw(0, 5, 4)), NumericalError, "the same features"),
        (lambda: linear_cka(torch.full((5, 4), torch.nan), draw(0, 5, 4)), NumericalError, "NaN or infinite"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_rank_deficient_features_and_fewer_examples_than_width():
    features = draw(3, 4, 2) @ draw(4, 2, 9)  # rank 2, 4 examples of width 9
    shares = explained_variance(features)
    assert len(shares) == 3
    assert shares[1] == pytest.approx(1.0)
    assert components_for(features, 1.0) <= 3


# -- shift ------------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, n=st.integers(1, 8), classes=st.integers(2, 6))
def test_prediction_shift_is_scipys_relative_entropy(seed, n, classes):
    ours, theirs = 3 * draw(seed, n, classes), 3 * draw(seed + 1, n, classes)
    p, q = (torch.softmax(each, 1).numpy() for each in (ours, theirs))
    assert prediction_shift(ours, theirs) == pytest.approx(entropy(p, q, axis=1).mean(), rel=1e-9)
    assert prediction_shift(ours, ours + 5) == pytest.approx(0.0, abs=1e-12)


@given(seed=SEEDS, n=st.integers(3, 12), d=st.integers(1, 6), other=st.integers(1, 6))
def test_cka_is_the_normalised_hsic_of_linear_kernels(seed, n, d, other):
    """The dual form (Kornblith et al., 2019): centred Gram matrices, no cross-covariance."""
    ours, theirs = draw(seed, n, d), draw(seed + 1, n, other)
    centre = np.eye(n) - np.ones((n, n)) / n
    k, m = (centre @ (each @ each.T) @ centre for each in (ours.numpy(), theirs.numpy()))
    oracle = (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())
    assert linear_cka(ours, theirs) == pytest.approx(oracle, rel=1e-8)
    rotation = torch.linalg.qr(draw(seed + 2, d, d))[0]
    assert linear_cka(ours, 3 * ours @ rotation + 1) == pytest.approx(1.0)


# -- winners ----------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, rows=st.integers(1, 9), columns=st.integers(1, 9), r=st.integers(1, 4))
@pytest.mark.parametrize("axis", ["row", "column"])
def test_slice_gradients_are_norms_of_blocks(axis, seed, rows, columns, r):
    gradient = draw(seed, rows, columns)
    lines = gradient if axis == "row" else gradient.t()
    if r > len(lines):
        with pytest.raises(ConfigError, match=f"r={r} must lie between 1 and the {len(lines)} {axis}s"):
            slice_gradients(gradient, r, axis)
        return
    expected = [float(lines[i : i + r].norm()) for i in range(len(lines) - r + 1)]
    assert_close(slice_gradients(gradient, r, axis).tolist(), expected)


@given(seed=SEEDS, out=st.integers(2, 6), width=st.integers(2, 5), r=st.integers(1, 3), k=st.integers(1, 4))
@pytest.mark.parametrize("axis", ["row", "column"])
def test_closed_forms_are_those_of_autograds_jacobian(axis, seed, out, width, r, k):
    k, r = min(k, out), min(r, out, width)
    weight, x = draw(seed, out, width), draw(seed + 1, width)
    basis = torch.linalg.qr(draw(seed + 2, out, out))[0][:, :k]
    start = seed % ((out if axis == "row" else width) - r + 1)
    block = Slice(axis, start, r)

    def outputs(values: torch.Tensor) -> torch.Tensor:
        full = weight.clone()
        part = slice(start, start + r)
        full = torch.cat([full[:start], values, full[start + r :]]) if axis == "row" else full
        if axis == "column":
            full = torch.cat([full[:, :start], values, full[:, part.stop :]], dim=1)
        return full @ x

    own = weight[start : start + r] if axis == "row" else weight[:, start : start + r]
    jacobian = torch.func.jacrev(outputs)(own).reshape(out, -1)
    oracle, found = overlap(jacobian, basis), layer_overlap(x, block, basis)
    assert found.gamma == pytest.approx(oracle.gamma, abs=1e-9)
    assert found.beta == pytest.approx(oracle.beta, abs=1e-9)
    assert found.rank == oracle.rank
    assert axis == "column" or r >= k or found.gamma == 0
    assert found.premise_holds == (k == out) if axis == "column" else (r >= k or not found.premise_holds)


def test_one_step_keeps_the_bound_on_a_quadratic_and_wins_on_a_network():
    hessian = draw(1, 6, 6)
    hessian = hessian @ hessian.t()
    target = draw(2, 6)
    found = step_decrease(lambda v: 0.5 * (v - target) @ hessian @ (v - target), draw(3, 6), 500, 1e-12)
    assert found.smoothness == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-6)
    assert found.decrease >= found.bound * (1 - 1e-6) > 0
    weight, x = draw(4, 5, 4), draw(5, 30, 4)
    labels = torch.arange(30) % 5

    def loss(rows: torch.Tensor) -> torch.Tensor:
        whole = torch.cat([weight[:1], rows, weight[3:]])
        return torch.nn.functional.cross_entropy(torch.tanh(x @ whole.t()), labels)

    found = step_decrease(loss, weight[1:3])
    exact = torch.autograd.functional.hessian(loss, weight[1:3]).reshape(8, 8)
    assert found.smoothness == pytest.approx(float(torch.linalg.eigvalsh(exact).abs().max()), rel=1e-2)
    assert found.gradient > 0
    assert found.decrease > 0


def test_flat_and_broken_losses():
    assert step_decrease(lambda v: (v * 0).sum(), torch.ones(3)).decrease == 0
    assert step_decrease(lambda v: v.sum(), torch.ones(3)).bound == math.inf  # linear: no curvature to divide by
    with pytest.raises(NumericalError, match="not finite"):
        step_decrease(lambda v: (v / 0).square().sum(), torch.ones(3))
    with pytest.raises(ConfigError, match=r"a Jacobian \(3, 2\) and a subspace \(4, 1\) differ"):
        overlap(torch.ones(3, 2), torch.ones(4, 1))
    with pytest.raises(ConfigError, match="a random mask has no closed form"):
        layer_overlap(torch.ones(3), Slice("entries", 0, 2), torch.eye(3))
    with pytest.raises(ConfigError, match="axis='entries' is unknown"):
        slice_gradients(torch.ones(3, 3), 1, "entries")
