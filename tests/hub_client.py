"""Processes that talk to a Hub: each reads its environment afresh, as huggingface_hub and timm do on import."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch

ROOT = Path(__file__).resolve().parents[1]
IMAGES = 'torch.linspace(-1, 1, 1536).view(2, 3, 16, 16)'
ALICE, BOB = 'hf_aliceAliceAliceAliceAlice', 'hf_bobBobBobBobBobBobBobBob'
PUBLISHED = {'.gitattributes', 'README.md', 'config.json', 'model.safetensors', 'plots/training.png', 'recipe.yaml'}

# Does the same with each name in a thread of its own, and prints what came of it.
IN_THREADS = """
import sys, json, threading, timm, ctc_timm
found, names = {}, sys.argv[1:]
def work(name):
    try: found[name] = WORK
    except ctc_timm.UserError as error: found[name] = str(error)
threads = [threading.Thread(target=work, args=(name,)) for name in names]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps(found))
"""
COMMAND = 'from ctc_timm.cli.main import main; main()'
# A process that has the slow imports behind it and forks for each piece of code, which then imports timm and
# huggingface_hub afresh: these read most of their environment when they are imported.
FORKER = """
import json, os, sys, traceback
import matplotlib.pyplot, numpy, PIL.Image, safetensors.torch, sklearn.datasets, torch, torchvision, yaml
print('ready', flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if 'end' in job:
        print(os.waitstatus_to_exitcode(os.waitpid(job['end'], 0)[1]), flush=True)
        continue
    child = os.fork()
    if not child:
        code = 1
        try:
            for number, name in ((0, os.devnull), (1, job['out']), (2, job['err'])):
                os.dup2(os.open(name, os.O_RDONLY if not number else os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.environ.clear(); os.environ.update(job['env'])
            os.chdir(job['cwd']); sys.path[:] = job['path']; sys.argv = job['argv']
            exec(compile(job['code'], '<client>', 'exec'), {'__name__': '__main__'})
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(); sys.stderr.flush(); os._exit(code)
    print(child, flush=True)
"""


@dataclass
class Done:
    """How a process ended."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        """The last line it printed, as code where it is `python -c "..."`."""
        return self.out.strip().rpartition('\n')[2].removeprefix('python -c ').strip('"')


class Client:
    """Runs code in processes of their own, forked by another, with `env` above this process's own environment."""

    def __init__(self, forker: subprocess.Popen, folder: Path, env: dict[str, str]) -> None:
        self.forker, self.folder, self.env = forker, folder, env

    def __call__(self, code: str, *argv: str, **env: str) -> Done:
        """Run code to its end."""
        return self.end(self.start(code, *argv, **env))

    def start(self, code: str, *argv: str, **env: str) -> int:
        """Start code; its process's number."""
        mine = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'HUGGING', 'CTC_TIMM', 'TIMM', 'RANK'))}
        job = {
            'code': code,
            'argv': ['-', *argv],
            'cwd': str(self.folder),
            'path': ['', str(ROOT), *(p for p in sys.path if p)],
            'env': {k: v for k, v in {**mine, **self.env, **env}.items() if v},
            'out': str(self.folder / 'out.txt'),
            'err': str(self.folder / 'err.txt'),
        }
        return self._tell(job)

    def end(self, process: int) -> Done:
        """Wait for what was started."""
        code = self._tell({'end': process})
        return Done(code, *((self.folder / name).read_text() for name in ('out.txt', 'err.txt')))

    def kill(self, process: int) -> Done:
        """End it at once."""
        os.kill(process, signal.SIGKILL)
        return self.end(process)

    def _tell(self, job: dict[str, object]) -> int:
        assert self.forker.stdin and self.forker.stdout
        self.forker.stdin.write(json.dumps(job) + '\n')
        self.forker.stdin.flush()
        return int(self.forker.stdout.readline())

    def command(self, *argv: str, **env: str) -> Done:
        """Run `ctc-timm`."""
        return self(COMMAND, *argv, **env)


def logits_of(folder: Path) -> np.ndarray:
    """What plain timm makes of a run and `IMAGES`, in this process."""
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    return model(torch.linspace(-1, 1, 1536).view(2, 3, 16, 16)).detach().numpy()
