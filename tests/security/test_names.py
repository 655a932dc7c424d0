"""Names of strangers, in every place where one can stand: they stay text, and make no path outside their folder."""

from __future__ import annotations

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

from ctc_timm.api import recipe_settings
from ctc_timm.hub.publish import check_target, push
from ctc_timm.measure.transfer_sets import slug
from ctc_timm.models import catalog
from ctc_timm.models.loading import load_model
from ctc_timm.runs import run_name
from ctc_timm.utils.errors import UserError
from ctc_timm.utils.text import file_name
from ctc_timm.utils.weights_files import HASH, save_weights, tensors_hash

SETTINGS = recipe_settings()
REPO = 'alice/test_resnet_ctc'
EVIL = [
    # HTML, Markdown and the card's front matter
    '</td><script>alert(1)</script>',
    '</details></summary><iframe src="http://evil.example">',
    '| a | b |\n| --- | --- |\n| c | d |',
    'x\n---\nlicense: evil\n---\n',
    *(
        '[x](javascript:alert(1))',
        '[x]: http://evil.example\n[x]',
        '](http://evil.example) ![y',
        '<http://evil.example>',
    ),
    'http://evil.example www.evil.example evil@evil.example',
    '```\n</details>\n```',
    '**bold** _it_ ~~gone~~ ==mark== $x^2$ :smile: @alice #1',
    '&amp;lt;b&amp;gt; &lt;b&gt; &#60;b&#62;',
    '- x\n1. y\n> z\n    code\n\n# Heading',
    # templates, YAML and shells
    *('{{ 7 * 7 }} {% raw %} ${x} {x} %s', '!!python/object/apply:os.system [touch x]', '"\n- y: {[', "'; touch x; '"),
    # paths, and what cannot be printed
    *('../../x', '..\\..\\x', 'C:\\x', '..', ''),
    *('a\0b', '\x1b[2J\x1b]0;title\x07', '\u202egnp.exe \u200b\u2028\u2029\x85', '\ud800 \udcff', 'é' * 400),
]


@pytest.fixture(scope='module')
def benign(untrained, tmp_path_factory):
    """The structure of a card whose names are harmless."""
    run = Path(shutil.copytree(untrained, tmp_path_factory.mktemp('benign') / 'run'))
    dress(run, 'flowers')
    push(run, REPO, SETTINGS, dry_run=True)
    found = structure(run)
    assert found['to'] == {'', 'https://arxiv.org/abs/2203.03871'} and 'hr' not in found['blocks']
    assert found['html'] == ['<details><summary>recipe.yaml, all settings</summary>', '</details>']
    return found


def dress(run: Path, name: str, architecture: str = 'test_resnet') -> None:
    """Give a run that name wherever one comes from outside and is shown."""
    known = yaml.safe_load((run / 'args.yaml').read_text())
    places = ('dataset', 'val_split', 'opt', 'sched', 'negatives', 'input_key', 'lr', 'epochs', 'model', 'mode')
    args = {**dict.fromkeys(places, name), 'model_kwargs': {name: name, 'list': [name, 1]}, name: name}
    (run / 'args.yaml').write_text(yaml.safe_dump({**known, **args}))
    weights = run / 'best.safetensors'
    tensors = load_file(weights)
    measured = {'weights': str(weights), HASH: tensors_hash(tensors), 'model': name}
    row = {'target': name, 'split': name, 'method': name, 'top1': 50.0, 'top1_low': name, 'num_test': 32, 'shots': name}
    hub_row = {**row, 'target': f'hfds/{name}', 'method': 'ridge', 'shots': None}
    classes = [{'class': i, 'name': f'{name}{i}', 'top1': 1.0} for i in range(10)]
    validation = {'dataset': name, 'split': name, 'top1': 50.0, 'top5': name, 'num_images': 32, 'per_class': classes}
    for folder, content in (
        ('validation', {**validation, **measured}),
        ('linear_probe/some', {**measured, 'rows': [row, hub_row, 3, None]}),
        ('dynamics', {'targets': [name]}),
    ):
        (run / folder).mkdir(parents=True, exist_ok=True)
        (run / folder / 'results.json').write_text(json.dumps(content))
    change_config(run, architecture=architecture, label_names=[f'{name}{i}' for i in range(10)])
    keys = ('architecture', 'num_classes', 'eval_top1', 'eval_num_images', 'epoch')
    save_weights(weights, tensors, dict.fromkeys(keys, name.encode(errors='replace').decode()))


def change_config(run: Path, **changes: Any) -> None:
    """Change what a run's config.json states; `pretrained_cfg` is added to."""
    config = json.loads((run / 'config.json').read_text())
    config['pretrained_cfg'] |= changes.pop('pretrained_cfg', {})
    (run / 'config.json').write_text(json.dumps({**config, **changes}))


def structure(run: Path) -> dict[str, Any]:
    """What a card makes of itself: keys of the front matter, headings, kinds of blocks and of text, HTML, links."""
    card = (run / 'publish' / 'README.md').read_text(encoding='utf-8')
    assert all(c.isprintable() or c == '\n' for c in card)
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


def refused(call: Callable[[], Any], match: str | None = None) -> None:
    """It is refused in one line of what can be printed."""
    with pytest.raises(UserError, match=match) as caught:
        call()
    assert str(caught.value).isprintable()


@pytest.mark.parametrize('number', range(len(EVIL)))
def test_a_card_has_the_same_structure_whatever_the_names(make_run, benign, tmp_path, number):
    name, run = EVIL[number], make_run('evil')
    dress(run, name)
    before = files_under(tmp_path)
    if name == '..\\..\\x':  # what is written is searched once more, and this looks like a path of Windows
        refused(
            lambda: push(run, REPO, SETTINGS, dry_run=True),
            r'README\.md would publish a path; nothing was uploaded',
        )
        return
    push(run, REPO, SETTINGS, dry_run=True)
    inside = {'', '/README.md', '/config.json', '/model.safetensors', '/recipe.yaml'}
    assert files_under(tmp_path) - before == {f'runs/evil/publish{file}' for file in inside}
    assert structure(run) == benign
    with safe_open(run / 'publish' / 'model.safetensors', framework='pt') as weights:
        assert set(weights.metadata() or {}) <= {'format'}
    assert isinstance(yaml.safe_load((run / 'publish' / 'recipe.yaml').read_text()), dict)


@pytest.mark.parametrize('name', EVIL)
def test_what_a_config_or_a_weights_file_says(make_run, benign, tmp_path, name):
    """Texts stay texts, or the run is refused in one line."""
    run = make_run('evil')
    more = {'tag': name, 'license': name, 'origin_url': name, 'label_names': [name] * 10}
    for changes in ({'pretrained_cfg': more}, {'architecture': f'test_resnet.{name}', 'pretrained_cfg': {}}):
        dress(run, 'flowers')
        change_config(run, **changes)
        try:
            push(run, REPO, SETTINGS, dry_run=True)
        except UserError as error:  # which is right where it looks like a path of this machine
            assert str(error).isprintable()
        else:
            assert structure(run) == benign
            json.loads((run / 'publish' / 'config.json').read_text(encoding='ascii'))

    shutil.rmtree(run)
    sound = (make_run('evil') / 'config.json').read_text()
    cfgs = ({'input_size': [1, name, 16]}, {'mean': [name]}, {'std': name}, {'interpolation': f'{name} '})
    cfgs = (*cfgs, {'classifier': f'{name} '})
    args = ({name: 1}, {'checkpoint_path': name}, {'pretrained_cfg_overlay': name})
    changes = [*({'pretrained_cfg': cfg} for cfg in cfgs), *({'model_args': arg} for arg in args)]
    for change in (*changes, {'num_classes': name, 'model_args': {'num_classes': name}}):
        (run / 'config.json').write_text(sound)
        change_config(run, **change)
        refused(lambda: push(run, REPO, SETTINGS, dry_run=True))
        refused(lambda: load_model(run))

    # Weights that speak for themselves, of one channel.
    weights, text = load_file(run / 'best.safetensors'), name.encode(errors='replace').decode()
    for architecture in (text, f'test_resnet.{text}'):
        metadata = {'architecture': architecture, 'num_classes': text[:9]}
        save_file(weights, tmp_path / 'some.safetensors', metadata=metadata)
        refused(lambda: load_model(tmp_path / 'some.safetensors', in_chans=3))


@pytest.mark.parametrize('name', EVIL)
def test_names_as_files(tmp_path, name):
    names = [file_name(name), slug(name), slug(f'hfds/{name}'), file_name(f'hf-hub:{name}')]
    names += [run_name('', 'runs', words) for words in (['m', name, 'ctc'], [f'hf-hub:alice/{name}', 'x'])]
    for made in names:
        assert made not in ('', '.', '..') and not made.startswith('.') and len(made.encode()) < 140
        for path in (PurePosixPath(made), PureWindowsPath(made)):
            assert len(path.parts) == 1 and not path.is_absolute() and not path.drive
        (tmp_path / made).mkdir(exist_ok=True)
    assert {path.parent for path in tmp_path.rglob('*')} == {tmp_path}
    with contextlib.suppress(UserError):
        path = PurePosixPath(run_name(name, 'runs', []))
        assert not path.is_absolute() and '..' not in path.parts


def test_names_as_files_differ_and_last():
    assert file_name('é' * 300 + 'a') != file_name('é' * 300 + 'b')
    for name in ('resnet50-best', 'cifar100', '20250101-120000-resnet50-digits-ctc', 'Blümchen', 'a.b_c-d'):
        assert file_name(name) == name == slug(f'/some/where/{name}/')
    assert file_name('hf-hub:alice/x') == 'hf-hub_alice_x'


@pytest.mark.parametrize('name', [name for name in EVIL if name])
def test_repos_tags_and_licenses(make_run, name):
    run = make_run()
    for repo in (name, f'alice/{name}', f'{name}/x', f'alice/x/{name}', f'alice/x@{name}'):
        for read in (
            lambda repo=repo: push(run, repo, SETTINGS, dry_run=True),
            lambda repo=repo: check_target(repo),
        ):
            refused(read, '`repo_id`')
    for options in ({'license': name}, {'revision': f'{name}/..'}, {'tags': [f'{name}\n']}):
        refused(
            lambda options=options: push(run, REPO, SETTINGS, dry_run=True, **options),
            r'`(license|revision|tags)`',
        )
    assert not (run / 'publish').exists()


CONFIG = {'num_classes': 10, 'input_size': [1, 16, 16], 'mean': [0.3], 'std': [0.4], 'first_conv': 'c'}
HERE = {'path': 'x.safetensors', 'sha256': 'a' * 64, 'pretrained_cfg': CONFIG}
PLACE = {'hub_id': 'alice/x', 'revision': '0' * 40, 'filename': 'model.safetensors', 'sha256': 'a' * 64}
AT_HUB: dict[str, Any] = {**PLACE, 'pretrained_cfg': CONFIG}


@pytest.mark.parametrize('name', EVIL)
def test_catalogs(tmp_path, name):
    file = tmp_path / 'zoo.json'
    changes: list[dict[str, Any]] = [
        {'hub_id': f'alice/{name}/'},
        *({key: name} for key in ('revision', 'sha256')),
        *({'filename': file} for file in (f'{name}/.safetensors', f'../{name}.safetensors')),
        {'model_args': {'pretrained_strict': False, name: 1}},
        {'pretrained_cfg': {**CONFIG, 'interpolation': f'{name} '}},
        {'results': [{'dataset': f'{name}\n', 'metric': 'm', 'value': 1}]},
    ]
    paths = (f'../{name}.safetensors', f'a\\..\\..\\{name}.safetensors')
    entries = [*({**AT_HUB, **change} for change in changes), *({**HERE, 'path': path} for path in paths)]
    names = ((f'test_resnet_ctc.{name}/', AT_HUB), (f'{name}_ctc/', AT_HUB))
    for model, entry in (*names, *(('test_resnet_ctc.a', entry) for entry in entries)):
        file.write_text(json.dumps({'version': 1, 'models': {model: entry}}))
        refused(lambda: catalog.load(file), r'zoo\.json')


ON_DISK = [
    *('</td><script>', '| a | b |', 'x\n---\nlicense: x', '`![](http:)`', '$\\frac{$', '$x_$ %s {x}', '~', '..\\x'),
    *('\x1b[2J', 'é' * 120, "'; touch x; '"),
]


@pytest.mark.parametrize('name', ['$\\frac{$', '| <script>', '..\\x', '`![](http:)`', 'é' * 120])
def test_data_sets_and_classes_on_disk(script, make_run, image_folder, tmp_path, name):
    run = make_run()
    data = tmp_path / 'data' / name
    for split in ('train', 'validation'):
        for number, kind in enumerate(ON_DISK):
            shutil.copytree(image_folder / split / f'class{number % 3}', data / split / kind)
    before = files_under(tmp_path)
    where = ['-j', '0', '-b', '32', '--no-cache', '--output', str(tmp_path / 'out'), '--probes', 'ridge']
    ended = script('transfer/linear_probe.py', str(run), '--target', str(data), '--shots', '1', *where)
    assert ended.code == 0, ended.err
    files = {'results.json', 'results.csv', 'probes.png'}
    made = {f'out/{slug(name)}{file}' for file in ['', *(f'/{f}' for f in files)]}
    assert files_under(tmp_path) - before == {'out', *made}
    other = script('validate.py', str(run), '--data-dir', str(data), '--num-classes', '11', '-j', '0', '-b', '32')
    assert other.code == 2 and other.err.count('\n') == 1  # it was trained on ten classes
    for done in (ended, other):
        assert all(c.isprintable() or c == '\n' for c in done.out) and '\x1b[2J' not in done.err
