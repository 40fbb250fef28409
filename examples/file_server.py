"""The file server of ``gsplice serve`` as a program of one's own.

    python examples/file_server.py --port 8000 ~/Downloads

``gsplice/file_server`` has what it does: ``app.py`` is the WSGI application, ``files.py`` hands an
open file to the server, and ``command.py`` starts that.
"""

# Before anything else imports socket or ssl.
from gevent import monkey

monkey.patch_all()

import sys

from gsplice.file_server import main

if __name__ == "__main__":
    sys.exit(main())
