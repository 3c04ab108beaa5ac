"""Training recipes for timm's train.py: what was published, and how it is fitted to a run."""
from .images import IMAGENET, Images, RecipeError, count_images
from .published import OPTIMISER, RECIPES, Recipe, finetuning
from .run import Run, fit_schedule, own_schedule, plan_run
from .text import recipe_text

__all__ = [
    'IMAGENET',
    'OPTIMISER',
    'RECIPES',
    'Images',
    'Recipe',
    'RecipeError',
    'Run',
    'count_images',
    'finetuning',
    'fit_schedule',
    'own_schedule',
    'plan_run',
    'recipe_text',
]
