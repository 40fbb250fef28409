"""The threads that wait for disks, a few for each hub, and what they own while they do."""
