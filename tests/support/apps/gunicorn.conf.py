# Two servers at the same time would share one control socket.
control_socket_disable = True
loglevel = "warning"
