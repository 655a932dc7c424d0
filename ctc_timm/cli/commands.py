"""`ctc-timm`: publish runs and keep catalogs of weights.

ctc-timm publish runs/NAME --repo-id USER/resnet50_ctc
ctc-timm zoo list
ctc-timm zoo add runs/NAME --tag mine --zoo zoo.json
ctc-timm zoo sync NAMESPACE --zoo zoo.json
"""

from __future__ import annotations

import argparse
import json
import os
from fnmatch import fnmatch
from pathlib import Path
from typing import NoReturn

from ..models import catalog as catalog
from ..utils.errors import UserError
from .arguments import OneLineParser, run_script


def repo_id(text: str) -> str:
    """The id of a repo of the Hub, USER/NAME, or the empty default, for argparse."""
    if text and not catalog.is_repo_id(text):
        raise argparse.ArgumentTypeError(
            f'must be USER/NAME, of letters, digits, dots, dashes and underscores, got {text!r}'
        )
    return text


def build_parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    parser = OneLineParser(prog='ctc-timm', description='Publish CTC weights, and keep catalogs of them.')
    commands = parser.add_subparsers(title='commands', required=True, metavar='COMMAND')
    _add_publish(commands.add_parser('publish', help='publish a run on the Hub'))
    zoo = commands.add_parser('zoo', help='catalogs of weights').add_subparsers(
        title='commands', required=True, metavar='COMMAND'
    )

    listing = zoo.add_parser('list', help='show what is catalogd')
    listing.add_argument('filter', nargs='?', default='*', metavar='PATTERN', help="names, such as 'resnet*'")
    listing.add_argument('--json', action='store_true', help='everything, as JSON')
    listing.set_defaults(run=_list)

    adding = zoo.add_parser('add', help="catalog a run's folder or a repo of the Hub")
    adding.add_argument('source', metavar='RUN|USER/NAME[@REVISION]', help='what to catalog')
    adding.add_argument('--name', default='', metavar='ARCH_ctc[.TAG]', help='its name; made of its own when not given')
    adding.add_argument('--tag', default='', help='the part of the name after the dot')
    adding.add_argument(
        '--replace', dest='overwrite', action='store_true', help='other weights of that name may be replaced'
    )
    adding.set_defaults(run=_add)

    syncing = zoo.add_parser('sync', help='catalog every repo of a namespace that is tagged ctc')
    syncing.add_argument('namespace', metavar='NAMESPACE', help='user or organization on the Hub')
    syncing.set_defaults(run=_sync)
    for command in (adding, syncing):
        command.add_argument(
            '--zoo',
            default='',
            metavar='FILE',
            help=f'the catalog; the first of {catalog.ENVIRONMENT}, or zoo.json',
        )
    return parser


def main() -> None:
    """Read the command line and do what it says."""
    args = build_parser().parse_args()
    args.run(args)


def script() -> NoReturn:
    """The console script."""
    run_script(main)


def _add_publish(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('folder', metavar='RUN', help="a run's folder")
    parser.add_argument('--repo-id', type=repo_id, required=True, metavar='USER/NAME', help='best named ARCH_ctc[.TAG]')
    parser.add_argument('--private', action='store_true', help='make a new repo private')
    parser.add_argument('--revision', default='', metavar='BRANCH', help='commit to this branch')
    parser.add_argument('--create-pr', action='store_true', help='open a pull request')
    parser.add_argument('--tag', action='append', default=[], metavar='TAG', help='one more tag; may be repeated')
    parser.add_argument('--license', default='apache-2.0', metavar='ID', help='by its identifier on the Hub')
    parser.add_argument('--dry-run', action='store_true', help='write RUN/publish and send nothing')
    parser.set_defaults(run=_publish)


def _publish(args: argparse.Namespace) -> None:
    from ..hub.publish import push

    done = push(
        args.folder,
        args.repo_id,
        private=args.private or None,
        revision=args.revision,
        create_pr=args.create_pr,
        tags=args.tag,
        license=args.license,
        dry_run=args.dry_run,
    )
    print(done.report())


def _list(args: argparse.Namespace) -> None:
    entries, problems = catalog.load_all()
    if problems:
        raise UserError(f'{catalog.ENVIRONMENT}: {problems[0]}')
    shown = [entry for name, entry in sorted(entries.items()) if fnmatch(name, args.filter)]
    if args.json:
        print(json.dumps({entry.name: entry.to_json() for entry in shown}, indent=2))
        return
    if not shown:
        print(f'nothing is catalogd{"" if args.filter == "*" else f" as {args.filter}"}; see `ctc-timm zoo add --help`')
    for entry in shown:
        size = 'x'.join(map(str, entry.config['input_size']))
        best = next((f'{row["value"]:.2f} {row["metric"]} on {row["dataset"]}' for row in entry.results), '')
        where = f'hf-hub:{entry.hub_id}@{entry.revision[:12]}' if entry.hub_id else entry.path
        print('  '.join(filter(None, [entry.name, f'{entry.config["num_classes"]} classes', size, best, where])))


def _add(args: argparse.Namespace) -> None:
    from ..hub.collect import add

    file = _file(args)
    entry = add(args.source, file, args.name, args.tag, args.overwrite)
    _tell(file, [entry])


def _sync(args: argparse.Namespace) -> None:
    from ..hub.collect import sync

    if not catalog.is_word(args.namespace):
        raise UserError(f'NAMESPACE {args.namespace!r}: must be the name of a user or an organization')
    file = _file(args)
    found = sync(args.namespace, file, print)
    _tell(file, found)


def _file(args: argparse.Namespace) -> Path:
    named = catalog.named_files()
    return Path(args.zoo).expanduser() if args.zoo else named[0] if named else Path('zoo.json')


def _tell(file: Path, entries: list[catalog.Entry]) -> None:
    for entry in entries:
        print(f'{entry.name}: {entry.sha256[:12]} in {file}')
    if not entries:
        print(f'nothing found; {file} holds what it held')
        return
    if file.absolute() not in [known.absolute() for known in catalog.named_files()]:
        before = os.environ.get(catalog.ENVIRONMENT, '')
        print(f'export {catalog.ENVIRONMENT}={f"{before}{os.pathsep}" if before else ""}{file.absolute()}')
    load = f"import timm, ctc_timm; model = timm.create_model('{entries[0].name}', pretrained=True)"
    print(f'python -c "{load}"')


if __name__ == '__main__':
    script()
