"""A decoder's attention to its KV cache, one new token or a prompt at a time.

For queries q [B, A, N, E] and keys k, values v [B, KV, S, E], A / KV query heads on each:

    o = softmax(scale q k^T, where the mask or causality allows) v

Layout: a layer's keys and values are cached in one tensor [2, B, KV, capacity, E], its capacity a
multiple of 128, made once for all the tokens of a text where that is known. Rows are texts of
different lengths; each goes on at its own position.

One new query of a text (N = 1) sees all that the cache holds for it. The A / KV queries on the same
keys go side by side as if they were A / KV positions: with a mask, a GPU would copy the keys for
each of them (8 uneven texts on a CPU: 15% of the time). Rows of equal length need no mask, and
their keys are written as a slice. What all prompts begin with is computed once, then copied (8
texts: 43%).

What lost, on a CPU: attention of 16 rows to their caches as batched products, a cache without
powers of two, rows of very different lengths attended one by one: 3% or less.

Limits: no gradients through the cache; a window counts the query itself.
"""

import torch
import torch.nn.functional as F

# (A, KV, E, lengths of the texts): one new token each, for the bench
SHAPES = [(32, 8, 128, [512] * 16), (32, 8, 128, [128, 4096] * 8)]
CPU_SHAPES = [(12, 12, 64, [300] * 16), (12, 4, 64, [40, 1000] * 4), (12, 12, 64, [300])]


def reference(q, k, v, mask=None, scale=None, is_causal=False):
    """The formula; a causal query n sees keys 0 to n."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[3]**-0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        is_bool = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if is_bool else scores + mask
    return scores.softmax(-1) @ v


def attend(q, k, v, mask=None, scale=None, is_causal=False):
    """[B, A, N, E] of q [B, A, N, E] and k, v [B, KV, S, E]. mask: bool, what is seen, or what is
    added to the scores, broadcast to [B, A, N, S]; where A is not KV and N = 1, the same for all
    heads."""
    n = q.shape[2]
    is_causal = is_causal and n > 1                  # one query sees all that there is
    if n == 1:
        q = q.reshape(*k.shape[:2], -1, k.shape[3])
    o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale,
                                       enable_gqa=q.shape[1] != k.shape[1])
    return o.reshape(len(q), -1, n, k.shape[3])


class Cache:
    """Keys and values of a decoder's layers, [2, B, KV, capacity, E] each; rows differ in length.

    A forward pass is announced by plan(), asks once for mask(), and calls append() in each layer;
    whoever runs it then counts the new tokens in `lengths`."""

    def __init__(self):
        self.cached, self.lengths, self.capacity = {}, [], 0
        self.rows, self.start = None, 0                  # what was planned
        self.row_index, self.positions = None, None      # rows, and where they go on, on the device
        self.prefix, self.cached_prefix = None, {}       # ids that all prompts begin with

    def plan(self, rows=None, start=0, n=1):
        """What comes next: n tokens from `start` on for some rows, or a token more for each."""
        self.rows, self.start = rows, start
        for row in rows or ():
            self.lengths += [0] * (row + 1 - len(self.lengths))
        self.capacity = max(self.capacity, start + n, *(length + 1 for length in self.lengths))

    def mask(self, n, window, device):
        """bool: which keys the queries to come see, None where that is all, or causal. For all
        layers at once, since each index that comes from the host makes a GPU wait."""
        if self.rows is None:
            if len(set(self.lengths)) == 1 and not window:
                return None
            self.row_index = torch.arange(len(self.lengths), device=device)
            self.positions = torch.tensor(self.lengths, device=device)
            at = self.positions[:, None, None, None]
            keys = torch.arange(max(self.lengths) + 1, device=device)
        else:
            self.row_index = torch.tensor(self.rows, device=device)
            if not self.start and not 0 < window < n:
                return None
            keys = torch.arange(self.start + n, device=device)
            at = keys[self.start:, None]
        return (keys <= at) & (keys > at - (window or len(keys) + 1))

    def reserve(self, layer, like):
        """The layer's tensor, with capacity for all rows and for what comes next; like: of its
        dtype, device, KV and E."""
        both, B, KV, E = self.cached.get(layer), len(self.lengths), like.shape[2], like.shape[4]
        if both is None or both.shape[1] < B or both.shape[3] < self.capacity:
            self.cached[layer] = like.new_zeros(2, B, KV, -(-self.capacity // 128) * 128, E)
            if both is not None:
                self.cached[layer][:, :both.shape[1], :, :both.shape[3]] = both
        return self.cached[layer]

    def append(self, layer, k, v):
        """Puts k, v [B, KV, new, E] after what is there; returns views of all, [B, KV, all, E]."""
        both, rows = self.reserve(layer, k[None]), self.row_index
        if self.rows is None:
            n = max(self.lengths) + 1
            if min(self.lengths) == n - 1:           # one slice, and nothing looked up
                both[0, :, :, n - 1:n], both[1, :, :, n - 1:n] = k, v
            else:
                both[0, rows, :, self.positions] = k[:, :, 0]
                both[1, rows, :, self.positions] = v[:, :, 0]
            return both[0, :, :, :n], both[1, :, :, :n]
        end = self.start + k.shape[2]
        both[0, rows, :, self.start:end], both[1, rows, :, self.start:end] = k, v
        return (k, v) if not self.start else (both[0, rows, :, :end], both[1, rows, :, :end])

    def select(self, rows):
        """Forgets all rows but these."""
        self.lengths = [self.lengths[row] for row in rows]
        self.cached = {layer: both[:, rows] for layer, both in self.cached.items()}

    def save_prefix(self, ids, row):
        """Remembers that prompts begin with `ids`, which this row holds."""
        self.prefix = ids
        self.cached_prefix = {layer: both[:, [row], :, :len(ids)]
                              for layer, both in self.cached.items()}

    def copy_prefix(self, rows):
        """Puts the prefix into these rows."""
        for layer, both in self.cached_prefix.items():
            self.reserve(layer, both)[:, rows, :, :len(self.prefix)] = both
