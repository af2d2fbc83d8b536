"""C3: takes jobs from the broker, runs operations on their images in child processes, and replies."""
