"""How bytes move: the door, the two steps through a pipe, and the account of a transfer."""
