"""What an object is: a file, a socket, a pipe of the caller's, the body of an HTTP message."""
