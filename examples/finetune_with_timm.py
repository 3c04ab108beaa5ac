"""Fine-tune published weights on your own folder of images, with timm's unmodified train.py.

    pip install .  # in a clone of this repository
    git clone --depth 1 --branch v$TIMM_VERSION https://github.com/huggingface/pytorch-image-models timm-scripts
    TIMM_SCRIPTS=timm-scripts python examples/finetune_with_timm.py hf-hub:you/sw_tiny_mine --data-dir PHOTOS

PHOTOS has train/CLASS/*.jpg and val/CLASS/*.jpg; $TIMM_VERSION is what `pip show timm` says. The weights are whatever
timm.create_model takes: a repository of the Hub, a folder that `timm-shiftwise convert` wrote (local-dir:FOLDER), or a
name with weights of its own (test_sw.digits, sw_convnext_tiny). What follows the options goes to train.py as it is.

Expect a recipe fitted to your images (finetuned/recipe.yaml, yours to edit), train.py's own output in finetuned/run,
and in finetuned/model a folder with a model card for timm, transformers and the Hub. Masks stay as they are in the
weights. train.py needs no launcher: the recipe has it import this package.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

import timm
from timm.data import create_dataset
from timm.models import save_for_hf

import timm_shiftwise  # noqa: F401  registers the models


def command(*arguments: object) -> None:
    """Run timm-shiftwise in a process of its own; an error ends this one, too."""
    subprocess.run([sys.executable, '-m', 'timm_shiftwise', *map(str, arguments)], check=True)


def finetune(weights: str, data_dir: Path, output: Path, epochs: int, *train_options: str) -> Path:
    """Write the weights, a recipe, a run of train.py and the folder of the result; return the latter."""
    model = timm.create_model(weights, pretrained=True)
    output.mkdir(parents=True)
    save_for_hf(model, str(output / 'start'), safe_serialization=True)
    recipe = output / 'recipe.yaml'
    command('recipe', model.pretrained_cfg['architecture'], '--from', output / 'start', '--data-dir', data_dir,
            '--epochs', epochs, '--output', recipe)
    command('run', 'train.py', '--config', recipe, '--output', output, '--experiment', 'run', *train_options)
    command('convert', output / 'run', '--output', output / 'model')
    # the names of the classes, which train.py does not keep
    config, classes = output / 'model' / 'config.json', create_dataset('folder', str(data_dir)).reader.class_to_idx
    config.write_text(json.dumps(json.loads(config.read_text()) | {'label_names': list(classes)}, indent=2))
    return output / 'model'


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('weights')
    parser.add_argument('--data-dir', type=Path, required=True)
    parser.add_argument('--output', type=Path, default=Path('finetuned'))
    parser.add_argument('--epochs', type=int, default=30)
    args, others = parser.parse_known_args()
    print(finetune(args.weights, args.data_dir, args.output, args.epochs, *others))
