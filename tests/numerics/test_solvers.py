"""The linear solver against SciPy's, and everything that it says about itself."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from refusals import refused
from scipy.sparse.linalg import cg

from helpers.numerics import solvers
from helpers.numerics.solvers import conjugate_gradient
from helpers.runtime import generator

PROBLEMS, SIZE = 4, 12


def systems(seed=0, smallest=0.1, largest=10.0):
    """Symmetric matrices ``[4, 12, 12]`` with eigenvalues between the two, and right-hand sides."""
    draws = generator(seed)
    basis = torch.linalg.qr(torch.randn(PROBLEMS, SIZE, SIZE, generator=draws, dtype=torch.float64)).Q
    values = torch.linspace(smallest, largest, SIZE, dtype=torch.float64)
    matrix = basis @ torch.diag(values) @ basis.mT
    return (matrix + matrix.mT) / 2, torch.randn(PROBLEMS, SIZE, generator=draws, dtype=torch.float64)


def as_dictionary(x):
    """Vectors as a dictionary of tensors of two shapes."""
    return {"a": x[:, :8].reshape(-1, 2, 4), "b": x[:, 8:]}


def as_matrix(x):
    return torch.cat([x["a"].flatten(1), x["b"]], 1)


def products(matrix, count=None):
    def product(v):
        if count is not None:
            count.append(1)
        return as_dictionary((matrix @ as_matrix(v)[..., None])[..., 0])

    return product


@pytest.mark.parametrize("steps", [1, 3, 8, 12])
def test_every_iterate_is_scipys(steps):
    matrix, b = systems()
    found = conjugate_gradient(products(matrix), as_dictionary(b), steps)
    for i in range(PROBLEMS):
        expected, _ = cg(matrix[i].numpy(), b[i].numpy(), rtol=0, maxiter=steps)
        np.testing.assert_allclose(as_matrix(found.x)[i].numpy(), expected, rtol=1e-7, atol=1e-9)
    assert (found.iterations == steps).all() and not found.indefinite.any()


def test_it_solves_and_knows_its_residual():
    matrix, b = systems()
    found = conjugate_gradient(products(matrix), as_dictionary(b), 40, tolerance=1e-10)
    x = as_matrix(found.x)
    true = (b - (matrix @ x[..., None])[..., 0]).norm(dim=1) / b.norm(dim=1)
    assert true.max() < 1e-9 and (found.residual <= 1e-10).all()
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b), rtol=1e-8, atol=1e-9)
    early = conjugate_gradient(products(matrix), as_dictionary(b), 4)
    x = as_matrix(early.x)
    true = (b - (matrix @ x[..., None])[..., 0]).norm(dim=1) / b.norm(dim=1)
    torch.testing.assert_close(early.residual, true, rtol=1e-8, atol=1e-12)


def test_each_problem_stops_when_it_is_solved():
    """The first is the identity, solved in one step; the others are not touched by that, nor it by theirs."""
    matrix, b = systems()
    matrix[0] = torch.eye(SIZE)
    found = conjugate_gradient(products(matrix), as_dictionary(b), 30, tolerance=1e-9)
    assert found.iterations[0] == 1 and (found.iterations[1:] > 5).all()
    torch.testing.assert_close(as_matrix(found.x)[0], b[0], rtol=1e-12, atol=0)
    assert found.x["a"].isfinite().all()


def test_damping_is_on_the_diagonal():
    matrix, b = systems()
    found = conjugate_gradient(products(matrix), as_dictionary(b), 60, damping=3.0, tolerance=1e-12)
    eye = torch.eye(SIZE, dtype=torch.float64)
    torch.testing.assert_close(as_matrix(found.x), torch.linalg.solve(matrix + 3 * eye, b), rtol=1e-9, atol=1e-10)


def test_a_warm_start_saves_steps():
    matrix, b = systems()
    solution = conjugate_gradient(products(matrix), as_dictionary(b), 60, tolerance=1e-12)
    near = {name: value * (1 + 1e-4) for name, value in solution.x.items()}
    cold = conjugate_gradient(products(matrix), as_dictionary(b), 60, tolerance=1e-6)
    warm = conjugate_gradient(products(matrix), as_dictionary(b), 60, start=near, tolerance=1e-6)
    assert (warm.iterations < cold.iterations).all() and (warm.residual <= 1e-6).all()
    exact = conjugate_gradient(products(matrix), as_dictionary(b), 60, start=solution.x, tolerance=1e-9)
    assert (exact.iterations == 0).all()


def test_an_indefinite_matrix_is_noticed_and_said():
    matrix, b = systems(smallest=-1.0)
    matrix[3] = systems()[0][3]
    found = conjugate_gradient(products(matrix), as_dictionary(b), 40, tolerance=1e-9)
    assert found.indefinite.tolist() == [True, True, True, False]
    assert all(value.isfinite().all() for value in found.x.values())
    with pytest.warns(solvers.NotConverged, match="3 of 4 linear systems is not positive definite"):
        solvers.report(found, float("inf"))


def test_no_step_is_made_where_curvature_is_negative():
    found = conjugate_gradient(lambda p: {"x": -p["x"]}, {"x": torch.ones(1, 3)}, 5)
    assert not found.x["x"].any() and found.iterations.tolist() == [0] and found.indefinite.tolist() == [True]


def test_non_convergence_is_said_and_convergence_is_not():
    matrix, b = systems()
    with pytest.warns(solvers.NotConverged, match="4 of 4 .* residual above 1e-06"):
        solvers.report(conjugate_gradient(products(matrix), as_dictionary(b), 2), 1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solvers.report(conjugate_gradient(products(matrix), as_dictionary(b), 40, tolerance=1e-9), 1e-6)


def test_one_product_a_step():
    matrix, b = systems()
    count = []
    conjugate_gradient(products(matrix, count), as_dictionary(b), 5)
    assert len(count) == 5
    conjugate_gradient(products(matrix, count), as_dictionary(b), 5, start=as_dictionary(b))
    assert len(count) == 5 + 6


def test_nothing_to_solve():
    matrix, b = systems()
    found = conjugate_gradient(products(matrix), as_dictionary(0 * b), 5)
    assert (as_matrix(found.x) == 0).all() and (found.residual == 0).all() and (found.iterations == 0).all()


def test_identity_measures_what_it_leaves():
    matrix, b = systems()
    found = solvers.identity(products(matrix), as_dictionary(b))
    true = (b - (matrix @ b[..., None])[..., 0]).norm(dim=1) / b.norm(dim=1)
    torch.testing.assert_close(found.residual, true)
    assert torch.equal(as_matrix(found.x), b)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: conjugate_gradient(lambda p: p, {}, 3), "holds no tensor"),
        (lambda: solvers.identity(lambda p: p, {}), "holds no tensor"),
        (lambda: conjugate_gradient(lambda p: p, ONE, -1), "number of steps"),
        (lambda: conjugate_gradient(lambda p: p, ONE, 1.5), "number of steps"),
        (lambda: conjugate_gradient(lambda p: p, ONE, 3, damping=-1.0), "damping"),
        (lambda: conjugate_gradient(lambda p: p, ONE, 3, tolerance=float("nan")), "tolerance"),
    ],
)
def test_nonsense_is_refused(action, message):
    assert message in refused(action)


ONE = {"x": torch.ones(1, 2)}
