"""`asag adopt`."""
