"""The pool of pipes: a list for each hub, a locked one for all, and reclamation."""
