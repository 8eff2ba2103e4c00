"""Many workers: on one folder, behind a socket, on a cluster, in the files of a scheduler."""
