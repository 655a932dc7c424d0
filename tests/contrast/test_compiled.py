"""A step that a compiler takes as one graph, and that never waits for the device."""

import copy

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ctc_timm import CTCTask, InstanceDiscriminationLoss
from ctc_timm.contrast import blockwise, negatives

N, B, C = 80, 8, 8
aten = torch.ops.aten
# What copies a device's numbers to the host, or has a result whose size only the device knows.
WAITS = {
    *(aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.equal, aten.allclose, aten.nonzero),
    *(aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount),
}


class NoWaiting(TorchDispatchMode):
    """Fails on every operation that would make the host wait for the device, inside our own operators too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in WAITS, func
        if func.overloadpacket in (aten.index, aten.index_put_, aten.index_put):
            assert all(i is None or i.dtype not in (torch.bool, torch.uint8) for i in args[1]), f'{func} by a mask'
        if func.namespace == 'ctc_timm':
            with self:
                return getattr(blockwise, f'_{func.overloadpacket.__name__}')._init_fn(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def build(**options):
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=C)
    return CTCTask(model, torch.arange(N) % C, embed_dim=16, num_negatives=20, verbose=False, **options).train()


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(N, generator=generator)[:B]
    return torch.randn(B, 3, 32, 32, generator=generator), index % C, index


def to_temporal(task):
    task.start_temporal_stage([(torch.randn(B, 3, 32, 32), None, torch.arange(s, s + B)) for s in range(0, N, B)])


@pytest.mark.parametrize('mixed', [False, True])
@pytest.mark.parametrize('mode', ['shared', 'all', 'mask', 'mask of most', 'rows', 'repeated'])
def test_a_step_never_waits_for_the_device(mode, mixed, monkeypatch):
    monkeypatch.setattr(negatives, 'WHOLE_BANK_RATIO', 0 if mode == 'rows' else 10**9)
    options = {'num_negatives': {'repeated': 90, 'mask of most': 200}.get(mode, 8), 'embed_dim': 16, 'verbose': False}
    labels = torch.arange(N * 4) % C if mode != 'repeated' else torch.arange(N) % C
    kind = mode if mode in ('shared', 'all') else 'sampled'
    task = CTCTask(timm.create_model('test_resnet', num_classes=C), labels, negatives=kind, **options).train()
    lam = torch.rand(B) if mixed else None
    with NoWaiting():
        task(*batch(0), lam)['loss'].backward()
    to_temporal(task)
    task(*batch(1), lam)  # the first step looks at the normalizers
    task(*batch(2), lam)
    drawn = task.sampler.draw(batch(2)[2])
    assert (drawn.rows is None, drawn.weights_BR is None) == (mode not in ('shared', 'rows'), mode in ('rows', 'all'))
    with NoWaiting():
        for seed in (3, 4):
            task(*batch(seed), lam)['loss'].backward()
    with pytest.raises(AssertionError), NoWaiting():
        task(*batch(5))['loss'].item()


@pytest.mark.parametrize(
    'options, mixed',
    [({'negatives': 'shared'}, False), ({'negatives': 'all', 'past_features': 'bank'}, True), ({}, False)],
    ids=str,
)
def test_one_graph_a_step(options, mixed):
    """Body and loss of both stages without a graph break, with the numbers of a step that is not compiled."""
    torch._dynamo.reset()
    plain = build(bank_dtype=torch.bfloat16, **options)
    whole = copy.deepcopy(plain)
    whole.trainable_module.compile(backend='aot_eager', fullgraph=True)
    lam = torch.linspace(0.3, 1, B) if mixed else None
    for seed, stage in enumerate(('instance', 'temporal', 'temporal')):
        if stage != plain.stage:
            for task in (plain, whole):
                torch.manual_seed(3)
                to_temporal(task)
        losses = [task(*batch(seed), lam) for task in (plain, whole)]
        torch.testing.assert_close(losses[1]['loss'], losses[0]['loss'], rtol=1e-5, atol=0)
        for loss in losses:
            loss['loss'].backward()
        for a, b in zip(whole.trainable_module.parameters(), plain.trainable_module.parameters()):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)
    for name, bank in whole.banks().items():
        torch.testing.assert_close(bank, plain.banks()[name], rtol=1e-2, atol=1e-3)
    assert whole.temporal.present_normalizer > 0
    assert torch._dynamo.utils.counters['graph_break'] == {}


def test_operators_are_well_formed():
    """torch's own check of schemas, of results that share no memory, and of the shapes a compiler is told."""
    v, bank, offset, labels = torch.randn(3, 5), torch.randn(40, 5), torch.tensor(0.3), torch.arange(40) % 4
    torch.library.opcheck(torch.ops.ctc_timm.attention.default, (v, bank, 0.5))
    for rows, weights in (
        (None, (None, labels[:3, None], labels)),
        (torch.randint(40, (7,)), (torch.rand(3, 7) < 0.5, None, None)),
        (torch.randint(40, (3, 7)), (None, None, None)),
    ):
        for last in (offset, None):
            torch.library.opcheck(torch.ops.ctc_timm.logistic.default, (v, bank, rows, *weights, 0.5, last))


def test_a_loaded_loss_keeps_its_normalizers():
    """Set once, by whichever step comes first; not again after a load, a copy or a change of precision."""
    task = build(negatives='all')
    to_temporal(task)
    task(*batch(0))
    before = task.temporal.present_normalizer.clone()
    other = build(negatives='all')
    other.load_task_state(task.get_task_state())
    for again in (task, other, copy.deepcopy(task)):
        again.train()(*batch(1))
        assert torch.equal(again.temporal.present_normalizer, before)
    assert InstanceDiscriminationLoss(4, 9).state_dict().keys() == {'bank', 'projector.weight', 'projector.bias'}
