"""Other processes: workers on a Ray cluster, the server and its clients, jobs for schedulers."""
