"""Core ML packages: layout, weight file, program."""
