"""Many devices and many processes: the mesh, what lies where on it, start-up and liveness."""
