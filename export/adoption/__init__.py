"""A detector that another tool exported becomes a file of our contract: `asag adopt`."""
