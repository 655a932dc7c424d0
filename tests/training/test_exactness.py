"""The same numbers however a run is cut up: into processes, micro-batches, loader workers; and from the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file

from ctc_timm import CTCTask
from ctc_timm.models.settings import BatchNormSettings
from ctc_timm.training import build as building
from ctc_timm.training.settings import TrainSettings
from ctc_timm.utils.settings import build, replace
from processes import run_processes, synchronize
from runs import forget_processes

# Ten steps in each of two epochs of 160 images; `all` draws nothing that could differ, and GELU has no kink whose side
# depends on the order of a sum.
SMALL: dict[str, Any] = dict(
    dataset='digits', train_split='train[:160]', val_split='validation[:70]', model='test_resnet', img_size=16,
    mean=0.3, std=0.4, workers=0, num_negatives=16, lr=0.01, smoothing=0.0, epochs=2, temporal_start_epoch=1,
    negatives='all', model_kwargs={'act_layer': 'gelu'},
)  # fmt: skip


@pytest.fixture(autouse=True)
def sync_bn_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `sync_bn` work on the CPU."""
    prepare = building.prepare_model

    def prepare_model(model: Any, execution: Any, norms: BatchNormSettings, *place: Any) -> Any:
        prepared = prepare(model, execution, replace(norms, sync_bn=False), *place)
        return synchronize(prepared) if norms.sync_bn else prepared

    monkeypatch.setattr(building, 'prepare_model', prepare_model)


def train(**values: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The loss of each step over all processes, and what the run ends with."""
    forget_processes()
    trainer = building.build_trainer(build(TrainSettings, {**SMALL, **values}))
    steps: list[float] = []
    update = trainer.steps.update

    def recorded(*args: Any) -> Any:
        step = update(*args)
        steps.append(float(step.losses['loss']) / trainer.accumulation_steps)
        return step

    trainer.steps.update = recorded  # type: ignore[method-assign]
    trainer.fit()
    mean = torch.tensor(gather_object([steps])).mean(dim=0).tolist()
    task: Any = trainer.task
    state = {name: value.detach().clone() for name, value in task.model.state_dict().items()}
    return mean, {**state, **{name: bank.clone() for name, bank in task.banks().items()}}


@pytest.fixture(scope='module')
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One process with the whole batch and timm's own batch norm."""
    return train(batch_size=16, output=tmp_path_factory.mktemp('runs'), experiment='one')


@pytest.mark.parametrize('world', [2, 4])
def test_processes(alone: Any, tmp_path: Path, world: int) -> None:
    """The same global batch over 2 and 4: the losses of 20 steps, and banks that are bitwise equal between them."""
    losses, state = alone
    values: dict[str, Any] = dict(sync_bn=True, batch_size=16 // world, output=tmp_path / 'runs', experiment='several')
    found = run_processes(lambda rank, world: train(**values), world, tmp_path)
    assert len(losses) == 20
    for theirs, values in found:
        assert theirs == pytest.approx(losses, rel=2e-6, abs=1e-5)  # float32 has 1e-6 of a loss of ten
        for name, value in values.items():
            torch.testing.assert_close(value, state[name], atol=1e-4, rtol=1e-4, msg=name)
        for name in ('instance.bank', 'temporal.present_bank', 'temporal.past_bank'):
            assert torch.equal(values[name], found[0][1][name])
            assert float((values[name] - state[name]).abs().max()) < 1e-5


def test_accumulation(tmp_path: Path) -> None:
    """Four batches of 16 are one of 64, for weights and banks alike; with layer norm, as batch norm sees the parts."""
    values = dict(train_split='train[:640]', model='test_vit', img_size=32, model_kwargs={'img_size': 32})
    values |= dict(temporal_weight=0.0, output=tmp_path)
    whole, state = train(**values, batch_size=64, experiment='whole')
    parts, ended = train(**values, batch_size=16, grad_accum_steps=4, experiment='parts')
    assert len(whole) == 20 and parts == pytest.approx(whole, abs=1e-5)
    for name, value in ended.items():
        assert float((value - state[name]).abs().max()) < 1e-5, name


def test_accumulation_of_the_temporal_term() -> None:
    """As above with the normalizers set, which a stage's first batch sets: its gradient and both banks."""
    labels = torch.arange(64) % 4

    def step(parts: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        model = timm.create_model('test_vit', num_classes=4)
        task = CTCTask(model, labels, num_negatives=32, negatives='all', verbose=False)
        images = torch.randn(64, 3, 160, 160, generator=torch.Generator().manual_seed(1))
        task.start_temporal_stage([(images, labels, torch.arange(64))])
        task.temporal.log_present_normalizer.fill_(4)
        task.temporal.log_past_normalizer.fill_(4.1)
        task.train().start_training()
        for index in torch.randperm(64, generator=torch.Generator().manual_seed(2)).split(64 // parts):
            (task(images[index], labels[index], index)['loss'] / parts).backward()
        task.step_taken(1)
        gradients = [p.grad.flatten() for p in task.trainable_module.parameters() if p.grad is not None]
        return torch.cat(gradients), {name: bank.clone() for name, bank in task.banks().items()}

    (whole, banks), (parts, theirs) = step(1), step(4)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)
    for name, bank in banks.items():
        torch.testing.assert_close(theirs[name], bank, atol=1e-6, rtol=0)


@pytest.mark.parametrize('workers', [0, 2])
def test_the_same_seed_is_the_same_run(tmp_path_factory: pytest.TempPathFactory, workers: int) -> None:
    """Bit for bit, with dropout, erasing and mixing, whatever the number of workers; another seed differs."""

    def run(**more: Any) -> dict[str, torch.Tensor]:
        folder = tmp_path_factory.mktemp('runs')
        random = dict(drop=0.2, reprob=0.3, mixup=0.2, negatives='sampled')
        train(**random, output=folder, experiment='x', batch_size=32, **more)
        return load_file(folder / 'x' / 'last.safetensors')

    first, second = run(), run(workers=workers)
    assert all(torch.equal(first[name], second[name]) for name in first)
    if not workers:
        other = run(seed=7)
        assert not torch.equal(first['fc.weight'], other['fc.weight'])


def test_fewer_processes_go_on_within_an_epoch(tmp_path: Path) -> None:
    """With batches of another size no image of the epoch is left out: the run goes on at the batch before."""
    values = dict(SMALL, output=tmp_path, experiment='x', checkpoint_steps=3)
    trainer = building.build_trainer(build(TrainSettings, {**values, 'batch_size': 16}))
    save = trainer._save_state

    def stop() -> None:
        save()
        raise KeyboardInterrupt

    trainer._save_state = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    forget_processes()
    resumed = building.build_trainer(build(TrainSettings, {**values, 'batch_size': 32, 'resume': 'auto'}))
    assert (resumed.state.epoch, resumed.state.batch) == (0, 1)  # 48 images are one batch of 32 and a half
    resumed.loader.set_epoch(0, resumed.state.batch)
    seen = {int(i) for _, _, index in resumed.loader for i in index}
    trainer.loader.set_epoch(0)
    order = [int(i) for batch in trainer.loader.batches for _, i in batch]
    assert set(order[32:]) == seen
