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
from safetensors.torch import load_file, save_file
from timm.models._hub import save_config_for_hf

import ctc_timm
from ctc_timm.api import recipe_settings
from ctc_timm.hub.privacy import Private
from ctc_timm.hub.publish import push
from ctc_timm.hub.summary import summarize
from ctc_timm.utils.weights_files import HASH, save_weights, tensors_hash, weights_metadata
from hub_client import PUBLISHED

SETTINGS = recipe_settings()
REPO = 'alice/test_resnet_ctc'


def write_results(run: Path, folder: str, **content: object) -> None:
    """Results as `validate` and `linear-probe` write them, of the best weights."""
    file = run / 'best.safetensors'
    content = {'weights': str(file), HASH: tensors_hash(load_file(file)), **content}
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
    write_results(run, 'linear_probe/flowers', model='test_resnet', rows=rows)
    write_results(run, 'linear_probe/old', **{HASH: '0' * 64}, rows=[{'target': 'old', 'top1': 1.0}])
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
    assert not data.datasets and data.metrics == ['accuracy'] and data.model_name == 'test_resnet_ctc'
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
        'new_flag': 'of a later version',
        'monitor_target': f'hfds/{home}/other',
        'sched': f'run by {user} for fun',
        'wandb_token': 'abcdefghijkl',
        'secret_word': 'swordfish',
    }
    opt_kwargs = {'note': f'see {home}/notes', 'key': marked, 'fused': True}
    model_kwargs = {'where': '~/models', 'plain': 3}
    args |= {**private, 'opt_kwargs': opt_kwargs, 'model_kwargs': model_kwargs, 'train_split': 'train'}
    (run / 'args.yaml').write_text(yaml.safe_dump(args))
    summary = json.loads((run / 'validation' / 'results.json').read_text())
    names = [{'class': i, 'name': f'{home}/class{i}', 'top1': 1.0} for i in range(12)]
    config = json.loads((run / 'config.json').read_text())
    config['label_names'] = [f'{home}/class{i}' for i in range(12)]
    (run / 'config.json').write_text(json.dumps(config))
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
    assert 'left out: `sched` or a part of it, which tells something private' in done.out
    card = files['README.md'].data.decode()
    assert 'trained on flowers with' in card and '-c recipe.yaml --dataset hfds/FOLDER' in card
    assert 'label_names' not in json.loads(files['config.json'].data)


def test_what_slips_through_is_found_before_anything_is_sent(run, monkeypatch):
    def export(details, folder):  # as if timm wrote more than is known
        (folder / 'config.json').write_text((run / 'config.json').read_text())

    config = json.loads((run / 'config.json').read_text())
    monkeypatch.setenv('HF_TOKEN', 'hf_MarkedMarkedMarkedMarkedMarked')
    for text, kind in (('from /home/x/y', 'a path'), ('with hf_MarkedMarkedMarkedMarkedMarked', 'a token')):
        config['model_args'] = {'act_layer': text}
        monkeypatch.setattr('ctc_timm.hub.publish._export', export)
        (run / 'config.json').write_text(json.dumps(config))
        with pytest.raises(ctc_timm.UserError, match=rf'config\.json would publish {kind}; nothing was uploaded'):
            push(run, REPO, SETTINGS, dry_run=True)


PRIVATE = {
    '': [
        *('cifar100', 'hfds/uoft-cs/cifar100', 'https://huggingface.co/a/b', '1/2 and 3/4, train[:50%]', '</summary>'),
        *(
            '[paper](https://arxiv.org/abs/2203.03871)',
            'resnet50.a1_in1k 0.5.1',
            'rand-m9-mstd0.5',
            'a: b',
            '$x^2$ ~~y~~',
        ),
    ],
    'a path': [
        *('/data', 'hfds/../shared/x', './x', 'E:/x', 'see /mnt/x/y.', '~/data', '~jane/data', 'D:\\data', '(/srv/x)'),
        *('\\\\server\\share', 'file:///etc', 'hfds//home/x', 'x=/home/y', 'wds/~/x', '"/srv/x"', '$HOME/x', 'a,/b'),
        *('%APPDATA%\\x', '${DATA}/x', 'https://github.com/x https:/home/y'),
    ],
    'the place of a server': [
        *('s3://bucket/x', 'gs://bucket', 'https://nas.example.com/x', 'http://10.0.0.7:80', 'wss://x', '10.20.30.40'),
        *('jane@node7:data', 'nas.corp', 'db7.intra', 'https://github.com.evil.example/x', 'hdfs://name:9000/x'),
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
    done = push(tmp_path, 'alice/mine', SETTINGS, dry_run=True)
    text = (tmp_path / 'publish' / 'README.md').read_text()
    assert 'import timm, ctc_timm;' in done.load and 'transformers' not in text
    assert 'import timm, ctc_timm  # which registers this architecture' in text
    assert '`ctc-timm zoo add alice/mine --name cifar_resnet20_ctc.mine`' in text
    assert ModelCard(text).data.eval_results is None and 'None measured.' in text


def card_of(run: Path) -> str:
    push(run, REPO, SETTINGS, dry_run=True)
    return (run / 'publish' / 'README.md').read_text()


def test_numbers_of_another_set_stand_under_its_name(client, run, image_folder):
    """The classes that are published are the run's own, and so is the accuracy of the split it was chosen on."""
    done = client.command('validate', str(run), '--dataset', 'digits', '--split', 'train[:50]', '-j', '0')
    assert done.code == 0, done.err
    assert '| digits, train\\[\\:50\\] | its own classifier |' in card_of(run)
    file = run / 'config.json'
    config = json.loads(file.read_text())
    own = {f'{i}': f'class{i}' for i in range(10)}
    file.write_text(json.dumps({**config, 'label_names': own}))
    done = client.command('validate', str(run), '--data-dir', str(image_folder), '-j', '0')
    assert done.code == 0, done.err
    other = json.loads((run / 'validation' / 'results.json').read_text())
    assert other['num_images'] == 15 and {row['class'] for row in other['per_class']} == {0, 1, 2}
    card, chosen = card_of(run), weights_metadata(run / 'best.safetensors')
    assert f'| digits, validation\\[\\:70\\] | its own classifier | {float(chosen["eval_top1"]):.2f} |' in card
    assert f'| images, validation | its own classifier | {other["top1"]:.2f} |' in card
    assert ModelCard(card).data.datasets is None
    published = json.loads((run / 'publish' / 'config.json').read_text())
    assert 'label_names' not in published  # two of twelve classes have no name
    file.write_text(json.dumps({**config, 'label_names': [f'class{i}' for i in range(12)]}))
    card_of(run)
    published = json.loads((run / 'publish' / 'config.json').read_text())
    assert published['label_names'] == [f'class{i}' for i in range(12)]


def test_no_number_is_taken_from_weights_that_anybody_changed(run):
    file = run / 'best.safetensors'
    tensors, facts = load_file(file), weights_metadata(file)
    facts['eval_top1'] = '99.5'
    save_file(tensors, file, metadata={key: value for key, value in facts.items() if key != 'metadata_sha256'})
    (run / 'validation' / 'results.json').unlink()
    card = card_of(run)
    assert 'None measured.' in card and '99.5' not in card
    save_weights(file, {key: value * 2 for key, value in tensors.items()}, facts)
    assert '| 99.50 |' in card_of(run)  # what was written with them
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"99.5"', b'"99.9"'))
    with pytest.raises(ctc_timm.UserError, match='was changed after it was written'):
        card_of(run)


def test_weights_that_are_exchanged_meanwhile_are_not_published(run, monkeypatch):
    """The numbers of the card are of the weights that were read before."""

    def exchanged(*args):
        details, file = summarize(*args), run / 'best.safetensors'
        save_weights(file, {key: value * 2 for key, value in load_file(file).items()}, weights_metadata(file))
        return details

    monkeypatch.setattr('ctc_timm.hub.publish.summarize', exchanged)
    with pytest.raises(ctc_timm.UserError, match='was exchanged while it was being published'):
        push(run, REPO, SETTINGS, dry_run=True)


def test_the_epoch_and_its_stage_are_published(run):
    """A best epoch of the instance stage is said to be one: as _ctc it would be taken for more."""
    card, config = card_of(run), json.loads((run / 'publish' / 'config.json').read_text())
    assert config['stage'] == 'temporal' and config['epoch'] == 2
    assert 'The weights are those after epoch 2, counted from 0, of the temporal stage.\n' in card
    file = run / 'best.safetensors'
    save_weights(file, load_file(file), {**weights_metadata(file), 'stage': 'instance', 'epoch': 1})
    assert 'after epoch 1, counted from 0, of the instance stage: they have never seen the temporal term.' in card_of(
        run
    )


@pytest.mark.parametrize('name', ['args.yaml', 'validation/results.json', 'plots/training.png', 'publish', 'plots/x/y'])
def test_links_out_of_a_run_are_refused(run, tmp_path, name):
    """Of a file, of a folder, and of one that no command reads: the run may be of somebody else."""
    outside, link = tmp_path / 'outside', run / name
    outside.mkdir()
    (outside / 'secret').write_text('model: secret')
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(outside if name == 'publish' else outside / 'secret')
    with pytest.raises(ctc_timm.UserError, match='is a link that leads out of the run'):
        push(run, REPO, SETTINGS, dry_run=True)
    assert sorted(outside.iterdir()) == [outside / 'secret'] and (outside / 'secret').read_text() == 'model: secret'
    link.unlink()
    (run / 'inside.yaml').symlink_to('args.yaml')
    push(run, REPO, SETTINGS, dry_run=True)


@pytest.mark.parametrize('elsewhere', [False, True])
def test_only_a_set_on_the_hub_is_named_as_one(run, tmp_path, monkeypatch, elsewhere):
    """Not a folder that is called like one."""
    args = yaml.safe_load((run / 'args.yaml').read_text())
    (tmp_path / 'someone' / 'flowers').mkdir(parents=True)
    if elsewhere:  # the run lies in tmp_path/runs
        (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere' if elsewhere else tmp_path)
    for name, folder, known in (
        ('hfds/someone/plants', '', ['someone/plants']),
        ('hfds/someone/flowers', '', None),
        ('', 'someone/flowers', None),
        ('torch/cifar10', 'data', None),
        ('hfds/mnist', '', ['mnist']),
    ):
        (run / 'args.yaml').write_text(
            yaml.safe_dump({**args, 'dataset': name, 'data_dir': folder, 'monitor_target': name})
        )
        data = ModelCard(card_of(run)).data
        assert data.datasets == known, name
        assert [r.dataset_type for r in data.eval_results][0] == (known or ['other'])[0]
        recipe = yaml.safe_load((run / 'publish' / 'recipe.yaml').read_text())
        assert recipe.get('monitor_target') == (name if known else None)
