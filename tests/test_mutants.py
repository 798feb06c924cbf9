"""Faults planted in kernels/, one at a time, each with the test that finds it (-m slow: a pytest a
fault). Without -m slow: each is still a change of the source as it stands."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import HAS_GPU, ROOT

A, L, R, K, P, C, F, D, O = (f"test_{name}.py::test_" for name in (
    "attention", "adaln", "rope", "kernels", "patchify", "conv", "linear", "decode", "optim"))
FENCE = "nothing_outside_is_read_or_written"

# file, what is wrong, the source, what replaces it, the test that finds it
MUTANTS = [
    ("attention", "a key past the clip's end is seen",
     "        s = tl.where((col < hi)[None, :], s,", "        s = tl.where((col <= hi)[None, :], s,",
     A + "matches_float64"),
    ("attention", "the last whole tile is left out",
     "    for start in range(lo, whole, BLOCK_N):\n        o0, o1",
     "    for start in range(lo, whole if MASKED else whole - BLOCK_N, BLOCK_N):\n        o0, o1",
     A + "tiles_of_a_hopper_gpu[40]"),
    ("attention", "keys behind the tensor are read",
     "k0, k1 = _load(k, col, k_row, hi, E, HEAD, TAIL, MASKED)\n    s = ",
     "k0, k1 = _load(k, col, k_row, hi + BLOCK_N, E, HEAD, TAIL, MASKED)\n    s = ",
     K + FENCE),
    ("attention", "a neighbour's values are read",
     "v0, v1 = _load(v, col, v_row, hi, E, HEAD, TAIL, MASKED)\n    o0",
     "v0, v1 = _load(v, col, v_row, hi + BLOCK_N, E, HEAD, TAIL, MASKED)\n    o0",
     A + "neighbours_do_not_leak"),
    ("attention", "dq's tail is not scaled", "dq0 * scale, dq1 * scale,", "dq0 * scale, dq1,",
     A + "tiles_of_a_hopper_gpu[72]"),
    ("attention", "dk is not scaled", "dk0 * scale, dk1 * scale,", "dk0, dk1,",
     A + "tiles_of_a_hopper_gpu[40]"),
    ("attention", "delta lacks the tail", "d += tl.sum(do1.to(tl.float32) * o1.to(tl.float32), 1)",
     "d += 0.0", A + "tiles_of_a_hopper_gpu[72]"),
    ("attention", "0 / 0 without keys", "total = tl.where(total == 0.0, 1.0, total)", "total = total",
     A + "rows_behind_the_last_clip_are_zero"),
    ("attention", "dq sees keys that are not there",
     "        p = tl.where((col < hi)[None, :], p, 0.0)", "        p = p", A + "low_logits"),
    ("attention", "dk lacks delta", "_dot_t(v0, v1, do0, do1, TAIL) - d[None, :]",
     "_dot_t(v0, v1, do0, do1, TAIL)", A + "tiles_of_a_hopper_gpu[40]"),
    ("attention", "no running maximum", "tl.maximum(top, tl.max(s, 1) * scale)",
     "tl.max(s, 1) * scale", A + "large_logits"),
    ("attention", "lse is written past the tile", "+ row, row_lse, mask=row < last)",
     "+ row, row_lse)", K + FENCE),
    ("attention", "lse of powers of two", "(top + tl.log2(total)) * 0.6931471805599453",
     "(top + tl.log2(total))", A + "bias_and_lse"),
    ("attention", "the bias times the scale", "mask=col < hi, other=0.0) * per_scale",
     "mask=col < hi, other=0.0)", A + "bias_and_lse"),
    ("attention", "a bias read past the keys", "mask=col < hi, other=0.0) * per_scale",
     "mask=col < hi + 64, other=0.0) * per_scale", K + FENCE),
    ("attention", "NaN before the first key that is seen",
     'base = tl.where(new_top == float("-inf"), 0.0, new_top)', "base = new_top",
     A + "bias_and_lse"),
    ("attention", "NaN in backward where no key is seen",
     'row_lse = tl.where(row_lse == float("-inf"), 0.0, row_lse)', "row_lse = row_lse",
     A + "bias_and_lse"),
    ("attention", "dq without the bias", "    if BIASED:\n        s += _load_bias(bias, col, hi, "
     "per_scale)[None, :]\n    p = ", "    p = ", A + "bias_and_lse"),
    ("attention", "dk without the bias", "        s += b[:, None]\n", "        s += 0.0\n",
     A + "bias_and_lse"),
    ("attention", "padding without the keys' bias", "return bias if padding is None else bias + "
     "padding", "return bias if padding is None else padding", A + "bias_and_lse"),
    ("attention", "lse of 0 where no key is seen", 'lse.masked_fill((bias == float("-inf")).all(-1)',
     'lse.masked_fill((bias != bias).all(-1)', A + "bias_and_lse"),
    ("attention", "a row too many is written", "    ok = row < end\n    d = tl.arange(0, HEAD)",
     "    ok = row < end + 1\n    d = tl.arange(0, HEAD)", K + FENCE),
    ("attention", "the next head's columns are read", "mask=(row < end)[:, None] & (d < E)[None, :]",
     "mask=(row < end)[:, None] & (d < TO)[None, :]", A + "matches_float64"),
    ("attention", "a promise of 8 that does not hold", "    if E % 8 == 0:\n", "    if E % 4 == 0:\n",
     K + FENCE),
    ("attention", "strides that are no multiples of 8 stay",
     "is_apt = x.stride(2) == 1 and (x.shape[2] % 8 or not any(s % 8 for s in x.stride()[:2]))",
     "is_apt = x.stride(2) == 1", K + FENCE),
    ("attention", "int32 addresses of what is written",
     "start = x + row.to(tl.int64)[:, None] * stride", "start = x + row[:, None] * stride",
     K + "attention_reads_and_writes_beyond_int32"),
    ("attention", "int32 addresses of what is read",
     "_times(row.to(tl.int64), stride, E)[:, None]", "_times(row, stride, E)[:, None]",
     K + "attention_reads_and_writes_beyond_int32"),
    ("attention", "the padding's rows are not written", "value=n_rows", "value=0",
     A + "rows_behind_the_last_clip_are_zero"),
    ("attention", "the rows before the first clip belong to it",
     "(clip >= 0) & (clip < n_clips)", "clip < n_clips", K + "numbers_that_nobody_saw"),
    ("attention", "dv of a large clip's last part alone", "dv += _heads(", "dv = _heads(",
     A + "large_clips_on_a_cpu"),
    ("attention", "padded keys are the neighbour's", "np.minimum(key, len_k[clips, None] - 1)",
     "np.minimum(key, len_k[clips, None])", A + "neighbours_do_not_leak"),
    ("attention", "padded keys are seen", 'float("-inf"))\n            bias', '0.0)\n            bias',
     A + "matches_float64"),
    ("attention", "a query's NaN is lost", "if k.shape[2] < 16:", "if k.shape[2] < 0:",
     A + "a_querys_nan_is_its_rows"),
    ("attention", "autocast is not asked", "if can and torch.is_autocast_enabled(kind) else x",
     "if can and not x.numel() else x", A + "autocast_is_as_torchs_own"),
    ("attention", "no heads", "q.dim() == 3 and q.shape[1] > 0", "q.dim() == 3",
     A + "wrong_input_names_the_argument[q-<lambda>1]"),
    ("adaln", "the variance counts the padding", "away = tl.where(ok, z - mean[:, None], 0.0)",
     "away = z - mean[:, None]", L + "matches_float64"),
    ("adaln", "h of r before it is rounded", "        z = rounded.to(tl.float32)\n", "",
     L + "h_is_ln_modulate_of_r"),
    ("adaln", "token 0 in a tile's spare places",
     "rstd = tl.load(stats + token * 2 + 1, mask=place < last, other=0.0)",
     "rstd = tl.load(stats + token * 2 + 1)", L + "the_first_tokens_nan"),
    ("adaln", "dr is forgotten", "back += tl.load(dr + at, mask=ok, other=0.0).to(tl.float32)",
     "back += 0.0", L + "matches_float64"),
    ("adaln", "spare tiles read past the table", "in_row = (col < D) & (row < R)",
     "in_row = col < D", K + FENCE),
    ("adaln", "parts lie two apart", "part += 3 * D", "part += 2 * D", L + "matches_float64"),
    ("adaln", "int32 addresses", "token = tl.program_id(0).to(tl.int64) * BLOCK_M",
     "token = tl.program_id(0) * BLOCK_M", K + "adaln_writes_beyond_int32"),
    ("adaln", "a tile's last token is left out", "for start in range(first, last, BLOCK_M):",
     "for start in range(first, last - 1, BLOCK_M):", L + "matches_float64"),
    ("adaln", "rms takes the mean off in backward", "        if not RMS:", "        if True:",
     L + "rms_norm_matches_float64"),
    ("adaln", "rms takes the mean off", "    if RMS:\n", "    if D < 0:\n",
     L + "rms_norm_matches_float64"),
    ("adaln", "tables with gaps", "return table if table.stride(1) == 1 else table.contiguous()",
     "return table", L + "strided_views"),
    ("rope", "backward turns the wrong way", "_turn(grad, cos, -sin,", "_turn(grad, cos, sin,",
     R + "matches_float64"),
    ("rope", "the mean is over one head", "rstd = tl.rsqrt(tl.sum(z * z, 1) / W + eps)\n",
     "rstd = tl.rsqrt(tl.sum(z * z, 1) / E + eps)\n", R + "matches_float64"),
    ("rope", "every part is a token's first", "    at = (token * x_row + part % PARTS * W)[:, None] "
     "+ col[None, :]\n    z = ", "    at = (token * x_row)[:, None] + col[None, :]\n    z = ",
     R + "a_heads_norm_is_rms_norm"),
    ("rope", "each part turns as a token", "        token = part // PARTS\n",
     "        token = part\n", R + "matches_float64"),
    ("rope", "pairs run on over the heads", "% PAIRS", "% BLOCK_P", K + FENCE),
    ("rope", "a token too many", "ok = (part < N)[:, None] & in_row[None, :]",
     "ok = (part <= N)[:, None] & in_row[None, :]", K + FENCE),
    ("rope", "int32 addresses", "first = tl.program_id(0).to(tl.int64) * TOKENS",
     "first = tl.program_id(0) * TOKENS", K + "rope_reads_beyond_int32"),
    ("rope", "coordinates with gaps", "coords, freqs = coords.contiguous(), freqs.contiguous()",
     "pass", K + "index_vectors_and_weights_may_be_views"),
    ("rope", "weights with gaps", "w if w is None else w.contiguous() for w", "w for w",
     K + "index_vectors_and_weights_may_be_views"),
    ("patchify", "a tile writes the next clip's tokens", "ok = (n < count) & (f < K)", "ok = f < K",
     K + FENCE),
    ("patchify", "pt and ph exchanged", "* pt + f // (ph * pw) % pt", "* pt + f // (ph * pw) % ph",
     P + "is_the_formula"),
    ("patchify", "int32 addresses", "clip = clips + tl.load(tile) * 6\n    base, first_token, count = "
     "tl.load(clip),", "clip = clips + tl.load(tile) * 6\n    base, first_token, count = "
     "tl.load(clip).to(tl.int32),", K + "patchify_reads_beyond_int32"),
    ("__init__", "a table too short for many clips", "torch.arange(n_rows // block + runs",
     "torch.arange(n_rows // block + 1", A + "tile_table"),
    ("__init__", "a tile past its run", "last = torch.minimum(first + block, end)",
     "last = first + block", A + "tile_table"),
    ("__init__", "tables of bounds that changed", "if version != x._version:", "if version is None:",
     A + "layers_share_a_tile_table"),
    ("__init__", "no table is kept", "if key not in result:", "if True:",
     A + "layers_share_a_tile_table"),
    ("__init__", "old tables are kept too", "        result = {}\n", "        result = dict(result or {})"
     "\n        key = (x._version, *key)\n", K + "only_the_newest_tables_are_kept"),
    ("__init__", "a graph reads an old table", "if x.is_inference() or is_capturing(x):",
     "if x.is_inference():", K + "a_graph_makes_its_tables_itself"),
    ("__init__", "tables of inference tensors are kept", "if x.is_inference() or is_capturing(x):",
     "if is_capturing(x):", K + "inference_mode_changes_nothing"),
    ("__init__", "index vectors with gaps, unchecked", "        clamped = x.clamp(0, most)\n",
     "        return x\n", K + "index_vectors_and_weights_may_be_views"),
    ("__init__", "bounds that do not ascend", "clamped.cummax(0).values if ascend else clamped",
     "clamped", K + "numbers_that_nobody_saw"),
    ("__init__", "a number too large is not named", "least <= n <= top", "least <= n",
     K + "numbers_that_do_not_fit_are_named"),
    ("__init__", "the current device", 'if device.type == "cuda" else', 'if device.type == "" else',
     K + "launches_go_to_the_tensors_device"),
    ("conv", "the past is forgotten", "out[:, :, :n_past] = 0 if past is None else past",
     "out[:, :, :n_past] = 0", C + "chunks_are_the_formula"),
    ("conv", "the past gets no gradient", "d_past if ctx.needs_input_grad[2] else None", "None",
     C + "gradients_are_the_formulas"),
    ("conv", "the next past is a view", "        last = last.clone()", "        pass", C + "the_past_is_no_view"),
    ("conv", "the first chunk's last kernel frame alone", "x.shape[2] == n + 1:", "x.shape[2] >= n + 1:",
     C + "chunks_are_the_formula"),
    ("conv", "a strip's neighbours are left out", "above, below = max(0, top - 1), min(H, end + 1)",
     "above, below = top, end", C + "winograd_is_the_convolution"),
    ("conv", "Winograd with gradients", "            and not torch.is_grad_enabled())", "            )",
     C + "winograd_takes_only_what_it_is_made_for"),
    ("decode", "a key too few", "keys = torch.arange(max(self.lengths) + 1, device=device)",
     "keys = torch.arange(max(self.lengths), device=device)", D + "cached_tokens"),
    ("decode", "a window one too wide", "keys > at - (window or", "keys >= at - (window or",
     D + "cached_tokens"),
    ("decode", "all prompts in the first one's place", "self.reserve(layer, both)[:, rows,",
     "self.reserve(layer, both)[:, :1,", D + "cached_tokens"),
    ("decode", "what is there is lost as it grows", "if both is not None:\n", "if False:\n",
     D + "a_cache_grows"),
    ("optim", "vectors decay", "decayed = [p for p in params if p.dim() >= 2]", "decayed = params",
     O + "many_tensors_step_as_one_by_one"),
    ("optim", "no bias correction", "[1 - beta2**n for n in steps]", "[1.0 for n in steps]",
     O + "many_tensors_step_as_one_by_one"),
    ("optim", "a batch has one norm", "x.norm(dim=(1, 2), keepdim=True)", "x.norm()",
     O + "many_tensors_step_as_one_by_one"),
]
# changes that no result can show, and why
EQUIVALENT = [
    ("attention", "dkv without its mask", "        p = tl.where((row < hi)[None, :], p, 0.0)",
     "        p = p", "q, do, lse and delta of rows behind the clip are zeros: p is 1, times do = 0"),
    ("attention", "queries in one part", "return max(128, 2**22 // (q.shape[1] * len(k)) // 64 * 64)",
     "return 2**30", "a part is what fits a cache; sums over parts differ in rounding alone"),
    ("adaln", "an unstable sort", "torch.sort(rows, stable=True)\n    row_numbers = torch.arange(R + 1",
     "torch.sort(rows, stable=False)\n    row_numbers = torch.arange(R + 1",
     "the order of a row's tokens changes the rounding of sums, and torch's sort on a CPU is stable"),
]


def test_each_mutant_changes_the_source_as_it_stands():
    for file, what, old, new, _ in MUTANTS + EQUIVALENT:
        assert (ROOT / f"kernels/{file}.py").read_text().count(old) == 1 and old != new, what


@pytest.mark.slow
@pytest.mark.skipif(HAS_GPU, reason="for the interpreter")
@pytest.mark.parametrize("file, what, old, new, test", MUTANTS, ids=[
    f"{file}-{what.replace(' ', '-')}" for file, what, *_ in MUTANTS])
def test_the_fault_is_found(tmp_path, file, what, old, new, test):
    for folder in ("kernels", "tests"):
        (tmp_path / folder).mkdir()
        for path in (ROOT / folder).glob("*.py"):
            shutil.copy(path, tmp_path / folder)
    source = tmp_path / f"kernels/{file}.py"
    source.write_text(source.read_text().replace(old, new))
    name, _, case = test.partition("::")
    chosen = [f"tests/{test}"] if "[" in case else [f"tests/{name}", "-k", case]
    env = {key: value for key, value in os.environ.items() if not key.startswith("NANOSORA")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen],
        cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1 or done.returncode < 0, f"{what}: lives\n{done.stdout[-1000:]}"
