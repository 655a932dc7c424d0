"""The model card of a run: what it is, how it was made, how good it is, how to use it.

Everything in it comes from the run, by the template model_card.md. Names from outside are escaped wherever Markdown or
HTML would read them as more than text; the front matter is written by huggingface_hub.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import get_pretrained_cfg, is_model_pretrained

from ..models.catalog import NAME, is_repo_id
from .summary import Result, RunDetails

_TEMPLATE = Path(__file__).with_name('model_card.md')


def write_card(run: RunDetails, repo_id: str, license: str, tags: Sequence[str], pictures: dict[str, str]) -> str:
    """Write README.md; pictures are titles by files in the repo."""
    namespace, _, model = repo_id.partition('/')
    if model.partition('.')[0] == f'{run.architecture}_ctc' and NAME.fullmatch(model):
        name, how = model, f'with `CTC_TIMM_NAMESPACE={namespace}`, or after `ctc-timm zoo add {repo_id}`'
    else:
        name = f'{run.architecture}_ctc.mine'
        how = f'after `ctc-timm zoo add {repo_id} --name {name}`'
    listing = yaml.safe_dump(run.recipe, sort_keys=True, allow_unicode=False).rstrip()
    card = ModelCard.from_template(
        _card_data(run, repo_id, license, tags),
        str(_TEMPLATE),
        text=text,
        title=model,
        run=run,
        repo_id=repo_id,
        name=name,
        how=how,
        pictures=pictures,
        listing=listing,
        fence='`' * max(3, 1 + max((len(found) for found in re.findall('`+', listing)), default=0)),
    )
    return f'{card}\n'


def text(value: Any) -> str:
    """A text from outside as Markdown that shows it and does nothing else."""
    plain = _one_line(value).replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')
    # A word's own dot, dash or underscore means nothing to Markdown; what could mean something gets a backslash.
    plain = re.sub(r'([\\`*{}\[\]()#+!|~$^=:@])', r'\\\1', plain)
    plain = re.sub(r'(?<![A-Za-z0-9])([_.-])|([_.-])(?![A-Za-z0-9])', lambda match: '\\' + match.group(), plain)
    return re.sub(r'(www)\.', r'\1\\.', plain, flags=re.IGNORECASE)  # else it would be a link


def _one_line(value: Any) -> str:
    """A text from outside on one line, not too long, without what would hide in it."""
    return ' '.join(''.join(c if c.isprintable() else ' ' for c in str(value)).split())[:200]


def _card_data(run: RunDetails, repo_id: str, license: str, tags: Sequence[str]) -> ModelCardData:
    all_tags = ['image-classification', 'timm', 'ctc-timm']
    all_tags += ['ctc'] if run.is_ctc else []
    all_tags += ['transformers'] if run.stock else []
    return ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        license=license,
        tags=list(dict.fromkeys([*all_tags, *tags])),
        datasets=[run.data_id] if run.data_id else None,
        metrics=['accuracy'],
        base_model=_base_model(run.recipe),
        model_name=repo_id.partition('/')[2],
        eval_results=[_eval_result(result) for result in run.results] or None,
    )


def _eval_result(result: Result) -> EvalResult:
    name = _one_line(result.dataset)
    return EvalResult(
        task_type='image-classification',
        task_name='Image Classification',
        dataset_type=result.hub_id or 'other',  # the Hub takes any other word for a set of that name
        dataset_name=name,
        dataset_split=re.sub(r'[^\w.\[\]:%+-]', '-', result.split) or None,
        metric_type='accuracy',
        metric_name='top-1 accuracy (%)' + (f', {result.method} on frozen features' if result.method else ''),
        metric_value=round(result.top1, 4),
    )


def _base_model(recipe: dict[str, Any]) -> str | None:
    """The repo whose weights the run started from, where its name tells."""
    model = str(recipe.get('model', '')) if recipe.get('pretrained') else ''
    cfg = get_pretrained_cfg(model) if is_model_pretrained(model) else None
    repo = (cfg.hf_hub_id or '' if cfg else model.removeprefix('hf-hub:')).partition('@')[0]
    return repo if is_repo_id(repo) else None
