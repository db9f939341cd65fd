"""Measurements: how fast and how large things are here. Not part of the installed package; no room imports it."""
