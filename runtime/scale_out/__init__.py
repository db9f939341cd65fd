"""Detecting in very many images with Ray."""
