"""What everything else builds on: Linux, the gevent hub, forks, and numbers for results."""
