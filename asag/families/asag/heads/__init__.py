"""The decoder layers that ASAG comes with."""
