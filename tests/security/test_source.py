"""No call in this repository's own code that would run what it is given: ruff's rules of bandit, and what they miss."""

import re
import subprocess
import sys

from runs import ROOT

FOLDERS = ('ctc_timm', 'benchmarks', 'transfer', 'examples')
FILES = [*(file for folder in FOLDERS for file in sorted((ROOT / folder).rglob('*.py'))), *sorted(ROOT.glob('*.py'))]
FILES += [file for file in sorted((ROOT / '.ci').iterdir()) if b'python' in file.read_bytes().split(b'\n')[0]]
RULES = 'S102,S202,S301,S302,S306,S307,S323,S506,S602,S604,S605,S609'
RUFF = [sys.executable, '-m', 'ruff', 'check', '--isolated', '--select', RULES]
MISSED = re.compile(
    r'\b(allow_pickle|trust_remote_code|shell)=True|weights_only=False|\b(unsafe|full)_load\b|'
    r'\b(torch\.load|load_checkpoint)\((?!.*weights_only=True)|\b(import|from) (dill|joblib|cloudpickle)\b'
)


def found(source):
    """Lines of a source that hold one of them."""
    done = subprocess.run([*RUFF, '--output-format', 'concise', '-'], input=source, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    lines = {int(number) for number in re.findall(r'^-:(\d+):', done.stdout, re.MULTILINE)}
    return lines | {number for number, line in enumerate(source.splitlines(), 1) if MISSED.search(line)}


def test_nothing_that_is_read_is_run():
    assert len(FILES) > 70
    done = subprocess.run([*RUFF, *FILES], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert not [file for file in FILES if MISSED.search(file.read_text(encoding='utf-8'))]


HARMFUL = """eval(text)
exec(code)
os.system(command)
os.popen(command)
subprocess.run(command, shell=True)
pickle.load(file)
marshal.loads(data)
from dill import loads
yaml.load(text)
yaml.unsafe_load(text)
torch.load(file)
torch.load(file, weights_only=False)
np.load(file, allow_pickle=True)
load_dataset(name, trust_remote_code=True)
timm.models.load_checkpoint(model, file)
tarfile.open(name).extractall(folder)
"""
HARMLESS = """model.eval()
torch.load(file, weights_only=True)
timm.models.load_checkpoint(model, file, weights_only=True)
np.load(file, allow_pickle=False)
yaml.safe_load(text)
subprocess.run(['ls'])
"""


def test_the_search_finds_what_is_harmful_and_nothing_else():
    imports = 'import marshal, os, pickle, subprocess, tarfile, torch, yaml; '
    assert found(imports + HARMFUL) == set(range(1, HARMFUL.count('\n') + 1))
    assert found(imports + HARMLESS) == set()
