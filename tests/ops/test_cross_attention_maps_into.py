"""cross_attention_maps_into: the same maps, in memory of the caller."""

from __future__ import annotations

import pytest
import torch

from vpd_fast import ops
from vpd_fast.errors import InputError

from .attention_cases import implementation_params, kernel_and_place, make_qkv


@pytest.fixture(params=implementation_params())
def where(request, monkeypatch) -> dict:
    """{"impl", "device", "dtype"}: every implementation, the CPU kernel once per instruction set level."""
    return kernel_and_place(request, monkeypatch)


def targets(device: str, dtype: torch.dtype) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(whole memory, what to write into) for 2 images of 6x7 positions and 9 maps; the rest must stay as it is."""
    flat = torch.zeros(2, 42, 9, dtype=dtype, device=device)
    padded = torch.zeros(2, 42, 16, dtype=dtype, device=device)
    nchw = torch.zeros(2, 20, 6, 7, dtype=dtype, device=device)
    nhwc = torch.zeros(2, 20, 6, 7, dtype=dtype, device=device).to(memory_format=torch.channels_last)
    pitched = torch.zeros(2, 6, 7, 32, dtype=dtype, device=device)
    return {
        "buffer": (flat, flat),
        "rows of a wider buffer": (padded, padded[:, :, 3:12]),
        "NCHW slice": (nchw, nchw[:, 11:]),
        "channels-last slice": (nhwc, nhwc[:, 5:14]),
        "channels-last slice with pitch": (pitched, pitched.permute(0, 3, 1, 2)[:, 20:29]),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", list(targets("cpu", torch.float32)))
def test_layouts(where, layout: str, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(2, 42, 9, 4, 8, dtype=where["dtype"], device=where["device"])
    addend = torch.randn(2, 42, 9, device=where["device"])
    out, maps = ops.cross_attention_maps(q, k, v, 4, weight=0.5, addend=addend, impl=where["impl"])
    memory, into = targets(where["device"], dtype)[layout]
    memory.fill_(7)
    result = ops.cross_attention_maps_into(q, k, v, into, 4, weight=0.5, addend=addend, impl=where["impl"])
    assert torch.equal(result, out)
    written = into if into.dim() == 3 else into.flatten(2).transpose(1, 2)
    assert torch.equal(written, maps.to(dtype))
    into.fill_(7)
    assert (memory == 7).all()  # nothing else was touched


def test_accumulates_over_layers(where) -> None:
    layers = [make_qkv(2, 42, 9, heads, 8, dtype=where["dtype"], device=where["device"]) for heads in (2, 4, 8)]
    total = expected = None
    sums = torch.full((2, 42, 9), float("nan"), device=where["device"])  # the first layer writes
    for i, (layer, heads) in enumerate(zip(layers, (2, 4, 8), strict=True)):
        _, expected = ops.cross_attention_maps(*layer, heads, weight=1 / 3, addend=expected, impl=where["impl"])
        ops.cross_attention_maps_into(*layer, sums, heads, weight=1 / 3, accumulate=i > 0, impl=where["impl"])
    assert torch.equal(sums, expected)
    del total


def test_categories(where) -> None:
    q, k, v = make_qkv(2, 42, 9, 4, 8, dtype=where["dtype"], device=where["device"])
    ids = torch.tensor([0, 0, 1, 2, 2, 2, -1, 4, 4], device=where["device"])
    kwargs = {"categories": ids, "num_categories": 6, "reduce": "mean", "impl": where["impl"]}
    features = torch.zeros(2, 10, 6, 7, device=where["device"])
    ops.cross_attention_maps_into(q, k, v, features[:, 4:], 4, **kwargs)
    _, maps = ops.cross_attention_maps(q, k, v, 4, **kwargs)
    assert torch.equal(features[:, 4:].flatten(2).transpose(1, 2), maps)
    assert not features[:, :4].any()


def test_out_has_gradients_and_into_none() -> None:
    q, k, v = (x.requires_grad_() for x in make_qkv(2, 42, 9, 4, 8))
    for accumulate in (False, True):
        into = torch.ones(2, 42, 9)
        out = ops.cross_attention_maps_into(q, k, v, into, 4, weight=0.5, accumulate=accumulate)
        same, maps = ops.cross_attention_maps(q, k, v, 4, weight=0.5)
        assert torch.equal(into, maps + 1 if accumulate else maps)
        assert not into.requires_grad
        actual, expected = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, same))
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b)


def test_autograd_knows_of_the_write() -> None:
    q, k, v = make_qkv(2, 42, 9, 4, 8)
    into, factor = torch.ones(2, 42, 9), torch.ones(2, 42, 9, requires_grad=True)
    product = (into * factor).sum()
    ops.cross_attention_maps_into(q, k, v, into, 4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_empty() -> None:
    q, k, v = make_qkv(2, 42, 9, 4, 8)
    out = ops.cross_attention_maps_into(q[:0], k[:1], v[:1], torch.zeros(0, 42, 9), 4)
    assert out.shape == (0, 42, 32)


def test_bad_values_are_named() -> None:
    q, k, v = make_qkv(2, 42, 9, 4, 8)
    good = torch.zeros(2, 42, 9)
    bad = [
        (dict(into=torch.zeros(2, 42, 8)), "into must have shape \\(B=2, N=42, maps=9\\), got \\(2, 42, 8\\)"),
        (dict(into=None), "into must be a tensor of shape"),
        (dict(into=good.int()), "into must be .*float32.* got torch.int32"),
        (dict(into=good.to("meta")), "into must be on cpu as q is, got meta"),
        (dict(into=torch.zeros(2, 9, 6, 6)), "into must have h\\*w = N = 42, got shape \\(2, 9, 6, 6\\)"),
        (dict(into=torch.zeros(2, 8, 6, 7)), "into must have shape \\(B=2, maps=9, h, w\\), got \\(2, 8, 6, 7\\)"),
        (dict(into=torch.zeros(2, 9, 6, 8)[..., :7]), "into must have rows that follow each other"),
        (dict(into=torch.zeros(2, 1, 9).expand(2, 42, 9)), "into must not be expanded"),
        (dict(into=good.clone().requires_grad_()), "into must not require gradients"),
        (dict(into=good.bfloat16(), accumulate=True), "accumulate=True needs into in torch.float32"),
        (dict(into=good, accumulate=True, addend=good), "give either accumulate=True or an addend"),
        (dict(into=good, addend=good[:1]), "addend must have shape \\(B=2, N=42, maps=9\\)"),
        (dict(into=good, accumulate="yes"), "accumulate must be True or False, got 'yes'"),
        (dict(into=good, weight=None), "weight must be a finite Python number, got None"),
        (dict(into=good, heads=5), "heads=5 must divide the width of q"),
    ]
    for changes, message in bad:
        arguments = {"q": q, "k": k, "v": v, "into": good, "heads": 4} | changes
        with pytest.raises(InputError, match=message):
            ops.cross_attention_maps_into(**arguments)
    assert not good.any()


@pytest.mark.parametrize("accumulate", [False, True])
def test_opcheck(accumulate: bool) -> None:
    q, k, v = make_qkv(2, 42, 9, 4, 8)
    op = ops.registry()["cross_attention_maps_into"]
    call = op.bind(q, k, v, torch.zeros(2, 9, 6, 7), 4, accumulate=accumulate)
    torch.library.opcheck(torch.ops.vpd_fast.cross_attention_maps_into.default, (*op.flatten(call), "auto"))


def test_torch_compile() -> None:
    def run(q, k, v, features):
        out = ops.cross_attention_maps_into(q * 2, k, v, features[:, 3:], 4, accumulate=True)
        return out + 1, features.sum()

    q, k, v = make_qkv(2, 42, 9, 4, 8)
    features = [torch.ones(2, 12, 6, 7) for _ in range(2)]
    expected = run(q, k, v, features[0])
    actual = torch.compile(run, fullgraph=True)(q, k, v, features[1])
    for a, b in zip((*actual, features[1]), (*expected, features[0]), strict=True):
        torch.testing.assert_close(a, b)
