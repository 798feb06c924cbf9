"""kernels/decode.py: attention of new tokens to a cache, against the formula over whole texts."""

import pytest
import torch
from conftest import DEVICE

from kernels.decode import Cache, attend, reference


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("n", [1, 5])
def test_attend_is_the_formula(heads, kv_heads, n):
    q = randn(3, heads, n, 8)
    k, v = (randn(3, kv_heads, 7 if n == 1 else n, 8, seed=seed) for seed in (1, 2))
    keys = torch.arange(k.shape[2], device=DEVICE)
    seen = (keys <= torch.tensor([2, 6, 0], device=DEVICE)[:, None])[:, None, None]
    for mask in (None, seen, torch.where(seen, 0.5 * keys, -torch.inf)):
        torch.testing.assert_close(attend(q, k, v, mask, 0.3), reference(q, k, v, mask, 0.3))
    if n > 1:
        torch.testing.assert_close(attend(q, k, v, is_causal=True),
                                   reference(q, k, v, is_causal=True))
    else:                                                        # one query sees all keys
        torch.testing.assert_close(attend(q, k, v, is_causal=True), reference(q, k, v))


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("lengths", [(9, 9), (9, 8), (30, 2, 5)])
def test_cached_tokens_are_those_of_the_whole_text(lengths, window):
    """Two layers; prompts read whole or behind a shared beginning; rows that end."""
    layers, KV, E, more, shared = ("a", "b"), 2, 8, 4, 2
    whole = {layer: [randn(1, KV, n + more, E, seed=10 * i + n) for i, n in enumerate(lengths)]
             for layer in layers}
    for layer in layers:                                         # all begin alike
        for x in whole[layer]:
            x[:, :, :shared] = whole[layer][0][:, :, :shared]

    def exact(x, queries):
        at = torch.arange(x.shape[2], device=DEVICE)
        mask = (at <= at[:, None]) & (at > at[:, None] - (window or len(at)))
        return reference(x, x, x, mask)[:, :, queries]

    def step(cache, tensors, n):
        """Each layer's answer to the tokens [B, KV, n, E] that come next."""
        mask, out = cache.mask(n, window, torch.device(DEVICE)), {}
        for layer, x in tensors.items():
            k, v = cache.append(layer, x, x)
            out[layer] = attend(x, k, v, mask, is_causal=mask is None)
        return out

    def part(rows, start, end):
        return {layer: torch.cat([whole[layer][row][:, :, start(row):end(row)] for row in rows])
                for layer in layers}
    cache, rows = Cache(), list(range(len(lengths)))
    cache.plan([0], 0, shared)
    step(cache, part([0], lambda row: 0, lambda row: shared), shared)
    cache.save_prefix([7] * shared, 0)
    for start, row in zip((0, shared, shared), rows):            # the first one reads it itself
        cache.plan([row], start, lengths[row] - start)
        if start:
            cache.copy_prefix([row])
        if lengths[row] > start:
            result = step(cache, part([row], lambda _: start, lengths.__getitem__),
                         lengths[row] - start)
            for layer in layers:
                torch.testing.assert_close(result[layer], exact(
                    whole[layer][row], slice(start, lengths[row])))
        cache.lengths[row] = lengths[row]
    for i in range(more):
        if i == 2:                                               # the first text has ended
            rows = rows[1:]
            cache.select(rows)
        cache.plan()
        place = lambda row: lengths[row] + i
        result = step(cache, part(rows, place, lambda row: place(row) + 1), 1)
        for layer in layers:
            for answer, row in zip(result[layer], rows):
                torch.testing.assert_close(answer[None], exact(
                    whole[layer][row], slice(place(row), place(row) + 1)))
        cache.lengths = [length + 1 for length in cache.lengths]


@pytest.mark.parametrize("lengths, window, is_masked", [
    ((5, 40, 17), 0, True), ((40, 40), 0, False), ((40, 40), 8, True)])
def test_rows_of_equal_length_need_no_mask(lengths, window, is_masked):
    cache = Cache()
    cache.plan(range(len(lengths)))
    cache.lengths = list(lengths)
    cache.plan()
    mask = cache.mask(1, window, torch.device(DEVICE))
    assert (mask is not None) == is_masked
    if is_masked:
        assert mask.sum(-1).flatten().tolist() == [min(n + 1, window or n + 1) for n in lengths]


def test_a_cache_grows_by_steps_of_128():
    cache, x = Cache(), randn(1, 2, 200, 4)
    for start in range(0, 200, 50):
        cache.plan([0], start, 50)
        cache.mask(50, 0, torch.device(DEVICE))
        k, v = cache.append("layer", x[:, :, start:start + 50], -x[:, :, start:start + 50])
        cache.lengths = [start + 50]
        assert cache.cached["layer"].shape == (2, 1, 2, 128 if start < 100 else 256, 4)
    assert torch.equal(k, x) and torch.equal(v, -x)
