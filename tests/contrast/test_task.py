"""The task: its two stages, what it remembers, and that without CTC it is timm's own."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from processes import run_processes
from timm.task import ClassificationTask, TrainingTask

from ctc_timm import CTCTask, features_and_logits
from ctc_timm.utils.errors import UserError

N, B, C = 48, 8, 6
SMALL = {'embed_dim': 16, 'num_negatives': 12}


def build(**options):
    torch.manual_seed(0)
    model = timm.create_model('cifar_resnet20', num_classes=C)
    return CTCTask(model, labels=torch.arange(N) % C, **{**SMALL, **options})


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(N, generator=generator)[:B]
    return torch.randn(B, 3, 16, 16, generator=generator), index % C, index


def loader():
    generator = torch.Generator().manual_seed(9)
    images = torch.randn(N, 3, 16, 16, generator=generator)
    for start in range(0, N, B):
        index = torch.arange(start, start + B)
        yield images[start : start + B], index % C, index


def step(task, optimizer, seed, **more):
    task.train()
    result = task(*batch(seed), **more)
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
    optimizers = [torch.optim.SGD(t.get_trainable_module().parameters(), 0.1) for t in (task, plain)]
    for seed in range(3):
        if seed == 2:
            task.start_temporal_stage(loader())
        step(task, optimizers[0], seed)
        images, targets, _ = batch(seed)
        plain.train()
        optimizers[1].zero_grad()
        plain(images, targets)['loss'].backward()
        optimizers[1].step()
    for (name, value), other in zip(task.model.state_dict().items(), plain.trainable_module.state_dict().values()):
        assert torch.equal(value, other), name


def test_temporal_stage_freezes_the_past():
    task = build()
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), 0.1, momentum=0.9)
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


def test_each_stage_leaves_the_others_projectors_alone():
    task = build()
    before = copy.deepcopy({'i': task.instance.projector.state_dict(), 't': task.temporal.state_dict()})
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    step(task, optimizer, 0)
    for key, value in task.temporal.state_dict().items():
        assert torch.equal(value, before['t'][key]), key
    task.start_temporal_stage(loader())
    step(task, optimizer, 1)
    for key, value in task.instance.projector.state_dict().items():
        assert torch.equal(value, before['i'][key]), key
    assert not torch.equal(task.temporal.present_projector.weight, before['t']['present_projector.weight'])


def test_the_instance_projector_is_trained_when_asked_to():
    task = build(train_projector=True)
    before = task.instance.projector.weight.clone()
    step(task, torch.optim.SGD(task.get_trainable_module().parameters(), 0.1), 0)
    assert not torch.equal(task.instance.projector.weight, before)


@pytest.mark.parametrize('negatives', ['sampled', 'shared'])
@pytest.mark.parametrize('when', ['instance', 'temporal'])
def test_state_continues_where_it_stopped(negatives, when):
    def start():
        task = build(negatives=negatives)
        return task, torch.optim.SGD(task.get_trainable_module().parameters(), 0.1, momentum=0.9)

    task, optimizer = start()
    step(task, optimizer, 0)
    if when == 'temporal':
        task.start_temporal_stage(loader())
    step(task, optimizer, 1)
    saved = copy.deepcopy((task.get_checkpoint_state(), optimizer.state_dict()))
    expected = [step(task, optimizer, seed)['loss'].item() for seed in (2, 3)]

    torch.manual_seed(5)
    task, optimizer = start()
    task.load_checkpoint_state(saved[0]['state_dict'], saved[0]['task_state'])
    optimizer.load_state_dict(saved[1])
    assert task.stage == when
    assert [step(task, optimizer, seed)['loss'].item() for seed in (2, 3)] == expected


class Files:
    """Files of a state, as the trainer reads them."""

    def __init__(self, *ranks):
        self.files = {name: file for files in ranks for name, file in files.items()}
        self.names = list(self.files)

    def read(self, name):
        return self.files[name]


@pytest.mark.parametrize('when', ['instance', 'temporal'])
def test_state_files_continue_where_it_stopped(when):
    """With the trained module's own state, which the trainer keeps: the same losses after it."""
    task, other = build(), build(seed=7)
    optimizers = [torch.optim.SGD(t.get_trainable_module().parameters(), 0.1) for t in (task, other)]
    step(task, optimizers[0], 0)
    assert not task.prepare_epoch('instance', loader)
    assert task.prepare_epoch(when, loader) == (when == 'temporal')
    assert not task.prepare_epoch(when, lambda: pytest.fail('started already'))
    step(task, optimizers[0], 1)
    files = task.state_files(is_main_process=True)
    assert list(files) == ['information_bank'] * (when == 'temporal') and task.state_files(False) == {}
    other.get_trainable_module().load_state_dict(copy.deepcopy(task.get_trainable_module().state_dict()))
    other.load_state_files(when, task.rank_state(), Files(copy.deepcopy(files)))
    assert other.stage == when
    losses = [[step(t, o, seed)['loss'].item() for seed in (2, 3)] for t, o in zip((task, other), optimizers)]
    assert losses[0] == losses[1]
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
    for count, end in enumerate((task.step_discarded, lambda: task.step_taken(1))):
        for images, targets, index in batches:
            task.run_batch((images, targets, index, None))
        assert torch.equal(task.instance.bank, before), count
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


@pytest.mark.parametrize(
    'options, truth',
    [
        ({'smoothing': 0.2}, lambda x, y: F.cross_entropy(x, y, label_smoothing=0.2)),
        (
            {'loss_type': 'bce', 'smoothing': 0.0},
            lambda x, y: F.binary_cross_entropy_with_logits(x, F.one_hot(y, C).float()),
        ),
    ],
)
def test_timm_criteria(options, truth):
    task = build(criterion_kwargs=options)
    images, targets, index = batch()
    result = task(images, targets, index)
    torch.testing.assert_close(result['task_loss'], truth(result['output'], targets).detach())


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
    step(task, torch.optim.SGD(task.get_trainable_module().parameters(), 0.1), 0)
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
        ({'labels': torch.zeros(N, dtype=torch.long)}, 'fewer than two classes'),
        ({'num_negatives': 0}, '`num_negatives` 0'),
        ({'instance_temperature': 0}, '`instance_temperature` 0: must be above 0'),
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
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), 0.05)
    losses = []
    part = slice(rank * B // world, (rank + 1) * B // world)
    for seed in range(4):
        if seed == 2:
            batches = [(torch.randn(B, 3, 32, 32), None, torch.arange(s, s + B)) for s in range(0, N, B)]
            task.start_temporal_stage([(x[part], None, i[part]) for x, _, i in batches])
        generator = torch.Generator().manual_seed(seed)
        index = torch.randperm(N, generator=generator)[:B]
        images = torch.randn(B, 3, 32, 32, generator=generator)
        result = task.train()(images[part], (index % C)[part], index[part])
        optimizer.zero_grad()
        result['loss'].backward()
        optimizer.step()
        loss = result['loss'].detach()
        torch.distributed.all_reduce(loss)
        losses.append(loss / world)
    return torch.stack(losses), task.instance.bank, task.temporal.present_bank


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
        optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), 0.1)
        assert step(task, optimizer, seed=0)['ctc_loss'] > 0
        assert torch.equal(task.temporal.past_bank, past_bank) == (past_features == 'bank')
    assert calls == ['model']
