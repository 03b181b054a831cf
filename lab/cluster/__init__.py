"""What serving over a cluster costs and survives: a Ray cluster and servers of this machine."""
