"""Whole networks: latency of inference and a training step, beside ConvNeXt, InceptionNeXt and SLaK.

    python benchmarks/bench_networks.py

Latency is that of the form for inference (``timm.utils.reparameterize_model``) of the shift-wise networks, and of SLaK
both as it is and so merged; a training step is forward, cross-entropy, backward and AdamW. "trained-like" is sw_tiny
with 0.1, 0.68, 0.72 and 0.9 of the groups kept in its stages. Before anything is timed, merged networks are compared
with unmerged ones, and those with the definition in plain PyTorch; losses must fall, gradients must be finite, and
those of pruned groups zero.
"""
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from _common import (
    COLOURS,
    TRAINED,
    Target,
    check_close,
    console,
    definition,
    measure,
    memory_of,
    new_figure,
    parser,
    show,
    start,
    write_results,
)
from timm.utils import reparameterize_model
from torch import Tensor, nn

import timm_shiftwise  # noqa: F401  (registers the networks)
from timm_shiftwise.layers import ShiftwiseConv2d
from timm_shiftwise.sparsity.masks import random_mask

DENSE, SPARSE, CONVNEXT, SLAK = 'sw_tiny, dense', 'sw_tiny, trained-like', 'convnext_tiny', 'slak_tiny, width 1.0'
MERGED = ', merged'
# sparsity=0: nothing is drawn at the first step of the optimiser, masks stay as they are set here
NETWORKS: dict[str, dict[str, Any]] = {
    DENSE: dict(model_name='sw_tiny', sparsity=0.),
    SPARSE: dict(model_name='sw_tiny', sparsity=0.),
    'eq_slak_tiny': dict(model_name='eq_slak_tiny'),
    'slak_tiny, width 1.3': dict(model_name='slak_tiny'),
    SLAK: dict(model_name='slak_tiny', dims=(96, 192, 384, 768)),
    CONVNEXT: dict(model_name='convnext_tiny'),
    'inception_next_tiny': dict(model_name='inception_next_tiny'),
}
LATENCY, STEP = 'latency', 'training step'
LATENCY_OVER_CONVNEXT = 1.12
STEP_OVER_CONVNEXT = 1.2
STEP_OVER_SLAK = 3.


@torch.no_grad()
def let_blocks_matter(model: nn.Module) -> None:
    """Set the layer scales of a new network, which are next to zero, to what they may be when it is trained."""
    for key, parameter in model.named_parameters():
        if key.endswith('gamma'):
            parameter.fill_(.5)


def create(name: str, device: torch.device) -> nn.Module:
    """A network for training, with layer scales large enough for its blocks to matter, and masks where it has them."""
    model = timm.create_model(**NETWORKS[name])
    let_blocks_matter(model)
    if name == SPARSE:
        for index, (stage, share) in enumerate(zip(model.stages, TRAINED, strict=True)):
            for depth, block in enumerate(stage.blocks):
                mask = block.conv_dw.group_mask
                kept = round(share * mask[0].numel())
                mask.copy_(random_mask(tuple(mask.shape[1:]), kept, seed=index, step=0, layer=depth))
    return model.to(device)


@torch.no_grad()
def merged(name: str, model: nn.Module, x: Tensor) -> nn.Module:
    """The form for inference, checked with BatchNorm statistics that are not the initial ones.

    Raises:
        AssertionError: If it gives another output.
    """
    model = copy.deepcopy(model)
    model.train()(x)
    model.eval()
    wanted = model(x)
    with definition():
        check_close([wanted[:1]], [model(x[:1])], f'{name}, beside its definition')
    fused = reparameterize_model(model)
    check_close([fused(x)], [wanted], f'{name}, merged')
    return fused


class Training:
    """A training step of a network.

    Args:
        model: The network.
        x: Images.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x = model.train(), x
        self.target = torch.arange(len(x), device=x.device)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=.05)

    def step(self) -> Tensor:
        """Forward, backward, AdamW; gives the loss."""
        loss = F.cross_entropy(self.model(self.x), self.target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss

    def check(self, name: str) -> None:
        """Refuse to time what does not train.

        Raises:
            AssertionError: If a loss or a gradient is not finite, the loss does not fall, or a pruned group has a
                gradient.
        """
        losses = [float(self.step().detach()) for _ in range(2)]
        if not losses[1] < losses[0]:  # nor is NaN
            raise AssertionError(f'{name}: the loss does not fall: {losses}.')
        for key, parameter in self.model.named_parameters():
            if parameter.grad is None or not parameter.grad.isfinite().all():
                raise AssertionError(f'{name}: {key} has no finite gradient.')
        for module in self.model.modules():
            if isinstance(module, ShiftwiseConv2d) and module.kernels.grad[~module.group_mask].any():
                raise AssertionError(f'{name}: a pruned group has a gradient.')


def row(name: str, phase: str, batch: int, model: nn.Module, timing: Any, convnext: Any) -> dict[str, Any]:
    """A line of the results."""
    return {
        'network': name, 'parameters_m': round(sum(p.numel() for p in model.parameters()) / 1e6, 2), 'phase': phase,
        'batch': batch, **timing.columns(), 'times_convnext': round(timing.median / convnext.median, 3), 'peak_mib': '',
    }


def latencies(models: dict[str, nn.Module], args: Any, device: torch.device) -> list[dict]:
    """Check and time inference."""
    x = images(args.batch, args, device)
    fused: dict[str, nn.Module] = {}
    for name, model in models.items():
        if name.startswith('slak'):  # as PyTorch runs it, its norms unfolded, and merged
            fused[name] = copy.deepcopy(model).eval()
            fused[name + MERGED] = merged(name, model, x)
        else:
            fused[name] = merged(name, model, x)
    rows = []
    for batch in sorted({1, args.batch}):
        calls = {name: partial(infer, model, x[:batch].contiguous()) for name, model in fused.items()}
        timings = measure(calls, device, args.seconds, args.least)
        rows += [
            row(name, LATENCY, batch, models[name.removesuffix(MERGED)], timing, timings[CONVNEXT])
            for name, timing in timings.items()]
        console.print(f'latency, batch {batch}: done')
    return rows


@torch.inference_mode()
def infer(model: nn.Module, x: Tensor) -> Tensor:
    """Logits."""
    return model(x)


def steps(models: dict[str, nn.Module], args: Any, device: torch.device) -> list[dict]:
    """Check and time training."""
    trainings = {name: Training(model, images(args.batch, args, device)) for name, model in models.items()}
    for name, training in trainings.items():
        training.check(name)
    calls: dict[str, Callable[[], Tensor]] = {name: training.step for name, training in trainings.items()}
    timings = measure(calls, device, args.seconds, args.least)
    console.print('training step: done')
    rows = []
    for name, timing in timings.items():
        trainings[name].optimizer.zero_grad()  # the gradients that a step makes count, those before it do not
        peak = memory_of(calls[name], device).peak
        rows.append({
            **row(name, STEP, args.batch, models[name], timing, timings[CONVNEXT]), 'peak_mib': round(peak / 2 ** 20)})
    return rows


def images(batch: int, args: Any, device: torch.device) -> Tensor:
    """Noise [batch, 3, size, size]."""
    return torch.randn(batch, 3, args.size, args.size, generator=torch.Generator().manual_seed(0)).to(device)


def targets(rows: list[dict]) -> list[Target]:
    """The ratios that are wanted."""
    found = []
    at = {(line['network'], line['phase'], line['batch']): line for line in rows}
    for (name, phase, batch), line in at.items():
        where = f'{name}, batch {batch}'
        if name not in (DENSE, SPARSE):
            continue
        if phase == LATENCY:
            found.append(Target(
                'latency, merged, over convnext_tiny', where, line['times_convnext'], 'at most', LATENCY_OVER_CONVNEXT))
        else:
            found.append(Target(
                'training step over convnext_tiny', where, line['times_convnext'], 'at most', STEP_OVER_CONVNEXT))
            found.append(Target(
                'training step: times faster than slak_tiny of the same width', where,
                at[SLAK, phase, batch]['median_ms'] / line['median_ms'], 'at least', STEP_OVER_SLAK))
    return found


def report(rows: list[dict], args: Any, device: torch.device) -> None:
    """Tables, CSV and plot."""
    panels = sorted({(line['phase'], line['batch']) for line in rows})
    names = list(dict.fromkeys(line['network'] for line in rows))
    lines = []
    for name in names:
        found = [line for line in rows if line['network'] == name]
        cells = [str(found[0]['parameters_m'])]
        for phase, batch in panels:
            match = [line for line in found if (line['phase'], line['batch']) == (phase, batch)]
            cells.append(f'{match[0]["median_ms"]:.0f} ({match[0]["times_convnext"]:.2f}x)' if match else '')
        cells += [str(line['peak_mib']) for line in found if line['phase'] == STEP] or ['']
        lines.append([name, *cells])
    show('median ms (times convnext_tiny)', [
        'network', 'million parameters', *(f'{phase}, batch {batch}' for phase, batch in panels), 'peak MiB of a step',
    ], lines)
    figure, axes = new_figure(len(panels), f'Whole networks at {args.size} px (times convnext_tiny)')
    figure.set_size_inches(12.5, 3.9)
    for axis, (phase, batch) in zip(axes[0], panels, strict=True):
        found = [line for line in rows if (line['phase'], line['batch']) == (phase, batch)]
        places = [names.index(line['network']) for line in found]
        axis.barh(
            places, [line['median_ms'] for line in found],
            color=[COLOURS[0 if line['network'].startswith('sw') else 6] for line in found])
        for place, line in zip(places, found, strict=True):
            axis.text(
                line['median_ms'], place, f' {line["median_ms"]:.0f} ms ({line["times_convnext"]:.2f}x)', va='center',
                fontsize=8)
        axis.margins(x=.5)
        axis.set_xlim(left=0)
        axis.set_ylim(len(names) - .4, -.6)
        axis.grid(visible=False, axis='y')
        axis.set_yticks(range(len(names)), names if axis is axes[0, 0] else [''] * len(names))
        axis.set_title(f'{phase}, batch {batch}', fontsize=9)
        axis.set_xlabel('ms')
    write_results(args, device, rows, figure, targets(rows), batch_of_training=args.batch, size=args.size)


def main() -> None:
    """Check, time, and write the results."""
    options = parser(__doc__.splitlines()[0], 'networks', seconds=7.)
    options.add_argument('--size', type=int, default=224, help='side of the images in pixels')
    args = options.parse_args()
    device = start(args)
    torch.manual_seed(0)
    models = {name: create(name, device) for name in NETWORKS}
    rows = latencies(models, args, device)
    rows += steps(models, args, device)
    report(rows, args, device)


if __name__ == '__main__':
    main()
