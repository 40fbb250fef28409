"""The replacements for functions and methods of others, one module for each place."""
