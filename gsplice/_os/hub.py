"""The gevent hub of the running greenlet."""

from __future__ import annotations

import sys
from typing import Any

from gevent._hub_local import get_hub_if_exists
from greenlet import getcurrent


def hub_to_serve() -> Any:
    """Return the hub that can run others while this greenlet waits; None if there is none.

    There is none where nobody has made one, in the hub's own greenlet, and while the interpreter
    ends, when even asking for the current greenlet is an error.
    """
    if sys.is_finalizing():
        return None
    hub = get_hub_if_exists()
    return None if hub is getcurrent() else hub


def let_the_loop_turn(hub: Any) -> None:
    """Let the loop of *hub* look for events once, and run whoever is ready.

    Not ``gevent.sleep(0)``: gevent runs dozens of such callbacks between two looks for events.
    """
    with hub.loop.timer(0.0) as timer:
        hub.wait(timer)
