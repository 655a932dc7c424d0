"""The task: its two stages, what it remembers, and that without CTC it is timm's own."""

import contextlib
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.task import ClassificationTask, TrainingTask
from torch._subclasses.fake_tensor import FakeTensorMode

from ctc_timm import CTCTask, features_and_logits
from ctc_timm.contrast.sharding import BankShard
from ctc_timm.utils.errors import UserError
from processes import run_processes

N, B, C = 48, 8, 6
SMALL = {'embed_dim': 16, 'num_negatives': 12}


def build(**options):
    torch.manual_seed(0)
    model = timm.create_model('cifar_resnet20', num_classes=C)
    return CTCTask(model, labels=torch.arange(N) % C, **{**SMALL, **options})


def batch(seed=0, size=16):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(N, generator=generator)[:B]
    return torch.randn(B, 3, size, size, generator=generator), index % C, index


def loader(size=16):
    images, index = torch.randn(N, 3, size, size, generator=torch.Generator().manual_seed(9)), torch.arange(N)
    return zip(images.split(B), (index % C).split(B), index.split(B))


def sgd(task, momentum=0.9):
    return torch.optim.SGD(task.get_trainable_module().parameters(), 0.1, momentum=momentum)


def step(task, optimizer, seed, part=slice(None), size=16):
    images, targets, index = (rows[part] for rows in batch(seed, size))
    task.train()
    result = task(images, targets) if isinstance(task, ClassificationTask) else task(images, targets, index)
    optimizer.zero_grad()
    result['loss'].backward()
    optimizer.step()
    return result


def test_is_a_timm_task_with_named_results():
    task = build()
    assert isinstance(task, TrainingTask) and task.stage == 'instance'
    result = task.train()(*batch())
    assert set(result) == {'loss', 'output', 'task_loss', 'ctc_loss'}
    torch.testing.assert_close(result['loss'], result['task_loss'] + 0.5 * result['ctc_loss'])
    images, targets, _ = batch()
    torch.testing.assert_close(result['task_loss'], F.cross_entropy(result['output'], targets))


def test_without_weights_it_is_plain_classification():
    # The same steps through timm's own task give the same model.
    task = build(instance_weight=0, temporal_weight=0)
    plain = ClassificationTask(copy.deepcopy(task.model))
    optimizers = sgd(task), sgd(plain)
    for seed in range(3):
        if seed == 2:
            task.start_temporal_stage(loader())
        step(task, optimizers[0], seed)
        step(plain, optimizers[1], seed)
    for (name, value), other in zip(task.model.state_dict().items(), plain.trainable_module.state_dict().values()):
        assert torch.equal(value, other), name


def test_temporal_stage_freezes_the_past():
    task = build()
    optimizer = sgd(task)
    for seed in range(3):
        step(task, optimizer, seed)
    projectors = copy.deepcopy(task.temporal.present_projector)
    frozen = copy.deepcopy(task.model).eval()
    task.start_temporal_stage(loader())
    assert task.stage == 'temporal'
    # Both banks hold the frozen model's embeddings of every image.
    for images, _, index in loader():
        features, _ = features_and_logits(frozen, images)
        expected = F.normalize(projectors(features), dim=1)
        torch.testing.assert_close(task.temporal.present_bank[index], expected.detach(), rtol=1e-4, atol=1e-5)
    for seed in range(3, 6):
        result = step(task, optimizer, seed)
        torch.testing.assert_close(result['loss'].detach(), result['task_loss'] + result['ctc_loss'])
    for (name, value), past in zip(frozen.state_dict().items(), task.information_bank.model.state_dict().values()):
        assert torch.equal(value, past), name
    assert not task.information_bank.training
    assert not torch.equal(task.model.fc.weight, task.information_bank.model.fc.weight)
    assert task.temporal.past_projector.weight.grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match='already'):
        task.start_temporal_stage(loader())


@pytest.mark.parametrize('train_projector', [False, True])
def test_each_stage_leaves_the_others_projectors_alone(train_projector):
    """And the instance stage its own, unless it is to train it."""
    task = build(train_projector=train_projector)
    parts = task.instance.projector, task.temporal
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for stage, changed in (('instance', (train_projector, False)), ('temporal', (False, True))):
        before = copy.deepcopy([part.state_dict() for part in parts])
        task.prepare_epoch(stage, list)
        step(task, optimizer, 0)
        for part, old, change in zip(parts, before, changed):
            same = [torch.equal(value, old[key]) for key, value in part.state_dict().items()]
            assert not any(same) if change else all(same), stage


class Files:
    """Files of a state, as the trainer reads them."""

    def __init__(self, files):
        self.names, self.read = list(files), files.__getitem__


@pytest.mark.parametrize('negatives', ['sampled', 'shared'])
@pytest.mark.parametrize('when', ['instance', 'temporal'])
def test_state_continues_where_it_stopped(when, negatives):
    """By timm's checkpoint or by the trainer's files beside the trained module's state: the same losses after it."""
    tasks = build(negatives=negatives), build(seed=7, negatives=negatives), build(seed=8, negatives=negatives)
    optimizers = [sgd(each) for each in tasks]
    task, of_checkpoint, of_files = tasks
    step(task, optimizers[0], 0)
    assert not task.prepare_epoch('instance', loader)
    assert task.prepare_epoch(when, loader) == (when == 'temporal')
    assert not task.prepare_epoch(when, lambda: pytest.fail('started already'))
    step(task, optimizers[0], 1)
    files = task.state_files(is_main_process=True)
    assert list(files) == ['information_bank'] * (when == 'temporal') and task.state_files(False) == {}
    of_files.get_trainable_module().load_state_dict(copy.deepcopy(task.get_trainable_module().state_dict()))
    of_files.load_state_files(when, task.rank_state(), Files(copy.deepcopy(files)))
    saved = copy.deepcopy(task.get_checkpoint_state())
    of_checkpoint.load_checkpoint_state(saved['state_dict'], saved['task_state'])
    for optimizer in optimizers[1:]:
        optimizer.load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    assert of_files.stage == of_checkpoint.stage == when
    expected, *others = [[step(t, o, seed)['loss'].item() for seed in (2, 3)] for t, o in zip(tasks, optimizers)]
    assert others == [expected, expected]
    with pytest.raises(UserError, match='was saved with `split_banks=True`'):
        task.load_state_files('instance', {}, Files({'banks_00000': {}}))


def test_banks_wait_for_the_optimizer():
    """Two batches are one step of a bank, and a step that is discarded leaves no trace."""
    task, at_once = build(), build()
    task.start_training()
    for each in (task, at_once):
        each.train(), each.model.eval()
    before = task.instance.bank.clone()
    batches = [batch(0), batch(1)]
    for end in (task.step_discarded, lambda: task.step_taken(1)):
        for one in batches:
            task.run_batch((*one, None))
        assert torch.equal(task.instance.bank, before)
        end()
    at_once(*(torch.cat(parts) for parts in zip(*batches)))
    assert not torch.equal(task.instance.bank, before)
    torch.testing.assert_close(task.instance.bank, at_once.instance.bank)


def test_mixed_images_mix_the_instance_term():
    # One lambda for all: the loss is the mean of both indices' losses, weighted by it.
    torch.manual_seed(0)
    task = build().eval()
    images, targets, index = batch()
    lam = torch.full((B,), 0.3)
    soft = 0.3 * F.one_hot(targets, C) + 0.7 * F.one_hot(targets.flip(0), C)
    task.criterion = timm.loss.SoftTargetCrossEntropy()
    result = task(images, soft.float(), index, lam)
    features, logits = features_and_logits(task.model, images)
    own, partner = task.instance(features, index), task.instance(features, index.flip(0))
    torch.testing.assert_close(result['ctc_loss'], (0.3 * own + 0.7 * partner).detach())
    expected = 0.3 * F.cross_entropy(logits, targets) + 0.7 * F.cross_entropy(logits, targets.flip(0))
    torch.testing.assert_close(result['task_loss'], expected.detach())


def test_timm_criteria():
    images, targets, index = batch()
    smoothed = build(criterion_kwargs={'smoothing': 0.2})(images, targets, index)
    expected = F.cross_entropy(smoothed['output'], targets, label_smoothing=0.2)
    torch.testing.assert_close(smoothed['task_loss'], expected.detach())
    binary = build(criterion_kwargs={'loss_type': 'bce', 'smoothing': 0.0})(images, targets, index)
    expected = F.binary_cross_entropy_with_logits(binary['output'], F.one_hot(targets, C).float())
    torch.testing.assert_close(binary['task_loss'], expected.detach())


def test_clipping_without_the_head_leaves_out_the_classifier():
    task = build()
    everything = {id(p) for p in task.get_trainable_module().parameters()}
    assert {id(p) for p in task.get_clip_parameters()} == everything
    without = {id(p) for p in task.get_clip_parameters(exclude_head=True)}
    assert everything - without == {id(task.model.fc.weight), id(task.model.fc.bias)}


def test_moving_average_is_of_the_backbone():
    task = build()
    task.setup_ema(decay=0.5)
    start = task.model.fc.weight.clone()
    step(task, sgd(task), 0)
    task.update_ema()
    average = task.get_eval_model(ema=True)
    torch.testing.assert_close(average.module.fc.weight, (start + task.model.fc.weight) / 2)
    assert set(average.module.state_dict()) == set(task.model.state_dict())


def test_compiled_body_gives_the_same_losses_and_names():
    plain, compiled = build(), build()
    compiled.compile(backend='eager')
    for stage in ('instance', 'temporal'):
        losses = [task.train()(*batch())['loss'].item() for task in (plain, compiled)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5), stage
        if stage == 'instance':
            for task in (plain, compiled):
                task.start_temporal_stage(loader())
    assert list(compiled.get_trainable_module().state_dict()) == list(plain.get_trainable_module().state_dict())


@pytest.mark.parametrize(
    'options, words',
    [
        ({'labels': torch.arange(N) % (C + 1)}, f'label {C} is outside'),
        ({'instance_temperature': 0}, '`instance_temperature` 0: must be at least 0.012'),
        ({'temporal_temperature': 0.005}, '`temporal_temperature` 0.005: must be at least 0.012'),
        ({'instance_momentum': -0.1}, '`instance_momentum` -0.1'),
        ({'temporal_momentum': 1.0}, '`temporal_momentum` 1.0: must be at least 0 and below 1'),
        ({'instance_weight': -1}, '`instance_weight` -1'),
        ({'past_features': 'memory'}, "`past_features` 'memory': must be one of model, bank"),
        ({'model': timm.create_model('cifar_resnet20', num_classes=0)}, 'head'),
    ],
)
def test_what_cannot_work(options, words):
    model = timm.create_model('cifar_resnet20', num_classes=C)
    with pytest.raises(UserError, match=words):
        CTCTask(**{'model': model, 'labels': torch.arange(N) % C, **options})


def _training(rank, world):
    torch.manual_seed(0)
    # Without batch norm, whose statistics are each process's own, processes and their union agree.
    model = timm.create_model('test_vit', num_classes=C, img_size=32, global_pool='avg')
    task = CTCTask(model, labels=torch.arange(N) % C, negatives='shared', **SMALL).prepare_distributed()
    optimizer, losses, part = sgd(task, 0), torch.zeros(4), slice(rank * B // world, (rank + 1) * B // world)
    for seed in range(4):
        if seed == 2:
            task.start_temporal_stage([rows[part] for rows in each] for each in loader(size=32))
        losses[seed] = step(task, optimizer, seed, part, 32)['loss'].detach() / world
    torch.distributed.all_reduce(losses)
    return losses, task.instance.bank, task.temporal.present_bank


def test_two_processes_train_as_one(tmp_path):
    (one,) = run_processes(_training, 1, tmp_path)
    first, second = run_processes(_training, 2, tmp_path)
    torch.testing.assert_close(one[0], first[0], rtol=1e-4, atol=1e-5)
    for alone, a, b in zip(one[1:], first[1:], second[1:]):
        assert torch.equal(a, b)
        torch.testing.assert_close(alone, a, rtol=1e-3, atol=1e-4)


def test_stored_past_needs_no_second_pass():
    calls = []
    for past_features in ('model', 'bank'):
        task = build(past_features=past_features, negatives='all')
        task.start_temporal_stage(loader())
        past_bank = task.temporal.past_bank.clone()
        task.information_bank.register_forward_hook(lambda *_: calls.append(past_features))  # noqa: B023
        assert step(task, sgd(task), seed=0)['ctc_loss'] > 0
        assert torch.equal(task.temporal.past_bank, past_bank) == (past_features == 'bank')
    assert calls == ['model']


@pytest.mark.parametrize('mixed', [False, True])
@pytest.mark.parametrize(
    'stage, negatives, K, shards',
    [
        ('instance', 'all', 12, 1),
        ('instance', 'all', 12, 2),
        ('temporal', 'all', 12, 1),
        ('temporal', 'shared', 20, 1),
        ('temporal', 'shared', 2, 1),
        ('temporal', 'sampled', 2, 1),
        ('temporal', 'sampled', 30, 1),
        ('temporal', 'sampled', 100, 1),
    ],
)
def test_no_step_waits_for_the_device(stage, negatives, K, shards, mixed):
    """Fake tensors have no values: reading one on the host, which a GPU would have to be waited for, raises."""
    task, lam = build(negatives=negatives, num_negatives=K), torch.rand(B) if mixed else None
    if stage == 'temporal':
        task.start_temporal_stage(loader())
    task.train().start_training()
    for fake in (False, False, True):  # the first two temporal steps look whether the normalizers are set
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext():
            if shards > 1 and fake:  # as one rank updates its rows of the batches of all
                task.instance.shard = BankShard(2 * N, 1, shards)
                task.instance._update('bank', torch.randint(N, (B,)), torch.randn(B, 16))
            else:
                task(*batch(), lam)['loss'].backward()
            task.step_taken(1)
