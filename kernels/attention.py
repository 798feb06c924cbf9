"""Attention over packed clips: each clip's queries see that clip's keys, nothing else.

For a clip with queries Q [L, E], keys K and values V [S, E], per head:

    S = scale Q K^T + bias      lse = log sum exp S (per row)      P = exp(S - lse)      O = P V
    dV = P^T dO          dP = dO V^T      delta = rowsum(dO * O)      dS = P * (dP - delta)
    dQ = scale dS K      dK = scale dS^T Q

Layout: q [N, A, E], k and v [M, A, E] (N, M packed rows, A heads, E head dim); the last stride is
1, and where E is a multiple of 8 so are the others (else they are copied): views of a packed
[N, 3, A, E] projection are read in place. cu_q, cu_k int32 [B+1]: clip b holds rows cu[b] to
cu[b+1]. Rows from cu_q[-1] on (the padding at a row's end) get zeros out, zero gradients and
an lse of -inf; so do the queries of a clip without keys. What other clips hold, NaN included,
reaches no result. bias float32 [M] is a number a key, for all queries and heads, -inf where nobody
sees that key; it gets no gradient, and none flows through lse.

Limits: E <= 256; float32, bfloat16 and float16 (float64 on the torch path). float32 products are
exact to float32, not TF32, and slow on a GPU.

Triton: one program takes a tile of queries of one clip and head over the clip's keys, with the
softmax kept online. Backward recomputes P from lse in two kernels, one over tiles of queries for dQ
and one over tiles of keys for dK and dV: 7 matrix products where a fused one with atomics has 5,
but every sum has a fixed order. The tiles come from a table made on the device; grids and buffers
are sized by N, M and B alone, so the host never waits. Saved for backward: q, k, v, o, and lse
float32 [A, N].

Measured on an H100, torch 2.11, triton 3.6, bfloat16, 16 heads, TFLOP/s forward / backward (4 and
10 N^2 E a head and clip), beside scaled_dot_product_attention with cuDNN and flash attention 2:

    clips x tokens, E     ours        cuDNN       flash 2
     4 x 4096,  64      403 / 334   479 / 445   305 / 278
     4 x 4096,  72      355 / 274   381 / 317   231 / 188
     4 x 4096, 128      459 / 377   676 / 555   355 / 301
    64 x  256,  64      234 / 185   301 / 156   195 / 134
    64 x  256,  72      174 / 139   217 / 138   147 /  96
    64 x  256, 128      220 / 169   355 / 178   231 / 149

Torch path: clips of equal query length form one batched call; where their key lengths differ, keys
are padded to the longest with a mask. Large clips on a CPU go one by one, through oneDNN. Indices
are built once per pair of cu and kept, since every layer of a step asks for the same ones.
"""

import functools
from typing import Optional

import numpy as np
import torch
import torch.nn.functional as F

from kernels import (FLOATS, IS_WIDE, check, check_numbers, indices, kept, launch, power_of_2,
                     tile_table, tl, triton, use_triton)

LOG2_E = 1.4426950408889634

# (A, E, query lengths, key lengths or None for self-attention, and once more with a bias): bench
SHAPES = [
    (16, 72, [256] * 32, None),
    (16, 72, [4096] * 4, None),
    (16, 72, [16384] * 2, None),
    (12, 128, [4096] * 4, None),
    (16, 72, [256, 1024, 97, 4096, 217, 1023, 1, 2048] * 2, None),
    (16, 72, [1024] * 16, [30, 77, 120, 1] * 4),
]
CPU_SHAPES = [
    (4, 32, [16, 24, 32, 40, 48, 64, 80, 96, 20, 56] * 4, None),
    (8, 32, [16, 24, 32, 40, 48, 64, 80, 96, 20, 56] * 8, None),
    (8, 32, [1024, 512, 256, 64], None),
    (8, 32, [16, 24, 32, 40, 48, 64, 80, 96, 20, 56] * 8, [3, 9, 14, 30, 1, 22, 17, 8] * 10),
]


def reference(q, k, v, cu_q, cu_k, scale=None, bias=None, with_lse=False, upcast=torch.float32):
    """The definition of right: one clip at a time, by the formula."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = [x if upcast is None else x.to(upcast) for x in (q, k, v)]
    out = [wide[0].new_zeros(len(q) - int(cu_q[-1]), *q.shape[1:])]
    lse = [wide[0].new_full((q.shape[1], len(out[0])), float("-inf"))]
    for b in reversed(range(len(cu_q) - 1)):
        qc, keys = wide[0][int(cu_q[b]):int(cu_q[b + 1])], slice(int(cu_k[b]), int(cu_k[b + 1]))
        s = torch.einsum("nae,mae->anm", qc, wide[1][keys]) * scale
        s = s if bias is None else s + bias[keys].to(s.dtype)
        lse.insert(0, s.logsumexp(-1))
        unseen = lse[0][..., None] == float("-inf")  # no key: zeros, in the place of softmax's NaN
        p = torch.softmax(s.masked_fill(unseen, 0), -1).masked_fill(unseen, 0)
        out.insert(0, torch.einsum("anm,mae->nae", p, wide[2][keys]))
    o = torch.cat(out).to(q.dtype)
    return (o, torch.cat(lse, 1)) if with_lse else o


# ---- the torch path

def _rows(indices):
    """Row numbers: a slice where they follow one another (read in place), else an index tensor."""
    first, count = int(indices[0]), len(indices)
    if np.array_equal(indices, np.arange(first, first + count)):
        return slice(first, first + count)
    return torch.from_numpy(indices)


@functools.lru_cache(maxsize=32)
def _plan(cu_q, cu_k, n_q, n_k, device):
    """Groups of clips with equal query length, each a tuple

    (clips, q rows, k rows to read, bias or None, written, k rows to write).

    bias float32 [clips, 1, 1, S] is -inf on padding. Padding reads its own clip's last key, never a
    neighbour's: 0 * NaN is NaN. `written` picks the keys that are no padding out of [clips * S];
    each is some clip's own, so dK needs no sum.
    """
    check_numbers("cu_q", cu_q, n_q, ascend=True)
    check_numbers("cu_k", cu_k, n_k, ascend=True)
    cu_q, cu_k = np.array(cu_q), np.array(cu_k)
    len_q, len_k = np.diff(cu_q), np.diff(cu_k)
    move = lambda x: x.to(device) if isinstance(x, torch.Tensor) else x
    groups = []
    for length in sorted(set(len_q[(len_q > 0) & (len_k > 0)].tolist())):
        clips = np.flatnonzero((len_q == length) & (len_k > 0))
        q_rows = _rows((cu_q[clips, None] + np.arange(length)).ravel())
        key = np.arange(len_k[clips].max())
        kept = key < len_k[clips, None]
        k_read = (cu_k[clips, None] + np.minimum(key, len_k[clips, None] - 1)).ravel()
        written, bias = None, None
        if not kept.all():
            written = move(torch.from_numpy(np.flatnonzero(kept)))
            bias = torch.zeros(kept.shape).masked_fill_(~torch.from_numpy(kept), float("-inf"))
            bias = bias[:, None, None].to(device)
        k_write = _rows(k_read[kept.ravel()])
        groups.append((len(clips), move(q_rows), move(_rows(k_read)), bias, written, move(k_write)))
    return groups


def _take(x, rows, clips):
    """Rows of x [N, A, ...] as [clips, A, L, ...]."""
    x = x[rows] if isinstance(rows, slice) else x.index_select(0, rows)
    return x.unflatten(0, (clips, -1)).transpose(1, 2)


def _put(out, rows, x):
    """The inverse of _take: writes x [clips, A, L, ...] to rows of out [N, A, ...]."""
    x = x.transpose(1, 2).flatten(0, 1)
    if isinstance(rows, slice):
        out[rows] = x
    else:
        out.index_copy_(0, rows, x)


def _key_bias(padding, bias, rows, clips):
    """What is added to a group's scores, [clips, 1, 1, S] or None: -inf on padding, the bias."""
    if bias is None:
        return padding
    bias = _take(bias[:, None], rows, clips)[:, :, None]
    return bias if padding is None else bias + padding


def _batch_forward(q, k, v, bias, scale):
    """One group, all [clips, A, L, E]: o and lse [clips, A, L]."""
    if q.device.type == "cpu":
        bias = bias.to(q.dtype) if bias is not None and q.dtype == torch.float64 else bias
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=bias, scale=scale)
        if k.shape[2] < 16:  # with fewer keys than its vectors are wide it loses a query's NaN
            nan = q.amax(-1) * 0
            o, lse = o + nan[..., None], lse + nan
        if bias is not None:  # where no key is seen its lse is 0
            lse = lse.masked_fill((bias == float("-inf")).all(-1), float("-inf"))
        return o, lse
    s = (q @ k.transpose(2, 3)).float() * scale
    s = s if bias is None else s + bias
    lse = torch.logsumexp(s, -1)
    return (s - _finite(lse)[..., None]).exp().to(v.dtype) @ v, lse


def _finite(lse):
    """lse, but 0 where no key is seen: there exp(S - lse), S being -inf, must be 0."""
    return lse.masked_fill(lse == float("-inf"), 0.0)


def _batch_backward(do, q, k, v, o, lse, bias, scale):
    lse = lse if bias is None else _finite(lse)
    if q.device.type == "cpu":
        bias = bias.to(q.dtype) if bias is not None and q.dtype == torch.float64 else bias
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, o, lse, 0.0, False, attn_mask=bias, scale=scale)
    s = (q @ k.transpose(2, 3)).float() * scale
    p = ((s if bias is None else s + bias) - lse[..., None]).exp()
    delta = (do.float() * o.float()).sum(-1, keepdim=True)
    ds = (p * ((do @ v.transpose(2, 3)).float() - delta) * scale).to(q.dtype)
    return ds @ k, ds.transpose(2, 3) @ q, p.to(do.dtype).transpose(2, 3) @ do


def _heads(x, filters, n_heads):
    """Each head's x [L, K] times its filters [M, K] transposed: x [L, A, K], filters [A, M, K] ->
    [L, A, M]. A convolution of one pixel with a group a head: torch gives that to oneDNN, whose
    matrix products are twice as fast as MKL's on AMD's CPUs."""
    image = x.reshape(1, len(x), 1, -1).permute(0, 3, 1, 2)
    y = F.conv2d(image, filters.reshape(-1, filters.shape[2], 1, 1), groups=n_heads)
    return y.permute(0, 2, 3, 1).view(len(x), n_heads, -1)


def _part(q, k):
    """Queries at a time: their scores stay in a cache."""
    return max(128, 2**22 // (q.shape[1] * len(k)) // 64 * 64)


def _clip_forward(q, k, v, scale):
    """One large clip: o [L, A, E] and lse [L, A]."""
    A, o, lse = q.shape[1], torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    keys = (k.float() * scale).transpose(0, 1).contiguous()      # [A, S, E]
    values = v.permute(1, 2, 0).contiguous()                     # [A, E, S]
    for at in range(0, len(q), part := _part(q, k)):
        rows = slice(at, at + part)
        s = _heads(q[rows].float(), keys, A)
        p = s.softmax(-1)
        lse[rows] = s.amax(-1) - p.amax(-1).log()
        o[rows] = _heads(p.to(v.dtype), values, A)
    return o, lse


def _clip_backward(do, q, k, v, o, lse, scale):
    """Scores are kept transposed, [S, A, L]: then dK and dV, sums over queries, come fast. exp2 in
    the place of exp, which torch hands to MKL too."""
    A, dq, dk, dv = q.shape[1], torch.empty_like(q), *(torch.zeros_like(k.float()) for _ in "kv")
    delta = (do.float() * o.float()).sum(-1).T.contiguous()      # [A, L]
    wide_k, keys = k.float() * (scale * LOG2_E), k.permute(1, 2, 0).contiguous()
    lse2 = (lse * LOG2_E).T.contiguous()
    for at in range(0, len(q), part := _part(q, k)):
        rows = slice(at, at + part)
        p = _heads(wide_k, q[rows].float().transpose(0, 1), A)
        p.sub_(lse2[:, rows].contiguous()).exp2_()
        dp = _heads(v, do[rows].transpose(0, 1), A)
        ds = dp.float().sub_(delta[:, rows].contiguous()).mul_(p).to(q.dtype)
        dv += _heads(p.to(v.dtype), do[rows].permute(1, 2, 0), A)
        dk += _heads(ds, q[rows].permute(1, 2, 0), A)
        dq[rows] = torch.bmm(keys, ds.transpose(0, 1)).permute(2, 0, 1) * scale
    return dq, (dk * scale).to(k.dtype), dv.to(v.dtype)


def _is_large(q, k, bias):
    """Whether a group's clips [clips, A, L, E] go one by one: of small ones the calls cost more."""
    return (IS_WIDE and q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16)
            and bias is None and q.shape[1] * q.shape[2] * k.shape[2] >= 2**18)


def _clip_by_clip(fn, groups, scale):
    """fn of each clip [L, A, ...] of groups [clips, A, L, ...], stacked again."""
    results = [fn(*(x.transpose(0, 1) for x in clip), scale) for clip in zip(*groups)]
    return [torch.stack(each).transpose(1, 2) for each in zip(*results)]


def _torch_forward(q, k, v, cu_q, cu_k, scale, bias=None):
    o = q.new_zeros(q.shape)
    lse = q.new_full(q.shape[1::-1], float("-inf"),
                     dtype=torch.promote_types(q.dtype, torch.float32))
    for clips, q_rows, k_read, padding, _, _ in _plan(
            tuple(cu_q.tolist()), tuple(cu_k.tolist()), len(q), len(k), q.device):
        qg, kg, vg = _take(q, q_rows, clips), _take(k, k_read, clips), _take(v, k_read, clips)
        added = _key_bias(padding, bias, k_read, clips)
        if _is_large(qg, kg, added):
            og, lg = _clip_by_clip(_clip_forward, (qg, kg, vg), scale)
        else:
            og, lg = _batch_forward(qg, kg, vg, added, scale)
        _put(o, q_rows, og)
        _put(lse.T, q_rows, lg)
    return o, lse


def _torch_backward(do, q, k, v, o, lse, cu_q, cu_k, scale, bias=None):
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    for clips, q_rows, k_read, padding, written, k_write in _plan(
            tuple(cu_q.tolist()), tuple(cu_k.tolist()), len(q), len(k), q.device):
        dog, qg, og, lg = (_take(x, q_rows, clips) for x in (do, q, o, lse.T))
        kg, vg = (_take(x, k_read, clips) for x in (k, v))
        added = _key_bias(padding, bias, k_read, clips)
        if _is_large(qg, kg, added):
            dqg, dkg, dvg = _clip_by_clip(_clip_backward, (dog, qg, kg, vg, og, lg), scale)
        else:
            dqg, dkg, dvg = _batch_backward(dog, qg, kg, vg, og, lg, added, scale)
        _put(dq, q_rows, dqg)
        for out, grad in ((dk, dkg), (dv, dvg)):
            if written is not None:
                grad = grad.transpose(1, 2).flatten(0, 1).index_select(0, written)
                grad = grad[None].transpose(1, 2)
            _put(out, k_write, grad)
    return dq, dk, dv


# ---- the Triton kernels

COUNTS = ["n_clips", "N"]  # whether 1 or a multiple of 16: no reason to compile a kernel anew


@triton.jit
def _times(n, stride, E: tl.constexpr):
    """n * stride, where all strides are multiples of 8 if E is: loads of 16 bytes, and early ones,
    hang on the compiler's knowing it."""
    if E % 8 == 0:
        return tl.multiple_of(n * stride, 8)
    return n * stride


@triton.jit
def _load_part(x, row, stride, end, d, E: tl.constexpr, TO: tl.constexpr, MASKED: tl.constexpr):
    """Columns d (below TO) of rows of x: zeros from row `end` on (if MASKED) and beyond E."""
    at = x + _times(row.to(tl.int64), stride, E)[:, None] + d[None, :]
    if MASKED:
        return tl.load(at, mask=(row < end)[:, None] & (d < E)[None, :], other=0.0)
    if TO > E:
        return tl.load(at, mask=(d < E)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def _load(x, row, stride, end, E: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
          MASKED: tl.constexpr = True):
    """Rows of x [.., E] as two tiles, HEAD columns and TAIL more.

    Tiles are powers of two wide, and 72 = 64 + 16 wastes less than 128."""
    head = _load_part(x, row, stride, end, tl.arange(0, HEAD), E, HEAD, MASKED)
    tail = head  # never used if TAIL is 0
    if TAIL > 0:
        tail = _load_part(x, row, stride, end, HEAD + tl.arange(0, TAIL), E, HEAD + TAIL, MASKED)
    return head, tail


@triton.jit
def _store(x, row, stride, end, head, tail, E: tl.constexpr, HEAD: tl.constexpr,
           TAIL: tl.constexpr):
    start = x + row.to(tl.int64)[:, None] * stride
    ok = row < end
    d = tl.arange(0, HEAD)
    tl.store(start + d[None, :], head.to(x.dtype.element_ty), mask=ok[:, None] & (d < E)[None, :])
    if TAIL > 0:
        e = HEAD + tl.arange(0, TAIL)
        ok_tail = ok[:, None] & (e < E)[None, :]
        tl.store(start + e[None, :], tail.to(x.dtype.element_ty), mask=ok_tail)


@triton.jit
def _dot_t(a, a_tail, b, b_tail, TAIL: tl.constexpr):
    """a b^T over both tiles. ieee: float32 operands are not cut to TF32; bfloat16 does not care."""
    s = tl.dot(a, tl.trans(b), input_precision="ieee")
    if TAIL > 0:
        s = tl.dot(a_tail, tl.trans(b_tail), s, input_precision="ieee")
    return s


@triton.jit
def _dot_add(p, x, x_tail, acc, acc_tail, TAIL: tl.constexpr):
    """acc + p x, tile by tile."""
    acc = tl.dot(p, x, acc, input_precision="ieee")
    if TAIL > 0:
        acc_tail = tl.dot(p, x_tail, acc_tail, input_precision="ieee")
    return acc, acc_tail


@triton.jit
def _tile(tiles, cu, n_clips):
    """Tile program_id(0): its rows first..last, and the rows of the other side that its clip sees.

    The runs before the first and behind the last clip see nothing."""
    entry = tiles + tl.program_id(0) * 3
    clip = tl.load(entry) - 1
    is_clip = (clip >= 0) & (clip < n_clips)
    lo = tl.load(cu + clip, mask=is_clip, other=0)
    hi = tl.load(cu + clip + 1, mask=is_clip, other=0)
    return tl.load(entry + 1), tl.load(entry + 2), lo, hi


@triton.jit
def _load_bias(bias, col, hi, per_scale):
    """The keys' bias, divided by what the scores will be multiplied by."""
    return tl.load(bias + col, mask=col < hi, other=0.0) * per_scale


@triton.jit
def _load_lse(lse, row, end, BIASED: tl.constexpr, MASKED: tl.constexpr):
    """lse in powers of two. Where no key is seen it is -inf, as the scores are, and then P must be
    0, not NaN; without a bias nobody asks for such rows."""
    if MASKED:
        row_lse = tl.load(lse + row, mask=row < end, other=0.0)
    else:
        row_lse = tl.load(lse + row)
    if BIASED:
        row_lse = tl.where(row_lse == float("-inf"), 0.0, row_lse)
    return row_lse * 1.4426950408889634


@triton.jit
def _forward_step(q0, q1, k, v, bias, o0, o1, top, total, start, hi, scale, per_scale, k_row, v_row,
                  E: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_N: tl.constexpr,
                  BIASED: tl.constexpr, MASKED: tl.constexpr):
    """BLOCK_N keys more: the new sums, and the new maximum of the scores in powers of two."""
    col = start + tl.arange(0, BLOCK_N)
    # keys and values past the clip's end are read as zeros: 0 * NaN of a neighbour is NaN
    k0, k1 = _load(k, col, k_row, hi, E, HEAD, TAIL, MASKED)
    s = _dot_t(q0, q1, k0, k1, TAIL)
    if BIASED:
        s += _load_bias(bias, col, hi, per_scale)[None, :]
    if MASKED:
        s = tl.where((col < hi)[None, :], s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1) * scale)
    base = new_top
    if BIASED:  # no key seen yet: -inf - -inf would be NaN
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(s * scale - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(p, 1)
    v0, v1 = _load(v, col, v_row, hi, E, HEAD, TAIL, MASKED)
    o0, o1 = _dot_add(p.to(v0.dtype), v0, v1, o0 * shrink[:, None], o1 * shrink[:, None], TAIL)
    return o0, o1, new_top, total


@triton.jit(do_not_specialize=COUNTS)
def _forward_kernel(q, k, v, bias, o, lse, tiles, cu_k, n_clips, scale, q_row, q_head, k_row,
                    k_head, v_row, v_head, N, A, E: tl.constexpr, HEAD: tl.constexpr,
                    TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                    BIASED: tl.constexpr, MASKED: tl.constexpr):
    head = tl.program_id(1).to(tl.int64)
    first, last, lo, hi = _tile(tiles, cu_k, n_clips)
    row = first + tl.arange(0, BLOCK_M)
    q0, q1 = _load(q + _times(head, q_head, E), row, q_row, last, E, HEAD, TAIL)
    k += _times(head, k_head, E)
    v += _times(head, v_head, E)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    o0 = tl.zeros([BLOCK_M, HEAD], tl.float32)
    o1 = tl.zeros([BLOCK_M, TAIL if TAIL > 0 else 1], tl.float32)
    whole = hi if MASKED else lo + (hi - lo) // BLOCK_N * BLOCK_N
    in_twos = scale * 1.4426950408889634
    for start in range(lo, whole, BLOCK_N):
        o0, o1, top, total = _forward_step(q0, q1, k, v, bias, o0, o1, top, total, start, hi,
                                           in_twos, 1 / scale, k_row, v_row, E, HEAD, TAIL, BLOCK_N,
                                           BIASED, MASKED)
    if whole < hi:
        o0, o1, top, total = _forward_step(q0, q1, k, v, bias, o0, o1, top, total, whole, hi,
                                           in_twos, 1 / scale, k_row, v_row, E, HEAD, TAIL, BLOCK_N,
                                           BIASED, True)
    # where no key was seen nothing was summed: zeros, and the maximum, -inf, is the lse
    total = tl.where(total == 0.0, 1.0, total)
    o0 = o0 / total[:, None]
    o1 = o1 / total[:, None]
    _store(o + head * E, row, A * E, last, o0, o1, E, HEAD, TAIL)
    row_lse = (top + tl.log2(total)) * 0.6931471805599453
    tl.store(lse + head * N + row, row_lse, mask=row < last)


@triton.jit
def _dq_step(q0, q1, do0, do1, k, v, bias, dq0, dq1, row_lse, d, start, hi, scale, per_scale, k_row,
             v_row, E: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_N: tl.constexpr,
             BIASED: tl.constexpr, MASKED: tl.constexpr):
    """dQ with what BLOCK_N keys more add to it."""
    col = start + tl.arange(0, BLOCK_N)
    k0, k1 = _load(k, col, k_row, hi, E, HEAD, TAIL, MASKED)
    v0, v1 = _load(v, col, v_row, hi, E, HEAD, TAIL, MASKED)
    s = _dot_t(q0, q1, k0, k1, TAIL)
    if BIASED:
        s += _load_bias(bias, col, hi, per_scale)[None, :]
    p = tl.exp2(s * scale - row_lse[:, None])
    if MASKED:
        p = tl.where((col < hi)[None, :], p, 0.0)
    ds = p * (_dot_t(do0, do1, v0, v1, TAIL) - d[:, None])
    return _dot_add(ds.to(k0.dtype), k0, k1, dq0, dq1, TAIL)


@triton.jit(do_not_specialize=COUNTS)
def _dq_kernel(do, q, k, v, bias, o, lse, delta, dq, tiles, cu_k, n_clips, scale, q_row, q_head,
               k_row, k_head, v_row, v_head, do_row, do_head, N, A, E: tl.constexpr,
               HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
               BIASED: tl.constexpr, MASKED: tl.constexpr):
    """dQ of one tile of queries; leaves delta = rowsum(dO * O) for _dkv_kernel, which runs next."""
    head = tl.program_id(1).to(tl.int64)
    first, last, lo, hi = _tile(tiles, cu_k, n_clips)
    row = first + tl.arange(0, BLOCK_M)
    q0, q1 = _load(q + _times(head, q_head, E), row, q_row, last, E, HEAD, TAIL)
    do0, do1 = _load(do + _times(head, do_head, E), row, do_row, last, E, HEAD, TAIL)
    o0, o1 = _load(o + head * E, row, A * E, last, E, HEAD, TAIL)
    d = tl.sum(do0.to(tl.float32) * o0.to(tl.float32), 1)
    if TAIL > 0:
        d += tl.sum(do1.to(tl.float32) * o1.to(tl.float32), 1)
    at = head * N + row
    tl.store(delta + at, d, mask=row < last)
    row_lse = _load_lse(lse + head * N, row, last, BIASED, True)
    k += _times(head, k_head, E)
    v += _times(head, v_head, E)
    dq0 = tl.zeros([BLOCK_M, HEAD], tl.float32)
    dq1 = tl.zeros([BLOCK_M, TAIL if TAIL > 0 else 1], tl.float32)
    whole = hi if MASKED else lo + (hi - lo) // BLOCK_N * BLOCK_N
    in_twos = scale * 1.4426950408889634
    for start in range(lo, whole, BLOCK_N):
        dq0, dq1 = _dq_step(q0, q1, do0, do1, k, v, bias, dq0, dq1, row_lse, d, start, hi, in_twos,
                            1 / scale, k_row, v_row, E, HEAD, TAIL, BLOCK_N, BIASED, MASKED)
    if whole < hi:
        dq0, dq1 = _dq_step(q0, q1, do0, do1, k, v, bias, dq0, dq1, row_lse, d, whole, hi, in_twos,
                            1 / scale, k_row, v_row, E, HEAD, TAIL, BLOCK_N, BIASED, True)
    _store(dq + head * E, row, A * E, last, dq0 * scale, dq1 * scale, E, HEAD, TAIL)


@triton.jit
def _dkv_step(k0, k1, v0, v1, b, q, do, lse, delta, dk0, dk1, dv0, dv1, start, hi, scale, q_row,
              do_row, E: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
              BLOCK_M: tl.constexpr, BIASED: tl.constexpr, MASKED: tl.constexpr):
    """dK and dV with what BLOCK_M queries more add to them; S and dP are transposed."""
    row = start + tl.arange(0, BLOCK_M)
    q0, q1 = _load(q, row, q_row, hi, E, HEAD, TAIL, MASKED)
    do0, do1 = _load(do, row, do_row, hi, E, HEAD, TAIL, MASKED)
    row_lse = _load_lse(lse, row, hi, BIASED, MASKED)
    if MASKED:
        d = tl.load(delta + row, mask=row < hi, other=0.0)
    else:
        d = tl.load(delta + row)
    s = _dot_t(k0, k1, q0, q1, TAIL)
    if BIASED:
        s += b[:, None]
    p = tl.exp2(s * scale - row_lse[None, :])
    if MASKED:
        p = tl.where((row < hi)[None, :], p, 0.0)
    dv0, dv1 = _dot_add(p.to(do0.dtype), do0, do1, dv0, dv1, TAIL)
    ds = p * (_dot_t(v0, v1, do0, do1, TAIL) - d[None, :])
    dk0, dk1 = _dot_add(ds.to(q0.dtype), q0, q1, dk0, dk1, TAIL)
    return dk0, dk1, dv0, dv1


@triton.jit(do_not_specialize=COUNTS)
def _dkv_kernel(do, q, k, v, bias, lse, delta, dk, dv, tiles, cu_q, n_clips, scale, q_row, q_head,
                k_row, k_head, v_row, v_head, do_row, do_head, N, A, E: tl.constexpr,
                HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr,
                BLOCK_N: tl.constexpr, BIASED: tl.constexpr, MASKED: tl.constexpr):
    """dK and dV of one tile of keys, over the clip's queries in order."""
    head = tl.program_id(1).to(tl.int64)
    first, last, lo, hi = _tile(tiles, cu_q, n_clips)
    col = first + tl.arange(0, BLOCK_N)
    k0, k1 = _load(k + _times(head, k_head, E), col, k_row, last, E, HEAD, TAIL)
    v0, v1 = _load(v + _times(head, v_head, E), col, v_row, last, E, HEAD, TAIL)
    b = col  # never used without a bias
    if BIASED:
        b = _load_bias(bias, col, last, 1 / scale)
    q += _times(head, q_head, E)
    do += _times(head, do_head, E)
    lse += head * N
    delta += head * N
    dk0 = tl.zeros([BLOCK_N, HEAD], tl.float32)
    dk1 = tl.zeros([BLOCK_N, TAIL if TAIL > 0 else 1], tl.float32)
    dv0 = tl.zeros([BLOCK_N, HEAD], tl.float32)
    dv1 = tl.zeros([BLOCK_N, TAIL if TAIL > 0 else 1], tl.float32)
    whole = hi if MASKED else lo + (hi - lo) // BLOCK_M * BLOCK_M
    in_twos = scale * 1.4426950408889634
    for start in range(lo, whole, BLOCK_M):
        dk0, dk1, dv0, dv1 = _dkv_step(k0, k1, v0, v1, b, q, do, lse, delta, dk0, dk1, dv0, dv1,
                                       start, hi, in_twos, q_row, do_row, E, HEAD, TAIL, BLOCK_M,
                                       BIASED, MASKED)
    if whole < hi:
        dk0, dk1, dv0, dv1 = _dkv_step(k0, k1, v0, v1, b, q, do, lse, delta, dk0, dk1, dv0, dv1,
                                       whole, hi, in_twos, q_row, do_row, E, HEAD, TAIL, BLOCK_M,
                                       BIASED, True)
    _store(dk + head * E, col, A * E, last, dk0 * scale, dk1 * scale, E, HEAD, TAIL)
    _store(dv + head * E, col, A * E, last, dv0, dv1, E, HEAD, TAIL)


# (BLOCK_M, BLOCK_N, warps, stages) of each kernel in 16-bit dtypes by head dim (others take the
# next larger one's): on an H100 the fastest of the 3 to 15 measured at clips of 256 and 4096 tokens
HOPPER = {
    64: dict(forward=(64, 64, 4, 3), dq=(128, 64, 8, 3), dkv=(32, 64, 4, 3)),
    72: dict(forward=(128, 64, 4, 3), dq=(128, 32, 4, 3), dkv=(32, 64, 4, 3)),
    128: dict(forward=(64, 64, 4, 3), dq=(128, 64, 8, 3), dkv=(64, 128, 8, 3)),
}


def _is_hopper(device):
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


@functools.lru_cache(maxsize=64)
def _config(kernel, E, dtype, device):
    """Tile sizes and launch options; where nothing was measured, what compiles without spills: that
    has masks in every tile, which keep the compiler from loading too much ahead."""
    head = max(power_of_2(E + 1) // 2, 16)
    tail = max(power_of_2(E - head), 16) if E > head else 0
    is_tuned = dtype != torch.float32 and E <= 128 and _is_hopper(device)
    if is_tuned:
        chosen = HOPPER[next(width for width in HOPPER if width >= E)][kernel]
    elif dtype == torch.float32:
        chosen = (32, 32, 4, 2) if E <= 64 else (32, 32, 8, 2) if E <= 128 else (16, 16, 8, 2)
    else:
        chosen = (64, 64, 4, 2) if E <= 64 else (64, 64, 8, 2) if E <= 128 else (32, 32, 8, 2)
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), chosen), E=E, HEAD=head,
                TAIL=tail, MASKED=not is_tuned)


def _tiles(cu, n_rows, block):
    """The tile table of a packed row; what lies before the first clip (nothing, if cu[0] is 0) is a
    run of its own, and so is the padding behind the last."""
    def make():
        return tile_table(F.pad(F.pad(cu, (0, 1), value=n_rows), (1, 0)), block, n_rows)

    return kept(cu, make, n_rows, block)


def _triton_forward(q, k, v, cu_q, cu_k, scale, bias=None):
    N, A, E = q.shape
    cu_q, cu_k = indices("cu_q", cu_q, N, ascend=True), indices("cu_k", cu_k, len(k), ascend=True)
    config = _config("forward", E, q.dtype, q.device)
    o = q.new_empty(q.shape)
    lse = q.new_empty((A, N), dtype=torch.float32)
    tiles = _tiles(cu_q, N, config["BLOCK_M"])
    launch(_forward_kernel, (len(tiles), A), q, k, v, lse if bias is None else bias, o, lse, tiles,
           cu_k, len(cu_k) - 1, scale, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], N, A,
           BIASED=bias is not None, **config)
    return o, lse


def _triton_backward(do, q, k, v, o, lse, cu_q, cu_k, scale, bias=None):
    N, A, E = q.shape
    cu_q, cu_k = indices("cu_q", cu_q, N, ascend=True), indices("cu_k", cu_k, len(k), ascend=True)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(lse)
    strides = [s for x in (q, k, v, do) for s in x.stride()[:2]]
    read = do, q, k, v, lse if bias is None else bias
    config = dict(_config("dq", E, q.dtype, q.device), BIASED=bias is not None)
    tiles = _tiles(cu_q, N, config["BLOCK_M"])
    launch(_dq_kernel, (len(tiles), A), *read, o, lse, delta, dq, tiles, cu_k, len(cu_k) - 1, scale,
           *strides, N, A, **config)
    config = dict(_config("dkv", E, q.dtype, q.device), BIASED=bias is not None)
    tiles = _tiles(cu_k, len(k), config["BLOCK_N"])
    launch(_dkv_kernel, (len(tiles), A), *read, lse, delta, dk, dv, tiles, cu_q, len(cu_q) - 1,
           scale, *strides, N, A, **config)
    return dq, dk, dv


# ---- the operator

@torch.library.custom_op("nanosora::attention", mutates_args=())
def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor,
               cu_k: torch.Tensor, bias: Optional[torch.Tensor], scale: float,
               on_triton: bool) -> tuple[torch.Tensor, torch.Tensor]:
    forward = _triton_forward if on_triton else _torch_forward
    return forward(q, k, v, cu_q, cu_k, scale, bias)


@_attention.register_fake
def _(q, k, v, cu_q, cu_k, bias, scale, on_triton):
    lse = q.new_empty(q.shape[1::-1], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse


@torch.library.custom_op("nanosora::attention_backward", mutates_args=())
def _attention_backward(do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                        o: torch.Tensor, lse: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor,
                        bias: Optional[torch.Tensor], scale: float,
                        on_triton: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    backward = _triton_backward if on_triton else _torch_backward
    return backward(do, q, k, v, o, lse, cu_q, cu_k, scale, bias)


@_attention_backward.register_fake
def _(do, q, k, v, o, lse, cu_q, cu_k, bias, scale, on_triton):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _readable(x):
    """x [N, A, E] in place where its strides suit the kernels, else a copy."""
    is_apt = x.stride(2) == 1 and (x.shape[2] % 8 or not any(s % 8 for s in x.stride()[:2]))
    return x if is_apt else x.contiguous()


def _setup(ctx, inputs, output):
    q, k, v, cu_q, cu_k, bias, ctx.scale, ctx.on_triton = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k, bias)


def _backward(ctx, do, _):
    grads = _attention_backward(_readable(do), *ctx.saved_tensors, ctx.scale, ctx.on_triton)
    return *grads, None, None, None, None, None


_attention.register_autograd(_backward, setup_context=_setup)


def _autocast(x):
    """x in autocast's dtype where that is on: torch's own attention is of those that it narrows."""
    kind = x.device.type
    can = x.dtype in FLOATS and torch.amp.is_autocast_available(kind)
    return x.to(torch.get_autocast_dtype(kind)) if can and torch.is_autocast_enabled(kind) else x


def attention(q, k, v, cu_q, cu_k, scale=None, bias=None, with_lse=False):
    """Softmax attention inside each clip of a packed row, o [N, A, E]; with_lse: (o, lse [A, N]).

    q [N, A, E]; k, v [M, A, E]; cu_q, cu_k int32 [B+1], first 0, ascending, cu_q[-1] <= N, cu_k[-1]
    <= M; scale: above 0; 1/sqrt(E) if None; bias float32 [M]: added to the scaled scores of each
    key (the logarithm of how often it is there, -inf if it is not). lse, a natural logarithm in
    float32, merges the results of parts of the keys. Under autocast q, k and v become its dtype.
    Raises ValueError naming the argument whose shape, dtype, device or value does not fit; on a
    GPU, where bounds are not seen without waiting, wrong ones are clamped. (Online softmax: Milakov
    and Gimelshein 2018; tiles and recomputation: Dao et al. 2022.)
    """
    q, k, v = map(_autocast, (q, k, v))
    check(q.dim() == 3 and q.shape[1] > 0, "q", q, "[N, A, E] with A > 0")
    check(q.dtype.is_floating_point and 0 < q.shape[2] <= 256, "q", q,
          "floating point with 0 < E <= 256")
    for name, x in (("k", k), ("v", v)):
        check(x.dim() == 3 and x.shape[1:] == q.shape[1:] and len(x) == len(k), name, x,
              f"[M, {q.shape[1]}, {q.shape[2]}] with k's M")
        check(x.dtype == q.dtype and x.device == q.device, name, x,
              f"{q.dtype} on {q.device} like q")
    for name, x in (("cu_q", cu_q), ("cu_k", cu_k)):
        check(x.dim() == 1 and x.numel() > 1 and len(x) == len(cu_q), name, x,
              "[B+1], the same B in both")
        check(x.dtype == torch.int32 and x.device == q.device, name, x,
              f"int32 on {q.device} like q")
    if bias is not None:
        check(bias.shape == k.shape[:1] and bias.dtype == torch.float32 and bias.device == q.device
              and not bias.requires_grad, "bias", bias,
              f"None or float32 [{len(k)}] on {q.device} without a gradient")
        bias = bias.contiguous()
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    check(scale > 0, "scale", scale, "above 0")
    q, k, v = map(_readable, (q, k, v))
    o, lse = _attention(q, k, v, cu_q, cu_k, bias, scale, use_triton(q))
    return (o, lse.detach()) if with_lse else o
