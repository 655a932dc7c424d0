"""No call in this repository's own code that would run what it is given."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FILES = [
    *sorted((ROOT / 'ctc_timm').rglob('*.py')),
    *sorted((ROOT / 'benchmarks').rglob('*.py')),
    *(file for folder in ('transfer', 'examples') for file in sorted((ROOT / folder).rglob('*.py'))),
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
        names: list[str] = []
        settings: list[tuple[Any, Any]] = []
        if isinstance(node, ast.Call):
            name, keywords = ast.unparse(node.func), {keyword.arg for keyword in node.keywords}
            loads = name == 'torch.load' or name.endswith('models.load_checkpoint')
            if name in NAMES | CALLS or name.endswith(('.extractall', '.unsafe_load')):
                names.append(name)
            if loads and 'weights_only' not in keywords:
                names.append(f'{name} without weights_only')
            settings = [(keyword.arg, keyword.value) for keyword in node.keywords]
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values)
            settings = [(key.value, value) for key, value in pairs if isinstance(key, ast.Constant)]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in CALLS:
            names.append(ast.unparse(node))
        elif isinstance(node, ast.Import):  # under its own name the calls above are seen
            names = [f'import {a.name} as {a.asname}' for a in node.names if a.name in MODULES and a.asname]
        elif isinstance(node, ast.ImportFrom):
            names = [name for alias in node.names if (name := f'{node.module}.{alias.name}') in CALLS]
        for key, value in settings:
            if key in FLAGS and isinstance(value, ast.Constant) and value.value is FLAGS[key]:
                names.append(f'{key}={value.value}')
        uses += [f'{getattr(node, "lineno", 0)}: {name}' for name in names]
    return uses


def test_nothing_that_is_read_is_run() -> None:
    assert len(FILES) > 70
    uses = {str(file.relative_to(ROOT)): found(file.read_text(encoding='utf-8')) for file in FILES}
    assert not {file: lines for file, lines in uses.items() if lines}


HARMFUL = """
x = eval(text)
exec(code)
os.system(command)
subprocess.run(command, shell=True)
run(**{'shell': True})
pickle.load(file)
import pickle as p
from dill import loads
yaml.load(text, Loader=loader)
yaml.unsafe_load(text)
torch.load(file)
torch.load(file, weights_only=False)
np.load(file, allow_pickle=True)
load_dataset(name, trust_remote_code=True)
timm.models.load_checkpoint(model, file)
tar.extractall(folder)
from os import system
open_with = os.popen
"""
HARMLESS = """
# eval(text) and os.system(command)
'pickle.load(file)'
model.eval()
torch.load(file, weights_only=True)
timm.models.load_checkpoint(model, file, weights_only=True)
np.load(file, allow_pickle=False)
yaml.safe_load(text)
subprocess.run(['ls'])
"""


def test_the_search_finds_what_is_harmful_and_nothing_else() -> None:
    assert {use.partition(':')[0] for use in found(HARMFUL)} == {str(i + 2) for i in range(HARMFUL.count('\n') - 1)}
    assert not found(HARMLESS)
