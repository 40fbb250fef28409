"""The gevent hub of the running greenlet."""

from __future__ import annotations

import sys
from typing import Any

from gevent._hub_local import get_hub_if_exists
from greenlet import getcurrent


def hub_to_serve() -> Any:
    """Return the hub that can run other greenlets while this one waits; None if there is none.

    There is none if this thread has made none, in the hub's own greenlet, and while the interpreter
    exits, when even getcurrent() raises.
    """
    if sys.is_finalizing():
        return None
    hub = get_hub_if_exists()
    return None if hub is getcurrent() else hub


def let_the_loop_turn(hub: Any) -> None:
    """Let the loop of *hub* poll for events once, and run the greenlets that are ready.

    Not by ``gevent.sleep(0)``: gevent runs dozens of its callbacks between two polls.
    """
    with hub.loop.timer(0.0) as timer:
        hub.wait(timer)
