"""Flags and recipes."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import yaml
from ctc_timm.cli.commands import flags as arguments

from ctc_timm.cli.arguments import Parser, load_recipe, parse, run_script
from ctc_timm.cli.training_flags import add_arguments
from ctc_timm.utils.errors import UserError

RECIPES = [
    file
    for file in sorted((Path(__file__).resolve().parents[2] / 'ctc_timm' / 'recipes').glob('*.yaml'))
    if not file.stem.startswith(('detect_', 'segment_'))  # of other scripts
]


@pytest.fixture
def parser() -> Parser:
    parser = Parser()
    add_arguments(parser)
    return parser


def recipe(tmp_path: Path, text: str | bytes) -> str:
    file = tmp_path / 'recipe.yaml'
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(file)


def test_typed_over_recipe_over_defaults(parser: Parser, tmp_path: Path) -> None:
    """Dashes or underscores, numbers as YAML writes them or as text, lists, switches and mappings."""
    text = (
        'lr: 5e-3\nnum_negatives: 7\nscale: [0.5, 1]\nmean: 0.25\namp: true\nfilter-bias-and-bn: false\n'
        'model-kwargs: {act_layer: gelu}\ntorchcompile: true\nimg-size: null\nepochs: 9\n'
    )
    args = parse(parser, ['-c', recipe(tmp_path, text), '--epochs', '4', '--opt-kwargs', 'a=1', 'b=[x, 2.5]', 'c='])
    assert (args.lr, args.num_negatives, args.scale, args.mean) == (5e-3, 7, [0.5, 1.0], [0.25])
    assert (args.amp, args.filter_bias_and_bn, args.torchcompile) == (True, False, 'inductor')
    assert (args.model_kwargs, args.opt_kwargs) == ({'act_layer': 'gelu'}, {'a': 1, 'b': ['x', 2.5], 'c': None})
    assert (args.img_size, args.epochs, args.batch_size) == (None, 4, 128)


def test_the_default_recipe_is_for_no_data_only(parser: Parser, tmp_path: Path) -> None:
    default = Path(recipe(tmp_path, 'epochs: 3\n'))
    assert parse(parser, [], default_recipe=default).epochs == 3
    other = Parser()
    add_arguments(other)
    assert parse(other, ['--dataset', 'hfds/x'], default_recipe=default).epochs == 300


def test_presets_come_between(parser: Parser, tmp_path: Path) -> None:
    """What a resumed run was started with beats the recipe, and what is typed beats both."""
    file = recipe(tmp_path, 'epochs: 3\nlr: 0.1\nbatch-size: 8\n')
    args = parse(parser, ['-c', file, '--lr', '0.4'], presets=lambda first: ({'epochs': 5, 'lr': 0.2}, 'args.yaml'))
    assert (args.epochs, args.lr, args.batch_size) == (5, 0.4, 8)


@pytest.mark.parametrize('file', RECIPES, ids=lambda file: file.stem)
def test_recipes_are_read(parser: Parser, file: Path) -> None:
    """Every key of every recipe is a flag, and arrives as it is written."""
    args = parse(parser, ['-c', str(file)])
    for key, value in yaml.safe_load(file.read_text()).items():
        assert getattr(args, key.replace('-', '_')) == value, key


@pytest.mark.parametrize(
    'name, alpha, tau_one, tau_two',
    [('transferability', 0.5, 0.1, 0.1), ('discriminability', 0.1, 0.5, 0.4)],
)
def test_published_recipes(parser: Parser, name: str, alpha: float, tau_one: float, tau_two: float) -> None:
    """The settings of the paper's two recipes for CIFAR-100, as its code has them."""
    file = next(file for file in RECIPES if name in file.stem)
    args = parse(parser, ['-c', str(file)])
    assert (args.instance_weight, args.temporal_weight) == (alpha, 1.0)
    assert (args.instance_temperature, args.temporal_temperature) == (tau_one, tau_two)
    assert (args.instance_momentum, args.temporal_momentum, args.momentum) == (0.9, 0.9, 0.9)
    assert (args.embed_dim, args.num_negatives, args.batch_size) == (128, 16384, 64)
    assert (args.epochs, args.temporal_start_epoch, args.lr, args.temporal_lr_scale) == (300, 200, 0.05, 0.1)
    assert (args.weight_decay, args.instance_weight_decay_scale) == (5e-4, 2.0)
    assert (args.positives, args.negatives, args.train_projector) == ('exact', 'sampled', False)


BAD_RECIPES = {
    'num-negative: 3': "'num-negative' is no flag; nearest: num_negatives",
    'num-negatives: 0': '--num-negatives: must be at least 1, got 0',
    'epochs: many': "--epochs: must be a whole number, got 'many'",
    'epochs: [1, 2]': "--epochs: must be a whole number, got '[1, 2]'",
    'epochs: {a: 1}': "--epochs takes no mapping, got {'a': 1}",
    'momentum: null': '--momentum has no value; leave it out for 0.9',
    'amp: 3': '--amp is a switch, true or false, got 3',
    'filter-bias-and-bn: 1': '--filter-bias-and-bn is a switch, true or false, got 1',
    'model-kwargs: 3': '--model-kwargs takes a mapping, got 3',
    'scale: [0.1, 0.2, 0.3]': '--scale takes 2 values, got [0.1, 0.2, 0.3]',
    'mode: ctcc': "--mode must be one of ctc, vanilla, got 'ctcc'",
    'instance-momentum: 1.0': '--instance-momentum: must be in [0, 1), got 1.0',
    '- a\n- b': 'must be a mapping of flags to values, got a list',
    'epochs: [1': 'not valid YAML',
}


@pytest.mark.parametrize('text', BAD_RECIPES)
def test_bad_recipes(parser: Parser, tmp_path: Path, text: str) -> None:
    file = recipe(tmp_path, text)
    with pytest.raises(UserError) as error:
        parse(parser, ['-c', file])
    assert BAD_RECIPES[text] in str(error.value) and file in str(error.value)


def test_recipe_that_is_not_there(tmp_path: Path) -> None:
    recipe(tmp_path, 'epochs: 1')
    with pytest.raises(UserError, match='recpe.yaml: no such file; nearest: recipe.yaml'):
        load_recipe(tmp_path / 'recpe.yaml')
    with pytest.raises(UserError, match='not valid YAML'):
        load_recipe(recipe(tmp_path, b'\xff\xfe\x00'))
    assert load_recipe(recipe(tmp_path, '')) == {}


@pytest.mark.parametrize(
    'words, message',
    [
        ('--num-negative 3', '--num-negative: no such flag; nearest: --num-negatives'),
        ('--instance-temperature 0', '--instance-temperature: must be above 0, got 0'),
        ('--temporal-temperature nan', '--temporal-temperature: must be above 0, got nan'),
        ('--temporal-momentum -0.1', '--temporal-momentum: must be in [0, 1), got -0.1'),
        ('--momentum 1.5', '--momentum: must be in [0, 1), got 1.5'),
        ('--hflip 1.2', '--hflip: must be in [0, 1], got 1.2'),
        ('--temporal-start-epoch -1', '--temporal-start-epoch: must not be negative, got -1'),
        ('--weight-decay -1', '--weight-decay: must not be negative, got -1'),
        ('--batch-size many', "--batch-size: must be a whole number, got 'many'"),
        ('--model-kwargs depth', "--model-kwargs: must be key=value, got 'depth'"),
        ('--model-kwargs depth=[1', "--model-kwargs: depth must be a YAML value, got '[1'"),
        ('--scale 0.5', '--scale: expected 2 arguments'),
    ],
)
def test_bad_flags(parser: Parser, words: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(parser, words.split())
    assert message in str(error.value)


@pytest.mark.parametrize(
    'kind, good, bad',
    [
        (arguments.positive_int, {'1': 1, '30': 30}, ('0', '-2', '1.5', 'x')),
        (arguments.non_negative_int, {'0': 0}, ('-1', '0.5')),
        (arguments.positive_float, {'1e-3': 1e-3}, ('0', '-1', 'inf', 'nan')),
        (arguments.non_negative_float, {'0': 0.0}, ('-1e-9', 'inf', 'nan')),
        (arguments.momentum, {'0': 0.0, '0.999': 0.999}, ('1', '-0.1', 'nan')),
        (arguments.probability, {'0': 0.0, '1': 1.0}, ('1.01', '-0.1', 'nan')),
    ],
)
def test_number_types(kind: object, good: dict[str, float], bad: tuple[str, ...]) -> None:
    assert callable(kind)
    for text, value in good.items():
        assert kind(text) == value
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=text.replace('.', r'\.')):
            kind(text)


def test_how_a_script_ends(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake of the user's is one line and 2, from one process; a defect keeps its traceback."""

    def mistaken() -> None:
        raise UserError('--x 3: too\nmany')

    for rank, expected in (('0', 1), ('1', 0)):
        monkeypatch.setenv('RANK', rank)
        with pytest.raises(SystemExit) as ended:
            run_script(mistaken)
        err = capsys.readouterr().err
        assert ended.value.code == 2 and len(err.splitlines()) == expected
        assert not expected or err.endswith(': error: --x 3: too many\n')
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: None)
    assert ended.value.code == 0
