"""``python -m gsplice doctor``."""
