"""What a publication says of its run: every number of it, and nothing private."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import yaml
from hub_client import Client
from hub_server import Hub, front_matter
from huggingface_hub import ModelCard
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

import ctc_timm
from ctc_timm.hub.privacy import Private
from ctc_timm.hub.publish import push

REPO = 'alice/test_resnet_ctc'
NAMES = {'.gitattributes', 'README.md', 'config.json', 'model.safetensors', 'plots/training.png', 'recipe.yaml'}


def test_the_card_is_what_the_run_says(client: Client, hub: Hub, run: Path, tiny: list[str]) -> None:
    weights = str(run / 'best.safetensors')
    validation = json.loads((run / 'validation' / 'results.json').read_text())
    rows = [
        {'target': 'hfds/someone/flowers', 'split': 'test', 'num_test': 400, 'method': 'ridge', 'top1': 71.25}
        | {'top1_low': 66.5, 'top1_high': 75.5, 'top5': 90.0, 'mean_per_class': 70.0, 'num_train': 900},
        {'target': 'hfds/someone/flowers', 'split': 'test', 'num_test': 400, 'method': 'knn', 'top1': 55.0, 'shots': 5}
        | {'top1_low': 50.0, 'top1_high': 60.0},
    ]
    for folder, content in (
        ('linear_probe/flowers', {'model': 'test_resnet', 'weights': weights, 'rows': rows}),
        ('linear_probe/old', {'weights': str(run / 'last.safetensors'), 'rows': [{'target': 'old', 'top1': 1.0}]}),
    ):
        (run / folder).mkdir(parents=True)
        (run / folder / 'results.json').write_text(json.dumps(content))
    (run / 'dynamics').mkdir()
    Image.new('RGB', (8, 8)).save(run / 'dynamics' / 'tradeoff.png')
    (run / 'dynamics' / 'path.png').write_bytes(b'no picture')
    done = client.command('publish', str(run), '--repo-id', REPO, '--license', 'mit', '--tag', 'tiny', '--tag', 'a: b')
    assert done.code == 0, done.err
    assert 'left out: linear_probe/old/results.json, which is of other weights than best.safetensors' in done.out
    assert 'left out: path.png, which is no sound picture' in done.out

    files = hub.repos[REPO].at('main').files  # type: ignore[union-attr]
    text = files['README.md'].data.decode()
    card = ModelCard(text)
    data = card.data
    assert (data.library_name, data.license, data.pipeline_tag) == ('timm', 'mit', 'image-classification')
    assert {'ctc', 'timm', 'transformers', 'image-classification', 'tiny', 'a: b'} <= set(data.tags)
    assert data.datasets == ['digits'] and data.metrics == ['accuracy'] and data.model_name == 'test_resnet_ctc'
    found = {(r.dataset_name, r.dataset_split, r.metric_name): r.metric_value for r in data.eval_results}
    assert found == {
        ('digits', 'validation[:70]', 'top-1 accuracy (%)'): round(validation['top1'], 4),
        ('someone/flowers', 'test', 'top-1 accuracy (%), ridge on frozen features'): 71.25,
    }
    low, high = wilson_by_search(round(validation['top1'] * 0.7), 70)
    row = next(line for line in text.splitlines() if line.startswith('| digits'))
    assert f'{low:.2f} to {high:.2f} | {validation["top5"]:.2f} | 70 |' in row
    assert '| someone/flowers, test | ridge | 71.25 | 66.50 to 75.50 | 90.00 | 400 |' in text
    assert '| someone/flowers, test | knn, 5 images a class | 55.00 | 50.00 to 60.00 |  | 400 |' in text
    assert '](plots/tradeoff.png)' in text and '](plots/training.png)' in text and 'path.png' not in text
    assert set(files) == {*NAMES, 'plots/tradeoff.png'}
    for words in (
        '## What CTC is',
        'import timm, ctc_timm',
        'AutoModelForImageClassification',
        'num_classes=10',
        '@inproceedings',
    ):
        assert words in text
    assert f'hf-hub:{REPO}' in text and 'accelerate launch train.py -c recipe.yaml\n' in text


def wilson_by_search(hits: int, count: int) -> tuple[float, float]:
    """The accuracies that a score test at 5% would not reject, in percent, by trying them."""
    p = np.linspace(1e-9, 1 - 1e-9, 2_000_001)
    inside = p[np.abs(hits / count - p) <= 1.959963984540054 * np.sqrt(p * (1 - p) / count)]
    return 100 * inside.min(), 100 * inside.max()


def test_nothing_private_is_published(client: Client, hub: Hub, run: Path, tmp_path: Path) -> None:
    marked = 'hf_MarkedMarkedMarkedMarkedMarked'
    hub.users[marked] = 'alice'
    home, user, host = '/home/jane.doe', 'jane.doe', 'db7.intra.example'
    args = yaml.safe_load((run / 'args.yaml').read_text())
    args |= {
        'dataset': f'hfds/{home}/secret/flowers',
        'data_dir': f'{home}/data',
        'output': f'{home}/runs',
        'initial_checkpoint': f'{home}/old.safetensors',
        'class_map': 'C:\\Users\\jane.doe\\map.txt',
        'opt_kwargs': {'note': f'see {home}/notes', 'key': marked, 'fused': True},
        'log_with': 'wandb',
        'model_kwargs': {'where': '~/models', 'plain': 3},
        'train_split': 'train',
        'new_flag': f'run by {user} for fun',
        'endpoint': 'file:///etc/hosts',
        'share': '\\\\nas\\models',
        'wandb_token': 'abcdefghijkl',
        'secret_word': 'swordfish',
    }
    (run / 'args.yaml').write_text(yaml.safe_dump(args))
    summary = json.loads((run / 'validation' / 'results.json').read_text())
    names = [{'class': i, 'name': f'{home}/class{i}', 'top1': 1.0} for i in range(12)]
    summary |= {'dataset': f'{home}/data', 'per_class': names}
    (run / 'validation' / 'results.json').write_text(json.dumps(summary))
    about = PngInfo()
    about.add_text('Author', f'{user} on {host}')
    Image.open(run / 'plots' / 'training.png').save(run / 'plots' / 'training.png', pnginfo=about)

    env = {'HF_TOKEN': marked, 'WANDB_API_KEY': 'wandbWandbWandb', 'HOME': home, 'USER': user, 'LOGNAME': user}
    done = client.command('publish', str(run), '--repo-id', REPO, **env)
    assert done.code == 0, done.err
    files = hub.repos[REPO].at('main').files  # type: ignore[union-attr]
    for name, blob in files.items():
        short = () if name.endswith(('.safetensors', '.png')) else ('C:\\\\', 'nas\\\\', '~/')
        for private in (marked, home, user, host, str(tmp_path), 'wandbWandb', 'swordfish', 'abcdefghijkl', *short):
            assert private.encode() not in blob.data, (name, private)
    for private in (marked, home, user, host, 'wandbWandb', 'swordfish', 'abcdefghijkl'):
        assert private not in done.out + done.err
    with Image.open(run / 'plots' / 'training.png') as image:
        assert image.info['Author'] == f'{user} on {host}'  # the run keeps it
    recipe = yaml.safe_load(files['recipe.yaml'].data)
    assert recipe['opt_kwargs'] == {'fused': True} and recipe['model_kwargs'] == {'plain': 3}
    assert not {'dataset', 'data_dir', 'output', 'class_map', 'log_with', 'new_flag', 'endpoint', 'share'} & set(recipe)
    assert 'left out: the flag new_flag or a part of it, which tells something private' in done.out
    assert 'trained on flowers with' in files['README.md'].data.decode()
    assert '-c recipe.yaml --dataset hfds/FOLDER' in files['README.md'].data.decode()
    assert 'label_names' not in json.loads(files['config.json'].data)


def test_what_slips_through_is_found_before_anything_is_sent(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((run / 'config.json').read_text())
    config['pretrained_cfg']['description'] = 'from /home/jane/weights'
    (run / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ctc_timm.UserError, match=r'config\.json would publish a path; nothing was uploaded'):
        push(run, REPO, dry_run=True)
    config['pretrained_cfg']['description'] = 'with hf_MarkedMarkedMarkedMarkedMarked'
    (run / 'config.json').write_text(json.dumps(config))
    monkeypatch.setenv('HF_TOKEN', 'hf_MarkedMarkedMarkedMarkedMarked')
    with pytest.raises(ctc_timm.UserError, match=r'config\.json would publish a token'):
        push(run, REPO, dry_run=True)


@pytest.mark.parametrize(
    ('text', 'private'),
    [
        ('cifar100', ''),
        ('hfds/uoft-cs/cifar100', ''),
        ('https://huggingface.co/a/b', ''),
        ('1/2 and 3/4, train[:50%]', ''),
        ('</summary>', ''),
        ('hf-internal-testing-of-things/x', ''),
        ('/data', 'a path'),
        ('hfds/../shared/x', 'a path'),
        ('./x', 'a path'),
        ('E:/x', 'a path'),
        ('see /mnt/x/y.', 'a path'),
        ('~/data', 'a path'),
        ('~jane/data', 'a path'),
        ('D:\\data', 'a path'),
        ('\\\\server\\share', 'a path'),
        ('file:///etc', 'a path'),
        ('key=hf_abcdefghijklmnopqrstuvwxyz', 'a token'),
        ('ghp_abcdefghijklmnopqrstuvwxyz', 'a token'),
    ],
)
def test_what_is_private(text: str, private: str) -> None:
    assert Private().found_in(text) == private


def test_names_from_outside_stay_text(run: Path) -> None:
    evil = '](http://evil.example) <script>alert(1)</script> | `x` **b**\n---\nlicense: evil\n# Head\n\x1b[31m'
    args = yaml.safe_load((run / 'args.yaml').read_text())
    args |= {'dataset': evil, 'opt': '```\n</details><b>', 'val_split': 'a\nb: [c'}
    (run / 'args.yaml').write_text(yaml.safe_dump(args))
    results = json.loads((run / 'validation' / 'results.json').read_text())
    results |= {'dataset': evil, 'split': 'x"\n- y: {'}
    results['per_class'] = [{'class': i, 'name': f'{evil}{i}', 'top1': 1.0} for i in range(12)]
    (run / 'validation' / 'results.json').write_text(json.dumps(results))
    (run / 'linear_probe' / 'evil').mkdir(parents=True)
    row = {'target': f'hfds/../../{evil}', 'method': evil, 'top1': '50', 'top5': 'nan', 'num_test': -1, 'shots': True}
    probe = {'weights': str(run / 'best.safetensors'), 'rows': [row, 3, None]}
    (run / 'linear_probe' / 'evil' / 'results.json').write_text(json.dumps(probe))
    push(run, REPO, dry_run=True)
    folder = run / 'publish'
    text = (folder / 'README.md').read_text()
    head = front_matter(text)
    assert set(head) == {'library_name', 'license', 'metrics', 'pipeline_tag', 'tags', 'model-index'}
    assert head['license'] == 'apache-2.0' and yaml.safe_load(text.split('\n---\n')[0].removeprefix('---\n')) == head
    assert all(isinstance(tag, str) for tag in head['tags'])
    body = text[text.index('\n---\n', 4) + 5 :]
    assert '\x1b' not in text and '\n---' not in body
    outside = html_and_links(body)
    assert outside['tags'] <= {'details', 'summary', '/summary', '/details'}
    assert outside['links'] == {'https://arxiv.org/abs/2203.03871', 'plots/training.png'}
    assert [line for line in body.splitlines() if line.startswith('# ')] == ['# test_resnet\\_ctc'] or [
        line for line in body.splitlines() if line.startswith('# ')
    ] == ['# test_resnet_ctc']
    names = json.loads((folder / 'config.json').read_text()).get('label_names')
    assert names is None or names == [f'{evil}{i}' for i in range(12)]
    assert not list(run.parent.parent.glob('*evil*'))


def html_and_links(body: str) -> dict[str, set[str]]:
    """What Markdown would make active outside of code: HTML tags, and targets of links and pictures."""

    prose, fence = [], ''
    for line in body.splitlines():
        opening = re.match(r'(`{3,})', line)
        if opening and not fence:
            fence = opening[1]
        elif fence and line.strip() == fence:
            fence = ''
        elif not fence:
            prose.append(line)
    assert not fence
    text = re.sub(r'\\[!-/:-@\[-`{-~]', '', '\n'.join(prose))  # what is escaped is text
    text = re.sub(r'`[^`\n]*`', '', text)
    return {
        'tags': {tag.split()[0] for tag in re.findall(r'<([/a-zA-Z][^>]*)>', text)},
        'links': set(re.findall(r'\]\(([^)]*)\)', text)),
    }


def test_an_architecture_of_this_package_says_so(tmp_path: Path) -> None:

    model = timm.create_model('cifar_resnet20_ctc', num_classes=4)
    save_file(model.state_dict(), tmp_path / 'best.safetensors')
    save_config_for_hf(model, str(tmp_path / 'config.json'))
    done = push(tmp_path, 'alice/mine', dry_run=True)
    text = (tmp_path / 'publish' / 'README.md').read_text()
    assert 'import timm, ctc_timm;' in done.load and 'transformers' not in text
    assert 'import timm, ctc_timm  # which registers this architecture' in text
    assert '`ctc-timm zoo add alice/mine --name cifar_resnet20_ctc.mine`' in text
    assert front_matter(text).get('eval_results') is None and 'None measured.' in text
