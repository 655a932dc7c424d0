"""Models from settings and from wherever their weights are, against plain timm."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

from ctc_timm.data.settings import DataSettings
from ctc_timm.models.backbones import features_and_logits
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
    def named(**given):
        found = named_source(SourceSettings(**given))
        return found['source'], found['architecture'], found['setting'], found['use_ema']

    assert named(source='a', model='b') == ('a', 'b', 'source', False)
    assert named(checkpoint='a', model='b', use_ema=True) == ('a', 'b', 'checkpoint', True)
    assert named(model='b') == ('b', '', 'model', False)
    for two in (
        {'source': 'runs/a', 'checkpoint': 'b.pth'},
        {'source': 'a', 'checkpoint': 'b', 'model': 'c'},
        {'source': 'test_vit', 'model': 'test_resnet'},
        {'source': 'hf-hub:a/b', 'model': 'test_resnet'},
        {'checkpoint': 'a.pth', 'model': 'local-dir:b'},
    ):
        with pytest.raises(UserError, match='two models are named'):
            named(**two)
    with pytest.raises(UserError, match='name a model'):
        named_source(SourceSettings())


def checkpoints(folder, **options):
    """A model's weights in the shapes in which they come; the model."""
    torch.manual_seed(1)
    model, average = (timm.create_model('test_resnet', **options) for _ in range(2))
    weights = model.state_dict()
    backbone = {name: value for name, value in weights.items() if not name.startswith('fc.')}
    torch.save({'state_dict': weights, 'state_dict_ema': average.state_dict()}, folder / 'both.pth.tar')
    torch.save({'model': weights, 'model_ema': average.state_dict()}, folder / 'other names.pth')
    torch.save({'state_dict': {f'module.{k}': v for k, v in backbone.items()}}, folder / 'no head.pth')
    torch.save({**backbone, 'decoder.weight': torch.ones(2), 'fc.mlp.weight': torch.ones(2)}, folder / 'more.bin')
    torch.save({k: v for k, v in weights.items() if not k.startswith('layer3.')}, folder / 'less.pth')
    torch.save({**weights, 'layer3.9.conv1.weight': torch.ones(2)}, folder / 'deeper.pth')
    torch.save({'net': weights, 'epoch': 3}, folder / 'unknown.pth')
    return model, average


@pytest.mark.parametrize('file', ['both.pth.tar', 'other names.pth'])
def test_a_moving_average_is_taken_when_asked_for(tmp_path, caplog, file):
    models = checkpoints(tmp_path, num_classes=10)
    for use_ema, model in zip((False, True), models):
        with caplog.at_level('INFO'):
            loaded = load_model(tmp_path / file, 'test_resnet', use_ema=use_ema)  # classes are the file's
        assert same(loaded.model, model) and f'with use_ema {use_ema} loads' in caplog.messages[-1]
        assert same(create(initial_checkpoint=str(tmp_path / file), use_ema=use_ema), model)
    plain = timm.create_model('test_resnet', num_classes=10, checkpoint_path=tmp_path / file)
    assert same(create(initial_checkpoint=str(tmp_path / file)), plain)  # timm's own default


def test_a_classifier_that_is_not_used_is_not_compared(tmp_path):
    model, _ = checkpoints(tmp_path, num_classes=7, in_chans=2)
    images = torch.randn(2, 2, 32, 32)
    for file in ('both.pth.tar', 'no head.pth', 'more.bin'):
        found = load_model(tmp_path / file, 'test_resnet', head=False).model  # channels are the file's
        assert torch.equal(found.forward_features(images), model.eval().forward_features(images)), file
        assert file.startswith('both') or not found.fc.weight.any()
    for file, head, message in (
        ('no head.pth', True, 'not weights of test_resnet: missing: fc.bias, fc.weight; the rest fits'),
        ('more.bin', True, 'missing: fc.bias, fc.weight; unexpected: decoder.weight, fc.mlp.weight'),
        ('less.pth', False, r'missing: layer3.0.bn1.bias, .* and \d+ more'),
        ('deeper.pth', False, 'unexpected: layer3.9.conv1.weight'),
        ('unknown.pth', False, 'holds no weights under the names that timm gives them'),
    ):
        with pytest.raises(UserError, match=message):
            load_model(tmp_path / file, 'test_resnet', head=head)
    narrow = load_model(tmp_path / 'both.pth.tar', 'test_resnet', head=False, in_chans=1).model
    assert torch.equal(narrow.conv1[0].weight, model.conv1[0].weight.sum(1, keepdim=True))


def test_names_of_other_libraries_are_changed_as_timm_does(tmp_path):
    """Torchvision's DenseNet once, and a vision transformer of another image size."""
    for name, options, old in (
        ('densenet121', {}, lambda key: key.replace('.norm1.', '.norm.1.')),
        ('test_vit', {'img_size': 96}, lambda key: key),
    ):
        torch.manual_seed(0)
        weights = timm.create_model(name, num_classes=4, **options).state_dict()
        kept = {old(key): value for key, value in weights.items() if 'num_batches' not in key}
        torch.save(kept, tmp_path / 'a.pth')
        overlay = {'file': str(tmp_path / 'a.pth'), 'num_classes': 4}
        plain = timm.create_model(name, pretrained=True, num_classes=4, pretrained_cfg_overlay=overlay)
        assert same(load_model(tmp_path / 'a.pth', name).model, plain)


@pytest.mark.parametrize('in_chans', [1, 3, 5])
@pytest.mark.parametrize('num_classes', [4, 7])
def test_a_file_in_place_of_pretrained_weights(tmp_path, in_chans, num_classes):
    checkpoints(tmp_path, num_classes=7)
    file = str(tmp_path / 'both.pth.tar')
    ours = create(num_classes=num_classes, data={'in_chans': in_chans}, pretrained_path=file)
    torch.manual_seed(0)
    overlay = {'file': file, 'num_classes': -1}  # as timm's train script says it
    options = dict(num_classes=num_classes, in_chans=in_chans)
    assert same(ours, timm.create_model('test_resnet', pretrained=True, pretrained_cfg_overlay=overlay, **options))
    with pytest.raises(UserError, match='`pretrained_path` .*less.pth: not weights of test_resnet: missing: layer3'):
        create(pretrained_path=str(tmp_path / 'less.pth'))


@pytest.mark.parametrize('name', ['model.safetensors', 'pytorch_model.bin', 'mine.pth'])
def test_a_folder_that_timm_would_load(tmp_path, name):
    model, folder = timm.create_model('test_resnet', num_classes=6), tmp_path / 'a folder'
    folder.mkdir()
    save_config_for_hf(model, folder / 'config.json')
    with pytest.raises(UserError, match='no weights beside config.json'):
        load_model(folder)
    (save_file if name.endswith('safetensors') else torch.save)(model.state_dict(), folder / name)
    for source in (folder, f'local-dir:{folder}'):
        loaded = load_model(source)
        assert same(loaded.model, model) and loaded.run is None and loaded.weights == f'local-dir:{folder}'
    assert same(load_model(folder / name, 'test_resnet').model, model)  # by the config.json beside it
    with pytest.raises(UserError, match='is for test_resnet, not for `model` test_vit'):
        load_model(folder / name, 'test_vit')


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('interpolation', 'spline', "interpolation cannot be 'spline'; use one of nearest, bilinear, bicubic, box"),
        ('interpolation', 3, 'interpolation cannot be 3; use one of'),
        ('crop_mode', 'middle', "crop_mode cannot be 'middle'; use one of center, border, squash"),
        ('crop_pct', 0, 'crop_pct cannot be 0; use a number from 0.05 to 2'),
        ('crop_pct', 1e-9, 'crop_pct cannot be 1e-09; use a number from 0.05 to 2'),
        ('input_size', [3, 224], r'input_size cannot be \[3, 224\]; use three whole numbers from 1 to 16384'),
        ('input_size', [3, 224, 10**9], 'input_size cannot be .*; use three whole numbers'),
        ('mean', [0.5, 0.5], 'mean and std must be of the same length'),
        ('std', [0.2, 0.0, 0.2], 'std cannot be .*; use numbers from 1e-06 to 1e'),
        ('num_classes', 10**9, 'num_classes cannot be 1000000000; use a whole number'),
    ],
)
def test_a_config_of_a_stranger(tmp_path, key, value, message):
    model = timm.create_model('test_resnet', num_classes=6)
    save_config_for_hf(model, tmp_path / 'config.json')
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    config = json.loads((tmp_path / 'config.json').read_text())
    config['pretrained_cfg'][key] = value
    config |= {'num_classes': value} if key == 'num_classes' else {}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    for load in (
        lambda: load_model(tmp_path),
        lambda: load_model(f'local-dir:{tmp_path}', head=False),
        lambda: create(f'local-dir:{tmp_path}', pretrained=True),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load()
        assert 'config.json' in str(caught.value)


def test_a_folder_without_a_classifier_gives_features(tmp_path):
    model = timm.create_model('test_vit', num_classes=0).eval()
    save_config_for_hf(model, tmp_path / 'config.json')
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    images = torch.randn(1, 3, 160, 160)
    found = load_model(tmp_path, head=False).model
    assert torch.equal(features_and_logits(found, images)[0], model(images))
    assert load_model(tmp_path).model.num_classes == 0
