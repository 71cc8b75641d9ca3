"""What the tests of `linear` and `conv2d` share: implementations, inputs, the float64 oracle, and error budgets.

The oracle takes the weight as it is stored, so its rounding, which is `PackedWeight`'s, does not count.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from vpd_fast.ops import geglu_rows
from vpd_fast.ops.packing import FLOAT8, PackedWeight

PRECISIONS = [torch.float32, torch.bfloat16, torch.int8]
# For what the precision does not change.
ONE_PRECISION = [torch.int8, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in PRECISIONS[:2])]
DTYPES = [torch.float32, torch.bfloat16]
UNIT = 2.0**-24  # rounding of float32
# Hopper's tensor cores add 32 products of float8_e4m3fn at a time to a sum, and cut each of the 33 numbers off at CUT
# of the largest. Such sums of 128 columns are added in float32.
CUT, COLUMNS, ADDITIONS, ADDENDS = 2.0**-13, 128, 4, 33


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def make_weight(n: int, k: int, dtype: torch.dtype) -> PackedWeight:
    return PackedWeight.pack(randn(1, n, k, seed=7) / k**0.5, dtype)


def activated(values: Tensor, activation: str | None) -> Tensor:
    """In the dtype of `values`; for geglu their columns are in the order of `geglu_rows`."""
    if activation == "geglu":
        n = values.shape[-1] // 2
        in_order = torch.empty_like(values)
        in_order[..., geglu_rows(n)] = values
        return in_order[..., :n] * gelu(in_order[..., n:])
    return {"relu": torch.relu, "silu": silu, None: lambda x: x}[activation](values)


def complete(
    a: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str | None, residual: Tensor | None
) -> Tensor:
    """Rows of A -> the result, all in the dtype of the rows, but the factors of a bfloat16 product."""
    values = a @ weight.unpack()[0].to(a.dtype).T
    values = values if bias is None else values + bias.to(a.dtype)
    values = activated(values, activation)
    return values if residual is None else values + residual.to(a.dtype)


def relative(actual: Tensor, exact: Tensor) -> float:
    """L2 distance, relative to the exact one's length."""
    return ((actual.double() - exact).norm() / exact.norm()).item()


def assert_close(actual: Tensor, same: Tensor, exact: Tensor, k: int, what: object = "") -> None:
    """At most twice the error of PyTorch in the same precisions, plus the rounding of the store.

    The kernel adds k products up one after the other, PyTorch by parts. Each addition rounds a partial sum, which grows
    like the square root of the terms in it, by up to UNIT, 0.58 UNIT on average: k^(1/2) * 0.41 UNIT of the result for
    rounding errors of random signs; k^(1/2) * UNIT is allowed. The activations' polynomials (1.5e-7 of their argument)
    are covered by eight roundings more.
    """
    assert actual.shape == exact.shape
    assert actual.isfinite().all(), what
    budget = 2 * relative(same.to(actual.dtype), exact) + torch.finfo(actual.dtype).eps / 2 + (k**0.5 + 8) * UNIT
    assert relative(actual, exact) <= budget, (relative(actual, exact), budget, what)


def assert_within_rounding_to_8_bits(
    actual: Tensor,
    rows: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    ranged: Tensor | None = None,
    few_bits: bool = False,
) -> None:
    """Element by element: a number of a row is off by at most half a step, which the weights then multiply.

    The step is a 255th of the row's range, 0 included; or of the range of `ranged` (..., many) if it is not the row's.
    What is left is float32 rounding: four operations on the result and the rounding of the step, 8 units of the largest
    possible sum at most.

    actual: float32 (..., n), the product and the bias only. rows: (..., k) float64. few_bits: for float8 only.
    """
    assert actual.dtype == torch.float32
    numbers = weight.unpack()[0].double()
    exact = rows @ numbers.T
    exact = exact if bias is None else exact + bias.double()
    ranged = rows if ranged is None else ranged
    step = (ranged.amax(-1, keepdim=True).clamp(min=0) - ranged.amin(-1, keepdim=True).clamp(max=0)) / 255
    bound = step * numbers.abs().sum(1) * (0.5 + 8 * 256 * UNIT) + 8 * UNIT * exact.abs()
    assert ((actual - exact).abs() <= bound).all(), ((actual - exact).abs() / bound).max()


def assert_within_rounding_to_float8(
    actual: Tensor,
    rows: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    ranged: Tensor | None = None,
    few_bits: bool = False,
) -> None:
    """Element by element: three bits behind the point, so a number is off by at most 1/16 of itself.

    Near zero by half of the smallest number, 2^-10, of a row whose largest is 448. What is left is float32 rounding: of
    k sums, and of eight operations on the numbers and the result, relative to the largest possible sum.

    Arguments: as for `assert_within_rounding_to_8_bits`. few_bits: tensor cores add the products up. What is cut off
    is relative to the largest number of an addition, which is at most the sum of the sizes of its 128 columns.
    """
    assert actual.dtype == torch.float32
    numbers = weight.unpack()[0].double()
    exact = rows @ numbers.T
    exact = exact if bias is None else exact + bias.double()
    largest = (rows if ranged is None else ranged).abs().amax(-1, keepdim=True)
    error = torch.maximum(rows.abs() / 16, largest / 448 * 2.0**-10)
    sizes = rows.abs() @ numbers.abs().T + exact.abs()
    lost = (weight.k + 8) * UNIT + (ADDITIONS * ADDENDS * CUT if few_bits else 0)
    bound = error @ numbers.abs().T + lost * sizes
    assert ((actual - exact).abs() <= bound).all(), ((actual - exact).abs() / bound).max()


def assert_same_as_reference(
    actual: Tensor, reference: Tensor, weight: PackedWeight, exact_rows: bool = False, few_bits: bool = False
) -> None:
    """Of 8 bits, both do the same arithmetic: rows differ by the rounding of the last few float32 operations.

    A result may be the difference of larger numbers, so the distance of a row is taken relative to the average row.

    exact_rows: the rows come to be without sums and products whose rounding may differ. Otherwise a number within a few
    roundings of the middle between two of 255 steps may go either way, which happens to one in 10^4; then a row is off
    by a step of one number, 1 / 255 of some 5 deviations, less than 2 % of the row even if it has one number only.
    Numbers of float8_e4m3fn are eighths of a power of two apart, so a step is at most an eighth of the row. Their sums
    are float32, in whatever order: k^(1/2) roundings of random signs.

    few_bits: tensor cores add products of float8 up. What the 33 numbers of each of k / 32 additions lose is of random
    signs and between 0 and CUT of the largest, 0.58 CUT in the mean square: (33 k / 32)^(1/2) * 0.58 CUT of it. The
    largest is a sum of up to 128 products, three deviations of which are 3 * 128^(1/2) products of average size; the
    result is k^(1/2) of them. So a row is off by 1.8 * 128^(1/2) CUT.
    """
    # bfloat16: where the numbers before the store differ, the stored ones may differ by a whole step of 2^-8.
    rounding = 8 * UNIT if actual.dtype == torch.float32 else torch.finfo(actual.dtype).eps
    step = 0.02
    if weight.dtype == FLOAT8:
        rounding, step = rounding + weight.k**0.5 * UNIT, 0.125
        rounding += 1.8 * min(weight.k, COLUMNS) ** 0.5 * CUT if few_bits else 0
    actual, reference = (t.double().flatten(0, -2) for t in (actual, reference))
    size = reference.norm(dim=1).clamp(min=reference.norm(dim=1).mean().item())
    distance = (actual - reference).norm(dim=1) / size
    assert distance.max() <= (rounding if exact_rows else step + rounding)
    assert (distance > rounding).sum() <= 2 + len(distance) // 20


WITHIN_ROUNDING = {torch.int8: assert_within_rounding_to_8_bits, FLOAT8: assert_within_rounding_to_float8}
