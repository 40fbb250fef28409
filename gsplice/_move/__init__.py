"""How bytes move: the entrance, the two steps through a pipe, and the account of a transfer."""
