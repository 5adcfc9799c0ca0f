"""Where the workers run: in this process, or as Ray actors. Nothing else of the run knows."""
