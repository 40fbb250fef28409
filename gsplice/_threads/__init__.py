"""The threads of each hub that wait for disks, and the resources that their jobs use."""
