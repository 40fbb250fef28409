"""What replaces the functions and methods of others, one module for each."""
