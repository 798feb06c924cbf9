"""What the kernels share: index vectors and tables, launches, inference_mode and graphs, whole
blocks compiled, and addresses: none outside of the tensors, none cut off at 2^31 numbers."""

import contextlib
import re

import pytest
import torch
from conftest import DEVICE, HAS_GPU, ROOT, check_against_reference, untouched

import kernels
from kernels import adaln, attention, patchify, rope

needs_interpreter = pytest.mark.skipif(HAS_GPU, reason="lays tensors out on the host")


def cu(lengths):
    return torch.tensor([0] + lengths).cumsum(0).int().to(DEVICE)


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def where(n, pairs):
    """coords, freqs, axes for rope."""
    return [x.to(DEVICE) for x in (torch.rand(n, 3, generator=torch.Generator().manual_seed(n)) * 9,
                                   1 / torch.arange(1.0, pairs + 1),
                                   (torch.arange(pairs) % 3).int())]


def with_gradients(fn, *tensors):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = fn(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    seeds = [randn(*o.shape) for o in out]
    return [*(o.detach() for o in out), *torch.autograd.grad(out, leaves, seeds)]


def every_operator():
    """[(name, fn of tensors, tensors)]: what each public function makes of its packed rows."""
    bounds, keys, rows = cu([7, 13, 10]), cu([3, 20, 7]), (torch.arange(30) // 7).int().to(DEVICE)
    places, tables = where(30, 8), randn(5, 3, 24).unbind(1)
    return [
        ("attention", lambda *x: attention.attention(*x, bounds, keys),
         randn(30, 3, 2, 16).unbind(1)),
        ("biased", lambda *x: attention.attention(*x, bounds, keys, bias=randn(30)),
         randn(30, 3, 2, 16).unbind(1)),
        ("ln_modulate", lambda x, *t: adaln.ln_modulate(x, *t, rows), (randn(30, 24), *tables[:2])),
        ("gated", lambda x, y, *t: adaln.gate_residual_ln_modulate(x, y, *t, rows),
         (*randn(30, 2, 24).unbind(1), *tables)),
        ("rope", lambda q, k, *w: rope.qk_norm_rope(q, k, *places, *w),
         (*randn(30, 2, 2, 16).unbind(1), randn(32), randn(16))),
        ("patchify", lambda z: patchify.patchify([z], (1, 2, 2)), (randn(3, 2, 4, 6),))]


def test_inference_mode_changes_nothing(backend):
    want = [fn(*tensors) for _, fn, tensors in every_operator()]
    with torch.inference_mode():                # index vectors too are made inside
        got = [fn(*tensors) for _, fn, tensors in every_operator()]
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_bounds_changed_inside_inference_mode_are_seen(backend):
    with torch.inference_mode():
        bounds, (q, k, v) = cu([7, 13, 10]), randn(30, 3, 2, 16).unbind(1)
        attention.attention(q, k, v, bounds, bounds)
        bounds[1] = 12
        torch.testing.assert_close(attention.attention(q, k, v, bounds, bounds),
                                   attention.reference(q, k, v, bounds, bounds))


def test_index_vectors_and_weights_may_be_views(backend):
    """A column of a table, every second number, one number seen many times: as their copies."""
    bounds, keys, _ = torch.stack([cu([7, 13, 10]), cu([3, 20, 7]), cu([30, 0, 0])], 1).unbind(1)
    rows = torch.stack([torch.arange(30) // 7, torch.full((30,), 4)], 1).int().to(DEVICE)
    (coords, freqs, _), wide = where(30, 16), randn(30, 4)
    one_axis, weights = rows.new_full((1,), 1), randn(64)
    tables = randn(5, 48).unflatten(1, (24, 2))[..., 0], randn(1, 24).expand(5, 24)

    def run(copy):
        return [
            *with_gradients(lambda *x: attention.attention(*x, copy(bounds), copy(keys),
                                                           bias=copy(wide[:, 1])),
                            *randn(30, 3, 2, 16).unbind(1)),
            *with_gradients(lambda x, *t: adaln.ln_modulate(x, *map(copy, t), copy(rows[:, 0])),
                            randn(30, 24), *tables),
            *with_gradients(lambda *x: rope.qk_norm_rope(
                *x[:2], copy(wide[:, :3]), copy(freqs[::2]), copy(one_axis.expand(8)),
                copy(x[2][::2]), copy(x[3].expand(32))),
                *randn(30, 2, 2, 16).unbind(1), weights, randn(1)),
            *rope.qk_norm_rope(*randn(30, 2, 2, 16).unbind(1), copy(coords.T.contiguous().T),
                               copy(freqs[:8]), copy(one_axis.expand(8)))]
    for a, b in zip(run(lambda x: x), run(lambda x: x.contiguous()), strict=True):
        torch.testing.assert_close(a, b)


def test_only_the_newest_tables_are_kept(monkeypatch):
    """In a run's life a buffer of bounds is filled many times."""
    pytest.importorskip("triton")
    monkeypatch.setenv("NANOSORA_KERNELS", "triton")
    bounds, (q, k, v) = cu([7, 13, 10]), randn(30, 3, 1, 16).unbind(1)
    rows, (x, shift, scale) = (torch.arange(30) // 7).int().to(DEVICE), randn(30, 3, 16).unbind(1)
    counts = set()
    for n in range(4):
        attention.attention(q, k, v, bounds, bounds)
        with_gradients(lambda *t: adaln.ln_modulate(*t, rows), x, shift, scale)
        counts.add((len(kernels._kept[bounds][1]), len(kernels._kept[rows][1])))
        bounds[1] += 1
        rows[0] = n % 2
    assert len(counts) == 1


def test_a_graph_makes_its_tables_itself(monkeypatch):
    """While CUDA captures nothing is taken from, or left in, what is kept: a replay would read a
    table of the bounds before."""
    pytest.importorskip("triton")
    monkeypatch.setenv("NANOSORA_KERNELS", "triton")
    bounds, (q, k, v) = cu([7, 13, 10]), randn(30, 3, 1, 16).unbind(1)
    attention.attention(q, k, v, bounds, bounds)                    # the warm-up: kept
    monkeypatch.setattr(kernels, "is_capturing", lambda x: True)
    bounds.data[1] = 12                                             # as before a replay: not counted
    want = attention.reference(q, k, v, bounds, bounds)
    torch.testing.assert_close(attention.attention(q, k, v, bounds, bounds), want)


@pytest.mark.skipif(not HAS_GPU, reason="no GPU")
def test_a_replay_reads_the_bounds_of_the_day():
    bounds, rows = cu([7, 13, 10]), (torch.arange(30) // 7).int().to(DEVICE)
    q, k, v = (x.contiguous().requires_grad_() for x in randn(30, 3, 2, 16).unbind(1))
    x, shift, scale = (x.contiguous().requires_grad_() for x in randn(30, 3, 24).unbind(1))
    seeds = randn(30, 2, 16), randn(30, 24)

    def step():
        o = attention.attention(q, k, v, bounds, bounds)
        h = adaln.ln_modulate(x, shift, scale, rows)
        return [o, h, *torch.autograd.grad((o, h), (q, k, v, x, shift, scale), seeds)]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = step()
    for first in (7, 3, 12):
        bounds.copy_(cu([first, 20 - first, 10]))
        rows.copy_((torch.arange(30) // first).int())
        graph.replay()
        for a, b in zip(static, step(), strict=True):
            assert torch.equal(a, b)


def test_launches_go_to_the_tensors_device(monkeypatch):
    """Whatever device is the current one; and there is no other way to launch."""
    entered, launched = [], []

    @contextlib.contextmanager
    def device(which):
        entered.append(which)
        yield
        entered.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: launched.append((grid, list(entered), options))

    class OnSecond:
        device = torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device", device)
    kernels.launch(Kernel(), (3, 2), OnSecond(), 5, E=4)
    kernels.launch(Kernel(), (3, 0), OnSecond())                    # nothing to do
    kernels.launch(Kernel(), (1,), torch.ones(1))
    assert launched == [((3, 2), [OnSecond.device], {"E": 4}), ((1,), [], {})]
    for file in (ROOT / "kernels").glob("*.py"):
        assert not re.search(r"_kernel\[", file.read_text()), file.name


@pytest.mark.parametrize("name, result, wrong", [
    ("cu_q[0]", 2, lambda q, k, rows, axes: q.__setitem__(0, 2)),
    ("cu_q[2]", 3, lambda q, k, rows, axes: q.__setitem__(2, 3)),
    ("cu_q[3]", 31, lambda q, k, rows, axes: q.__setitem__(3, 31)),
    ("cu_k[1]", -1, lambda q, k, rows, axes: k.__setitem__(1, -1)),
    ("cu_k[3]", 99, lambda q, k, rows, axes: k.__setitem__(3, 99)),
    ("rows[4]", 3, lambda q, k, rows, axes: rows.__setitem__(4, 3)),
    ("rows[0]", -1, lambda q, k, rows, axes: rows.__setitem__(0, -1)),
    ("axes[1]", 3, lambda q, k, rows, axes: axes.__setitem__(1, 3)),
])
@needs_interpreter
def test_numbers_that_do_not_fit_are_named(backend, name, result, wrong):
    bounds, keys, rows = cu([7, 13, 10]), cu([3, 20, 7]), torch.zeros(30, dtype=torch.int32)
    (q, k, v), (coords, freqs, axes) = randn(30, 3, 1, 16).unbind(1), where(30, 8)
    wrong(bounds, keys, rows, axes)
    own = backend == "torch" and not name.startswith("cu")          # of torch's own index_select
    message = "out of" if own else re.escape(f"{name} must be in ") + rf"\d+\.\.\d+, got {result}$"
    with pytest.raises((IndexError, RuntimeError) if own else ValueError, match=message):
        attention.attention(q, k, v, bounds, keys)
        adaln.ln_modulate(q[:, 0], *randn(2, 3, 16), rows)
        rope.qk_norm_rope(q, k, coords, freqs, axes)


@needs_interpreter
def test_numbers_that_nobody_saw_are_clamped(fenced, monkeypatch):
    """As on a GPU, where the host does not wait for them: the rows before cu[0] belong to no clip,
    a bound below the one before it makes an empty clip, what lies behind the rows is not read."""
    monkeypatch.setattr(kernels, "check_numbers", lambda *args, **options: None)
    q, k, v = randn(30, 3, 2, 16).unbind(1)
    wild = cu([2]).new_tensor([2, 16, 4, 99]), cu([2]).new_tensor([-3, 5, 9, 50])
    tame = cu([2, 14, 0, 14]), cu([0, 5, 4, 21])
    got, want = (with_gradients(lambda *x: attention.attention(*x, *c), q, k, v)
                 for c in (wild, tame))
    assert all(torch.equal(a, b) for a, b in zip(got, want)) and not got[0][:2].any()
    rows = (torch.arange(30) // 7).int()
    got, want = (with_gradients(lambda *x: adaln.ln_modulate(*x, r), q[:, 0], *randn(2, 3, 16))
                 for r in (rows - 1, (rows - 1).clamp(0, 2)))
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    coords, freqs, axes = where(30, 8)
    axes *= 2
    got, want = (rope.qk_norm_rope(q, k, coords, freqs, a) for a in (axes, axes.clamp(0, 2)))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("is_hopper", [False, True])
def test_nothing_outside_is_read_or_written(fenced, monkeypatch, is_hopper):
    """Each tensor ends where its memory might: kernels read whole tiles of rows and columns, and
    spare programs have no row of a table."""
    monkeypatch.setattr(attention, "_is_hopper", lambda device: is_hopper)
    monkeypatch.setattr(attention, "_config", attention._config.__wrapped__)
    for _, fn, tensors in every_operator():
        with_gradients(fn, *tensors)
    dtype = torch.bfloat16 if is_hopper else torch.float32
    with_gradients(lambda *x: attention.attention(*x, cu([70, 1]), cu([65, 6])).float(),
                   *(randn(71, 1, 40).to(dtype) for _ in range(3)))
    # heads of 12 lie 12 apart, no multiple of 8, and so may rows of heads of 16: these are copied
    for width, apart in ((12, 12), (16, 17)):
        with_gradients(lambda *x: attention.attention(*x, cu([5, 3]), cu([5, 3])),
                       *randn(8, 3, 2, apart)[..., :width].unbind(1))
    latents = [randn(3, 2, 4, 6), randn(3, 1, 2, 2)]
    tokens = patchify.patchify(latents, (1, 2, 2))
    for a, b in zip(patchify.unpatchify(tokens, [z.shape for z in latents], (1, 2, 2)), latents):
        assert torch.equal(a, b)


# ---- numbers beyond 2^31

@needs_interpreter
def test_attention_reads_and_writes_beyond_int32(fenced):
    n = 17
    bounds, small = cu([n]), [x.bfloat16() for x in randn(n, 3, 1, 16).unbind(1)]
    base = untouched(n, torch.bfloat16)
    big = [base.as_strided(base.shape, base.stride(), 64 * i) for i in range(3)]
    for b, s in zip(big, small):
        b.copy_(s)
    got, want = (with_gradients(lambda *x: attention.attention(*x, bounds, bounds), *three)
                 for three in (big, small))
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    # what is written is dense: only many heads take a row so far. All are declared, one runs
    o, config = base.as_strided(base.shape, base.stride(), 192), attention._config(
        "forward", 16, torch.bfloat16, base.device)
    tiles = attention._tiles(bounds, n, config["BLOCK_M"])
    kernels.launch(attention._forward_kernel, (len(tiles), 1), *big, o, o, torch.empty(1, n), tiles,
                   bounds, 1, 0.25, *[2**27, 16] * 3, n, 2**23, BIASED=False, **config)
    assert torch.equal(o, want[0])


@needs_interpreter
def test_adaln_writes_beyond_int32(fenced):
    n, tables = 17, randn(3, 1, 16).bfloat16()
    base = untouched(n, torch.bfloat16)
    x, y, r, h = (base.as_strided((n, 16), (2**27, 1), 64 * i) for i in range(4))
    x.copy_(randn(n, 16))
    y.copy_(randn(n, 16))
    config = dict(BLOCK_M=1, BLOCK_D=16, num_warps=1)
    kernels.launch(adaln._forward_kernel, (n,), x, y, *tables, torch.zeros(n, dtype=torch.int32), r,
                   h, torch.empty(n, 2), n, 2**27, 0, 0, 0, 1e-6, GATED=True, RMS=False, **config)
    assert torch.equal(r, (x.float() + tables[0].float() * y.float()).bfloat16())


@needs_interpreter
def test_rope_reads_beyond_int32(fenced):
    n, small, places = 17, randn(17, 2, 1, 16).bfloat16().unbind(1), where(17, 8)
    base = untouched(n, torch.bfloat16)
    big = [base.as_strided(base.shape, base.stride(), 64 * i) for i in range(2)]
    for b, s in zip(big, small):
        b.copy_(s)
    got, want = (with_gradients(lambda *x: rope.qk_norm_rope(x[0], x[1], *places, *x[2:]), *pair,
                                randn(16), randn(16)) for pair in (big, small))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@needs_interpreter
def test_patchify_reads_beyond_int32(fenced):
    latent = torch.arange(16, dtype=torch.int8).view(1, 1, 4, 4)
    flat, tokens = torch.empty(2**31 + 16, dtype=torch.int8), torch.empty(4, 4, dtype=torch.int8)
    flat[2**31:] = latent.flatten()
    clips, tiles = patchify._tables(((1, 1, 4, 4),), (1, 2, 2), 4, torch.device("cpu"))
    clips[0, 0] = 2**31
    kernels.launch(patchify._copy_kernel, (1,), flat, tokens, clips, tiles, 4, 1, 1, 2, 2, CUT=True,
                   BLOCK_N=4, BLOCK_K=4, num_warps=4)
    patchify._tables.cache_clear()
    assert torch.equal(tokens, patchify.reference([latent], (1, 2, 2)))


# ---- the definitions of right, and whole blocks

def test_references_have_the_gradients_of_their_values():
    bounds, keys = cu([3, 0, 2]), cu([2, 1, 0])
    rows, places = torch.tensor([0, 2, 2, 0, 1], dtype=torch.int32), [x.cpu() for x in where(5, 2)]
    double = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    check = lambda fn, *shapes: torch.autograd.gradcheck(fn, [double(*s) for s in shapes])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        check(lambda *x: attention.reference(*x, bounds, keys, upcast=None),
              (6, 2, 4), (3, 2, 4), (3, 2, 4))
        check(lambda *x: attention.reference(
            *x, bounds, keys, bias=torch.tensor([0.5, -torch.inf, 1.0]), with_lse=True,
            upcast=None)[0], (6, 2, 4), (3, 2, 4), (3, 2, 4))
        check(lambda x, shift, scale, y, gate: adaln.reference(x, shift, scale, rows, y, gate,
                                                               upcast=None),
              (5, 4), (3, 4), (3, 4), (5, 4), (3, 4))
        check(lambda x, *t: adaln.reference(x, *t, rows, rms=True, upcast=None),
              (5, 4), (3, 4), (3, 4))
        check(lambda q, k, *w: rope.reference(q, k, *places, *w, upcast=None),
              (5, 2, 4), (5, 2, 4), (8,), (4,))
        check(lambda a, b: patchify.reference([a, b], (1, 2, 2)), (2, 1, 2, 4), (2, 2, 2, 2))


def build(kind):
    """(block, row, context) of a tiny denoiser, after LoRA where asked."""
    import train_dit as D
    torch.manual_seed(0)
    options = dict(sincos=dict(positions="sincos", own_table=True), text=dict(text_dim=8),
                   lora=dict(text_dim=8), rope={})[kind]
    model = torch.nn.Module()
    model.dit = D.DiT(4, 24, 1, 2, (1, 2, 2), **options)
    texts = [torch.randn(3, 8), torch.randn(5, 8)] if "text_dim" in options else [[], []]
    row = D.lay_out([(4, 1, 4, 4), (4, 2, 4, 6)], [8.0, 8.0], texts, 1, (1, 2, 2), 20)
    if kind != "sincos":
        row.freqs, row.axes = model.dit.freqs, model.dit.axes
    if kind == "lora":
        D.add_lora(model, 2)
    for name, p in model.named_parameters():                 # none that starts at zero
        p.data += 0.1 * torch.randn_like(p)
    return model.dit.blocks[0], row, torch.randn(8, 24) if "text_dim" in options else None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind, path", [
    ("rope", "triton"), ("sincos", "torch"), ("text", "torch"), ("text", "triton"),
    *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (
        ("rope", "torch"), ("sincos", "triton"), ("lora", "torch"), ("lora", "triton")))])
def test_whole_blocks_compile_to_one_graph(monkeypatch, kind, path):
    if path == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("NANOSORA_KERNELS", path)
    torch._dynamo.reset()
    block, row, text = build(kind)
    x, h, *tables = randn(20, 24), randn(20, 24) / 2, *randn(3, 8, 24).unbind(1)
    weights = [p for name, p in block.named_parameters()
               if p.requires_grad and "modulation" not in name and name != "table"]  # they give m
    results = []
    for fn in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        out = fn(leaf, h, tables[:6], tables[6:], text, None, row)
        loss = sum(o.square().sum() for o in out)
        results.append([*out, *torch.autograd.grad(loss, [leaf, *weights])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
