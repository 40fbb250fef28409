"""An HTTP file server on gevent.pywsgi whose downloads are spliced: ``gsplice serve [DIR]``.

The application is an ordinary WSGI one. All it does for the fast path is to hand an open file to
``environ["wsgi.file_wrapper"]``, which ``gsplice.patch_all()`` adds to pywsgi, and to return
what it gets, untouched. Without it (``--no-patch``) the same bytes go through Python. Any other
server of WSGI can run it, too: ``gunicorn -k gevent_pywsgi 'gsplice.file_server:make_app("DIR")'``.

A request with several ranges is answered with the whole file, as RFC 9110 allows.

It needs what ``pip install 'gsplice[serve]'`` installs.
"""

from __future__ import annotations

from .app import FileServer, make_app
from .command import main

__all__ = ["FileServer", "main", "make_app"]
