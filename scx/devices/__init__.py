"""Where the encoding runs: one file per secure device."""
