"""Backbones: what makes feature maps of an image."""
