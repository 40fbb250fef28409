"""Forwarding both ways between two stream sockets."""
