"""No call in this repository's own code that would run what it is given."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [
    *sorted((ROOT / 'ctc_timm').rglob('*.py')),
    *sorted((ROOT / 'benchmarks').rglob('*.py')),
    *sorted((ROOT / 'transfer').rglob('*.py')),
    *sorted(ROOT.glob('*.py')),
    *(file for file in sorted((ROOT / '.ci').iterdir()) if b'python' in file.read_bytes().split(b'\n')[0]),
]
# Calls by their whole name, or by the last part of it where any object's would do.
NAMES = {'eval', 'exec', 'compile', '__import__', 'input', 'breakpoint'}
CALLS = {
    *('os.system', 'os.popen', 'os.spawnl', 'os.spawnv', 'os.execv', 'os.execl', 'commands.getoutput'),
    *('subprocess.getoutput', 'subprocess.getstatusoutput', 'pty.spawn', 'code.interact'),
    *('pickle.load', 'pickle.loads', 'pickle.Unpickler', 'cPickle.load', 'marshal.load', 'marshal.loads'),
    *('dill.load', 'dill.loads', 'joblib.load', 'cloudpickle.load', 'cloudpickle.loads', 'shelve.open'),
    *('pandas.read_pickle', 'torch.hub.load', 'torch.jit.load', 'torch.package.PackageImporter'),
    *('yaml.load', 'yaml.load_all', 'yaml.full_load', 'yaml.unsafe_load', 'yaml.full_load_all', 'yaml.Loader'),
    *('yaml.UnsafeLoader', 'yaml.FullLoader', 'tempfile.mktemp', 'ssl._create_unverified_context'),
}
MODULES = {name.rpartition('.')[0] for name in CALLS}
FLAGS = {'shell': True, 'trust_remote_code': True, 'weights_only': False, 'allow_pickle': True, 'verify': False}


def found(source: str) -> list[str]:
    """Every use of the above, as 'line: what'."""
    uses = []
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, 'lineno', 0)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in NAMES | CALLS or name.endswith(('.extractall', '.unsafe_load')):
                uses.append(f'{line}: {name}()')
            given = {keyword.arg for keyword in node.keywords}
            if name == 'torch.load' and 'weights_only' not in given:
                uses.append(f'{line}: torch.load() without weights_only')
            if name.endswith('models.load_checkpoint') and 'weights_only' not in given:
                uses.append(f'{line}: load_checkpoint() without weights_only')
        settings: list[tuple[Any, Any]] = []
        if isinstance(node, ast.keyword):
            settings = [(node.arg, node.value)]
        if isinstance(node, ast.Dict):
            settings = [
                (key.value, value) for key, value in zip(node.keys, node.values) if isinstance(key, ast.Constant)
            ]
        for key, value in settings:
            if key in FLAGS and isinstance(value, ast.Constant) and value.value is FLAGS[key]:
                uses.append(f'{line}: {key}={value.value}')
        if isinstance(node, ast.Attribute) and ast.unparse(node) in CALLS:
            uses.append(f'{line}: {ast.unparse(node)}')
        if isinstance(node, ast.Import):  # under its own name the calls above are seen
            uses += [f'{line}: import {a.name} as {a.asname}' for a in node.names if a.name in MODULES and a.asname]
        if isinstance(node, ast.ImportFrom):
            names = [f'{node.module}.{alias.name}' for alias in node.names]
            uses += [f'{line}: from {name}' for name in names if name in CALLS]
    return uses


def test_nothing_that_is_read_is_run() -> None:
    assert len(FILES) > 70
    uses = {str(file.relative_to(ROOT)): found(file.read_text(encoding='utf-8')) for file in FILES}
    assert not {file: lines for file, lines in uses.items() if lines}


@pytest.mark.parametrize(
    'source',
    [
        'x = eval(text)',
        'exec(code)',
        'os.system(command)',
        'subprocess.run(command, shell=True)',
        "run(**{'shell': True})",
        'pickle.load(file)',
        'import pickle as p',
        'from dill import loads',
        'yaml.load(text, Loader=loader)',
        'yaml.unsafe_load(text)',
        'torch.load(file)',
        'torch.load(file, weights_only=False)',
        'np.load(file, allow_pickle=True)',
        'load_dataset(name, trust_remote_code=True)',
        'timm.models.load_checkpoint(model, file)',
        'tar.extractall(folder)',
        'from os import system',
        'open_with = os.popen',
    ],
)
def test_the_search_finds(source: str) -> None:
    assert found(source)


def test_the_search_takes_what_is_harmless() -> None:
    harmless = """
# eval(text) and os.system(command)
'pickle.load(file)'
model.eval()
torch.load(file, weights_only=True)
timm.models.load_checkpoint(model, file, weights_only=True)
np.load(file, allow_pickle=False)
yaml.safe_load(text)
subprocess.run(['ls'])
"""
    assert not found(harmless)
