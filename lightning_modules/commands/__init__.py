"""Tool commands of the command line; each file offers add_arguments(parser) and run(namespace)."""
