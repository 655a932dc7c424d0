"""Every setting of every command, as a flag, in a recipe and as a keyword: what it takes and what it must refuse.

The settings are read off their dataclasses, so that a new one is tried without anything added here.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ctc_timm.cli.flags import Parser, add_settings, as_flags, read_flags
from ctc_timm.cli.main import COMMANDS, main, settings_class
from ctc_timm.training.settings import FinetuneSettings, TrainSettings
from ctc_timm.utils.errors import RunError, Stopped, UserError
from ctc_timm.utils.settings import Setting, build, flatten, settings_of
from ctc_timm.utils.yaml_files import RECIPES, read_recipe

NOT_TEXT = ['\udcff', 'caf\udce9', 'a\0b', 'two\nlines', '\x1b[2J', '\x7f']  # bytes that are no UTF-8, as argv has them
TOO_LONG = ['x' * 5000, 'a/' * 3000, 'y' * 300]
NO_NUMBER = [
    *('many', '', ' ', 'nan', '-nan', 'inf', '-inf', '1e400', '-1e400', '9' * 31, '9' * 5000, '0x10', '1,5', '1..2'),
    *('None', 'true', '[1]', '--', '1 2', '1e', '%d', '{}', *NOT_TEXT),
]
NO_MAPPING = [
    *('', 'depth', '=3', 'a b=3', '1=2', 'a=[1', 'a=&x [*x]', 'a=!!python/none', 'a=2001-99-99', 'a=!!bool x'),
    *('a=' + '[' * 5000, 'a={b: 1, b: 2}', *NOT_TEXT),
]
TOKENS = ['hf_' + 'a' * 34, 'https://me:secret@host/x']


def read(cls: type, words: list[str]) -> dict[str, Any]:
    """What a command makes of these words, its required ones left out."""
    parser = Parser()
    add_settings(parser, cls)
    for action in parser._actions:
        if not action.option_strings and action.nargs != '?':
            action.nargs = '*' if action.nargs == '+' else '?'
    return read_flags(parser, cls, words)


def every_setting() -> Iterator[tuple[str, type, Setting]]:
    for command in COMMANDS:
        cls = settings_class(command)
        for setting in settings_of(cls).values():
            yield command, cls, setting


def bad_words(setting: Setting) -> Iterator[str]:
    """Words that a setting must refuse, by what it is declared to take."""
    if setting.kind is dict:
        yield from NO_MAPPING
    elif setting.choices:
        words = ['unknown', '7', f'{setting.choices[-1]}x', *NOT_TEXT, *([] if '' in setting.choices else [''])]
        yield from (word for word in words if word not in map(str, setting.choices))
    elif setting.kind is str:
        yield from [*NOT_TEXT, *TOO_LONG, *([] if 'positional' in setting.checks else ['--'])]
        yield from [*TOKENS, *([] if setting.checks.get('empty') or setting.default == '' else [''])]
    else:
        yield from NO_NUMBER
        checks = setting.checks
        if checks.get('low', checks.get('above', -1)) >= 0:
            yield from ('-1', '-0.5', '-1e30')
        if 'above' in checks:
            yield from ('0', '-0.0', '0e5')
        yield from (str(bound) for bound in (checks.get('below'),) if bound is not None)
        if 'high' in checks:
            yield str(checks['high'] + 1)


def words_for(setting: Setting, value: str, good: str = '1') -> list[str]:
    if 'positional' in setting.checks:
        return [value]
    flag = f'--{setting.name.replace("_", "-")}'
    if setting.kind is dict or (setting.many and setting.count):
        return [flag, value, *[good] * ((setting.count or 1) - 1)]
    return [f'{flag}={value}']


def refused(setting: Setting, error: UserError) -> None:
    """The message is one line that names the flag, not endless, without a token."""
    line = as_flags(' '.join(str(error).split()))
    names = [f'--{setting.name.replace("_", "-")}', str(setting.checks.get('metavar'))]
    assert any(name in line for name in names) and len(line) < 500 and line.isprintable(), line
    assert not any(token in line for token in TOKENS)


def test_every_flag_refuses_what_it_cannot_take() -> None:
    """Wrong types, nothing, out of bounds, no number, no UTF-8, control characters, secrets, no value at all."""
    tried, taken = 0, []
    for command, cls, setting in every_setting():
        if setting.kind is bool:
            flag = f'--{setting.name.replace("_", "-")}'
            cases = [[f'{flag}={value}'] for value in ('', '0', 'true', '\udcff')]
        else:
            cases = [words_for(setting, word) for word in bad_words(setting)]
            if 'positional' not in setting.checks and 'const' not in setting.checks and setting.kind is not dict:
                flag = words_for(setting, '')[0].rstrip('=')
                cases += [] if setting.many and not setting.count and not setting.default else [[flag]]
        for words in cases:
            tried += 1
            try:
                build(cls, read(cls, words))
            except UserError as error:
                refused(setting, error)
            else:
                taken.append((command, words))
    assert not taken
    assert tried >= 5000


def test_every_flag_takes_what_it_should() -> None:
    """Its default, its bounds and odd but sound texts."""
    tried = 0
    for command, cls, setting in every_setting():
        if setting.kind in (bool, dict):
            continue
        values: list[Any] = list(setting.choices)
        if setting.kind is str and not values:
            values = ['größe/日本/👩‍👧', ' a b ', '%s {}', "it's", '~/x']
        elif not values:
            default = setting.default[0] if isinstance(setting.default, tuple) and setting.default else setting.default
            values = [v for v in (default, setting.checks.get('low'), setting.checks.get('high')) if v is not None]
            values = [v for v in values if not isinstance(v, tuple) and not v >= setting.checks.get('below', v + 1)]
            values = [setting.kind(v) for v in values]
        for value in values:
            words = words_for(setting, str(value), str(value))
            words = words if setting.count else words[:1] if len(words) == 1 else words
            (found,) = read(cls, words).values()
            assert (found[0] if isinstance(found, tuple) else found) == value, (command, words)
            tried += 1
    assert tried >= 500


@pytest.mark.parametrize('command', COMMANDS)
def test_defaults_are_sound(command: str) -> None:
    """Every default is a value that its setting takes, as the args.yaml of a run has it."""
    cls = settings_class(command)
    assert build(cls, flatten(cls())) == cls()


def bad_values(setting: Setting) -> Iterator[Any]:
    """What a recipe or a keyword must not give a setting."""
    if setting.kind is dict:
        yield from (3, 'a=1', [1], True, {1: 2}, {'': 3}, {'a b': 1})
        return
    if setting.kind is bool:
        yield from (3, 'yes', [True], {'a': True}, 0, 1.0, '')
        return
    yield {'a': 1}
    yield [[1, 2]] if setting.many else [1, 2]
    if setting.count:
        yield from ([1] * (setting.count + 1), [])
    if not setting.optional:
        yield None
    if setting.choices:
        yield from ('unknown', 3, f'{setting.choices[0]}x')
    elif setting.kind is str:
        yield from (3, 2.5, *NOT_TEXT, *TOO_LONG)
    else:
        yield from ('many', '', True, float('nan'), float('inf'), 1e300, 10**31, '1e400', 'nan', *NOT_TEXT)


def test_every_key_of_a_recipe() -> None:
    """Wrong types, lists where one value belongs, mappings, no value, no numbers; the key and the file are named."""
    tried = 0
    for command, cls, setting in every_setting():
        for value in bad_values(setting):
            tried += 1
            with pytest.raises(UserError) as error:
                build(cls, {setting.name: value}, 'FILE.yaml')
                pytest.fail(f'{command}: {setting.name} takes {value!r}')
            line = str(error.value)
            assert line.startswith('FILE.yaml: ') and f'`{setting.name}`' in line and len(line) < 500
    assert tried >= 2000


TEXT = st.text(st.characters(exclude_categories=['Cc', 'Cs']), min_size=1, max_size=30).filter(
    lambda text: len(text.encode()) <= 200 and not text.startswith('-')
)
TRAIN = settings_of(TrainSettings)


def a_value(setting: Setting) -> st.SearchStrategy[Any]:
    """Values that a setting takes, as a recipe has them."""
    if setting.kind is bool:
        return st.just(True) if setting.name.startswith('no_') else st.booleans()
    if setting.kind is dict:
        scalars = st.one_of(st.integers(-99, 99), st.booleans(), st.none(), TEXT.map(lambda text: f'x{text}'))
        return st.dictionaries(st.sampled_from(['depth', 'act_layer', 'größe', 'a_1']), scalars, max_size=3)
    if setting.choices:
        one: st.SearchStrategy[Any] = st.sampled_from(setting.choices)
    elif setting.kind is str:
        one = TEXT
    else:
        one = st.one_of(st.integers(0, 50), st.floats(1e-7, 2.0)).filter(lambda value: takes(setting, value))
    if setting.many:
        return st.lists(one, min_size=setting.count or 1, max_size=setting.count or 4)
    return one


def takes(setting: Setting, value: Any) -> bool:
    try:
        build(TrainSettings, {setting.name: [value] * (setting.count or 1) if setting.many else value})
    except UserError:
        return False
    return True


def words_of(setting: Setting, value: Any) -> list[str]:
    """The same value on a command line."""
    flag = f'--{setting.name.replace("_", "-")}'
    if setting.kind is bool:
        return [flag if value else flag.replace('--', '--no-', 1)]
    if setting.kind is dict:
        return [flag, *(f'{key}={json.dumps(each, ensure_ascii=False)}' for key, each in value.items())]
    return [flag, *map(str, value)] if isinstance(value, list) else [f'{flag}={value}']


@given(st.data())
@settings(max_examples=100)
def test_flags_recipes_and_keywords_agree(data: st.DataObject) -> None:
    """Any values of any settings, through YAML, through the shell and as keywords: the same settings."""
    names = data.draw(st.lists(st.sampled_from(sorted(TRAIN)), min_size=1, max_size=8, unique=True))
    values = {name: data.draw(a_value(TRAIN[name]), label=name) for name in names}
    assume(all(takes(TRAIN[name], value) for name, value in values.items() if TRAIN[name].kind is str))
    words = [word for name, value in values.items() for word in words_of(TRAIN[name], value)]
    dashed = data.draw(st.booleans())
    recipe = {name.replace('_', '-') if dashed else name: value for name, value in values.items()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'recipe.yaml'
        file.write_text(yaml.safe_dump(recipe, allow_unicode=data.draw(st.booleans())), encoding='utf-8')
        from_recipe = build(TrainSettings, read_recipe(file))
    assert from_recipe == build(TrainSettings, read(TrainSettings, words)) == build(TrainSettings, values)


def test_yaml_numbers_switches_and_mappings(tmp_path: Path) -> None:
    """Dashes or underscores, numbers as YAML writes them or as text, one value for a list."""
    file = tmp_path / 'recipe.yaml'
    file.write_text('lr: 5e-3\nnum-negatives: 7\nscale: [0.5, 1]\nmean: 0.25\namp: true\ntorchcompile: true\n')
    chosen = build(TrainSettings, read_recipe(file))
    assert (chosen.optimizer.lr, chosen.ctc.num_negatives, chosen.augmentation.scale) == (5e-3, 7, (0.5, 1.0))
    assert (chosen.data.mean, chosen.precision.amp, chosen.execution.torchcompile) == ((0.25,), True, 'inductor')


@pytest.mark.parametrize('file', sorted(RECIPES.glob('*.yaml')), ids=lambda file: file.stem)
def test_recipes_are_read(file: Path) -> None:
    """Every key of every shipped recipe is a setting of its command, and arrives as it is written."""
    command = {'detect': 'detect', 'segment': 'segment', 'finetune': 'finetune'}.get(file.stem.split('_')[0], 'train')
    values = flatten(build(settings_class(command), read_recipe(file.stem)))
    for key, value in yaml.safe_load(file.read_text()).items():
        assert values[key.replace('-', '_')] == value, key


def test_the_recipe_of_fine_tuning_is_one_for_both_commands() -> None:
    """It makes `train` what `finetune --mode ctc` is, and changes nothing else of `finetune`."""
    recipe = read_recipe('finetune')
    default, tuned, trained = (
        flatten(build(cls, values))
        for cls, values in ((FinetuneSettings, {'mode': 'ctc'}), (FinetuneSettings, recipe), (TrainSettings, recipe))
    )
    assert default == tuned
    own = {'model', 'pretrained', 'use_ema', 'output', 'seed', 'keep_every', 'checkpoint_hist'}  # start and folder
    assert {name for name in tuned.keys() & trained.keys() if tuned[name] != trained[name]} <= own


@pytest.mark.parametrize(
    'name, alpha, tau_one, tau_two',
    [('transferability', 0.5, 0.1, 0.1), ('discriminability', 0.1, 0.5, 0.4)],
)
def test_published_recipes(name: str, alpha: float, tau_one: float, tau_two: float) -> None:
    """The settings of the paper's two recipes for CIFAR-100, as its code has them."""
    values = flatten(build(TrainSettings, read_recipe(f'cifar100_ctc_{name}')))
    published = dict(
        **dict(instance_weight=alpha, temporal_weight=1.0, instance_temperature=tau_one, temporal_temperature=tau_two),
        **dict(instance_momentum=0.9, temporal_momentum=0.9, momentum=0.9, embed_dim=128, num_negatives=16384),
        **dict(batch_size=64, epochs=300, temporal_start_epoch=200, lr=0.05, temporal_lr_scale=0.1),
        **dict(weight_decay=5e-4, instance_weight_decay_scale=2.0, positives='exact', negatives='sampled'),
        train_projector=False,
    )
    assert {key: values[key] for key in published} == published


@pytest.mark.parametrize(
    'words, message',
    [
        (['--no-such-flag'], '--no-such-flag: no such flag'),
        (['--\udcff'], 'no such flag'),
        (['--epoch', '3'], '--epoch: no such flag; nearest: --epochs'),  # no prefix stands for a flag
        (['--model-kwargs', 'depth=[1'], "--model-kwargs: depth must be a YAML value, got '[1'"),
        (['--scale', '0.5'], '--scale: expected 2 arguments'),
        (['-c', '{}/nothing'], '--config {}/nothing: no such recipe or file'),
        (['-c', 'cifar100_smal'], '--config cifar100_smal: no such recipe or file; nearest: cifar100_small'),
    ],
)
def test_a_mistake_is_one_line_and_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main('train', [word.replace('{}', str(tmp_path)) for word in words])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and message.replace('{}', str(tmp_path)) in line and line.isprintable()


@pytest.mark.parametrize('words', [['trian'], ['zoo'], ['zoo', 'lst'], ['--hlp'], ['publish']])
def test_unknown_commands(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main('', words)
    assert ended.value.code == 2 and capsys.readouterr().err.startswith(('ctc-timm', 'usage'))


def test_how_a_command_ends(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake is one line, from one process; a defect keeps its traceback; a stop has its own code."""
    for rank, error, code, lines in (
        ('0', UserError('`batch_size` 3: too\nmany'), 2, ['validate: error: --batch-size 3: too many']),
        ('1', UserError('`batch_size` 3: too many'), 2, []),
        ('0', RunError('disk full'), 1, ['validate: error: disk full']),
        ('0', Stopped("go on with `resume='auto'`"), 75, ['validate: go on with --resume auto']),
        ('0', KeyboardInterrupt(), 130, []),
    ):

        def fail(error: BaseException = error, **given: Any) -> None:
            raise error

        monkeypatch.setenv('RANK', rank)
        monkeypatch.setattr('sys.argv', ['validate'])
        monkeypatch.setitem(COMMANDS, 'validate', COMMANDS['validate']._replace(run=fail))
        with pytest.raises(SystemExit) as ended:
            main('validate', [])
        assert ended.value.code == code and capsys.readouterr().err.splitlines() == lines
    monkeypatch.setitem(COMMANDS, 'validate', COMMANDS['validate']._replace(run=lambda: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        main('validate', [])
