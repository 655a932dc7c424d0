"""Settings of publishing and of catalogs. Nothing here imports torch or timm."""

from __future__ import annotations

from dataclasses import dataclass

from ..utils.settings import setting


@dataclass(frozen=True)
class PublishSettings:
    """All settings of `ctc_timm.publish`."""

    run: str = setting('', "a run's folder", positional='', metavar='RUN')
    repo_id: str = setting('', 'best named ARCH_ctc[.TAG]', metavar='USER/NAME')
    private: bool = setting(False, 'make a new repo private')
    revision: str = setting('', 'commit to this branch', metavar='BRANCH')
    create_pr: bool = setting(False, 'open a pull request')
    tags: tuple[str, ...] = setting((), 'more tags', aliases=('--tag',), metavar='TAG')
    license: str = setting('apache-2.0', 'by its identifier on the Hub', metavar='ID')
    dry_run: bool = setting(False, 'write RUN/publish and send nothing')


@dataclass(frozen=True)
class ZooListSettings:
    """All settings of `ctc-timm zoo list`."""

    pattern: str = setting('*', "names, such as 'resnet*'", positional='?', metavar='PATTERN')
    json: bool = setting(False, 'everything, as JSON')


@dataclass(frozen=True)
class ZooAddSettings:
    """All settings of `ctc-timm zoo add`."""

    source: str = setting('', 'what to catalog', positional='', metavar='RUN|USER/NAME[@REVISION]')
    name: str = setting('', 'its name; made of its own when not given', metavar='ARCH_ctc[.TAG]')
    tag: str = setting('', 'the part of the name after the dot', metavar='TAG')
    replace: bool = setting(False, 'other weights of that name may be replaced')
    zoo: str = setting('', 'the catalog; the first of CTC_TIMM_ZOO, or zoo.json', metavar='FILE')
