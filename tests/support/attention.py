"""Segment attention as a loop over queries, and arguments and results to compare with it."""

import math

import torch


def oracle(q, k, v, limits, *, scale=None):
    """One query of one head at a time; without keys, the empty sum is zero."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    images = []
    for b, row in enumerate(limits.tolist()):
        queries = []
        for i, visible in enumerate(row):
            heads = []
            for h in range(q.shape[2]):
                scores = scale * (k[b, :visible, h] @ q[b, i, h])
                heads.append(torch.exp(scores - scores.logsumexp(0)) @ v[b, :visible, h])
            queries.append(torch.stack(heads))
        images.append(torch.stack(queries))
    return torch.stack(images)


def arguments(shape, *, seed=0, dtype=torch.float32, device='cpu'):
    """q, k, v, ragged limits that include 0 and all keys, and a gradient for the output."""
    batch, queries, keys, heads, width = shape
    generator = torch.Generator().manual_seed(seed)
    q, k, v, grad = (torch.randn(batch, n, heads, width, generator=generator).to(device, dtype)
                     for n in (queries, keys, keys, queries))
    limits = torch.randint(0, keys + 1, (batch, queries), generator=generator, dtype=torch.int32)
    limits[0, queries // 2] = 0
    limits[-1, queries // 3] = keys
    return q, k, v, limits.to(device), grad


def results(attention, q, k, v, limits, grad, **options):
    """Output and gradients of q, k and v, in that order."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = attention(q, k, v, limits, **options)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad.to(out.dtype))]


def expected_results(q, k, v, limits, grad, **options):
    """What the loop gives in float64, whatever the arguments' dtype."""
    return results(oracle, q.double(), k.double(), v.double(), limits, grad, **options)


def assert_near(actual, expected, tolerance):
    for got, want in zip(actual, expected, strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)
