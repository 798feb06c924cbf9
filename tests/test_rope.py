"""kernels/rope.py: both backends against float64, what a rotation keeps, the operator."""

import pytest
import torch
from conftest import DEVICE, check_against_reference, compiled

from kernels import rope as MODULE
from kernels.rope import qk_norm_rope, reference


def make(n, heads, width, dtype=torch.float32):
    """qkv [N, 3, A, E], two weights, and (coords, freqs, axes); the last pair has frequency 0."""
    generator = torch.Generator().manual_seed(n + width)
    qkv = torch.randn(n, 3, heads, width, generator=generator).to(DEVICE, dtype)
    weights = [(1 + 0.3 * torch.randn(heads * width, generator=generator)).to(DEVICE, dtype)
               for _ in range(2)]
    pairs = torch.arange(width // 2)
    freqs = 100.0 ** (-pairs / len(pairs))
    freqs[-1] = 0.0
    coords = torch.rand(n, 3, generator=generator) * 16
    return qkv, weights, [x.to(DEVICE) for x in (coords, freqs, (pairs % 3).int())]


@pytest.mark.parametrize("norm", ["full", "head", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, heads, width", [(1, 1, 8), (97, 3, 24), (1023, 1, 32), (20, 16, 72)])
def test_matches_float64(backend, dtype, n, heads, width, norm):
    qkv, weights, where = make(n, heads, width, dtype)
    weights = {"full": weights, "head": [w[:width] for w in weights], None: []}[norm]
    check_against_reference(
        ["q", "k", "dqkv", "dq_weight", "dk_weight"][:3 + len(weights)], [qkv, *weights],
        lambda qkv, *w: qk_norm_rope(qkv[:, 0], qkv[:, 1], *where, *w),
        # positions stay float32 in every dtype: they are inputs, not arithmetic to be judged
        lambda qkv, *w, upcast: reference(qkv[:, 0], qkv[:, 1], *where, *w, upcast=upcast))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, width", [(8, 2), (16, 72), (12, 128), (40, 128), (6, 80)])
def test_grid(backend, dtype, heads, width):
    for norm in ("full", "head"):
        test_matches_float64(backend, dtype, 217, heads, width, norm)


def test_a_heads_norm_is_rms_norm(backend):
    """As torch's own, at frequency 0; q may have one over the full width beside it."""
    qkv, (weight, head), (coords, freqs, axes) = make(20, 2, 16)
    q, k = qk_norm_rope(qkv[:, 0], qkv[:, 1], coords, freqs * 0, axes, weight, head[:16])
    torch.testing.assert_close(k, torch.nn.functional.rms_norm(qkv[:, 1], (16,), head[:16], 1e-6))
    want = torch.nn.functional.rms_norm(qkv[:, 0].flatten(1), (32,), weight, 1e-6)
    torch.testing.assert_close(q.flatten(1), want)


def test_one_weight_only(backend):
    qkv, (weight, _), where = make(20, 2, 16)
    q, k = qk_norm_rope(qkv[:, 0], qkv[:, 1], *where, k_weight=weight)
    want = reference(qkv[:, 0], qkv[:, 1], *where, k_weight=weight)
    torch.testing.assert_close((q, k), want)


def test_rotation_keeps_lengths_and_depends_on_differences(backend):
    qkv, _, (coords, freqs, axes) = make(40, 2, 48)
    q, k = qk_norm_rope(qkv[:, 0], qkv[:, 1], coords, freqs, axes)
    torch.testing.assert_close(q.norm(dim=-1), qkv[:, 0].norm(dim=-1))
    assert torch.equal(q[..., -2:], qkv[:, 0, :, -2:])  # frequency 0
    moved = coords + torch.tensor([3.0, -2.0, 5.0], device=DEVICE)
    q2, k2 = qk_norm_rope(qkv[:, 0], qkv[:, 1], moved, freqs, axes)
    scores = [torch.einsum("nae,mae->anm", *qk) for qk in ((q, k), (q2, k2))]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)


def gradients(q, k, weights, where, seeds):
    leaves = [x.detach().requires_grad_() for x in (q, k, *weights)]
    out = qk_norm_rope(leaves[0], leaves[1], *where, *leaves[2:])
    return [o.detach() for o in out] + list(torch.autograd.grad(out, leaves, seeds))


def test_strided_is_dense_and_reruns_give_the_same_bits(backend):
    qkv, weights, where = make(150, 2, 24)
    seeds = [torch.randn(150, 24, 2, device=DEVICE).transpose(1, 2) for _ in range(2)]
    strided = gradients(qkv[:, 0], qkv[:, 1], weights, where, seeds)
    dense = [x.contiguous() for x in (qkv[:, 0], qkv[:, 1])]
    for _ in range(2):
        again = gradients(*dense, weights, where, [s.contiguous() for s in seeds])
        assert all(torch.equal(a, b) for a, b in zip(strided, again))


def test_tokens_are_alone(backend):
    qkv, weights, (coords, *rest) = make(90, 2, 24)
    whole = qk_norm_rope(qkv[:, 0], qkv[:, 1], coords, *rest, *weights)
    part = qk_norm_rope(qkv[31:77, 0], qkv[31:77, 1], coords[31:77], *rest, *weights)
    for a, b in zip(whole, part):
        assert torch.equal(a[31:77], b) or backend == "torch" and torch.allclose(a[31:77], b)


def test_operator():
    pytest.importorskip("triton")
    qkv, weights, where = make(20, 2, 16)
    q, k = (x.contiguous().requires_grad_() for x in (qkv[:, 0], qkv[:, 1]))
    for pair in (weights, [weights[0][:16], None], [None, None]):
        pair = [None if w is None else w.detach().requires_grad_() for w in pair]
        torch.library.opcheck(MODULE._qk_norm_rope, (q, k, *where, *pair, 1e-6))


def test_compiled_is_eager(backend):
    qkv, weights, where = make(33, 2, 16)

    def run(qkv, *weights):
        q, k = qk_norm_rope(qkv[:, 0], qkv[:, 1], *where, *weights)
        return (q * k * qkv[:, 2]).sum()

    results = []
    for fn in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [x.detach().requires_grad_() for x in (qkv, *weights)]
        out = fn(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name, value", [
    ("q", torch.zeros(10, 2, 7)), ("q", torch.zeros(10, 0, 8)), ("q", torch.zeros(10, 2, 0)),
    ("k", torch.zeros(9, 2, 8)), ("coords", torch.zeros(10, 2)),
    ("freqs", torch.zeros(4).double()), ("axes", torch.zeros(4)), ("q_weight", torch.zeros(9))])
def test_wrong_input_names_the_argument(name, value):
    qkv, weights, where = make(10, 2, 8)
    names = ("q", "k", "coords", "freqs", "axes", "q_weight", "k_weight")
    args = dict(zip(names, (qkv[:, 0], qkv[:, 1], *where, *weights)))
    with pytest.raises(ValueError, match=f"^{name} must be"):
        qk_norm_rope(**args | {name: value.to(DEVICE)})


def launch_all():
    """Every kernel at the widths that we ship, for the compile test."""
    for dtype in (torch.bfloat16, torch.float32):
        for heads, width in ((8, 32), (16, 72), (24, 128), (40, 128)):
            x, weight = torch.empty(128, heads, width, dtype=dtype), torch.empty(heads * width)
            where = (torch.empty(128, 3), torch.empty(width // 2),
                     torch.zeros(width // 2, dtype=torch.int32))
            for w in (None, weight, weight[:width]):
                MODULE._triton_forward(x, *where, w, 1e-6)
                MODULE._triton_backward(x, x, *where, w, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_compiles_without_spills(arch):
    # 28 bytes are sin and cos's own, for angles beyond 10^5
    assert all(made["wide"] for made in compiled("test_rope", arch, stack=64).values())
