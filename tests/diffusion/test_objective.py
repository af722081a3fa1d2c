from __future__ import annotations

import torch

from simpletuner.diffusion.objective import l2


def test_each_sample_has_its_own_mean_square():
    answer = torch.zeros(2, 3, 2, 2)
    target = torch.stack([torch.full((3, 2, 2), 2.0), torch.full((3, 2, 2), -0.5)])
    assert torch.equal(l2(answer, target), torch.tensor([4.0, 0.25]))


def test_a_half_precision_answer_is_compared_in_float32():
    # In bfloat16 both differences would be rounded away: 256 + 1 is 256.
    answer = torch.full((1, 1, 1, 1), 256.0, dtype=torch.bfloat16)
    loss = l2(answer, torch.full((1, 1, 1, 1), 257.0))
    assert loss.dtype == torch.float32
    assert loss.item() == 1.0
