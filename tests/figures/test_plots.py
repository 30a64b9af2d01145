"""What figures of a run are drawn from."""

import pytest
import timm
import torch

pytest.importorskip('sklearn')

from autoreg_vit.figures import plots


def test_loss_by_rank_takes_the_loss_apart():
    model = timm.create_model('randsac_vit_tiny_patch4_32', depth=1, decoder_depth=1, serialization='random')
    images = torch.randn(7, 3, 32, 32)
    torch.manual_seed(1)
    by_rank = plots.loss_by_rank(model, images, batch_size=7)
    torch.manual_seed(1)
    out = model.eval()(images)
    assert by_rank.tokens.tolist() == [7] * 64
    torch.testing.assert_close(by_rank.mean.mean().float(), out.loss, atol=1e-6, rtol=1e-5)
    errors = (out.pred - out.target).square().mean(-1)
    first = errors[out.ranks == 0].double()
    torch.testing.assert_close(by_rank.mean[0], first.mean())
    torch.testing.assert_close(by_rank.error[0], first.std(correction=0) / 7 ** 0.5)


def test_loss_by_rank_begins_after_a_given_segment():
    model = timm.create_model('randsac_vit_tiny_patch4_32', depth=1, decoder_depth=1, serialization='squares',
                              segments=16, first_segment='given')
    by_rank = plots.loss_by_rank(model, torch.randn(3, 3, 32, 32))
    assert by_rank.tokens.tolist() == [3 * 4] * 15 and by_rank.mean.min() > 0
