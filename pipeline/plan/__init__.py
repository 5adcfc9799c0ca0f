"""What a config will take before it is run: layout, memory, time; the loop in virtual time."""
