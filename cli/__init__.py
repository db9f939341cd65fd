"""The command `asag`: thin faces over the functions of the rooms."""
