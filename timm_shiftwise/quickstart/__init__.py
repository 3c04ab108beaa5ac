"""What ``timm-shiftwise quickstart`` does, step by step: digits, training, a picture."""
