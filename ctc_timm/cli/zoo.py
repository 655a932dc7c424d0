"""`ctc-timm publish` and `ctc-timm zoo`: weights on the Hub, and catalogs of them."""

from __future__ import annotations

import json as json_format
import os
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..api import recipe_settings
from ..utils.errors import UserError


def publish(run: str, repo_id: str = '', private: bool = False, **given: Any) -> None:
    """Publish a run, and say where it is and how to load it."""
    from ..hub.publish import push

    given.pop('config', None)
    if not repo_id:
        raise UserError('`repo_id`: name the repo of the Hub, USER/NAME')
    print(push(run, repo_id, recipe_settings(), private=private or None, **given).report())


def show(pattern: str = '*', json: bool = False, **given: Any) -> None:
    """List what is cataloged."""
    from ..models import catalog

    entries, problems = catalog.load_all()
    if problems:
        raise UserError(f'{catalog.ENVIRONMENT}: {problems[0]}')
    chosen = [entry for name, entry in sorted(entries.items()) if fnmatch(name, pattern)]
    if json:
        print(json_format.dumps({entry.name: entry.to_json() for entry in chosen}, indent=2))
        return
    if not chosen:
        print(f'nothing is cataloged{"" if pattern == "*" else f" as {pattern}"}; see `ctc-timm zoo add --help`')
    for entry in chosen:
        size = 'x'.join(map(str, entry.pretrained_cfg['input_size']))
        best = next((f'{row["value"]:.2f} {row["metric"]} on {row["dataset"]}' for row in entry.results), '')
        where = f'hf-hub:{entry.hub_id}@{entry.revision[:12]}' if entry.hub_id else entry.path
        classes = f'{entry.pretrained_cfg["num_classes"]} classes'
        print('  '.join(filter(None, [entry.name, classes, size, best, where])))


def add(source: str, name: str = '', tag: str = '', replace: bool = False, zoo: str = '', **given: Any) -> None:
    """Catalog a run or a repo, and say how to load it."""
    from ..hub import collect
    from ..models import catalog

    named = catalog.named_files()
    file = Path(zoo).expanduser() if zoo else named[0] if named else Path('zoo.json')
    entry = collect.add(source, file, recipe_settings(), name, tag, replace)
    print(f'{entry.name}: {entry.sha256[:12]} in {file}')
    if file.absolute() not in [known.absolute() for known in named]:
        before = os.environ.get(catalog.ENVIRONMENT, '')
        print(f'export {catalog.ENVIRONMENT}={f"{before}{os.pathsep}" if before else ""}{file.absolute()}')
    load = f"import timm, ctc_timm; model = timm.create_model('{entry.name}', pretrained=True)"
    print(f'python -c "{load}"')
