"""kernels/attention.py: both backends against float64, packing, poison, same bits, the operator."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import DEVICE, ROOT, TENSOR_CORE, check_against_reference, compiled

from kernels import attention as MODULE
from kernels.attention import attention, reference

MIXED_Q = [5, 1, 97, 0, 5, 130, 7]
MIXED_K = [3, 1, 2, 4, 0, 77, 30]


def cu(lengths):
    return torch.tensor([0] + lengths).cumsum(0).int().to(DEVICE)


def make(len_q, len_k, heads, width, dtype=torch.float32, tail=3, spread=1.0):
    generator = torch.Generator().manual_seed(len(len_q) * 1000 + width)
    rows = [sum(len_q) + tail, sum(len_k) + tail, sum(len_k) + tail]
    return [(torch.randn(n, heads, width, generator=generator) * spread).to(DEVICE, dtype)
            for n in rows]


def compare(len_q, len_k, heads, width, dtype, **options):
    cu_q, cu_k = cu(len_q), cu(len_k)
    check_against_reference(
        ["o", "dq", "dk", "dv"], make(len_q, len_k, heads, width, dtype, **options),
        lambda q, k, v: (attention(q, k, v, cu_q, cu_k),),
        lambda q, k, v, upcast: (reference(q, k, v, cu_q, cu_k, upcast=upcast),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("len_q, len_k, heads, width", [
    ([1, 97, 217], [1, 97, 217], 1, 72),
    (MIXED_Q, MIXED_K, 2, 32),
    ([40, 7, 40, 16, 7], [40, 7, 40, 16, 7], 3, 8),
    ([33], [200], 1, 136),
    ([8, 8, 8, 3], [3, 7, 4, 5], 2, 16),    # on the torch path one group, keys padded
])
def test_matches_float64(backend, dtype, len_q, len_k, heads, width):
    compare(len_q, len_k, heads, width, dtype)


@pytest.fixture
def hopper(monkeypatch):
    """The tiles of a Hopper GPU: larger ones, of which only a clip's last is masked."""
    pytest.importorskip("triton")
    monkeypatch.setenv("NANOSORA_KERNELS", "triton")
    monkeypatch.setattr(MODULE, "_is_hopper", lambda device: True)
    monkeypatch.setattr(MODULE, "_config", MODULE._config.__wrapped__)


@pytest.mark.parametrize("width", [40, 72, 128])
def test_tiles_of_a_hopper_gpu(hopper, width):
    assert not MODULE._config("dq", width, torch.bfloat16, torch.device(DEVICE))["MASKED"]
    compare([150, 64, 1], [130, 70, 64], 1, width, torch.bfloat16)


def test_long_clip(backend):
    compare([1023], [1023], 1, 64, torch.bfloat16)


@pytest.mark.parametrize("is_wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_clips_on_a_cpu_with_and_without_avx512(is_wide, dtype, monkeypatch):
    """Clip by clip through convolutions, or torch's attention: the same, whatever this CPU is."""
    monkeypatch.setenv("NANOSORA_KERNELS", "torch")
    monkeypatch.setattr(MODULE, "IS_WIDE", is_wide)
    monkeypatch.setattr(MODULE, "_part", lambda q, k: 200)      # three parts, as of longer clips
    compare([520, 520, 64], [520, 520, 64], 1, 32, dtype)


def test_large_logits(backend):
    # in float32, exp(s - lse) in backward loses the digits that logits of 200 take: 3x torch's own
    compare([65, 30], [65, 30], 1, 32, torch.bfloat16, spread=5.0)


def check_low_logits():
    """All near -12800, with a ragged last tile: what is masked there, zero, is a huge score."""
    shift = [x.new_tensor(n) for x, n in zip(make([33], [33], 1, 64), (-40, 40, 0))]
    inputs = [(x + n).bfloat16() for x, n in zip(make([33], [33], 1, 64, tail=0), shift)]
    check_against_reference(
        ["o", "dq", "dk", "dv"], inputs, lambda *x: (attention(*x, cu([33]), cu([33])),),
        lambda *x, upcast: (reference(*x, cu([33]), cu([33]), upcast=upcast),))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's: what is masked may overflow
def test_low_logits(backend):
    check_low_logits()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_low_logits_in_tiles_of_a_hopper_gpu(hopper):
    check_low_logits()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [16, 40, 64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("len_q, len_k", [
    ([1, 7, 63, 64, 65, 127, 128, 129], [1, 7, 63, 64, 65, 127, 128, 129]),
    ([1] * 60, [1] * 60), ([300] + [2] * 20, [17] * 21), ([97, 128], [203, 217]),
])
def test_grid(backend, dtype, width, len_q, len_k):
    compare(len_q, len_k, 2, width, dtype)


def gradients(q, k, v, cu_q, cu_k, do):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = attention(*leaves, cu_q, cu_k)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def test_rows_behind_the_last_clip_are_zero(backend):
    q, k, v = make(MIXED_Q, MIXED_K, 2, 16, tail=5)
    for x in (q, k, v):
        x[-5:] = float("nan")
    do = torch.ones_like(q)
    o, dq, dk, dv = gradients(q, k, v, cu(MIXED_Q), cu(MIXED_K), do)
    for x in (o, dq, dk, dv):
        assert torch.equal(x[-5:], torch.zeros_like(x[-5:]))
    empty = slice(sum(MIXED_Q[:4]), sum(MIXED_Q[:5]))  # queries without keys
    assert not o[empty].any() and not dq[empty].any()
    unseen = slice(sum(MIXED_K[:3]), sum(MIXED_K[:4]))  # keys without queries
    assert not dk[unseen].any() and not dv[unseen].any()
    assert all(torch.isfinite(x).all() for x in (o, dq, dk, dv))


def check_neighbours(len_q, len_k, clip, dtype=torch.float32):
    """All but one clip become NaN, and that one's results keep their bits."""
    q, k, v = make(len_q, len_k, 1, 32, dtype)
    cu_q, cu_k = cu(len_q), cu(len_k)
    do = torch.randn_like(q)
    clean = gradients(q, k, v, cu_q, cu_k, do)
    keep_q, keep_k = (slice(int(c[clip]), int(c[clip + 1])) for c in (cu_q, cu_k))
    for x, keep in ((q, keep_q), (k, keep_k), (v, keep_k), (do, keep_q)):
        kept = x[keep].clone()
        x.fill_(float("nan"))
        x[keep] = kept
    poisoned = gradients(q, k, v, cu_q, cu_k, do)
    for a, b, keep in zip(clean, poisoned, (keep_q, keep_q, keep_k, keep_k)):
        assert torch.equal(a[keep], b[keep])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN
@pytest.mark.parametrize("len_q, len_k, clip", [
    (MIXED_Q, MIXED_Q, 2), (MIXED_Q, MIXED_K, 2), ([8, 8, 8], [3, 7, 1], 0)])  # the last: padded
def test_neighbours_do_not_leak(backend, len_q, len_k, clip):
    check_neighbours(len_q, len_k, clip)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_neighbours_do_not_leak_in_tiles_of_a_hopper_gpu(hopper):
    check_neighbours([70, 65, 20], [70, 65, 20], 1, torch.bfloat16)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("n_keys", [1, 8, 17, 40])
def test_a_querys_nan_is_its_rows(backend, n_keys):
    """However few the keys: torch's own attention on a CPU gives zeros for it below 16."""
    q, k, v = make([5, 8], [n_keys, 3], 1, 16, tail=0)
    q[2, 0, 4] = float("nan")
    o = attention(q, k, v, cu([5, 8]), cu([n_keys, 3]))
    assert o.isnan().all(-1).flatten().tolist() == [n == 2 for n in range(13)]
    assert o.isnan().sum() == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_autocast_is_as_torchs_own(backend, dtype):
    c, inputs = cu([5, 8]), make([5, 8], [5, 8], 2, 16, dtype, tail=0)
    inputs[2] = inputs[2].bfloat16() if dtype == torch.float32 else inputs[2]   # mixed: made alike
    own = [x.transpose(0, 1) for x in inputs]
    with torch.autocast(DEVICE, torch.bfloat16):
        leaves = [x.requires_grad_() for x in inputs]
        o = attention(*leaves, c, c)
        want = torch.nn.functional.scaled_dot_product_attention(*own)
    assert o.dtype == want.dtype == (torch.float64 if dtype == torch.float64 else torch.bfloat16)
    grads = torch.autograd.grad(o.float().sum(), leaves)
    assert [g.dtype for g in grads] == [x.dtype for x in leaves]
    narrow = [x.detach().to(o.dtype) for x in inputs]
    assert torch.equal(o, attention(*narrow, c, c))


def test_packed_is_each_clip_alone(backend):
    q, k, v = make(MIXED_Q, MIXED_K, 1, 24, tail=0)
    cu_q, cu_k = cu(MIXED_Q), cu(MIXED_K)
    do = torch.randn_like(q)
    packed = gradients(q, k, v, cu_q, cu_k, do)
    for b in (1, 2, 5):
        at_q, at_k = (slice(int(c[b]), int(c[b + 1])) for c in (cu_q, cu_k))
        alone = gradients(q[at_q], k[at_k], v[at_k], cu([MIXED_Q[b]]), cu([MIXED_K[b]]), do[at_q])
        for p, a, rows in zip(packed, alone, (at_q, at_q, at_k, at_k)):
            if backend == "triton":
                assert torch.equal(p[rows], a)
            else:  # a batch of several clips may round otherwise than a batch of one
                torch.testing.assert_close(p[rows], a, rtol=1e-5, atol=1e-5)


def test_order_of_clips_changes_nothing(backend):
    lengths = [9, 20, 9, 3, 20]
    q, k, v = make(lengths, lengths, 2, 16, tail=0)
    o = attention(q, k, v, cu(lengths), cu(lengths))
    back = [x.split(lengths)[::-1] for x in (q, k, v, o)]
    q, k, v, o = (torch.cat(x) for x in back)
    assert torch.equal(attention(q, k, v, cu(lengths[::-1]), cu(lengths[::-1])), o)


def test_reruns_give_the_same_bits(backend):
    q, k, v = make(MIXED_Q, MIXED_K, 1, 32)
    do = torch.randn_like(q)
    first = gradients(q, k, v, cu(MIXED_Q), cu(MIXED_K), do)
    for _ in range(2):
        again = gradients(q, k, v, cu(MIXED_Q), cu(MIXED_K), do)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_strided_views(backend):
    lengths = [30, 4, 30]
    qkv = torch.stack(make(lengths, lengths, 2, 24), 1)
    do = torch.randn(len(qkv), 24, 2, device=DEVICE).transpose(1, 2)
    strided = gradients(*qkv.unbind(1), cu(lengths), cu(lengths), do)
    dense = gradients(*(x.contiguous() for x in qkv.unbind(1)), cu(lengths), cu(lengths),
                      do.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(strided, dense))


def test_scale_is_used(backend):
    q, k, v = make([8], [8], 1, 16)
    c = cu([8])
    torch.testing.assert_close(attention(q, k, v, c, c, 0.7), reference(q, k, v, c, c, 0.7))


def check_bias(len_q, len_k, width, dtype):
    """o, its gradients and lse with a bias, of which the third clip's keys and some more are -inf."""
    cu_q, cu_k = cu(len_q), cu(len_k)
    q, k, v = make(len_q, len_k, 2, width, dtype)
    bias = torch.randn(len(k), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    bias[torch.arange(len(k)) % 5 == 1] = float("-inf")
    bias[int(cu_k[2]):int(cu_k[3])] = float("-inf")
    check_against_reference(
        ["o", "dq", "dk", "dv"], [q, k, v], lambda *x: (attention(*x, cu_q, cu_k, bias=bias),),
        lambda *x, upcast: (reference(*x, cu_q, cu_k, bias=bias, upcast=upcast),))
    for b in (bias, None):
        o, lse = attention(q, k, v, cu_q, cu_k, bias=b, with_lse=True)
        want = reference(q, k, v, cu_q, cu_k, bias=b, with_lse=True, upcast=torch.float64)[1]
        assert torch.equal(o, attention(q, k, v, cu_q, cu_k, bias=b)) and lse.shape == want.shape
        torch.testing.assert_close(lse, want.float(), rtol=1e-4, atol=1e-4)
        assert torch.isinf(lse).any(0).sum() >= 3 + (len_q[2] if b is not None else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_and_lse(backend, dtype):
    check_bias([5, 1, 9, 0, 5, 40], [3, 2, 4, 4, 0, 70], 16, dtype)


@pytest.mark.parametrize("width", [64, 72])
def test_bias_and_lse_in_tiles_of_a_hopper_gpu(hopper, width):
    check_bias([70, 3, 10, 20], [130, 2, 70, 64], width, torch.bfloat16)


def test_bias_counts_keys_and_lse_merges_parts(backend):
    """A key with the bias log 3 is three keys; two parts of the keys, weighed by their lse, are all."""
    q, k, v = make([30], [40], 2, 16, tail=0)
    count = torch.arange(40, device=DEVICE) % 3 + 1
    many = [x.repeat_interleave(count, 0) for x in (k, v)]
    whole = attention(q, k, v, cu([30]), cu([40]), bias=count.log())
    torch.testing.assert_close(whole, attention(q, *many, cu([30]), cu([len(many[0])])))
    bias = torch.where(torch.arange(40, device=DEVICE) < 25, 0.0, float("-inf"))
    parts = [attention(q, k[part], v[part], cu([30]), cu([n]), with_lse=True)
             for part, n in ((slice(25), 25), (slice(25, 40), 15))]
    torch.testing.assert_close(attention(q, k, v, cu([30]), cu([40]), bias=bias), parts[0][0])
    weights = torch.stack([lse for _, lse in parts]).softmax(0).transpose(1, 2)[..., None]
    merged = (torch.stack([o for o, _ in parts]) * weights).sum(0)
    torch.testing.assert_close(merged, attention(q, k, v, cu([30]), cu([40])))


@pytest.mark.filterwarnings("ignore")
def test_operator(backend):
    q, k, v = (x.requires_grad_() for x in make([5, 3, 5], [2, 4, 0], 2, 16))
    for bias in (None, torch.randn(len(k), device=DEVICE)):
        torch.library.opcheck(MODULE._attention, (
            q, k, v, cu([5, 3, 5]), cu([2, 4, 0]), bias, 0.25, backend == "triton"))


def test_compiled_is_eager(backend):
    q, k, v = make([5, 3, 5], [2, 4, 1], 2, 16)
    c_q, c_k = cu([5, 3, 5]), cu([2, 4, 1])

    def run(q, k, v):
        return attention(q * 2, k, v, c_q, c_k).square()

    results = []
    for fn in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o = fn(*leaves)
        results.append([o, *torch.autograd.grad(o.sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("name, change", [
    ("q", lambda a: a | {"q": a["q"][0]}),
    ("q", lambda a: a | {name: a[name][:, :0] for name in "qkv"}),
    ("q", lambda a: a | {name: a[name][..., :0] for name in "qkv"}),
    ("k", lambda a: a | {"k": a["k"][:, :1]}),
    ("v", lambda a: a | {"v": a["v"][1:]}),
    ("v", lambda a: a | {"v": a["v"].bfloat16()}),
    ("bias", lambda a: a | {"bias": a["k"].new_zeros(3)}),
    ("bias", lambda a: a | {"bias": a["k"].new_zeros(len(a["k"])).requires_grad_()}),
    ("cu_q", lambda a: a | {"cu_q": a["cu_q"].long()}),
    ("cu_k", lambda a: a | {"cu_k": a["cu_k"][1:]}),
])
def test_wrong_input_names_the_argument(name, change):
    q, k, v = make([5], [4], 2, 16)
    args = dict(q=q, k=k, v=v, cu_q=cu([5]), cu_k=cu([4]))
    with pytest.raises(ValueError, match=f"^{name} must be"):
        attention(**change(args))


def test_backend_is_chosen_and_said(monkeypatch):
    import kernels
    monkeypatch.delenv("NANOSORA_KERNELS", raising=False)
    assert kernels.backend("cpu") == ("torch", "device is cpu, not cuda")
    assert kernels.backend("cuda")[0] == ("triton" if kernels.HAS_TRITON else "torch")
    monkeypatch.setenv("NANOSORA_KERNELS", "fast")
    with pytest.raises(ValueError, match="auto, triton, torch"):
        kernels.backend("cpu")
    monkeypatch.setenv("NANOSORA_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="triton"):
        kernels.backend("cpu")


def test_without_triton_the_torch_path_remains():
    code = ("import sys; sys.modules['triton'] = None\n"
            "from kernels import adaln, attention, backend, patchify, rope\n"
            "print(backend('cpu')[0], backend('cuda')[0])")
    env = {k: v for k, v in os.environ.items() if k != "NANOSORA_KERNELS"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True,
                          text=True)
    assert done.stdout.split() == ["torch", "torch"], done.stderr


def test_tile_table():
    from kernels import tile_table
    table = tile_table(cu([5, 0, 8, 1]), 4, 17).tolist()
    assert table == [[0, 0, 4], [0, 4, 5], [2, 5, 9], [2, 9, 13], [3, 13, 14], [4, 14, 14],
                     [4, 14, 14], [4, 14, 14]]


def test_layers_share_a_tile_table(monkeypatch):
    """Forward and backward of two layers make one table; of bounds that changed they make another."""
    pytest.importorskip("triton")
    monkeypatch.setenv("NANOSORA_KERNELS", "triton")
    made, tile_table = [], MODULE.tile_table
    monkeypatch.setattr(MODULE, "tile_table", lambda *args: made.append(args) or tile_table(*args))
    bounds, x = cu([5, 9]), make([5, 9], [5, 9], 1, 16)[0].requires_grad_()
    for n in (1, 2):
        attention(*[attention(x, x, x, bounds, bounds)] * 3, bounds, bounds).sum().backward()
        assert len(made) == n
        bounds[1] += 1


def launch_all(dtypes=(torch.bfloat16, torch.float32), widths=(32, 64, 72, 128)):
    """Every kernel at the widths that we ship, for the compile test."""
    lengths = torch.tensor([0, 100, 256], dtype=torch.int32)
    for dtype in dtypes:
        for width in widths:
            q, k, v = torch.empty(256, 3, 4, width, dtype=dtype).unbind(1)
            for bias in (None, torch.empty(256)) if dtype == torch.bfloat16 else (None,):
                o, lse = MODULE._triton_forward(q, k, v, lengths, lengths, 0.1, bias)
                MODULE._triton_backward(o, q, k, v, o, lse, lengths, lengths, 0.1, bias)


def launch_on_hopper():
    MODULE._is_hopper = lambda device: True
    launch_all([torch.bfloat16], MODULE.HOPPER)


def check_code(result, arch):
    """16 bits go through tensor cores, and rows are read 16 bytes a thread at a time: of fewer bytes
    are lse, delta and bounds, at most some three loads to two."""
    for name, made in result.items():
        if "bfloat16" in name:
            assert TENSOR_CORE[arch] in made["mma"] and 2 * made["wide"] > made["narrow"], (name, made)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_compiles_without_spills(arch):
    # sm_80 and sm_120 keep a little of the 72-wide dK, dV kernel on the stack
    allowed = {80: 160, 90: 32, 100: 80, 120: 160}[arch]
    check_code(compiled("test_attention", arch, stack=allowed), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, 100])
def test_tiles_for_hopper_compile_without_spills(arch):
    result = compiled("test_attention", arch, "launch_on_hopper", stack=0 if arch == 90 else 80)
    assert len(result) == 18
    check_code(result, arch)
