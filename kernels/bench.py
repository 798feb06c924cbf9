"""Times the kernels against what a user would write instead: python -m kernels.bench
[attention|adaln|patchify|rope|conv|linear|decode|optim]

One table a kernel, one line a shape and direction (forward; forward and backward, where there is
one): milliseconds, TFLOP/s or GB/s, percent of the device's own ceiling (a matrix product, or a
copy, measured in the same run), then the milliseconds of plain torch, of the same under
torch.compile and, for attention, of scaled_dot_product_attention, and how many times faster than
the best of them we are. Medians of runs that take turns, after a warm-up; inputs are normal random
numbers, bfloat16 on CUDA. linear's few rows, decode and optim run without gradients.

On a CPU the torch path is timed, in float32 at smaller shapes, attention against a loop over clips;
there is no compile column. A multiply-add is 2 flops, GB are 1e9 bytes; bytes counted are those
that must move (each input read, each output written once).
"""

import argparse
import statistics
import sys
import time
from collections import namedtuple
from functools import partial

import torch
import torch.nn.functional as F

import kernels
from kernels import adaln, attention, conv, decode, linear, optim, patchify, rope

# leaves: tensors that want gradients; ours and peers {name: fn}: called with them; work and
# work_both: bytes or flops of the forward and of both passes (None: not timed)
Case = namedtuple("Case", "label leaves ours peers work work_both unit", defaults=["GB/s"])


def attention_cases(shapes, make):
    for A, E, len_q, len_k in shapes:
        len_k = len_k or len_q
        cu_q, cu_k = (torch.tensor([0] + lengths, device=make.device).cumsum(0).int()
                      for lengths in (len_q, len_k))
        leaves = [make(sum(n), A, E) for n in (len_q, len_k, len_k)]
        peers = {"sdpa": lambda q, k, v, n=len_q, m=len_k: per_clip(
            q, k, v, n, m, F.scaled_dot_product_attention)}
        biggest = max(n * m for n, m in zip(len_q, len_k)) * A * len(set(len_q)) * 4
        if make.device == "cuda" and biggest < 2 ** 31:  # the scores of a clip in float32
            peers["eager"] = lambda q, k, v, n=len_q, m=len_k: per_clip(q, k, v, n, m, formula)
        flops = 4 * A * E * sum(n * m for n, m in zip(len_q, len_k))
        label = f"{A}x{E} {len(len_q)} clips {min(len_q)}-{max(len_q)} on {min(len_k)}-{max(len_k)}"
        ours = lambda q, k, v, a=cu_q, b=cu_k: attention.attention(q, k, v, a, b)
        yield Case(label, leaves, ours, peers, flops, 3.5 * flops, "TFLOP/s")
        if len_k is not len_q:
            bias = make(sum(len_k)).float()
            biased, plain = (lambda q, k, v, a=cu_q, b=cu_k, fn=fn, bias=bias: fn(
                q, k, v, a, b, bias=bias) for fn in (attention.attention, partial(
                    attention.reference, upcast=None)))
            yield Case(f"{label}, bias", leaves, biased, {"eager": plain}, flops, 3.5 * flops,
                       "TFLOP/s")


def formula(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v


def per_clip(q, k, v, len_q, len_k, fn):
    """One batched call where every clip has the same lengths, else a loop."""
    if len(set(len_q)) == len(set(len_k)) == 1:
        parts = [(x.unflatten(0, (len(len_q), -1)).transpose(1, 2) for x in (q, k, v))]
    else:
        parts = zip(*(x.transpose(0, 1)[None].split(n, 2)
                      for x, n in ((q, len_q), (k, len_k), (v, len_k))))
    return torch.cat([fn(*part).transpose(1, 2).flatten(0, 1) for part in parts])


def adaln_cases(shapes, make):
    for N, D, run, rms in shapes:
        rows = (torch.arange(N, device=make.device) // run).int()
        R = -(-N // run)
        x, y = make(N, D), make(N, D)
        gate, shift, scale = (make(R, D) for _ in range(3))
        unit = x.numel() * x.element_size()
        ours, plain = (lambda *leaves, rows=rows, rms=rms, fn=fn: fn(*leaves, rows, rms=rms)
                       for fn in (adaln.gate_residual_ln_modulate, plain_adaln))
        yield Case(f"gate+residual+{'RMS' if rms else 'LN'} {N}x{D}, runs of {run}",
                   [x, y, gate, shift, scale], ours, {"eager": plain}, 4 * unit, 10 * unit)


def plain_adaln(x, y, gate, shift, scale, rows, rms):
    r = x + gate[rows] * y
    normed = (F.rms_norm if rms else F.layer_norm)(r, r.shape[1:], eps=1e-6)
    return r, normed * (1 + scale[rows]) + shift[rows]


def rope_cases(shapes, make):
    for N, A, E, norm in shapes:
        pairs = torch.arange(E // 2, device=make.device)
        where = (make(N, 3).float(), 100.0 ** (-pairs / len(pairs)), (pairs % 3).int())
        widths = {"full": [A * E] * 2, "head": [E] * 2, None: []}[norm]
        leaves = [make(N, 3, A, E), *map(make, widths)]
        unit = 2 * N * A * E * leaves[0].element_size()
        ours, plain = (lambda qkv, *w, fn=fn, where=where: fn(qkv[:, 0], qkv[:, 1], *where, *w)
                       for fn in (rope.qk_norm_rope, partial(rope.reference, upcast=None)))
        yield Case(f"{f'{norm} norm + ' if norm else ''}rope {N}x{A}x{E}", leaves, ours,
                   {"eager": plain}, 2 * unit, (5 if norm else 4) * unit)


def patchify_cases(shapes, make):
    for clips, patch in shapes:
        latents = [make(*shape) for shape in clips]
        unit = sum(z.numel() for z in latents) * latents[0].element_size()
        ours = lambda *z, patch=patch: patchify.patchify(z, patch)
        plain = lambda *z, patch=patch: torch.cat([patchify._cut(x, patch) for x in z])
        yield Case(f"{len(clips)} latents, {unit / 1e6:.1f} MB, patch {patch}", latents, ours,
                   {"eager": plain}, 2 * unit, 4 * unit)


def conv_cases(shapes, make):
    for (B, C, T, H, W), D, kernel, is_later in shapes:
        leaves = [make(B, C, T, H, W), make(D, C, *kernel), make(D), make(C)]
        past = make(B, C, kernel[0] - 1, H, W) if is_later else None
        ours, plain = (lambda x, w, b, gamma, past=past, fn=fn: fn(x, w, b, past, gamma)[0]
                       for fn in (conv.causal_conv3d, conv.reference))
        flops = 2 * B * T * H * W * leaves[1].numel()
        yield Case(f"norm+SiLU+causal conv {B}x{C}x{T}x{H}x{W}{', later chunk' * is_later}", leaves,
                   ours, {"eager": plain}, flops, 3 * flops, "TFLOP/s")


def linear_cases(shapes, make):
    for N, K, M in shapes:
        leaves, flops = [make(N, K), make(M, K), make(M)], 2 * N * K * M
        size = sum(x.numel() for x in leaves) * leaves[0].element_size()
        work = (flops, 3 * flops, "TFLOP/s") if N > 32 else (size, None)     # few rows: bytes
        yield Case(f"linear {N}x{K}x{M}", leaves, linear.linear, {"eager": F.linear}, *work)


def decode_cases(shapes, make):
    for A, KV, E, lengths in shapes:
        B, S, cache = len(lengths), max(lengths) + 1, decode.Cache()
        leaves = [make(B, A, 1, E), make(B, KV, S, E), make(B, KV, S, E)]
        cache.lengths = lengths
        mask = cache.mask(1, 0, torch.device(make.device))
        keys = torch.arange(S, device=make.device)
        seen = keys <= torch.tensor(lengths, device=make.device)[:, None, None, None]
        ours = lambda *qkv, mask=mask: decode.attend(*qkv, mask)
        padded = lambda *qkv, seen=seen: F.scaled_dot_product_attention(*qkv, seen, enable_gqa=True)
        yield Case(f"a token of {B} texts of {min(lengths)}-{max(lengths)}, {A}/{KV}x{E}", leaves,
                   ours, {"eager": padded},
                   2 * sum(n + 1 for n in lengths) * KV * E * leaves[0].element_size(), None)


def optim_cases(shapes, make):
    for is_muon, each in shapes:
        params = torch.nn.ParameterList(make(*shape).float() for shape in each)
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer, states = optim.MuonAdamW(params, () if is_muon else ("",)), [{} for _ in each]
        work = (sum(5 * (4 * m * m * n + 2 * m**3) for m, n in map(sorted, each)) if is_muon
                else 7 * 4 * sum(p.numel() for p in params))

        def one_by_one(params=params, states=states, is_muon=is_muon):
            for p, state in zip(params, states):
                optim.reference(p, p.grad, state, 1e-3, 1, is_muon)
        yield Case(f"{'Muon' if is_muon else 'AdamW'}, {len(each)} tensors", [], optimizer.step,
                   {"one by one": one_by_one}, work, None, "TFLOP/s" if is_muon else "GB/s")


class Make:
    """Random tensors for one device."""

    def __init__(self, device):
        self.device, self.dtype = device, torch.bfloat16 if device == "cuda" else torch.float32

    def __call__(self, *shape):
        return torch.randn(shape, device=self.device).to(self.dtype)


def milliseconds(fns, device, seconds=0.5):
    """Median time of each function; they take turns, so that a slow minute is everyone's."""
    times = [[] for _ in fns]
    for fn in fns:
        fn(), fn()
    stop = time.perf_counter() + seconds * len(fns)
    while len(times[0]) < 5 or time.perf_counter() < stop:
        for fn, taken in zip(fns, times):
            if device == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                begin.record()
                fn()
                end.record()
                end.synchronize()
                taken.append(begin.elapsed_time(end))
            else:
                begin = time.perf_counter()
                fn()
                taken.append((time.perf_counter() - begin) * 1e3)
    return [statistics.median(taken) for taken in times]


def ceilings(make):
    """(flop/s of a big matrix product, bytes/s of a big copy) of this device, now."""
    n, size = (8192, 2 ** 28) if make.device == "cuda" else (1024, 2 ** 24)
    a, b, source = make(n, n), make(n, n), make(size)
    target = torch.empty_like(source)
    product, copy = milliseconds([lambda: a @ b, lambda: target.copy_(source)], make.device)
    return 2 * n ** 3 / product * 1e3, 2 * size * source.element_size() / copy * 1e3


def both_passes(fn, leaves):
    """A closure that runs fn and its backward with fixed gradients."""
    with torch.no_grad():
        out = fn(*leaves)
    seeds = [torch.randn_like(o) for o in (out if isinstance(out, (tuple, list)) else [out])]
    return lambda: torch.autograd.grad(fn(*leaves), leaves, seeds)


def bench(name, cases, make, ceilings):
    print("\n{}: {} ({})".format(name, *kernels.backend(make.device)))
    for case in cases:
        peers, times = dict(case.peers), {}
        plain = peers.get("eager", peers.get("sdpa"))
        if make.device == "cuda" and plain:
            peers["compile"] = torch.compile(plain)
        leaves = [x.requires_grad_() for x in case.leaves]
        with torch.no_grad():
            fns = [lambda fn=fn: fn(*leaves) for fn in (case.ours, *peers.values())]
            times["fwd", case.work] = milliseconds(fns, make.device)
        if case.work_both:
            times["f+b", case.work_both] = milliseconds(
                [both_passes(fn, leaves) for fn in (case.ours, *peers.values())], make.device)
        for (what, work), (ours, *others) in times.items():
            rate, ceiling = work / ours * 1e3, ceilings[case.unit]
            rest = "  ".join(f"{peer} {ms:.3f}" for peer, ms in zip(peers, others))
            size = 1e12 if case.unit == "TFLOP/s" else 1e9
            print(f"{case.label:48} {what} {ours:9.3f} ms {rate / size:8.2f} {case.unit:7} "
                  f"{rate / ceiling:6.1%}   {rest}   x{min(others) / ours:.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(prog="python -m kernels.bench",
                                     description=__doc__.splitlines()[0])
    parser.add_argument("kernel", nargs="*",
                        help="attention, adaln, patchify, rope, conv, linear, decode, optim; "
                             "default: all")
    names = parser.parse_args().kernel
    known = {"attention": (attention_cases, attention), "adaln": (adaln_cases, adaln),
             "patchify": (patchify_cases, patchify), "rope": (rope_cases, rope),
             "conv": (conv_cases, conv), "linear": (linear_cases, linear),
             "decode": (decode_cases, decode), "optim": (optim_cases, optim)}
    for name in names:
        if name not in known:
            print(f"bench: no kernel {name!r}; there are {', '.join(known)}", file=sys.stderr)
            sys.exit(2)
    make = Make("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    flops, bytes_s = ceilings(make)
    what = torch.cuda.get_device_name() if make.device == "cuda" else (
        f"CPU, {torch.get_num_threads()} threads: the torch paths at small shapes, not Triton's")
    print(f"{what}\ntorch {torch.__version__}, {make.dtype}; ceilings: matrix product "
          f"{flops / 1e12:.3g} TFLOP/s, copy {bytes_s / 1e9:.4g} GB/s")
    for name in names or known:
        cases, module = known[name]
        shapes = module.SHAPES if make.device == "cuda" else module.CPU_SHAPES
        bench(name, cases(shapes, make), make, {"TFLOP/s": flops, "GB/s": bytes_s})


if __name__ == "__main__":
    main()
