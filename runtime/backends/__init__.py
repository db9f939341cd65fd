"""Sessions of the backends, each opened by `runtime.opening.open_session`."""
