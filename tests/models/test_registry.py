"""`<arch>_ctc` names against plain timm: the same models, none of timm's weights."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import PretrainedCfg, get_arch_name, get_arch_pretrained_cfgs, model_entrypoint
from torch import nn

import ctc_timm
from ctc_timm.models import catalog, registry
from families import on_meta, small_of_each_module
from runs import ROOT

SMALL = 'test_byobnet'  # the nets timm keeps for tests have a few hundred thousand parameters
SHIPPED = catalog.load(catalog.SHIPPED)
BASES = [n for n in timm.list_models() if not n.endswith('_ctc')]
KEPT = {
    *('input_size', 'test_input_size', 'min_input_size', 'fixed_input_size', 'interpolation', 'crop_pct'),
    *('test_crop_pct', 'crop_mode', 'mean', 'std', 'num_classes', 'pool_size', 'test_pool_size'),
    *('first_conv', 'classifier'),
}


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in model.state_dict().items()}


@pytest.fixture
def trained(tmp_path):
    """A model whose weights are nobody's, and the folder of its `model.safetensors`."""
    torch.manual_seed(0)
    model = timm.create_model(SMALL, num_classes=10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-3, 3)
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    return model, tmp_path


def assert_same_weights(model: nn.Module, expected: nn.Module) -> None:
    for (key, value), (other, wanted) in zip(model.state_dict().items(), expected.state_dict().items(), strict=True):
        assert key == other and torch.equal(value, wanted), key


def test_every_architecture_has_its_ctc_name():
    of_timm = [n for n in BASES if model_entrypoint(n).__module__.startswith('timm.')]
    assert len(of_timm) >= 1371  # as many as timm 1.0.31 lists
    assert set(BASES) - set(of_timm) == set(timm.list_models(module='cifar'))
    assert set(timm.list_models('*_ctc')) == {n + '_ctc' for n in BASES}
    for name in timm.list_models('*_ctc'):
        entry = model_entrypoint(name)
        assert entry is getattr(registry, name) and entry.__name__ == name
        assert name.removesuffix('_ctc') in (entry.__doc__ or '') and '\n' not in (entry.__doc__ or '')
    assert len(registry.__all__) == len(set(registry.__all__)) == len(BASES) + 2
    assert pickle.loads(pickle.dumps(registry.resnet50_ctc)) is registry.resnet50_ctc


def test_import_is_silent_and_registering_again_changes_nothing():
    code = (
        'import timm, ctc_timm; before = timm.list_models(); from ctc_timm.models.registry import register_all; '
        'register_all(); assert timm.list_models() == before and "resnet50_ctc" in before'
    )
    command = [sys.executable, '-W', 'error', '-W', 'ignore::ResourceWarning', '-c', code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


def test_timm_knows_the_names():
    assert 'resnet50_ctc' in timm.list_models(module='registry')
    assert get_arch_name('resnet50_ctc.some_tag') == 'resnet50_ctc'
    assert timm.list_pretrained('*_ctc*') == sorted(SHIPPED)
    with_weights = {name.partition('.')[0] for name in SHIPPED}
    assert set(filter(timm.is_model_pretrained, timm.list_models('*_ctc'))) == with_weights
    assert list(get_arch_pretrained_cfgs('resnet50_ctc')) == ['resnet50_ctc']


def test_configs_keep_input_and_shape_and_nothing_else():
    blank = PretrainedCfg()
    for base in set(BASES) - {entry.architecture for entry in SHIPPED.values()}:
        ours, theirs = timm.get_pretrained_cfg(base + '_ctc'), timm.get_pretrained_cfg(base)
        for field in dataclasses.fields(PretrainedCfg):
            source = theirs if field.name in KEPT else blank
            if field.name != 'architecture':
                assert getattr(ours, field.name) == getattr(source, field.name), (base, field.name)


@pytest.mark.parametrize('base', small_of_each_module())
def test_the_model_is_the_base(base):
    plain, ours = on_meta(base), on_meta(base + '_ctc')
    assert type(ours) is type(plain) and shapes(ours) == shapes(plain)
    for key in KEPT:
        assert ours.pretrained_cfg.get(key) == plain.pretrained_cfg.get(key), key
    assert set(ours.pretrained_cfg) <= KEPT | {'architecture', 'custom_load'}
    assert ours.pretrained_cfg['architecture'] == base and not ours.pretrained_cfg['custom_load']


def test_widths_that_timm_reads_off_a_tag():
    plain, ours = on_meta('qwen3_vit_88m_merge'), on_meta('qwen3_vit_88m_merge_ctc')
    assert shapes(ours) == shapes(plain)
    assert 'tag' in plain.pretrained_cfg and 'tag' not in ours.pretrained_cfg
    features = on_meta('qwen3_vit_88m_merge_ctc', features_only=True)
    assert 'tag' not in features.pretrained_cfg and 'tag' not in features.model.pretrained_cfg


def test_arguments_of_the_base():
    options = dict(features_only=True, out_indices=(1, 2), in_chans=1, drop_path_rate=0.1)
    plain, ours = on_meta('convnext_tiny', **options), on_meta('convnext_tiny_ctc', **options)
    assert type(ours) is type(plain) and shapes(ours) == shapes(plain)
    assert ours.feature_info.channels() == plain.feature_info.channels()
    rates = [[m.drop_prob for m in model.modules() if hasattr(m, 'drop_prob')] for model in (plain, ours)]
    assert rates[0] == rates[1] and max(rates[0]) > 0
    with pytest.raises(TypeError):
        on_meta('convnext_tiny_ctc', no_such_argument=1)
    model = on_meta(SMALL + '_ctc', pretrained_cfg_overlay=dict(mean=(0.1, 0.2, 0.3), num_classes=7))
    assert model.num_classes == 7 and model.pretrained_cfg['mean'] == (0.1, 0.2, 0.3)


@pytest.mark.parametrize('base', ['resnet50', 'inception_v3', 'vit_base_patch14_dinov2', 'cifar_resnet18'])
def test_pretrained_never_takes_the_weights_of_the_base(base, monkeypatch):
    monkeypatch.setattr('timm.models._builder.load_pretrained', None)  # which nobody may call
    with pytest.raises(RuntimeError, match=f"no CTC weights are cataloged for '{base}_ctc'") as caught:
        timm.create_model(base + '_ctc', pretrained=True)
    assert isinstance(caught.value, ctc_timm.UserError)
    message = str(caught.value)
    assert f'`ctc-timm train --model {base}`' in message and 'pretrained=False' in message and '\n' not in message


@pytest.mark.parametrize('pretrained', [False, True])
def test_tags_of_the_base_are_unknown(pretrained):
    assert timm.is_model_pretrained('resnet50.a1_in1k')
    with pytest.raises(registry.NoPretrainedWeights, match=r"'resnet50_ctc\.a1_in1k'"):
        timm.create_model('resnet50_ctc.a1_in1k', pretrained=pretrained)


def test_a_source_the_user_gives_is_used(trained):
    expected, folder = trained
    file = str(folder / 'model.safetensors')
    for source in (
        dict(pretrained_cfg_overlay=dict(file=file, num_classes=10)),
        dict(pretrained_cfg_overlay=dict(state_dict=expected.state_dict(), num_classes=10)),
        dict(pretrained_cfg=dict(file=file, num_classes=10)),
        dict(pretrained_cfg=PretrainedCfg(file=file, num_classes=10)),
    ):
        model = timm.create_model(SMALL + '_ctc', pretrained=True, **source)
        assert_same_weights(model, expected)
        assert model.pretrained_cfg['architecture'] == SMALL


def test_local_dir_and_hub_configs_may_name_a_ctc_architecture(trained, monkeypatch):
    expected, folder = trained
    cfg = dict(input_size=[3, 64, 64], classifier='head.fc', first_conv='stem.conv')
    (folder / 'config.json').write_text(
        json.dumps(dict(architecture=SMALL + '_ctc', num_classes=10, pretrained_cfg=cfg))
    )
    monkeypatch.setattr('timm.models._hub.hf_hub_download', lambda repo_id, filename, **_: str(folder / filename))
    for name in (f'local-dir:{folder}', 'hf-hub:someone/something'):
        model = timm.create_model(name, pretrained=True)
        assert_same_weights(model, expected)
        assert model.pretrained_cfg['architecture'] == SMALL
        assert tuple(model.pretrained_cfg['input_size']) == (3, 64, 64)
