"""Sessions of the backends, each opened by `runtime.session.open_session`."""
