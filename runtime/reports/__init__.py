"""One HTML page of parity and speed."""
