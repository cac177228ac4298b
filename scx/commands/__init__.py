"""The commands of `scx`: one module each, with run(options) -> whether all is well."""
