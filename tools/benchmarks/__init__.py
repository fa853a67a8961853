"""One module per benchmark: ``add_options(parser)``, and ``measure(args)``, which returns the rows."""
