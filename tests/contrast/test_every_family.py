"""One optimization step of each stage through one architecture of each of timm's modules."""

from __future__ import annotations

import pytest
import timm
import torch

from ctc_timm import CTCTask
from families import on_meta, small_of_each_module

B, C = 2, 3


def small_images(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """The model at the smallest image size, and if it is large the least depth, that it takes, with a batch."""
    cfg = timm.get_pretrained_cfg(name)
    channels, height, _ = cfg.input_size
    for size in (64, 96, 112, 128, 160, 192, 224, 256, 336, height):
        sized = {'img_size': size} if cfg.fixed_input_size else {}
        for options in ({**sized, 'depth': 2}, sized):
            try:
                shape = on_meta(name, num_classes=C, **options)(
                    torch.zeros(B, channels, size, size, device='meta')
                ).shape
            except Exception:  # window or patch sizes that do not divide this image size, or no such argument
                continue
            if shape == (B, C):
                return timm.create_model(name, num_classes=C, **options), torch.randn(B, channels, size, size)
    raise AssertionError(f'{name} takes none of these image sizes')


@pytest.mark.parametrize('name', small_of_each_module())
def test_one_step_of_each_stage(name: str) -> None:
    torch.manual_seed(0)
    model, images = small_images(name)
    labels = torch.arange(12) % C
    # With a task loss of zero only the contrast's gradient is left, so it is seen to reach the body.
    task = CTCTask(model, labels, lambda output, target: 0 * output.sum(), embed_dim=8, num_negatives=4)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=1e-5)
    index = torch.arange(B)
    for stage in ('instance', 'temporal'):
        assert task.stage == stage
        task.train()
        optimizer.zero_grad()
        result = task(images, labels[index], index)
        assert result['output'].shape == (B, C) and result['output'].isfinite().all()
        assert result['loss'].isfinite() and result['ctc_loss'] > 0
        result['loss'].backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(g.isfinite().all() for g in gradients)
        # Residual branches that start at zero pass nothing on at first; the stem is reached all the same.
        assert any(g.any() for g in gradients[: len(gradients) // 4 + 1])
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before))
        if stage == 'instance':
            task.start_temporal_stage([(images, labels[index], index)])
