"""What a publication says of its run: every number of it, and nothing private."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

import ctc_timm
from ctc_timm.hub.privacy import Private
from ctc_timm.hub.publish import push
from hub_client import PUBLISHED

REPO = 'alice/test_resnet_ctc'


def write_results(run: Path, folder: str, **content: object) -> None:
    (run / folder).mkdir(parents=True, exist_ok=True)
    (run / folder / 'results.json').write_text(json.dumps(content))


def wilson_by_search(hits: int, count: int) -> tuple[float, float]:
    """The accuracies that a score test at 5% would not reject, in percent, by trying them."""
    p = np.linspace(1e-9, 1 - 1e-9, 2_000_001)
    inside = p[np.abs(hits / count - p) <= 1.959963984540054 * np.sqrt(p * (1 - p) / count)]
    return 100 * inside.min(), 100 * inside.max()


def test_the_card_is_what_the_run_says(client, hub, run):
    validation = json.loads((run / 'validation' / 'results.json').read_text())
    row = {'target': 'hfds/someone/flowers:small', 'split': 'test', 'num_test': 400}  # a configuration of it
    rows = [
        {**row, 'method': 'ridge', 'top1': 71.25, 'top1_low': 66.5, 'top1_high': 75.5, 'top5': 90.0, 'num_train': 900},
        {**row, 'method': 'knn', 'top1': 55.0, 'shots': 5, 'top1_low': 50.0, 'top1_high': 60.0},
    ]
    write_results(run, 'linear_probe/flowers', model='test_resnet', weights=str(run / 'best.safetensors'), rows=rows)
    write_results(run, 'linear_probe/old', weights=str(run / 'last.safetensors'), rows=[{'target': 'old', 'top1': 1.0}])
    (run / 'dynamics').mkdir()
    Image.new('RGB', (8, 8)).save(run / 'dynamics' / 'tradeoff.png')
    (run / 'dynamics' / 'path.png').write_bytes(b'no picture')
    done = client.command('publish', str(run), '--repo-id', REPO, '--license', 'mit', '--tags', 'tiny', 'a: b')
    assert done.code == 0, done.err
    assert 'left out: linear_probe/old/results.json, which is of other weights than best.safetensors' in done.out
    assert 'left out: path.png, which is no sound picture' in done.out

    text = hub.files(REPO)['README.md'].data.decode()
    data = ModelCard(text).data
    assert (data.library_name, data.license, data.pipeline_tag) == ('timm', 'mit', 'image-classification')
    assert {'ctc', 'timm', 'transformers', 'image-classification', 'tiny', 'a: b'} <= set(data.tags)
    assert data.datasets == ['digits'] and data.metrics == ['accuracy'] and data.model_name == 'test_resnet_ctc'
    assert {(r.dataset_name, r.dataset_split, r.metric_name): r.metric_value for r in data.eval_results} == {
        ('digits', 'validation[:70]', 'top-1 accuracy (%)'): round(validation['top1'], 4),
        ('someone/flowers', 'test', 'top-1 accuracy (%), ridge on frozen features'): 71.25,
    }
    low, high = wilson_by_search(round(validation['top1'] * 0.7), 70)
    assert f'{low:.2f} to {high:.2f} | {validation["top5"]:.2f} | 70 |\n' in text
    assert '| someone/flowers, test | ridge | 71.25 | 66.50 to 75.50 | 90.00 | 400 |' in text
    assert '| someone/flowers, test | knn, 5 images a class | 55.00 | 50.00 to 60.00 |  | 400 |' in text
    assert '](plots/tradeoff.png)' in text and '](plots/training.png)' in text and 'path.png' not in text
    assert set(hub.files(REPO)) == {*PUBLISHED, 'plots/tradeoff.png'}
    for words in ('## What CTC is', 'AutoModelForImageClassification', 'num_classes=10', '@inproceedings'):
        assert words in text
    assert f'hf-hub:{REPO}' in text and 'ctc-timm train -c recipe.yaml\n' in text


def test_nothing_private_is_published(client, hub, run, tmp_path):
    marked = 'hf_MarkedMarkedMarkedMarkedMarked'
    hub.users[marked] = 'alice'
    home, user, host = '/home/jane.doe', 'jane.doe', 'db7.intra.example'
    args = yaml.safe_load((run / 'args.yaml').read_text())
    private = {
        'dataset': f'hfds/{home}/secret/flowers',
        'data_dir': f'{home}/data',
        'output': f'{home}/runs',
        'initial_checkpoint': f'{home}/old.safetensors',
        'class_map': 'C:\\Users\\jane.doe\\map.txt',
        'log_with': 'wandb',
        'new_flag': f'run by {user} for fun',
        'wandb_token': 'abcdefghijkl',
        'secret_word': 'swordfish',
    }
    opt_kwargs = {'note': f'see {home}/notes', 'key': marked, 'fused': True}
    model_kwargs = {'where': '~/models', 'plain': 3}
    args |= {**private, 'opt_kwargs': opt_kwargs, 'model_kwargs': model_kwargs, 'train_split': 'train'}
    (run / 'args.yaml').write_text(yaml.safe_dump(args))
    summary = json.loads((run / 'validation' / 'results.json').read_text())
    names = [{'class': i, 'name': f'{home}/class{i}', 'top1': 1.0} for i in range(12)]
    write_results(run, 'validation', **{**summary, 'dataset': f'{home}/data', 'per_class': names})
    about = PngInfo()
    about.add_text('Author', f'{user} on {host}')
    Image.open(run / 'plots' / 'training.png').save(run / 'plots' / 'training.png', pnginfo=about)

    env = {'HF_TOKEN': marked, 'WANDB_API_KEY': 'wandbWandbWandb', 'HOME': home, 'USER': user, 'LOGNAME': user}
    done = client.command('publish', str(run), '--repo-id', REPO, **env)
    assert done.code == 0, done.err
    files = hub.files(REPO)
    told = (marked, home, user, host, 'wandbWandb', 'swordfish', 'abcdefghijkl')
    for name, blob in files.items():
        short = () if name.endswith(('.safetensors', '.png')) else ('C:\\\\', '~/')
        assert not [text for text in (*told, str(tmp_path), *short) if text.encode() in blob.data], name
    assert not [text for text in told if text in done.out + done.err]
    with Image.open(run / 'plots' / 'training.png') as image:
        assert image.info['Author'] == f'{user} on {host}'  # the run keeps it
    recipe = yaml.safe_load(files['recipe.yaml'].data)
    assert recipe['opt_kwargs'] == {'fused': True} and recipe['model_kwargs'] == {'plain': 3}
    assert not set(private) & set(recipe)
    assert 'left out: `new_flag` or a part of it, which tells something private' in done.out
    card = files['README.md'].data.decode()
    assert 'trained on flowers with' in card and '-c recipe.yaml --dataset hfds/FOLDER' in card
    assert 'label_names' not in json.loads(files['config.json'].data)


def test_what_slips_through_is_found_before_anything_is_sent(run, monkeypatch):
    config = json.loads((run / 'config.json').read_text())
    monkeypatch.setenv('HF_TOKEN', 'hf_MarkedMarkedMarkedMarkedMarked')
    for text, kind in (('from /home/x/y', 'a path'), ('with hf_MarkedMarkedMarkedMarkedMarked', 'a token')):
        config['pretrained_cfg']['description'] = text
        (run / 'config.json').write_text(json.dumps(config))
        with pytest.raises(ctc_timm.UserError, match=rf'config\.json would publish {kind}; nothing was uploaded'):
            push(run, REPO, dry_run=True)


PRIVATE = {
    '': ['cifar100', 'hfds/uoft-cs/cifar100', 'https://huggingface.co/a/b', '1/2 and 3/4, train[:50%]', '</summary>'],
    'a path': [
        *('/data', 'hfds/../shared/x', './x', 'E:/x', 'see /mnt/x/y.', '~/data', '~jane/data', 'D:\\data'),
        *('\\\\server\\share', 'file:///etc'),
    ],
    'a token': ['key=hf_abcdefghijklmnopqrstuvwxyz', 'ghp_abcdefghijklmnopqrstuvwxyz'],
}


@pytest.mark.parametrize(('text', 'kind'), [(text, kind) for kind, texts in PRIVATE.items() for text in texts])
def test_what_is_private(text, kind):
    assert Private().find(text) == kind


def test_an_architecture_of_this_package_says_so(tmp_path):
    model = timm.create_model('cifar_resnet20_ctc', num_classes=4)
    save_file(model.state_dict(), tmp_path / 'best.safetensors')
    save_config_for_hf(model, str(tmp_path / 'config.json'))
    done = push(tmp_path, 'alice/mine', dry_run=True)
    text = (tmp_path / 'publish' / 'README.md').read_text()
    assert 'import timm, ctc_timm;' in done.load and 'transformers' not in text
    assert 'import timm, ctc_timm  # which registers this architecture' in text
    assert '`ctc-timm zoo add alice/mine --name cifar_resnet20_ctc.mine`' in text
    assert ModelCard(text).data.eval_results is None and 'None measured.' in text
