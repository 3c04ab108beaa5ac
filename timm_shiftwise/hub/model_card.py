"""Model cards in the form of timm's own on the Hub."""
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models._hub import generate_readme
from torch import Tensor

from timm_shiftwise import __version__
from timm_shiftwise.models import ShiftwiseNet
from timm_shiftwise.models.pretrained import AUTHORS_TAG
from timm_shiftwise.profile import NetworkProfile

from .errors import HubError

# by the paper's number on arXiv, or its name
_CITATIONS = {
    'ShiftwiseConv: Small Convolutional Kernel with Large Kernel Effect': """@inproceedings{li2025shiftwiseconv,
  title     = {ShiftwiseConv: Small Convolutional Kernel with Large Kernel Effect},
  author    = {Dachong Li and Li Li and Zhuangzhuang Chen and Jianqiang Li},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2025}
}""",
    'arXiv:2201.03545': """@inproceedings{liu2022convnet,
  title     = {A ConvNet for the 2020s},
  author    = {Zhuang Liu and Hanzi Mao and Chao-Yuan Wu and Christoph Feichtenhofer and Trevor Darrell and
               Saining Xie},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2022}
}""",
    'arXiv:2401.12736': """@article{li2024shift,
  title   = {Shift-ConvNets: Small Convolutional Kernel with Large Kernel Effects},
  author  = {Dachong Li and Li Li and Zhuangzhuang Chen and Jianqiang Li},
  journal = {arXiv preprint arXiv:2401.12736},
  year    = {2024}
}""",
    'arXiv:2207.03620': """@article{liu2022more,
  title   = {More ConvNets in the 2020s: Scaling up Kernels Beyond 51x51 using Sparsity},
  author  = {Liu, Shiwei and Chen, Tianlong and Chen, Xiaohan and Chen, Xuxi and Xiao, Qiao and Wu, Boqian and
             Pechenizkiy, Mykola and Mocanu, Decebal and Wang, Zhangyang},
  journal = {arXiv preprint arXiv:2207.03620},
  year    = {2022}
}""",
}
_TIMM_CITATION = """@misc{rw2019timm,
  author = {Ross Wightman},
  title = {PyTorch Image Models},
  year = {2019},
  publisher = {GitHub},
  journal = {GitHub repository},
  doi = {10.5281/zenodo.4414861},
  howpublished = {\\url{https://github.com/huggingface/pytorch-image-models}}
}"""

# arguments of train.py worth telling; paths and names of machines and accounts are not among them
_RECIPE = (
    'epochs', 'warmup_epochs', 'warmup_prefix', 'cooldown_epochs', 'batch_size', 'grad_accum_steps', 'sync_bn', 'opt',
    'lr', 'lr_base', 'lr_base_size', 'weight_decay', 'momentum', 'clip_grad', 'layer_decay', 'sched', 'warmup_lr',
    'min_lr', 'drop', 'drop_path', 'aa', 'aug_repeats', 'hflip', 'vflip', 'color_jitter', 'reprob', 'remode', 'mixup',
    'cutmix', 'smoothing', 'bce_loss', 'model_ema', 'model_ema_decay', 'amp', 'amp_dtype', 'train_interpolation',
    'seed',
)
# those that say nothing unless another is set
_SWITCHES = {'amp_dtype': 'amp', 'model_ema_decay': 'model_ema', 'remode': 'reprob'}


@dataclass(frozen=True)
class Provenance:
    """What only the user can know of the weights.

    Attributes:
        description: A sentence on the weights.
        dataset: Name of the data set they were trained on, as the Hub knows it, such as ``imagenet-1k``.
        license: Licence of the weights, as the Hub knows it.
        results: Pairs of a result and its source.
    """
    description: str | None = None
    dataset: str | None = None
    license: str | None = None
    results: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Picture:
    """The picture that the usage section classifies.

    Attributes:
        imports: Line of code that its image needs.
        image: Expression of a PIL image, which may use ``Image``.
    """
    imports: str
    image: str


PHOTO = Picture(
    'from urllib.request import urlopen',
    "Image.open(urlopen(\n    'https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/"
    "beignets-task-guide.png'\n))",
)


@dataclass(frozen=True)
class CardFacts:
    """What a model card says that the network itself does not tell.

    Attributes:
        title: Name of the model.
        reference: The name by which ``timm.create_model`` finds it.
        architecture: Name of the network in timm's registry.
        profile: What it costs for an image.
        layout: Whose layout the weights were in: ``'timm-shiftwise'``, ``'authors'`` or ``'convnext'``.
        train_args: args.yaml of train.py.
        summary: Rows of train.py's summary.csv.
        provenance: What the user says.
        measured: Pairs of a result that was measured of these weights and by what it was.
        picture: What the usage section classifies.
        drawn: Markdown that shows pictures of the network.
    """
    title: str
    reference: str
    architecture: str
    profile: NetworkProfile
    layout: str = 'timm-shiftwise'
    train_args: Mapping[str, Any] = field(default_factory=dict)
    summary: Sequence[Mapping[str, str]] = ()
    provenance: Provenance = field(default_factory=Provenance)
    measured: Sequence[tuple[EvalResult, str]] = ()
    picture: Picture = PHOTO
    drawn: str = ''


def config_of(model: ShiftwiseNet) -> dict[str, Any]:
    """What timm calls a network's ``pretrained_cfg``."""
    return vars(model)['pretrained_cfg']


def write_card(model: ShiftwiseNet, file: Path, facts: CardFacts) -> None:
    """Write the model card of a network.

    Args:
        model: The network, its ``pretrained_cfg`` as it will be published.
        file: The file to write, README.md of the folder.
        facts: What else the card says.

    Raises:
        HubError: If a name that goes into the metadata is none that the Hub takes.
        OSError: If the file cannot be written.
    """
    cfg = config_of(model)
    papers = cfg.get('paper_ids') or ()
    papers = (papers,) if isinstance(papers, str) else tuple(papers)
    more = ('arXiv:2401.12736',) if 'sw_convnext' in facts.architecture else ()
    card = dict(
        tags=['image-classification', 'timm', 'timm-shiftwise'],
        library_name='timm',
        **_license(facts.provenance.license, cfg),
        description=_description(facts, cfg),
        details=_details(model, facts, cfg, papers),
        usage='\n\n'.join(filter(None, (usage(model, facts.reference, facts.picture), facts.drawn))),
        citation=[
            *(_CITATIONS[paper] for paper in (cfg.get('paper_name'), *papers, *more) if paper in _CITATIONS),
            _TIMM_CITATION],
    )
    text = generate_readme(card, _line(facts.title))
    if facts.measured:
        whole = ModelCard(text)
        told = cast(ModelCardData, whole.data)
        told.metrics = sorted({result.metric_type for result, _ in facts.measured})
        told.model_name, told.eval_results = facts.title, [result for result, _ in facts.measured]
        text = str(whole)
    file.write_text(text, encoding='utf-8')


def _license(told: str | None, cfg: Mapping[str, Any]) -> dict[str, str]:
    """Metadata of the licence: what the user or else the weights say; the authors' is told by where they publish."""
    name = told or cfg.get('license') or 'unknown'
    card = dict(license=identifier(name, 'licence'))
    origin = str(cfg.get('origin_url'))
    if not told and cfg.get('tag') == AUTHORS_TAG and re.fullmatch(r'https://[!-~]+', origin):
        card.update(license_name='as-published', license_link=origin)
    return card


def _description(facts: CardFacts, cfg: Mapping[str, Any]) -> str:
    kind = 'SLaK' if facts.architecture.startswith('slak') else 'shift-wise ConvNet'
    sentences = [f'A {kind} image classification model, `{facts.architecture}` of timm-shiftwise.']
    if facts.provenance.description:
        sentences.append(_line(facts.provenance.description))
    if 'sw_convnext' in facts.architecture:
        sentences.append(_of_convnext(facts, cfg))
    if facts.layout == 'authors':
        published = f' ({cfg["origin_url"]})' if cfg.get('origin_url') else ''
        sentences.append(f"Converted from a checkpoint in the layout of the paper's authors{published}.")
    if facts.train_args:
        sentences.append("Trained with timm's train.py.")
    sentences.append(
        'It needs the package timm-shiftwise, from a clone of its repository (`pip install .`) or from a wheel '
        f'(`pip install timm_shiftwise-{__version__}-py3-none-any.whl`).')
    return '\n'.join(sentences)


def _of_convnext(facts: CardFacts, cfg: Mapping[str, Any]) -> str:
    if facts.layout == 'convnext':
        how = 'Grown from'
    elif facts.train_args.get('pretrained'):
        how = 'Fine-tuned from weights that were grown from'
    else:
        how = 'Of an architecture whose weights are, if not trained from scratch, grown from those of'
    origin = f', {cfg["origin_url"]},' if cfg.get('origin_url') else ''
    license = f', {cfg["license"]},' if cfg.get('license') else ''
    return (
        f'{how} a ConvNeXt{origin} of "A ConvNet for the 2020s" (Zhuang Liu, Hanzi Mao, Chao-Yuan Wu, Christoph '
        'Feichtenhofer, Trevor Darrell and Saining Xie, https://arxiv.org/abs/2201.03545), whose licence'
        f'{license} goes along. Until it is fine-tuned it computes what the ConvNeXt computes, and accuracies are '
        "ConvNeXt's.")


def _details(model: ShiftwiseNet, facts: CardFacts, cfg: Mapping[str, Any], papers: tuple[str, ...]) -> dict[str, Any]:
    channels, height, width = cfg['input_size']
    cost = facts.profile.whole.ours
    merged = 'merged for inference, cannot be trained further'
    details: dict[str, Any] = {
        'Model Type': 'Image classification / feature backbone',
        'Model Stats': [
            f'Params (M): {cost.parameters / 1e6:.3g}',
            f'GMACs: {cost.multiply_adds / 1e9:.3g}',
            f'Image size: {height} x {width}' + (f', {channels} channels' if channels != 3 else ''),
            f'Classes: {model.num_classes}',
        ],
        'Form': merged if facts.profile.merged else 'as trained, can be trained further',
    }
    if facts.profile.total and facts.profile.is_dense:
        details['Sparsity'] = 'none, every group is kept (dense)'
    elif facts.profile.total:
        details['Sparsity'] = [
            f'Stage {stage.stage}: {1 - stage.density:.1%} of the groups pruned' for stage in facts.profile.stages]
    if facts.provenance.dataset:
        details['Dataset'] = identifier(facts.provenance.dataset, 'data set')
    results = [*facts.provenance.results, *((_in_words(result), origin) for result, origin in facts.measured)]
    if results:
        details['Results'] = [f'{_line(result)} (source: {_line(origin)})' for result, origin in results]
    if facts.train_args or facts.summary:
        details['Training'] = _training(facts.train_args, facts.summary)
    if papers:
        details['Papers'] = [
            f"{cfg.get('paper_name') or paper}: https://arxiv.org/abs/{paper.removeprefix('arXiv:')}"
            for paper in papers
        ]
    if cfg.get('origin_url'):
        details['Original'] = cfg['origin_url']
    return details


def _in_words(result: EvalResult) -> str:
    split = f' ({result.dataset_split})' if result.dataset_split else ''
    conditions = ''.join(f', {name} {value}' for name, value in (result.metric_args or {}).items())
    return f'{result.metric_name} {100 * result.metric_value:.2f} % on {result.dataset_name}{split}{conditions}'


def _training(args: Mapping[str, Any], summary: Sequence[Mapping[str, str]]) -> list[str]:
    lines = []
    idle = {name for name, switch in _SWITCHES.items() if not args.get(switch)}
    recipe = {name: args[name] for name in _RECIPE if name not in idle and args.get(name) not in (None, False, '', [])}
    if recipe:
        told = ', '.join(f'{name} {_line(str(value))}' for name, value in recipe.items())
        lines.append(f"Arguments of timm's train.py: {told}")
    if isinstance(args.get('model_kwargs'), dict) and args['model_kwargs']:
        told = ', '.join(f'{_line(str(name))}={_line(str(value))}' for name, value in args['model_kwargs'].items())
        lines.append(f'Arguments of the model: {told}')
    if summary:
        lines.append(f'Epochs in the log (summary.csv): {len(summary)}')
        best = _best(summary)
        if best:
            lines.append(best)
    return lines


def _best(summary: Sequence[Mapping[str, str]]) -> str | None:
    """The epoch of the highest ``eval_top1``, in train.py's own words."""
    rows = []
    for row in summary:
        try:
            rows.append((float(row['eval_top1']), _line(row['epoch'])))
        except (KeyError, ValueError):
            continue
    if not rows:
        return None
    top1, epoch = max(rows, key=lambda pair: pair[0])
    return f"Highest eval_top1 in train.py's log: {top1:.2f}, in epoch {epoch}; the training run's own measurement"


def usage(model: ShiftwiseNet, reference: str, picture: Picture = PHOTO) -> str:
    """The usage section: classification, feature maps and embeddings, each a block of code that runs as it is.

    Args:
        model: The network, its ``pretrained_cfg`` as it will be published.
        reference: The name by which ``timm.create_model`` finds it.
        picture: What is classified.
    """
    channels, height, width = config_of(model)['input_size']
    with torch.inference_mode():
        images = torch.zeros(1, channels, height, width)
        maps = cast(list[Tensor], model.forward_intermediates(images, intermediates_only=True))
        features = model.forward_features(images)
    blocks = [
        ('Feature Map Extraction', _code(channels, reference, picture, 'features_only=True,', f"""
with torch.inference_mode():
    output = model(transforms(img).unsqueeze(0))  # unsqueeze single image into batch of 1

for o in output:
    # print shape of each feature map in output
    # e.g.:
{_shapes(maps)}
    print(o.shape)
""")),
        ('Image Embeddings', _code(channels, reference, picture, 'num_classes=0,  # remove classifier nn.Linear', f"""
with torch.inference_mode():
    output = model(transforms(img).unsqueeze(0))  # output is (batch_size, num_features) shaped tensor

    # or equivalently (without needing to set num_classes=0)
    output = model.forward_features(transforms(img).unsqueeze(0))
    # output is unpooled, a {tuple(features.shape)} shaped tensor

    output = model.forward_head(output, pre_logits=True)
    # output is a (1, num_features) shaped tensor
""")),
    ]
    if model.num_classes > 0:
        blocks.insert(0, ('Image Classification', _code(channels, reference, picture, '', f"""
with torch.inference_mode():
    output = model(transforms(img).unsqueeze(0))  # unsqueeze single image into batch of 1

top_probabilities, top_class_indices = torch.topk(output.softmax(dim=1) * 100, k={min(5, model.num_classes)})
""")))
    return '\n\n'.join(f'### {title}\n```python\n{code}```' for title, code in blocks)


def _shapes(maps: Sequence[Tensor]) -> str:
    return '\n'.join(f'    #  {tuple(feature.shape)}' for feature in maps)


def _code(channels: int, reference: str, picture: Picture, argument: str, body: str) -> str:
    mode = {1: 'L', 3: 'RGB'}.get(channels)
    if mode:
        head = f'{picture.imports}\n\n'
        image = f'img = {picture.image}.convert({mode!r})'
        imports = 'from PIL import Image\n'
        transforms = (
            '# get model specific transforms (normalization, resize)\n'
            'data_config = timm.data.resolve_model_data_config(model)\n'
            'transforms = timm.data.create_transform(**data_config, is_training=False)\n')
    else:
        head, imports = '', ''
        image = '# pictures files hold 1 or 3 channels, this network takes ' + f'{channels}: put your own data here'
        transforms = (
            'img = torch.rand(model.pretrained_cfg["input_size"])\n'
            'transforms = torch.nn.Identity()  # and normalise it as training did\n')
    lines = [f'    {reference!r},', '    pretrained=True,', *([f'    {argument}'] if argument else [])]
    return (
        f'{head}import timm\nimport timm_shiftwise  # registers the networks with timm\nimport torch\n{imports}\n'
        f'{image}\n\nmodel = timm.create_model(\n' + '\n'.join(lines) + '\n)\nmodel = model.eval()\n\n'
        f'{transforms}{body}')


def refer_to(card: str, repo_id: str) -> str:
    """A model card that names a repository where it named a folder: in its title, its results, and its usage.

    Args:
        card: Text of a README.md that :func:`write_card` wrote, edited or not.
        repo_id: The repository, ``user/name``.
    """
    name = repo_id.split('/')[-1]
    card = re.sub(r'^# Model card for .*$', f'# Model card for {name}', card, count=1, flags=re.MULTILINE)
    card = re.sub(
        r'^(model-index:\n- name: ).*?(?=\n  results:)', lambda match: match[1] + json.dumps(name), card, count=1,
        flags=re.MULTILINE | re.DOTALL)
    return re.sub(
        r'''(timm\.create_model\(\s*)(?:'local-dir:(?:\\.|[^'\\\n])*'|"local-dir:(?:\\.|[^"\\\n])*")''',
        lambda match: match[1] + repr(f'hf-hub:{repo_id}'),
        card,
    )


def _line(text: str) -> str:
    """A text on one line, without what would start a block of Markdown or HTML."""
    return ' '.join(text.split()).replace('<', '&lt;').replace('`', "'")


def identifier(name: str, what: str) -> str:
    """A name that may stand in the metadata.

    Raises:
        HubError: If the Hub takes no such name.
    """
    if not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9._/-]*', name):
        raise HubError(f'{name!r} is no {what} as the Hub names them: letters, digits, and ". _ / -" alone.')
    return name
