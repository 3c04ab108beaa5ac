"""What growing a ConvNeXt brings on the digits: accuracy, loss, training mode and reach, against the ConvNeXt itself.

    python examples/grow_digits.py

trains timm's test_convnext on the handwritten digits of scikit-learn, 64 pixels wide, grows it, fine-tunes all forms
with the same budget, and prints the table of docs/growing.md: about a quarter of an hour on one core.
"""
import copy
from collections.abc import Iterator
from statistics import mean, stdev

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from timm_shiftwise import calibrate, grow

SEEDS = (0, 1, 2)
EPOCHS = 4
BATCH = 32
WITH_NORM = dict(centre_norm=True)
FORMS = {
    'ConvNeXt': None,
    'grown': {},
    'grown, calibrated': {},
    'grown, centre norm': WITH_NORM,
    'grown, centre norm, calibrated': WITH_NORM,
    'grown, 60 % sparse': dict(sparsity=0.6, prune_interval=20, sparsity_steps=EPOCHS * 44),
}
"""Each form with what `grow` is told; None for the ConvNeXt itself."""


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and held-out images [B, 3, 64, 64] and labels; every fifth image is held out."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=64, mode='bilinear').expand(-1, 3, -1, -1).contiguous()
    labels, held_out = torch.tensor(digits.target), torch.arange(len(images)) % 5 == 4
    return images[~held_out], labels[~held_out], images[held_out], labels[held_out]


def batches(images: Tensor, labels: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches, moved by up to four pixels, the last smaller one dropped."""
    order = torch.randperm(len(images), generator=generator)[:len(images) // BATCH * BATCH]
    for chosen in order.split(BATCH):
        shift = torch.randint(-4, 5, (2,), generator=generator).tolist()
        yield images[chosen].roll(shift, (2, 3)), labels[chosen]


def train(model: nn.Module, images: Tensor, labels: Tensor, lr: float, seed: int) -> list[float]:
    """Train, and return the loss of every step."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=lr, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched='cosine', num_epochs=EPOCHS, warmup_epochs=1, warmup_lr=lr / 10, min_lr=1e-6,
        step_on_epochs=False, updates_per_epoch=len(images) // BATCH)
    losses = []
    for _ in range(EPOCHS):
        model.train()
        for x, y in batches(images, labels, generator):
            loss = F.cross_entropy(model(x), y, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            scheduler.step_update(len(losses))
    return losses


@torch.inference_mode()
def logits(model: nn.Module, images: Tensor, training: bool = False) -> Tensor:
    """Logits of all images, in evaluation mode or as training mode gives them; the model is left as it was."""
    model = copy.deepcopy(model).train(training)
    return torch.cat([model(part) for part in images.split(BATCH)])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 in percent."""
    return 100 * (logits(model, images).argmax(1) == labels).double().mean().item()


def reach(model: nn.Module, images: Tensor) -> float:
    """Side in pixels of the square around the centre that holds half of the gradient of the last map's middle."""
    model = copy.deepcopy(model).eval()
    x = F.interpolate(images, size=160, mode='bilinear').requires_grad_()
    middle = model.forward_features(x)[:, :, 2, 2]
    gradient, = torch.autograd.grad(middle.relu().sum(), x)
    share = gradient.abs().sum((0, 1)).double()  # [160, 160]
    distance = torch.stack(torch.meshgrid(*[(torch.arange(160) - 79.5).abs()] * 2, indexing='ij')).amax(0)
    order = distance.flatten().argsort()
    held = share.flatten()[order].cumsum(0) / share.sum()
    return 2 * distance.flatten()[order][(held < 0.5).sum()].item()


def run(seed: int) -> dict[str, dict[str, float]]:
    """Pretrain, grow and fine-tune with one seed; what is measured of each form."""
    images, labels, held_out, answers = load()
    torch.manual_seed(seed)
    convnext = timm.create_model('test_convnext', num_classes=10, ls_init_value=0.1)
    train(convnext, images, labels, 2e-3, seed)
    found = {}
    for form, args in FORMS.items():
        torch.manual_seed(seed)
        model = copy.deepcopy(convnext) if args is None else grow(convnext, **args)
        if 'calibrated' in form:
            calibrate(model, batches(images, labels, torch.Generator().manual_seed(seed)), batches=8)
        wanted, before = logits(convnext, held_out), logits(model, held_out)
        row = {
            'accuracy before': accuracy(model, held_out, answers),
            'logits off by': (before - wanted).abs().max().item(),
            'other answers': (before.argmax(1) != wanted.argmax(1)).sum().item(),
            'mean change of a logit in training mode': (logits(model, held_out, True) - wanted).abs().mean().item(),
            'reach before': reach(model, held_out[:8]),
        }
        losses = train(model, images, labels, 1e-3, seed + 100)
        found[form] = {
            **row,
            'loss of the first 20 steps': mean(losses[:20]),
            'loss of the last epoch': mean(losses[-len(losses) // EPOCHS:]),
            'accuracy after': accuracy(model, held_out, answers),
            'reach after': reach(model, held_out[:8]),
        }
        print(seed, form, {name: round(value, 3) for name, value in found[form].items()}, flush=True)
    return found


def main() -> None:
    """Run all seeds and print mean and spread of every measure."""
    runs = [run(seed) for seed in SEEDS]
    measures = list(runs[0]['grown'])
    print('\n| form |', ' | '.join(measures), '|\n|---|' + '---:|' * len(measures))
    for form in FORMS:
        cells = []
        for measure in measures:
            values = [found[form][measure] for found in runs]
            cells.append(f'{mean(values):.3g} ± {stdev(values):.2g}')
        print(f'| {form} |', ' | '.join(cells), '|')


if __name__ == '__main__':
    main()
