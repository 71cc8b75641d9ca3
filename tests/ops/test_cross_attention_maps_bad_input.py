"""Errors of cross_attention_maps: one sentence that names the argument, what came and what was expected."""

from __future__ import annotations

import pytest
import torch

from vpd_fast import ops
from vpd_fast.errors import InputError

from .attention_cases import make_qkv


def test_bad_values_are_named() -> None:
    q, k, v = make_qkv(2, 37, 19, 4, 8)
    ids = torch.zeros(19, dtype=torch.int64)
    double = q.double()
    bad = [
        (dict(heads=3), "heads=3 must divide the width of q, got q of shape \\(2, 37, 32\\)"),
        (dict(heads=0), "heads must be a positive int, got 0"),
        (dict(heads=4.0), "heads must be a positive int, got 4.0"),
        (dict(q=q[0]), "q must have shape \\(B, N, heads\\*D\\), got \\(37, 32\\)"),
        (dict(q=None), "q must be a tensor of shape \\(B, N, heads\\*D\\), got NoneType"),
        (dict(q=q.int()), "q must be .*float32.*, got torch.int32"),
        (dict(q=q[:, :, :0]), "q has no elements along heads\\*D"),
        (dict(k=k[:, :, :16]), "k must have shape \\(B, L, heads\\*D=32\\), got \\(2, 19, 16\\)"),
        (dict(k=k[:, :0], v=v[:, :0]), "k has no elements along L"),
        (dict(v=v[:, :18]), "v must have shape \\(B, L=19, heads\\*D=32\\), got \\(2, 18, 32\\)"),
        (dict(v=v.double()), "v must be torch.float32 on cpu as q is, got torch.float64 on cpu"),
        (dict(k=k.to("meta")), "k must be torch.float32 on cpu as q is, got torch.float32 on meta"),
        (dict(k=k.repeat(2, 1, 1)), "k must have a batch of 1 or 2 as q has, got shape \\(4, 19, 32\\)"),
        (dict(k=k[:1]), "k and v must have the same batch, got 1 and 2"),
        (dict(reduce="max"), "reduce must be 'mean' or 'sum', got 'max'"),
        (dict(num_categories=3), "num_categories=3 needs categories"),
        (dict(categories=ids[:18]), "categories must have shape \\(L=19\\), got \\(18,\\)"),
        (dict(categories=ids.float()), "categories must be .*int64.*, got torch.float32"),
        (dict(categories=["a"] * 19), "categories must be a tensor or sequence of 19 integers"),
        (dict(categories=ids, num_categories=0), "num_categories must be a positive int of 31 bits, got 0"),
        (dict(categories=ids - 1), "categories are all negative: give num_categories"),
        (dict(categories=[-1] * 19), "categories are all negative: give num_categories"),
        (dict(categories=[10**12] * 19), "categories must be a tensor or sequence of 19 integers"),
        (dict(categories=ids, num_categories=True), "num_categories must be a positive int of 31 bits, got True"),
        (dict(categories=ids, num_categories=2**70), "num_categories must be a positive int of 31 bits"),
        (dict(scale="x"), "scale must be a finite Python number, got 'x'"),
        (dict(scale=float("nan")), "scale must be a finite Python number, got nan"),
        (dict(scale=1e39), "scale must be a finite Python number, got 1e\\+39"),
        (dict(scale=torch.ones(())), "scale must be a finite Python number, got Tensor\\(\\)"),
        (dict(weight=None), "weight must be a finite Python number, got None"),
        (dict(need_maps=None), "need_maps must be True or False, got None"),
        (dict(average_heads="no"), "average_heads must be True or False, got 'no'"),
        (dict(q=q.to_sparse()), "q must be a dense tensor, got a tensor of layout torch.sparse_coo"),
        (dict(impl=None), "impl must be a string, got None"),
        (dict(categories=ids.to("meta"), num_categories=1), "categories must be on cpu as q is, got meta"),
        (dict(categories=ids + 3, num_categories=3), "in \\[0, num_categories=3\\), got values from 3 to 3"),
        (dict(categories=ids - 2, num_categories=3), "in \\[0, num_categories=3\\), got values from -2 to -2"),
        (dict(addend=torch.zeros(2, 37, 18)), "addend must have shape \\(B=2, N=37, maps=19\\), got \\(2, 37, 18\\)"),
        (dict(addend=torch.zeros(2, 37, 19).bfloat16()), "addend must be torch.float32, got torch.bfloat16"),
        (dict(addend=torch.zeros(2, 37, 19), need_maps=False), "addend needs need_maps=True"),
        (dict(impl="fast"), "impl must be 'auto' or an implementation of cross_attention_maps .* got 'fast'"),
        (dict(q=double, k=double, v=double, impl="cpu"), "impl='cpu' .* cannot run here: q is float64"),
    ]
    for changes, message in bad:
        arguments = {"q": q, "k": k, "v": v, "heads": 4} | changes
        with pytest.raises(InputError, match=message):
            ops.cross_attention_maps(**arguments)


def test_explain_says_why() -> None:
    reasons = ops.explain("cross_attention_maps", *make_qkv(), 4)
    assert reasons["constant"] == "there are 19 tokens, not one"
    assert reasons["cpu"] == reasons["reference"] == "ok"
    assert ops.explain("cross_attention_maps", *make_qkv(device="meta"), 4)["cpu"] == "q is on meta, not on the CPU"
