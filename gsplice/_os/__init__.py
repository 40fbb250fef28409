"""The ground floor: what only Linux has, the gevent hub, and what happens at a fork."""
