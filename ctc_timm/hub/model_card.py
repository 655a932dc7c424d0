"""The model card of a run: what it is, how it was made, how good it is, how to use it.

Everything in it comes from the run. Names from outside are escaped wherever Markdown or HTML would read them
as more than text; the front matter is written by huggingface_hub.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from ..models.catalog import NAME, is_repo_id
from .summary import Result, RunDetails

PAPER = 'https://arxiv.org/abs/2203.03871'
_CITATION = """\
@inproceedings{cui2022discriminability,
  title     = {Discriminability-Transferability Trade-Off: An Information-Theoretic Perspective},
  author    = {Cui, Quan and Zhao, Bingchen and Chen, Zhao-Min and Zhao, Borui and Song, Renjie and Zhou, Boyan
               and Liang, Jiajun and Yoshie, Osamu},
  booktitle = {European Conference on Computer Vision (ECCV)},
  year      = {2022}
}"""
_METHOD = """\
Plain supervised training over-compresses: late in training source accuracy still rises while the features grow worse
for other tasks. Contrastive temporal coding (CTC) counters that in two stages. The instance stage adds instance
discrimination to the task's loss, so that the features keep what tells single images apart. Then the model is frozen as
an information bank, and the temporal stage contrasts today's features with the bank's features of the same images."""
_STAGES = {
    'mode': 'mode',
    'epochs': 'epochs',
    'temporal_start_epoch': 'first epoch of the temporal stage',
    'instance_weight': 'weight of instance discrimination',
    'temporal_weight': 'weight of the temporal contrast',
    'num_negatives': 'negatives an image',
    'negatives': 'negatives are',
    'batch_size': 'batch size of a process',
    'opt': 'optimizer',
    'lr': 'learning rate',
    'sched': 'schedule',
    'weight_decay': 'weight decay',
    'seed': 'seed',
}


def write_card(
    run: RunDetails,
    config: dict[str, Any],
    recipe: dict[str, Any],
    data: tuple[str, str],
    repo_id: str,
    license: str,
    tags: list[str],
    pictures: dict[str, str],
) -> str:
    """The card's text.

    Args:
        run: What is published.
        config: timm's config.json of it.
        recipe: Its flags.
        data: Name of its data and the flag that names them, as `runs.data_set` gives them.
        repo_id: Where it goes.
        license: By its identifier on the Hub.
        tags: More tags.
        pictures: Title of each picture by its file in the repo.

    Returns:
        README.md.
    """
    front = _front_matter(run, recipe, data[0], repo_id, license, tags)
    parts = [
        f'---\n{front}\n---',
        f'# {text(repo_id.partition("/")[2])}',
        f'A timm `{run.architecture}` with {config["num_classes"]:,} classes, trained on {_named(data[0])} with '
        f'{"[contrastive temporal coding](" + PAPER + ")" if _is_ctc(recipe) else "plain supervision"} by ctc-timm.',
        f'## What CTC is\n\n{_METHOD}\n\n[Paper]({PAPER})',
        f'## Results\n\n{_results(run)}',
        *([f'## Pictures\n\n{_gallery(pictures)}'] if pictures else []),
        f'## Use\n\n{_use(run, config, repo_id)}',
        f'## Fine-tune\n\n{_finetune(run, repo_id)}',
        f'## Training\n\n{_training(recipe, data, repo_id)}',
        f'## Citation\n\n```bibtex\n{_CITATION}\n```',
    ]
    return '\n\n'.join(parts) + '\n'


def text(value: Any) -> str:
    """A text from outside as Markdown that shows it and does nothing else."""
    plain = _words(value).replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')
    # A word's own dot, dash or underscore means nothing to Markdown; what could mean something gets a backslash.
    plain = re.sub(r'([\\`*{}\[\]()#+!|~$^=:@])', r'\\\1', plain)
    plain = re.sub(r'(?<![A-Za-z0-9])([_.-])|([_.-])(?![A-Za-z0-9])', lambda match: '\\' + match.group(), plain)
    return re.sub(r'(www)\.', r'\1\\.', plain, flags=re.IGNORECASE)  # else it would be a link


def _words(value: Any) -> str:
    """A text from outside on one line, not too long, without what would hide in it."""
    return ' '.join(''.join(c if c.isprintable() else ' ' for c in str(value)).split())[:200]


def _front_matter(
    run: RunDetails, recipe: dict[str, Any], data: str, repo_id: str, license: str, tags: list[str]
) -> str:
    """The card's YAML, written by huggingface_hub."""
    is_id = re.fullmatch(r'[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?', data)
    own = ['image-classification', 'timm', 'ctc-timm']
    own += ['ctc'] if _is_ctc(recipe) else []  # which `ctc-timm zoo sync` looks for
    own += ['transformers'] if run.stock else []
    card = ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        license=license,
        tags=list(dict.fromkeys([*own, *tags])),
        datasets=[data] if is_id else None,
        metrics=['accuracy'],
        base_model=_base_model(recipe),
        model_name=repo_id.partition('/')[2],
        eval_results=[_eval_result(result) for result in _indexed(run)] or None,
    )
    return card.to_yaml()


def _indexed(run: RunDetails) -> list[Result]:
    """The numbers for the model-index: few-shot means stay in the table."""
    return [result for result in [*run.source, *run.transfer] if result.shots is None]


def _eval_result(result: Result) -> EvalResult:
    how = f', {result.method} on frozen features' if result.method else ''
    name = _words(result.dataset)
    return EvalResult(
        task_type='image-classification',
        task_name='Image Classification',
        dataset_type=re.sub(r'[^\w./-]', '-', name).lower(),
        dataset_name=name,
        dataset_split=re.sub(r'[^\w.\[\]:%+-]', '-', result.split) or None,
        metric_type='accuracy',
        metric_name=f'top-1 accuracy (%){how}',
        metric_value=round(result.top1, 4),
    )


def _base_model(recipe: dict[str, Any]) -> str | None:
    """The repo whose weights the run started from, where its name tells."""
    from timm.models import get_pretrained_cfg

    model = str(recipe.get('model', ''))
    if not recipe.get('pretrained'):
        return None
    repo = model.removeprefix('hf-hub:').partition('@')[0]
    if not model.startswith('hf-hub:'):
        try:
            cfg = get_pretrained_cfg(model)
        except RuntimeError:
            return None
        repo = (cfg.hf_hub_id or '').partition('@')[0] if cfg else ''
    return repo if is_repo_id(repo) else None


def _results(run: RunDetails) -> str:
    if not run.source and not run.transfer:
        return 'None measured.'
    heading = '| data | | top-1 % | 95% interval | top-5 % | images |\n| --- | --- | ---: | --- | ---: | ---: |'
    rows = [_row(result, 'its own classifier') for result in run.source]
    rows += [_row(result, '') for result in run.transfer]
    about = 'Top-1 and top-5 accuracy.'
    if any(result.split == run.args.get('val_split') for result in run.source):
        about += ' The published epoch is the best one on this split of the source.'
    if run.transfer:
        about += ' Transfer is measured on frozen features, by probes that are fitted to the target.'
    if any(result.method == 'sgd-best' for result in run.transfer):
        about += ' `sgd-best` is the best epoch on the images it is measured on, which favours itself.'
    return f'{about}\n\n{heading}\n' + '\n'.join(rows)


def _row(result: Result, how: str) -> str:
    shots = f', {result.shots} images a class' if result.shots else ''
    data = text(result.dataset) + (f', {text(result.split)}' if result.split else '')
    interval = f'{result.low:.2f} to {result.high:.2f}' if result.low is not None and result.high is not None else ''
    top5 = f'{result.top5:.2f}' if result.top5 is not None else ''
    count = f'{result.num_images:,}' if result.num_images else ''
    return f'| {data} | {how or text(result.method) + shots} | {result.top1:.2f} | {interval} | {top5} | {count} |'


def _gallery(pictures: dict[str, str]) -> str:
    return '\n\n'.join(f'![{title}]({file})\n\n{title}.' for file, title in pictures.items())


def _use(run: RunDetails, config: dict[str, Any], repo_id: str) -> str:
    arch = run.architecture
    model = repo_id.partition('/')[2]
    prepare = (
        'config = timm.data.resolve_model_data_config(model)\n'
        'transform = timm.data.create_transform(**config, is_training=False)\n'
        'logits = model(transform(image).unsqueeze(0))  # image: a PIL image'
    )
    parts = [
        f'timm:\n\n```python\n{_imports(run)}\n\n'
        f"model = timm.create_model('hf-hub:{repo_id}', pretrained=True).eval()\n{prepare}\n```"
    ]
    if model.partition('.')[0] == f'{arch}_ctc' and NAME.fullmatch(model):
        name = model
        how = f'with `CTC_TIMM_NAMESPACE={repo_id.partition("/")[0]}`, or after `ctc-timm zoo add {repo_id}`'
    else:
        name = f'{arch}_ctc.mine'
        how = f'after `ctc-timm zoo add {repo_id} --name {name}`'
    parts.append(
        f'ctc_timm, {how}:\n\n```python\nimport timm, ctc_timm\n\n'
        f"model = timm.create_model('{name}', pretrained=True).eval()\n"
        'features, logits = ctc_timm.features_and_logits(model, images)  # [B, D], [B, C], one pass\n```'
    )
    if run.stock:
        parts.append(
            'transformers:\n\n```python\n'
            'from transformers import AutoImageProcessor, AutoModelForImageClassification\n\n'
            f"processor = AutoImageProcessor.from_pretrained('{repo_id}')\n"
            f"model = AutoModelForImageClassification.from_pretrained('{repo_id}').eval()\n"
            "logits = model(**processor(image, return_tensors='pt')).logits\n```"
        )
    size = 'x'.join(map(str, config['pretrained_cfg']['input_size']))
    facts = config['pretrained_cfg']
    parts.append(
        f'Input {size}, mean {_numbers(facts["mean"])}, standard deviation {_numbers(facts["std"])}. '
        f'Add `@COMMIT` to the repo{", or `revision=` in transformers," if run.stock else ""} to pin what is loaded.'
    )
    return '\n\n'.join(parts)


def _finetune(run: RunDetails, repo_id: str) -> str:
    return (
        f'```python\n{_imports(run)}\n\n'
        f"model = timm.create_model('hf-hub:{repo_id}', pretrained=True, num_classes=10)  # a new classifier\n"
        f"body = timm.create_model('hf-hub:{repo_id}', pretrained=True, features_only=True)\n```\n\n"
        '```bash\n'
        f'accelerate launch train.py --model hf-hub:{repo_id} --pretrained --mode vanilla --data-dir IMAGES\n```'
    )


def _imports(run: RunDetails) -> str:
    return 'import timm' if run.stock else 'import timm, ctc_timm  # which registers this architecture'


def _training(recipe: dict[str, Any], data: tuple[str, str], repo_id: str) -> str:
    command = ' '.join(filter(None, ['accelerate launch train.py -c recipe.yaml', data[1]]))
    shown = [f'| {label} | {text(recipe[key])} |' for key, label in _STAGES.items() if key in recipe]
    listing = yaml.safe_dump(recipe, sort_keys=True, allow_unicode=False).rstrip()
    fence = '`' * max(3, 1 + max((len(run) for run in re.findall('`+', listing)), default=0))
    table = '\n\n| | |\n| --- | --- |\n' + '\n'.join(shown) if shown else ''
    return (
        f'```bash\nhf download {repo_id} recipe.yaml --local-dir .\n{command}\n```{table}\n\n'
        f'<details><summary>recipe.yaml, all flags</summary>\n\n{fence}yaml\n{listing}\n{fence}\n\n</details>'
    )


def _is_ctc(recipe: dict[str, Any]) -> bool:
    return recipe.get('mode', 'ctc') == 'ctc'


def _named(data: str) -> str:
    return text(data) if data else 'private data'


def _numbers(values: Any) -> str:
    return ', '.join(f'{float(value):g}' for value in values)
