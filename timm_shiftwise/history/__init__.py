"""What sparsity did in a run of timm's train.py: read from its folder, kept, compared and drawn as a page."""
