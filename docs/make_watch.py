"""Draw docs/watch.png: the page of a run of timm's train.py on handwritten digits, in two minutes on two cores.

    TIMM_SCRIPTS=/path/to/pytorch-image-models python docs/make_watch.py

Besides this package it needs the extra "quickstart" and Chromium.
"""
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from timm_shiftwise.cli import main
from timm_shiftwise.quickstart.digits import write_digits

COMMAND = [sys.executable, '-m', 'timm_shiftwise']
EPOCHS, EXCHANGES = 30, 46
WIDTH, HEIGHT = 1000, 2080  # of the window in pixels, down to the maps of the last stage


def train(folder: Path) -> Path:
    """Train test_sw by its recipe, but with layers pruned alike, and paths apart for a while, and return the run."""
    data = folder / 'data'
    images, _ = write_digits(data)
    recipe = folder / 'recipe.yaml'
    main(['recipe', 'test_sw', '--data-dir', str(data), '--epochs', str(EPOCHS), '--output', str(recipe)])
    steps = EPOCHS * (images // 32)
    subprocess.run([
        *COMMAND, 'run', 'train.py', '--config', recipe, '--device', 'cpu', '--workers', '2', '--model-kwargs',
        f'sparsity_steps={steps}', f'prune_interval={steps // EXCHANGES}', 'sparsity_init=uniform',
        'mask_sharing_interval=12', '--output', folder, '--experiment', 'digits', '--checkpoint-hist', str(EPOCHS),
    ], check=True)
    return folder / 'digits'


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = train(folder)
        subprocess.run([*COMMAND, 'watch', run.name], cwd=folder, check=True)
        picture = folder / 'page.png'
        subprocess.run([
            'chromium', '--headless', '--no-sandbox', '--hide-scrollbars', f'--user-data-dir={folder / "profile"}',
            f'--window-size={WIDTH},{HEIGHT}', f'--screenshot={picture}', (run / 'watch.html').as_uri(),
        ], check=True, stderr=subprocess.DEVNULL)  # it has much to say of what a desktop would have
        colours = Image.open(picture).convert('RGB').quantize(256, Image.Quantize.MAXCOVERAGE)  # the rare ones, too
        colours.save(Path(__file__).with_name('watch.png'), optimize=True)
