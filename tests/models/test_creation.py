"""Models from settings and from wherever their weights are, against plain timm."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from ctc_timm.data.settings import DataSettings
from ctc_timm.models.creation import check_compiler, create_model, prepare_model
from ctc_timm.models.loading import load_model, named_source
from ctc_timm.models.settings import (
    ArchitectureSettings,
    BatchNormSettings,
    ExecutionSettings,
    ModelSettings,
    SourceSettings,
)
from ctc_timm.runs import Run
from ctc_timm.utils.errors import UserError


def create(model='test_resnet', num_classes=10, data=None, built=None, **settings):
    torch.manual_seed(0)
    chosen = ModelSettings(model, **settings)
    return create_model(chosen, ArchitectureSettings(**(built or {})), DataSettings(**(data or {})), num_classes)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_settings_mean_what_they_mean_in_timm():
    ours = create(data={'in_chans': 1}, built={'drop': 0.3, 'drop_path': 0.1, 'model_kwargs': {'act_layer': 'gelu'}})
    torch.manual_seed(0)
    options = dict(num_classes=10, in_chans=1, drop_rate=0.3, drop_path_rate=0.1, act_layer='gelu')
    plain = timm.create_model('test_resnet', **options)
    assert str(ours) == str(plain) and same(ours, plain)
    assert create('test_vit', data={'img_size': 32}).patch_embed.img_size == (32, 32)
    assert create(num_classes=None).num_classes == 1000


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'model': 'resnet55'}, '`model` resnet55: unknown to timm; nearest: resnet5'),
        ({'model': 'local-dir:nowhere'}, '`model` local-dir:nowhere: Config file not found'),
        ({'model': 'test_resnet_ctc', 'pretrained': True}, '`model` test_resnet_ctc: no CTC weights are cataloged'),
        ({'num_classes': 0}, '`model` test_resnet: has no classification head to train'),
        ({'built': {'model_kwargs': {'no_such': 1}}}, '`model` test_resnet: .*no_such'),
        ({'initial_checkpoint': 'none.pth'}, '`initial_checkpoint` none.pth: no such file'),
    ],
)
def test_what_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        create(**settings)


def test_execution():
    cpu, execution, norms = torch.device('cpu'), ExecutionSettings(channels_last=True), BatchNormSettings(sync_bn=True)
    model = prepare_model(create(), execution, norms, cpu, 1)
    assert model.conv1[0].weight.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(UserError, match='`sync_bn`: needs a GPU'):
        prepare_model(model, execution, norms, cpu, 2)
    with pytest.raises(UserError, match='`grad_checkpointing`: Linear has none'):
        prepare_model(torch.nn.Linear(1, 1), ExecutionSettings(grad_checkpointing=True), norms, cpu, 1)
    check_compiler('inductor')
    with pytest.raises(UserError, match='`torchcompile` inducto: no such backend; nearest: inductor'):
        check_compiler('inducto')


def test_a_model_from_wherever_its_weights_are(tmp_path):
    run, model = Run(tmp_path / 'mine'), create(data={'in_chans': 1})
    run.create({})
    run.write_config(model, {'input_size': (1, 16, 16)}, {})
    for name in ('best', 'weights/epoch-0003'):
        run.save_weights(name, model, {'architecture': 'test_resnet', 'num_classes': 10})
    save_file(model.state_dict(), tmp_path / 'plain.safetensors')
    for source, name in (
        ((run,), 'mine-best'),
        ((str(run),), 'mine-best'),
        ((run.kept_weights()[3],), 'mine-epoch-0003'),
        ((tmp_path / 'plain.safetensors', 'test_resnet'), 'plain'),
        ((f'local-dir:{run}',), None),
    ):
        options = {} if name != 'plain' else {'num_classes': 10, 'in_chans': 1}
        loaded = load_model(*source, **options)
        assert same(loaded.model, model) and not loaded.model.training and loaded.name == (name or loaded.name)
        assert loaded.run == (run.path.resolve() if name and name.startswith('mine') else None)
    for source, message in (
        ('none.safetensors', '`source` none.safetensors: no such file'),
        ('test_resnett', 'no run folder, weights file or timm model of that name; nearest: test_resnet'),
        (tmp_path, 'a folder without best.safetensors or last.safetensors is no run'),
        (tmp_path / 'plain.safetensors', 'does not say which architecture it is for; name it with `model`'),
    ):
        with pytest.raises(UserError, match=message):
            load_model(source)


def test_the_setting_that_names_a_source():
    assert named_source(SourceSettings(source='a', model='b')) == ('a', 'b', 'source')
    assert named_source(SourceSettings(checkpoint='a', model='b')) == ('a', 'b', 'checkpoint')
    assert named_source(SourceSettings(model='b')) == ('b', '', 'model')
    with pytest.raises(UserError, match='name a model'):
        named_source(SourceSettings())
