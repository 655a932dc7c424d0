"""Names of strangers, in every place where one can stand: they stay text, and make no path outside their folder."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ctc_timm.hub.publish import check_target, push
from ctc_timm.measure.transfer_sets import slug
from ctc_timm.models import catalog as catalog
from ctc_timm.models.loading import load_model
from ctc_timm.runs import run_name
from ctc_timm.utils.errors import UserError
from ctc_timm.utils.text import file_name

REPO = 'alice/test_resnet_ctc'
EVIL = [
    '</td><script>alert(1)</script>',
    '<img src=x onerror=alert(1)>',
    '<!-- <h1>',
    '</details></summary><iframe src="http://evil.example">',
    '| a | b |\n| --- | --- |\n| c | d |',
    'x |',
    'x\n---\nlicense: evil\n---\n',
    'x\n\n# Heading\n\n- item',
    '\n---\n',
    '[x](javascript:alert(1))',
    '[x]: http://evil.example\n[x]',
    '](http://evil.example) ![y',
    '![](http://evil.example/pixel.png)',
    '<http://evil.example>',
    'http://evil.example www.evil.example evil@evil.example',
    '`code` ``` ~~~',
    '```\n</details>\n```',
    '````````',
    '**bold** _it_ ~~gone~~ ==mark== $x^2$ :smile: @alice #1',
    '{{ 7 * 7 }} {% raw %} ${x} {x} %s',
    '../../x',
    '/etc/passwd',
    '~/x',
    '..\\..\\x',
    'C:\\x',
    'a\0b',
    '\x1b[2J\x1b]0;title\x07',
    '\u202egnp.exe \u200b\u2028\u2029\x85',
    '\ud800 \udcff',
    'é' * 400,
    'x' * 2000,
    '!!python/object/apply:os.system [touch x]',
    "'; touch x; '",
    '"\n- y: {[',
    '&amp;lt;b&amp;gt; &lt;b&gt; &#60;b&#62;',
    '- x\n1. y\n> z\n    code',
    '=1+1|cmd',
    '',
    '.',
    '..',
]


@pytest.fixture(scope='module')
def benign(untrained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The structure of a card whose names are harmless."""
    run = Path(shutil.copytree(untrained, tmp_path_factory.mktemp('benign') / 'run'))
    dress(run, 'flowers')
    push(run, REPO, dry_run=True)
    found = structure((run / 'publish' / 'README.md').read_text(encoding='utf-8'))
    assert found['to'] == {'', 'https://arxiv.org/abs/2203.03871'} and 'hr' not in found['blocks']
    assert found['html'] == ['<details><summary>recipe.yaml, all flags</summary>', '</details>']
    return found


def dress(run: Path, name: str, architecture: str = 'test_resnet') -> None:
    """Give a run that name wherever one comes from outside and is shown."""
    known = yaml.safe_load((run / 'args.yaml').read_text())
    args: dict[str, Any] = {
        key: name for key in ('dataset', 'val_split', 'opt', 'sched', 'negatives', 'input_key', 'lr')
    }
    args |= {'epochs': name, 'model': name, 'model_kwargs': {name: name, 'list': [name, 1]}, name: name, 'mode': name}
    (run / 'args.yaml').write_text(yaml.safe_dump({**known, **args}))
    row = {'target': name, 'split': name, 'method': name, 'top1': 50.0, 'top1_low': name, 'num_test': 32, 'shots': name}
    hub_row = {**row, 'target': f'hfds/{name}', 'method': 'ridge', 'shots': None}
    classes = [{'class': i, 'name': f'{name}{i}', 'top1': 1.0} for i in range(10)]
    validation = {'weights': str(run / 'best.safetensors'), 'dataset': name, 'split': name, 'top1': 50.0, 'top5': name}
    probe = {'weights': str(run / 'best.safetensors'), 'model': name, 'rows': [row, hub_row]}
    for folder, content in (
        ('validation', {**validation, 'num_images': 32, 'model': name, 'per_class': classes}),
        ('linear_probe/some', probe),
        ('dynamics', {'targets': [name]}),
    ):
        (run / folder).mkdir(parents=True, exist_ok=True)
        (run / folder / 'results.json').write_text(json.dumps(content))
    config = json.loads((run / 'config.json').read_text())
    config['architecture'] = architecture
    (run / 'config.json').write_text(json.dumps(config))
    weights = run / 'best.safetensors'
    facts = {'architecture': name, 'num_classes': name, 'eval_top1': name, 'eval_num_images': name, 'epoch': name}
    metadata = {key: value.encode(errors='replace').decode() for key, value in facts.items()}
    save_file(load_file(weights), weights, metadata=metadata)


def structure(card: str) -> dict[str, Any]:
    """What a card makes of itself: keys of the front matter, headings, kinds of blocks and of text, HTML, links."""
    head, end, body = card.removeprefix('---\n').partition('\n---\n')
    assert card.startswith('---\n') and end
    data = yaml.safe_load(head)
    assert ModelCard(card).data.license == data['license'] == 'apache-2.0'
    blocks = MarkdownIt('commonmark').enable(['table', 'strikethrough']).parse(body)
    inline = [child for token in blocks for child in token.children or []]
    html = [token.content.strip() for token in [*blocks, *inline] if token.type in ('html_block', 'html_inline')]
    return {
        'keys': set(data) - {'datasets'},
        'headings': [line for line in body.splitlines() if line.startswith('#')],
        'blocks': {token.type for token in blocks},
        'code': [token.info for token in blocks if token.type == 'fence'],
        'text': {token.type for token in inline} - {'text_special'},  # of a backslash
        'html': html,
        'to': {str(token.attrs.get('href', token.attrs.get('src', ''))) for token in inline},
    }


def files_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob('*')}


@pytest.mark.parametrize('number', range(len(EVIL)))
def test_a_card_has_the_same_structure_whatever_the_names(
    make_run: Callable[..., Path], benign: dict[str, Any], tmp_path: Path, number: int
) -> None:
    name = EVIL[number]
    run = make_run('evil')
    dress(run, name)
    before = files_under(tmp_path)
    try:
        push(run, REPO, dry_run=True)
    except UserError as error:  # what is written is searched once more, and this looks like a path of Windows
        assert name == '..\\..\\x' and str(error) == 'README.md would publish a path; nothing was uploaded'
        return
    made = files_under(tmp_path) - before
    inside = {'', '/README.md', '/config.json', '/model.safetensors', '/recipe.yaml'}
    assert made == {f'runs/evil/publish{file}' for file in inside}
    card = (run / 'publish' / 'README.md').read_text(encoding='utf-8')
    assert structure(card) == benign
    assert all(c.isprintable() or c == '\n' for c in card)
    with safe_open(run / 'publish' / 'model.safetensors', framework='pt') as weights:
        assert set(weights.metadata() or {}) <= {'format'}
    recipe = yaml.safe_load((run / 'publish' / 'recipe.yaml').read_text())
    assert isinstance(recipe, dict)


@pytest.mark.parametrize('name', EVIL)
def test_an_architecture_is_no_place_for_a_text(
    make_run: Callable[..., Path], benign: dict[str, Any], name: str
) -> None:
    run = make_run('evil')
    dress(run, 'flowers', architecture=f'test_resnet.{name}')
    try:
        push(run, REPO, dry_run=True)
    except UserError as error:
        assert str(error).isprintable()
        return
    assert structure((run / 'publish' / 'README.md').read_text(encoding='utf-8')) == benign


@pytest.mark.parametrize('name', EVIL)
def test_facts_of_strangers_are_of_their_types(make_run: Callable[..., Path], name: str) -> None:
    run = make_run('evil')
    sound = json.loads((run / 'config.json').read_text())
    for change in (
        {'input_size': [1, name, 16]},
        {'mean': [name]},
        {'std': name},
        {'interpolation': f'{name} '},
        {'classifier': f'{name} '},
    ):
        config = {**sound, 'pretrained_cfg': {**sound['pretrained_cfg'], **change}}
        (run / 'config.json').write_text(json.dumps(config))
        with pytest.raises(UserError, match=r'config\.json: ') as told:
            push(run, REPO, dry_run=True)
        assert str(told.value).isprintable()
    for change in (
        {'model_args': {name: 1}},
        {'model_args': {'checkpoint_path': name}},
        {'num_classes': name, 'model_args': {'num_classes': name}},
    ):
        (run / 'config.json').write_text(json.dumps({**sound, **change}))
        for read in (lambda: push(run, REPO, dry_run=True), lambda: load_model(str(run))):
            with pytest.raises(UserError) as told:
                read()
            assert str(told.value).isprintable()


@pytest.mark.parametrize('name', EVIL)
def test_what_else_a_config_says(make_run: Callable[..., Path], benign: dict[str, Any], name: str) -> None:
    run = make_run('evil')
    dress(run, 'flowers')
    config = json.loads((run / 'config.json').read_text())
    config['pretrained_cfg'] |= {'tag': name, 'license': name, 'origin_url': name, 'label_names': [name] * 10}
    (run / 'config.json').write_text(json.dumps(config))
    try:
        push(run, REPO, dry_run=True)
    except UserError as error:  # which is right where it looks like a path of this machine
        assert 'config.json would publish a path' in str(error) and ('/' in name or '\\' in name)
    else:
        assert structure((run / 'publish' / 'README.md').read_text(encoding='utf-8')) == benign
        json.loads((run / 'publish' / 'config.json').read_text(encoding='ascii'))


@pytest.mark.parametrize('name', EVIL)
def test_weights_that_speak_for_themselves(make_run: Callable[..., Path], tmp_path: Path, name: str) -> None:
    weights = load_file(make_run() / 'best.safetensors')
    for architecture in (name, f'test_resnet.{name}'):
        facts = {
            'architecture': architecture.encode(errors='replace').decode(),
            'num_classes': name[:9].encode(errors='replace').decode(),
        }
        save_file(weights, tmp_path / 'some.safetensors', metadata=facts)
        with pytest.raises(UserError) as told:
            load_model(str(tmp_path / 'some.safetensors'), in_chans=3)  # the weights are of one channel
        assert str(told.value).isprintable()


@pytest.mark.parametrize('name', EVIL)
def test_names_as_files(tmp_path: Path, name: str) -> None:
    for made in (file_name(name), slug(name), slug(f'hfds/{name}'), file_name(f'hf-hub:{name}')):
        assert made not in ('', '.', '..') and not made.startswith('.') and len(made.encode()) < 140
        for path in (PurePosixPath(made), PureWindowsPath(made)):
            assert len(path.parts) == 1 and not path.is_absolute() and not path.drive
        (tmp_path / made / 'results.json').parent.mkdir(exist_ok=True)
    assert {path.parent for path in tmp_path.rglob('*')} == {tmp_path}


def test_names_as_files_differ_and_last() -> None:
    assert file_name('é' * 300 + 'a') != file_name('é' * 300 + 'b')
    for name in ('resnet50-best', 'cifar100', '20250101-120000-resnet50-digits-ctc', 'Blümchen', 'a.b_c-d'):
        assert file_name(name) == name == slug(f'/some/where/{name}/')
    assert file_name('hf-hub:alice/x') == 'hf-hub_alice_x'


@pytest.mark.parametrize('name', [name for name in EVIL if name])
def test_repos_tags_and_licenses(make_run: Callable[..., Path], tmp_path: Path, name: str) -> None:
    run = make_run()
    for repo in (name, f'alice/{name}', f'{name}/x', f'alice/x/{name}', f'alice/x@{name}'):
        for read in (lambda repo=repo: push(run, repo, dry_run=True), lambda repo=repo: check_target(repo)):
            with pytest.raises(UserError, match='--repo-id') as told:
                read()
            assert str(told.value).isprintable()
    for options in ({'license': name}, {'revision': f'{name}/..'}, {'tags': [f'{name}\n']}):
        with pytest.raises(UserError, match=r'--(license|revision|tag)') as told:
            push(run, REPO, dry_run=True, **options)
        assert str(told.value).isprintable()
    assert not (run / 'publish').exists()


@pytest.mark.parametrize('name', EVIL)
def test_runs_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    args = argparse.Namespace(output='runs', experiment=name, dataset='', data_dir='', data=None, model='m', mode='ctc')
    with contextlib.suppress(UserError):
        made = PurePosixPath(run_name(args))
        assert not made.is_absolute() and '..' not in made.parts
    for where in ({'dataset': f'hfds/{name}'}, {'data_dir': f'/some/{name[:255]}'}, {'model': f'hf-hub:alice/{name}'}):
        automatic = run_name(argparse.Namespace(**{**vars(args), 'experiment': '', **where}))
        assert len(PurePosixPath(automatic).parts) == len(PureWindowsPath(automatic).parts) == 1
        (tmp_path / automatic).mkdir(exist_ok=True)
    assert {path.parent for path in tmp_path.rglob('*')} == {tmp_path}


FACTS = {
    'num_classes': 10,
    'input_size': [1, 16, 16],
    'mean': [0.3],
    'std': [0.4],
    'classifier': 'fc',
    'first_conv': 'c',
}
AT_HUB = {'hub_id': 'alice/x', 'revision': '0' * 40, 'filename': 'model.safetensors', 'sha256': 'a' * 64}


@pytest.mark.parametrize('name', EVIL)
def test_catalogs(tmp_path: Path, name: str) -> None:
    known = {**AT_HUB, 'pretrained_cfg': FACTS}
    here = {'path': 'x.safetensors', 'sha256': 'a' * 64, 'pretrained_cfg': FACTS}
    for model, entry in (
        (f'test_resnet_ctc.{name}/', known),
        (f'{name}_ctc/', known),
        ('test_resnet_ctc.a', {**known, 'hub_id': f'alice/{name}/'}),
        ('test_resnet_ctc.a', {**known, 'revision': name}),
        ('test_resnet_ctc.a', {**known, 'filename': f'{name}/.safetensors'}),
        ('test_resnet_ctc.a', {**known, 'filename': f'../{name}.safetensors'}),
        ('test_resnet_ctc.a', {**known, 'sha256': name}),
        ('test_resnet_ctc.a', {**here, 'path': f'../{name}.safetensors'}),
        ('test_resnet_ctc.a', {**here, 'path': f'a\\..\\..\\{name}.safetensors'}),
        ('test_resnet_ctc.a', {**known, 'model_args': {'pretrained_strict': False, name: 1}}),
        ('test_resnet_ctc.a', {**known, 'pretrained_cfg': {**FACTS, 'url': name}}),
        ('test_resnet_ctc.a', {**known, 'results': [{'dataset': f'{name}\n', 'metric': 'm', 'value': 1}]}),
    ):
        file = tmp_path / 'zoo.json'
        file.write_text(json.dumps({'version': 1, 'models': {model: entry}}))
        with pytest.raises(UserError, match=r'zoo\.json') as told:
            catalog.load(file)
        assert str(told.value).isprintable()


def test_what_a_catalog_may_name(tmp_path: Path) -> None:
    for path in ('x.safetensors', 'a/b..c/x.safetensors', str(tmp_path / 'x.safetensors')):
        entry = catalog.parse(
            'test_resnet_ctc.a', {'path': path, 'sha256': 'a' * 64, 'pretrained_cfg': FACTS}, 'z', tmp_path
        )
        assert Path(entry.path).is_relative_to(tmp_path)


ON_DISK = [
    '</td><script>',
    '| a | b |',
    'x\n---\nlicense: x',
    '`![](http:)`',
    '$\\frac{$',
    '$x_$ %s {x}',
    '~',
    '..\\x',
    '\x1b[2J',
    'é' * 120,
    "'; touch x; '",
]


@pytest.mark.parametrize('name', ['$\\frac{$', '| <script>', '..\\x', '`![](http:)`', 'é' * 120])
def test_data_sets_and_classes_on_disk(
    script: Callable[..., Any], make_run: Callable[..., Path], image_folder: Path, tmp_path: Path, name: str
) -> None:
    run = make_run()
    data = tmp_path / 'data' / name
    for split in ('train', 'validation'):
        for number, kind in enumerate(ON_DISK):
            shutil.copytree(image_folder / split / f'class{number % 3}', data / split / kind)
    before = files_under(tmp_path)
    where = ['-j', '0', '-b', '32', '--no-cache', '--output', str(tmp_path / 'out')]
    ended = script(
        'transfer/linear_probe.py', str(run), '--target', str(data), '--probes', 'ridge', '--shots', '1', *where
    )
    assert ended.code == 0, ended.err
    made = files_under(tmp_path) - before
    files = {'results.json', 'results.csv', 'probes.png'}
    assert made == {'out', f'out/{slug(name)}', *(f'out/{slug(name)}/{file}' for file in files)}
    assert all(c.isprintable() or c == '\n' for c in ended.out) and '\x1b[2J' not in ended.err

    (run / 'best.safetensors').touch()
    ended = script('validate.py', str(run), '--data-dir', str(data), '--num-classes', '11', '-j', '0', '-b', '32')
    assert ended.code == 2 and ended.err.count('\n') == 1  # it was trained on ten classes
    assert all(c.isprintable() or c == '\n' for c in ended.out) and '\x1b[2J' not in ended.err
