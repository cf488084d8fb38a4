"""The verbs of the `txfm` command, one file each. They join the packages; nothing imports them."""
